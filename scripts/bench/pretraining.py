"""What pretraining does: a step as a share of a plain product's rate with the memory that it keeps, and what its slide
vectors are good for on planted labels, beside what learns nothing."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gigapath.devices import computing, resolve_device
from gigapath.evaluation.intervals import evaluate
from gigapath.evaluation.scores import Predictions
from gigapath.features.data import CELL
from gigapath.finetune.data import Bag
from gigapath.finetune.loop import Loop, Processes, training_precision
from gigapath.finetune.plan import measure_pass
from gigapath.options import Options, option
from gigapath.pretraining.data import Target, Viewer, pack_views
from gigapath.pretraining.model import build_autoencoder, loss_of_slides
from gigapath.pretraining.options import SizeOptions, TaskOptions
from gigapath.slide_encoder import create_model
from scripts.bench.protocol import Work, compare, product
from scripts.bench.roofline import limits

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PERMUTED = "permuted labels"


@dataclass(frozen=True)
class PretrainingBench(Options):
    """What `python -m scripts.bench pretraining` measures."""

    tiles: int = option(16000, "tiles of the slide of a step, three quarters of them hidden", at_least=8)
    depth: int = option(12, "layers of the encoder; the decoder has two thirds of them", at_least=1)
    pairs: int = option(7, "pairs of turns", at_least=1)
    slides: int = option(400, "planted slides of the comparison downstream; 0 = none", at_least=0)
    epochs: int = option(21, "of their pretraining", at_least=1)
    seed: int = option(0, "of the planted slides and of the training", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")


def measure(options: PretrainingBench) -> Iterator[dict[str, Any]]:
    """Measure a step (forward, backward, AdamW) in a run's own precision, then fit linear layers on slide vectors.

    Yields:
        A row of the step: `precision`, `tiles_per_second`, `share` of a product's rate with `share_least` and
        `share_most`, `kept` bytes a tile for the way back, and what `roofline.limits` says.
        Then a row a label and kind of slide vectors: `auroc` with `low` and `high` (95 %, bootstrap over test slides).
        The labels are the share of one kind of tile (composition) and the direction of strata (arrangement).
    """
    device = resolve_device(options.device)
    precision = training_precision("auto", device)
    torch.manual_seed(0)
    arch = f"gigapath_slide_enc{options.depth}l768d"
    model = build_autoencoder("", SizeOptions(model_arch=arch, decoder_depth=-(-2 * options.depth // 3)), in_chans=1536)
    model.to(device).train()
    side = int(np.ceil(options.tiles**0.5))
    places = np.arange(options.tiles)
    cells = np.stack([places % side, places // side], axis=1).astype(np.int64)
    bag = Bag(np.random.default_rng(0).standard_normal((options.tiles, 1536), dtype=np.float32), cells * CELL)
    none = np.zeros(1536, np.float32)
    batch = pack_views([Viewer(TaskOptions(), 0).view(bag, "made", None)], Target(none, none + 1, none))
    batch = batch.pinned() if device.type == "cuda" else batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    loop = Loop(Processes(device), precision, 1)

    def loss_of(of: Any, given: Any) -> torch.Tensor:
        there = given.to(device)
        with computing(precision, device):
            predicted = of(there)
        return loss_of_slides(predicted, there, "mse").sum()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loop.add_gradients(model, [batch], loss_of, 1)
        optimizer.step()

    kept, _ = measure_pass(lambda: loss_of(model, batch), model, device)
    work = Work(step, 3 * model.operations(options.tiles, 0.75))
    share = compare(work, product(device, _DTYPES[precision]), options.pairs, device)
    yield {
        "what": "step",
        "tiles": options.tiles,
        "precision": precision,
        "tiles_per_second": share.ours / work.amount * options.tiles,
        "share": share.median,
        "share_least": share.least,
        "share_most": share.most,
        "kept": kept / options.tiles,
        **limits(work, share, device),
    }
    if options.slides:
        yield from _downstream(options)


def _downstream(options: PretrainingBench) -> Iterator[dict[str, Any]]:
    # A step is measured where what reads slides and the command line are not installed too.
    from demo.pretrain_planted import RECIPE, SIZES, planted_slides, write_slides
    from gigapath.pretraining import pretrain

    count, half = options.slides, options.slides // 2
    slides = planted_slides(count, seed=options.seed + 1, turned=True)
    width = slides[0].features.shape[1]
    shares = np.array([slide.kinds[0] for slide in slides])
    labels = {"composition": shares > np.median(shares), "arrangement": np.array([slide.turned for slide in slides])}
    labels[PERMUTED] = np.random.default_rng(options.seed).permutation(labels["arrangement"])
    with tempfile.TemporaryDirectory(prefix="gigapath-bench-") as folder:
        # The slides of the test are never seen in pretraining.
        write_slides(Path(folder) / "features", slides[:half])
        training = replace(RECIPE, epochs=options.epochs, seed=options.seed)
        result = pretrain(Path(folder) / "features", Path(folder) / "run", sizes=SIZES, training=training)
        assert result is not None
        encoders = {
            "pretrained": create_model(str(result.weights), SIZES.model_arch, width, global_pool=True),
            "random weights": create_model("", SIZES.model_arch, width, global_pool=True),
        }
    vectors = {}
    for name, encoder in encoders.items():
        encoder.eval()
        with torch.no_grad():
            pairs = [(torch.from_numpy(slide.features), torch.from_numpy(slide.cells * CELL)) for slide in slides]
            vectors[name] = np.stack([encoder(x[None], at[None])[0][0].double().numpy() for x, at in pairs])
    vectors["tile mean"] = np.stack([slide.features.mean(axis=0) for slide in slides])
    vectors["neighbor statistic"] = np.stack([_neighbors(slide.features, slide.cells) for slide in slides])
    for label, truth in labels.items():
        for name, x in vectors.items():
            layer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
            said = layer.fit(x[:half], truth[:half]).predict_proba(x[half:])
            found = evaluate(Predictions(truth[half:].astype(int), said, ("no", "yes")), replicates=2000)["auroc"]
            yield {"what": label, "vectors": name, "auroc": found.value, "low": found.low, "high": found.high}


def _neighbors(features: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(2 W,): by dimension, the mean product of a tile's deviation from the slide's mean with that of the tile to its
    right, and of the tile below it."""
    deviations = features - features.mean(axis=0)
    at = {tuple(cell): row for row, cell in enumerate(cells.tolist())}
    parts = []
    for step in ((1, 0), (0, 1)):
        pairs = [(row, at[x + step[0], y + step[1]]) for (x, y), row in at.items() if (x + step[0], y + step[1]) in at]
        one, other = np.array(pairs).T
        parts.append((deviations[one] * deviations[other]).mean(axis=0))
    return np.concatenate(parts)


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["what"] == "step":
        share = f"{row['share']:.2f} ({row['share_least']:.2f} to {row['share_most']:.2f}) of a product's rate"
        return f"| a step of {row['tiles']:,} tiles | {share} | {row['kept'] / 1e6:.3f} MB a tile kept |"
    reach = f" ({row['low']:.3f} to {row['high']:.3f})" if row["low"] < row["high"] else ""  # none at 1.000
    return f"| {row['what']} | {row['vectors']} | {row['auroc']:.3f}{reach} |"


HEADING = "| what | of | AUROC (95 %) |\n|---|---|---|"
