"""One lock for all that the threads of a stream share, and for each kind of thread what it waits on."""

import threading
import time
from collections.abc import Callable

# How often a waiting caller asks whether to go on, and takes what there is.
_CHECK_SECONDS = 0.2


class Closed(Exception):
    """The stream is being closed: its threads end."""


class Waiting:
    """The lock of a stream: `with` it, look at what is shared or change it, and notify whom it concerns.

    Attributes:
        planner: waits for slides to prepare.
        reader: waits for slides that are prepared.
        rows: waited on by the threads that read, for rows of a batch.
        encoders: wait for full batches.
        caller: waits for vectors.
        closing: whether the threads are to end.
        failure: what ended the stream, for the caller.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        """
        Args:
            check: is called by a caller who waits; it may raise to stop.
        """
        self._lock = threading.RLock()
        self.planner, self.reader, self.rows, self.encoders, self.caller = (
            threading.Condition(self._lock) for _ in range(5)
        )
        self.closing = False
        self.failure: BaseException | None = None
        self.check = check

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def end(self, failure: BaseException | None = None) -> None:
        """Tell every thread to end; the caller gets the first failure."""
        with self:
            self.failure = self.failure or failure
            self.closing = True
            for each in (self.planner, self.reader, self.rows, self.encoders, self.caller):
                each.notify_all()

    def until(self, news: threading.Condition, holds: Callable[[], object]) -> None:
        """Wait within a thread of the stream. The lock is held.

        Raises:
            Closed: the stream is being closed.
        """
        while not self.closing:
            if holds():
                return
            news.wait()
        raise Closed

    def caller_until(self, holds: Callable[[], bool], after_a_while: Callable[[], bool] = lambda: False) -> None:
        """Wait within the caller until `holds`, or after _CHECK_SECONDS `after_a_while`. The lock is held.

        Raises:
            Exception: what ended the stream, or what `check` raises.
        """
        patience = time.monotonic() + _CHECK_SECONDS
        while True:
            if self.failure is not None:
                raise self.failure
            if holds() or (time.monotonic() >= patience and after_a_while()):
                return
            self.check()
            assert not self.closing, "the stream is closed"
            self.caller.wait(_CHECK_SECONDS)
