"""Cox with ridge, and ridge regression, on slide embeddings: a linear risk or amount by the loss of the task.

Each minimises the mean loss of its training slides + penalty / 2 * |W|^2 on embeddings standardised by these slides,
along their principal axes, by L-BFGS in float64.

Legend: S slides, D width, R rank of the training slides.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gigapath.evaluation.calibration import fit_scale, outputs, target_loss, target_scale
from gigapath.evaluation.splits import draw_parts
from gigapath.evaluation.task import Task
from gigapath.linear_probe.fits import INNER_FOLDS, principal_axes
from gigapath.linear_probe.heads import PATIENCE, PENALTIES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def fit_targets(
    task: Task,
    vectors: FloatArray,
    truth: FloatArray,
    kinds: IntArray,
    groups: npt.NDArray[np.str_],
    trains: Sequence[IntArray],
    seed: int,
) -> tuple[list[FloatArray], list[float]]:
    """Fit on the training slides of every fold, each with the penalty that folds inside them choose by the loss of
    their held-out slides (by Cox each part is a risk set).

    Args:
        vectors: (S, D) embeddings.
        truth: (S, 2) time and event, or (S,) amounts.
        kinds: (S,) of which inner folds get even shares.
        groups: (S,) patients; none is on both sides of an inner fold.
        trains: rows of the training slides of each fold.

    Returns:
        `calibration.outputs` of all slides by each fit, and the penalties.
    """
    found, penalties = [], []
    for train in trains:
        part = draw_parts(kinds[train], groups[train].tolist(), INNER_FOLDS, seed=seed)
        inner = [(train[part != number], train[part == number]) for number in range(INNER_FOLDS)]
        fits = [_Fit(task, vectors, truth, rows) for rows, _ in inner]
        losses: list[float] = []
        for penalty in PENALTIES:
            held = zip(fits, inner, strict=True)
            losses.append(sum(fit.loss(fit.logits(penalty), rows) for fit, (_, rows) in held))
            if int(np.argmin(losses)) + PATIENCE < len(losses):
                break
        penalties.append(PENALTIES[int(np.argmin(losses))])
        fit = _Fit(task, vectors, truth, train)
        logits = fit.logits(penalties[-1]).numpy()
        how = fit_scale(task, fit.scale, logits[train], truth[train])
        found.append(outputs(logits, task, how))
    return found, penalties


class _Fit:
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
