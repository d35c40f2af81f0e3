"""What a run tells whoever watches it; the command line draws it, a notebook need not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What a run is about to do.

    Attributes:
        lines: sentences for a person.
        slides: slides of the cohort.
        reused: slides of which nothing is left to do.
        tiles: tiles that are going to be embedded (in a tiling run 0).
        exact: whether `tiles` is counted; else it is estimated from the slides' sizes.
        facts: the same as numbers, for machines.
    """

    lines: tuple[str, ...]
    slides: int
    reused: int
    tiles: int = 0
    exact: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)


class Watcher:
    """Receives a run's news; this one keeps quiet. Methods are called from the run's own thread."""

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

    def slide(self, row: Mapping[str, Any], number: int, slides: int) -> None:
        """Slide `number` of `slides` is through; `row` is what slides.csv says of the stages that it went through."""

    def retrying(self, slides: int) -> None:
        """All slides are through; the `slides` that failed are tried once more."""
