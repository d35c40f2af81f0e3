"""How well hidden tiles are predicted, beside what needs no learning: the slide's mean, neighbors, kriging."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import curve_fit
from scipy.spatial import cKDTree

from gigapath.pretraining.data import Target, View

NEIGHBORS = (1, 4, 8)
KRIGED_FROM = 32  # nearest visible tiles
AT_ONCE = 256  # hidden tiles
SAMPLED = 4096  # tiles of a slide, and pairs of them, that covariances are taken from
FURTHEST = 12  # cells, of the covariances that the model of kriging is fitted to
MEAN, KRIGING = "slide mean", "kriging"

FloatArray = npt.NDArray[np.float64]
Predictor = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]  # cells, targets, wanted cells -> predictions


@dataclass
class Explained:
    """The share of the hidden tiles' variance about the training mean that predictions explain, summed over slides."""

    left: float = 0.0
    whole: float = 0.0

    def add(self, target: FloatArray, predicted: FloatArray, centre: npt.NDArray[np.float32]) -> None:
        """Count (M, W) targets and predictions of one slide."""
        self.left += float(np.square(target - predicted).sum())
        self.whole += float(np.square(target - centre).sum())

    @property
    def r2(self) -> float:
        """1 - (sum of squared errors) / (sum of squares about the training mean)."""
        return 1 - self.left / self.whole if self.whole else math.nan


def fit_covariance(views: Sequence[View], target: Target) -> tuple[float, float, float]:
    """(sill, range in cells, nugget) of an isotropic exponential covariance within slides, all dimensions together.

    The products of deviations from the slide's mean are averaged by whole cells of distance, and
    sill * exp(-distance / range) - offset is fitted to them: taking the mean away lowers all of them alike. The nugget
    is what the variance exceeds the sum by.
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
    try:
        (sill, reach, offset), _ = curve_fit(
            lambda d, sill, reach, offset: sill * np.exp(-d / reach) - offset,
            found,
            covariance[found],
            p0=(variance / 2, 3.0, 0.0),
            sigma=1 / np.sqrt(counts[found]),
            bounds=((0, 0.1, 0), (2 * variance, 100, variance)),
        )
    except RuntimeError:  # no fit: what is near tells nothing
        return 0.0, 1.0, variance
    return float(sill), float(reach), max(variance + float(offset) - float(sill), 1e-3 * variance)


def kriging(model: tuple[float, float, float]) -> Predictor:
    """Simple kriging about the mean of the visible tiles, from the nearest of them (Matheron 1963)."""
    sill, reach, nugget = model

    def predict(cells: FloatArray, values: FloatArray, wanted: FloatArray) -> FloatArray:
        mean = values.mean(axis=0)
        if sill == 0:
            return np.broadcast_to(mean, (len(wanted), values.shape[1]))
        near = min(KRIGED_FROM, len(cells))
        apart, rows = cKDTree(cells).query(wanted, k=near)
        apart, rows = apart.reshape(len(wanted), near), rows.reshape(len(wanted), near)
        between = np.linalg.norm(cells[rows][:, :, None] - cells[rows][:, None], axis=-1)
        matrix = sill * np.exp(-between / reach) + nugget * np.eye(near)
        weights = np.linalg.solve(matrix, sill * np.exp(-apart / reach)[..., None])[..., 0]
        return np.asarray(mean + np.einsum("mk,mkw->mw", weights, values[rows] - mean))

    return predict


def nearest(count: int) -> Predictor:
    """The mean of the nearest visible tiles; of ties the first in reading order."""

    def predict(cells: FloatArray, values: FloatArray, wanted: FloatArray) -> FloatArray:
        rows = cKDTree(cells).query(wanted, k=min(count, len(cells)))[1].reshape(len(wanted), -1)
        return np.asarray(values[rows].mean(axis=1))

    return predict


def without_learning(views: Sequence[View], target: Target, fitted_on: Sequence[View]) -> dict[str, float]:
    """R2 on the hidden tiles of `views` of predictors that learn nothing: the mean of the visible tiles, the nearest 1,
    4 and 8, kriging with the covariance of `fitted_on`."""
    predictors: dict[str, Predictor] = {
        MEAN: lambda cells, values, wanted: np.broadcast_to(values.mean(axis=0), (len(wanted), values.shape[1])),
        **{f"nearest {count}": nearest(count) for count in NEIGHBORS},
        KRIGING: kriging(fit_covariance(fitted_on, target)),
    }
    scores = {name: Explained() for name in predictors}
    for view in views:
        values, cells = target.of(view.features).astype(np.float64), view.cells.astype(np.float64)
        hidden = np.flatnonzero(view.hidden)
        for name, predict in predictors.items():
            for rows in np.split(hidden, range(AT_ONCE, len(hidden), AT_ONCE)):
                said = predict(cells[~view.hidden], values[~view.hidden], cells[rows])
                scores[name].add(values[rows], said, target.centre)
    return {name: score.r2 for name, score in scores.items()}


def spread_and_rank(vectors: FloatArray) -> tuple[float, float]:
    """How different slide vectors (S, D) are.

    Returns:
        the root mean square of their deviations from the mean vector over that of the vectors, and the effective rank
        of the deviations: exp of the entropy of their squared singular values' shares (Roy and Vetterli 2007).
    """
    deviations = vectors - vectors.mean(axis=0)
    size = float(np.sqrt(np.square(vectors).mean()))
    spread = float(np.sqrt(np.square(deviations).mean())) / size if size else 0.0
    powers = np.square(np.linalg.svd(deviations, compute_uv=False))
    if powers.sum() <= 0:
        return spread, 1.0
    shares = powers[powers > 0] / powers.sum()
    return spread, float(np.exp(-(shares * np.log(shares)).sum()))
