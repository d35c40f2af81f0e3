"""Batches through tile encoders: the ways that a device has, what goes wrong there, and what the devices can do.

That is found out by a few made batches before the first slide: the batch's shape, which is a part of all numbers,
whether batches may cross the borders of slides, and the rate. The plain way serves any device; on CUDA copies go beside
the computing where that gives the plain way's bytes on this machine. B tiles of a batch, S the transform's `resize`, D
width.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.devices import is_out_of_memory
from gigapath.tile_encoder import TileEncoder

Vectors = npt.NDArray[np.float32]

# A first call includes what is done once (memory, kernels); a slow one is believed all the same.
_BELIEVED_SECONDS = 2.0
# Devices that say so when their memory doesn't hold a batch, and can go on.
_OUT_OF_MEMORY = ("cuda",)


class EncoderError(ValueError):
    """An encoder failed, which is no slide's fault: a run ends with this one sentence."""

    stops_run = True


class OutOfMemory(EncoderError):
    """The device's memory doesn't hold a batch."""


def encode_padded(pixels: npt.NDArray[np.uint8], encoder: TileEncoder, batch_size: int) -> Vectors:
    """(n, T, T, 3) uint8 to (n, D) float32 through one batch of exactly `batch_size` tiles, padded and cut: the vector
    of a tile depends on nothing but the tile. EncoderError, or ValueError where a vector is not finite."""
    batch = np.zeros((batch_size, *[encoder.transform.resize] * 2, 3), np.uint8)
    encoder.transform.fit(pixels, batch[: len(pixels)])
    with encoder_failures(encoder, batch_size):
        vectors = _encode(encoder, torch.from_numpy(batch))
    return encoder.checked(vectors[: len(pixels)])


@contextlib.contextmanager
def encoder_failures(encoder: TileEncoder, batch_size: int) -> Iterator[None]:
    """What a device or a model says when it fails on a batch, as one sentence: EncoderError."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"{encoder.name}: {encoder.device} has too little memory for batches of {batch_size} tiles. "
                "Choose a smaller --batch-size."
            ) from error
        raise EncoderError(f"{encoder.name} failed on {encoder.device}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PlainForward:
    """Copy, compute, copy back, one after the other; works on every device.

    Attributes:
        encoder: the encoder.
        in_flight: batches that may be on their way behind the one that is waited for.
        pinned: whether batches should lie in page-locked memory.
    """

    in_flight = 0
    pinned = False

    def __init__(self, encoder: TileEncoder) -> None:
        self.encoder = encoder

    def start(self, pixels: Tensor) -> Callable[[], Vectors]:
        """Begin with a batch, uint8 (B, S, S, 3) in the host's memory, not to be touched before the answer is there;
        what is returned waits for float32 (B, D)."""
        vectors = self.encoder.forward(pixels.to(self.encoder.device)).cpu().numpy()
        return lambda: vectors


class CudaForward(PlainForward):
    """The copy of the next batch travels on a stream of its own while this one is computed."""

    in_flight = 1
    pinned = True

    def __init__(self, encoder: TileEncoder) -> None:
        super().__init__(encoder)
        self._copies = torch.cuda.Stream(encoder.device)  # type: ignore[no-untyped-call]

    def start(self, pixels: Tensor) -> Callable[[], Vectors]:
        try:
            return self._start(pixels)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()  # memory that torch keeps in pieces of other sizes may make up for it
            return self._start(pixels)

    def _start(self, pixels: Tensor) -> Callable[[], Vectors]:
        device = self.encoder.device
        with torch.cuda.device(device):
            computing = torch.cuda.current_stream(device)
            with torch.cuda.stream(self._copies):
                arriving = pixels.to(device, non_blocking=True)
            computing.wait_stream(self._copies)
            arriving.record_stream(computing)  # its memory is free again only when the computing is done with it
            vectors = self.encoder.forward(arriving)
            answer = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            answer.copy_(vectors, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(computing)

        def wait() -> Vectors:
            done.synchronize()
            return answer.numpy()

        return wait


def choose_forward(
    encoder: TileEncoder, batch_size: int, fast: Callable[[TileEncoder], PlainForward] | None = None
) -> tuple[PlainForward, str]:
    """The quickest way that gives the plain way's bytes, and what to say of it in the record; `fast` makes the quicker
    way, by default CudaForward where the device is a CUDA one."""
    plain = PlainForward(encoder)
    fast = CudaForward if fast is None and encoder.device.type == "cuda" else fast
    if fast is None:
        return plain, "plain"
    batches = [made_batch(encoder, batch_size, seed) for seed in range(3)]
    expected = [plain.start(batch)() for batch in batches]
    try:
        quick = fast(encoder)
        waiting = [quick.start(batch.pin_memory() if quick.pinned else batch) for batch in batches]
        found = [wait() for wait in waiting]
    except RuntimeError as error:  # want of memory for two batches among them
        return plain, f"plain: copies beside the computing failed ({first_line(error)})"
    if not all(map(_equal, expected, found)):
        return plain, "plain: copies beside the computing gave other numbers on this device"
    return quick, "copies beside the computing, checked against the plain way"


def made_batch(encoder: TileEncoder, batch_size: int, seed: int = 0) -> Tensor:
    """A batch of made tiles, no two alike: uint8 (B, S, S, 3)."""
    side = encoder.transform.resize
    pixels = np.random.default_rng(seed).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    return torch.from_numpy(pixels)


@dataclass(frozen=True)
class DeviceProbe:
    """How a stream is going to run: a way for each device and what the ways are, whether batches are filled across the
    slides' borders, and the rate of all devices together."""

    forwards: tuple[PlainForward, ...]
    across: bool
    tiles_per_second: float
    ways: tuple[str, ...]


def probe_devices(encoders: Sequence[TileEncoder], batch_size: int, *, several: bool) -> DeviceProbe:
    """Find out what the devices can do.

    Args:
        encoders: one a device; the same object where workers share it.
        batch_size: B.
        several: whether there are several slides, so that batches could be filled across their borders.

    Raises:
        EncoderError: an encoder failed.
        ValueError: the devices give different numbers.
    """
    distinct = list({id(encoder): encoder for encoder in encoders}.values())
    chosen: dict[int, tuple[PlainForward, str]] = {}
    vectors, seconds = [], 0.0
    for encoder in distinct:
        with encoder_failures(encoder, batch_size):
            chosen[id(encoder)] = choose_forward(encoder, batch_size)
            batch = made_batch(encoder, batch_size)
            started = time.perf_counter()
            vectors.append(_encode(encoder, batch))
            seconds = max(seconds, time.perf_counter() - started)
    differing = [each.device for each, found in zip(distinct, vectors, strict=True) if not _equal(found, vectors[0])]
    if differing:
        raise ValueError(
            f"--devices: expected the same numbers of all, got others of {', '.join(map(str, differing))} than of "
            f"{distinct[0].device}. Give each kind of device a run and a folder of its own."
        )
    across, started = several, time.perf_counter()
    if several:
        across = all(places_are_equal(each, batch, vectors[0]) for each in distinct)
        seconds = min(seconds, (time.perf_counter() - started) / len(distinct))
    elif seconds < _BELIEVED_SECONDS:
        _encode(distinct[0], batch)
        seconds = time.perf_counter() - started
    return DeviceProbe(
        forwards=tuple(chosen[id(encoder)][0] for encoder in encoders),
        across=across,
        tiles_per_second=len(distinct) * batch_size / max(seconds, 1e-9),
        ways=tuple(dict.fromkeys(way for _, way in chosen.values())),
    )


def fitting_batch_size(encoders: Sequence[TileEncoder], batch_size: int) -> int:
    """`batch_size`, halved until the memory of every device holds such a batch; EncoderError where it holds none.

    Called before a run looks at what is done, and never later: a tile's last bits depend on the batch's shape, so a
    run keeps one, and the next run on the same machine must come to the same.
    """
    for encoder in {id(each): each for each in encoders if each.device.type in _OUT_OF_MEMORY}.values():
        while True:
            try:
                with encoder_failures(encoder, batch_size):
                    _encode(encoder, made_batch(encoder, batch_size))
                break
            except OutOfMemory:
                if batch_size == 1:
                    raise
                batch_size //= 2
    return batch_size


def places_are_equal(encoder: TileEncoder, batch: Tensor, vectors: Vectors) -> bool:
    """Whether a tile's vector is the same to the last bit wherever in a batch (B, S, S, 3) it stands; `vectors` (B, D)
    are those of the batch.

    It holds where a matrix product sums every row in one order; a product that splits its sums by place would break
    it, and then each slide gets batches of its own.
    """
    step = len(batch) // 2 + 1
    return _equal(np.roll(_encode(encoder, batch.roll(step, 0)), -step, 0), vectors)


def _encode(encoder: TileEncoder, batch: Tensor) -> Vectors:
    return PlainForward(encoder).start(batch)()


def _equal(some: Vectors, others: Vectors) -> bool:
    return some.tobytes() == others.tobytes()
