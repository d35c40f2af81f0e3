"""Slides planned, read, encoded and handed over side by side: threads with bounded queues between them.

    plan     prepares one slide ahead of the one that is read (tissue, tiles, the open file)
    read     reads slide after slide, with threads of its own, into batches of one fixed shape, across slides' borders
    encode   one thread a device takes the next full batch
    caller   takes the vectors of one slide after the other, in the order of `submit`, and writes them

Batches are bounded by their buffers, which are taken again, and vectors by permits to encode. A slide that fails
travels on as a failed one: its error is raised where its vectors are taken. What an encoder raises ends the stream.
B tiles of a batch, S pixels of a row's side, D width of a vector.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from gigapath.devices import at_most_threads
from gigapath.embedding.forward import PlainForward, Vectors, encoder_failures
from gigapath.preprocessing.reading import Place
from gigapath.tile_encoder import TileEncoder

Item = TypeVar("Item")

# How often a waiting caller asks whether to go on, and takes what there is.
_CHECK_SECONDS = 0.2
# Slides that are prepared and wait to be read.
_PLANNED = 1
# Rows that a reading thread gets at once: neighbours share a slide's compressed blocks, and a stop waits for these.
_RUN = 8
# Batches of vectors that the caller has not taken yet: a slide encoder may take a while, and vectors are small.
_UNTAKEN = 64
# Vectors that are handed over at once, where so many come before the caller looks by itself: to be woken and to write
# costs a millisecond, whatever their number.
_BLOCK = 256


class _Closed(Exception):
    """The stream is being closed: its threads end."""


class _Channel(Generic[Item]):
    """A queue between two kinds of threads; who waits for it is let go when the stream is closed."""

    def __init__(self, closing: threading.Event, items: Sequence[Item] = ()) -> None:
        self._closing = closing
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        for item in items:
            self.put(item)

    def put(self, item: Item | None) -> None:
        """Add an item; None wakes whoever waits once the stream is being closed."""
        self._queue.put(item)

    def take(self, *, wait: bool = True) -> Item:
        """The next item; queue.Empty where there is none and nobody may wait, _Closed at the stream's end."""
        item = self._queue.get(wait)
        if item is None or self._closing.is_set():
            self._queue.put(item)
            raise _Closed
        return item

    def rest(self) -> Iterator[Item]:
        """What nobody took; no thread is left."""
        while self.size:
            item = self._queue.get()
            if item is not None:
                yield item

    @property
    def size(self) -> int:
        """How many wait to be taken."""
        return self._queue.qsize()


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
    """A buffer (uint8 (B, S, S, 3)), and what its rows hold, in order: `count` of them were handed out, of which
    `unfilled` are still being filled; `untaken` are parts whose vectors the caller has not taken."""

    pixels: Tensor
    parts: list[Part] = field(default_factory=list)
    count: int = 0
    unfilled: int = 0
    untaken: int = 0


@dataclass(slots=True, eq=False)  # a cohort's slides are all submitted at once: 171,189 of these should stay small
class SlideVectors:
    """The vectors of one slide on their way; made by `TileStream.submit`.

    `encoding_since` is when (time.monotonic) the first batch with tiles of this slide went into an encoder, or None.
    The others belong to the stream and its lock: whether it is `prepared`, or what went wrong with that (`unprepared`);
    whether its last tile is in a batch (`all_read`); what went wrong first with reading or encoding (`problem`);
    whether nothing more of it is wanted (`over`); its parts of batches that are `on_the_way` into an encoder, and those
    that are `ready` with their vectors.
    """

    source: Any
    _stream: "TileStream"
    encoding_since: float | None = None
    prepared: bool = False
    unprepared: BaseException | None = None
    all_read: bool = False
    problem: BaseException | None = None
    over: bool = False
    on_the_way: int = 0
    ready: list[tuple[Part, Vectors]] = field(default_factory=list)

    def wait_prepared(self) -> None:
        """Wait until the slide is prepared; raises what went wrong with that."""
        with self._stream.lock:
            self._stream.wait(lambda: self.prepared)
            if self.unprepared is not None:
                raise self.unprepared

    def blocks(self) -> Generator[tuple[int, Vectors], None, None]:
        """(index of the first tile, vectors (n, D)), each tile once; with several devices in any order. EncoderError
        where an encoder failed, else what went wrong with this slide, and what the stream's `check` raises."""
        try:
            while True:
                with self._stream.lock:
                    self._stream.wait(self._worth_waking, after_a_while=lambda: bool(self.ready))
                    if self.problem is not None:
                        raise self.problem
                    if not self.ready:
                        return
                    self._stream.check()  # a slide whose last tile is through is finished all the same
                    first, vectors = self._next_block()
                with self._stream.busy.working("write"):
                    yield first, vectors
        finally:
            self.drop()

    def drop(self) -> None:
        """Take nothing more of this slide; what is still on its way is thrown away."""
        with self._stream.lock:
            self.over = True
            for part, _ in self.ready:
                self._stream.taken(part)
            self.ready.clear()

    @property
    def wanted(self) -> bool:
        """Whether more of its tiles are to be read."""
        return not self.over and self.problem is None

    def _worth_waking(self) -> bool:
        """Whether the caller has enough to do, or nothing to wait for, or the encoders will soon wait for it."""
        return (
            self.problem is not None
            or (self.all_read and not self.on_the_way)
            or sum(part.count for part, _ in self.ready) >= _BLOCK
            or (bool(self.ready) and 2 * self._stream.permits.size <= _UNTAKEN)
        )

    def _next_block(self) -> tuple[int, Vectors]:
        """Take the vectors of parts that follow each other, at most _BLOCK where they are several."""
        self.ready.sort(key=lambda item: item[0].first)
        first = end = self.ready[0][0].first
        blocks: list[Vectors] = []
        while self.ready:
            part, vectors = self.ready[0]
            if part.first != end or (blocks and end + part.count - first > _BLOCK):
                break
            del self.ready[0]
            self._stream.taken(part)
            blocks.append(vectors)
            end += part.count
        return first, blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


class TileStream:
    """A stream of slides through tile encoders; use as a context manager, so that no thread is left.

    Args:
        forwards: one way through an encoder a device; all encoders are the same one.
        batch_size: B of every batch.
        across: fill batches across the slides' borders; else the last batch of each slide is padded.
        depth: full batches that wait for an encoder, by default one more than there are devices.
        readers: threads by which a slide is read.
        cores: threads that torch computes with at the most, or None to leave that to torch.
        check: is called by a caller who waits; it may raise to stop.
    """

    def __init__(
        self,
        forwards: Sequence[PlainForward],
        batch_size: int,
        *,
        across: bool = True,
        depth: int | None = None,
        readers: int = 1,
        cores: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.busy = StageTimes({"plan": 1, "read": readers, "encode": len(forwards), "write": 1, "slides": 1})
        self.check = check
        self.lock = threading.RLock()
        self._news = threading.Condition(self.lock)
        self._forwards, self._across, self._cores = forwards, across, cores
        side = forwards[0].encoder.transform.resize
        self._shape = batch_size, side, side, 3
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._submitted: _Channel[SlideVectors] = _Channel(self._closing)
        self._room: _Channel[bool] = _Channel(self._closing, [True] * _PLANNED)
        self._planned: _Channel[SlideVectors] = _Channel(self._closing)
        self._free: _Channel[Tensor] = _Channel(self._closing)
        self._full: _Channel[Batch] = _Channel(self._closing)
        self.permits: _Channel[bool] = _Channel(self._closing, [True] * _UNTAKEN)
        self._channels = self._submitted, self._room, self._planned, self._free, self._full, self.permits
        self._ahead = 0  # slides that are submitted and not read
        self._run = min(_RUN, batch_size)
        depth = len(forwards) + 1 if depth is None else depth
        in_encoders = sum(1 + each.in_flight for each in forwards)
        self._unmade = depth + in_encoders + 1 + (readers * self._run - 1) // batch_size
        self._filling: Batch | None = None
        self._handed_out: deque[Batch] = deque()  # every row of them; a later one may be filled first
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "TileStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A second Ctrl-C ends the process at once; its threads are daemons.
        self.close(wait=kind is None or not issubclass(kind, KeyboardInterrupt))

    def submit(self, source: Any) -> SlideVectors:
        """Append a slide; the stream begins with it when its turn comes. Take the slides' vectors in this order.

        Of the source, `prepare()` is called from the planner's thread, `read(take)` from the reader's (it puts the
        tiles into the places that `take` gives, as `fill_places` does), and `close()` after that or instead of it.
        """
        slide = SlideVectors(source, self)
        with self.lock:
            self._ahead += 1
        self._submitted.put(slide)
        if not self._threads:
            works = [("plan", self._plan), ("read", self._read)]
            works += [(f"encode-{n}", partial(self._encode, each)) for n, each in enumerate(self._forwards)]
            for name, work in works:
                thread = threading.Thread(target=self._work, args=(work,), name=f"tile-stream-{name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return slide

    def close(self, *, wait: bool = True) -> None:
        """End all threads, each after the tiles, batch or plan that it has in hand."""
        self._end()
        if wait:
            for thread in self._threads:
                thread.join()
            for slide in self._planned.rest():
                if slide.unprepared is None:
                    slide.source.close()

    def wait(self, holds: Callable[[], bool], after_a_while: Callable[[], bool] = lambda: False) -> None:
        """Wait in the caller, who holds the lock, until `holds`, or after _CHECK_SECONDS `after_a_while`. Raises what
        ended the stream, or what `check` raises."""
        patience = time.monotonic() + _CHECK_SECONDS
        while True:
            if self._failure is not None:
                raise self._failure
            if holds() or (time.monotonic() >= patience and after_a_while()):
                return
            self.check()
            assert not self._closing.is_set(), "the stream is closed"
            self._news.wait(_CHECK_SECONDS)

    def taken(self, part: Part) -> None:
        """The vectors of a part are in the caller's hands, or nobody wants them. The lock is held."""
        part.batch.untaken -= 1
        if not part.batch.untaken:
            self.permits.put(True)

    # ---------------------------------------------------------------------------------------------- the threads

    def _work(self, work: Callable[[], None]) -> None:
        try:
            with contextlib.nullcontext() if self._cores is None else at_most_threads(self._cores):
                work()
        except _Closed:
            pass
        except BaseException as error:
            self._end(error)

    def _end(self, failure: BaseException | None = None) -> None:
        """Let every thread end; the caller gets the first failure."""
        with self.lock:
            self._failure = self._failure or failure
            self._closing.set()
            self._news.notify()
        for channel in self._channels:
            channel.put(None)

    def _plan(self) -> None:
        while True:
            self._room.take()
            slide = self._submitted.take()
            problem = None
            try:
                with self.busy.working("plan"):
                    slide.source.prepare()
            except BaseException as error:
                problem = error
            with self.lock:
                slide.unprepared, slide.prepared = problem, True
                self._news.notify()
            self._planned.put(slide)

    def _read(self) -> None:
        while True:
            slide = self._planned.take()
            self._room.put(True)
            if slide.unprepared is None:
                self._read_slide(slide)
            with self.lock:
                slide.all_read = True
                self._ahead -= 1
                if self._filling is not None and not (self._across and self._ahead):
                    self._filling.pixels[self._filling.count :] = 0
                    self._hand_over(self._filling)
                self._news.notify()

    def _read_slide(self, slide: SlideVectors) -> None:
        problem = None
        try:
            with contextlib.closing(slide.source):
                slide.source.read(partial(self._take, slide))
        except BaseException as error:
            problem = error
        if self._closing.is_set():  # it may have been cut off
            raise _Closed
        with self.lock:
            slide.problem = slide.problem or problem

    def _take(self, slide: SlideVectors, first: int, left: int) -> Place | None:
        """The next rows for a slide's tiles from `first` on, at most `left`, waiting for a free buffer; None where no
        more of the slide is wanted. Called in the tiles' order, by one thread at a time."""
        try:
            pixels = self._buffer() if self._filling is None and slide.wanted else None
        except _Closed:
            return None
        with self.lock:
            if pixels is not None:
                self._filling = Batch(pixels)
            if not slide.wanted or self._filling is None:
                return None
            batch = self._filling
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
                self._hand_over(batch)
        filled = partial(self._filled, slide, batch, count, time.perf_counter())
        return Place(first, batch.pixels.numpy()[row : row + count], filled)

    def _buffer(self) -> Tensor:
        """A buffer that is free, or a new one while there are few."""
        with contextlib.suppress(queue.Empty):
            return self._free.take(wait=not self._unmade)
        self._unmade -= 1
        return torch.empty(self._shape, dtype=torch.uint8, pin_memory=any(each.pinned for each in self._forwards))

    def _filled(
        self, slide: SlideVectors, batch: Batch, rows: int, since: float, problem: BaseException | None
    ) -> None:
        with self.lock:
            batch.unfilled -= rows
            if problem is not None:  # known before anybody can encode those rows
                slide.problem = slide.problem or problem
                self._news.notify()
            self._send_full()
        self.busy.add("read", time.perf_counter() - since)

    def _hand_over(self, batch: Batch) -> None:
        self._filling = None
        if batch.parts:
            batch.untaken = len(batch.parts)
            self._handed_out.append(batch)
            self._send_full()
        else:  # a slide failed before it took a row
            self._free.put(batch.pixels)

    def _send_full(self) -> None:
        """Send batches to the encoders in their order, so that the one which the caller waits for is never the one that
        gets no permit."""
        while self._handed_out and not self._handed_out[0].unfilled:
            self._full.put(self._handed_out.popleft())

    def _encode(self, forward: PlainForward) -> None:
        running: deque[tuple[Batch, Callable[[], Vectors]]] = deque()
        while True:
            batch = self._next_batch(wait=not running)
            with self.busy.working("encode"), encoder_failures(forward.encoder, self._shape[0]):
                if batch is not None:
                    running.append((batch, forward.start(batch.pixels)))
                    if len(running) <= forward.in_flight:
                        continue
                done, answer = running.popleft()
                vectors = answer()
            self._free.put(done.pixels)
            with self.lock:
                for part in done.parts:
                    self._deliver(part, vectors[part.row : part.row + part.count], forward.encoder)
                self._news.notify()

    def _next_batch(self, *, wait: bool) -> Batch | None:
        """The next full batch; None where there is none yet, or no permit, and nobody may wait for it."""
        try:
            self.permits.take(wait=wait)
        except queue.Empty:
            return None
        try:
            batch = self._full.take(wait=wait)
        except queue.Empty:
            self.permits.put(True)
            return None
        now = time.monotonic()
        for part in batch.parts:
            part.slide.encoding_since = part.slide.encoding_since or now
        return batch

    def _deliver(self, part: Part, vectors: Vectors, encoder: TileEncoder) -> None:
        slide = part.slide
        slide.on_the_way -= 1
        if slide.wanted:
            try:
                slide.ready.append((part, encoder.checked(vectors)))
                return
            except ValueError as error:  # a value that is not finite is its own slide's trouble
                slide.problem = error
        self.taken(part)


Snapshot = tuple[float, dict[str, float]]


class StageTimes:
    """Seconds of work by stage, added up from several threads (`workers` side by side in each): the stage with the
    largest share is the one that the others wait for."""

    def __init__(self, workers: Mapping[str, int]) -> None:
        self._workers = dict(workers)
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(workers, 0.0)
        self._since = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        """`stage` has worked for so long."""
        with self._lock:
            self._seconds[stage] += seconds

    @contextlib.contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """What happens within counts as work of `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def shares(self, before: Snapshot | None = None) -> dict[str, float]:
        """Share of the time that each stage worked, 0 to 1, since the beginning or since `before`."""
        now = self.snapshot()
        since, seconds = (self._since, dict.fromkeys(self._seconds, 0.0)) if before is None else before
        elapsed = max(now[0] - since, 1e-9)
        return {
            stage: min(1.0, (total - seconds[stage]) / elapsed / self._workers[stage])
            for stage, total in now[1].items()
        }

    def snapshot(self) -> Snapshot:
        """(now, seconds by stage), to count from."""
        with self._lock:
            return time.perf_counter(), dict(self._seconds)
