"""How far a cohort is, read from the status files alone: no job need run, and nothing heavy is imported."""

import csv
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gigapath.cohort.status import FINISHED, SLIDES_CSV, STATES, Status, failures_by_kind, read_statuses

# Folders of stages, in the order of the work.
_STAGE_FOLDERS = ("tiles", "features_", "slides_", "as-", "contextual_")
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
    folders = sorted(
        (path for path in out.iterdir() if path.name.startswith(_STAGE_FOLDERS) and path.is_dir()), key=_order
    )
    stages = {folder.name: read_statuses(folder) for folder in folders}
    ids = {slide_id for found in stages.values() for slide_id in found} | _listed(out / SLIDES_CSV)
    if not ids:
        raise ValueError(
            f"{out}: expected the output folder of a run, got one without slides. Name the folder of --out."
        )
    counted = {name: status.tiles for found in stages.values() for name, status in found.items() if status.finished}
    return len(ids), [
        _progress(name, found, ids, counted, _failed_before(name, stages)) for name, found in stages.items()
    ]


def left_out(folder: Path) -> int:
    """How many slides of a run have no whole result in one of its stages' folders; 0 where no run made it."""
    try:
        _, stages = read_progress(folder.parent)
    except (ValueError, OSError):
        return 0
    counts = next((stage.counts for stage in stages if stage.folder == folder.name), {})
    return sum(count for state, count in counts.items() if state not in FINISHED)


def _order(folder: Path) -> tuple[int, str]:
    return next(i for i, start in enumerate(_STAGE_FOLDERS) if folder.name.startswith(start)), folder.name


def _failed_before(name: str, stages: Mapping[str, Mapping[str, Status]]) -> set[str]:
    """Slides that failed in a stage before the one of this name: their tiles, or their tile embeddings."""
    encoder = name.split("__")[1] if "__" in name else ""
    before = [folder for folder in ("tiles", f"features_{encoder}") if folder != name and folder in stages]
    return {slide_id for folder in before for slide_id, row in stages[folder].items() if row.status == "failed"}


def _progress(
    folder: str,
    found: Mapping[str, Status],
    ids: Iterable[str],
    counted: Mapping[str, int],
    failed_before: Collection[str],
) -> StageProgress:
    states = dict.fromkeys(ids, "todo") | dict.fromkeys(failed_before, "failed")
    states |= {slide_id: status.status for slide_id, status in found.items()}
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


def _listed(path: Path) -> set[str]:
    """Slides that slides.csv lists: it knows those that are still to do."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows, None)
            return {row[0] for row in rows if row}
    except (OSError, csv.Error, UnicodeDecodeError):
        return set()
