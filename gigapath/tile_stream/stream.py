"""Slides planned, read, encoded and handed over side by side: four kinds of threads around one lock.

    planner   prepares one slide ahead of the one that is read (tissue, tiles)
    reader    reads slide after slide and fills batches of one fixed shape, across the slides' borders
    encoders  one thread a device, each takes the next full batch
    caller    takes the vectors of one slide after the other, in the order of `submit`, and writes them

Everything between them is bounded. An error of a slide is raised where its vectors are taken, an error of an encoder
at once, in the caller. B tiles of a batch, T pixels of a tile's side, D width of a vector.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.encoding import encoder_failures
from gigapath.tile_stream.busy import BusyTimes
from gigapath.tile_stream.passes import Pass, Vectors

UInt8Array = npt.NDArray[np.uint8]

# Slides that are prepared and wait for the reader.
_PLANNED = 1
# Batches of vectors that the caller has not taken yet: a slide encoder may take a while, and vectors are small.
_UNTAKEN = 64
# How often a waiting caller asks whether to go on, and takes what there is.
_CHECK_SECONDS = 0.2
# Vectors that are handed over at once, where so many come in that time: to be woken and to write costs a millisecond,
# whatever their number.
_BLOCK = 256


class Source(Protocol):
    """One slide, as the stream sees it."""

    def prepare(self) -> None:
        """What comes before reading; called from the planner's thread."""

    def read(self) -> Generator[tuple[int, UInt8Array], None, None]:
        """(index of the first tile, pixels (n, T, T, 3)) in order; called from the reader's thread, and closed."""


class _Closed(Exception):
    """The stream is being closed: its threads end."""


@dataclass
class _Part:
    """A run of neighbouring tiles of one slide within a batch."""

    slide: "SlideVectors"
    first: int
    row: int
    count: int
    batch: "_Batch"


@dataclass
class _Batch:
    pixels: Tensor
    parts: list[_Part] = field(default_factory=list)
    count: int = 0
    untaken: int = 0


class SlideVectors:
    """The vectors of one slide on their way; made by `TileStream.submit`.

    Attributes:
        encoding_since: when (time.monotonic) the first batch with tiles of this slide went into an encoder, or None.
    """

    # A cohort's slides are all announced at once: 171,189 of these should stay small.
    __slots__ = (
        "_all_read",
        "_on_the_way",
        "_over",
        "_prepared",
        "_problem",
        "_ready",
        "_source",
        "_stream",
        "_unprepared",
        "encoding_since",
    )

    def __init__(self, stream: "TileStream", source: Source) -> None:
        self.encoding_since: float | None = None
        self._stream = stream
        self._source = source
        self._prepared = False
        self._unprepared: BaseException | None = None
        self._all_read = False
        self._over = False
        self._problem: BaseException | None = None
        self._on_the_way = 0
        self._ready: list[tuple[_Part, Vectors]] = []

    def wait_prepared(self) -> None:
        """Wait until the slide is prepared; raises what went wrong with that."""
        with self._stream._news:
            self._stream._await(lambda: self._prepared)
            if self._unprepared is not None:
                raise self._unprepared

    def blocks(self) -> Generator[tuple[int, Vectors], None, None]:
        """(index of the first tile, vectors (n, D)), each tile once; with several devices in any order.

        Raises:
            EncoderError: an encoder failed.
            Exception: what went wrong with reading this slide; and what the stream's `check` raises.
        """
        stream = self._stream
        try:
            while True:
                with stream._news:
                    stream._await(self._is_worth_waking, after_a_while=lambda: bool(self._ready))
                    if self._problem is not None:
                        raise self._problem
                    if not self._ready:
                        return
                    stream._check()  # a slide whose last tile is through is finished all the same
                    first, vectors = self._next_block()
                with stream.busy.working("write"):
                    yield first, vectors
        finally:
            self.drop()

    def _is_worth_waking(self) -> bool:
        """Whether the caller has enough to do, or nothing to wait for. The lock is held."""
        return (
            self._problem is not None
            or (self._all_read and not self._on_the_way)
            or sum(part.count for part, _ in self._ready) >= _BLOCK
            or (bool(self._ready) and 2 * self._stream._untaken >= _UNTAKEN)
        )

    def _next_block(self) -> tuple[int, Vectors]:
        """Take the vectors of parts that follow each other, at most _BLOCK where they are several. The lock is held."""
        self._ready.sort(key=lambda item: item[0].first)
        first = end = self._ready[0][0].first
        blocks: list[Vectors] = []
        while self._ready:
            part, vectors = self._ready[0]
            if part.first != end or (blocks and end + part.count - first > _BLOCK):
                break
            del self._ready[0]
            self._stream._taken(part)
            blocks.append(vectors)
            end += part.count
        return first, blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def drop(self) -> None:
        """Take nothing more of this slide; what is still on its way is thrown away."""
        with self._stream._news:
            self._over = True
            for part, _ in self._ready:
                self._stream._taken(part)
            self._ready.clear()


class TileStream:
    """A stream of slides through tile encoders; use as a context manager, so that no thread is left.

    Args:
        passes: one way through an encoder a device; all encoders are the same one.
        batch_size: B of every batch.
        across: fill batches across the slides' borders; else the last batch of each slide is padded.
        depth: full batches that wait for an encoder, by default one more than there are devices.
        check: is called by a caller who waits; it may raise to stop.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        batch_size: int,
        *,
        across: bool = True,
        depth: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.busy = BusyTimes({"plan": 1, "read": 1, "encode": len(passes), "write": 1, "slides": 1})
        self._passes = passes
        self._batch_size = batch_size
        self._across = across
        self._check = check
        lock = threading.RLock()
        self._news = threading.Condition(lock)
        self._for_caller = threading.Condition(lock)
        # Everything below belongs to the lock, but for `_filling`, which is the reader's.
        depth = len(passes) + 1 if depth is None else depth
        self._free = depth + 1 + sum(1 + each.in_flight for each in passes)
        self._buffers: list[Tensor] = []
        self._announced: deque[SlideVectors] = deque()
        self._preparing = 0
        self._planned: deque[SlideVectors] = deque()
        self._batches: deque[_Batch] = deque()
        self._untaken = 0
        self._failure: BaseException | None = None
        self._closing = False
        self._filling: _Batch | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "TileStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A second Ctrl-C ends the process at once; its threads are daemons.
        self.close(wait=kind is None or not issubclass(kind, KeyboardInterrupt))

    def submit(self, source: Source) -> SlideVectors:
        """Append a slide; the stream begins with it when its turn comes. Take the slides' vectors in this order."""
        slide = SlideVectors(self, source)
        with self._news:
            self._announced.append(slide)
            self._news.notify_all()
        if not self._threads:
            works = [("plan", self._plan), ("read", self._read)]
            works += [(f"encode-{n}", partial(self._encode, each)) for n, each in enumerate(self._passes)]
            for name, work in works:
                thread = threading.Thread(target=self._run, args=(work,), name=f"tile-stream-{name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return slide

    def close(self, *, wait: bool = True) -> None:
        """End all threads, each after the tiles, batch or plan that it has in hand."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        if wait:
            for thread in self._threads:
                thread.join()

    # ---------------------------------------------------------------------------------------------- the threads

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _Closed:
            pass
        except BaseException as error:
            with self._news:
                self._failure = self._failure or error
                self._closing = True
                self._news.notify_all()
                self._for_caller.notify()

    def _plan(self) -> None:
        while True:
            with self._news:
                self._until(lambda: self._announced and len(self._planned) < _PLANNED)
                slide = self._announced.popleft()
                self._preparing += 1
            problem = None
            try:
                with self.busy.working("plan"):
                    slide._source.prepare()
            except BaseException as error:
                problem = error
            with self._news:
                self._preparing -= 1
                slide._unprepared, slide._prepared = problem, True
                if problem is None:
                    self._planned.append(slide)
                self._news.notify_all()
                self._for_caller.notify()

    def _read(self) -> None:
        while True:
            with self._news:
                self._until(lambda: self._planned or (self._filling and self._filling.count and self._nothing_ahead()))
                slide = self._planned.popleft() if self._planned else None
                self._news.notify_all()
            if slide is not None:
                self._read_slide(slide)
            if slide is None or not self._across:
                self._flush()

    def _nothing_ahead(self) -> bool:
        return not (self._announced or self._preparing or self._planned)

    def _read_slide(self, slide: SlideVectors) -> None:
        problem = None
        try:
            with contextlib.closing(slide._source.read()) as chunks:
                while True:
                    with self.busy.working("read"):
                        chunk = next(chunks, None)
                    if chunk is None:
                        break
                    self._add(slide, *chunk)
                    if self._closing or slide._over:
                        break
        except _Closed:
            raise
        except BaseException as error:
            problem = error
        with self._news:
            slide._problem, slide._all_read = slide._problem or problem, True
            self._for_caller.notify()

    def _add(self, slide: SlideVectors, first: int, tiles: UInt8Array) -> None:
        """Cut tiles into the batch that is being filled, and into new ones."""
        transform = self._passes[0].encoder.transform
        row = 0
        while row < len(tiles):
            batch = self._filling = self._filling or _Batch(self._buffer())
            count = min(self._batch_size - batch.count, len(tiles) - row)
            with self.busy.working("read"):
                transform.cut(tiles[row : row + count], batch.pixels.numpy()[batch.count : batch.count + count])
            last = batch.parts[-1] if batch.parts else None
            if last is not None and last.slide is slide and last.first + last.count == first + row:
                last.count += count
            else:
                batch.parts.append(_Part(slide, first + row, batch.count, count, batch))
                with self._news:
                    slide._on_the_way += 1
            batch.count += count
            row += count
            if batch.count == self._batch_size:
                self._flush()

    def _flush(self) -> None:
        """Send the batch that is being filled on its way, padded to its full shape."""
        batch = self._filling
        if batch is None or not batch.count:
            return
        self._filling = None
        batch.pixels[batch.count :] = 0
        batch.untaken = len(batch.parts)
        with self._news:
            self._batches.append(batch)
            self._news.notify_all()

    def _buffer(self) -> Tensor:
        with self._news:
            self._until(lambda: self._free)
            self._free -= 1
            if self._buffers:
                return self._buffers.pop()
        side = self._passes[0].encoder.transform.crop
        pinned = any(each.pinned for each in self._passes)
        return torch.empty((self._batch_size, side, side, 3), dtype=torch.uint8, pin_memory=pinned)

    def _encode(self, each: Pass) -> None:
        running: deque[tuple[_Batch, Callable[[], Vectors]]] = deque()
        while True:
            batch = self._next_batch(wait=not running)
            with self.busy.working("encode"), encoder_failures(each.encoder, self._batch_size):
                if batch is not None:
                    running.append((batch, each.start(batch.pixels)))
                if batch is None or len(running) > each.in_flight:
                    done, answer = running.popleft()
                    vectors = answer()
                else:
                    continue
            self._deliver(done, vectors, each)

    def _next_batch(self, *, wait: bool) -> _Batch | None:
        """The next full batch; None where there is none yet and nobody may wait for it."""
        with self._news:
            if wait:
                self._until(self._may_encode)
            elif not self._may_encode():
                return None
            batch = self._batches.popleft()
            # Counted in the batches' order, so that the batch which the caller waits for is never the one left out.
            self._untaken += 1
            for part in batch.parts:
                part.slide.encoding_since = part.slide.encoding_since or time.monotonic()
            return batch

    def _may_encode(self) -> bool:
        return bool(self._batches) and self._untaken < _UNTAKEN

    def _deliver(self, batch: _Batch, vectors: Vectors, each: Pass) -> None:
        with self._news:
            self._free += 1
            self._buffers.append(batch.pixels)
            for part in batch.parts:
                block = vectors[part.row : part.row + part.count]
                part.slide._on_the_way -= 1
                if part.slide._over:
                    self._taken(part)
                    continue
                try:
                    part.slide._ready.append((part, each.encoder.checked(block)))
                except ValueError as error:  # a value that is not finite is its own slide's trouble
                    part.slide._problem = part.slide._problem or error
                    self._taken(part)
            self._news.notify_all()
            if any(part.slide._is_worth_waking() for part in batch.parts):
                self._for_caller.notify()

    # -------------------------------------------------------------------------------------------------- waiting

    def _taken(self, part: _Part) -> None:
        """A part of a batch is in the caller's hands, or nobody wants it. The lock is held."""
        part.batch.untaken -= 1
        if not part.batch.untaken:
            self._untaken -= 1
            self._news.notify_all()

    def _until(self, holds: Callable[[], object]) -> None:
        """Wait within a thread of the stream. The lock is held."""
        while not self._closing:
            if holds():
                return
            self._news.wait()
        raise _Closed

    def _await(self, holds: Callable[[], bool], after_a_while: Callable[[], bool] = lambda: False) -> None:
        """Wait within the caller until `holds`, or after _CHECK_SECONDS `after_a_while`. The lock is held."""
        patience = time.monotonic() + _CHECK_SECONDS
        while True:
            if self._failure is not None:
                raise self._failure
            if holds() or (time.monotonic() >= patience and after_a_while()):
                return
            self._check()
            assert not self._closing, "the stream is closed"
            self._for_caller.wait(_CHECK_SECONDS)
