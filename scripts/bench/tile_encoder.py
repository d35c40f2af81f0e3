"""How fast a tile encoder is, as a share of the rate of a plain matrix product measured in the same run."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gigapath.devices import resolve_device, resolve_precision
from gigapath.embedding.forward import PlainForward, Vectors, choose_forward, made_batch
from gigapath.options import Options, option
from gigapath.tile_encoder import TileEncoder, load_tile_encoder
from scripts.bench.protocol import Work, compare, product
from scripts.bench.roofline import limits

ENCODERS = ("gigapath", "gigapath-flash", "standin")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TileEncoderBench(Options):
    """What `python -m scripts.bench tile-encoder` measures."""

    tile_encoder: str = option("gigapath-flash", "the architecture; its weights are random", choices=ENCODERS)
    batch_size: tuple[int, ...] = option((32,), "tiles per batch", metavar="N")
    precision: str = option("auto", "fp16 on CUDA, fp32 elsewhere", choices=("auto", *_DTYPES))
    pairs: int = option(7, "pairs of turns, ours and a product", at_least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch_size, default=0) < 1:
            raise ValueError(f"--batch-size: expected at least 1, got {self.batch_size}.")


HEADING = (
    "| tile encoder | batch | precision | tiles/s | GFLOP/tile | share of a product's rate | product GFLOP/s |\n"
    "|---|---|---|---|---|---|---|"
)


def measure(options: TileEncoderBench) -> Iterator[dict[str, Any]]:
    """Measure one row after the other: batches of made tiles, from the host's memory and back, the way of `embed`.

    Yields:
        Rows with `tile_encoder`, `batch_size`, `precision`, `device`, `tiles_per_second`, `operations` (of a tile,
        multiply-adds x 2), `share` (of the product's rate, in the row's precision but in fp32 on a CPU) with
        `share_least` and `share_most`, `product_per_second`, the `way` that batches travel, and what
        `roofline.limits` says.
    """
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    with device:  # random weights are drawn where they stay
        encoder = load_tile_encoder(options.tile_encoder, device=device, precision=precision, random_weights=True)
    operations = operations_of(encoder)
    dtype = torch.float32 if device.type == "cpu" else _DTYPES[precision]
    for batch_size in options.batch_size:
        forward, way = choose_forward(encoder, batch_size)
        batch = made_batch(encoder, batch_size)
        batch = batch.pin_memory() if forward.pinned else batch
        work = Work(partial(Sender(forward).send, batch), float(batch_size * operations))
        with torch.inference_mode():
            share = compare(work, product(device, dtype), options.pairs, device)
        yield {
            "tile_encoder": options.tile_encoder,
            "batch_size": batch_size,
            "precision": precision,
            "device": str(device),
            "tiles_per_second": share.ours / operations,
            "operations": operations,
            "share": share.median,
            "share_least": share.least,
            "share_most": share.most,
            "product_per_second": share.theirs,
            "way": way,
            **limits(work, share, device),
        }


class Sender:
    """Sends batches, and waits for answers only where more are on their way than may be."""

    def __init__(self, forward: PlainForward) -> None:
        self._forward = forward
        self._waiting: deque[Callable[[], Vectors]] = deque()

    def send(self, batch: Tensor) -> None:
        self._waiting.append(self._forward.start(batch))
        if len(self._waiting) > self._forward.in_flight:
            self._waiting.popleft()()

    def wait(self) -> None:
        """For all that are on their way."""
        while self._waiting:
            self._waiting.popleft()()


def operations_of(encoder: TileEncoder) -> int:
    """Operations of one tile (products, convolutions and attention; multiply-adds x 2), counted on one pass."""
    pixels = made_batch(encoder, 1).to(encoder.device)
    # The counter sees attention only where it is written out as products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder.forward(pixels)
    return int(counter.get_total_flops())


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {row['tile_encoder']} | {row['batch_size']} | {row['precision']} | {row['tiles_per_second']:.3g} | "
        f"{row['operations'] / 1e9:.1f} | "
        f"{row['share']:.2f} ({row['share_least']:.2f} to {row['share_most']:.2f}) | "
        f"{row['product_per_second'] / 1e9:,.0f} |"
    )
