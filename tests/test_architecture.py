"""The folder listing is the architecture: imports go down only, and the cheap parts stay cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.draw_rooms import RANK

PACKAGE = Path(__file__).parent.parent / "gigapath"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

WITHOUT_TORCH = {
    *("options", "releases", "files", "file_names", "findings", "tables", "text", "machine", "progress", "read_ahead"),
    *("features", "preprocessing", "cohort", "hub", "report"),
}


def imported_modules(path: Path, *, when_loaded: bool = False) -> set[str]:
    """Full names of everything that a file imports; with `when_loaded` only what it imports at its top."""
    names = set()
    tree = ast.parse((PACKAGE / path).read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.update([node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)])
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_only_and_the_slide_side_never_imports_torch(path: Path) -> None:
    room = path.parts[0].removesuffix(".py")
    assert room in RANK, f"{room} has no layer: say where it belongs"
    for name in imported_modules(path):
        package, other, *_ = *name.split("."), ""
        if package == "gigapath" and other in RANK:
            assert other == room or RANK[other] < RANK[room], f"{room} imports {name}, which is not below it"
    if room in WITHOUT_TORCH:
        # `.pt` files are read and written where feature files are: torch is loaded when one comes.
        names = imported_modules(path, when_loaded=room == "features")
        assert not {name.split(".")[0] for name in names} & {"torch", "timm", "torchvision"}


@pytest.mark.parametrize("statement", ["import gigapath", "from gigapath.cli.main import main; main(['--version'])"])
def test_light_entry_points_import_nothing_heavy(statement: str) -> None:
    code = (
        f"import sys\ntry:\n    exec({statement!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'h5py', 'openslide'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
