"""Batches of one fixed shape on their way from the threads that read tiles to the encoders, in recycled buffers.

The threads that read put each tile straight into its row. B tiles of a batch, S pixels of a row's side.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.tile_stream.busy import BusyTimes
from gigapath.tile_stream.waiting import Closed, Waiting

if TYPE_CHECKING:
    from gigapath.tile_stream.vectors import SlideVectors

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
        self, waiting: Waiting, busy: BusyTimes, shape: tuple[int, int], *, pinned: bool, others: int, readers: int
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
