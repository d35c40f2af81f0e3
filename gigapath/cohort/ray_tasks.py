"""`--engine ray`: the slides of a run over the machines of a Ray cluster, as tasks of some slides each.

Ray places the tasks and says which are lost. Results and statuses go into the shared folder by the code of a run in
one process: the folder is the truth, and who does which slide is no part of the numbers. A process keeps its job, and
so its encoders, from task to task; with a GPU it has one task only, as Ray may give it another GPU for the next, which
torch would not see. Ray is imported in here only.
"""

import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun, SlideResults
from gigapath.files import check_writable, remove_abandoned, writer_name
from gigapath.machine import available_cores
from gigapath.preprocessing.slide import SlideError
from gigapath.progress import Plan, Progress, StopFlag

_SLIDES = 32  # of a task at the most: loading an encoder and filling its stream cost little beside them
_IN_WORK = 4  # slides that a task may have begun: written, encoded, read, planned
_LOSSES = 2  # a slide has failed once it has lost so many workers that had no other slide
_STARTS = 4  # so many workers may be lost one after the other before one has built its job
_CONNECT_SECONDS = 5.0
_PATIENCE_SECONDS = 600.0  # without any worker: machines that are lent out come back, or are started
_STOP_SECONDS = 12.0  # for workers to end what they do, of the 20 seconds that a scheduler gives
_POLL_SECONDS = 0.2
_STORE_BYTES = 80_000_000  # slides and statuses are all that travels

# Builds a worker's job from the run and from what the first worker has found, which gets None; gives the job and what
# was found. A job has `announce(entries)` and `work(entry) -> statuses`, called for these in that order.
MakeJob = Callable[[CohortRun, Any], tuple[Any, Any]]


class _CountedTiles(Progress):
    count = 0

    def tiles(self, count: int) -> None:
        self.count += count


_kept: dict[str, tuple[Any, Any, CohortRun]] = {}  # of a worker's process: its run's job, what was found, the run


def gigapath_slides(
    token: str, make_job: MakeJob, found: Any, verb: str, out: Path, cwd: str, entries: Sequence[SlideEntry]
) -> Iterator[Any]:
    """A task: yields the machine and what unfinished files have in their names; what was found, once the job is built;
    then of each slide its statuses and how many tiles were embedded. To cancel it is a signal: the slide in work ends
    as stopped."""
    with contextlib.suppress(OSError):  # relative paths mean what they mean where the run was started
        os.chdir(cwd)
    yield importlib.import_module("ray").get_runtime_context().get_node_id(), writer_name()
    try:
        if token not in _kept:
            if not out.is_dir():
                raise FileNotFoundError(
                    f"expected the output folder {out.name} on every machine, got one without it. Put --out on a file "
                    "system that all machines share."
                )
            run = CohortRun(out, verb, [], [], {}, watch=_CountedTiles(), stop=StopFlag())
            _kept[token] = *make_job(run, found), run
        job, found, run = _kept[token]
        yield found
        counted: Any = run.watch
        with run.stop:
            job.announce(entries)
            for entry in entries:
                before = counted.count
                yield job.work(entry), counted.count - before
    except BaseException:
        _kept.clear()  # what was in work is in no state to go on
        raise


@dataclass(eq=False)
class _Task:
    """A task that is under way: its machine's number (from 1; 0 until it has begun), whether its job is built, and its
    slides that are not through."""

    items: Any
    entries: list[SlideEntry]
    machine: int = 0
    built: bool = False


class RayTasks:
    """The tasks of a run; use as a context manager, `start`, then give `process` to `CohortRun.over_slides`.

    `address` is HOST:PORT, "auto" for the cluster that this machine belongs to, "local" for processes of this machine,
    or None for $RAY_ADDRESS, and where that is not set the same as "local"; `cores` those of each worker, or None for
    the machines' own measure; `device` "auto", "cpu" or "cuda", "none" where the work needs no encoder, and then the
    kind of each worker's device. `expected`: by slide, about how many tiles are to be embedded; corrected as slides
    come.
    """

    def __init__(self, run: CohortRun, *, address: str | None, cores: int | None, device: str) -> None:
        self.cores, self.device = cores or 0, device
        self.expected: dict[str, int] = {}
        self._run = run
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._token = secrets.token_hex(8)
        self._make_job: MakeJob | None = None
        self._found: Any = None
        self._tasks: list[_Task] = []
        self._machines: dict[str, int] = {}
        self._writers: list[str] = []
        self._alone: Counter[str] = Counter()  # slides that were lost, and how often with no other slide
        self._lost_at_start = 0
        self._last_there = time.monotonic()

    def __enter__(self) -> "RayTasks":
        self._ray = _import_ray(self._address)
        self._owner = not self._ray.is_initialized()
        if self._owner:
            with _signals_kept():
                self._connect()
        try:
            self._choose_resources()
        except BaseException:
            self.__exit__()
            raise
        self._submit = self._ray.remote(gigapath_slides).options(
            num_cpus=self.cores,
            num_gpus=int(self.device == "cuda"),
            num_returns="streaming",
            max_retries=0,  # what is left of a task is begun anew here, without what it has done
            scheduling_strategy="SPREAD",
            _generator_backpressure_num_objects=1,  # a worker that is lost has said how far it came
        )
        self._facts: dict[str, Any] = {"name": "ray", "version": self._ray.__version__, "worker_cores": self.cores}
        self._facts |= {"worker_gpus": self.device == "cuda", "lost_workers": 0, "machines": []}
        self._run.facts["engine"] = self._facts
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            self._ray.cancel(task.items, force=True)
        if self._owner:
            self._ray.shutdown()
        for folder in [*self._run.stages, self._run.out / "previews"]:  # unfinished files of workers that were lost
            remove_abandoned(folder, gone=self._writers)

    def with_line(self, plan: Plan) -> Plan:
        """A plan with one line more: how many workers of which kind there is room for."""
        room, nodes, gpu = self._room(), len(self._nodes()), "a GPU and " * (self.device == "cuda")
        line = (
            f"ray: room for {room} worker{'s' * (room != 1)} of {gpu}{self.cores} core{'s' * (self.cores != 1)} on "
            f"{nodes} machine{'s' * (nodes != 1)}."
        )
        return replace(plan, lines=(*plan.lines, line))

    def start(self, make_job: MakeJob) -> Any:
        """Build the first job, somewhere; what it found, which every other worker is given. OutputError where the
        output folder can't be written, KeyboardInterrupt where a signal came before there was anything to stop, OSError
        where no worker could start; and what `make_job` raised."""
        check_writable(self._run.out)
        self._make_job = make_job
        task = self._add([])
        while not task.built:
            if self._run.stop.is_set:
                raise KeyboardInterrupt
            if not self._ready():
                continue
            item, error, ended = self._next(task)
            if ended:
                raise error or OSError("the first worker was lost as it started. Look at Ray's logs, and the memory.")
            self._begin(task, item)
        self._tasks.remove(task)
        return self._found

    def process(self, entries: Sequence[SlideEntry]) -> SlideResults:
        """Bring slides through, in about their order; each with its statuses as it ends. What a lost worker had in work
        is done elsewhere, each slide by itself from then on, since it may be what ended the worker.

        Raises:
            Stopped: a signal came; what was in work is marked as stopped.
            OSError: workers are lost as soon as they start, or there is no machine for one.
            Exception: what ended a worker, where it is no slide's fault and befalls others too.
        """
        queue = deque(entries)
        try:
            while queue or self._tasks:
                self._run.stop.check()
                room = max(1, self._room())
                while queue and len(self._tasks) < room:
                    self._add(self._some(queue, -(-len(queue) // (2 * room))))
                for task in self._ready():
                    item, error, ended = self._next(task)
                    if ended and (task.entries or error is not None):
                        yield from self._lose(task, error, queue)
                    elif not ended and task.built:
                        yield self._receive(task, *item)
                    elif not ended:
                        self._begin(task, item)
        finally:  # nothing stays in work; who doesn't end by itself is ended
            for task in self._tasks:
                self._ray.cancel(task.items)
            until = time.monotonic() + _STOP_SECONDS
            while self._tasks and time.monotonic() < until:
                for task in self._ready():
                    self._next(task)

    def _add(self, entries: list[SlideEntry]) -> _Task:
        run = self._run
        given = self._token, self._make_job, self._found, run.verb, Path(run.out).absolute(), str(Path.cwd())
        self._tasks.append(_Task(self._submit.remote(*given, tuple(entries)), entries))
        return self._tasks[-1]

    def _some(self, queue: deque[SlideEntry], most: int) -> list[SlideEntry]:
        """The slides of the next task: fewer as the end comes near, and by itself one that was lost."""
        some = [queue.popleft()]
        while queue and len(some) < min(most, _SLIDES) and not {some[0].slide_id, queue[0].slide_id} & {*self._alone}:
            some.append(queue.popleft())
        return some

    def _ready(self) -> list[_Task]:
        """Tasks with news, after some waiting; OSError where no worker has been there for long."""
        if any(task.machine for task in self._tasks):
            self._last_there = time.monotonic()
        elif time.monotonic() - self._last_there > _PATIENCE_SECONDS:
            raise OSError(
                f"expected a worker within {_PATIENCE_SECONDS:.0f} s, got none: the machines are taken, or gone. "
                "Look at `ray status`, then run the same command again."
            )
        items = [task.items for task in self._tasks]
        found, _ = self._ray.wait(items, num_returns=len(items), timeout=_POLL_SECONDS) if items else ([], [])
        return [task for task in self._tasks if task.items in found]

    def _next(self, task: _Task) -> tuple[Any, Exception | None, bool]:
        """The next item of a task; or that it has ended, and the error that did it where there is one."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(next(task.items)), None, False
        except StopIteration:
            error = None
        except errors.RayTaskError as raised:
            error = raised.cause if task.machine else _not_started(raised)
        except errors.TaskUnschedulableError as raised:
            error = raised
        except errors.RayError as raised:  # the process or its machine is gone
            error = _not_started(raised) if "No module named" in str(raised) else None
        self._tasks.remove(task)
        return None, error, True

    def _begin(self, task: _Task, item: Any) -> None:
        if not task.machine:
            machine, writer = item
            task.machine = self._machines.setdefault(machine, len(self._machines) + 1)
            if task.machine > len(self._facts["machines"]):
                self._facts["machines"].append({"machine": task.machine, "slides": 0, "tiles": 0})
            self._writers.append(writer)
        else:
            task.built, self._found, self._lost_at_start = True, item, 0

    def _receive(self, task: _Task, statuses: Sequence[Any], embedded: int) -> tuple[SlideEntry, Sequence[Any]]:
        entry = task.entries.pop(0)
        share = self._facts["machines"][task.machine - 1]
        share["slides"] += 1
        share["tiles"] += max((status.tiles for status in statuses), default=0)
        self._run.watch.tiles(embedded)
        counted = [status.tiles for status in statuses if status.stage != "slides"]
        if entry.slide_id in self.expected and counted:
            self.expected[entry.slide_id] = max(counted)
            self._run.watch.expect(sum(self.expected.values()))
        return entry, statuses

    def _lose(self, task: _Task, error: Exception | None, queue: deque[SlideEntry]) -> SlideResults:
        """Put what a lost worker had back in front; a slide that lost two workers by itself has failed."""
        if error is not None and getattr(error, "errno", None) is not None:  # the disk is full, for every worker
            raise error
        self._facts["lost_workers"] += 1
        self._lost_at_start += not task.built
        if self._lost_at_start >= _STARTS and not any(other.built for other in self._tasks):
            raise error or OSError("workers are lost as they start. Look at Ray's logs, and the machines' memory.")
        for entry in reversed(task.entries):
            if entry in task.entries[:_IN_WORK]:
                self._alone[entry.slide_id] += task.built and len(task.entries) == 1
            if self._alone[entry.slide_id] < _LOSSES:
                queue.appendleft(entry)
            elif error is not None:
                raise error
            else:
                lost = (
                    f"its worker was lost, {_LOSSES} times with no other slide in work: killed, out of memory, or its "
                    "machine went away. Try it by itself with --engine local."
                )
                yield entry, [self._run.fail(entry, SlideError(lost))]

    def _connect(self) -> None:
        """Join the cluster, or start one of this machine's own processes; OSError where there is none."""
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if self._address == "local":
            quiet |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "num_cpus": available_cores()}
        try:
            if self._address not in ("auto", "local"):  # Ray itself would try for two minutes
                host, _, port = self._address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
            self._ray.init(self._address, **quiet)
        except (OSError, RuntimeError, ValueError, OverflowError, self._ray.exceptions.RayError) as error:
            reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            raise OSError(
                f"--ray-address: expected HOST:PORT of a Ray cluster, auto or local, got {self._address!r}: {reason}. "
                "Start one with `ray start --head`; where it wants a token, set RAY_AUTH_TOKEN."
            ) from error

    def _nodes(self) -> list[Mapping[str, float]]:
        """Resources of each machine that is there."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _choose_resources(self) -> None:
        """A GPU and its share of the cores around it; without GPUs up to four cores beside an encoder, one to tile.
        ValueError where no machine holds such a worker."""
        nodes = self._nodes()
        gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        if self.device == "cuda" and not gpus:
            raise ValueError("--device: expected a cluster with GPUs for cuda, got one without. Use --device cpu.")
        usual = 1
        if gpus and self.device in ("auto", "cuda"):
            self.device = "cuda"
            usual = max(1, min(int(node.get("CPU", 1) // node["GPU"]) for node in gpus))
        else:
            if self.device != "none":
                usual = max(1, min([4, *(int(node["CPU"]) for node in nodes if node.get("CPU"))]))
            self.device = "cpu"
        self.cores = self.cores or usual
        if not self._room():
            most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
            raise ValueError(
                f"--worker-cores: expected a machine with {self.cores} cores for a worker, got {most} at the most. "
                "Choose fewer."
            )

    def _room(self) -> int:
        """How many workers the machines hold that are there now."""
        gpus = self.device == "cuda"
        return sum(int(min(n.get("CPU", 0) // self.cores, n.get("GPU", 0) if gpus else 1e9)) for n in self._nodes())


def _not_started(error: Exception) -> OSError:
    last = next((line for line in reversed(str(error).splitlines()) if "Error" in line), "").strip().rstrip(".")
    return OSError(f"a worker could not start: {last}. Install gigapath[ray], the same version, on every machine.")


def _import_ray(address: str) -> Any:
    """The package ray, which reads what it goes by from the environment as it is imported; ImportError without it."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--engine ray: expected the package ray, got none. Install it: pip install 'gigapath[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local" and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # A password of this run's own; Ray would leave one in the user's home.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return importlib.import_module("ray")


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts handlers of its own in place of the run's; a signal that came meanwhile is a KeyboardInterrupt."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():  # handlers can't be set elsewhere
            for number, handler in kept.items():
                signal.signal(number, handler)
