"""How busy each stage of a stream is: the stage with the largest share is the one that the others wait for."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping


class StageTimes:
    """Seconds of work by stage, added up from several threads."""

    def __init__(self, workers: Mapping[str, int]) -> None:
        """Nothing has been done yet.

        Args:
            workers: the stages, and how many work side by side in each: as many seconds a second it can be busy.
        """
        self._workers = dict(workers)
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(workers, 0.0)
        self._since = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        """`stage` has worked for so long."""
        with self._lock:
            self._seconds[stage] += seconds

    @contextlib.contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """What happens within counts as work of `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def shares(self, before: "Snapshot | None" = None) -> dict[str, float]:
        """Share of the time that each stage worked, 0 to 1, since the beginning or since `before`."""
        now = self.snapshot()
        since, seconds = (self._since, dict.fromkeys(self._seconds, 0.0)) if before is None else before
        elapsed = max(now[0] - since, 1e-9)
        return {
            stage: min(1.0, (total - seconds[stage]) / elapsed / self._workers[stage])
            for stage, total in now[1].items()
        }

    def snapshot(self) -> "Snapshot":
        """(now, seconds by stage), to count from."""
        with self._lock:
            return time.perf_counter(), dict(self._seconds)


Snapshot = tuple[float, dict[str, float]]


def bottleneck(shares: Mapping[str, float]) -> str:
    """The stage that the others wait for: the busiest one."""
    return max(shares, key=lambda stage: shares[stage])
