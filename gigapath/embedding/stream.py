"""Slides planned, read, encoded and handed over side by side: four kinds of threads around one lock.

    planner   prepares one slide ahead of the one that is read (tissue, tiles, the open file)
    reader    reads slide after slide, with threads of its own, into batches of one fixed shape, across slides' borders
    encoders  one thread a device, each takes the next full batch
    caller    takes the vectors of one slide after the other, in the order of `submit`, and writes them

Everything between them is bounded. An error of a slide is raised where its vectors are taken, an error of an encoder
at once, in the caller. B tiles of a batch.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from gigapath.devices import at_most_threads
from gigapath.embedding.batches import Batch, Batches, Closed, SlideVectors, Source, Waiting
from gigapath.embedding.passes import Pass, Vectors
from gigapath.embedding.slide_encoding import encoder_failures
from gigapath.embedding.times import StageTimes

# Slides that are prepared and wait for the reader.
_PLANNED = 1


class TileStream:
    """A stream of slides through tile encoders; use as a context manager, so that no thread is left.

    Args:
        passes: one way through an encoder a device; all encoders are the same one.
        batch_size: B of every batch.
        across: fill batches across the slides' borders; else the last batch of each slide is padded.
        depth: full batches that wait for an encoder, by default one more than there are devices.
        readers: threads by which a slide is read.
        cores: threads that torch computes with at the most, or None to leave that to torch.
        check: is called by a caller who waits; it may raise to stop.

    Attributes:
        busy: how busy each stage is.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        batch_size: int,
        *,
        across: bool = True,
        depth: int | None = None,
        readers: int = 1,
        cores: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.busy = StageTimes({"plan": 1, "read": readers, "encode": len(passes), "write": 1, "slides": 1})
        self._passes = passes
        self._batch_size = batch_size
        self._across = across
        self._cores = cores
        self._waiting = Waiting(check)
        depth = len(passes) + 1 if depth is None else depth
        self._batches = Batches(
            self._waiting,
            self.busy,
            (batch_size, passes[0].encoder.transform.resize),
            pinned=any(each.pinned for each in passes),
            others=depth + sum(1 + each.in_flight for each in passes),
            readers=readers,
        )
        # These belong to the lock.
        self._announced: deque[SlideVectors] = deque()
        self._preparing = 0
        self._planned: deque[SlideVectors] = deque()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "TileStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A second Ctrl-C ends the process at once; its threads are daemons.
        self.close(wait=kind is None or not issubclass(kind, KeyboardInterrupt))

    def submit(self, source: Source) -> SlideVectors:
        """Append a slide; the stream begins with it when its turn comes. Take the slides' vectors in this order."""
        slide = SlideVectors(source, self._batches, self._waiting)
        with self._waiting:
            self._announced.append(slide)
            self._waiting.planner.notify()
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
        self._waiting.end()
        if wait:
            for thread in self._threads:
                thread.join()
            while self._planned:
                self._planned.popleft().source.close()

    # ---------------------------------------------------------------------------------------------- the threads

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with contextlib.nullcontext() if self._cores is None else at_most_threads(self._cores):
                work()
        except Closed:
            pass
        except BaseException as error:
            self._waiting.end(error)

    def _plan(self) -> None:
        while True:
            with self._waiting:
                self._waiting.until(self._waiting.planner, lambda: self._announced and len(self._planned) < _PLANNED)
                slide = self._announced.popleft()
                self._preparing += 1
            problem = None
            try:
                with self.busy.working("plan"):
                    slide.source.prepare()
            except BaseException as error:
                problem = error
            with self._waiting:
                self._preparing -= 1
                slide.unprepared, slide.prepared = problem, True
                if problem is None:
                    self._planned.append(slide)
                self._waiting.reader.notify()
                self._waiting.caller.notify()

    def _read(self) -> None:
        while True:
            with self._waiting:
                self._waiting.until(
                    self._waiting.reader, lambda: self._planned or (self._batches.begun and self._nothing_ahead())
                )
                slide = self._planned.popleft() if self._planned else None
                self._waiting.planner.notify()
            if slide is not None:
                self._read_slide(slide)
            if slide is None or not self._across:
                self._batches.seal()

    def _nothing_ahead(self) -> bool:
        return not (self._announced or self._preparing or self._planned)

    def _read_slide(self, slide: SlideVectors) -> None:
        problem = None
        try:
            with contextlib.closing(slide.source):
                slide.source.read(partial(self._batches.take, slide))
        except BaseException as error:
            problem = error
        with self._waiting:
            if self._waiting.closing:  # it may have been cut off
                raise Closed
            slide.problem, slide.all_read = slide.problem or problem, True
            self._waiting.caller.notify()

    def _encode(self, each: Pass) -> None:
        running: deque[tuple[Batch, Callable[[], Vectors]]] = deque()
        while True:
            batch = self._batches.next(wait=not running)
            with self.busy.working("encode"), encoder_failures(each.encoder, self._batch_size):
                if batch is not None:
                    running.append((batch, each.start(batch.pixels)))
                if batch is None or len(running) > each.in_flight:
                    done, answer = running.popleft()
                    vectors = answer()
                else:
                    continue
            self._deliver(done, vectors, each)

    def _deliver(self, batch: Batch, vectors: Vectors, each: Pass) -> None:
        with self._waiting:
            self._batches.recycle(batch)
            for part in batch.parts:
                part.slide.deliver(part, vectors[part.row : part.row + part.count], each.encoder)
            if any(part.slide.worth_waking() for part in batch.parts):
                self._waiting.caller.notify()
