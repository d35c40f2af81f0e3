"""Intervals by the bootstrap: whole groups are drawn, class by class, with a seed; undefined replicates are counted.

An interval covers the sampling of the test set for one fitted model. The spread over seeds and over splits is another
thing and stands apart.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.scores import FloatArray, IntArray, Predictions, Scorer

REPLICATES = 2000
LEVEL = 0.95
ROUNDING = 1e-12  # an interval narrower than this has no width
BLOCK_ENTRIES = 2_000_000  # weights held at once: 16 MB, and a few times that while a curve is summed


@dataclass(frozen=True)
class Estimate:
    """A score, its percentile interval, and in how many replicates it was not defined; NaN = not defined.

    The interval is not defined either where all replicates give one value (one group, every row right): a width of
    zero would say that nothing is uncertain.
    """

    value: float
    low: float
    high: float
    undefined: int

    def __format__(self, spec: str) -> str:
        """The value and its interval, each number by the given format."""
        if math.isnan(self.value):
            return "not defined"
        interval = "" if math.isnan(self.low) else f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.value:{spec}}{interval}"

    def __str__(self) -> str:
        return f"{self:.4f}"

    def to_dict(self) -> Any:
        """Plain JSON values; NaN becomes None."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Estimate":
        """The inverse of `to_dict`; KeyError or TypeError where it is none."""
        value, low, high = (_number(values[key]) for key in ("value", "low", "high"))
        return cls(value, low, high, values["undefined"])


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of predictions.

    Args:
        estimates: name -> estimate.
        prevalence: class name -> share of the rows.
        by_fold: name -> its value in each fold, NaN where it is not defined there; empty without folds.
    """

    estimates: dict[str, Estimate]
    rows: int
    units: int
    prevalence: dict[str, float]
    covers: str
    notes: tuple[str, ...]
    by_fold: dict[str, list[float]] = field(default_factory=dict)

    def sd_over_folds(self, name: str) -> float:
        """The standard deviation (of a sample) of a score over the folds in which it is defined; NaN below two."""
        defined = [value for value in self.by_fold.get(name, ()) if not math.isnan(value)]
        return float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        values: dict[str, Any] = plain(self)
        values |= {"scores": values.pop("estimates"), "intervals": values.pop("covers")}
        return {name: value for name, value in values.items() if name != "by_fold" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`; KeyError or TypeError where it is none."""
        return cls(
            {name: Estimate.from_dict(each) for name, each in values["scores"].items()},
            values["rows"],
            values["units"],
            dict(values["prevalence"]),
            values["intervals"],
            tuple(values["notes"]),
            {name: [_number(each) for each in found] for name, found in values.get("by_fold", {}).items()},
        )


def evaluate(predictions: Predictions, *, replicates: int = REPLICATES, seed: int = 0) -> Evaluation:
    """Scores with bootstrap intervals.

    Args:
        replicates: number of bootstrap replicates; 0 gives the scores alone.
        seed: of the draws; the same seed draws the same rows for every model on the same set.
    """
    scorer = Scorer(predictions)
    values = scorer.plain()
    drawn = _replicate_scores([scorer], predictions, replicates, seed)[0]
    groups = predictions.groups
    units = len(predictions.truth) if groups is None else len(np.unique(groups))
    estimates = _estimates(scorer.names, values, drawn)
    return Evaluation(
        estimates=estimates,
        rows=len(predictions.truth),
        units=units,
        prevalence=_prevalence(predictions),
        covers=_covers(predictions, replicates, seed),
        notes=_notes(predictions, estimates if replicates else {}),
        by_fold={} if predictions.folds is None else scorer.by_fold(),
    )


def paired_difference(
    first: Predictions, second: Predictions, *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Estimate]:
    """Scores of the first minus scores of the second on the same rows, with intervals from the same draws.

    Raises:
        ValueError: other truth, classes, groups or folds: nothing is paired then.
    """
    if not np.array_equal(first.truth, second.truth):
        raise ValueError("paired_difference: expected the same rows with the same truth in the same order.")
    for name in ("groups", "folds"):
        if not _equal(getattr(first, name), getattr(second, name)):
            raise ValueError(f"paired_difference: expected the same {name} for both, or none for both.")
    scorers = [Scorer(first), Scorer(second)]
    if scorers[0].names != scorers[1].names:
        raise ValueError("paired_difference: expected the same classes for both.")
    plain = [scorer.plain() for scorer in scorers]
    drawn = _replicate_scores(scorers, first, replicates, seed)
    values = {name: plain[0][name] - plain[1][name] for name in scorers[0].names}
    return _estimates(scorers[0].names, values, drawn[0] - drawn[1])


def _equal(one: npt.NDArray[np.generic] | None, other: npt.NDArray[np.generic] | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def bootstrap_weights(
    truth: npt.NDArray[np.integer], groups: npt.NDArray[np.generic] | None, *, replicates: int, seed: int
) -> Iterator[FloatArray]:
    """Blocks (R, N) of how often each row was drawn, `replicates` rows of weights in all.

    Units are groups, or rows where `groups` is None. Units are drawn with replacement within strata: those of one
    class among themselves; units that hold several classes form a stratum of their own. Multi-label truth is not
    stratified. The draws do not depend on the block size.
    """
    unit_of_row, strata = _units(np.asarray(truth), groups)
    generators = [np.random.default_rng([seed, number]) for number in range(len(strata))]
    unit_count = sum(len(stratum) for stratum in strata)
    block = max(1, BLOCK_ENTRIES // len(unit_of_row))
    for start in range(0, replicates, block):
        rows = min(block, replicates - start)
        counts = np.zeros((rows, unit_count))
        for stratum, generator in zip(strata, generators, strict=True):
            draws = generator.integers(0, len(stratum), size=(rows, len(stratum)))
            draws += np.arange(rows)[:, None] * len(stratum)
            drawn = np.bincount(draws.ravel(), minlength=rows * len(stratum)).reshape(rows, len(stratum))
            counts[:, stratum] = drawn
        yield counts if groups is None else counts[:, unit_of_row]


def _units(
    truth: npt.NDArray[np.integer], groups: npt.NDArray[np.generic] | None
) -> tuple[IntArray, list[npt.NDArray[np.intp]]]:
    """(unit of each row, units of each stratum)."""
    if groups is None:
        unit_of_row = np.arange(len(truth))
        stratum_of_unit = truth if truth.ndim == 1 else np.zeros(len(truth), dtype=np.int64)
    else:
        _, unit_of_row = np.unique(groups, return_inverse=True)
        units = int(unit_of_row.max()) + 1
        stratum_of_unit = np.zeros(units, dtype=np.int64)
        if truth.ndim == 1:
            lowest = np.full(units, np.iinfo(np.int64).max)
            highest = np.full(units, -1)
            np.minimum.at(lowest, unit_of_row, truth)
            np.maximum.at(highest, unit_of_row, truth)
            stratum_of_unit = np.where(lowest == highest, lowest, -1)
    return unit_of_row, [np.flatnonzero(stratum_of_unit == stratum) for stratum in np.unique(stratum_of_unit)]


def _replicate_scores(scorers: list[Scorer], predictions: Predictions, replicates: int, seed: int) -> list[FloatArray]:
    """For each scorer the scores (replicates, names) under the same draws."""
    drawn: list[list[FloatArray]] = [[np.empty((0, len(scorer.names)))] for scorer in scorers]
    for weights in bootstrap_weights(predictions.truth, predictions.groups, replicates=replicates, seed=seed):
        for scorer, blocks in zip(scorers, drawn, strict=True):
            blocks.append(scorer(weights))
    return [np.concatenate(blocks) for blocks in drawn]


def _estimates(names: tuple[str, ...], values: dict[str, float], drawn: FloatArray) -> dict[str, Estimate]:
    estimates = {}
    for column, name in enumerate(names):
        defined = drawn[~np.isnan(drawn[:, column]), column]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (np.nan, np.nan)
        if high - low < ROUNDING:
            low = high = np.nan
        estimates[name] = Estimate(values[name], float(low), float(high), len(drawn) - len(defined))
    return estimates


def _prevalence(predictions: Predictions) -> dict[str, float]:
    truth = np.asarray(predictions.truth)
    if predictions.multi_label:
        shares = truth.mean(axis=0)
    else:
        shares = np.bincount(truth, minlength=len(predictions.class_names)) / len(truth)
    return dict(zip(predictions.class_names, shares.tolist(), strict=True))


def _covers(predictions: Predictions, replicates: int, seed: int) -> str:
    if replicates == 0:
        return "none"
    unit = "rows" if predictions.groups is None else "groups"
    stratified = "" if predictions.multi_label else ", stratified by class"
    models = "of one fitted model" if predictions.folds is None else "of the fitted models, scored within each fold"
    return (
        f"{LEVEL:.0%} percentile bootstrap over {unit}{stratified}, {replicates} replicates, seed {seed}: "
        f"the sampling of the test set {models}, not the spread over seeds or splits"
    )


def _notes(predictions: Predictions, estimates: Mapping[str, Estimate]) -> tuple[str, ...]:
    """What is not defined on these rows, in sentences; `estimates` are those that were drawn for."""
    notes = []
    truth = np.asarray(predictions.truth)
    for index, name in enumerate(predictions.class_names):
        positive = int(((truth[:, index] if predictions.multi_label else truth == index) == 1).sum())
        if positive == 0:
            notes.append(f"class {name} has no row: its AUROC and AUPRC are not defined and left out of means")
        elif positive == len(truth):
            notes.append(f"class {name} has every row: its AUROC is not defined and left out of means")
    flat = [name for name, each in estimates.items() if not math.isnan(each.value) and math.isnan(each.low)]
    if flat:
        notes.append(f"no interval for {', '.join(flat)}: every replicate that defines it gives the same value")
    return tuple(notes)


def plain(value: Any) -> Any:
    """JSON values of numbers, texts, lists, mappings and dataclasses of them; JSON has no NaN, which becomes None."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
