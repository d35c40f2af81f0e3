"""`--engine ray`: the workers of a crew as actors of a Ray cluster, or of processes that are started here.

Ray places the actors, one a GPU or one per so many cores, and notices when one is gone. Everything else is the run's
own: which slide goes where (`crew`), what a worker does with it (`worker`), and the folder of status files, which is
the truth. Ray is imported in here only, and only when it is asked for.
"""

import contextlib
import importlib
import importlib.util
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.cohort.crew import PATIENCE_SECONDS, Lost, News, Ready, Report
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun
from gigapath.cohort.worker import Agenda, Hello, Work, WorkerProcess
from gigapath.files import remove_abandoned
from gigapath.machine import available_cores

_CONNECT_SECONDS = 5.0
_PROGRESS_SECONDS = 1.0
_POLL_SECONDS = 0.2
# Slides and statuses are all that travels.
_STORE_BYTES = 80_000_000
# What an HTTP/2 server, and so a Ray cluster's, answers with its own settings: the preface and an empty settings frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS = 0x04


@dataclass
class RayWorker:
    """An actor, seen from the run.

    Attributes:
        node: number of its machine, from 1, in the order in which machines came.
        hello: what it said when it was ready.
        told: tiles that it has told of.
    """

    crew: "RayCrew"
    actor: Any
    node: int = 0
    hello: Hello | None = None
    told: int = 0
    asked: float = 0.0

    def work(self, entries: Sequence[SlideEntry]) -> None:
        self.crew.await_(self.actor.work.remote(tuple(entries)), self, "work")

    def stop(self, why: str) -> None:
        self.actor.stop.remote(why)

    def end(self) -> None:
        self.crew.forget(self)


class RayCrew:
    """Actors on the machines of a Ray cluster; use as a context manager."""

    def __init__(
        self,
        run: CohortRun,
        make_work: Callable[[str, int], Work],
        *,
        address: str | None,
        cores: int | None,
        device: str,
    ) -> None:
        """Nothing happens yet.

        Args:
            run: the run; its watcher hears of tiles.
            make_work: what the workers do, by the kind of device and the number of cores that each of them has.
            address: HOST:PORT, "auto" for the cluster that this machine belongs to, or None for $RAY_ADDRESS, and
                where that is not set for processes of this machine.
            cores: of each worker, or None for the machines' own measure.
            device: "auto", "cpu" or "cuda"; "none" where the work needs no encoder.
        """
        self._run = run
        self._make_work = make_work
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._cores = cores
        self._device = device
        self._gpu = False
        self._ray: Any = None
        self._owner = False
        self._waiting: dict[Any, tuple[RayWorker, str]] = {}
        self._workers: list[RayWorker] = []
        self._machines: dict[str, int] = {}
        self._writers: list[str] = []
        self._agenda: Agenda | None = None

    # ------------------------------------------------------------------------------------------------- the cluster

    def __enter__(self) -> "RayCrew":
        ray = self._ray = import_ray(self._address)
        self._owner = not ray.is_initialized()
        if self._owner:
            with _signals_kept():
                self._connect(ray)
        gpus = any(node.get("GPU", 0) >= 1 for node in self._nodes())
        if self._device == "cuda" and not gpus:
            self.__exit__()
            raise ValueError("--device: expected a cluster with GPUs for cuda, got one without. Use --device cpu.")
        self._gpu = gpus and self._device in ("auto", "cuda")
        self._cores = self._cores or self._usual_cores()
        if not self.room():
            most = max((int(node.get("CPU", 0)) for node in self._nodes()), default=0)
            self.__exit__()
            raise ValueError(
                f"--worker-cores: expected a machine with {self._cores} cores for a worker, got {most} at the most. "
                "Choose fewer."
            )
        self._work = self._make_work("cuda" if self._gpu else "cpu", self._cores)
        return self

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self.forget(worker)

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._owner:
            self._ray.shutdown()

    @property
    def cores(self) -> int:
        """Cores of each worker."""
        assert self._cores is not None
        return self._cores

    def in_words(self) -> str:
        """The crew, for a person."""
        each = f"a GPU and {self.cores} cores" if self._gpu else "1 core" if self.cores == 1 else f"{self.cores} cores"
        room, nodes = self.room(), len(self._nodes())
        machines = "1 machine" if nodes == 1 else f"{nodes} machines"
        return f"ray: room for {room} worker{'s' * (room != 1)} of {each} on {machines}."

    def facts(self) -> dict[str, Any]:
        """The engine, for the run's record; no names."""
        return {"name": "ray", "version": self._ray.__version__, "worker_cores": self.cores, "worker_gpus": self._gpu}

    def _connect(self, ray: Any) -> None:
        """Join the cluster, or start one of this machine's own processes.

        Raises:
            OSError: there is none at the address; said at once, where Ray itself would try for a minute and more.
        """
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if self._address == "local":
            quiet |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "num_cpus": available_cores()}
        elif self._address != "auto":
            check_address(self._address)
        try:
            ray.init(self._address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            raise OSError(
                f"--ray-address: expected a Ray cluster at {self._address!r}, got none: {said}. Start one with "
                "`ray start --head`; where it wants a token, set RAY_AUTH_TOKEN."
            ) from error

    def _nodes(self) -> list[Mapping[str, float]]:
        """Resources of each machine that is there."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _usual_cores(self) -> int:
        """Each GPU's share of the cores around it; up to four beside an encoder on CPUs; one where nothing encodes."""
        if self._gpu:
            return max(1, min(int(node.get("CPU", 1) // node["GPU"]) for node in self._nodes() if node.get("GPU")))
        if self._device == "none":
            return 1
        return max(1, min([4, *(int(node["CPU"]) for node in self._nodes() if node.get("CPU"))]))

    # ------------------------------------------------------------------------------------------------- the workers

    def agenda(self) -> tuple[RayWorker, Agenda]:
        """Hire the first worker and let it look at the cohort.

        Raises:
            Stopped: a signal came.
            Exception: what it said.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        worker = self.hire()
        while time.monotonic() < until:
            self._run.stop.check()
            for _, news in self.news(_POLL_SECONDS):
                if isinstance(news, Ready):
                    assert worker.hello is not None and worker.hello.agenda is not None
                    self._agenda = worker.hello.agenda
                    return worker, self._agenda
                worker.end()
                if isinstance(news, Report) and news.error is not None:
                    raise news.error
                raise OSError("the first worker was lost as it started. Look at Ray's logs, and at the memory.")
        raise OSError(f"expected a worker within {PATIENCE_SECONDS:.0f} s, got none: the machines are taken.")

    def room(self) -> int:
        if self._gpu:
            return sum(int(min(node.get("GPU", 0), node.get("CPU", 0) // self.cores)) for node in self._nodes())
        return sum(int(node.get("CPU", 0) // self.cores) for node in self._nodes())

    def hire(self) -> RayWorker:
        first = self._agenda is None and self._device != "none"
        actor = self._ray.remote(WorkerProcess).options(
            num_cpus=self.cores,
            num_gpus=int(self._gpu),
            max_restarts=0,
            max_concurrency=2,  # `progress` and `stop` are heard while `work` runs
            scheduling_strategy="SPREAD",
        )
        worker = RayWorker(
            self, actor.remote(self._work, self._run.verb, Path(self._run.out).absolute(), str(Path.cwd()), _machine)
        )
        self._workers.append(worker)
        self.await_(worker.actor.start.remote(self._agenda, first=first), worker, "start")
        return worker

    def forget(self, worker: RayWorker) -> None:
        """End a worker's process."""
        if worker in self._workers:
            self._workers.remove(worker)
            self._waiting = {ref: about for ref, about in self._waiting.items() if about[0] is not worker}
            with contextlib.suppress(Exception):
                self._ray.kill(worker.actor)

    def await_(self, ref: Any, worker: RayWorker, kind: str) -> None:
        """Answer with what comes of a call, in `news`."""
        self._waiting[ref] = worker, kind

    def news(self, seconds: float) -> list[tuple[RayWorker, News]]:
        self._ask_for_progress()
        if not self._waiting:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=seconds)
        found = []
        for ref in ready:
            worker, kind = self._waiting.pop(ref, (None, ""))
            if worker is not None:
                found += [(worker, news) for news in self._hear(ref, worker, kind)]
        return found

    def _hear(self, ref: Any, worker: RayWorker, kind: str) -> list[News]:
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            if kind == "start" and getattr(error, "actor_init_failed", False):
                return [Report(error=_unborn(str(error)))]
            # The call that is in work says so too: told once.
            return [] if kind == "progress" else [Lost()]
        if kind == "progress":
            self._tell(worker, *answer)
            return []
        if kind == "work":
            self._tell(worker, answer.embedded, {})
            return [answer]
        assert isinstance(answer, Hello)
        if answer.error is not None:
            return [Report(error=answer.error)]
        worker.hello = answer
        worker.node = self._machines.setdefault(answer.machine, len(self._machines) + 1)
        self._writers.append(answer.writer)
        return [Ready()]

    def _ask_for_progress(self) -> None:
        now = time.monotonic()
        asked = {id(worker) for worker, kind in self._waiting.values() if kind == "progress"}
        for worker in {id(worker): worker for worker, kind in self._waiting.values() if kind == "work"}.values():
            if id(worker) not in asked and now - worker.asked > _PROGRESS_SECONDS:
                worker.asked = now
                self.await_(worker.actor.progress.remote(), worker, "progress")

    def _tell(self, worker: RayWorker, count: int, shares: Mapping[str, float]) -> None:
        if count > worker.told:
            self._run.watch.tiles(count - worker.told)
            worker.told = count
        if shares:
            self._run.watch.busy(shares)

    def tidy(self, folders: Sequence[Path]) -> None:
        """Remove the unfinished files of workers that are gone; all of the crew's are, once it is over."""
        for folder in folders:
            remove_abandoned(folder, gone=self._writers)


def import_ray(address: str) -> Any:
    """The package ray, which reads what it goes by from the environment as it is imported.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--engine ray: expected the package ray, got none. Install it: pip install 'gigapath[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address != "local":
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # seconds that a cluster has for its first answer
    elif "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # A password of this run's own; Ray would leave one in the user's home.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return importlib.import_module("ray")


def check_address(address: str) -> None:
    """Refuse an address where nothing answers as a Ray cluster does.

    Raises:
        ValueError: it is not HOST:PORT.
        OSError: nothing answers there, or something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ValueError(f"--ray-address: expected HOST:PORT, auto or local, got {address!r}.")
    refused = f"--ray-address: expected a Ray cluster at {address!r}, got"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as connection:
            connection.sendall(_PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"{refused} {getattr(error, 'strerror', None) or error}. Look where `ray start --head` says it listens."
        ) from error
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise OSError(f"{refused} something else. Look where `ray start --head` says it listens.")


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts handlers of its own in place of the run's."""
    kept = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        kept[number] = signal.getsignal(number)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # handlers are the main thread's
            for number, handler in kept.items():
                signal.signal(number, handler)


def _unborn(said: str) -> OSError:
    """Why a worker's process can't even load the package, in one sentence."""
    last = (said.strip().splitlines() or [""])[-1].strip().rstrip(".")
    return OSError(f"a worker could not start: {last}. Install gigapath[ray], the same version, on every machine.")


def _machine() -> str:
    """A name for the machine that this worker runs on, told apart from others of the same host name."""
    return str(importlib.import_module("ray").get_runtime_context().get_node_id())
