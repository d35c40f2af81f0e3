"""Logistic regressions of all folds, inner folds and penalties of a cohort at once, on the CPU in float64.

Each minimises the mean cross-entropy of its training slides + penalty / 2 * |W|^2 with the bias free, on embeddings
standardised by these slides. The solution lies in the span of the training slides, so that all happens in the
coordinates of their principal axes; there the curvature is nearly diagonal, which makes conjugate gradients short.

Legend: B fits, S slides, D width, R rank of the training slides, C classes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.evaluation.splits import draw_parts
from gigapath.linear_probe.heads import PATIENCE, PENALTIES, cross_entropy

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

INNER_FOLDS = 3
BLOCK_ENTRIES = 1 << 24  # coordinates held at once: 128 MB, and twice that while a fit runs
TOLERANCE = 1e-9  # largest entry of the gradient
MAX_STEPS, MAX_CONJUGATE = 60, 200
SUFFICIENT = 1e-4  # of the decrease that the slope promises


def fit_folds(
    vectors: FloatArray,
    labels: IntArray,
    groups: npt.NDArray[np.str_],
    trains: Sequence[IntArray],
    seed: int,
    *,
    penalty: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Fit on the training slides of every fold, each with the penalty that folds inside them choose.

    Args:
        vectors: (S, D) embeddings.
        labels: (S,) class index; only those of training slides are looked at.
        groups: (S,) patients; none is on both sides of an inner fold.
        trains: rows of the training slides of each fold, which hold every class in at least `INNER_FOLDS` groups.
        penalty: the one to take; None = chosen.

    Returns:
        probabilities (folds, S, C) of all slides by each fit, and the penalties (folds,).
    """
    classes = int(labels[np.concatenate(list(trains))].max()) + 1
    entries = INNER_FOLDS * len(labels) * (min(max(map(len, trains)), vectors.shape[1]) + 1)
    step = max(1, BLOCK_ENTRIES // entries)
    shares, penalties = [], []
    for start in range(0, len(trains), step):
        block = trains[start : start + step]
        chosen = np.full(len(block), penalty) if penalty else _choose(vectors, labels, groups, block, seed, classes)
        shares.append(_Fits(vectors, labels, block, classes).probabilities(chosen))
        penalties.append(chosen)
    return np.concatenate(shares), np.concatenate(penalties)


def _choose(
    vectors: FloatArray,
    labels: IntArray,
    groups: npt.NDArray[np.str_],
    trains: Sequence[IntArray],
    seed: int,
    classes: int,
) -> FloatArray:
    """The penalty (folds,) of least cross-entropy on held-out inner folds; from strong to weak, until `PATIENCE`
    weaker ones in a row were no better."""
    rows, held = [], []
    for train in trains:
        part = draw_parts(labels[train], groups[train].tolist(), INNER_FOLDS, seed=seed)
        rows += [train[part != number] for number in range(INNER_FOLDS)]
        held += [train[part == number] for number in range(INNER_FOLDS)]
    fits = _Fits(vectors, labels, rows, classes)
    losses = np.full((len(trains), len(PENALTIES)), np.inf)
    going = np.arange(len(trains))
    for place, penalty in enumerate(PENALTIES):
        which = (going[:, None] * INNER_FOLDS + np.arange(INNER_FOLDS)).ravel()
        shares = fits.probabilities(np.full(len(which), penalty), which)
        sums = [
            cross_entropy(each[held[fit]], labels[held[fit]]) * len(held[fit])
            for each, fit in zip(shares, which.tolist(), strict=True)
        ]
        losses[going, place] = np.reshape(sums, (-1, INNER_FOLDS)).sum(axis=1)
        going = going[losses[going].argmin(axis=1) + PATIENCE >= place + 1]
        if len(going) == 0:
            break
    return np.asarray(np.asarray(PENALTIES)[losses.argmin(axis=1)])


class _Fits:
    """Regressions of one cohort on several sets of its slides, each starting from its fit before.

    Args:
        rows: of the training slides of each.
    """

    def __init__(self, vectors: FloatArray, labels: IntArray, rows: Sequence[IntArray], classes: int) -> None:
        slides, width = vectors.shape
        self._x = torch.zeros(len(rows), slides, min(max(map(len, rows)), width) + 1, dtype=torch.float64)
        self._weight = torch.zeros(len(rows), slides, 1, dtype=torch.float64)
        for x, weight, train in zip(self._x, self._weight, rows, strict=True):
            coordinates = _principal(vectors, train)
            x[:, : coordinates.shape[1]] = coordinates
            x[:, -1] = 1
            weight[train] = 1 / len(train)
        known = torch.from_numpy(np.minimum(labels, classes - 1))
        self._truth = torch.nn.functional.one_hot(known, classes).double()
        self._fitted = torch.zeros(len(rows), self._x.shape[2], classes, dtype=torch.float64)

    def probabilities(self, penalties: FloatArray, which: IntArray | None = None) -> FloatArray:
        """Fit some (or all) of the regressions; probabilities (B, S, C) of all slides."""
        chosen = torch.from_numpy(np.arange(len(self._x)) if which is None else which)
        whole = len(chosen) == len(self._x)
        x, weight = (self._x, self._weight) if whole else (self._x[chosen], self._weight[chosen])
        ridge = torch.from_numpy(penalties)[:, None, None].repeat(1, x.shape[2], 1)
        ridge[:, -1] = 0
        fitted = _newton(x, self._truth, weight, ridge, self._fitted[chosen])
        self._fitted[chosen] = fitted
        return np.asarray((x @ fitted).softmax(dim=2).numpy())


def _principal(vectors: FloatArray, train: IntArray) -> Tensor:
    """All slides (S, R) standardised by the training slides, along the principal axes of these."""
    every = torch.from_numpy(vectors)
    known = every[torch.from_numpy(train)]
    mean, deviation = known.mean(dim=0), known.std(dim=0, correction=0)
    every = (every - mean) * torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-300), 0.0)
    known = every[torch.from_numpy(train)]
    if len(known) >= known.shape[1]:
        axes: Tensor = torch.linalg.eigh(known.T @ known)[1]
        return every @ axes
    squares, axes = torch.linalg.eigh(known @ known.T)
    kept = squares > squares.max() * 1e-12
    axes = axes[:, kept] / squares[kept].sqrt()
    return (every @ known.T) @ axes


def _newton(x: Tensor, truth: Tensor, weight: Tensor, ridge: Tensor, start: Tensor) -> Tensor:
    """The minimum (B, R, C) of weighted cross-entropy + ridge / 2 * squares: damped Newton steps, each by conjugate
    gradients with the Hessian's diagonal, as far as the gradient deserves it.

    Args:
        x: (B, S, R).
        truth: (S, C) of 0 and 1.
        weight: (B, S, 1), 0 for slides that do not train.
        ridge: (B, R, 1).
    """

    def value(theta: Tensor, logits: Tensor) -> Tensor:
        loss = weight * (logits.logsumexp(dim=2, keepdim=True) - (logits * truth).sum(dim=2, keepdim=True))
        return loss.sum(dim=(1, 2)) + 0.5 * (ridge * theta.square()).sum(dim=(1, 2))

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(dim=(1, 2), keepdim=True)

    theta, turned = start.clone(), x.transpose(1, 2)
    weighted = (turned * turned) * weight.transpose(1, 2)
    logits = x @ theta
    now = value(theta, logits)
    for _ in range(MAX_STEPS):
        shares = logits.softmax(dim=2)
        gradient = turned @ (weight * (shares - truth)) + ridge * theta
        largest = gradient.abs().amax(dim=(1, 2), keepdim=True)
        if bool((largest <= TOLERANCE).all()):
            break
        # Conjugate gradients for the Newton step.
        inverse = 1 / (weighted @ (shares * (1 - shares)) + ridge).clamp_min(1e-300)
        step, residual = torch.zeros_like(theta), -gradient
        pushed = inverse * residual
        direction, height = pushed, dot(residual, pushed)
        goal = torch.where(largest > TOLERANCE, height * largest.clamp_max(1e-2), torch.inf)
        for _ in range(MAX_CONJUGATE):
            spread = x @ direction
            curved = turned @ (weight * shares * (spread - (shares * spread).sum(dim=2, keepdim=True)))
            curved += ridge * direction
            going = height > goal  # the others stay where they are
            length = torch.where(going, height / dot(direction, curved).clamp_min(1e-300), 0.0)
            step += length * direction
            residual = residual - length * curved
            pushed = inverse * residual
            before, height = height, torch.where(going, dot(residual, pushed), height)
            if bool((height <= goal).all()):
                break
            direction = pushed + height / before.clamp_min(1e-300) * direction
        # Halved until it lowers the loss as it should; what has converged stays.
        slope = dot(gradient, step).flatten()
        move, size = x @ step, (largest > TOLERANCE).double()
        for _ in range(30):
            tried = theta + size * step
            tried_logits = logits + size * move
            then = value(tried, tried_logits)
            failed = then > now + SUFFICIENT * size.flatten() * slope + 1e-14 * now.abs()
            if not bool(failed.any()):
                break
            size = torch.where(failed[:, None, None], size / 2, size)
        theta, logits, now = tried, tried_logits, then
    return theta
