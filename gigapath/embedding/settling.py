"""What the devices can do, found out by a few made batches before the first slide: the batch's shape, which is a part
of all numbers, whether batches may cross the borders of slides, and the rate. B tiles of a batch, D width."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gigapath.embedding.passes import Pass, PlainPass, Vectors, choose_pass, made_batch
from gigapath.embedding.slide_encoding import OutOfMemory, encoder_failures
from gigapath.tile_encoder import TileEncoder

# A first call includes what is done once (memory, kernels); a slow one is believed all the same.
_BELIEVED_SECONDS = 2.0
# Devices that say so when their memory doesn't hold a batch, and can go on.
_OUT_OF_MEMORY = ("cuda",)


@dataclass(frozen=True)
class Settled:
    """How a stream is going to run.

    Attributes:
        passes: one a device.
        across: whether batches are filled across the slides' borders.
        tiles_per_second: of all devices together.
        ways: how batches travel, in words.
    """

    passes: tuple[Pass, ...]
    across: bool
    tiles_per_second: float
    ways: tuple[str, ...]


def settle(
    encoders: Sequence[TileEncoder],
    batch_size: int,
    *,
    several: bool,
    fast: Callable[[TileEncoder], Pass] | None = None,
) -> Settled:
    """Find out what the devices can do.

    Args:
        encoders: one a device; the same object where workers share it.
        batch_size: B.
        several: whether there are several slides, so that batches could be filled across their borders.
        fast: makes the quicker way of a device, as for `choose_pass`.

    Raises:
        EncoderError: an encoder failed.
        ValueError: the devices give different numbers.
    """
    distinct = list({id(encoder): encoder for encoder in encoders}.values())
    chosen, seconds, vectors = _try(distinct, batch_size, fast)
    differing = [each.device for each, found in zip(distinct, vectors, strict=True) if not _equal(found, vectors[0])]
    if differing:
        raise ValueError(
            f"--devices: expected devices that give equal numbers, got others of {', '.join(map(str, differing))} than "
            f"of {distinct[0].device}. Give each kind of device a run and a folder of its own."
        )
    batch = made_batch(distinct[0], batch_size)
    across = several
    if several:
        started = time.perf_counter()
        across = all(places_are_equal(each, batch, vectors[0]) for each in distinct)
        seconds = min(seconds, (time.perf_counter() - started) / len(distinct))
    elif seconds < _BELIEVED_SECONDS:
        started = time.perf_counter()
        _encode(distinct[0], batch)
        seconds = time.perf_counter() - started
    return Settled(
        passes=tuple(chosen[id(encoder)][0] for encoder in encoders),
        across=across,
        tiles_per_second=len(distinct) * batch_size / max(seconds, 1e-9),
        ways=tuple(dict.fromkeys(way for _, way in chosen.values())),
    )


def fitting_batch_size(encoders: Sequence[TileEncoder], batch_size: int) -> int:
    """`batch_size`, halved until the memory of every device holds such a batch.

    Called before a run looks at what is done, and never later: a tile's last bits depend on the batch's shape, so a
    run keeps one, and the next run on the same machine must come to the same.

    Raises:
        OutOfMemory: a device doesn't hold a single tile.
        EncoderError: an encoder failed otherwise.
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
    """Whether a tile's vector is the same to the last bit wherever in a batch it stands.

    It holds where a matrix product sums every row in one order; a product that splits its sums by place would break
    it, and then each slide gets batches of its own.

    Args:
        encoder: the encoder.
        batch: uint8 (B, S, S, 3).
        vectors: (B, D), what the encoder gave for it.
    """
    step = len(batch) // 2 + 1
    return _equal(np.roll(_encode(encoder, batch.roll(step, 0)), -step, 0), vectors)


def _try(
    encoders: Sequence[TileEncoder], batch_size: int, fast: Callable[[TileEncoder], Pass] | None
) -> tuple[dict[int, tuple[Pass, str]], float, list[Vectors]]:
    """The way and the vectors of each encoder, and the seconds of a batch."""
    chosen, vectors, seconds = {}, [], 0.0
    for encoder in encoders:
        with encoder_failures(encoder, batch_size):
            chosen[id(encoder)] = choose_pass(encoder, batch_size, fast)
            batch = made_batch(encoder, batch_size)
            started = time.perf_counter()
            vectors.append(_encode(encoder, batch))
            seconds = max(seconds, time.perf_counter() - started)
    return chosen, seconds, vectors


def _encode(encoder: TileEncoder, batch: Tensor) -> Vectors:
    return PlainPass(encoder).start(batch)()


def _equal(some: Vectors, others: Vectors) -> bool:
    return some.tobytes() == others.tobytes()
