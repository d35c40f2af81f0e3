"""The other two heads: multinomial logistic regression fitted to the end, and nearest neighbours.

Both choose their one number on the validation set; neither draws anything.

Legend: N rows, D width, C classes, M rows to predict.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gigapath.evaluation import f1_weighted
from gigapath.linear_probe.training import LinearHead, blocks, one_thread

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Objective = Callable[[torch.Tensor], tuple[float, torch.Tensor]]  # parameters (P,) -> value, gradient (P,)

# Strength of the L2 penalty, in units of the mean loss on standardised embeddings; strong to weak, so that each fit
# starts from the one before.
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(2, -13, -1))
PATIENCE = 3  # weaker penalties tried after the best one
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO's protocol
MAX_ITERATIONS = 500
TOLERANCE = 1e-5  # largest entry of the gradient of the mean loss
HISTORY = 10  # moves that are remembered
SEARCHES = 20  # sizes tried along one direction
SMALL_MATRIX = 1 << 26  # entries; below this, several threads cost a fit more than they give
QUERY_ROWS = 2048  # rows whose neighbours are looked for at once


@dataclass(frozen=True)
class Choice:
    """A fitted head's number, and what it reached on validation for each number tried."""

    name: str
    value: float
    tried: dict[float, float]
    criterion: str


@dataclass(frozen=True)
class Standardisation:
    """Mean and inverse standard deviation (D,) of the training rows; 0 for an entry that never changes."""

    mean: torch.Tensor
    scale: torch.Tensor


def standardisation(features: torch.Tensor, rows: torch.Tensor) -> Standardisation:
    """The training rows' mean and spread, in float64, without copying the matrix."""
    width = features.shape[1]
    total = torch.zeros(width, dtype=torch.float64, device=features.device)
    for _, x in blocks(features, rows):
        total += x.sum(dim=0, dtype=torch.float64)
    mean = total / len(rows)
    squares = torch.zeros_like(total)
    for _, x in blocks(features, rows):
        squares += (x.double() - mean).square().sum(dim=0)
    deviation = (squares / len(rows)).sqrt()
    moves = deviation > 1e-6 * mean.abs().clamp_min(1e-12)
    return Standardisation(mean, torch.where(moves, 1 / deviation.clamp_min(1e-300), torch.zeros_like(deviation)))


class LogisticRegression:
    """Multinomial logistic regression on standardised embeddings: mean cross-entropy + penalty / 2 * |W|^2, the bias
    free. Fitted by L-BFGS; the standardisation is folded into the weights, so the matrix stays as it is.

    Args:
        features: (N, D) float32 or float64 on the device.
        labels: (N,) int64 class index, on the device.
        rows: training rows.
        classes: C.
        standardise: off for embeddings that are standardised already.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor,
        classes: int,
        *,
        standardise: bool = True,
    ) -> None:
        self._features, self._labels, self._rows, self._classes = features, labels, rows, classes
        if standardise:
            self._standard = standardisation(features, rows)
        else:
            ones = torch.ones(features.shape[1], dtype=torch.float64, device=features.device)
            self._standard = Standardisation(torch.zeros_like(ones), ones)
        self._start = torch.zeros(classes * (features.shape[1] + 1), dtype=torch.float64, device=features.device)

    def fit(self, penalty: float) -> LinearHead:
        """The best head for a penalty; starts from the fit before."""
        self._start = minimise(lambda flat: self._objective(flat, penalty), self._start)
        weight, bias = self._unfold(self._start)
        return LinearHead(weight.to(self._features.dtype), bias.to(self._features.dtype))

    def _unfold(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (C, D) and bias (C,) for plain embeddings from those for standardised ones, float64."""
        width = self._features.shape[1]
        weight = flat[: self._classes * width].view(self._classes, width) * self._standard.scale
        return weight, flat[self._classes * width :] - weight @ self._standard.mean

    def _objective(self, flat: torch.Tensor, penalty: float) -> tuple[float, torch.Tensor]:
        """Value and gradient at the parameters for standardised embeddings."""
        width = self._features.shape[1]
        weight, bias = self._unfold(flat)
        plain_weight, plain_bias = weight.to(self._features.dtype), bias.to(self._features.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=flat.device)
        to_weight = torch.zeros_like(weight)
        to_bias = torch.zeros_like(bias)
        for block, x in blocks(self._features, self._rows):
            target = self._labels[block].unsqueeze(1)
            log_softmax = torch.addmm(plain_bias, x, plain_weight.t()).log_softmax(dim=1)
            loss -= log_softmax.gather(1, target).sum(dtype=torch.float64)
            slope = log_softmax.exp()
            slope.scatter_add_(1, target, torch.full_like(slope[:, :1], -1.0))
            to_weight += slope.t() @ x
            to_bias += slope.sum(dim=0, dtype=torch.float64)
        rows = len(self._rows)
        # Chain rule through the standardisation: z = (x - mean) * scale.
        to_weight = (to_weight - to_bias[:, None] * self._standard.mean) * self._standard.scale / rows
        own = flat[: self._classes * width]
        gradient = torch.cat([to_weight.reshape(-1) + penalty * own, to_bias / rows])
        return float(loss / rows + 0.5 * penalty * own.square().sum()), gradient


def choose_penalty(
    features: torch.Tensor,
    labels: torch.Tensor,
    train_rows: torch.Tensor,
    val_rows: torch.Tensor,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[LinearHead, Choice]:
    """Fit for each penalty, and keep the head with the least cross-entropy on the validation rows.

    The penalties go from strong to weak; the search ends when `PATIENCE` of them in a row were no better.

    Args:
        features: (N, D) embeddings.
        labels: (N,) class index.
        train_rows: rows that are fitted.
        val_rows: rows that choose.
        classes: C.
        penalties: to try.
    """
    small = len(train_rows) * features.shape[1] < SMALL_MATRIX
    truth = labels[val_rows].cpu().numpy()
    tried: dict[float, float] = {}
    best: LinearHead | None = None
    with one_thread(features.device) if small else contextlib.nullcontext():
        regression = LogisticRegression(features, labels, train_rows, classes)
        for penalty in penalties:
            head = regression.fit(penalty)
            tried[penalty] = cross_entropy(head.probabilities(features, val_rows), truth)
            value = min(tried, key=lambda each: tried[each])
            if value == penalty:
                best = head
            if list(tried).index(value) + PATIENCE < len(tried):
                break
    assert best is not None
    return best, Choice("penalty", value, tried, "cross-entropy on validation, the least")


def cross_entropy(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean -log of the probability of the true class, in nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-300)).mean())


def minimise(objective: Objective, start: torch.Tensor) -> torch.Tensor:
    """The minimum (P,) of a smooth convex function by L-BFGS, from `start` (P,) float64.

    Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5, with a bisecting search for Wolfe's conditions.
    torch's own is made for networks: it brings its compiler along (a second and 300 MB) and takes many times as long
    for a fit of a few hundred rows.

    Returns:
        the point where no entry of the gradient is above `TOLERANCE`, where rounding hides any further descent, or
        which `MAX_ITERATIONS` led to.
    """
    point = start
    value, gradient = objective(point)
    moves: list[Move] = []
    for _ in range(MAX_ITERATIONS):
        if float(gradient.abs().max()) < TOLERANCE:
            break
        direction = _descent(gradient, moves)
        # Without memory the direction has no scale: begin with a step of length 1 at most.
        size = 1.0 if moves else min(1.0, 1.0 / float(gradient.norm()))
        found = _search(objective, point, value, direction, float(gradient @ direction), size)
        if found is None and not moves:
            break
        if found is None:
            moves = []
            continue
        size, value, new_gradient = found
        step, change = size * direction, new_gradient - gradient
        point, gradient = point + step, new_gradient
        moves = [*moves[1 - HISTORY :], Move(step, change, 1 / float(step @ change))]
    return point


class Move(NamedTuple):
    """A step that was taken, the gradient's change along it, and the inverse of their product, which is positive."""

    step: torch.Tensor
    change: torch.Tensor
    inverse: float


def _descent(gradient: torch.Tensor, moves: list[Move]) -> torch.Tensor:
    """Minus the inverse curvature, as the last moves tell it, times the gradient (the two loops)."""
    direction = -gradient
    shares = []
    for move in reversed(moves):
        shares.append(move.inverse * float(move.step @ direction))
        direction.add_(move.change, alpha=-shares[-1])
    if moves:
        direction.mul_(1 / (moves[-1].inverse * float(moves[-1].change.square().sum())))
    for move in moves:
        direction.add_(move.step, alpha=shares.pop() - move.inverse * float(move.change @ direction))
    return direction


def _search(
    objective: Objective, point: torch.Tensor, value: float, direction: torch.Tensor, slope: float, size: float
) -> tuple[float, float, torch.Tensor] | None:
    """(size, value, gradient) of a step that goes down enough and ends where it is flatter; None where none does."""
    low, high = 0.0, math.inf
    for _ in range(SEARCHES):
        new_value, gradient = objective(point + size * direction)
        if not new_value <= value + 1e-4 * size * slope:  # NaN is not
            high = size
        elif float(gradient @ direction) < 0.9 * slope:
            low = size
        else:
            return size, new_value, gradient
        size = 2 * low if math.isinf(high) else 0.5 * (low + high)
    return None


class NearestNeighbours:
    """Votes of the k training rows of greatest cosine similarity, each of weight exp(similarity / `TEMPERATURE`)."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, classes: int) -> None:
        self._features, self._labels, self._rows, self._classes = features, labels, rows, classes
        norms = [x.norm(dim=1) for _, x in blocks(features, rows)]
        self._inverse = 1 / torch.cat(norms).clamp_min(1e-12)

    def probabilities(self, rows: torch.Tensor, numbers: Sequence[int]) -> dict[int, FloatArray]:
        """For each number of neighbours k the shares of the votes, (M, C)."""
        found: dict[int, list[torch.Tensor]] = {k: [] for k in numbers}
        for _, x in blocks(self._features, rows, QUERY_ROWS):
            similarity, label = self._nearest(x, max(numbers))
            votes = ((similarity - similarity[:, :1]) / TEMPERATURE).cpu().double().exp()  # (M, K), the nearest has 1
            for k in numbers:
                shares = votes.new_zeros(len(x), self._classes).scatter_add_(1, label[:, :k].cpu(), votes[:, :k])
                found[k].append(shares / shares.sum(dim=1, keepdim=True))
        return {k: np.asarray(torch.cat(parts).cpu().numpy()) for k, parts in found.items()}

    def _nearest(self, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity and label of the k nearest training rows of x (M, D), the nearest first, (M, k) each."""
        query = torch.nn.functional.normalize(x, dim=1)
        similarity = query.new_empty(len(query), 0)
        label = self._labels.new_empty(len(query), 0)
        start = 0
        for block, known in blocks(self._features, self._rows):
            here = (query @ known.t()) * self._inverse[start : start + len(block)]
            start += len(block)
            # The best of this block join the best so far, and the best of both stay.
            best, position = here.topk(min(k, len(block)), dim=1)
            label = torch.cat([label, self._labels[block][position]], dim=1)
            similarity = torch.cat([similarity, best], dim=1)
            similarity, position = similarity.topk(min(k, similarity.shape[1]), dim=1)
            label = label.gather(1, position)
        return similarity, label


def choose_neighbours(
    features: torch.Tensor,
    labels: torch.Tensor,
    train_rows: torch.Tensor,
    val_rows: torch.Tensor,
    classes: int,
) -> tuple[NearestNeighbours, Choice]:
    """The number of neighbours with the best weighted F1 on the validation rows; the fewest of equals."""
    numbers = [k for k in NEIGHBOURS if k <= len(train_rows)]
    neighbours = NearestNeighbours(features, labels, train_rows, classes)
    truth = labels[val_rows].cpu().numpy()
    said = neighbours.probabilities(val_rows, numbers)
    tried = {float(k): f1_weighted(truth, said[k].argmax(axis=1), classes) for k in numbers}
    value = max(tried, key=lambda k: tried[k])
    return neighbours, Choice("neighbours", value, tried, "weighted F1 on validation, the greatest")
