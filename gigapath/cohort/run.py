"""The loop over a cohort's slides: one bad slide is recorded and the others go on; a signal or a full disk ends it.

What it tells whoever watches it, the command line draws; a notebook need not.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.record import RunRecord, without_paths
from gigapath.cohort.stage import Outcome, Ownership, Stage, StageOptions, holds
from gigapath.cohort.status import SLIDES_CSV, STATES, Status, read_status, slide_row, write_slides_csv, write_status
from gigapath.features.gigapath_file import rows_file
from gigapath.files import check_writable, sha256_of
from gigapath.preprocessing.slide import SlideError
from gigapath.progress import Plan, Progress, StopFlag, Stopped
from gigapath.tables import data_frame
from gigapath.text import in_words, slides_in_words, table_lines, tiles_in_words

# What a result shows of its slides.
_SHOWN_COLUMNS = ("slide_id", "status", "tiles", "seconds", "error")
_SHOWN_ROWS = 20
# slides.csv is derived again during a run once this many times its own cost has passed.
_TABLE_SHARE = 20.0

# (slide, its statuses) in the order in which slides are through.
SlideResults = Generator[tuple[SlideEntry, Sequence[Status]], None, None]
# Brings slides through their stages: in this process, or over Ray.
Process = Callable[[Sequence[SlideEntry]], SlideResults]


@dataclass(frozen=True, repr=False)
class RunResult:
    """How a run ended: `outcome` is "done", "some slides failed", "stopped", or "planned" of a dry run; `rows` has one
    row per slide of this run, as in slides.csv; `counts` its slides by status; `results` is the folder of the last
    stage's results, where the verb has one; `note` says why the run ended before its last slide, where no signal ended
    it."""

    out: Path
    run_id: str
    outcome: str
    rows: tuple[Mapping[str, Any], ...]
    counts: Mapping[str, int]
    seconds: float
    results: Path | None = None
    note: str = ""

    @property
    def summary(self) -> str:
        """How the run ended, on one line."""
        if self.outcome == "planned":
            return "Dry run: nothing was written."
        tiles = sum(row["tiles"] for row in self.rows if row["status"] == "done")
        counts = [
            f"{count} {state.replace('_', ' ')}" + f" ({tiles_in_words(tiles)})" * (state == "done")
            for state, count in self.counts.items()
            if count
        ]
        return f"{self.outcome}: {', '.join(counts) or 'no slide to do'}; {in_words(self.seconds)}."

    @property
    def failed(self) -> dict[str, str]:
        """Slide -> why it failed."""
        return {row["slide_id"]: row["error"] for row in self.rows if row["status"] == "failed"}

    def __repr__(self) -> str:
        """The summary and a table of the slides, those that failed first; slides.csv has all of it."""
        rows = sorted(self.rows, key=lambda row: row["status"] != "failed")
        shown = [[str(row[name]) for name in _SHOWN_COLUMNS] for row in rows[:_SHOWN_ROWS]]
        more = len(rows) - len(shown)
        last = f"... and {slides_in_words(more)} more, see {SLIDES_CSV}; " if more else ""
        lines = [self.summary, *table_lines([list(_SHOWN_COLUMNS), *shown]), self.note, f"{last}written to {self.out}"]
        return "\n".join(line for line in lines if line)

    def to_frame(self) -> Any:
        """A `pandas.DataFrame` with a row a slide and the columns of slides.csv."""
        return data_frame(list(self.rows))


@dataclass
class CohortRun:
    """One run of a verb over slides (`entries`, of the slides `cohort` that slides.csv lists where they are a share of
    them).

    `stages` are the folders that a slide goes through, in order; `made_with` what the results there are made with;
    `options` the resolved options and `command` the words of the command line, for the record, with the `facts` that
    the run finds out; `keep_paths` says whether `private/` learns where the entries lie. The run ends once more slides
    than `max_failures` have failed; a `dry_run` plans, and neither works nor writes.
    """

    out: Path
    verb: str
    entries: Sequence[SlideEntry]
    stages: Sequence[Path]
    options: Mapping[str, Any]
    command: Sequence[str] = ()
    watch: Progress = field(default_factory=Progress)
    stop: StopFlag = field(default_factory=StopFlag)
    facts: dict[str, Any] = field(default_factory=dict)
    keep_paths: bool = True
    cohort: Sequence[str] = ()
    max_failures: int | None = None
    dry_run: bool = False
    made_with: Sequence[StageOptions] = ()
    _note: str = ""
    _failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _owner: Ownership = field(default_factory=lambda: Ownership({}))

    def over_slides(self, todo: Sequence[SlideEntry], process: Process, make_plan: Callable[[], Plan]) -> RunResult:
        """Bring slides through their stages; the run's record and slides.csv are left however it ends.

        Slides that failed by an error of input or output are tried once more when all others are through: a file server
        that was away for a minute is back then. `make_plan` is called once the output folder has proved writable.

        Raises:
            OutputError: the output folder can't be written, or the disk is full.
            ValueError: an encoder failed (EncoderError), the folder holds results of other options, or another run
                makes such there (FolderTaken).
        """
        if self.dry_run:
            started = time.monotonic()
            for stage in self.made_with:
                stage.check()
            self.watch.plan(replace(make_plan(), reused=len(self.entries)))  # nothing is going to be done
            return RunResult(self.out, "", "planned", (), _counts([]), time.monotonic() - started)
        check_writable(self.out)
        with Ownership({stage.folder: stage.owned for stage in self.made_with}) as self._owner:
            for stage in self.made_with:
                stage.check()
            return self._recorded(todo, process, make_plan)

    def _recorded(self, todo: Sequence[SlideEntry], process: Process, make_plan: Callable[[], Plan]) -> RunResult:
        started = time.monotonic()
        record = RunRecord(self.out, self.verb, self.options, self.command, self.facts)
        record.start(self.entries, keep_paths=self.keep_paths)
        rows: list[dict[str, Any]] = []
        try:
            self._renew_columns()
            plan = make_plan()
            self.facts["plan"] = dict(plan.facts)
            self.watch.plan(plan)
            rows = self._table()
            outcome = self._loop(todo, process)
            rows = self._table()
            self._owner.check()
            if outcome == "done":
                for stage in self.made_with:
                    stage.check(overwrite=False)
        except BaseException:
            with contextlib.suppress(OSError):  # the disk may be what ended the run
                record.end("error", _counts(rows))
            raise
        record.end(outcome, _counts(rows))
        seconds = time.monotonic() - started
        return RunResult(self.out, record.run_id, outcome, tuple(rows), _counts(rows), seconds, note=self._note)

    def in_process(self, work: Callable[[SlideEntry], Sequence[Status]]) -> Process:
        """One slide after the other in this process, by `work`."""

        def process(entries: Sequence[SlideEntry]) -> SlideResults:
            for entry in entries:
                self.stop.check()
                yield entry, work(entry)

        return process

    def through(self, stages: Sequence[Stage], entry: SlideEntry) -> list[Status]:
        """Bring a slide through stages, as far as it comes; the status of each that was not done before. Errors as
        `attempt`."""
        statuses: list[Status] = []
        for stage in stages:
            if stage.done(entry) is None:
                statuses.append(self.make(stage, entry))
                if not statuses[-1].finished:
                    break
        return statuses

    def make(self, stage: Stage, entry: SlideEntry) -> Status:
        """`attempt` what a stage makes of a slide."""
        try:
            identity = stage.identity(entry)
        except (OSError, ValueError):  # `make` says so
            identity = {}
        return self.attempt(stage.folder, entry, stage.name, identity, lambda: stage.make(entry, identity))

    def attempt(
        self, folder: Path, entry: SlideEntry, stage: str, identity: Mapping[str, Any], work: Callable[[], Outcome]
    ) -> Status:
        """Do one stage of one slide and write its status file; what goes wrong with the slide becomes its status.

        Raises:
            Stopped: a signal came; the slide is marked as stopped.
            OutputError, ValueError: the disk takes nothing more; the encoder failed (EncoderError).
        """
        started, before = time.monotonic(), read_status(folder, entry.slide_id)
        stopped, error, retryable = None, "", False
        made: dict[Path, tuple[int, ...]] = {}
        sha256: Mapping[str, str] = {}
        try:
            if entry.problem:
                raise SlideError(entry.problem)
            outcome = work()
            names = outcome.files or (f"{entry.slide_id}.h5",)
            made = {folder / name: _which(folder / name) for name in names if (folder / name).is_file()}
            sha256 = {path.name: sha256_of(path) for path in made}  # from memory: they have just been written
        except Stopped as signal:
            stopped = signal
            outcome, error = Outcome("stopped"), f"stopped by {signal}"
        except Exception as problem:
            # A full disk (OutputError) or a failing encoder (EncoderError) is no slide's fault.
            if getattr(problem, "stops_run", False) or os.environ.get("GIGAPATH_DEBUG"):
                raise
            outcome, error = Outcome("failed"), without_paths(_sentence(problem), entry)
            retryable = _is_retryable(problem, entry.path)
        status = Status(
            slide_id=entry.slide_id,
            stage=stage,
            status=outcome.status,
            tiles=outcome.tiles,
            seconds=round(time.monotonic() - (outcome.since or started), 3),
            error=error,
            warnings=tuple(without_paths(text, entry) for text in outcome.warnings),
            identity=identity,
            digest=outcome.digest,
            numerics_version=identity.get("numerics_version", 0),
            facts=outcome.facts,
            columns=entry.columns,
            ended=round(time.time(), 3),
            sha256=sha256,
            retryable=retryable,
        )
        self._owner.check()
        earlier = None if status.finished else read_status(folder, entry.slide_id)
        if earlier is not None and earlier.finished and holds(folder, earlier):  # the result and its status stay
            if earlier != before and earlier.identity == identity:
                status = earlier  # another run on this folder has done it while this one tried
        else:
            write_status(folder, status)
            again = [path for path, which in made.items() if _which(path) != which]  # by another run too
            if any(not path.is_file() or sha256_of(path) != sha256[path.name] for path in again):
                write_status(folder, replace(status, sha256={}))
        if stopped is not None:
            raise stopped
        return status

    def _renew_columns(self) -> None:
        """Let results that are kept carry what the manifest says today: columns are added and mended between runs.

        A run over files of tile embeddings, which keeps no paths, knows no more than an earlier status said.
        """
        named = [entry for entry in self.entries if entry.columns and self.keep_paths]
        for folder in self.stages:
            for entry in named:
                status = read_status(folder, entry.slide_id)
                if status is not None and status.finished and status.columns != entry.columns:
                    write_status(folder, replace(status, columns=entry.columns))

    def fail(self, entry: SlideEntry, error: Exception) -> Status:
        """Mark a slide that nobody works on as failed, in the first stage that is not finished."""
        statuses = ((folder, read_status(folder, entry.slide_id)) for folder in self.stages)
        unfinished = (folder for folder, status in statuses if status is None or not status.finished)
        folder = next(unfinished, self.stages[-1])

        def work() -> NoReturn:
            raise error

        return self.attempt(folder, entry, folder.name.partition("_")[0], {}, work)

    def _loop(self, todo: Sequence[SlideEntry], process: Process) -> str:
        gone = [entry for entry in todo if not entry.problem and not entry.path.exists()]
        missing, names = len(gone), {entry.slide_id for entry in gone}
        if missing:
            self.watch.line(f"{slides_in_words(missing)} failed: no such file. They are listed at the end.")
        for entry in gone:
            name = entry.path.name
            error = FileNotFoundError(f"slide {entry.slide_id!r}: expected a file, got none named {name!r}.")
            self._failed[entry.slide_id] = slide_row(entry.slide_id, [self.fail(entry, error)])
        there = [entry for entry in todo if entry.slide_id not in names]
        try:
            failed, again = self._once(there, process, missing)
            if again and not self._note:
                self.watch.retrying(len(again))
                lasting, again = self._once(again, process, missing + failed, last=True)
                failed += lasting
        except Stopped:
            return "stopped"
        return "some slides failed" if missing or failed or again else "done"

    def _once(
        self, todo: Sequence[SlideEntry], process: Process, before: int, *, last: bool = False
    ) -> tuple[int, list[SlideEntry]]:
        """Go through slides once; how many failed for good, and those whose failure may pass, which is not hoped for
        the `last` time. More of them, with the `before` that failed earlier, than allowed end the pass, and `_note`
        says so."""
        next_table, results, failed = 0.0, process(todo), 0
        again: list[SlideEntry] = []
        for number, (entry, statuses) in enumerate(results, start=1):
            row = slide_row(entry.slide_id, statuses)
            self._failed.pop(entry.slide_id, None)
            if not all(status.finished for status in statuses):
                self._failed[entry.slide_id] = row
                if any(status.retryable for status in statuses) and not last:
                    again.append(entry)
                else:
                    failed += 1
                    self._drop_rows(entry)
            self.watch.slide(row, number, len(todo))
            self._owner.check()
            so_far = before + failed + len(again)
            if self.max_failures is not None and so_far > self.max_failures:
                self._note = (
                    f"{so_far} of {before + number} slides failed, more than --max-failures {self.max_failures}: ended "
                    f"with {len(todo) - number} slides to do. Look at the reasons, then run the same command again."
                )
                results.close()
                break
            now = time.monotonic()
            if now >= next_table and number < len(todo):
                self._table()
                next_table = time.monotonic() + _TABLE_SHARE * (time.monotonic() - now)
        return failed, again

    def _drop_rows(self, entry: SlideEntry) -> None:
        """Remove the rows that a slide which failed for good has kept: a file that can't be read to the end may have
        been wrong before that too, so what mends it begins with its first tile. A stopped or killed slide's stay."""
        for folder in self.stages:
            with contextlib.suppress(OSError):
                rows_file(folder / f"{entry.slide_id}.h5").unlink(missing_ok=True)

    def _table(self) -> list[dict[str, Any]]:
        """Write slides.csv; the rows of this run's slides. One that failed where an earlier result stays is done there,
        and failed here."""
        mine = {entry.slide_id for entry in self.entries}
        rows = write_slides_csv(self.out, self.stages, [*mine, *self.cohort])
        failed = {name: {key: row[key] for key in ("status", "error")} for name, row in self._failed.items()}
        return [{**row, **failed.get(row["slide_id"], {})} for row in rows if row["slide_id"] in mine]


def _which(path: Path) -> tuple[int, ...]:
    """Tells a file from another one that has taken its name; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Slides by status, every status named."""
    counted = Counter(row["status"] for row in rows)
    return {state: counted[state] for state in STATES}


def _is_retryable(error: Exception, path: Path) -> bool:
    """Whether a failure is one of input or output, by the error or because the slide's file can't be read now:
    libraries that decode say no more than that they could not."""
    for_good = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, OSError):
        return not isinstance(error, for_good)
    try:
        if not path.is_file():  # a pipe that nobody writes to would be waited for without end
            return False
        with path.open("rb") as file:
            file.read(1)
    except OSError as found:
        return not isinstance(found, for_good)
    return False


def _sentence(error: Exception) -> str:
    """What went wrong, on one line; an error that nobody foresaw says its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"unexpected {type(error).__name__}: {text}"
