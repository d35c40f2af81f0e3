"""Intervals of scores, and of differences between two models.

Of one fitted model on a test set by the bootstrap: whole groups are drawn, class by class, with a seed; undefined
replicates are counted. It covers the sampling of the test set.

Of cross-validated scores by closed forms over patients: other training patients would have given other models, which
no drawing of fixed predictions shows. Variances are inflated by factors measured on linear probes with 5 folds and 5
repeats (`python -m scripts.bench coverage`). Newcombe 2006 (method 5) for AUROC, Wilson 1927 for shares, Zou and Donner
2008 for their means, Fleiss, Cohen and Everitt 1969 for kappa, and the jackknife over patients for differences and for
all other scores, which are marked as uncalibrated.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.scores import (
    FloatArray,
    IntArray,
    Predictions,
    Scorer,
    confusion_matrix,
    score_range,
    score_words,
)

REPLICATES = 2000
LEVEL = 0.95
Z = 1.959963984540054  # its normal quantile
# By how much cross-validated scores vary more than those of one model on as many patients.
AUROC_INFLATION, AUPRC_INFLATION, SHARE_INFLATION, KAPPA_INFLATION, JACKKNIFE_INFLATION = 1.75, 1.1, 1.35, 1.5, 2.0
# Patients that are right by chance alone join the table of kappa, so that one of a single answer has a variance too.
KAPPA_PATIENTS = 3
ROUNDING = 1e-12  # an interval narrower than this has no width
BLOCK_ENTRIES = 2_000_000  # weights held at once: 16 MB, and a few times that while a curve is summed


@dataclass(frozen=True)
class Estimate:
    """A score or a difference, its interval, and in how many replicates it was not defined; NaN = not defined.

    The interval is not defined either where nothing tells how uncertain it is (all replicates alike, one patient, a
    class of fewer than two): a width of zero would say that nothing is uncertain.

    Attributes:
        p: of the test that a cross-validated difference is 0, two-sided; NaN elsewhere.
    """

    value: float
    low: float
    high: float
    undefined: int
    p: float = math.nan

    def __format__(self, spec: str) -> str:
        """The value and its interval, each number by the given format."""
        if math.isnan(self.value):
            return "not defined"
        interval = "" if math.isnan(self.low) else f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.value:{spec}}{interval}"

    def __str__(self) -> str:
        return f"{self:.4g}" if 0 < abs(self.value) < 5e-5 else f"{self:.4f}"  # errors of small amounts are no zeros

    def to_dict(self) -> Any:
        """Plain JSON values; NaN becomes None, and p is left out where there is none."""
        return {name: value for name, value in plain(self).items() if name != "p" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Estimate":
        """The inverse of `to_dict`; KeyError or TypeError where it is none."""
        value, low, high = (_number(values[key]) for key in ("value", "low", "high"))
        return cls(value, low, high, values["undefined"], _number(values.get("p")))


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of predictions.

    Args:
        estimates: name -> estimate.
        prevalence: class name -> share of the rows.
        units: patients, or whatever stands for itself.
        covers: what the intervals are of, in words.
        by_fold: name -> its value in each fold, NaN where it is not defined there; empty without folds.
        uncalibrated: names of scores whose interval's coverage nobody measured.
    """

    estimates: dict[str, Estimate]
    rows: int
    units: int
    prevalence: dict[str, float]
    covers: str
    notes: tuple[str, ...]
    by_fold: dict[str, list[float]] = field(default_factory=dict)
    uncalibrated: tuple[str, ...] = ()

    def sd_over_folds(self, name: str) -> float:
        """The standard deviation (of a sample) of a score over the folds in which it is defined; NaN below two."""
        defined = [value for value in self.by_fold.get(name, ()) if not math.isnan(value)]
        return float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        values = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        values |= {"scores": values.pop("estimates"), "intervals": values.pop("covers")}
        return {name: value for name, value in values.items() if name not in ("by_fold", "uncalibrated") or value}

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
            tuple(values.get("uncalibrated", ())),
        )


def evaluate(
    predictions: Predictions, *, replicates: int = REPLICATES, seed: int = 0, unit: str | None = None
) -> Evaluation:
    """Scores with intervals: of one model by the bootstrap, of cross-validated predictions (`folds`) over patients.

    Args:
        replicates: number of bootstrap replicates; 0 gives the scores alone.
        seed: of the draws; the same seed draws the same rows for every model on the same set.
        unit: what the groups, or rows without groups, are called; None = by these words.
    """
    scorer = Scorer(predictions)
    values = scorer.plain()
    unit = unit or ("rows" if predictions.groups is None else "groups")
    uncalibrated: tuple[str, ...] = ()
    if predictions.folds is None or replicates == 0:
        drawn = _replicate_scores([scorer], predictions, replicates, seed)[0]
        estimates = _estimates(scorer.names, values, drawn)
        covers = _covers(predictions, replicates, seed, unit)
        notes = _notes(predictions, estimates if replicates else {})
    else:
        units = _Units(predictions)
        limits = closed_limits(predictions, values) if predictions.of_classes else {}
        spread = units.limits_by_jackknife(scorer, values, [name for name in values if name not in limits])
        estimates = {name: Estimate(values[name], *(limits | spread)[name], 0) for name in values}
        unmeasured = [*spread, *(["auprc"] if len(predictions.class_names) > 2 or predictions.multi_label else [])]
        uncalibrated = tuple(name for name in unmeasured if not math.isnan(estimates[name].low))
        covers = units.covers(unit, [name for name in uncalibrated if ":" not in name])
        notes = (*_notes(predictions, {}), *units.notes(unit, estimates))
    return Evaluation(
        estimates=estimates,
        rows=len(predictions.truth),
        units=len(predictions.truth) if predictions.groups is None else len(np.unique(predictions.groups)),
        prevalence=_prevalence(predictions),
        covers=covers,
        notes=notes,
        by_fold={} if predictions.folds is None else scorer.by_fold(),
        uncalibrated=uncalibrated,
    )


def paired_difference(
    first: Predictions, second: Predictions, *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Estimate]:
    """Scores of the first minus scores of the second on the same rows: of two models with intervals from the same
    draws, of cross-validated predictions by the jackknife over patients, with the p of a t test.

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
    values = {name: plain[0][name] - plain[1][name] for name in scorers[0].names}
    if first.folds is None or replicates == 0:
        drawn = _replicate_scores(scorers, first, replicates, seed)
        return _estimates(scorers[0].names, values, drawn[0] - drawn[1])
    units = _Units(first)
    # Where leaving anyone out changes nothing: as wide as what that many patients without a single discordance allow.
    flat = Z**2 / (units.count / 2 + Z**2) if first.of_classes else math.nan
    half = units.half_widths(lambda weights: scorers[0](weights) - scorers[1](weights), flat)
    return {
        name: Estimate(values[name], values[name] - width, values[name] + width, 0, units.p(values[name], width))
        for name, width in zip(values, half.tolist(), strict=True)
    }


def power(difference: float, estimate: Estimate, df: int) -> float:
    """How often a true difference would be found at 5 % with an interval as wide as this one's; NaN without one.

    Args:
        df: degrees of freedom of its t distribution, `degrees_of_freedom`.
    """
    from scipy.stats import nct, t

    half = (estimate.high - estimate.low) / 2
    if math.isnan(half):
        return math.nan
    bound = float(t.ppf((1 + LEVEL) / 2, df))
    shift = difference / half * bound
    return float(nct.sf(bound, df, shift) + nct.cdf(-bound, df, shift))


def degrees_of_freedom(predictions: Predictions) -> int:
    """Of the t distribution of a cross-validated difference: patients of the rarest class less one."""
    return _Units(predictions).df


class _Units:
    """The patients of cross-validated predictions: how many there are of each class, and scores without one of them."""

    def __init__(self, predictions: Predictions) -> None:
        truth = np.asarray(predictions.truth)
        self.unit_of_row, self.strata = _units(truth, predictions.groups)
        self.count = sum(len(stratum) for stratum in self.strata)
        self.folds = len(np.unique(np.asarray(predictions.folds)))
        self.repeats = int(predictions.repeats.max()) + 1
        self.names, self.classes = predictions.class_names, predictions.of_classes
        flags = truth == 1 if truth.ndim == 2 else truth[:, None] == np.arange(len(self.names))
        if not predictions.of_classes:
            self.names = ("with an event", "censored") if predictions.times else ("in all",)
            flags = truth[:, 1:] == [1, 0] if predictions.times else np.ones((len(truth), 1), dtype=bool)
        self.of_class = np.array([len(np.unique(self.unit_of_row[flag])) for flag in flags.T])
        self.rest = np.array([len(np.unique(self.unit_of_row[~flag])) for flag in flags.T])
        # Every class needs two for anything to be estimated; of several labels each stands for itself.
        enough = predictions.multi_label or not predictions.of_classes or bool((self.of_class >= 2).all())
        self.estimable = self.count >= 2 and enough

    @property
    def df(self) -> int:
        return max(1, min(len(stratum) for stratum in self.strata) - 1)

    def half_widths(self, scores: Callable[[FloatArray], FloatArray], flat: float) -> FloatArray:
        """By the jackknife, (scores,): t times the root of the inflated variance; `flat` where that is 0, since a width
        of zero would say that nothing is uncertain; NaN where it can't be told."""
        from scipy.stats import t

        left_out = []
        for start in range(0, self.count, block := max(1, BLOCK_ENTRIES // len(self.unit_of_row))):
            out = np.arange(start, min(start + block, self.count))
            left_out.append(scores((self.unit_of_row != out[:, None]).astype(np.float64)))
        every = np.concatenate(left_out)  # (units, scores)
        variance = np.zeros(every.shape[1])
        for stratum in self.strata:
            here = every[stratum]
            variance += (len(stratum) - 1) / len(stratum) * ((here - here.mean(axis=0)) ** 2).sum(axis=0)
        half = t.ppf((1 + LEVEL) / 2, self.df) * np.sqrt(JACKKNIFE_INFLATION * variance)
        half = np.where(half < ROUNDING, flat, half)
        return np.where(np.isnan(variance) | (not self.estimable), np.nan, half)

    def p(self, value: float, half: float) -> float:
        """Of a difference with an interval of that half width."""
        from scipy.stats import t

        return float(2 * t.sf(abs(value) / half * t.ppf((1 + LEVEL) / 2, self.df), self.df))

    def limits_by_jackknife(
        self, scorer: Scorer, values: Mapping[str, float], names: Sequence[str]
    ) -> dict[str, tuple[float, float]]:
        """name -> limits of scores for which there is no closed form, cut where no score lies."""
        half = dict(zip(scorer.names, self.half_widths(scorer, math.nan).tolist(), strict=True))
        both = {name: (values[name] - half[name], values[name] + half[name]) for name in names}
        return {name: tuple(np.clip(limits, *score_range(name)).tolist()) for name, limits in both.items()}

    def covers(self, unit: str, uncalibrated: Sequence[str]) -> str:
        """What is estimated, on how many patients, and which intervals nobody measured."""
        folds = round(self.folds / self.repeats)
        counts = ", ".join(f"{count:,} {name}" for count, name in zip(self.of_class, self.names, strict=True))
        marked = ", ".join(score_words(name) for name in uncalibrated)
        mix = " of this class mix" if self.classes else ""
        return (
            f"{LEVEL:.0%}, over {self.count:,} {unit} ({counts}), of the mean performance of the procedure, fitted on "
            f"{folds - 1}/{folds} of so many, on new {unit}{mix} ({folds} folds, repeated {self.repeats} "
            "times)" + (f"; coverage not measured (uncalibrated): {marked}" if marked else "")
        )

    def notes(self, unit: str, estimates: Mapping[str, Estimate]) -> list[str]:
        """A sentence on scores whose interval can't be estimated."""
        lacking = [name for name, each in estimates.items() if not math.isnan(each.value) and math.isnan(each.low)]
        if not lacking:
            return []
        words = ", ".join(score_words(name) for name in lacking)
        return [
            f"intervals not estimable for {words}: fewer than two {unit}, in all or of a class, or, without one of "
            "them, the same or not defined"
        ]


def closed_limits(predictions: Predictions, values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """name -> limits of the cross-validated scores (`values`) that have a closed form; NaN where not estimable."""
    units = _Units(predictions)
    classes = len(units.names)
    curves = range(1, 2) if classes == 2 and not predictions.multi_label else range(classes)
    found: dict[str, tuple[float, float]] = {}
    nothing = (math.nan, math.nan)
    for name in ("auroc", "auprc"):
        each = []
        for c in curves:
            key = f"{name}:{units.names[c]}" if f"{name}:{units.names[c]}" in values else name
            positives, negatives = int(units.of_class[c]), int(units.rest[c])
            limits = nothing
            if positives >= 2 and negatives >= 2 and not math.isnan(values[key]):
                if name == "auroc":
                    limits = auroc_limits(values[key], positives, negatives)
                else:
                    limits = share_limits(values[key], positives / AUPRC_INFLATION)
            found[key] = limits
            each.append(limits)
        low, high = np.mean(each, axis=0).tolist()
        found[name] = (low, high)
    if predictions.multi_label:
        return found
    table = np.mean([_shares(predictions.rows(predictions.repeats == r)) for r in range(units.repeats)], axis=0)
    present = np.flatnonzero(table.sum(axis=1))
    recalls = [(table[c, c] / table[c].sum(), units.of_class[c] / SHARE_INFLATION) for c in present]
    found["accuracy"] = share_limits(values["accuracy"], units.count / SHARE_INFLATION)
    found["balanced_accuracy"] = mean_limits(recalls)
    if "kappa_quadratic" in values:
        low, high = kappa_limits(table, units.count)
        found["kappa_quadratic"] = (min(low, values["kappa_quadratic"]), max(high, values["kappa_quadratic"]))
    return found if units.estimable else {name: nothing if ":" not in name else each for name, each in found.items()}


def _shares(predictions: Predictions) -> FloatArray:
    """The confusion matrix (C, C) as shares of the rows."""
    return np.asarray(confusion_matrix(predictions) / len(predictions.truth))


def auroc_limits(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """Newcombe's method 5 with the variance inflated: the t with (value - t)^2 = z^2 c V(t)."""
    from scipy.optimize import brentq

    pairs = (positives + negatives) / 2 - 1

    def excess(t: float) -> float:
        spread = t * (1 - t) * (1 + pairs * ((1 - t) / (2 - t) + t / (1 + t))) / (positives * negatives)
        return (value - t) ** 2 - Z**2 * AUROC_INFLATION * spread

    # The variance is 0 at 0 and at 1, so that a root lies between each of them and the value.
    low = brentq(excess, 0, min(value, 1 - ROUNDING)) if value > 0 else 0.0
    high = brentq(excess, max(value, ROUNDING), 1) if value < 1 else 1.0
    return float(low), float(high)


def share_limits(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share of so many, which need not be a whole number."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_limits(shares: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean of shares of so many each (MOVER): distances to Wilson's limits add up as squares."""
    limits = [share_limits(*each) for each in shares]
    mean = float(np.mean([share for share, _ in shares]))
    below = math.sqrt(sum((share - low) ** 2 for (share, _), (low, _) in zip(shares, limits, strict=True)))
    above = math.sqrt(sum((share - high) ** 2 for (share, _), (_, high) in zip(shares, limits, strict=True)))
    return mean - below / len(shares), mean + above / len(shares)


def kappa_limits(table: FloatArray, count: int) -> tuple[float, float]:
    """Quadratic-weighted kappa's interval by its large-sample variance, on the scale of atanh.

    Args:
        table: (C, C) shares of the patients, row = true class.
    """
    classes = len(table)
    row = table.sum(axis=1)
    table = (count * table + KAPPA_PATIENTS * row[:, None] / classes) / (count + KAPPA_PATIENTS)
    row, column = table.sum(axis=1), table.sum(axis=0)
    steps = np.arange(classes)
    weight = 1 - (steps[:, None] - steps) ** 2 / max(1, (classes - 1) ** 2)
    observed, expected = (weight * table).sum(), row @ weight @ column
    kappa = (observed - expected) / (1 - expected)
    means = (weight @ column)[:, None] + (row @ weight)[None, :]
    terms = table * (weight * (1 - expected) - means * (1 - observed)) ** 2
    spread = terms.sum() - (observed * expected - 2 * expected + observed) ** 2
    variance = max(spread, 0.0) / (count * (1 - expected) ** 4)
    half = Z * math.sqrt(KAPPA_INFLATION * variance) / (1 - kappa**2)
    return math.tanh(math.atanh(kappa) - half), math.tanh(math.atanh(kappa) + half)


def _equal(one: npt.NDArray[np.generic] | None, other: npt.NDArray[np.generic] | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def bootstrap_weights(
    truth: npt.NDArray[np.integer], groups: npt.NDArray[np.generic] | None, *, replicates: int, seed: int
) -> Iterator[FloatArray]:
    """Blocks (R, N) of how often each row was drawn, `replicates` rows of weights in all.

    Units are groups, or rows where `groups` is None. Units are drawn with replacement within strata: those of one
    class among themselves; units that hold several classes form a stratum of their own. Multi-label truth, times and
    amounts are not stratified. The draws do not depend on the block size.
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
    classes = truth.ndim == 1 and np.issubdtype(truth.dtype, np.integer)  # not several labels, nor times or amounts
    if groups is None:
        unit_of_row = np.arange(len(truth))
        stratum_of_unit = truth if classes else np.zeros(len(truth), dtype=np.int64)
    else:
        _, unit_of_row = np.unique(groups, return_inverse=True)
        units = int(unit_of_row.max()) + 1
        stratum_of_unit = np.zeros(units, dtype=np.int64)
        if classes:
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
        # Of a score that rows drawn twice make worse, such as the calibration error, all replicates may lie beside it.
        low, high = np.fmin(low, values[name] + 0 * low), np.fmax(high, values[name] + 0 * high)
        estimates[name] = Estimate(values[name], float(low), float(high), len(drawn) - len(defined))
    return estimates


def _prevalence(predictions: Predictions) -> dict[str, float]:
    truth = np.asarray(predictions.truth)
    if not predictions.of_classes:
        return {"event": float(truth[:, 1].mean())} if predictions.times else {}
    if predictions.multi_label:
        shares = truth.mean(axis=0)
    else:
        shares = np.bincount(truth, minlength=len(predictions.class_names)) / len(truth)
    return dict(zip(predictions.class_names, shares.tolist(), strict=True))


def _covers(predictions: Predictions, replicates: int, seed: int, unit: str) -> str:
    if replicates == 0:
        return "none"
    stratified = "" if predictions.multi_label or not predictions.of_classes else ", stratified by class"
    return (
        f"{LEVEL:.0%} percentile bootstrap over {unit}{stratified}, {replicates} replicates, seed {seed}: "
        "the sampling of the test set of one fitted model, not the spread over seeds or splits"
    )


def _notes(predictions: Predictions, estimates: Mapping[str, Estimate]) -> tuple[str, ...]:
    """What is not defined on these rows, in sentences; `estimates` are those that were drawn for."""
    notes = predictions.notes
    truth = np.asarray(predictions.truth)
    for index, name in enumerate(predictions.class_names if predictions.of_classes else ()):
        positive = int(((truth[:, index] if predictions.multi_label else truth == index) == 1).sum())
        if positive == 0:
            notes.append(f"class {name} has no row: its AUROC and AUPRC are not defined and left out of means")
        elif positive == len(truth):
            notes.append(f"class {name} has every row: its AUROC is not defined and left out of means")
    flat = [name for name, each in estimates.items() if not math.isnan(each.value) and math.isnan(each.low)]
    if flat:
        words = ", ".join(map(score_words, flat))
        notes.append(f"no interval for {words}: every replicate that defines it gives the same value")
    return tuple(notes)


def plain(value: Any) -> Any:
    """JSON values of numbers, texts, lists, mappings and dataclasses of them; JSON has no NaN, which becomes None."""
    if isinstance(value, Evaluation):
        return value.to_dict()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
