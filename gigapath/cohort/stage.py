"""A stage of the work on slides: what its result for a slide depends on, and how it is made. The loop over a cohort
(`gigapath.cohort.run`) knows no more of it, and it nothing of the loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.reuse import finished
from gigapath.cohort.status import Status, read_status


@dataclass(frozen=True)
class Outcome:
    """What a stage found out about a slide; becomes its status.

    `since` says when (time.monotonic) work on it began, where that was before the attempt; `files` names what it wrote,
    where that is not the one `<slide_id>.h5`.
    """

    status: str = "done"
    tiles: int = 0
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    since: float | None = None
    files: tuple[str, ...] = ()


class Keep(Protocol):
    """What becomes of results that are there."""

    @property
    def allow_mixed(self) -> bool:
        """Whether results of other numerics are taken."""

    def overwrites(self, stage: str) -> bool:
        """Whether this stage is to be done again."""


class Stage:
    """One step from a slide to its embedding; its results are files `<slide_id>.h5` in a folder of its own.

    Attributes:
        name: "tiles", "features" or "slides".
        folder: of its results.
        options: what becomes of results that are there.
    """

    name: str
    folder: Path
    options: Keep

    def identity(self, entry: SlideEntry) -> dict[str, Any]:
        """Everything that a slide's result depends on: options, encoders, what the stage before it made.

        Raises:
            OSError, ValueError: it can't be found out; `make` fails of the same.
        """
        raise NotImplementedError

    def make(self, entry: SlideEntry, identity: Mapping[str, Any]) -> Outcome:
        """Make a slide's result of this identity and write it; an error is the slide's, unless it `stops_run`."""
        raise NotImplementedError

    def path(self, entry: SlideEntry) -> Path:
        """Where a slide's result lies."""
        return self.folder / f"{entry.slide_id}.h5"

    def done(self, entry: SlideEntry) -> Status | None:
        """The status of a result that is there and equals what this run would make, or None."""
        if self.options.overwrites(self.name):
            return None
        try:
            identity = self.identity(entry)
        except (OSError, ValueError):  # `make` says so
            return None
        return finished(self.folder, entry.slide_id, identity, allow_mixed=self.options.allow_mixed)

    def digest(self, entry: SlideEntry) -> str:
        """Names a slide's result, for the identity of the stage that follows.

        Raises:
            ValueError: there is none.
        """
        status = read_status(self.folder, entry.slide_id)
        if status is None or not status.finished:
            raise ValueError(f"slide {entry.slide_id!r}: expected its {self.name}, got none.")
        return status.digest
