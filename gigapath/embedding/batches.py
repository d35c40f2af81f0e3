"""Tiles on their way from the threads that read to the encoders in batches of one fixed shape, and vectors back.

The threads that read put each tile straight into its row of a recycled buffer. One lock serves all that the threads of
a stream share. B tiles of a batch, S pixels of a row's side, D width of a vector.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.embedding.passes import Vectors
from gigapath.embedding.times import StageTimes
from gigapath.preprocessing.reading import Take
from gigapath.tile_encoder import TileEncoder

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


UInt8Array = npt.NDArray[np.uint8]

# Rows that a thread gets at once: neighbours share a slide's compressed blocks, and a stop waits for none but these.
_RUN = 8
# Batches of vectors that the caller has not taken yet: a slide encoder may take a while, and vectors are small.
_UNTAKEN = 64


@dataclass
class Part:
    """A run of neighbouring tiles of one slide within a batch."""

    slide: "SlideVectors"
    first: int
    row: int
    count: int
    batch: "Batch"


@dataclass(eq=False)
class Batch:
    """A buffer, and what lies in it.

    Attributes:
        pixels: uint8 (B, S, S, 3).
        parts: what its rows hold, in order.
        count: rows that were handed out.
        unfilled: of these, rows that a thread is still filling.
        untaken: parts whose vectors the caller has not taken.
    """

    pixels: Tensor
    parts: list[Part] = field(default_factory=list)
    count: int = 0
    unfilled: int = 0
    untaken: int = 0


class Place:
    """Rows of a batch for tiles of a slide that follow each other; whoever took it says when it is done with it.

    Attributes:
        first: index of the first tile.
        pixels: uint8 (n, S, S, 3), to be filled.
    """

    __slots__ = ("_batch", "_batches", "_since", "_slide", "first", "pixels")

    def __init__(self, batches: "Batches", slide: "SlideVectors", batch: Batch, first: int, pixels: UInt8Array) -> None:
        self.first = first
        self.pixels = pixels
        self._batches, self._slide, self._batch = batches, slide, batch
        self._since = time.perf_counter()

    def done(self, problem: BaseException | None = None) -> None:
        """Its rows are filled; or they never will be: then the slide fails of `problem` and nobody gets them."""
        self._batches._filled(self._slide, self._batch, len(self.pixels), problem)
        self._batches.busy.add("read", time.perf_counter() - self._since)


class Batches:
    """All batches of a stream, a bounded number; everything here belongs to the stream's lock.

    Attributes:
        busy: how busy the stages of the stream are.
        untaken: batches that encoders were given, and of which the caller has not taken everything.
    """

    def __init__(
        self, waiting: Waiting, busy: StageTimes, shape: tuple[int, int], *, pinned: bool, others: int, readers: int
    ) -> None:
        """
        Args:
            waiting: the stream's lock.
            busy: how busy its stages are.
            shape: B and S.
            pinned: whether buffers should lie in page-locked memory.
            others: buffers beside those that are being filled.
            readers: threads that fill them.
        """
        self.busy = busy
        self.untaken = 0
        self._waiting = waiting
        self._shape = (*shape, shape[1], 3)
        self._pinned = pinned
        self._run = min(_RUN, shape[0])
        self._unmade = others + 1 + (readers * self._run - 1) // shape[0]
        self._free: list[Tensor] = []
        self._filling: Batch | None = None
        self._handed_out: deque[Batch] = deque()  # every row of them; a later one may be filled first

    # -------------------------------------------------------------------------------------- the threads that read

    def take(self, slide: "SlideVectors", first: int, left: int) -> Place | None:
        """The next rows, waiting for a free buffer; called in the tiles' order.

        Args:
            slide: whose tiles they are for.
            first: index of the first tile.
            left: tiles from there to the slide's end; at most so many rows are given.

        Returns:
            The rows, or None where no more of the slide is wanted.
        """
        with self._waiting:
            try:
                self._waiting.until(
                    self._waiting.rows, lambda: self._filling or self._free or self._unmade or not slide.wanted
                )
            except Closed:
                return None
            if not slide.wanted:
                return None
            batch = self._filling = self._filling or Batch(self._buffer())
            row, count = batch.count, min(left, self._run, self._shape[0] - batch.count)
            batch.count += count
            batch.unfilled += count
            last = batch.parts[-1] if batch.parts else None
            if last is not None and last.slide is slide:
                last.count += count
            else:
                batch.parts.append(Part(slide, first, row, count, batch))
                slide.on_the_way += 1
            if batch.count == self._shape[0]:
                self._hand_over()
            return Place(self, slide, batch, first, batch.pixels.numpy()[row : row + count])

    def seal(self) -> None:
        """Send the batch that is being filled on its way, padded to its full shape; no thread is reading then."""
        with self._waiting:
            if self._filling is not None:
                self._filling.pixels[self._filling.count :] = 0
                self._hand_over()
                self._waiting.encoders.notify()

    @property
    def begun(self) -> bool:
        """Whether a batch waits for more tiles."""
        return self._filling is not None

    def _filled(self, slide: "SlideVectors", batch: Batch, rows: int, problem: BaseException | None) -> None:
        with self._waiting:
            batch.unfilled -= rows
            if problem is not None:  # told before anybody can encode those rows
                slide.problem = slide.problem or problem
                self._waiting.rows.notify_all()
                self._waiting.caller.notify()
            if not batch.unfilled:
                self._waiting.encoders.notify()

    def _hand_over(self) -> None:
        assert self._filling is not None
        self._filling.untaken = len(self._filling.parts)
        self._handed_out.append(self._filling)
        self._filling = None

    def _buffer(self) -> Tensor:
        if self._free:
            return self._free.pop()
        made = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pinned)
        self._unmade -= 1
        return made

    # ---------------------------------------------------------------------------------------------- the encoders

    def next(self, *, wait: bool) -> Batch | None:
        """The next full batch; None where there is none yet and nobody may wait for it.

        They come in their own order, so that the batch which the caller waits for is never the one left out where
        `_UNTAKEN` are not taken.
        """
        with self._waiting:
            if wait:
                self._waiting.until(self._waiting.encoders, self._may_encode)
            elif not self._may_encode():
                return None
            batch = self._handed_out.popleft()
            self.untaken += 1
            for part in batch.parts:
                part.slide.encoding_since = part.slide.encoding_since or time.monotonic()
            if self._may_encode():
                self._waiting.encoders.notify()
            return batch

    def _may_encode(self) -> bool:
        return bool(self._handed_out) and not self._handed_out[0].unfilled and self.untaken < _UNTAKEN

    def recycle(self, batch: Batch) -> None:
        """The encoder is done with a batch's pixels."""
        self._free.append(batch.pixels)
        self._waiting.rows.notify()

    # ------------------------------------------------------------------------------------------------ the caller

    def taken(self, part: Part) -> None:
        """The vectors of a part are in the caller's hands, or nobody wants them."""
        part.batch.untaken -= 1
        if not part.batch.untaken:
            self.untaken -= 1
            self._waiting.encoders.notify()

    @property
    def crowded(self) -> bool:
        """Whether the encoders will soon have to wait for the caller."""
        return 2 * self.untaken >= _UNTAKEN


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
