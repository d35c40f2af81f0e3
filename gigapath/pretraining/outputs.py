"""What a pretraining leaves: weights, curves, pictures of predicted tiles, the draft of a model card."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gigapath.evaluation.plots import Curves, draw_curves, plotting_available, write_events
from gigapath.files import write_bytes_atomic, write_text_atomic
from gigapath.pretraining.data import Target, View, pack_views
from gigapath.pretraining.model import MaskedAutoencoder
from gigapath.tables import csv_text

CURVES = "curves.csv"
# Panel of the picture of curves -> name of each line -> the attribute of an epoch.
_PANELS = {
    "loss": {"training, while it goes on": "train_loss", "validation, after the epoch": "val_loss"},
    "R2 of hidden tiles": {"validation": "r2"},
    "effective rank": {"slide vectors of validation": "rank"},
}
_UNSEEN = (0.85, 0.85, 0.85)


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave; measures are of the validation slides, None without any.

    Attributes:
        epoch: counted from 0, the start.
        steps: of the optimizer so far.
        train_loss: mean over the slides, while training; None at the start.
        val_loss: mean over the validation slides.
        r2: share of the hidden tiles' variance that is predicted.
        spread: of slide vectors, over their size.
        rank: of slide vectors, effective.
        learning_rate: at the last step.
        seconds: of training.
        waiting: share of them spent waiting for files.
    """

    epoch: int
    steps: int
    train_loss: float | None = None
    val_loss: float | None = None
    r2: float | None = None
    spread: float | None = None
    rank: float | None = None
    learning_rate: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0


def write_curves(folder: Path, history: Sequence[Epoch]) -> None:
    """Write the epochs as a table, for TensorBoard and as a picture, the last two where their packages are there."""
    rows = [asdict(entry) for entry in history]
    write_text_atomic(
        folder / CURVES,
        csv_text([list(rows[0]), *(["" if v is None else f"{v:.6g}" for v in row.values()] for row in rows)]),
    )
    points = {
        name: [(int(row["epoch"]), float(row[name])) for row in rows if row[name] is not None]
        for name in list(rows[0])[1:]
    }
    write_events(folder / "tensorboard", {name: found for name, found in points.items() if found})
    panels = {
        title: {line: tuple(zip(*points[name], strict=True)) for line, name in lines.items() if points[name]}
        for title, lines in _PANELS.items()
    }
    if plotting_available() and any(panels.values()):
        shown: Any = {title: lines for title, lines in panels.items() if lines}
        picture = draw_curves(Curves("Pretraining", "epoch", shown))
        write_bytes_atomic(folder / "curves.png", picture)


def draw_reconstructions(
    model: MaskedAutoencoder, views: Sequence[View], target: Target, names: Sequence[str]
) -> bytes:
    """PNG: a row a slide of its tiles as they are, as the model sees them, as it predicts them, and the error.

    Colors are the first three principal components of the tiles shown, as red, green and blue.
    """
    from matplotlib.figure import Figure

    model.eval()
    truths, filled = [], []
    for view in views:
        batch = pack_views([view], target).to(next(model.parameters()).device)
        with torch.no_grad():
            predicted = model(batch).float().cpu().numpy()
        truths.append(target.of(view.features))
        filled.append(truths[-1].copy())
        filled[-1][view.hidden] = predicted
    every = np.concatenate(truths)
    mean = every.mean(axis=0)
    axes_of_color = np.linalg.svd(every[:: 1 + len(every) // 5000] - mean, full_matrices=False)[2][:3]
    low, high = np.percentile((every - mean) @ axes_of_color.T, (1, 99), axis=0)

    def colors(values: Any) -> Any:
        shown = np.zeros((len(values), 3))
        shown[:, : len(axes_of_color)] = ((values - mean) @ axes_of_color.T - low) / np.maximum(high - low, 1e-12)
        return np.clip(shown, 0, 1)

    figure = Figure(figsize=(12, 3.2 * len(views)), layout="constrained")
    for row, (view, truth, said, name) in enumerate(zip(views, truths, filled, names, strict=True)):
        seen = colors(truth)
        seen[view.hidden] = _UNSEEN
        error = np.square(truth - said).mean(axis=1)
        panels = {"tiles": colors(truth), "seen": seen, "predicted": colors(said), "squared error": error}
        corner = view.cells.min(axis=0)
        columns, rows = (view.cells - corner).T
        shape = rows.max() + 1, columns.max() + 1
        for column, (title, values) in enumerate(panels.items()):
            axes = figure.add_subplot(len(views), len(panels), row * len(panels) + column + 1)
            image = np.full((*shape, *values.shape[1:]), 1.0 if values.ndim == 2 else np.nan)
            image[rows, columns] = values
            drawn = axes.imshow(image, interpolation="nearest", cmap="viridis")
            if values.ndim == 1:
                figure.colorbar(drawn, ax=axes, fraction=0.046)
            axes.set_title(f"{name}: {title}" if column == 0 else title, fontsize=10)
            axes.set_axis_off()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


_CARD = """# Model card (draft)

A LongNet slide encoder ({sizes[model_arch]}), pretrained by predicting hidden tiles, from {start}. The
method follows what is public of Prov-GigaPath's pretraining; it is no reproduction of it. For research only.

## Data

{sets}
- tile embeddings: {made}
- TODO: where the slides come from, stains, scanners, consent and licence

## Training

- {last.epoch} epochs, {last.steps:,} steps, learning rate {training[base_lr]:g}, seed {training[seed]}
- mask ratio {task[mask_ratio]:g}, target {task[target]}, loss {task[loss]}, crop {task[crop]:g}, mirror \
{task[mirror]:g}, shift below {task[shift]} cells

## Measured on the validation slides

| predictor of hidden tiles | R2 |
|---|---|
{measured}

{warnings}- A high R2 says that tiles can be told from their neighbors. It does not say that slide embeddings serve a
  task better: compare with the mean of the tiles and with random weights on your task.
"""


def model_card(facts: Mapping[str, Any], history: Sequence[Epoch], warnings: Sequence[str]) -> str:
    """The draft of a model card, from what `pretrain.json` holds; what only people know is left to fill in."""
    first, last, init = history[0], history[-1], facts["init"]
    scores = {"at the start": first.r2, f"after epoch {last.epoch}": last.r2, **facts["r2_without_learning"]}
    made = [f"{name} {value}" for name, value in facts["embeddings"].items() if value is not None]
    sets = [
        f"- {name}: {part['slides']:,} slides of {part['patients']:,} patients, {part['tiles']:,} tiles"
        for name, part in facts["sets"].items()
    ]
    return _CARD.format(
        **facts["options"],
        start=f"the weights {init['name']} (SHA-256 {init['sha256']})" if init else "new weights",
        sets="\n".join(sets),
        made=", ".join(made) or "not stated",
        last=last,
        measured="\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items() if value is not None),
        warnings="".join(f"- warning: {warning}\n" for warning in warnings),
    )
