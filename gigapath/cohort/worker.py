"""What a worker process does: it builds its job once, then does the slides that it is handed.

Results and statuses go into the shared folder by the code of a run on one machine. So nothing here, and nothing about
who does which slide, is a part of the numbers.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gigapath.cohort.crew import Report
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun, Plan, Watcher
from gigapath.cohort.status import Status
from gigapath.files import writer_name
from gigapath.signals import StopFlag, Stopped


class Job(Protocol):
    """Brings slides through a verb's stages."""

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        """These come next, in this order."""

    def work(self, entry: SlideEntry) -> Sequence[Status]:
        """Bring the next of them through."""


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What a run has to do, as the first worker of its crew finds out: it has the encoders.

    Attributes:
        entries: the slides that the run is for.
        todo: those of which something is left to do.
        tiles: by slide of `todo`, about how many tiles are to be embedded.
        tiles_folder: where the slides' tiles are.
        plan: for whoever watches.
        stages: the folders of the stages.
        facts: for the run's record.
        numerics: what the numbers depend on; all workers must come to the same.
        batch_size: tiles of a batch.
    """

    entries: tuple[SlideEntry, ...]
    todo: tuple[SlideEntry, ...]
    tiles: Mapping[str, int]
    tiles_folder: Path
    plan: Plan
    stages: tuple[Path, ...]
    facts: Mapping[str, Any]
    numerics: Mapping[str, Any]
    batch_size: int


class Work(Protocol):
    """A verb's work, on its way to a worker: plain values."""

    def agenda(self, run: CohortRun) -> tuple[Job, Agenda]:
        """The job of the first worker, and what it finds that there is to do."""

    def join(self, run: CohortRun, agenda: Agenda | None) -> Job:
        """The job of another worker, which does as the first one."""


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a worker says of itself.

    Attributes:
        machine: a name for its machine, which stays in the run's memory.
        writer: what the names of its unfinished files have in them.
        agenda: what there is to do, where it was asked.
        error: why it can't work, or None.
    """

    machine: str = ""
    writer: str = ""
    agenda: Agenda | None = None
    error: Exception | None = None


class _Counting(Watcher):
    """Adds up tiles for whoever asks."""

    def __init__(self) -> None:
        self.count = 0
        self.shares: Mapping[str, float] = {}

    def tiles(self, count: int) -> None:
        self.count += count

    def busy(self, shares: Mapping[str, float]) -> None:
        self.shares = dict(shares)


class WorkerProcess:
    """One worker; its methods are called from elsewhere, `progress` and `stop` while `work` runs."""

    def __init__(self, work: Work, verb: str, out: Path, cwd: str, machine: Callable[[], str]) -> None:
        self._work = work
        self._out = out
        self._machine = machine
        self._watch = _Counting()
        self._stop = StopFlag()
        self._announced: list[SlideEntry] = []
        self._job: Job | None = None
        with contextlib.suppress(OSError):  # relative paths mean what they mean where the run was started
            os.chdir(cwd)
        self._run = CohortRun(out, verb, [], [], {}, watch=self._watch, stop=self._stop)

    def start(self, agenda: Agenda | None, *, first: bool) -> Hello:
        """Build the job."""
        found = None
        try:
            if not self._out.is_dir():
                raise FileNotFoundError(
                    f"expected the output folder {self._out.name} on every machine, got one without it. Put --out on a "
                    "file system that all machines share."
                )
            if first:
                self._job, found = self._work.agenda(self._run)
            else:
                self._job = self._work.join(self._run, agenda)
        except Exception as error:
            return Hello(error=error)
        return Hello(self._machine(), writer_name(), found)

    def work(self, entries: Sequence[SlideEntry]) -> Report:
        """Do the first slide, while the second is read ahead."""
        assert self._job is not None
        new = [entry for entry in entries if entry not in self._announced]
        self._announced += new
        self._job.announce(new)
        started = time.monotonic()
        try:
            statuses = tuple(self._job.work(self._announced.pop(0)))
        except Stopped:
            return Report(stopped=True)
        except Exception as error:
            return Report(error=error)
        tiles = max((status.tiles for status in statuses), default=0)
        return Report(statuses, tiles, time.monotonic() - started, self._watch.count)

    def progress(self) -> tuple[int, Mapping[str, float]]:
        """Tiles embedded so far, and how busy the stages were of late."""
        return self._watch.count, self._watch.shares

    def stop(self, why: str) -> None:
        """Let what is in work end as stopped."""
        self._stop.set(why)
