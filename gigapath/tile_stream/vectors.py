"""The vectors of one slide on their way from the encoders to the caller. D width of a vector."""

from collections.abc import Generator
from typing import Protocol

import numpy as np

from gigapath.preprocessing.places import Take
from gigapath.tile_encoder import TileEncoder
from gigapath.tile_stream.batches import Batches, Part
from gigapath.tile_stream.passes import Vectors
from gigapath.tile_stream.waiting import Waiting

# Vectors that are handed over at once, where so many come before the caller looks by itself: to be woken and to write
# costs a millisecond, whatever their number.
_BLOCK = 256


class Source(Protocol):
    """One slide, as the stream sees it."""

    def prepare(self) -> None:
        """What comes before reading; called from the planner's thread."""

    def read(self, take: Take) -> None:
        """Put the tiles into the places that `take` gives, as `fill_places` does; called from the reader's thread."""

    def close(self) -> None:
        """Let go of what was prepared; called after reading, or instead of it."""


class SlideVectors:
    """The vectors of one slide on their way; made by `TileStream.submit`.

    Attributes:
        encoding_since: when (time.monotonic) the first batch with tiles of this slide went into an encoder, or None.

    The others belong to the stream and its lock:
        source: the slide.
        prepared: whether it is prepared.
        unprepared: what went wrong with that.
        all_read: whether its last tile is in a batch.
        problem: what went wrong with reading or encoding it.
        over: whether nothing more of it is wanted.
        on_the_way: parts of batches that hold tiles of it and are not through an encoder.
    """

    # A cohort's slides are all announced at once: 171,189 of these should stay small.
    __slots__ = (
        "_batches",
        "_ready",
        "_waiting",
        "all_read",
        "encoding_since",
        "on_the_way",
        "over",
        "prepared",
        "problem",
        "source",
        "unprepared",
    )

    def __init__(self, source: Source, batches: Batches, waiting: Waiting) -> None:
        self.encoding_since: float | None = None
        self.source = source
        self.prepared = False
        self.unprepared: BaseException | None = None
        self.all_read = False
        self.problem: BaseException | None = None
        self.over = False
        self.on_the_way = 0
        self._ready: list[tuple[Part, Vectors]] = []
        self._batches, self._waiting = batches, waiting

    def wait_prepared(self) -> None:
        """Wait until the slide is prepared; raises what went wrong with that."""
        with self._waiting:
            self._waiting.caller_until(lambda: self.prepared)
            if self.unprepared is not None:
                raise self.unprepared

    def blocks(self) -> Generator[tuple[int, Vectors], None, None]:
        """(index of the first tile, vectors (n, D)), each tile once; with several devices in any order.

        Raises:
            EncoderError: an encoder failed.
            Exception: what went wrong with reading this slide; and what the stream's `check` raises.
        """
        try:
            while True:
                with self._waiting:
                    self._waiting.caller_until(self.worth_waking, after_a_while=lambda: bool(self._ready))
                    if self.problem is not None:
                        raise self.problem
                    if not self._ready:
                        return
                    self._waiting.check()  # a slide whose last tile is through is finished all the same
                    first, vectors = self._next_block()
                with self._batches.busy.working("write"):
                    yield first, vectors
        finally:
            self.drop()

    def drop(self) -> None:
        """Take nothing more of this slide; what is still on its way is thrown away."""
        with self._waiting:
            self.over = True
            for part, _ in self._ready:
                self._batches.taken(part)
            self._ready.clear()
            self._waiting.rows.notify_all()

    # -------------------------------------------------------------------------------- the stream, under its lock

    @property
    def wanted(self) -> bool:
        """Whether more of its tiles are to be read."""
        return not self.over and self.problem is None

    def deliver(self, part: Part, vectors: Vectors, encoder: TileEncoder) -> None:
        """A part of a batch is through `encoder`."""
        self.on_the_way -= 1
        if self.wanted:
            try:
                self._ready.append((part, encoder.checked(vectors)))
                return
            except ValueError as error:  # a value that is not finite is its own slide's trouble
                self.problem = error
        self._batches.taken(part)

    def worth_waking(self) -> bool:
        """Whether the caller has enough to do, or nothing to wait for."""
        return (
            self.problem is not None
            or (self.all_read and not self.on_the_way)
            or sum(part.count for part, _ in self._ready) >= _BLOCK
            or (bool(self._ready) and self._batches.crowded)
        )

    def _next_block(self) -> tuple[int, Vectors]:
        """Take the vectors of parts that follow each other, at most _BLOCK where they are several."""
        self._ready.sort(key=lambda item: item[0].first)
        first = end = self._ready[0][0].first
        blocks: list[Vectors] = []
        while self._ready:
            part, vectors = self._ready[0]
            if part.first != end or (blocks and end + part.count - first > _BLOCK):
                break
            del self._ready[0]
            self._batches.taken(part)
            blocks.append(vectors)
            end += part.count
        return first, blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
