"""Keeps paths, user and host names out of everything but `private/`."""

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gigapath.cohort.manifest import SlideEntry
from gigapath.files import write_text_atomic

PRIVATE = "private"
_PATHS = "paths.csv"
_COLUMNS = ("slide_id", "path", "mpp", "mask")
# An absolute path of two parts or more; what stands before keeps "tiles/s" and addresses of the web whole.
_ABSOLUTE = re.compile(r"(?<![\w.:/<>])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+[^\s:'\",;]*")
_NOT_A_PATH = ("hf_hub:", "hf-hub:", "http://", "https://")


def without_paths(text: str, entry: SlideEntry) -> str:
    """A message about a slide with its id in place of its file name, folders and mask."""
    for path in (entry.path, entry.mask):
        if path is None:
            continue
        for form in (path.resolve(), path.absolute(), path):
            text = text.replace(str(form), entry.slide_id)
        for folder in (path.resolve().parent, path.absolute().parent, path.parent):
            if len(folder.parts) > 1:  # "." and "/" would hit every other word
                text = text.replace(str(folder), "<folder>")
        text = text.replace(path.name, entry.slide_id)
    return _ABSOLUTE.sub("<path>", text)


def redact(value: Any) -> Any:
    """An option's value, or a word of the command line, with "<path>" in place of everything that names a file."""
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str) or value.startswith(_NOT_A_PATH):
        return value
    if value.startswith("--") and "=" in value:
        name, _, rest = value.partition("=")
        return f"{name}={redact(rest)}"
    named = value.removeprefix("timm:")
    if named != value and not Path(named).exists():
        return value
    names_file = os.sep in value or "\\" in value or value in (".", "..")
    return "<path>" if names_file or Path(value).exists() else value


def write_private(out: Path, name: str, text: str) -> None:
    """Write `private/<name>`, which only its owner may read."""
    write_text_atomic(out / PRIVATE / name, text, mode=0o600)


def record_paths(out: Path, entries: Iterable[SlideEntry]) -> None:
    """Add the slides of a run to `private/paths.csv`; a slide that is there already takes the new path."""
    rows = {entry.slide_id: entry for entry in recorded_paths(out)} | {entry.slide_id: entry for entry in entries}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for entry in rows.values():
        mask = "" if entry.mask is None else entry.mask.resolve()
        writer.writerow([entry.slide_id, entry.path.resolve(), "" if entry.mpp is None else entry.mpp, mask])
    write_private(out, _PATHS, text.getvalue())


def recorded_paths(out: Path) -> list[SlideEntry]:
    """The slides that earlier runs on this folder saw; empty where there is no record."""
    path = out / PRIVATE / _PATHS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(file))
    return [
        SlideEntry(
            slide_id=row["slide_id"],
            path=Path(row["path"]),
            mpp=float(row["mpp"]) if row["mpp"] else None,
            mask=Path(row["mask"]) if row["mask"] else None,
        )
        for row in rows
    ]
