"""Taking one slide out of an output folder, for consent withdrawn: its files, its rows, every mention of it."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.cohort.manifest import SHARDS
from gigapath.cohort.record import PRIVATE, RUNS, recorded_paths
from gigapath.cohort.status import SLIDES_CSV, STAGE_FOLDERS, draw_contact_sheet
from gigapath.file_names import folder_name, safe_name
from gigapath.files import PARTIAL_SUFFIX, OutputError, write_text_atomic
from gigapath.preprocessing.slide import slide_id_of
from gigapath.tables import csv_text

REMOVED = "<removed>"
_SUFFIXES = (".h5", ".json", ".jpg")
# What the files of maps and of the report's pictures end in, in the slide's own folder.
_PICTURES = (".json", ".png", ".jpg", ".npz", ".geojson", PARTIAL_SUFFIX)
_TEXTS = (".csv", ".json", ".txt", ".md", ".html", ".tsv", ".yaml", ".log")
# Of a run's record.
_NAMES_NO_SLIDE = ("run_id", "started", "ended", "versions", "slides_sha256")
_TEXT_BYTES = 100_000_000


@dataclass(frozen=True)
class Removal:
    """What was removed, or would be, by names relative to the output folder: the slide's own `files`; files `edited` to
    take out its rows and mentions; pictures `redrawn` without it; other files that have `mentions` of it, which are
    left to their owner."""

    files: tuple[str, ...]
    edited: tuple[str, ...]
    redrawn: tuple[str, ...]
    mentions: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.files or self.edited)


def remove_slide(out: Path, slide_id: str, *, dry_run: bool = False) -> Removal:
    """Remove everything of a slide from an output folder, on which no run may work meanwhile: it would make the slide
    anew.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the file's name instead of the slide's id, or the name from before it took a pseudonym: its mentions
            would go and its results stay.
        OutputError: a file can't be removed or written.
    """
    safe_name(slide_id.replace("\\", "_"))  # a slide whose name is bad is listed with escapes
    if not out.is_dir():
        raise FileNotFoundError(f"no such folder: {out}")
    hide = _hiding(out, slide_id)
    files = _files_of(out, slide_id)
    if not files and slide_id_of(Path(slide_id)) != slide_id and _files_of(out, slide_id_of(Path(slide_id))):
        raise ValueError(
            f"{out}: expected the id of a slide, got {slide_id!r}, the name of its file. Its id is "
            f"{slide_id_of(Path(slide_id))!r}."
        )
    pseudonyms = sorted({entry.slide_id for entry in recorded_paths(out) if entry.original_id == slide_id})
    if not files and pseudonyms:
        raise ValueError(
            f"{out}: expected the id of a slide, got {slide_id!r}, its name before it took a pseudonym. Its id is "
            f"{' and '.join(map(repr, pseudonyms))}."
        )
    edits = _edits(out, slide_id, hide)
    sheet = out / "contact_sheet.jpg"
    shown = sheet.exists() and any(file.parent.name in ("tiles", "previews") for file in files)
    if not dry_run:
        for file in files:
            _unlink(file)
        for folder in _picture_folders(out, slide_id):
            with contextlib.suppress(OSError):  # somebody's own file lies there too
                folder.rmdir()
        for file, text in edits.items():
            if text is None:
                _unlink(file)
            else:
                write_text_atomic(file, text, mode=0o600 if file.parent.name == PRIVATE else 0o666)
        if shown and not draw_contact_sheet(out):
            _unlink(sheet)
    handled = {*files, *edits}
    found = _mentions(out, slide_id) if handled else ()  # a folder that no run wrote is not searched
    mentions = [path for path in found if path not in handled]
    names = (tuple(str(path.relative_to(out)) for path in of) for of in (files, edits, [sheet] * shown, mentions))
    return Removal(*names)


def _files_of(out: Path, slide_id: str) -> list[Path]:
    """The files of a slide in every stage, its pieces' and unfinished ones included, its maps and its pictures."""
    name = re.escape(slide_id)
    ending = "|".join(re.escape(suffix) for suffix in _SUFFIXES)
    form = re.compile(rf"{name}(\.section-\d+)?({ending})(\..*{re.escape(PARTIAL_SUFFIX)})?")
    folders = [path for path in out.iterdir() if path.name.startswith(("previews", *STAGE_FOLDERS)) and path.is_dir()]
    files = [path for folder in folders for path in folder.iterdir() if form.fullmatch(path.name)]
    pictures = [path for folder in _picture_folders(out, slide_id) for path in folder.iterdir()]
    return sorted([*files, *(path for path in pictures if path.suffix in _PICTURES and path.is_file())])


def _picture_folders(out: Path, slide_id: str) -> list[Path]:
    """The slide's folders of maps and of the report's pictures, those that are there; what a link leads to stays."""
    folders = (out / "maps" / slide_id, out / "report_files" / folder_name(slide_id))
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _edits(out: Path, slide_id: str, hide: Callable[[str], str]) -> dict[Path, str | None]:
    """file -> its content without the slide, or None where the whole file goes."""
    edits: dict[Path, str | None] = {}
    for path in (out / SLIDES_CSV, out / PRIVATE / "paths.csv"):
        rows = list(csv.reader(io.StringIO(_read(path), newline="")))
        kept = [*rows[:1], *(row for row in rows[1:] if row and row[0] != slide_id)]
        if len(kept) < len(rows):
            edits[path] = csv_text(kept)
    for path in sorted((out / SHARDS).glob("*.csv")):  # the next job of an array cuts the cohort anew
        if any(row[:1] == [slide_id] for row in csv.reader(io.StringIO(_read(path), newline=""))):
            edits[path] = None
    for path in sorted([*(out / RUNS).glob("*.json"), *(out / PRIVATE).glob("*.json")]):
        try:
            content = json.loads(_read(path))
        except ValueError:
            continue
        cleaned = _cleaned(content, slide_id, hide)
        if cleaned != content:
            # Paths need not be valid UTF-8; as escapes they are kept.
            edits[path] = json.dumps(cleaned, indent=2, ensure_ascii=path.parent.name == PRIVATE) + "\n"
    return edits


def _cleaned(value: Any, slide_id: str, hide: Callable[[str], str]) -> Any:
    """A run record's content without the slide: its row goes, what names it elsewhere is replaced.

    The rows of other slides stay as they are, also where "12" is a folder of theirs, and so do times and versions.
    """
    if isinstance(value, dict):
        return {hide(k): item if k in _NAMES_NO_SLIDE else _cleaned(item, slide_id, hide) for k, item in value.items()}
    if isinstance(value, list):
        return [
            item if _is_row(item) else _cleaned(item, slide_id, hide)
            for item in value
            if not (_is_row(item) and item[0] == slide_id)
        ]
    return hide(value) if isinstance(value, str) else value


def _is_row(value: Any) -> bool:
    """Whether a list's item is a slide's row: [slide_id, path, ...]."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value[:2])


def _hiding(out: Path, slide_id: str) -> Callable[[str], str]:
    """What puts `<removed>` in place of the slide's id, as a whole word, and of its file and mask."""
    names = {slide_id}
    for entry in recorded_paths(out):
        if entry.slide_id == slide_id:
            names |= {str(path) for path in (entry.path, entry.mask) if path is not None}
            names |= {path.name for path in (entry.path, entry.mask) if path is not None}
    pattern = _words(names)
    return lambda text: pattern.sub(REMOVED, text)


def _mentions(out: Path, slide_id: str) -> Iterator[Path]:
    """The texts that name the slide as a whole word, also as JSON writes it."""
    named = _words({slide_id, json.dumps(slide_id)[1:-1]})
    for path in sorted(out.rglob("*")):
        small = path.suffix.lower() in _TEXTS and path.is_file() and path.stat().st_size < _TEXT_BYTES
        if small and named.search(_read(path)):
            yield path


def _words(names: Collection[str]) -> re.Pattern[str]:
    """Any of these names as a whole word, the longest first."""
    form = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w.-])(?:{form})(?![\w-])")


def _read(path: Path) -> str:
    """A text, or "" where it can't be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path.parent.name}/{path.name} could not be removed: {error.strerror or error}. "
            "Ask the folder's owner, then run the same command again."
        ) from error
