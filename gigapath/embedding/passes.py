"""One batch through an encoder: the plain way on any device, and on CUDA with the copies beside the computing.

The second is taken where it gives the bytes of the first on this machine; else the plain one, and the run says so.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.tile_encoder import TileEncoder

Vectors = npt.NDArray[np.float32]


class Pass(Protocol):
    """A way of sending batches through one encoder.

    Attributes:
        encoder: the encoder.
        in_flight: batches that may be on their way behind the one that is waited for.
        pinned: whether batches should lie in page-locked memory.
    """

    encoder: TileEncoder
    in_flight: int
    pinned: bool

    def start(self, pixels: Tensor) -> Callable[[], Vectors]:
        """Begin with a batch.

        Args:
            pixels: uint8 (B, S, S, 3) in the host's memory, S the transform's `resize`; not to be touched before the
                answer is there.

        Returns:
            Waits for float32 (B, D).
        """


class PlainPass:
    """Copy, compute, copy back, one after the other; works on every device."""

    in_flight = 0
    pinned = False

    def __init__(self, encoder: TileEncoder) -> None:
        self.encoder = encoder

    def start(self, pixels: Tensor) -> Callable[[], Vectors]:
        vectors = self.encoder.forward(pixels.to(self.encoder.device)).cpu().numpy()
        return lambda: vectors


class CudaPass:
    """The copy of the next batch travels on a stream of its own while this one is computed."""

    in_flight = 1
    pinned = True

    def __init__(self, encoder: TileEncoder) -> None:
        self.encoder = encoder
        self._copies = torch.cuda.Stream(encoder.device)  # type: ignore[no-untyped-call]

    def start(self, pixels: Tensor) -> Callable[[], Vectors]:
        try:
            return self._start(pixels)
        except torch.cuda.OutOfMemoryError:  # memory that torch keeps in pieces of other sizes may make up for it
            torch.cuda.empty_cache()
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


def choose_pass(
    encoder: TileEncoder, batch_size: int, fast: Callable[[TileEncoder], Pass] | None = None
) -> tuple[Pass, str]:
    """The quickest way that gives the plain way's bytes, and what to say of it in the record.

    Args:
        encoder: the encoder, on its device.
        batch_size: B.
        fast: makes the quicker way; by default CudaPass where the device is a CUDA one.
    """
    plain = PlainPass(encoder)
    fast = CudaPass if fast is None and encoder.device.type == "cuda" else fast
    if fast is None:
        return plain, "plain"
    batches = [made_batch(encoder, batch_size, seed) for seed in range(3)]
    expected = [plain.start(batch)() for batch in batches]
    try:
        quick = fast(encoder)
        waiting = [quick.start(batch.pin_memory() if quick.pinned else batch) for batch in batches]
        found = [wait() for wait in waiting]
    except RuntimeError as error:  # want of memory for two batches among them
        return plain, f"plain: copies beside the computing failed ({str(error).strip().splitlines()[0]})"
    if any(a.tobytes() != b.tobytes() for a, b in zip(expected, found, strict=True)):
        return plain, "plain: copies beside the computing gave other numbers on this device"
    return quick, "copies beside the computing, checked against the plain way"


def made_batch(encoder: TileEncoder, batch_size: int, seed: int = 0) -> Tensor:
    """A batch of made tiles, no two alike: uint8 (B, S, S, 3), S the transform's `resize`."""
    side = encoder.transform.resize
    pixels = np.random.default_rng(seed).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    return torch.from_numpy(pixels)
