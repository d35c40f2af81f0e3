"""How fast fine-tuning is: a training step as a share of a plain product's rate, and packed against one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gigapath.bench.protocol import Work, compare, product
from gigapath.bench.slide_encoder import WIDTHS
from gigapath.classification_head import ClassificationHead
from gigapath.devices import resolve_device
from gigapath.finetune.data import Bag, MemoryBags
from gigapath.finetune.options import TrainingOptions
from gigapath.finetune.plan import operations
from gigapath.finetune.processes import Processes, training_precision
from gigapath.finetune.task import Task
from gigapath.finetune.training import Trainer
from gigapath.options import check_options, option

LATENT = {"gigapath_slide_enc12l768d": 768, "gigapath_slide_enc12l384d": 384}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FinetuningBench:
    """What `gigapath bench finetuning` measures."""

    slide_encoder: str = option("gigapath", "the architecture; its weights are random", choices=tuple(WIDTHS))
    tiles: tuple[int, ...] = option((4000,), "tiles of each slide of a step; several make one packed step", metavar="N")
    depth: int = option(12, "layers; fewer are quicker to measure and have the same share", at_least=1, at_most=12)
    precision: str = option("auto", "of the step", choices=("auto", "fp32", "bf16", "fp16"))
    pairs: int = option(7, "pairs of turns", at_least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        check_options(self)
        if min(self.tiles, default=0) < 1:
            raise ValueError(f"--tiles: expected at least 1, got {self.tiles}.")


def measure(options: FinetuningBench) -> Iterator[dict[str, Any]]:
    """Measure a training step (forward, backward, AdamW, dropout 0.1) over the slides packed.

    Yields:
        One row: `slides`, `tiles`, `precision`, `slides_per_second`, `operations` (multiply-adds x 2, real keys only,
        backward = 2 x forward), `share` of the product's rate in the same precision with `share_least` and
        `share_most`, `product_per_second`; with several slides also `packed`, the slides per second packed over those
        one by one, with `packed_least` and `packed_most`.
    """
    device = resolve_device(options.device)
    precision = training_precision(options.precision, device)
    arch, in_chans = WIDTHS[options.slide_encoder]
    latent_dim = LATENT[arch]
    torch.manual_seed(0)
    # The last state, so that every layer that is passed has a backward pass, as the count of operations has it.
    model = ClassificationHead(
        in_chans, latent_dim, str(options.depth), 6, arch, "", depth=options.depth, dropout=0.1, max_wsi_size=250000
    )
    model.to(device).train()
    random = np.random.default_rng(0)
    bags = MemoryBags([_made_bag(count, in_chans, random) for count in options.tiles])
    truth = np.arange(len(options.tiles)) % 6
    task = Task("made", "multi_class", tuple("012345"))
    trainer = Trainer(task, bags, truth, TrainingOptions(), precision, Processes(device))
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-5, 0.05, 0.95))
    slides = len(options.tiles)

    def step(size: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        rows = [np.arange(start, min(start + size, slides)) for start in range(0, slides, size)]
        trainer.add_gradients(model, [([bags[int(row)] for row in chunk], chunk) for chunk in rows], slides)
        optimizer.step()

    amount = 3 * sum(operations(model, count) for count in options.tiles)
    packed = Work(lambda: step(slides), amount)
    share = compare(packed, product(device, _DTYPES[precision]), options.pairs, device)
    row: dict[str, Any] = {
        "slides": slides,
        "tiles": list(options.tiles),
        "precision": precision,
        "slides_per_second": share.ours / amount * slides,
        "operations": amount,
        "share": share.median,
        "share_least": share.least,
        "share_most": share.most,
        "product_per_second": share.theirs,
    }
    if slides > 1:
        gain = compare(packed, Work(lambda: step(1), amount), options.pairs, device)
        row |= {"packed": gain.median, "packed_least": gain.least, "packed_most": gain.most}
    yield row


def _made_bag(tiles: int, width: int, random: np.random.Generator) -> Bag:
    places = np.arange(tiles)
    side = int(np.ceil(tiles**0.5))
    cells = np.stack([places % side, places // side], axis=1).astype(np.int64)
    return Bag(random.standard_normal((tiles, width), dtype=np.float32), cells * 256)


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    gain = f"{row['packed']:.2f} ({row['packed_least']:.2f} to {row['packed_most']:.2f})" if "packed" in row else "-"
    return (
        f"| {row['slides']} | {sum(row['tiles']):,} | {row['precision']} | {row['slides_per_second']:.3f} | "
        f"{row['operations'] / 1e12:.2f} | {row['share']:.2f} ({row['share_least']:.2f} to {row['share_most']:.2f}) | "
        f"{row['product_per_second'] / 1e9:,.0f} | {gain} |"
    )


HEADING = (
    "| slides | tiles | precision | slides/s | TFLOP a step | share of a product's rate | product GFLOP/s | "
    "packed / one by one |\n|---|---|---|---|---|---|---|---|"
)
