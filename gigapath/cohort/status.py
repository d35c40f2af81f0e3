"""The truth of a run: one small status file beside each result. `slides.csv`, and how far a cohort is, are derived from
them: no job need run for it, and nothing heavy is imported."""

import contextlib
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigapath.files import visible_files, write_json_atomic, write_text_atomic
from gigapath.tables import csv_text
from gigapath.text import without_name

STATES = ("done", "no_tissue", "failed", "stopped", "todo")
FINISHED = ("done", "no_tissue")
SLIDES_CSV = "slides.csv"
_FIRST_COLUMNS = ("slide_id", "status", "tiles", "seconds", "tiles/s", "error")
_DERIVED_AT_MOST = 3
_KINDS_SHOWN, _SLIDES_SHOWN = 20, 5
_MOST_BYTES = 1 << 24  # of a status
# Columns of slides.csv that are not the manifest's: of these names, those of the manifest get a prefix.
_OURS = re.compile(
    r"slide_id|status|tiles|tiles/s|error|warnings|vendor|scanner|width|height|objective_power|mpp|mpp_x|mpp_y|mpp_source"
    r"|level|read_width|read_height|tile_size|tissue_(method|threshold|area_mm2|pieces)|dropped_.*|file_sha256"
    r"|seconds(_.*)?|numerics_version.*|tile_encoder|precision|device|trained|trained_on|reader|filter|slide_encoder"
    r"|sections|section_numbers|manifest_.*"
)
_STAGE_TITLES = {"tiles": "tile", "features": "embed", "slides": "slide_embed"}
# What the errors of `preprocessing.tiling` say of slides that are no stained brightfield slides.
_REFUSED = ("got a dark background", "got grey pixels")


@dataclass(frozen=True)
class Status:
    """How a stage ("tiles", "features" or "slides") ended for one slide: done | no_tissue | failed | stopped.

    Attributes:
        tiles, seconds: how many tiles it worked on, and its wall time.
        error, warnings: one sentence on what went wrong, or ""; sentences on what to look at.
        identity: everything that the numbers depend on; results are reused where it is equal.
        digest: a short name for the result's content, which the next stage records of this one.
        numerics_version: of the stage's numbers; 0 where its identity names none.
        facts: provenance columns of slides.csv: plain numbers and words, no paths.
        columns: the manifest's columns, carried through.
        ended: when the stage ended, in seconds since 1970 (UTC).
        sha256: of the result's files by their names; folders of earlier versions have none.
        retryable: whether a failure is one of input or output, which another attempt may not meet; not kept in files.
    """

    slide_id: str
    stage: str
    status: str
    tiles: int = 0
    seconds: float = 0.0
    error: str = ""
    warnings: tuple[str, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    numerics_version: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    ended: float = 0.0
    sha256: Mapping[str, str] = field(default_factory=dict)
    retryable: bool = False

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do for this slide in this stage."""
        return self.status in FINISHED

    @property
    def refused(self) -> bool:
        """Whether the slide was left out on purpose: the encoders know none of its kind, and no further run helps."""
        return self.status == "failed" and any(words in self.error for words in _REFUSED)


def write_status(folder: Path, status: Status) -> None:
    """Write a slide's status file, whole or not at all; one that a power cut takes makes its slide one to do."""
    values = {name: value for name, value in vars(status).items() if name != "retryable"}
    write_json_atomic(folder / f"{status.slide_id}.json", values, durable=False)


def read_status(folder: Path, slide_id: str) -> Status | None:
    """The status of a slide, or None where none can be read, or it has other types than are written: then the slide is
    to do, and whoever else writes there ends no run."""
    try:  # by system calls: for thousands of small files `Path.read_text` takes longer than everything else together
        descriptor = os.open(f"{folder}/{slide_id}.json", os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            values = json.loads(file.read(_MOST_BYTES))
        status = Status(**{name: value for name, value in values.items() if name in Status.__dataclass_fields__})
        texts = (status.stage, status.error, status.digest, *status.warnings)
        object.__setattr__(status, "warnings", tuple(status.warnings))
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):
        return None
    good = (
        status.slide_id == slide_id
        and status.status in STATES
        and all(isinstance(value, int | float) for value in (status.tiles, status.seconds, status.ended))
        and isinstance(status.numerics_version, int | float)
        and all(isinstance(value, str) for value in texts)
        and all(isinstance(value, dict) for value in (status.identity, status.facts, status.columns, status.sha256))
    )
    return status if good else None


def read_statuses(folder: Path) -> dict[str, Status]:
    """slide_id -> status of everything in a stage's folder."""
    with contextlib.suppress(OSError):
        ids = sorted(name[:-5] for name in os.listdir(folder) if name.endswith(".json"))  # noqa: PTH208
        return {name: status for name in ids if (status := read_status(folder, name)) is not None}
    return {}


def derive(write: Callable[[], object], source: Callable[[], object]) -> None:
    """Write a derived file, and again where what it is derived from has changed meanwhile.

    Of two runs at once the slower writer may have read before the other's last result came: it sees that here. Where
    changes go on, the run that makes them writes the derived file when it ends.
    """
    for _ in range(_DERIVED_AT_MOST):
        before = source()
        write()
        if source() == before:
            break


def changed(folders: Sequence[Path]) -> list[int]:
    """When a file in each folder last got its name, or lost it; 0 where there is no such folder."""
    return [folder.stat().st_mtime_ns if folder.is_dir() else 0 for folder in folders]


def write_slides_csv(out: Path, stages: Sequence[Path], slide_ids: Collection[str] = ()) -> list[dict[str, Any]]:
    """Derive `slides.csv` from the status files of the stages' folders; its rows, by column."""
    rows: list[dict[str, Any]] = []

    def write() -> None:
        statuses = [read_statuses(folder) for folder in stages]
        ids = {*slide_ids, *(slide_id for stage in statuses for slide_id in stage)}
        rows[:] = [slide_row(slide_id, [stage.get(slide_id) for stage in statuses]) for slide_id in sorted(ids)]
        columns = list(dict.fromkeys([*_FIRST_COLUMNS, *(name for row in rows for name in row)]))
        cells = ([row.get(name, "") for name in columns] for row in rows)
        write_text_atomic(out / SLIDES_CSV, csv_text([columns, *cells]))

    derive(write, lambda: changed(stages))
    return rows


def draw_contact_sheet(out: Path) -> bool:
    """Draw `contact_sheet.jpg` of an output folder anew, suspects first; False where no slide is left to be shown."""
    from gigapath.preprocessing.preview import contact_sheet  # OpenCV, which no other use of statuses needs

    tiles = out / "tiles"
    failed = {name for name, status in read_statuses(tiles).items() if status.status == "failed"}
    shown = sorted({path.stem for path in visible_files(tiles, "*.h5")} - failed)
    contact_sheet(out, shown, failed=len(failed))
    return bool(shown)


def slide_row(slide_id: str, stages: Sequence[Status | None]) -> dict[str, Any]:
    """One slide's row of slides.csv: the first stage that is not finished says how the slide stands."""
    seen = [status for status in stages if status is not None]
    unfinished = [status for status in stages if status is None or not status.finished]
    if unfinished:
        overall, error = (unfinished[0].status, unfinished[0].error) if unfinished[0] else ("todo", "")
    else:
        overall, error = ("no_tissue" if any(status.status == "no_tissue" for status in seen) else "done"), ""
    tiles = max((status.tiles for status in seen), default=0)
    seconds = sum(status.seconds for status in seen)
    # The rate is that of the stage that reads and encodes the tiles, where the slide came that far.
    pace = next((status for status in reversed(seen) if status.stage != "slides" and status.finished), None)
    row: dict[str, Any] = {
        "slide_id": slide_id,
        "status": overall,
        "tiles": tiles,
        "seconds": round(seconds, 3),
        "tiles/s": round(pace.tiles / pace.seconds, 2) if pace is not None and pace.seconds > 0 else "",
        "error": error,
    }
    for status in seen:
        for name, value in status.columns.items():
            row[f"manifest_{name}" if _OURS.fullmatch(name) else name] = value
    for status in seen:
        title = _STAGE_TITLES[status.stage]
        row[f"seconds_{title}"] = round(status.seconds, 3)
        row[f"numerics_version_{title}"] = status.numerics_version
        row.update(status.facts)
    row["warnings"] = " ".join(dict.fromkeys(warning for status in seen for warning in status.warnings))
    return row


def failures_by_kind(errors: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Failed slides (slide -> its error) by what went wrong, the most frequent first. Errors that differ in names and
    numbers alone are of one kind, for which the first slide's own sentence stands."""
    kinds: dict[str, list[str]] = {}
    for slide_id in sorted(errors):
        kinds.setdefault(failure_kind(errors[slide_id], slide_id), []).append(slide_id)
    found: dict[str, tuple[str, ...]] = {}
    for slides in kinds.values():
        sentence = _of_any_slide(errors[slides[0]], slides[0])
        found[sentence] = (*found.get(sentence, ()), *slides)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _of_any_slide(error: str, slide_id: str) -> str:
    """A slide's error without its name, where that begins it or is in quotes: a slide may be called "grey" or "8"."""
    text = error.removeprefix(f"slide {slide_id!r}: ")
    return re.sub(rf"(^|'){re.escape(slide_id)}(?![^\W_])", r"\1...", text) if slide_id in text else text


def failure_kind(error: str, slide_id: str) -> str:
    """An error without the names and numbers in it."""
    text = re.sub(r"'[^']*'", "...", without_name(error, slide_id, "..."))
    return re.sub(r"(?<![\w.])\d[\d.,]*\d|(?<![\w.])\d", "N", text)


def failure_lines(failures: Mapping[str, Sequence[str]], word: str = "failed") -> Iterator[str]:
    """A line a kind of failure: how many slides, the sentence in full, and the first of them."""
    for kind, slides in list(failures.items())[:_KINDS_SHOWN]:
        more = f" and {len(slides) - _SLIDES_SHOWN:,} more" if len(slides) > _SLIDES_SHOWN else ""
        yield f"{len(slides):,} {word}: {kind} ({', '.join(slides[:_SLIDES_SHOWN])}{more})"
    if len(failures) > _KINDS_SHOWN:
        yield f"and {len(failures) - _KINDS_SHOWN} other kinds: see slides.csv"


# Folders of stages, in the order of the work.
STAGE_FOLDERS = ("tiles", "features_", "slides_", "as-", "contextual_")
# The rate is that of the results of so many seconds before the newest one.
_WINDOW_SECONDS = 3600.0


@dataclass(frozen=True)
class StageProgress:
    """How far one stage is.

    `counts` has every status; what failed in an earlier stage has failed here too. `last` is when the newest result
    came (seconds since 1970, UTC), the rates are by the clock, all jobs together, over the hour before it (None without
    one). `left` are slides that are stopped or to do, of `tiles_left` tiles: those not counted are taken to be like the
    others. `failures`: kind of failure -> slides, the most frequent first, each in the stage where it failed.
    """

    folder: str
    counts: Mapping[str, int]
    tiles: int = 0
    last: float = 0.0
    tiles_per_second: float | None = None
    slides_per_second: float | None = None
    left: int = 0
    tiles_left: int = 0
    seconds_left: float | None = None
    failures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_progress(out: Path) -> tuple[int, list[StageProgress]]:
    """The number of slides that an output folder knows of, and how far each of its stages is; FileNotFoundError where
    there is no such folder, ValueError where no run has left anything there."""
    if not out.is_dir():
        raise FileNotFoundError(f"no such folder: {out}")
    names = sorted(path.name for path in out.iterdir() if path.name.startswith(STAGE_FOLDERS) and path.is_dir())
    names.sort(key=lambda name: next(i for i, start in enumerate(STAGE_FOLDERS) if name.startswith(start)))
    stages = {name: read_statuses(out / name) for name in names}
    ids = {slide_id for found in stages.values() for slide_id in found}
    with contextlib.suppress(OSError, csv.Error, UnicodeDecodeError):  # it knows those that are still to do
        rows = csv.reader(io.StringIO((out / SLIDES_CSV).read_text(encoding="utf-8")))
        ids |= {row[0] for row in list(rows)[1:] if row}
    if not ids:
        raise ValueError(
            f"{out}: expected the output folder of a run, got one without slides. Name the folder of --out."
        )
    counted = {name: status.tiles for found in stages.values() for name, status in found.items() if status.finished}
    progress = []
    for name, found in stages.items():
        encoder = name.split("__")[1] if "__" in name else ""
        before = [stages[folder] for folder in {"tiles", f"features_{encoder}"} - {name} if folder in stages]
        failed_before = [slide for stage in before for slide, row in stage.items() if row.status == "failed"]
        states = dict.fromkeys(ids, "todo") | dict.fromkeys(failed_before, "failed")
        progress.append(_progress(name, found, states, counted))
    return len(ids), progress


def left_out(folder: Path) -> int:
    """How many slides of a run have no whole result in one of its stages' folders; 0 where no run made it."""
    try:
        _, stages = read_progress(folder.parent)
    except (ValueError, OSError):
        return 0
    counts = next((stage.counts for stage in stages if stage.folder == folder.name), {})
    return sum(count for state, count in counts.items() if state not in FINISHED)


def _progress(
    folder: str, found: Mapping[str, Status], states: Mapping[str, str], counted: Mapping[str, int]
) -> StageProgress:
    """How far a stage is, by the statuses found in its folder and the `states` of slides that have none there."""
    states = {**states, **{slide_id: status.status for slide_id, status in found.items()}}
    counts = Counter(states.values())
    done = [status for status in found.values() if status.finished]
    left = [slide_id for slide_id, state in states.items() if state in ("stopped", "todo")]
    known = [counted[slide_id] for slide_id in left if slide_id in counted]
    mean = sum(counted.values()) / len(counted) if counted else 0.0
    tiles_left = sum(known) + round(mean * (len(left) - len(known)))
    last = max((status.ended for status in done), default=0.0)
    recent = [status for status in done if status.ended > max(0.0, last - _WINDOW_SECONDS)]
    span = last - min((status.ended - status.seconds for status in recent), default=last)
    tiles_rate = sum(status.tiles for status in recent) / span if span > 0 else None
    slides_rate = len(recent) / span if span > 0 else None
    # Tiling costs by the slide, whatever is found on it.
    rate, todo = (slides_rate, len(left)) if folder == "tiles" else (tiles_rate, tiles_left)
    return StageProgress(
        folder=folder,
        counts={state: counts[state] for state in STATES},
        tiles=sum(status.tiles for status in done),
        last=last,
        tiles_per_second=tiles_rate,
        slides_per_second=slides_rate,
        left=len(left),
        tiles_left=tiles_left,
        seconds_left=todo / rate if rate else None,
        failures=failures_by_kind({name: status.error for name, status in found.items() if status.status == "failed"}),
    )
