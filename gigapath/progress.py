"""What long work tells whoever watches it: the command line draws it (`gigapath.cli.progress`), a notebook need not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SILENT_SECONDS = 30.0  # after so long a silence a log hears that the work goes on


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
