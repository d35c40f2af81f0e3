"""From a model's outputs to probabilities, risks, amounts and decisions, the losses of times and amounts, and how far
probabilities can be taken at their word: the slope. Brier's score and ECE are among the scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.labels import Task
from gigapath.evaluation.scores import BoolArray, FloatArray, IntArray, Predictions

if TYPE_CHECKING:
    from torch import Tensor

_MOST_RISK = 500.0  # whose exponential is finite
FLAT = 1e-7  # curvature of the mean log loss below which it falls for ever: the classes are separated


def calibration_slope(predictions: Predictions) -> float:
    """The slope a of the recalibration softmax(a log p + b) that fits the truth best; b is one offset per class.

    1 = as sure as it should be, below 1 = too sure. For two classes this is the slope of Cox's logistic
    recalibration. Of amounts the slope of the truth on what is predicted. NaN where it is not defined: one class only,
    classes that the probabilities separate perfectly, or survival, whose calibration is scored at horizons.
    """
    from scipy.optimize import minimize

    if not predictions.of_classes:
        said, truth = np.asarray(predictions.probabilities)[:, 0], np.asarray(predictions.truth)
        return float("nan") if truth.ndim == 2 or said.std() == 0 else float(np.polyfit(said, truth, 1)[0])
    if predictions.multi_label:
        raise ValueError("calibration_slope: expected a task with one class a row. Call it for each label.")
    present, truth = np.unique(predictions.truth, return_inverse=True)
    probabilities = np.asarray(predictions.probabilities, dtype=np.float64)[:, present]
    rows, classes = probabilities.shape
    if classes < 2:
        return float("nan")
    logs = np.log(np.clip(probabilities, 1e-12, 1.0))
    # One design for all parameters: x[n, c] = (log p_nc, one-hot of c without its first entry).
    offsets = np.broadcast_to(np.eye(classes)[:, 1:], (rows, classes, classes - 1))
    design = np.concatenate([logs[:, :, None], offsets], axis=2)  # (N, C, P)
    of_truth = design[np.arange(rows), truth]

    def softmax(parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(probabilities (N, C), log loss (N,))."""
        logits = design @ parameters
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1)
        return np.exp(logits) / total[:, None], np.log(total) - logits[np.arange(rows), truth]

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        shares, losses = softmax(parameters)
        return float(losses.mean()), (np.einsum("nc,ncp->np", shares, design) - of_truth).mean(axis=0)

    def curvature(parameters: FloatArray) -> FloatArray:
        shares, _ = softmax(parameters)
        spread = design - np.einsum("nc,ncp->np", shares, design)[:, None, :]
        return np.asarray(np.einsum("nc,ncp,ncq->pq", shares, spread, spread) / rows)

    start = np.eye(classes)[0]
    best = minimize(loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9}).x
    return float(best[0]) if np.linalg.eigvalsh(curvature(best))[0] > FLAT else float("nan")


@dataclass(frozen=True)
class Calibration:
    """How logits become probabilities and decisions.

    Attributes:
        temperature: logits are divided by it.
        thresholds: for a binary task one, for several labels one a label: above it the answer is yes. Classes of a
            multi-class task have none: the most probable one is predicted.
        fitted_on: the set on which they were fitted, or "nothing" for the defaults.
        scale: of a task without classes, from the training slides: of regression mean and standard deviation; of
            survival the median risk, then by Cox the cumulative baseline hazard at the task's times at that risk, or of
            discrete hazards the ends of the intervals.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    fitted_on: str = "nothing"
    scale: tuple[float, ...] = ()


def probabilities(logits: FloatArray, task: Task, temperature: float = 1.0) -> FloatArray:
    """Probabilities (S, C) of logits: each label by itself, or classes that sum to 1."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if task.multi_label:
        upper = 1 / (1 + np.exp(-np.abs(scaled)))  # of the magnitude, so that nothing overflows
        return np.asarray(np.where(scaled >= 0, upper, 1 - upper))
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def default_calibration(task: Task) -> Calibration:
    """Temperature 1 and thresholds of one half."""
    return Calibration(1.0, (0.5,) * threshold_count(task))


def target_scale(task: Task, truth: FloatArray) -> tuple[float, ...]:
    """What the loss needs to know of the training slides: of regression mean and standard deviation, of discrete
    hazards the ends of the intervals; else nothing."""
    if task.setting == "regression":
        return float(truth.mean()), float(truth.std()) or 1.0
    if task.loss == "discrete":
        return tuple(interval_edges(truth[:, 0], truth[:, 1] == 1, task.outputs))
    return ()


def target_loss(logits: "Tensor", truth: npt.NDArray[np.floating], task: Task, scale: tuple[float, ...]) -> "Tensor":
    """The loss of times or amounts summed over slides; by Cox they are one risk set.

    Args:
        logits: (B, outputs) of the slides.
        truth: (B, 2) time and event, or (B,) amounts.
        scale: of `target_scale`.
    """
    import torch
    import torch.nn.functional as F

    from gigapath.devices import send

    target = send(torch.as_tensor(truth, dtype=logits.dtype), logits.device)
    if task.setting == "regression":
        measure = F.huber_loss if task.loss == "huber" else F.mse_loss
        return measure(logits[:, 0], (target - scale[0]) / scale[1], reduction="sum")
    if task.loss == "discrete":
        return discrete_loss(logits, target[:, 0], target[:, 1], scale)
    return cox_loss(logits[:, 0], target[:, 0], target[:, 1])


def fit_scale(task: Task, scale: tuple[float, ...], logits: FloatArray, truth: FloatArray) -> Calibration:
    """How outputs become risks and survival, or amounts, from those of the training slides (S, outputs) and
    `target_scale`."""
    if task.setting == "regression":
        return Calibration(fitted_on="train", scale=scale)
    risk = _risk(logits, scale, task)
    middle = float(np.median(risk))
    if task.loss == "cox":
        scale = tuple(baseline_hazard(risk - middle, truth[:, 0], truth[:, 1] == 1, task.times).tolist())
    return Calibration(fitted_on="train", scale=(middle, *scale))


def outputs(logits: FloatArray, task: Task, how: Calibration) -> FloatArray:
    """What a model says of slides from its outputs: probabilities (S, C), amounts (S, 1), or the risk against the
    median one of training and the survival at the task's times (S, 1 + T)."""
    if task.of_classes:
        return probabilities(logits, task, how.temperature)
    logits = np.asarray(logits, dtype=np.float64)
    if task.setting == "regression":
        return how.scale[0] + how.scale[1] * logits
    middle, *scale = how.scale
    risk = _risk(logits, scale, task)[:, None] - middle
    if task.loss == "discrete":
        return np.concatenate([risk, discrete_survival(logits, scale, task.times)], axis=1)
    return np.concatenate([risk, np.exp(-np.exp(np.minimum(risk, _MOST_RISK)) * np.asarray(scale))], axis=1)


def _risk(logits: FloatArray, edges: Sequence[float], task: Task) -> FloatArray:
    """(S,): the log hazard, or of discrete hazards the share that is expected to have failed, over the intervals."""
    return np.asarray(logits[:, 0] if task.loss == "cox" else -discrete_survival(logits, edges, edges).mean(axis=1))


def fit_calibration(logits: FloatArray, truth: IntArray, task: Task) -> Calibration:
    """The temperature of least log loss, then for each label the threshold of greatest sensitivity + specificity.

    Temperature scaling as in Guo et al. 2017, searched over its logarithm by Brent's bounded method.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda logarithm: _log_loss(logits, truth, task, math.exp(logarithm)),
        bounds=(math.log(0.05), math.log(20.0)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    temperature = math.exp(found.x)
    shares = probabilities(logits, task, temperature)
    pairs = []
    if task.multi_label:
        pairs = [(truth[:, c] == 1, shares[:, c]) for c in range(len(task.classes))]
    elif task.setting == "binary":
        pairs = [(truth == 1, shares[:, 1])]
    return Calibration(temperature, tuple(_best_threshold(*pair) for pair in pairs), "val")


def _log_loss(logits: FloatArray, truth: IntArray, task: Task, temperature: float) -> float:
    shares = np.clip(probabilities(logits, task, temperature), 1e-12, 1 - 1e-12)
    if task.multi_label:
        return float(-(truth * np.log(shares) + (1 - truth) * np.log(1 - shares)).mean())
    return float(-np.log(shares[np.arange(len(truth)), truth]).mean())


def _best_threshold(positive: npt.NDArray[np.bool_], shares: FloatArray) -> float:
    """The middle between the two values around the best cut; one half where a side is missing."""
    if positive.all() or not positive.any():
        return 0.5
    values = np.unique(shares)
    cuts = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2])
    gains = [(shares[positive] > cut).mean() - (shares[~positive] > cut).mean() for cut in cuts]
    return float(cuts[int(np.argmax(gains))])


def threshold_count(task: Task) -> int:
    """How many thresholds a task has: one a label, one where there are two classes, else none."""
    return len(task.classes) if task.multi_label else int(task.setting == "binary")


def scale_count(task: Task) -> int:
    """How many numbers the scale of a task has."""
    of_survival = 1 + (task.outputs if task.loss == "discrete" else len(task.times))
    return {"survival": of_survival, "regression": 2}.get(task.setting, 0)


def decisions(shares: FloatArray, task: Task, calibration: Calibration) -> list[str]:
    """What is predicted of each slide in words: a class, the labels that are above their threshold, an amount, or
    whether the risk is above the median one of training."""
    if task.setting == "regression":
        return [f"{amount:.6g}" for amount in shares[:, 0]]
    if task.setting == "survival":
        return ["high" if risk > 0 else "low" for risk in shares[:, 0]]
    if task.multi_label:
        names = np.array(task.classes)
        return [";".join(names[row > np.array(calibration.thresholds)]) for row in shares]
    if task.setting == "binary":
        return [task.classes[int(row[1] > calibration.thresholds[0])] for row in shares]
    return [task.classes[int(index)] for index in shares.argmax(axis=1)]


def at_thresholds(predictions: Predictions, task: Task, how: Calibration) -> dict[str, Mapping[str, float | None]]:
    """Label -> its threshold, with the sensitivity and specificity there; empty where there are no thresholds."""
    truth, shares = np.asarray(predictions.truth), predictions.probabilities
    found: dict[str, Mapping[str, float | None]] = {}
    for threshold, column in zip(how.thresholds, range(len(task.classes)) if task.multi_label else [1], strict=False):
        positive = truth[:, column] == 1 if task.multi_label else truth == 1
        yes = shares[:, column] > threshold
        found[task.classes[column]] = {
            "threshold": threshold,
            "sensitivity": float(yes[positive].mean()) if positive.any() else None,
            "specificity": float((~yes[~positive]).mean()) if not positive.all() else None,
        }
    return found


def cox_loss(risk: "Tensor", time: "Tensor", event: "Tensor") -> "Tensor":
    """Minus the log partial likelihood of Cox (1972), tied events by Efron (1977), summed over the events.

    With D the d events at one time and R the rows under observation then, an event's share is
    log(sum_R exp r - l / d sum_D exp r) - r, l = 0 .. d - 1.

    Args:
        risk: (N,) log hazards; all rows are one risk set.
        time: (N,) follow-up.
        event: (N,) 1 where the event ended it.
    """
    import torch

    order = torch.argsort(-time, stable=True)
    risk, event = risk[order], event[order].bool()
    _, group, sizes = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    at_risk = torch.logcumsumexp(risk, dim=0)[torch.cumsum(sizes, 0) - 1][group[event]]
    if not event.any():
        return risk.sum() * 0
    failing, group = risk[event], group[event]
    tied = torch.bincount(group, minlength=len(sizes))
    rank = torch.arange(len(group), device=risk.device) - (torch.cumsum(tied, 0) - tied)[group]
    highest = torch.full_like(risk[: len(sizes)], -torch.inf).scatter_reduce(0, group, failing.detach(), "amax")
    sums = torch.zeros_like(highest).scatter_add(0, group, torch.exp(failing - highest[group]))
    of_tied = torch.log(sums[group]) + highest[group]
    share = torch.exp((of_tied - at_risk).clamp(max=0))
    return (at_risk + torch.log1p(-(rank / tied[group]).to(risk.dtype) * share) - failing).sum()


def discrete_loss(logits: "Tensor", time: "Tensor", event: "Tensor", edges: Sequence[float]) -> "Tensor":
    """Minus the log likelihood of hazards in intervals, summed over the rows (Tutz and Schmid 2016, section 3.4).

    An interval survived whole contributes log(1 - h), the one of the event log h; a row censored inside an interval
    says nothing of it.

    Args:
        logits: (N, J) of the hazards of the intervals that end at the edges.
        edges: J rising times; an interval holds its end.
    """
    import torch
    import torch.nn.functional as F

    time = time.contiguous()
    ends = torch.as_tensor(edges, dtype=time.dtype, device=time.device)
    place = torch.bucketize(time, ends)  # (N,), J after the last edge
    survived = torch.arange(len(ends), device=time.device) < torch.where(
        event.bool() | (place == len(ends)), place, torch.bucketize(time, ends, right=True)
    ).unsqueeze(1)
    failing = F.one_hot(place, len(ends) + 1)[:, :-1] * event.unsqueeze(1)
    return -(F.logsigmoid(-logits) * survived + F.logsigmoid(logits) * failing).sum()


def interval_edges(time: FloatArray, event: BoolArray, intervals: int) -> list[float]:
    """Ends of J intervals that hold equal shares of the events, the last being the last event."""
    ends = np.quantile(time[event], np.arange(1, intervals + 1) / intervals, method="inverted_cdf")
    return [float(each) for each in ends]


def discrete_survival(logits: FloatArray, edges: Sequence[float], at: Sequence[float]) -> FloatArray:
    """Survival (N, T) at some times: the product of 1 - h up to each edge, straight lines between edges (Kvamme and
    Borgan 2021), flat after the last."""
    held = np.exp(-np.cumsum(np.logaddexp(0, logits), axis=1))
    curve = np.concatenate([np.ones((len(logits), 1)), held], axis=1)
    ends, last = np.unique([0.0, *edges][::-1], return_index=True)  # of equal edges the last
    kept = curve[:, len(edges) - last]
    return np.stack([np.interp(at, ends, row) for row in kept])


def baseline_hazard(risk: FloatArray, time: FloatArray, event: BoolArray, at: Sequence[float]) -> FloatArray:
    """Cumulative baseline hazard (T,) by Breslow (1974): events over the summed exp(risk) of the rows observed then;
    survival is exp(-hazard x exp(risk))."""
    order = np.argsort(time, kind="stable")
    at_risk = np.cumsum(np.exp(risk[order])[::-1])[::-1][np.searchsorted(time[order], time[event], side="left")]
    return np.array([(1 / at_risk[time[event] <= moment]).sum() for moment in at])
