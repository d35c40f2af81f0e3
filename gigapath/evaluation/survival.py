"""Times to an event, some of them censored: losses of risks, scores under row weights, curves and the log-rank test.

A row is followed for `time`; `event` says whether the event ended it or the follow-up. At one time events come before
censorings. A higher risk means an earlier event.

Legend: N rows, R weightings, U distinct times, T times at which survival is predicted, J intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


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


class ProductLimit:
    """The estimator of Kaplan and Meier (1958) under row weights.

    Attributes:
        times: (U,) distinct times, rising.
    """

    def __init__(self, time: FloatArray, event: BoolArray) -> None:
        self._order = np.argsort(time, kind="stable")
        self._event = event[self._order]
        self.times, self._starts = np.unique(time[self._order], return_index=True)

    def counts(self, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(rows under observation, events, censorings) at each time, (R, U) each, for weights (R, N)."""
        ordered = weights[:, self._order]
        total = np.add.reduceat(ordered, self._starts, axis=1)
        events = np.add.reduceat(ordered * self._event, self._starts, axis=1)
        return np.cumsum(total[:, ::-1], axis=1)[:, ::-1], events, total - events

    def survival(self, weights: FloatArray) -> FloatArray:
        """Probability (R, U) of no event up to and at each time."""
        at_risk, events, _ = self.counts(weights)
        return np.asarray(np.cumprod(1 - events / np.where(at_risk > 0, at_risk, 1), axis=1))

    def uncensored(self, weights: FloatArray) -> FloatArray:
        """Probability (R, U) of no censoring up to and at each time; events leave first."""
        at_risk, events, censored = self.counts(weights)
        left = at_risk - events
        return np.asarray(np.cumprod(1 - censored / np.where(left > 0, left, 1), axis=1))

    def at(self, curve: FloatArray, moments: Sequence[float] | FloatArray) -> FloatArray:
        """A curve (R, U) at some times (R, T); 1 before the first."""
        whole = np.concatenate([np.ones((len(curve), 1)), curve], axis=1)
        return np.asarray(whole[:, np.searchsorted(self.times, np.asarray(moments), side="right")])


class SurvivalScores:
    """Scores of one model's risks and survival probabilities as functions of row weights.

    Harrell's C (1982): of the pairs whose order is known the share in which the higher risk fails first, equal risks
    count half. Uno's C (2011) weighs an event before the last horizon by 1 / G(t)^2. Brier's score as Graf et al.
    (1999), integrated from 0 to the last horizon by trapezoids. AUROC at a horizon, of those with an event by then
    against those followed for longer, as Uno et al. (2007) and Hung and Chiang (2010). Observed over expected: the
    Kaplan-Meier share of events at a horizon over the mean predicted one. G(t) is the probability of no censoring up to
    t, from the rows themselves, with their weights.

    Args:
        time: (N,).
        event: (N,).
        risk: (N,).
        survival: (N, T) predicted probability of no event up to each time.
        times: T times, rising, above 0.
        horizons: those of the times at which AUROC and calibration are asked for.
    """

    def __init__(
        self,
        time: FloatArray,
        event: BoolArray,
        risk: FloatArray,
        survival: FloatArray,
        times: Sequence[float],
        horizons: Sequence[float],
    ) -> None:
        self._time, self._event, self._survival = time, event, survival
        self._times, self._horizons = np.asarray(times), np.asarray(horizons)
        self._limit = ProductLimit(time, event)
        self._reached = np.flatnonzero(self._times < time.max())  # at others nothing is known of who was followed on
        tied, known = time[:, None] == time[None, :], time[:, None] < time[None, :]
        # Halves and whole numbers are exact in single precision.
        self._beats = ((risk[:, None] > risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :])).astype(np.float32)
        self._comparable = (event[:, None] & (known | (tied & ~event[None, :]))).astype(np.float32)
        self._concordant = self._comparable * self._beats
        at = [f"{horizon:g}" for horizon in horizons]
        self.names = (
            "harrell_c",
            "uno_c",
            "integrated_brier",
            *(f"auroc_at_{each}" for each in at),
            *(f"observed_over_expected_at_{each}" for each in at),
        )

    def __call__(self, weights: FloatArray) -> FloatArray:
        """Scores (R, len(names)) for weights (R, N), NaN where one is not defined."""
        free = self._limit.uncensored(weights)
        of_row = self._limit.at(free, self._time)
        inverse = np.where(self._event & (of_row > 0), 1 / np.where(of_row > 0, of_row, 1), 0.0)  # (R, N)
        single = weights.astype(np.float32)
        concordant, comparable = single @ self._concordant.T, single @ self._comparable.T
        early = weights * inverse**2 * (self._time < self._horizons[-1])
        columns = [
            _ratio((weights * concordant).sum(axis=1), (weights * comparable).sum(axis=1)),
            _ratio((early * concordant).sum(axis=1), (early * comparable).sum(axis=1)),
            self._integrated_brier(weights, weights * inverse, free),
        ]
        expected, observed = [], self._limit.at(self._limit.survival(weights), self._horizons)
        for number, horizon in enumerate(self._horizons):
            cases = weights * inverse * (self._time <= horizon)
            later = weights * (self._time > horizon)
            wins = (cases * (later.astype(np.float32) @ self._beats.T)).sum(axis=1)
            columns.append(_ratio(wins, cases.sum(axis=1) * later.sum(axis=1)))
            predicted = 1 - self._survival[:, int(np.searchsorted(self._times, horizon))]
            followed = np.where(later.sum(axis=1) > 0, 1 - observed[:, number], np.nan)
            expected.append(_ratio(followed * weights.sum(axis=1), weights @ predicted))
        return np.stack([*columns, *expected], axis=1)

    def _integrated_brier(self, weights: FloatArray, cases: FloatArray, free: FloatArray) -> FloatArray:
        """(R,) of the weights, those of events divided by G at their times, and G (R, U)."""
        if len(self._reached) < len(self._times):
            return np.full(len(weights), np.nan)
        later = self._time[:, None] > self._times
        failed = cases @ (~later * self._survival**2)
        followed = _ratio(weights @ (later * (1 - self._survival) ** 2), self._limit.at(free, self._times))
        scores = _ratio(failed + followed, weights.sum(axis=1, keepdims=True))
        scores = np.concatenate([np.zeros((len(weights), 1)), scores], axis=1)  # at 0 nobody has failed
        steps = np.diff(self._times, prepend=0.0) / self._times[-1]
        return np.asarray((scores[:, 1:] + scores[:, :-1]) @ steps / 2)


def survival_notes(time: FloatArray, event: BoolArray, horizons: Sequence[float] | FloatArray) -> list[str]:
    """Sentences on follow-up that defines no score, or hardly one."""
    events, last = int(event.sum()), float(time.max())
    if events == 0:
        return [f"none of the {len(time):,} rows has an event: no score of survival is defined"]
    notes = ["a single row has an event: no score of survival means much"] if events == 1 else []
    for horizon in horizons:
        if horizon >= last:
            notes.append(
                f"the horizon {horizon:g} is not before the end of the last follow-up ({last:g}): AUROC and "
                "calibration there, and the Brier score up to it, are not defined; take an earlier horizon"
            )
        if not (event & (time <= horizon)).any():
            notes.append(f"no row has an event by the horizon {horizon:g}: AUROC there is not defined")
    return notes


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """The quotient, NaN where the denominator is 0."""
    return np.asarray(numerator / np.where(denominator == 0, np.nan, denominator))


@dataclass(frozen=True)
class GroupCurve:
    """The Kaplan-Meier curve of a group.

    Attributes:
        name: of the group.
        times: (U,) at which the curve steps or a row is censored.
        survival: (U,) from then on.
        censored: (U,) rows censored then.
        marks: times at which rows under observation are counted.
        at_risk: their numbers.
        events: in all.
    """

    name: str
    times: list[float]
    survival: list[float]
    censored: list[int]
    marks: list[float]
    at_risk: list[int]
    events: int


def group_curve(name: str, time: FloatArray, event: BoolArray, marks: Sequence[float]) -> GroupCurve:
    """The Kaplan-Meier curve of some rows."""
    limit, ones = ProductLimit(time, event), np.ones((1, len(time)))
    counted = [int((time >= mark).sum()) for mark in marks]
    censored = limit.counts(ones)[2][0].astype(int).tolist()
    curve = limit.survival(ones)[0].tolist()
    return GroupCurve(name, limit.times.tolist(), curve, censored, list(marks), counted, int(event.sum()))


def risk_groups(truth: FloatArray, risk: FloatArray) -> dict[str, Any]:
    """Rows above and below risk 0, the median one of training: curves, and the log-rank test between them.

    Args:
        truth: (N, 2) time and event.
        risk: (N,).
    """
    (time, event), high = (truth[:, 0], truth[:, 1] == 1), risk > 0
    marks = [float(f"{mark:.3g}") for mark in np.linspace(0, time.max(), 6)[:-1]]
    sides = (("low risk", ~high), ("high risk", high))
    curves = [group_curve(name, time[rows], event[rows], marks) for name, rows in sides if rows.any()]
    statistic, p = log_rank(time, event, high.astype(np.int64))
    return {"curves": curves, "log_rank": statistic, "p": p}


def log_rank(time: FloatArray, event: BoolArray, group: IntArray) -> tuple[float, float]:
    """The log-rank test (Mantel 1966) of equal hazards in groups: (chi-square, p); NaN with one group or no event."""
    from scipy.stats import chi2

    members = np.unique(group)[:, None] == group
    at_risk, events, _ = ProductLimit(time, event).counts(np.concatenate([np.ones((1, len(time))), members * 1.0]))
    if len(members) < 2 or not event.any():
        return float("nan"), float("nan")
    total, failed, shares = at_risk[0], events[0], at_risk[1:] / at_risk[0]
    excess = (events[1:] - failed * shares).sum(axis=1)
    spread = failed * (total - failed) / np.maximum(total - 1, 1)
    covariance = np.diag((spread * shares).sum(axis=1)) - (spread * shares) @ shares.T
    kept = slice(0, len(members) - 1)  # the last group's excess follows from the others'
    statistic = float(excess[kept] @ np.linalg.pinv(covariance[kept, kept]) @ excess[kept])
    return statistic, float(chi2.sf(statistic, len(members) - 1))
