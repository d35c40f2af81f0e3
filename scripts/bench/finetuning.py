"""How fast fine-tuning is: a training step as a share of a plain product's rate, packed against one by one, and the
share of the time that waits for files."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from gigapath.classification_head import ClassificationHead
from gigapath.devices import resolve_device
from gigapath.evaluation.labels import Task
from gigapath.features.data import CELL
from gigapath.finetune.data import Bag, FileBags, look_at_all
from gigapath.finetune.loop import Processes, Step, StepsTaken, training_precision
from gigapath.finetune.options import JoinOptions, TrainingOptions
from gigapath.finetune.plan import operations
from gigapath.finetune.training import Trainer
from gigapath.options import Options, option
from scripts.bench.protocol import Work, compare, product
from scripts.bench.roofline import limits
from scripts.bench.slide_encoder import WIDTHS

LATENT = {"gigapath_slide_enc12l768d": 768, "gigapath_slide_enc12l384d": 384}
STEPS = {"cuda": 4}  # that a turn takes at least, so that reading ahead is a part of it; 1 elsewhere
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FinetuningBench(Options):
    """What `python -m scripts.bench finetuning` measures."""

    slide_encoder: str = option("gigapath", "the architecture; its weights are random", choices=tuple(WIDTHS))
    tiles: tuple[int, ...] = option((4000,), "tiles of each slide of a step; several make one packed step", metavar="N")
    depth: int = option(12, "layers; fewer are quicker to measure and have the same share", at_least=1, at_most=12)
    precision: str = option("auto", "of the step", choices=("auto", "fp32", "bf16", "fp16"))
    pairs: int = option(7, "pairs of turns", at_least=1)
    files: int = option(
        8, "passes whose slides are read from files: the share of time spent waiting for them", at_least=0
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tiles, default=0) < 1:
            raise ValueError(f"--tiles: expected at least 1, got {self.tiles}.")


def measure(options: FinetuningBench) -> Iterator[dict[str, Any]]:
    """Measure training steps (read ahead, forward, backward, AdamW, dropout 0.1) over the slides packed.

    Yields:
        One row: `slides`, `tiles`, `precision`, `slides_per_second`, `operations` (multiply-adds x 2, real keys only,
        backward = 2 x forward), `share` of the product's rate in the same precision with `share_least` and
        `share_most`, `product_per_second`; with several slides also `packed`, the slides per second packed over those
        one by one, with `packed_least` and `packed_most`; what `roofline.limits` says; with `files` also `waiting`, the
        share of the seconds of that many passes in which a slide that was asked for had not been read yet, and
        `waiting_seconds` of each. The files are new ones, out of the system's memory where it lets go of them, so that
        each is read from the disk.
    """
    device = resolve_device(options.device)
    model, trainer = made_trainer(options.slide_encoder, options.tiles, options.depth, options.precision, device)
    precision, slides = trainer.precision, len(options.tiles)
    count = STEPS.get(device.type, 1)
    at_once, singly = [np.arange(slides)], [np.array([row]) for row in range(slides)]
    amount = 3 * sum(operations(model, tiles) for tiles in options.tiles)
    packed = Work(steps(model, trainer, at_once, count), amount * count)
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
        **limits(packed, share, device),
    }
    if slides > 1:
        one_by_one = Work(steps(model, trainer, singly, 1), amount)
        gain = compare(packed, one_by_one, options.pairs, device)
        row |= {"packed": gain.median, "packed_least": gain.least, "packed_most": gain.most}
    if options.files:
        with tempfile.TemporaryDirectory(prefix="gigapath-bench-") as folder:
            paths = _write_bags(Path(folder), [trainer.bags[row] for row in range(slides)], options.files)
            files = FileBags(paths, look_at_all(paths, JoinOptions()), None)
            on_files = replace(trainer, bags=files, truth=np.tile(trainer.truth, options.files))
            taken = steps(model, on_files, [at_once[0] + n * slides for n in range(options.files)], 1)()
            row |= {"waiting": taken.waited / taken.seconds, "waiting_seconds": taken.waited / options.files}
    yield row


def made_trainer(
    slide_encoder: str, tiles: Sequence[int], depth: int, precision: str, device: torch.device
) -> tuple[ClassificationHead, Trainer]:
    """A model with random weights, and what trains it on made slides of so many tiles."""
    arch, in_chans = WIDTHS[slide_encoder]
    torch.manual_seed(0)
    # The last state, so that every layer that is passed has a backward pass, as the count of operations has it.
    model = ClassificationHead(
        in_chans, LATENT[arch], str(depth), 6, arch, "", depth=depth, dropout=0.1, max_wsi_size=250000
    )
    model.to(device).train()
    random = np.random.default_rng(0)
    bags = [_made_bag(count, in_chans, random) for count in tiles]
    task = Task("made", "multi_class", tuple("012345"))
    truth = np.arange(len(tiles)) % 6
    return model, Trainer(
        task, bags, truth, TrainingOptions(), training_precision(precision, device), Processes(device)
    )


def steps(
    model: ClassificationHead, trainer: Trainer, chunks: Sequence[np.ndarray], count: int
) -> Callable[[], StepsTaken]:
    """What takes `count` steps of AdamW over the same chunks of rows, as a run does."""
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-5, 0.05, 0.95))
    return partial(
        trainer.loop.run,
        model,
        optimizer,
        trainer.loop.scaler(),
        [Step(chunks, sum(map(len, chunks)), 0.0)] * count,
        what="made slides",
        read=partial(trainer.read, epoch=0, dtype=trainer.input_dtype(model, 0)),
        loss_of=trainer.loss_of,
        set_rate=lambda epochs_done: 0.0,
    )


def _write_bags(folder: Path, bags: Sequence[Bag], times: int) -> list[Path]:
    """Feature files as fine-tuning reads them, not kept in the system's memory."""
    paths = []
    for number in range(times * len(bags)):
        bag = bags[number % len(bags)]
        paths.append(folder / f"{number}.h5")
        with h5py.File(paths[-1], "w") as file:
            file["features"] = bag.features
            file["coords"] = bag.coords
            file["coords"].attrs["patch_size_level0"] = CELL
        with paths[-1].open("rb") as written:
            os.fsync(written.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return paths


def _made_bag(tiles: int, width: int, random: np.random.Generator) -> Bag:
    places = np.arange(tiles)
    side = int(np.ceil(tiles**0.5))
    cells = np.stack([places % side, places // side], axis=1).astype(np.int64)
    return Bag(random.standard_normal((tiles, width), dtype=np.float32), cells * CELL)


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    waiting = f"{row['waiting']:.2%} ({row['waiting_seconds'] * 1000:.0f} ms a step)" if "waiting" in row else "-"
    gain = f"{row['packed']:.2f} ({row['packed_least']:.2f} to {row['packed_most']:.2f})" if "packed" in row else "-"
    return (
        f"| {row['slides']} | {sum(row['tiles']):,} | {row['precision']} | {row['slides_per_second']:.3f} | "
        f"{row['operations'] / 1e12:.2f} | {row['share']:.2f} ({row['share_least']:.2f} to {row['share_most']:.2f}) | "
        f"{row['product_per_second'] / 1e9:,.0f} | {gain} | {waiting} |"
    )


HEADING = (
    "| slides | tiles | precision | slides/s | TFLOP a step | share of a product's rate | product GFLOP/s | "
    "packed / one by one | waiting for files |\n|---|---|---|---|---|---|---|---|---|"
)
