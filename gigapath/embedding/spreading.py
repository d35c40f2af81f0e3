"""A run over a cohort with its slides spread over workers: what the run itself does while they work."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gigapath.cohort.crew import Spread
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.ray import RayCrew, RayWorker
from gigapath.cohort.run import CohortRun, Plan, RunResult
from gigapath.cohort.shards import weigh
from gigapath.cohort.status import Status, read_status, write_status
from gigapath.cohort.worker import Work
from gigapath.embedding.options import RunOptions
from gigapath.files import check_writable
from gigapath.signals import Stopped


def spread_tiling(
    run: CohortRun,
    todo: Sequence[SlideEntry],
    make_work: Callable[[str, int], Work],
    make_plan: Callable[[], Plan],
    options: RunOptions,
) -> RunResult:
    """`CohortRun.over_slides` over Ray's workers, where the run itself knows what is to do."""
    with RayCrew(run, make_work, address=options.ray_address, cores=options.worker_cores, device="none") as crew:
        return _over_slides(run, crew, todo, weigh(todo, run.out / "tiles"), make_plan)


def spread_embedding(
    run: CohortRun, make_work: Callable[[str, int], Work], device: str, options: RunOptions
) -> RunResult:
    """The same where the encoders are needed to know what is to do: the first worker says it.

    Raises:
        KeyboardInterrupt: a signal came before there was anything to stop.
    """
    check_writable(run.out)
    with RayCrew(run, make_work, address=options.ray_address, cores=options.worker_cores, device=device) as crew:
        try:
            first, agenda = crew.agenda()
        except Stopped as signal:
            raise KeyboardInterrupt(str(signal)) from signal
        run.entries, run.stages = agenda.entries, agenda.stages
        run.facts.update(agenda.facts)
        weights = weigh(agenda.todo, agenda.tiles_folder)
        return _over_slides(run, crew, agenda.todo, weights, lambda: agenda.plan, first, agenda.tiles)


def _over_slides(
    run: CohortRun,
    crew: RayCrew,
    todo: Sequence[SlideEntry],
    weights: Mapping[str, float],
    make_plan: Callable[[], Plan],
    first: RayWorker | None = None,
    tiles: Mapping[str, int] = MappingProxyType({}),
) -> RunResult:
    spread = Spread(crew, weights, run.stop, lambda entry, why: _give_up(run, entry, why))
    if first is not None:
        spread.admit(first)
    expected = dict(tiles)

    def results(entries: Sequence[SlideEntry]) -> Generator[tuple[SlideEntry, Sequence[Status]], None, None]:
        try:
            with contextlib.closing(spread(entries)) as through:
                for entry, statuses in through:
                    counted = [status.tiles for status in statuses if status.stage != "slides"]
                    if entry.slide_id in expected and counted:
                        expected[entry.slide_id] = max(counted)
                        run.watch.expect(sum(expected.values()))
                    yield entry, statuses
        finally:
            run.facts["engine"] = crew.facts() | {"lost_workers": spread.lost, "machines": _shares(spread)}

    def plan() -> Plan:
        told = make_plan()
        return Plan((*told.lines, crew.in_words()), told.slides, told.reused, told.tiles, told.exact, told.facts)

    run.spread = results
    try:
        return run.over_slides(todo, lambda _: (), plan)
    finally:
        crew.close()
        crew.tidy([*run.stages, run.out / "previews"])


def _shares(spread: Spread) -> list[dict[str, Any]]:
    """What each machine did, for the run's record: numbers alone."""
    return [
        {
            "machine": number,
            "workers": share.workers,
            "slides": share.slides,
            "tiles": share.tiles,
            "busy_seconds": round(share.busy, 3),
            "from_seconds": round(share.began or 0.0, 3),
            "to_seconds": round(share.ended, 3),
        }
        for number, share in sorted(spread.shares.items())
    ]


def _give_up(run: CohortRun, entry: SlideEntry, why: str) -> Status:
    """Mark a slide as failed in the first stage that is not finished."""
    folder = next((f for f in run.stages if not _is_finished(f, entry.slide_id)), run.stages[-1])
    status = Status(
        slide_id=entry.slide_id,
        stage=_stage_of(folder),
        status="failed",
        error=why,
        columns=entry.columns,
        ended=round(time.time(), 3),
    )
    write_status(folder, status)
    return status


def _is_finished(folder: Path, slide_id: str) -> bool:
    status = read_status(folder, slide_id)
    return status is not None and status.finished


def _stage_of(folder: Path) -> str:
    return folder.name.partition("_")[0]
