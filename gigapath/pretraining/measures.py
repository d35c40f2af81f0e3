"""How well hidden tiles are predicted, beside what needs no learning (the slide's mean, neighbors, kriging), and how it
is shown: curves, pictures of predicted tiles, the draft of a model card."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import curve_fit
from scipy.spatial import cKDTree

from gigapath.evaluation.plots import Curves, draw_curves, png, write_events
from gigapath.files import write_bytes_atomic, write_text_atomic
from gigapath.pretraining.data import Target, View, pack_views
from gigapath.pretraining.model import MaskedAutoencoder
from gigapath.tables import csv_text

NEIGHBORS = (1, 4, 8)
KRIGED_FROM = 32  # nearest visible tiles
AT_ONCE = 256  # hidden tiles
SAMPLED = 4096  # tiles of a slide, and pairs of them, that covariances are taken from
FURTHEST = 12  # cells, of the covariances that the model of kriging is fitted to
MEAN, KRIGING = "slide mean", "kriging"
CURVES = "curves.csv"
# Panel of the picture of curves -> name of each line -> the attribute of an epoch.
_PANELS = {
    "loss": {"training, while it goes on": "train_loss", "validation, after the epoch": "val_loss"},
    "R2 of hidden tiles": {"validation": "r2"},
    "effective rank": {"slide vectors of validation": "rank"},
}
_UNSEEN = (0.85, 0.85, 0.85)

FloatArray = npt.NDArray[np.float64]
Predictor = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]  # cells, targets, wanted cells -> predictions


def squares(target: FloatArray, predicted: FloatArray, centre: npt.NDArray[np.float32]) -> FloatArray:
    """(2,) of targets (M, W): the sum of squared errors, and that of squares about the training mean."""
    return np.array([np.square(target - predicted).sum(), np.square(target - centre).sum()])


def explained(sums: FloatArray) -> float:
    """R2, the share of the variance about the training mean that predictions explain, by `squares` over slides."""
    return float(1 - sums[0] / sums[1]) if sums[1] else math.nan


def fit_covariance(views: Sequence[View], target: Target) -> tuple[float, float, float]:
    """(sill, range in cells, nugget) of an isotropic exponential covariance within slides, all dimensions together.

    Products of deviations from the slide's mean are averaged by whole cells of distance, and sill * exp(-distance /
    range) - offset is fitted to them: taking the mean away lowers all alike. The nugget is the rest of the variance.
    """
    sums, counts = np.zeros(FURTHEST + 1), np.zeros(FURTHEST + 1)
    for view in views:
        cells = view.cells[:SAMPLED]
        values = target.of(view.features[:SAMPLED]).astype(np.float64)
        values -= values.mean(axis=0)
        pairs = cKDTree(cells).query_pairs(FURTHEST + 0.5, output_type="ndarray")
        pairs = pairs[:: 1 + len(pairs) // SAMPLED]
        apart = np.linalg.norm(cells[pairs[:, 0]] - cells[pairs[:, 1]], axis=1).round().astype(np.int64)
        products = np.einsum("ij,ij->i", values[pairs[:, 0]], values[pairs[:, 1]]) / values.shape[1]
        np.add.at(sums, apart, products)
        np.add.at(counts, apart, 1)
        sums[0] += np.square(values).mean(axis=1).sum()
        counts[0] += len(values)
    found = np.flatnonzero(counts[1:]) + 1
    covariance = sums / np.maximum(counts, 1)
    variance = max(float(covariance[0]), 1e-12)
    if len(found) < 4:
        return 0.0, 1.0, variance
    start, bounds = (variance / 2, 3.0, 0.0), ((0, 0.1, 0), (2 * variance, 100, variance))
    weigh: dict[str, Any] = {"p0": start, "sigma": 1 / np.sqrt(counts[found]), "bounds": bounds}
    try:
        (sill, reach, offset), _ = curve_fit(
            lambda d, sill, reach, offset: sill * np.exp(-d / reach) - offset, found, covariance[found], **weigh
        )
    except RuntimeError:  # no fit: what is near tells nothing
        return 0.0, 1.0, variance
    return float(sill), float(reach), max(variance + float(offset) - float(sill), 1e-3 * variance)


def kriging(model: tuple[float, float, float], cells: FloatArray, values: FloatArray, wanted: FloatArray) -> FloatArray:
    """Simple kriging about the mean of the visible tiles, from the nearest of them (Matheron 1963); `model` is that of
    `fit_covariance`."""
    (sill, reach, nugget), mean = model, values.mean(axis=0)
    if sill == 0:
        return np.broadcast_to(mean, (len(wanted), values.shape[1]))
    near = min(KRIGED_FROM, len(cells))
    apart, rows = cKDTree(cells).query(wanted, k=near)
    apart, rows = apart.reshape(len(wanted), near), rows.reshape(len(wanted), near)
    between = np.linalg.norm(cells[rows][:, :, None] - cells[rows][:, None], axis=-1)
    matrix = sill * np.exp(-between / reach) + nugget * np.eye(near)
    weights = np.linalg.solve(matrix, sill * np.exp(-apart / reach)[..., None])[..., 0]
    return np.asarray(mean + np.einsum("mk,mkw->mw", weights, values[rows] - mean))


def nearest(count: int, cells: FloatArray, values: FloatArray, wanted: FloatArray) -> FloatArray:
    """The mean of the nearest visible tiles; of ties the first in reading order."""
    rows = cKDTree(cells).query(wanted, k=min(count, len(cells)))[1].reshape(len(wanted), -1)
    return np.asarray(values[rows].mean(axis=1))


def without_learning(views: Sequence[View], target: Target, fitted_on: Sequence[View]) -> dict[str, float]:
    """R2 on the hidden tiles of `views` of predictors that learn nothing: the mean of the visible tiles, the nearest 1,
    4 and 8, kriging with the covariance of `fitted_on`."""
    predictors: dict[str, Predictor] = {
        MEAN: lambda cells, values, wanted: np.broadcast_to(values.mean(axis=0), (len(wanted), values.shape[1])),
        **{f"nearest {count}": partial(nearest, count) for count in NEIGHBORS},
        KRIGING: partial(kriging, fit_covariance(fitted_on, target)),
    }
    sums = dict.fromkeys(predictors, np.zeros(2))
    for view in views:
        values, cells = target.of(view.features).astype(np.float64), view.cells.astype(np.float64)
        hidden = np.flatnonzero(view.hidden)
        for name, predict in predictors.items():
            for rows in np.split(hidden, range(AT_ONCE, len(hidden), AT_ONCE)):
                said = predict(cells[~view.hidden], values[~view.hidden], cells[rows])
                sums[name] = sums[name] + squares(values[rows], said, target.centre)
    return {name: explained(of) for name, of in sums.items()}


def spread_and_rank(vectors: FloatArray) -> tuple[float, float]:
    """How different slide vectors (S, D) are: the root mean square of their deviations from the mean vector over that
    of the vectors, and their effective rank: exp of the entropy of their squared singular values' shares (Roy and
    Vetterli 2007)."""
    deviations = vectors - vectors.mean(axis=0)
    size = float(np.sqrt(np.square(vectors).mean()))
    spread = float(np.sqrt(np.square(deviations).mean())) / size if size else 0.0
    powers = np.square(np.linalg.svd(deviations, compute_uv=False))
    if powers.sum() <= 0:
        return spread, 1.0
    shares = powers[powers > 0] / powers.sum()
    return spread, float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave (counted from 0, the start); measures are of the validation slides, None without any.

    Attributes:
        steps: of the optimizer so far.
        train_loss: mean over the slides, while training; None at the start.
        r2: share of the hidden tiles' variance that is predicted.
        spread: of slide vectors, over their size.
        rank: of slide vectors, effective.
        learning_rate: at the last step.
        seconds: of training.
        waiting: share of these seconds spent waiting for files.
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

    def describe(self, epochs: int) -> str:
        """One line."""
        r2 = "" if self.r2 is None else f", R2 of hidden validation tiles {self.r2:.3f}, effective rank {self.rank:.1f}"
        if self.epoch == 0:
            return f"start: nothing trained yet{r2}"
        waiting = f"{self.waiting:.1%} of the time waiting for files"
        return f"epoch {self.epoch}/{epochs}: loss {self.train_loss:.4f}{r2}, {waiting}"


def write_curves(folder: Path, history: Sequence[Epoch], *, draw: bool) -> None:
    """Write the epochs as a table, for TensorBoard where that is there, and as a picture if `draw`."""
    rows = [asdict(entry) for entry in history]
    cells = [["" if value is None else f"{value:.6g}" for value in row.values()] for row in rows]
    write_text_atomic(folder / CURVES, csv_text([list(rows[0]), *cells]))
    names = list(rows[0])[1:]
    found = {name: [(row["epoch"], float(row[name])) for row in rows if row[name] is not None] for name in names}
    points = {name: pairs for name, pairs in found.items() if pairs}
    write_events(folder / "tensorboard", points)
    panels: dict[str, Any] = {}
    for title, lines in _PANELS.items():
        for line, name in lines.items():
            if name in points:
                panels.setdefault(title, {})[line] = tuple(zip(*points[name], strict=True))
    if draw and panels:
        write_bytes_atomic(folder / "curves.png", draw_curves(Curves("Pretraining", "epoch", panels)))


def draw_reconstructions(
    model: MaskedAutoencoder, views: Sequence[View], target: Target, names: Sequence[str]
) -> bytes:
    """PNG: a row a slide of its tiles as they are, as the model sees them, as it predicts them, and the error.

    Colors are the first three principal components of the tiles shown.
    """
    from matplotlib.figure import Figure

    model.eval()
    device, truths, filled = next(model.parameters()).device, [], []
    for view in views:
        truths.append(target.of(view.features))
        filled.append(truths[-1].copy())
        with torch.no_grad():
            filled[-1][view.hidden] = model(pack_views([view], target).to(device)).float().cpu().numpy()
    every = np.concatenate(truths)
    mean = every.mean(axis=0)
    axes_of_color = np.linalg.svd(every[:: 1 + len(every) // 5000] - mean, full_matrices=False)[2][:3]
    low, high = np.percentile((every - mean) @ axes_of_color.T, (1, 99), axis=0)

    def colors(values: Any) -> Any:
        shown = np.zeros((len(values), 3))
        shown[:, : len(axes_of_color)] = ((values - mean) @ axes_of_color.T - low) / np.maximum(high - low, 1e-12)
        return np.clip(shown, 0, 1)

    figure = Figure(figsize=(12, 3.2 * len(views)), layout="constrained")
    all_axes = figure.subplots(len(views), 4, squeeze=False)
    for row, (view, truth, said) in enumerate(zip(views, truths, filled, strict=True)):
        seen = colors(truth)
        seen[view.hidden] = _UNSEEN
        error = np.square(truth - said).mean(axis=1)
        panels = {"tiles": colors(truth), "seen": seen, "predicted": colors(said), "squared error": error}
        x, y = (view.cells - view.cells.min(axis=0)).T
        for axes, (title, values) in zip(all_axes[row], panels.items(), strict=True):
            image = np.full((y.max() + 1, x.max() + 1, *values.shape[1:]), 1.0 if values.ndim == 2 else np.nan)
            image[y, x] = values
            drawn = axes.imshow(image, interpolation="nearest", cmap="viridis")
            axes.set_title(f"{names[row]}: {title}" if title == "tiles" else title, fontsize=10)
            axes.set_axis_off()
        figure.colorbar(drawn, ax=axes, fraction=0.046)
    return png(figure)


def model_card(facts: Mapping[str, Any], history: Sequence[Epoch], warnings: Sequence[str]) -> str:
    """The draft of a model card, from what `pretrain.json` holds; what only people know is left to fill in."""
    last, init, options = history[-1], facts["init"], facts["options"]
    scores = {"at the start": history[0].r2, f"after epoch {last.epoch}": last.r2, **facts["r2_without_learning"]}
    made = [f"{name} {value}" for name, value in facts["embeddings"].items() if value is not None]
    counts = "{slides:,} slides of {patients:,} patients, {tiles:,} tiles"
    sets = [f"- {name}: {counts.format(**part)}" for name, part in facts["sets"].items()]
    start = f"the weights {init['name']} (SHA-256 {init['sha256']})" if init else "new weights"
    recipe = {"learning rate": options["training"]["base_lr"], "seed": options["training"]["seed"], **options["task"]}
    lines = [
        "# Model card (draft)\n",
        f"A LongNet slide encoder ({options['sizes']['model_arch']}), pretrained by predicting hidden tiles, from",
        f"{start}. The method follows what is public of Prov-GigaPath's pretraining; it is no",
        "reproduction of it. For research only.",
        "\n## Data\n",
        *sets,
        f"- tile embeddings: {', '.join(made) or 'not stated'}",
        "- TODO: where the slides come from, stains, scanners, consent and licence",
        "\n## Training\n",
        f"- {last.epoch} epochs, {last.steps:,} steps",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in recipe.items()),
        "\n## Measured on the validation slides\n",
        "| predictor of hidden tiles | R2 |\n|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in scores.items() if value is not None),
        *("", *(f"- warning: {warning}" for warning in warnings)),
        "- A high R2 says that tiles can be told from their neighbors. It does not say that slide embeddings serve a",
        "  task better: compare with the mean of the tiles and with random weights on your task.",
    ]
    return "\n".join(lines) + "\n"
