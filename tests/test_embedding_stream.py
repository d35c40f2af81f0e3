"""The stream from slides to vectors: equal bytes however it is arranged, bounded, and it ends whatever fails."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_encoders import WIDTH, tiny_tile_encoder
from torch import Tensor, nn

from gigapath.devices import computing, resolve_devices
from gigapath.embedding.forward import (
    EncoderError,
    OutOfMemory,
    PlainForward,
    choose_forward,
    encode_padded,
    fitting_batch_size,
    probe_devices,
)
from gigapath.embedding.stream import TileStream
from gigapath.preprocessing.reading import Take, fill_places
from gigapath.progress import Stopped
from gigapath.tile_encoder import TileEncoder

Pixels = npt.NDArray[np.uint8]
COUNTS = (5, 0, 11, 1, 8)  # no slide but the last fills its batches of 4
LIMIT = 60.0  # seconds: what takes so long hangs


def picture(slide: int, count: int, side: int = 64) -> Pixels:
    return np.random.default_rng(slide).integers(0, 256, (count, side, side, 3), np.uint8)


class Made:
    """A slide of random tiles in memory, read by so many threads; `fail` may raise at any point."""

    def __init__(
        self,
        tiles: Pixels,
        threads: int = 1,
        fail: Callable[[str, int], None] = lambda point, index: None,
        encoder: TileEncoder | None = None,
    ) -> None:
        self.tiles, self.threads, self.fail = tiles, threads, fail
        self.transform = (encoder or tiny_tile_encoder()).transform
        self.prepared = self.closed = False

    def prepare(self) -> None:
        self.fail("prepare", 0)
        self.prepared = True

    def read(self, take: Take) -> None:
        def fill(index: int, row: Pixels) -> None:
            self.fail("read", index)
            self.transform.fit(self.tiles[index : index + 1], row[None])

        fill_places(fill, take, len(self.tiles), workers=self.threads)

    def close(self) -> None:
        assert self.prepared and not self.closed
        self.closed = True


def collect(stream: TileStream, sources: list[Made]) -> list[npt.NDArray[np.float32]]:
    """All vectors of all slides, slide by slide, each tile once."""
    found = []
    for source, vectors in [(source, stream.submit(source)) for source in sources]:
        vectors.wait_prepared()
        table = np.full((len(source.tiles), WIDTH), np.nan, np.float32)
        for first, block in vectors.blocks():
            assert np.isnan(table[first : first + len(block)]).all()
            table[first : first + len(block)] = block
        found.append(table)
    return found


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not reached() and time.monotonic() < end:
        time.sleep(0.01)


def plainly(encoder: TileEncoder, tiles: Pixels, batch_size: int) -> npt.NDArray[np.float32]:
    blocks = [encode_padded(tiles[n : n + batch_size], encoder, batch_size) for n in range(0, len(tiles), batch_size)]
    return np.concatenate([np.empty((0, encoder.embed_dim), np.float32), *blocks])


@pytest.fixture(autouse=True)
def nothing_hangs_and_no_thread_is_left() -> Iterator[None]:
    before, done = set(threading.enumerate()), threading.Event()
    started = time.monotonic()
    yield
    done.set()
    assert time.monotonic() - started < LIMIT
    assert set(threading.enumerate()) <= before


# ---------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(("threads", "depth"), [(1, None), (2, 0), (3, 5)])
def test_vectors_are_those_of_the_plain_path(across: bool, devices: int, threads: int, depth: int | None) -> None:
    encoder = tiny_tile_encoder()
    tiles = [picture(slide, count) for slide, count in enumerate(COUNTS)]
    expected = [plainly(encoder, each, 4) for each in tiles]
    assert np.abs(expected[0][0] - expected[0][1]).max() > 1e-3
    for order in (range(len(COUNTS)), (4, 2, 0, 1, 3)):
        with TileStream([PlainForward(encoder)] * devices, 4, across=across, depth=depth, readers=threads) as stream:
            found = collect(stream, [Made(tiles[n], threads) for n in order])
        assert [each.tobytes() for each in found] == [expected[n].tobytes() for n in order]


def test_batches_have_one_shape_and_cross_the_slides_borders() -> None:
    for across, batches in ((True, 7), (False, 8)):
        encoder, seen = tiny_tile_encoder(), []
        encoder.model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[0]))
        with TileStream([PlainForward(encoder)], 4, across=across) as stream:
            collect(stream, [Made(picture(slide, count)) for slide, count in enumerate(COUNTS)])
            assert seen == [4] * batches
            late = picture(9, 5)  # a slide that comes when all others are through is done too
            assert collect(stream, [Made(late)])[0].tobytes() == plainly(encoder, late, 4).tobytes()


# ---------------------------------------------------------------------------------- side by side, and bounded


def test_the_next_slide_is_planned_and_read_while_one_is_encoded() -> None:
    read = {1: threading.Event(), 2: threading.Event()}
    planned = threading.Event()
    encoder = tiny_tile_encoder()
    encoder.model.register_forward_pre_hook(lambda *_: (read[1].wait(LIMIT), planned.wait(LIMIT), None)[-1])

    def saw(slide: int) -> Callable[[str, int], None]:
        def point(name: str, first: int) -> None:
            if name == "read":
                read[slide].set()
            elif slide == 2:
                planned.set()

        return point

    sources = [Made(picture(0, 4)), Made(picture(1, 4), fail=saw(1)), Made(picture(2, 4), fail=saw(2))]
    with TileStream([PlainForward(encoder)], 4) as stream:
        collect(stream, sources)
    assert read[1].is_set() and planned.is_set()


@pytest.mark.parametrize(("threads", "buffers"), [(1, 4), (3, 6)])
def test_what_waits_for_the_encoder_is_bounded_and_buffers_are_taken_again(threads: int, buffers: int) -> None:
    class Seeing(PlainForward):
        def start(self, pixels: Tensor) -> Callable[[], npt.NDArray[np.float32]]:
            seen.append(pixels)  # kept, so that no other lies where it lay
            return super().start(pixels)

    go, read, seen = threading.Event(), [], []
    encoder = tiny_tile_encoder()
    encoder.model.register_forward_pre_hook(lambda *_: (go.wait(LIMIT), None)[-1])
    with TileStream([Seeing(encoder)], 4, depth=2, readers=threads) as stream:
        made = Made(picture(0, 200), threads, fail=lambda point, index: read.append(index))
        vectors = stream.submit(made)
        vectors.wait_prepared()
        # One batch in the encoder, two that wait, and one being filled; more where several threads read.
        wait_until(lambda: len(read) >= 4 * 4)
        time.sleep(0.2)  # for more, if nothing held it
        assert max(read) < 4 * buffers
        go.set()
        assert sum(len(block) for _, block in vectors.blocks()) == 200
    assert len(seen) >= 50 and len({pixels.data_ptr() for pixels in seen}) <= buffers


def test_what_waits_for_the_caller_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigapath.embedding.stream._UNTAKEN", 3)
    encoder, seen = tiny_tile_encoder(), []
    encoder.model.register_forward_pre_hook(lambda *_: seen.append(1))
    with TileStream([PlainForward(encoder)] * 2, 4) as stream:
        slides = [stream.submit(Made(picture(slide, 41))) for slide in range(3)]
        slides[0].wait_prepared()
        wait_until(lambda: len(seen) >= 3)
        time.sleep(0.2)  # for more, if nothing held it
        assert len(seen) == 3
        assert [sum(len(block) for _, block in slide.blocks()) for slide in slides] == [41, 41, 41]


@pytest.mark.parametrize(("untaken", "seconds", "batches"), [(64, 0.05, 1), (4, 2 * LIMIT, 2)])
def test_a_caller_is_woken_after_a_while_and_before_the_encoder_has_to_wait(
    monkeypatch: pytest.MonkeyPatch, untaken: int, seconds: float, batches: int
) -> None:
    monkeypatch.setattr("gigapath.embedding.stream._UNTAKEN", untaken)
    monkeypatch.setattr("gigapath.embedding.stream._CHECK_SECONDS", seconds)
    go, calls = threading.Event(), []
    encoder = tiny_tile_encoder()

    def hold(*_: Any) -> None:
        calls.append(1)
        if len(calls) > batches:
            go.wait(LIMIT)

    encoder.model.register_forward_pre_hook(hold)
    with TileStream([PlainForward(encoder)], 4) as stream:
        blocks = stream.submit(Made(picture(0, 41))).blocks()
        first = len(next(blocks)[1])  # the encoder holds still: the slide is not through
        assert first in range(4, 4 * batches + 1), "far fewer than a block"
        go.set()
        assert first + sum(len(block) for _, block in blocks) == 41


# ---------------------------------------------------------------------------------- faults


def raise_at(point: str, first: int, error: BaseException) -> Callable[[str, int], None]:
    def fail(name: str, at: int) -> None:
        if (name, at) == (point, first):
            raise error

    return fail


@pytest.mark.parametrize(("point", "first"), [("prepare", 0), ("read", 0), ("read", 4), ("read", 8)])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_slide_that_fails_harms_no_other(point: str, first: int, devices: int) -> None:
    encoder = tiny_tile_encoder()
    tiles = [picture(slide, 9) for slide in range(4)]
    sources = [Made(each) for each in tiles]
    sources[1].fail = raise_at(point, first, OSError("a bad sector"))
    with TileStream([PlainForward(encoder)] * devices, 4) as stream:
        coming = [stream.submit(source) for source in sources]
        for slide, vectors in enumerate(coming):
            if slide == 1:
                with pytest.raises(OSError, match="a bad sector"):
                    vectors.wait_prepared()
                    list(vectors.blocks())
                continue
            vectors.wait_prepared()
            blocks = dict(vectors.blocks())
            found = np.concatenate([blocks[first] for first in sorted(blocks)])
            assert found.tobytes() == plainly(encoder, tiles[slide], 4).tobytes()
    assert all(source.closed for source in sources if source.fail is not sources[1].fail)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("error", "words"),
    [(torch.cuda.OutOfMemoryError("no"), "too little memory for batches of 4"), (RuntimeError("kernel"), "kernel")],
)
def test_a_failing_encoder_ends_everything_with_its_sentence(devices: int, error: Exception, words: str) -> None:
    encoder = tiny_tile_encoder()
    calls = iter([None, error])
    encoder.model.register_forward_pre_hook(lambda *_: raised(next(calls, None)))
    with pytest.raises(EncoderError, match=words), TileStream([PlainForward(encoder)] * devices, 4) as stream:
        collect(stream, [Made(picture(slide, 9)) for slide in range(3)])


def raised(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_a_vector_that_is_not_finite_fails_its_own_slide() -> None:
    class Sensitive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3))
            return torch.where(mean[:, None] > 1.5, torch.nan, mean[:, None]).expand(-1, WIDTH)

    encoder = dataclasses.replace(tiny_tile_encoder(), model=Sensitive())
    bright = np.full((3, 64, 64, 3), 250, np.uint8)
    with TileStream([PlainForward(encoder)], 4) as stream:
        dark, white, last = (stream.submit(Made(each)) for each in (picture(0, 3), bright, picture(2, 3)))
        assert sum(len(block) for _, block in dark.blocks()) == 3
        with pytest.raises(ValueError, match="tiny: a vector is not finite in fp32"):
            list(white.blocks())
        assert sum(len(block) for _, block in last.blocks()) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_a_slide_that_fails_where_no_buffer_is_free_lets_the_others_go_on(threads: int) -> None:
    """The row that is never filled holds back every batch behind it, until the stream hears that it never will be."""
    encoder = tiny_tile_encoder()
    tiles = [picture(slide, 60) for slide in range(3)]
    full = threading.Event()

    def fail(point: str, index: int) -> None:
        if (point, index) == ("read", 1):
            full.wait(0.3 if threads > 1 else 0)  # the other threads fill all buffers meanwhile
            raise OSError("a bad sector")

    sources = [Made(each, threads) for each in tiles]
    sources[1].fail = fail
    with TileStream([PlainForward(encoder)], 4, depth=0, readers=threads) as stream:
        first, broken, last = (stream.submit(source) for source in sources)
        for vectors, expected in ((first, tiles[0]), (last, tiles[2])):
            blocks = dict(vectors.blocks())
            found = np.concatenate([blocks[index] for index in sorted(blocks)])
            assert found.tobytes() == plainly(encoder, expected, 4).tobytes()
            if vectors is first:
                with pytest.raises(OSError, match="a bad sector"):
                    list(broken.blocks())


def test_slides_that_were_prepared_are_closed_however_it_ends() -> None:
    go = threading.Event()
    encoder = tiny_tile_encoder()
    encoder.model.register_forward_pre_hook(lambda *_: (go.wait(LIMIT), None)[-1])
    sources = [Made(picture(slide, 50)) for slide in range(4)]
    with TileStream([PlainForward(encoder)], 4) as stream:
        for source in sources:
            stream.submit(source)
        wait_until(lambda: sources[1].prepared)
        assert not sources[0].closed, "it is being read"
        threading.Timer(0.1, go.set).start()
    assert [source.closed for source in sources] == [source.prepared for source in sources]
    assert not sources[3].prepared


def test_a_caller_that_fails_leaves_or_is_stopped_ends_the_threads() -> None:
    encoder = tiny_tile_encoder()
    with pytest.raises(KeyError), TileStream([PlainForward(encoder)] * 2, 4) as stream:
        coming = [stream.submit(Made(picture(slide, 50))) for slide in range(3)]
        for _ in coming[0].blocks():
            raise KeyError
    with TileStream([PlainForward(encoder)], 4) as stream:
        first, second = (stream.submit(Made(picture(slide, 30))) for slide in range(2))
        first.drop()
        assert sum(len(block) for _, block in second.blocks()) == 30
    go, asked = threading.Event(), []
    encoder.model.register_forward_pre_hook(lambda *_: (go.wait(LIMIT), None)[-1])

    def check() -> None:  # while nothing comes
        asked.append(1)
        if len(asked) > 3:
            go.set()
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped), TileStream([PlainForward(encoder)], 4, check=check) as stream:
        collect(stream, [Made(picture(0, 50))])


# -----------------------------------------------------------------------------the ways of a device, and what it can do


class Late:
    """A quicker way, as a GPU's: answers come when they are waited for. `wrong` changes a bit, `error` is raised."""

    in_flight, pinned = 1, False

    def __init__(self, encoder: TileEncoder, *, wrong: bool = False, error: Exception | None = None) -> None:
        self.encoder, self.wrong, self.error = encoder, wrong, error

    def start(self, pixels: Tensor) -> Callable[[], npt.NDArray[np.float32]]:
        if self.error is not None:
            raise self.error
        vectors = self.encoder.forward(pixels).numpy().copy()
        vectors[-1, -1] += self.wrong
        return lambda: vectors


def test_the_quicker_way_is_taken_where_it_gives_the_plain_bytes() -> None:
    encoder = tiny_tile_encoder()
    assert isinstance(choose_forward(encoder, 4)[0], PlainForward)
    way, words = choose_forward(encoder, 4, Late)
    assert isinstance(way, Late) and "checked against the plain way" in words
    for fast, said in (
        (lambda e: Late(e, wrong=True), "gave other numbers"),
        (lambda e: Late(e, error=RuntimeError("no stream\nat all")), r"failed (no stream)"),
    ):
        way, words = choose_forward(encoder, 4, fast)
        assert isinstance(way, PlainForward) and said in words
    tiles = [picture(slide, count) for slide, count in enumerate(COUNTS)]
    with TileStream([Late(encoder), Late(encoder)], 4) as stream:
        found = collect(stream, [Made(each) for each in tiles])
    assert [each.tobytes() for each in found] == [plainly(encoder, each, 4).tobytes() for each in tiles]


def limited(most: int, words: str = "CUDA out of memory") -> TileEncoder:
    """An encoder on a device whose memory holds `most` tiles, and which says so with these words."""
    encoder = tiny_tile_encoder()

    def check(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > most:
            raise (torch.OutOfMemoryError if words == "CUDA out of memory" else RuntimeError)(words)

    encoder.model.register_forward_pre_hook(check)
    return encoder


def test_a_batch_that_the_memory_does_not_hold_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting_batch_size([limited(5)], 32) == 32, "a CPU is not asked: it would take a batch's time"
    monkeypatch.setattr("gigapath.embedding.forward._OUT_OF_MEMORY", ("cpu",))
    assert fitting_batch_size([limited(5)], 32) == 4
    for words in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ):
        assert fitting_batch_size([limited(5, words)], 32) == 4
    with pytest.raises(EncoderError, match="illegal memory access"):
        fitting_batch_size([limited(5, "CUDA error: an illegal memory access was encountered")], 32)
    assert fitting_batch_size([limited(40), limited(9)], 32) == 8, "the least of several devices"
    with pytest.raises(OutOfMemory, match="batches of 1 tiles"):
        fitting_batch_size([limited(0)], 32)
    with pytest.raises(OutOfMemory, match="--batch-size"):
        probe_devices([limited(5)], 32, several=True)


def test_batches_cross_borders_only_where_a_tiles_place_changes_nothing() -> None:
    class Alike(nn.Module):  # without a product, whose last bits depend on a row's place on some CPUs
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None].expand(-1, WIDTH)

    class ByPlace(Alike):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 1e-6 * torch.arange(len(x)))[:, None]

    encoder = dataclasses.replace(tiny_tile_encoder(), model=Alike())
    assert probe_devices([encoder], 8, several=True).across
    assert not probe_devices([encoder], 8, several=False).across, "nothing to gain: not tried"
    assert not probe_devices([dataclasses.replace(encoder, model=ByPlace())], 8, several=True).across


def test_devices_are_a_list_or_a_number_and_give_the_same_numbers() -> None:
    cpu = torch.device("cpu")
    assert resolve_devices(None, "cpu") == (cpu,)
    assert resolve_devices("cpu, cpu", "auto") == (cpu, cpu) == resolve_devices("2", "cpu")
    for devices, device in (("0", "cpu"), ("", "auto"), ("cpu,cuda", "auto"), ("auto", "auto"), ("cpu,cpu", "cpu")):
        with pytest.raises(ValueError, match="--devices: expected"):
            resolve_devices(devices, device)
    first, second = tiny_tile_encoder(), tiny_tile_encoder()
    assert len(probe_devices([first, second, first], 4, several=True).forwards) == 3
    next(second.model.parameters()).mul_(1.0001)
    with pytest.raises(ValueError, match="--devices"):
        probe_devices([first, second], 4, several=True)


def test_switches_of_the_process_are_put_back_by_the_last_thread() -> None:
    flags = torch.backends.cudnn
    before = (flags.deterministic, flags.allow_tf32)
    first, second = computing("fp32", torch.device("cpu")), computing("bf16", torch.device("cpu"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (flags.deterministic, flags.allow_tf32) == (True, False)
    second.__exit__(None, None, None)
    assert (flags.deterministic, flags.allow_tf32) == before


@pytest.mark.parametrize(
    "switch", ["torch.set_float32_matmul_precision('medium')", "torch.backends.fp32_precision = 'tf32'"]
)
def test_float32_is_true_float32_whatever_the_process_has_set(switch: str) -> None:
    """In a process of its own: torch does not forget which of its switches were used."""
    if "backends" in switch and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches alone")
    script = f"""
import torch
from gigapath.devices import computing
{switch}
def state():
    found = []
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32,
                lambda: torch.backends.cudnn.allow_tf32, lambda: torch.backends.cuda.matmul.fp32_precision):
        try:
            found.append(ask())
        except (RuntimeError, AttributeError) as error:
            found.append(type(error).__name__)
    return found
before = state()
with computing("fp32", torch.device("cpu")):
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
assert state() == before, (before, state())
"""
    subprocess.run([sys.executable, "-c", script], check=True)
