"""What long work tells whoever watches it (the command line draws it, a notebook need not), and how it hears that it
should stop: signals end a run between two batches; what is finished stays, what is half done is dropped, the exit is
75."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SILENT_SECONDS = 30.0  # after so long a silence a log hears that the work goes on


@dataclass(frozen=True)
class Plan:
    """What a run is about to do: `lines` for a person and `facts` for machines; of `slides` of the cohort those
    `reused`, of which nothing is left to do, and the `tiles` that are going to be embedded (0 in a tiling run), counted
    where `exact`, else estimated from the slides' sizes."""

    lines: tuple[str, ...]
    slides: int
    reused: int
    tiles: int = 0
    exact: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)


class Progress:
    """Receives the news of long work; this one keeps quiet. Methods are called from the work's own thread."""

    def line(self, text: str) -> None:
        """A sentence for people."""

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are through, of what `what` names, such as "fold 0, epoch 3: slides"; called often."""

    # The rest is told by runs over a cohort's slides.

    def plan(self, plan: Plan) -> None:
        """The work is about to begin."""

    def stopping(self, signal: str) -> None:
        """A signal came: the run is going to stop. Called from within the signal's handler."""

    def expect(self, tiles: int) -> None:
        """The number of tiles that the whole run is going to embed is now thought to be `tiles`."""

    def tiles(self, count: int) -> None:
        """`count` tiles more are embedded."""

    def busy(self, shares: Mapping[str, float]) -> None:
        """Share of the last second or so that each stage ("plan", "read", "encode", "write", "slides") was busy."""

    def layer(self, slide_id: str, done: int, layers: int) -> None:
        """The slide encoder is through `done` of its `layers` with a slide: minutes each of a large slide."""

    def slide(self, row: Mapping[str, Any], number: int, slides: int) -> None:
        """Slide `number` of `slides` is through; `row` is what slides.csv says of the stages that it went through."""

    def retrying(self, slides: int) -> None:
        """All slides are through; those `slides` that failed by input or output are tried once more."""


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
        """Watch for signals; `on_signal` is told the name of each, from within its handler."""
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

    def __exit__(self, *_: object) -> None:
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
