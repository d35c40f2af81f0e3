"""`check_paths`: every file that is named or lies in a folder that is named, then the files of each folder together."""

import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gigapath.check.contents import Contents, read_contents
from gigapath.check.findings import FileReport, FolderReport
from gigapath.check.folder import check_folder, compared
from gigapath.check.places import check_places
from gigapath.check.scale import check_scale
from gigapath.check.values import check_values
from gigapath.features.foreign import TensorReader
from gigapath.findings import Finding
from gigapath.options import check_options, option

SUFFIXES = (".h5", ".npz", ".pt")
_COORDINATES = ".coordinates.npz"  # slide2vec's: read together with the embeddings
# What `gigapath map` and `gigapath export` write: no tile embeddings, and no fault where they lie in the folder.
_NO_FEATURES = ({"values.npy", "cells.npy"}, {"slide_ids.npy", "vectors.npy"})

# Adds what a look at the slide itself finds; handed in, since it needs encoders.
SlideChecker = Callable[[Contents], list[Finding]]


@dataclass(frozen=True)
class CheckOptions:
    """What is checked beyond what the files say."""

    tile_size_level0: float | None = option(
        None,
        "distance between neighbouring tiles, in the unit of the files' coordinates, where a file does not say",
        metavar="PIXELS",
        above=0,
    )
    slides: str | None = option(
        None, "read tiles of these slides again and compare their embeddings", metavar="DIR|MANIFEST"
    )
    sample: int = option(8, "tiles a slide that are read again", at_least=1)
    tile_encoder: str | None = option(
        None, "the encoder to compare with (default: the one that the file names)", metavar="NAME"
    )
    device: str = option("auto", "where that encoder runs", metavar="auto|cpu|cuda|mps")

    def __post_init__(self) -> None:
        check_options(self)


def check_paths(
    paths: Sequence[str | Path],
    *,
    options: CheckOptions | None = None,
    read_tensor: TensorReader | None = None,
    check_slide: SlideChecker | None = None,
    after_file: Callable[[FileReport], None] = lambda report: None,
) -> tuple[list[FileReport], list[FolderReport]]:
    """Check feature files.

    Args:
        paths: files, or folders that are searched with their subfolders (a run's output, a tool's).
        options: what is checked.
        read_tensor: reads `.pt` files.
        check_slide: looks at the slide of a file of tile embeddings (`gigapath.check.slides`).
        after_file: is told of each file once it is checked.

    Returns:
        a report of each file in order, and of each folder that holds several.

    Raises:
        FileNotFoundError: a path doesn't exist, or a folder holds no feature file.
    """
    options = options or CheckOptions()
    reports = []
    for path in find_files(paths):
        report = check_file(path, options=options, read_tensor=read_tensor, check_slide=check_slide)
        after_file(report)
        reports.append(report)
    folders: dict[Path, list[FileReport]] = defaultdict(list)
    for report in reports:
        folders[report.path.parent].append(report)
    found = [FolderReport(folder, check_folder(folder, inside)) for folder, inside in folders.items()]
    return reports, found


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The feature files that are meant, each once."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.suffix in SUFFIXES
                and not file.name.endswith(_COORDINATES)
                and file.is_file()
                and not _is_map_or_table(file)
            )
            if not inside:
                raise FileNotFoundError(f"{path}: expected a folder with feature files ({', '.join(SUFFIXES)}), none.")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise FileNotFoundError(f"{path}: no such file or folder.")
    return list(found)


def _is_map_or_table(path: Path) -> bool:
    """Whether an .npz is a map or an exported table; one that can't be opened counts as a feature file."""
    if path.suffix != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    return any(own <= names for own in _NO_FEATURES)


def check_file(
    path: Path,
    *,
    options: CheckOptions,
    read_tensor: TensorReader | None = None,
    check_slide: SlideChecker | None = None,
) -> FileReport:
    """Check one file; whatever is wrong with it is in the report."""
    report = FileReport(path)
    try:
        held = read_contents(path, read_tensor=read_tensor)
    except (ValueError, OSError) as error:
        message = str(error).removeprefix(f"{path.name}: ")
        report.findings.append(Finding("unreadable", message, "Nothing can be taken from it."))
        return report
    if held.step is None and options.tile_size_level0 is not None and held.kind != "slide embeddings":
        held = replace(held, step=(options.tile_size_level0, options.tile_size_level0))
    report.kind, report.tool, report.slide_id = held.kind, held.tool, held.slide_id
    places = held.features if held.features is not None else held.coords
    report.tiles = None if places is None or not places.shape else len(places)
    report.compared = compared(held)
    report.findings += _check_identity(held)
    values, report.digest = check_values(held)
    report.findings += values + check_places(held) + check_scale(held)
    if check_slide is not None and held.kind == "tile embeddings" and not _unusable(report):
        report.findings += check_slide(held)
    return report


def _unusable(report: FileReport) -> bool:
    return any(finding.name in ("shapes", "coords-not-finite", "no-tiles") for finding in report.findings)


def _check_identity(held: Contents) -> list[Finding]:
    findings = []
    if held.complete is False:
        text = "it was never finished: the mark `complete` is missing."
        findings.append(Finding("incomplete", text, "Some of its tiles may be missing. Make it again."))
    named = held.attrs.get("name") if held.tool == "trident" else held.slide_id
    stem = held.path.name.removesuffix(held.path.suffix)
    if isinstance(named, str) and named != stem and not stem.startswith((f"{named}.section-", f"{named}.patch")):
        text = f"it says that it is of slide {named!r}."
        findings.append(Finding("name", text, "A label that is joined by the file's name goes to the wrong slide."))
    return findings


def as_json(reports: Sequence[FileReport], folders: Sequence[FolderReport]) -> str:
    """Everything that was found, as one JSON document; paths are as they were given."""
    document: dict[str, Any] = {
        "files": [
            {
                "file": str(report.path),
                "kind": report.kind or None,
                "tool": report.tool or None,
                "slide_id": report.slide_id or None,
                "tiles": report.tiles,
                "wrong": report.wrong,
                "findings": _plain(report.findings),
            }
            for report in reports
        ],
        "folders": [
            {"folder": str(folder.path), "wrong": folder.wrong, "findings": _plain(folder.findings)}
            for folder in folders
        ],
        "files_wrong": sum(report.wrong for report in reports),
        "folders_wrong": sum(folder.wrong for folder in folders),
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {"name": finding.name, "wrong": finding.wrong, "text": finding.text, "effect": finding.advice}
        for finding in findings
    ]
