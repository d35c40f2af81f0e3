"""Logistic regressions of all folds, inner folds and penalties of a cohort at once, in float64; by the loss of a task
of times or amounts Cox with ridge, or ridge regression, one after the other by L-BFGS.

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

from gigapath.evaluation.calibration import fit_scale, outputs, target_loss, target_scale
from gigapath.evaluation.labels import Task, kinds_of
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
    device: str = "cpu",
) -> tuple[FloatArray, FloatArray]:
    """Fit on the training slides of every fold, each with the penalty that folds inside them choose.

    Args:
        vectors: (S, D) embeddings, or (E, S, D) several of the same slides.
        labels: (S,) class index; only those of training slides are looked at.
        groups: (S,) patients; none is on both sides of an inner fold.
        trains: rows of the training slides of each fold, which hold every class in at least `INNER_FOLDS` groups.
        penalty: the one to take; None = chosen.

    Returns:
        probabilities (folds, S, C) of all slides by each fit, and the penalties (folds,); (E, folds, ...) of several.
    """
    classes = int(labels[np.concatenate(list(trains))].max()) + 1
    stack = torch.from_numpy(vectors).to(device).reshape(-1, *vectors.shape[-2:])
    entries = stack.shape[0] * len(labels) * (min(max(map(len, trains)), vectors.shape[-1]) + 1)
    step = max(1, BLOCK_ENTRIES // (INNER_FOLDS * entries))
    shares, penalties = [], []
    for start in range(0, len(trains), step):
        block = trains[start : start + step]
        if penalty is None:
            chosen = _choose(stack, labels, groups, block, seed, classes)
        else:
            chosen = np.full((len(block), len(stack)), penalty)
        found = _Fits(stack, labels, block, classes).probabilities(chosen.ravel())
        shares.append(found.reshape(len(block), len(stack), *found.shape[1:]))
        penalties.append(chosen)
    both = np.concatenate(shares).swapaxes(0, 1), np.concatenate(penalties).swapaxes(0, 1)
    return both if vectors.ndim == 3 else (both[0][0], both[1][0])


def _choose(
    stack: Tensor,
    labels: IntArray,
    groups: npt.NDArray[np.str_],
    trains: Sequence[IntArray],
    seed: int,
    classes: int,
) -> FloatArray:
    """The penalties (folds, E) of least cross-entropy on held-out inner folds; from strong to weak, until `PATIENCE`
    weaker ones in a row were no better."""
    rows, held = [], []
    for train in trains:
        part = draw_parts(labels[train], groups[train].tolist(), INNER_FOLDS, seed=seed)
        rows += [train[part != number] for number in range(INNER_FOLDS)]
        held += [train[part == number] for number in range(INNER_FOLDS)]
    fits = _Fits(stack, labels, rows, classes)
    every = np.arange(len(rows) * len(stack)).reshape(len(trains), INNER_FOLDS, len(stack))
    numbers = every.swapaxes(1, 2).reshape(-1, INNER_FOLDS)  # those of an outer fit
    losses = np.full((len(numbers), len(PENALTIES)), np.inf)
    going = np.arange(len(numbers))
    for place, penalty in enumerate(PENALTIES):
        which = numbers[going].ravel()
        shares = fits.probabilities(np.full(len(which), penalty), which)
        tests = [held[fit // len(stack)] for fit in which]
        sums = [cross_entropy(each[test], labels[test]) * len(test) for each, test in zip(shares, tests, strict=True)]
        losses[going, place] = np.reshape(sums, (-1, INNER_FOLDS)).sum(axis=1)
        going = going[losses[going].argmin(axis=1) + PATIENCE >= place + 1]
        if len(going) == 0:
            break
    best: FloatArray = np.asarray(PENALTIES)[losses.argmin(axis=1)]
    return best.reshape(len(trains), len(stack))


class _Fits:
    """Regressions of embeddings (E, S, D) on several sets of their slides, each starting from its fit before; those of
    one set stand together.

    Args:
        rows: of the training slides of each set.
    """

    def __init__(self, stack: Tensor, labels: IntArray, rows: Sequence[IntArray], classes: int) -> None:
        many, slides, width = stack.shape
        shape = (len(rows), many, slides, min(max(map(len, rows)), width) + 1)
        x = torch.zeros(shape, dtype=torch.float64, device=stack.device)
        weight = torch.zeros(*shape[:3], 1, dtype=torch.float64, device=stack.device)
        for number, train in enumerate(rows):
            coordinates = principal_axes(stack, torch.from_numpy(train).to(stack.device))
            x[number, :, :, : coordinates.shape[2]] = coordinates
            weight[number, :, train] = 1 / len(train)
        x[:, :, :, -1] = 1
        self._x, self._weight = x.flatten(0, 1), weight.flatten(0, 1)
        known = torch.from_numpy(np.minimum(labels, classes - 1)).to(stack.device)
        self._truth = torch.nn.functional.one_hot(known, classes).double()
        self._fitted = torch.zeros(len(self._x), shape[3], classes, dtype=torch.float64, device=stack.device)

    def probabilities(self, penalties: FloatArray, which: IntArray | None = None) -> FloatArray:
        """Fit some (or all) of the regressions; probabilities (B, S, C) of all slides."""
        chosen = torch.from_numpy(np.arange(len(self._x)) if which is None else which).to(self._x.device)
        whole = which is None or np.array_equal(which, np.arange(len(self._x)))
        x, weight = (self._x, self._weight) if whole else (self._x[chosen], self._weight[chosen])
        ridge = torch.from_numpy(penalties).to(x.device)[:, None, None].repeat(1, x.shape[2], 1)
        ridge[:, -1] = 0
        fitted = _newton(x, self._truth, weight, ridge, self._fitted[chosen])
        self._fitted[chosen] = fitted
        return np.asarray((x @ fitted).softmax(dim=2).cpu().numpy())


def principal_axes(stack: Tensor, train: Tensor) -> Tensor:
    """All slides (E, S, R) standardised by the training slides, along the principal axes of these."""
    known = stack[:, train]
    mean, deviation = known.mean(dim=1, keepdim=True), known.std(dim=1, correction=0, keepdim=True)
    every = (stack - mean) * torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-300), 0.0)
    known = every[:, train]
    if known.shape[1] >= known.shape[2]:
        axes: Tensor = torch.linalg.eigh(known.mT @ known)[1]
        return every @ axes
    squares, axes = torch.linalg.eigh(known @ known.mT)
    kept = squares > squares.amax(dim=1, keepdim=True) * 1e-12
    inverse = torch.where(kept, squares.clamp_min(1e-300).rsqrt(), 0.0)
    return (every @ known.mT) @ (axes * inverse[:, None, :])


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


def fit_targets(
    task: Task,
    vectors: FloatArray,
    truth: FloatArray,
    groups: npt.NDArray[np.str_],
    trains: Sequence[IntArray],
    seed: int,
) -> tuple[list[FloatArray], list[float]]:
    """Fit on the training slides of every fold, each with the penalty that folds inside them choose by the loss of
    their held-out slides (by Cox each part is a risk set).

    Args:
        vectors: (S, D) embeddings.
        truth: (S, 2) time and event, or (S,) amounts.
        groups: (S,) patients; none is on both sides of an inner fold.
        trains: rows of the training slides of each fold.

    Returns:
        `calibration.outputs` of all slides by each fit, and the penalties.
    """
    found, penalties, kinds = [], [], kinds_of(truth)
    for train in trains:
        part = draw_parts(kinds[train], groups[train].tolist(), INNER_FOLDS, seed=seed)
        inner = [(train[part != number], train[part == number]) for number in range(INNER_FOLDS)]
        fits = [_TargetFit(task, vectors, truth, rows) for rows, _ in inner]
        losses: list[float] = []
        for penalty in PENALTIES:
            held = zip(fits, inner, strict=True)
            losses.append(sum(fit.loss(fit.logits(penalty), rows) for fit, (_, rows) in held))
            if int(np.argmin(losses)) + PATIENCE < len(losses):
                break
        penalties.append(PENALTIES[int(np.argmin(losses))])
        fit = _TargetFit(task, vectors, truth, train)
        logits = fit.logits(penalties[-1]).numpy()
        how = fit_scale(task, fit.scale, logits[train], truth[train])
        found.append(outputs(logits, task, how))
    return found, penalties


class _TargetFit:
    """One regression on some slides, each fit starting from the one before."""

    def __init__(self, task: Task, vectors: FloatArray, truth: FloatArray, rows: IntArray) -> None:
        self._task, self._truth, self._rows = task, truth, rows
        self.scale = target_scale(task, truth[rows])
        self._x = principal_axes(torch.from_numpy(vectors)[None], torch.from_numpy(rows))[0]
        self._weight = torch.zeros(self._x.shape[1], task.outputs, dtype=torch.float64, requires_grad=True)
        self._bias = torch.zeros(task.outputs, dtype=torch.float64, requires_grad=True)

    def loss(self, logits: torch.Tensor, rows: IntArray) -> float:
        """Of some slides, summed."""
        return float(target_loss(logits[rows], self._truth[rows], self._task, self.scale))

    def logits(self, penalty: float) -> torch.Tensor:
        """(S, outputs) for a penalty."""
        solver = torch.optim.LBFGS(
            [self._weight, self._bias],
            max_iter=200,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        x, truth = self._x[self._rows], self._truth[self._rows]

        def closure() -> torch.Tensor:
            solver.zero_grad()
            loss = target_loss(x @ self._weight + self._bias, truth, self._task, self.scale) / len(x)
            loss = loss + 0.5 * penalty * self._weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return self._x @ self._weight + self._bias
