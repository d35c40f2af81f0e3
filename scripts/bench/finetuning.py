"""How fast fine-tuning is: a training step as a share of a plain product's rate, packed against one by one, and the
share of the time that waits for files."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from gigapath.classification_head import ClassificationHead
from gigapath.devices import resolve_device
from gigapath.evaluation.task import Task
from gigapath.features.data import CELL
from gigapath.finetune.data import Bag, FileBags, look_at_all
from gigapath.finetune.options import JoinOptions, TrainingOptions
from gigapath.finetune.plan import operations
from gigapath.finetune.processes import Processes, training_precision
from gigapath.finetune.training import Trainer
from gigapath.options import Options, option
from gigapath.read_ahead import read_ahead
from scripts.bench.protocol import Work, compare, product
from scripts.bench.slide_encoder import WIDTHS

LATENT = {"gigapath_slide_enc12l768d": 768, "gigapath_slide_enc12l384d": 384}
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
        8, "steps whose slides are read from files: the share of time spent waiting for them", at_least=0
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tiles, default=0) < 1:
            raise ValueError(f"--tiles: expected at least 1, got {self.tiles}.")


def measure(options: FinetuningBench) -> Iterator[dict[str, Any]]:
    """Measure a training step (forward, backward, AdamW, dropout 0.1) over the slides packed.

    Yields:
        One row: `slides`, `tiles`, `precision`, `slides_per_second`, `operations` (multiply-adds x 2, real keys only,
        backward = 2 x forward), `share` of the product's rate in the same precision with `share_least` and
        `share_most`, `product_per_second`; with several slides also `packed`, the slides per second packed over those
        one by one, with `packed_least` and `packed_most`; with `files` also `waiting`, the share of the seconds of that
        many steps in which a slide that was asked for had not been read yet, and `waiting_seconds` of each step. The
        files are new ones, out of the system's memory where it lets go of them, so that each is read from the disk.
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
    bags = [_made_bag(count, in_chans, random) for count in options.tiles]
    truth = np.arange(len(options.tiles)) % 6
    task = Task("made", "multi_class", tuple("012345"))
    trainer = Trainer(task, bags, truth, TrainingOptions(), precision, Processes(device))
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-5, 0.05, 0.95))
    slides = len(options.tiles)

    def step(size: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        rows = [np.arange(start, min(start + size, slides)) for start in range(0, slides, size)]
        batches = [([bags[int(row)] for row in chunk], chunk) for chunk in rows]
        trainer.loop.add_gradients(model, batches, trainer.loss_of, slides)
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
    if options.files:
        with tempfile.TemporaryDirectory(prefix="gigapath-bench-") as folder:
            paths = _write_bags(Path(folder), [bags[row] for row in range(slides)], options.files)
            row |= _waiting(trainer, model, optimizer, paths, slides)
    yield row


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


def _waiting(
    trainer: Trainer, model: ClassificationHead, optimizer: torch.optim.Optimizer, paths: Sequence[Path], slides: int
) -> dict[str, float]:
    """Steps of `slides` slides each over files, read ahead as in training."""
    read = FileBags(paths, look_at_all(paths, JoinOptions()), None)
    waited, started = 0.0, time.perf_counter()
    bags = read_ahead(read.__getitem__, range(len(paths)), threads=trainer.options.workers)
    for _ in range(len(paths) // slides):
        optimizer.zero_grad(set_to_none=True)
        asked = time.perf_counter()
        chunk = [next(bags) for _ in range(slides)]
        waited += time.perf_counter() - asked
        trainer.loop.add_gradients(model, [(chunk, np.arange(slides))], trainer.loss_of, slides)
        optimizer.step()
    return {
        "waiting": waited / (time.perf_counter() - started),
        "waiting_seconds": waited * slides / len(paths),
    }


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
