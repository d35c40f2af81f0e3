"""Signals end a run between two batches: what is finished stays, what is half done is dropped, the exit is 75."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# What schedulers send ahead of a time limit (SIGTERM, SIGUSR1) and people press (SIGINT).
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Let schedulers' signals interrupt as Ctrl-C does, within this block only and wherever no `StopFlag` watches:
    what is half written is removed on the way out."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {}
    if threading.current_thread() is threading.main_thread():  # handlers can't be set elsewhere
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name) and name != "SIGINT"]
        previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """The run was asked to stop; carries the signal's name."""


class StopFlag:
    """Remembers that a signal came; use as a context manager around a run.

    The signal's own handler is put back when the first one came, so that a second Ctrl-C ends the process at once.
    """

    def __init__(self, on_signal: Callable[[str], None] = lambda name: None) -> None:
        """Watch for signals.

        Args:
            on_signal: is told the name of each signal, from within its handler.
        """
        self._on_signal = on_signal
        self._event = threading.Event()
        self._name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():  # handlers can't be set elsewhere
            for name in _NAMES:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1
                if number is not None:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def is_set(self) -> bool:
        """Whether the run should stop."""
        return self._event.is_set()

    def set(self, name: str = "request") -> None:
        """Ask the run to stop."""
        self._name = name
        self._event.set()

    def check(self) -> None:
        """Raise Stopped once a signal came."""
        if self._event.is_set():
            raise Stopped(self._name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.set(signal.Signals(number).name)
        self._on_signal(self._name)
        if number == signal.SIGINT:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
