"""The contact sheet of an output folder: the previews of its tiled slides, and how many others failed."""

from pathlib import Path

from gigapath.cohort.status import read_statuses
from gigapath.files import visible_files
from gigapath.preprocessing.preview import contact_sheet


def draw_contact_sheet(out: Path) -> bool:
    """Draw `contact_sheet.jpg` of an output folder anew, suspects first; False where no slide is left to be shown."""
    tiles = out / "tiles"
    failed = {name for name, status in read_statuses(tiles).items() if status.status == "failed"}
    shown = sorted({path.stem for path in visible_files(tiles, "*.h5")} - failed)
    contact_sheet(out, shown, failed=len(failed))
    return bool(shown)
