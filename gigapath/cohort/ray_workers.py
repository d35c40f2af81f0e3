"""`--engine ray`: the slides of a run over the machines of a Ray cluster, by one actor a GPU or one per so many cores.

Ray places the actors and notices when one is lost. Results and statuses go into the shared folder by the code of a run
in one process: the folder is the truth, and who does which slide is no part of the numbers. Actors rather than tasks:
an encoder stays loaded, and a process that has seen one GPU is never given another. Ray is imported in here only.
"""

import contextlib
import importlib
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun, SlideResults
from gigapath.cohort.status import Status
from gigapath.files import check_writable, remove_abandoned, writer_name
from gigapath.machine import available_cores
from gigapath.preprocessing.slide import SlideError
from gigapath.progress import Plan, Progress
from gigapath.signals import StopFlag, Stopped

_LOSSES = 2  # a slide has failed once it has lost so many workers that had no other slide
_STARTS = 4  # so many workers may be lost one after the other before one has started
_CONNECT_SECONDS = 5.0
_PATIENCE_SECONDS = 600.0  # without any worker: machines that are lent out come back, or are started
_START_SECONDS = 2.0  # between looks for machines that came
_STOP_SECONDS = 12.0  # for workers to end what they do, of the 20 seconds that a scheduler gives
_POLL_SECONDS = 0.2
_STORE_BYTES = 80_000_000  # slides and statuses are all that travels


class SlideJob(Protocol):
    """Brings slides through a verb's stages, in a worker's process."""

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        """These come next, in this order."""

    def work(self, entry: SlideEntry) -> Sequence[Status]:
        """Bring the next of them through."""


# Builds the job of a worker from the run and from what the first worker has found, which gets None; gives the job and
# what was found. It is pickled on its way to the worker.
MakeJob = Callable[[CohortRun, Any], tuple[SlideJob, Any]]


class _CountedTiles(Progress):
    count = 0

    def tiles(self, count: int) -> None:
        self.count += count


class SlideWorker:
    """An actor: builds its job once, then does slides. `stop` is called while `work` runs."""

    def __init__(self, make_job: MakeJob, verb: str, out: Path, cwd: str) -> None:
        with contextlib.suppress(OSError):  # relative paths mean what they mean where the run was started
            os.chdir(cwd)
        self._make_job = make_job
        self._embedded = _CountedTiles()
        self._run = CohortRun(out, verb, [], [], {}, watch=self._embedded, stop=StopFlag())
        self._announced: Sequence[SlideEntry] = ()

    def start(self, found: Any) -> tuple[str, str, Any]:
        """Build the job; the machine's name, what unfinished files have in their names, and what was found."""
        if not self._run.out.is_dir():
            raise FileNotFoundError(
                f"expected the output folder {self._run.out.name} on every machine, got one without it. Put --out on a "
                "file system that all machines share."
            )
        self._job, found = self._make_job(self._run, found)
        return importlib.import_module("ray").get_runtime_context().get_node_id(), writer_name(), found

    def work(self, entries: Sequence[SlideEntry]) -> tuple[Sequence[Status], int]:
        """Do the first slide while the second, which comes next, is read ahead; its statuses, and tiles embedded."""
        self._job.announce([entry for entry in entries if entry not in self._announced])
        self._announced = entries[1:]
        before = self._embedded.count
        return self._job.work(entries[0]), self._embedded.count - before

    def stop(self, why: str) -> None:
        """Let what is in work end as stopped."""
        self._run.stop.set(why)


@dataclass(eq=False)
class _Worker:
    """An actor, the call that it is at, its machine's number (from 1; 0 until it has started), and its slides: the one
    in work and the one that is read ahead."""

    actor: Any
    call: Any
    machine: int = 0
    entries: list[SlideEntry] = field(default_factory=list)


class RayWorkers:
    """The workers of a run; use as a context manager, `start`, then give `process` to `CohortRun.over_slides`.

    Args:
        run: the run.
        address: HOST:PORT, "auto" for the cluster that this machine belongs to, "local" for processes of this machine,
            or None for $RAY_ADDRESS, and where that is not set the same as "local".
        cores: of each worker, or None for the machines' own measure.
        device: "auto", "cpu" or "cuda"; "none" where the work needs no encoder. Then the kind of each worker's device.

    Attributes:
        expected: by slide, about how many tiles are to be embedded; corrected as slides come.
    """

    def __init__(self, run: CohortRun, *, address: str | None, cores: int | None, device: str) -> None:
        self.cores, self.device = cores or 0, device
        self.expected: dict[str, int] = {}
        self._run = run
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._ray: Any = None
        self._owner = False
        self._make_job: MakeJob | None = None
        self._found: Any = None
        self._workers: list[_Worker] = []
        self._machines: dict[str, int] = {}
        self._writers: list[str] = []
        self._facts: dict[str, Any] = {}
        self._losses: Counter[str] = Counter()  # slides that lost a worker, and how often with no other slide
        self._lost_at_start = 0
        self._last_there = self._next_start = 0.0

    def __enter__(self) -> "RayWorkers":
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
        self._facts |= {"name": "ray", "version": self._ray.__version__, "worker_cores": self.cores}
        self._facts |= {"worker_gpus": self.device == "cuda", "lost_workers": 0, "machines": []}
        self._run.facts["engine"] = self._facts
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._end(worker)
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
        """Start the first worker; what it found, which every other worker is given.

        Raises:
            OutputError: the output folder can't be written.
            KeyboardInterrupt: a signal came before there was anything to stop.
            OSError: no worker could start.
            Exception: what `make_job` raised.
        """
        check_writable(self._run.out)
        self._make_job, self._last_there = make_job, time.monotonic()
        worker = self._add_worker()
        while not self._ray.wait([worker.call], timeout=_POLL_SECONDS)[0]:
            if self._run.stop.is_set:
                raise KeyboardInterrupt
            self._check_patience()
        answer, error = self._answer(worker)
        if answer is None:
            raise error or OSError("the first worker was lost as it started. Look at Ray's logs, and at the memory.")
        self._found = self._started(worker, answer)
        return self._found

    def process(self, entries: Sequence[SlideEntry]) -> SlideResults:
        """Bring slides through, in about their order; each with its statuses as it ends.

        What a lost worker had is done elsewhere, each slide by itself from then on, since it may be what ended the
        worker.

        Raises:
            Stopped: a signal came; what was in work is marked as stopped.
            OSError: workers are lost as soon as they start, or there is no machine for one.
            Exception: what ended a worker, where it is no slide's fault and befalls others too.
        """
        queue = deque(entries)
        why = "the run"
        try:
            while queue or any(worker.entries for worker in self._workers):
                self._run.stop.check()
                self._add_workers(len(queue))
                for worker in self._workers:
                    if queue and worker.call is None:
                        worker.entries = [queue.popleft()]
                        self._work(worker, queue)
                calls = [worker.call for worker in self._workers if worker.call is not None]
                if not calls:
                    time.sleep(_POLL_SECONDS)
                    continue
                ended, _ = self._ray.wait(calls, timeout=_POLL_SECONDS)
                for worker in [worker for worker in self._workers if worker.call in ended]:
                    answer, error = self._answer(worker)
                    if answer is None:
                        yield from self._lose(worker, error, queue)
                    elif not worker.machine:
                        self._started(worker, answer)
                    else:
                        yield self._receive(worker, queue, *answer)
        except Stopped as stopped:
            why = str(stopped)
            raise
        finally:
            self._stop_workers(why)

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

        Raises:
            ValueError: no machine holds such a worker.
        """
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

    def _add_worker(self) -> _Worker:
        actor = self._ray.remote(SlideWorker).options(
            num_cpus=self.cores,
            num_gpus=int(self.device == "cuda"),
            max_restarts=0,  # another one is started wherever there is room
            max_concurrency=2,  # `stop` is heard while `work` runs
            scheduling_strategy="SPREAD",
        )
        handle = actor.remote(self._make_job, self._run.verb, Path(self._run.out).absolute(), str(Path.cwd()))
        self._workers.append(_Worker(handle, handle.start.remote(self._found)))
        return self._workers[-1]

    def _add_workers(self, left: int) -> None:
        """Start as many workers as there is room for and slides left; Ray places each once its machine has room."""
        self._check_patience()
        if self._lost_at_start >= _STARTS:  # a machine where they can't start: the others go on
            if not self._workers:
                raise OSError("workers are lost as they start. Look at Ray's logs, and at the machines' memory.")
            return
        if time.monotonic() >= self._next_start:
            self._next_start = time.monotonic() + _START_SECONDS
            most = left + sum(bool(worker.entries) for worker in self._workers)
            for _ in range(min(self._room(), most) - len(self._workers)):
                self._add_worker()

    def _check_patience(self) -> None:
        if any(worker.machine for worker in self._workers):
            self._last_there = time.monotonic()
        elif time.monotonic() - self._last_there > _PATIENCE_SECONDS:
            raise OSError(
                f"expected a worker within {_PATIENCE_SECONDS:.0f} s, got none: the machines are taken, or gone. "
                "Look at `ray status`, then run the same command again."
            )

    def _work(self, worker: _Worker, queue: deque[SlideEntry]) -> None:
        """Let a worker do its slide and read the next one ahead, but none of the last slides: who becomes free takes
        it; nor one that has lost a worker."""
        alone = any(entry.slide_id in self._losses for entry in [worker.entries[0], *list(queue)[:1]])
        if len(worker.entries) == 1 and len(queue) >= len(self._workers) and not alone:
            worker.entries.append(queue.popleft())
        worker.call = worker.actor.work.remote(tuple(worker.entries))

    def _answer(self, worker: _Worker) -> tuple[Any, Exception | None]:
        """What a call that has ended gave, or None and the error that ended the worker where there is one."""
        call, worker.call = worker.call, None
        errors = self._ray.exceptions
        try:
            return self._ray.get(call), None
        except errors.RayActorError as error:
            if not getattr(error, "actor_init_failed", False):
                return None, None
            last = (str(error).strip().splitlines() or [""])[-1].strip().rstrip(".")
            fix = "Install gigapath[ray], the same version, on every machine."
            return None, OSError(f"a worker could not start: {last}. {fix}")
        except errors.RayTaskError as error:
            return None, error.cause

    def _started(self, worker: _Worker, answer: tuple[str, str, Any]) -> Any:
        machine, writer, found = answer
        worker.machine = self._machines.setdefault(machine, len(self._machines) + 1)
        if worker.machine > len(self._facts["machines"]):
            self._facts["machines"].append({"machine": worker.machine, "slides": 0, "tiles": 0})
        self._writers.append(writer)
        self._lost_at_start = 0
        return found

    def _receive(
        self, worker: _Worker, queue: deque[SlideEntry], statuses: Sequence[Status], embedded: int
    ) -> tuple[SlideEntry, Sequence[Status]]:
        entry = worker.entries.pop(0)
        self._lost_at_start = 0
        share = self._facts["machines"][worker.machine - 1]
        share["slides"] += 1
        share["tiles"] += max((status.tiles for status in statuses), default=0)
        if worker.entries:
            self._work(worker, queue)
        self._run.watch.tiles(embedded)
        counted = [status.tiles for status in statuses if status.stage != "slides"]
        if entry.slide_id in self.expected and counted:
            self.expected[entry.slide_id] = max(counted)
            self._run.watch.expect(sum(self.expected.values()))
        return entry, statuses

    def _lose(self, worker: _Worker, error: Exception | None, queue: deque[SlideEntry]) -> SlideResults:
        """Put what a lost worker had back in front; a slide that lost two workers by itself has failed."""
        if error is not None and getattr(error, "errno", None) is not None:  # the disk is full, for every worker
            raise error
        self._end(worker)
        self._next_start = 0.0
        self._facts["lost_workers"] += 1
        self._lost_at_start += not worker.machine
        if error is not None and self._lost_at_start >= _STARTS and not self._workers:
            raise error
        for entry in reversed(worker.entries):
            self._losses[entry.slide_id] += len(worker.entries) == 1
            if self._losses[entry.slide_id] < _LOSSES:
                queue.appendleft(entry)
            elif error is not None:
                raise error
            else:
                lost = (
                    f"its worker was lost, {_LOSSES} times with no other slide in work: killed, out of memory, or its "
                    "machine went away. Try it by itself with --engine local."
                )
                yield entry, [self._run.fail(entry, SlideError(lost))]

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        with contextlib.suppress(Exception):
            self._ray.kill(worker.actor)

    def _stop_workers(self, why: str) -> None:
        """Nothing stays in work; who doesn't end by itself is ended."""
        working = [worker for worker in self._workers if worker.entries]
        for worker in working:
            worker.actor.stop.remote(why)
        calls = [worker.call for worker in working if worker.call is not None]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=_STOP_SECONDS)
        for worker in working:
            self._end(worker)


def _import_ray(address: str) -> Any:
    """The package ray, which reads what it goes by from the environment as it is imported.

    Raises:
        ImportError: it is not installed.
    """
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
