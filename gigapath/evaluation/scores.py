"""Scores as functions of row weights, so that one preparation serves the point estimate and every bootstrap replicate.

Legend: N rows, C classes (or labels of a multi-label task), R replicates, T thresholds. A weight says how often a row
was drawn; the plain score is the one with all weights 1.

Of survival a row is followed for `time`; `event` says whether the event ended it or the follow-up. At one time events
come before censorings. A higher risk means an earlier event. U distinct times, T times at which survival is predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_ROUNDING = 1e-3  # of a probability in half precision
_LEAST = 1e-15  # probability whose logarithm is taken
_FLAT = 1e-9  # standard deviation of log-odds below which a model says the same of all
CALIBRATION_BINS = 15  # equal widths between 0 and 1, of the confidence in the predicted class
# What the scores are called where people read them.
SCORE_WORDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "auroc_micro": "micro AUROC",
    "auprc_micro": "micro AUPRC",
    "kappa_quadratic": "quadratic-weighted kappa",
    "f1_weighted": "weighted F1",
    "f1_macro": "macro F1",
    "precision_macro": "macro precision",
    "recall_macro": "macro recall",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "log_loss": "log loss",
    "harrell_c": "Harrell's C",
    "uno_c": "Uno's C",
    "integrated_brier": "integrated Brier score",
    "r2": "R2",
    "mae": "mean absolute error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "auroc_at": "AUROC at",
    "observed_over_expected_at": "observed over expected at",
}


def score_range(name: str) -> tuple[float, float]:
    """The least and the greatest value that a score can have; for several classes Brier's score reaches 2."""
    ranges = {
        "brier": (0.0, 2.0),
        "r2": (-math.inf, 1.0),
        "mae": (0.0, math.inf),
        **dict.fromkeys(("kappa_quadratic", "pearson", "spearman"), (-1.0, 1.0)),
    }
    return (0.0, math.inf) if name.startswith("observed_over_expected") else ranges.get(name, (0.0, 1.0))


def score_words(name: str) -> str:
    """What a score is called where people read it; a horizon is the last part of its name."""
    stem, _, horizon = name.rpartition("_")
    return SCORE_WORDS.get(name) or (f"{SCORE_WORDS[stem]} {horizon}" if stem in SCORE_WORDS else name)


@dataclass(frozen=True)
class Predictions:
    """A model's probabilities for a set of rows, and the truth; or risks or amounts, where the truth is float64.

    Args:
        truth: (N,) class index 0 .. C-1; for a multi-label task (N, C) of 0 and 1; of survival (N, 2) time and event,
            of regression (N,) amounts.
        probabilities: (N, C) in [0, 1]; rows sum to 1, but for a multi-label task. Of survival (N, 1 + T) the risk and
            the probability of no event up to each of the times, of regression (N, 1) amounts.
        class_names: C names; of a binary task the second is the positive class.
        groups: (N,) patient or slide of each row, any values; None where every row stands for itself.
        folds: (N,) which fitted model a row was predicted by; those that test a patient once make a repeat, over whose
            rows scores are taken, and averaged over repeats. None = one model.
        ranking: (N, C) what rows of several models are ranked by, such as `rank_by`'s, or amounts less the mean of
            their model's training rows; None = the probabilities.
    """

    truth: npt.NDArray[Any]
    probabilities: npt.NDArray[np.floating]
    class_names: tuple[str, ...]
    groups: npt.NDArray[np.generic] | None = None
    folds: npt.NDArray[np.integer] | None = None
    ordinal: bool = False
    ranking: FloatArray | None = None
    times: tuple[float, ...] = ()
    horizons: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        truth, probabilities = np.asarray(self.truth), np.asarray(self.probabilities)
        rows, classes = len(truth), len(self.class_names) + len(self.times)
        if rows == 0:
            raise ValueError("Predictions: expected at least one row, got none.")
        if probabilities.shape != (rows, classes):
            raise ValueError(
                f"Predictions: expected probabilities of shape ({rows}, {classes}), got {probabilities.shape}."
            )
        if not np.isfinite(probabilities).all():
            row = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0])
            raise ValueError(f"Predictions: expected finite probabilities, got {probabilities[row]} in row {row}.")
        for name in ("groups", "folds"):
            column = getattr(self, name)
            if column is not None and len(column) != rows:
                raise ValueError(f"Predictions: expected {name} of length {rows}, got {len(column)}.")
        if not self.of_classes:
            return
        off = ((probabilities < -_ROUNDING) | (probabilities > 1 + _ROUNDING)).any(axis=1)
        if off.any():
            row = int(np.argmax(off))
            raise ValueError(
                f"Predictions: expected probabilities between 0 and 1, got {probabilities[row]} in row {row}. "
                f"Logits go through a {'sigmoid' if truth.ndim == 2 else 'softmax'} first."
            )
        if truth.ndim == 2 and truth.shape != (rows, classes):
            raise ValueError(f"Predictions: expected truth of shape ({rows}, {classes}), got {truth.shape}.")
        limit = 1 if truth.ndim == 2 else classes - 1
        if truth.min() < 0 or truth.max() > limit:
            raise ValueError(f"Predictions: expected truth between 0 and {limit}, got {truth.min()} to {truth.max()}.")

    @property
    def multi_label(self) -> bool:
        """True where a row can have several labels."""
        return np.ndim(self.truth) == 2 and self.of_classes

    @property
    def of_classes(self) -> bool:
        """True where the truth is classes or labels, not times or amounts."""
        return np.asarray(self.truth).dtype.kind != "f"

    @property
    def notes(self) -> list[str]:
        """Sentences on what the truth leaves undefined; of classes `intervals.evaluate` says it."""
        if not self.times:
            flat = not self.of_classes and np.ptp(np.asarray(self.truth)) == 0
            return ["all rows have the same amount: R2 and correlations are not defined"] if flat else []
        time, event = np.asarray(self.truth).T
        return survival_notes(time, event == 1, self.horizons)

    @property
    def predicted(self) -> IntArray:
        """The most probable class of each row, (N,); the first of equals."""
        return np.asarray(np.argmax(self.probabilities, axis=1), dtype=np.int64)

    def rows(self, chosen: npt.NDArray[np.generic]) -> "Predictions":
        """The same for some rows, given by a mask or by indices."""
        columns: dict[str, Any] = {
            name: getattr(self, name) for name in ("truth", "probabilities", "groups", "folds", "ranking")
        }
        return replace(self, **{name: np.asarray(each)[chosen] for name, each in columns.items() if each is not None})

    @property
    def repeats(self) -> IntArray:
        """(N,) which repeat a row belongs to: a new one begins with the first fold that tests a patient again."""
        rows = len(self.truth)
        groups = np.arange(rows) if self.groups is None else np.asarray(self.groups)
        repeats = np.zeros(rows, dtype=np.int64)
        number, tested = 0, set[Any]()
        for members in [] if self.folds is None else _members(np.asarray(self.folds)):
            here = set(groups[members].tolist())
            if here & tested:
                number, tested = number + 1, set()
            tested |= here
            repeats[members] = number
        return repeats


class Scorer:
    """Everything about a set of predictions that does not depend on the weights, prepared once.

    `names` lists the scores in the order of the columns that `__call__` returns.
    """

    def __init__(self, predictions: Predictions) -> None:
        self._parts = [(rows, _scores_of(predictions.rows(rows))) for rows in _members(predictions.repeats)]
        self._predictions = predictions
        self.names: tuple[str, ...] = self._parts[0][1].names

    def __call__(self, weights: FloatArray) -> FloatArray:
        """Scores (R, len(names)) of R weightings (R, N), NaN where a score is not defined; with folds, the mean over
        the repeats in which it is."""
        if len(self._parts) == 1:
            return self._parts[0][1](weights)
        values = np.stack([part(weights[:, rows]) for rows, part in self._parts])  # (repeats, R, scores)
        defined = ~np.isnan(values)
        total = np.where(defined, values, 0.0).sum(axis=0)
        return _divide(total, defined.sum(axis=0))

    def by_fold(self) -> dict[str, list[float]]:
        """The scores of each fold's rows alone, as those of one model; NaN where one is not defined."""
        whole = self._predictions
        found = [
            Scorer(replace(whole.rows(rows), folds=None, ranking=None)).plain()
            for rows in _members(np.asarray(whole.folds))
        ]
        return {name: [each[name] for each in found] for name in self.names}

    def plain(self) -> dict[str, float]:
        """The scores with all weights 1."""
        rows = sum(len(rows) for rows, _ in self._parts)
        return dict(zip(self.names, self(np.ones((1, rows)))[0].tolist(), strict=True))


def _scores_of(part: Predictions) -> "_ClassScores | _MultiLabelScores | SurvivalScores | _AmountScores":
    if part.of_classes:
        return _MultiLabelScores(part) if part.multi_label else _ClassScores(part)
    truth, said = np.asarray(part.truth), np.asarray(part.probabilities, dtype=np.float64)
    if truth.ndim == 1:
        return _AmountScores(truth, said[:, 0], _ranks(part)[0][:, 0])
    return SurvivalScores(truth[:, 0], truth[:, 1] == 1, said[:, 0], said[:, 1:], part.times, part.horizons)


class _ClassScores:
    """Scores on a task with one class a row; definitions are scikit-learn's, but for AUPRC over several models."""

    def __init__(self, predictions: Predictions) -> None:
        truth, predicted = np.asarray(predictions.truth), predictions.predicted
        probabilities = np.asarray(predictions.probabilities, dtype=np.float64)
        ranks, middle = _ranks(predictions)
        classes = np.arange(len(predictions.class_names))
        self.is_true = (truth[:, None] == classes).astype(np.float64)  # (N, C)
        self.is_predicted = (predicted[:, None] == classes).astype(np.float64)
        self.is_hit = self.is_true * self.is_predicted
        self.squared_step = ((truth - predicted) ** 2).astype(np.float64)  # (N,), for kappa
        # Of a binary task Brier's score is the positive class's squared error, half the sum over both classes.
        self.brier = ((probabilities - self.is_true) ** 2).sum(axis=1) / (2 if len(classes) == 2 else 1)
        confidence = probabilities[np.arange(len(truth)), predicted]
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        self.gap = np.zeros((len(truth), CALIBRATION_BINS))  # confidence - correctness, in the row's bin
        self.gap[np.arange(len(truth)), bins] = confidence - (truth == predicted)
        # A binary task has one curve, the positive class's.
        self.curve_classes = classes[1:] if len(classes) == 2 else classes
        self.curves = [_Curve(truth == c, ranks[:, c], middle=middle) for c in self.curve_classes]
        self.ordinal = predictions.ordinal
        self.squared_steps = (classes[:, None] - classes[None, :]) ** 2.0
        names = ["accuracy", "balanced_accuracy", "f1_weighted", "precision_macro", "recall_macro", "auroc", "auprc"]
        names += ["brier", "ece"] + (["kappa_quadratic"] if self.ordinal else [])
        if len(self.curves) > 1:
            names += [f"{score}:{predictions.class_names[c]}" for score in ("auroc", "auprc") for c in classes]
        self.names = tuple(names)

    def __call__(self, weights: FloatArray) -> FloatArray:
        total = weights.sum(axis=1)
        true, predicted, hits = (weights @ table for table in (self.is_true, self.is_predicted, self.is_hit))  # (R, C)
        recall, precision = _divide(hits, true), _divide(hits, predicted)
        f1 = _divide(2 * hits, true + predicted)
        # Macro means run over the classes that occur, as truth or as prediction; a class never predicted has
        # precision 0, a class that never is true recall 0.
        occurs = (true + predicted) > 0
        precision_macro = _mean_where(np.nan_to_num(precision), occurs)
        recall_macro = _mean_where(np.nan_to_num(recall), occurs)
        means, each = _areas(self.curves, weights)
        columns = [
            _divide(hits.sum(axis=1), total),
            _mean_where(recall, true > 0),
            _divide((np.nan_to_num(f1) * true).sum(axis=1), total),
            precision_macro,
            recall_macro,
            *means,
            _divide(weights @ self.brier, total),
            _divide(np.abs(weights @ self.gap).sum(axis=1), total),
        ]
        if self.ordinal:
            # 1 - observed / expected squared steps; with all classes of the task, present or not.
            expected = _divide(np.einsum("ri,ij,rj->r", true, self.squared_steps, predicted), total)
            columns.append(1 - _divide(weights @ self.squared_step, expected))
        if len(self.curves) > 1:
            columns += each
        return np.stack(columns, axis=1)


class _MultiLabelScores:
    """Scores of one model on a task with several labels a row; a label is predicted above 0.5."""

    def __init__(self, predictions: Predictions) -> None:
        truth = np.asarray(predictions.truth) == 1
        probabilities = np.asarray(predictions.probabilities, dtype=np.float64)
        self.correct = (truth == (probabilities > 0.5)).mean(axis=1)
        self.brier = ((probabilities - truth) ** 2).mean(axis=1)
        entry_rows = np.repeat(np.arange(len(truth)), truth.shape[1])
        ranks, middle = _ranks(predictions)
        self.micro = _Curve(truth.ravel(), probabilities.ravel(), rows=entry_rows, middle=middle)
        self.curves = [_Curve(truth[:, c], ranks[:, c], middle=middle) for c in range(truth.shape[1])]
        names = ["accuracy", "auroc", "auprc", "auroc_micro", "auprc_micro", "brier"]
        names += [f"{score}:{name}" for score in ("auroc", "auprc") for name in predictions.class_names]
        self.names = tuple(names)

    def __call__(self, weights: FloatArray) -> FloatArray:
        total = weights.sum(axis=1)
        means, each = _areas(self.curves, weights)
        columns = [_divide(weights @ self.correct, total), *means, *self.micro(weights).T]
        return np.stack([*columns, _divide(weights @ self.brier, total), *each], axis=1)


class _AmountScores:
    """Scores of predicted amounts: R2 = 1 - squared errors over squared distances from the rows' own mean; correlations
    of what rows are ranked by."""

    names = ("r2", "mae", "pearson", "spearman")

    def __init__(self, truth: FloatArray, said: FloatArray, ranked: FloatArray) -> None:
        self._truth, self._said, self._ranked = truth, said, ranked

    def __call__(self, weights: FloatArray) -> FloatArray:
        total, miss = weights.sum(axis=1), self._said - self._truth
        mean = _divide(weights @ self._truth, total)
        spread = (weights * (self._truth - mean[:, None]) ** 2).sum(axis=1)
        ranks = [self._ranks(weights, values) for values in (self._truth, self._ranked)]
        columns = [
            1 - _divide(weights @ miss**2, spread),
            _divide(weights @ np.abs(miss), total),
            _correlation(weights, self._truth[None], self._ranked[None]),
            _correlation(weights, *ranks),
        ]
        return np.stack(columns, axis=1)

    @staticmethod
    def _ranks(weights: FloatArray, values: FloatArray) -> FloatArray:
        """(R, N) rank of each row among the weighted ones, equal values sharing their mean rank."""
        order = np.argsort(values, kind="stable")
        _, starts, group = np.unique(values[order], return_index=True, return_inverse=True)
        counts = np.add.reduceat(weights[:, order], starts, axis=1)
        middles = np.cumsum(counts, axis=1) - counts / 2
        ranks = np.empty_like(weights)
        ranks[:, order] = middles[:, group]
        return ranks


def _correlation(weights: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
    """(R,) correlation of two sets of values, (R, N) or (1, N), under weights (R, N)."""
    total = weights.sum(axis=1, keepdims=True)
    one, other = (each - _divide((weights * each).sum(axis=1, keepdims=True), total) for each in (first, second))
    squares = (weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1)
    return _divide((weights * one * other).sum(axis=1), np.sqrt(squares))


class _Curve:
    """Area under the ROC curve (ties count half) and average precision of one class against the rest.

    Args:
        positive: (M,) bool.
        scores: (M,), higher = more likely positive.
        rows: (M,) which row's weight an entry has; None = its own.
        middle: precision is taken at the middle of each threshold's rows, (tp - 1/2) / (rank - 1/2), which is less
            too high in small cohorts.
    """

    def __init__(
        self,
        positive: npt.NDArray[np.bool_],
        scores: FloatArray,
        rows: IntArray | None = None,
        *,
        middle: bool = False,
    ) -> None:
        self.half = 0.5 if middle else 0.0
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        self.rows = order if rows is None else rows[order]
        self.positive = positive[order].astype(np.float64)
        self.starts = np.flatnonzero(np.concatenate([[True], falling[1:] != falling[:-1]]))
        self.tied = len(self.starts) < len(falling)

    def __call__(self, weights: FloatArray) -> FloatArray:
        """(R, 2): AUROC and average precision for weights (R, N); NaN where a side has no weight."""
        everyone = weights[:, self.rows]
        positives = everyone * self.positive
        if self.tied:
            everyone = np.add.reduceat(everyone, self.starts, axis=1)  # (R, T)
            positives = np.add.reduceat(positives, self.starts, axis=1)
        above = np.cumsum(everyone, axis=1) - self.half * everyone
        hits = np.cumsum(positives, axis=1)
        negatives = np.subtract(everyone, positives, out=everyone)
        # A negative is beaten by the positives above it, and half by those on its threshold.
        wins = np.einsum("rt,rt->r", negatives, hits - 0.5 * positives)
        precision = np.divide(hits - self.half * positives, above, out=above, where=above > 0)
        average_precision = np.einsum("rt,rt->r", positives, precision)
        positive_total = hits[:, -1]
        negative_total = negatives.sum(axis=1)
        return np.stack(
            [_divide(wins, positive_total * negative_total), _divide(average_precision, positive_total)], axis=1
        )


def _areas(curves: Sequence[_Curve], weights: FloatArray) -> tuple[list[FloatArray], list[FloatArray]]:
    """Mean AUROC and mean average precision (R,) of the curves that are defined, and all AUROC, then all precisions."""
    both = [np.stack(each, axis=1) for each in zip(*(curve(weights).T for curve in curves), strict=True)]
    return [_mean_where(each, ~np.isnan(each)) for each in both], [area for each in both for area in each.T]


def _members(codes: npt.NDArray[np.integer]) -> list[npt.NDArray[np.intp]]:
    """The rows of each code, in the order of the codes."""
    return [np.flatnonzero(codes == code) for code in np.unique(codes)]


def _ranks(predictions: Predictions) -> tuple[FloatArray, bool]:
    """What the curves rank rows by, (N, C), and whether rows are of several models."""
    several = predictions.folds is not None
    ranking = predictions.ranking if several and predictions.ranking is not None else predictions.probabilities
    return np.asarray(ranking, dtype=np.float64), several


def log_odds(probabilities: FloatArray, *, multi_label: bool = False) -> FloatArray:
    """Log-odds (N, C) of each class against the others together, or of each label."""
    shares = np.asarray(probabilities, dtype=np.float64)
    # The others are added up: 1 - p would lose what is left beside a p near 1.
    others = 1 - shares if multi_label else shares @ (1 - np.eye(shares.shape[1]))
    return np.asarray(np.log(np.maximum(shares, _LEAST)) - np.log(np.maximum(others, _LEAST)))


def scale_of(said: FloatArray, truth: npt.NDArray[Any]) -> FloatArray:
    """A fitted model's own scale (C, 2): of its training rows' log-odds the midpoint of the two sides' means, and the
    standard deviation, 0 where they do not differ. Of amounts their mean and 1; risks have 0 and 1, since they are
    against the median one of training as they are.

    Args:
        said: (N, C) probabilities of the training rows; of amounts and risks not looked at.
        truth: (N,) or (N, C) of them.
    """
    truth = np.asarray(truth)
    if truth.dtype.kind == "f":
        return np.array([[truth.mean() if truth.ndim == 1 else 0.0, 1.0]])
    odds = log_odds(said, multi_label=truth.ndim == 2)
    found = []
    for c, values in enumerate(odds.T):
        positive = truth[:, c] == 1 if truth.ndim == 2 else truth == c
        sides = [values[side].mean() for side in (positive, ~positive) if side.any()]
        deviation = values.std()
        found.append([np.mean(sides), deviation if deviation > _FLAT else 0.0])
    return np.asarray(found)


def rank_by(said: FloatArray, scale: FloatArray, *, multi_label: bool = False, of_classes: bool = True) -> FloatArray:
    """Log-odds (N, C), or amounts or risks (N, 1), on the model's own scale, on which rows of several models can be
    ranked together; 0 where the model tells nothing apart.

    High amounts among the rows held out leave a low mean to train on: counted from that mean, models that know nothing
    correlate with nothing.
    """
    middle, deviation = scale.T
    inverse = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1.0), 0.0)
    values = log_odds(said, multi_label=multi_label) if of_classes else said[:, :1]
    return np.asarray((values - middle) * inverse)


def macro_curves(truth: IntArray, outputs: FloatArray) -> tuple[float, float]:
    """(AUROC, average precision) of each class against the rest by its own raw output, averaged over all classes.

    For two classes too, where `Scorer` takes the positive class's softmax: raw logits of two classes need not rank the
    rows as their difference does. So published tables of linear probes are made.

    Args:
        truth: (N,) class index.
        outputs: (N, C), such as logits; higher = more likely.

    Returns:
        NaN where a class has no row or every row.
    """
    ones = np.ones((1, len(truth)))
    curves = [_Curve(truth == c, outputs[:, c])(ones)[0] for c in range(outputs.shape[1])]
    auroc, average_precision = np.mean(curves, axis=0)
    return float(auroc), float(average_precision)


def confusion_matrix(predictions: Predictions) -> IntArray:
    """Counts (C, C): row = true class, column = predicted class."""
    classes = len(predictions.class_names)
    cells = np.asarray(predictions.truth) * classes + predictions.predicted
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def f1_weighted(truth: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer], classes: int) -> float:
    """F1 of each class, weighted by how often it is true; for a quick look during training."""
    true, guessed = np.bincount(truth, minlength=classes), np.bincount(predicted, minlength=classes)
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    f1 = _divide(2.0 * hits.astype(np.float64), true + guessed)
    return float((np.nan_to_num(f1) * true).sum() / len(truth))


def _divide(numerator: FloatArray, denominator: npt.NDArray[np.generic]) -> FloatArray:
    """The quotient, NaN where the denominator is 0."""
    out = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)
    return out


def _mean_where(values: FloatArray, where: npt.NDArray[np.bool_]) -> FloatArray:
    """Mean over the last axis of the entries that count, NaN where none does."""
    return _divide(np.where(where, values, 0.0).sum(axis=-1), where.sum(axis=-1))


def average_by_group(predictions: Predictions) -> Predictions:
    """One row per group (and fold): the probabilities, and the ranking, averaged over its rows.

    Raises:
        ValueError: a group holds rows of different truth, so that it has none itself.
    """
    if predictions.groups is None:
        return predictions
    groups = np.asarray(predictions.groups)
    _, code = np.unique(groups, return_inverse=True)
    if predictions.folds is not None:
        _, fold_code = np.unique(np.asarray(predictions.folds), return_inverse=True)
        code = code * (int(fold_code.max()) + 1) + fold_code
    _, first, code = np.unique(code, return_index=True, return_inverse=True)
    truth = np.asarray(predictions.truth)
    mixed = np.flatnonzero((truth != truth[first][code]).reshape(len(truth), -1).any(axis=1))
    if len(mixed):
        raise ValueError(
            f"average_by_group: expected one label per group, got several in {groups[mixed[0]]!s}. "
            "Evaluate its rows one by one."
        )

    def mean(values: npt.NDArray[np.floating]) -> FloatArray:
        sums = np.zeros((len(first), values.shape[1]))
        np.add.at(sums, code, np.asarray(values, dtype=np.float64))
        return np.asarray(sums / np.bincount(code)[:, None])

    ranking = None if predictions.ranking is None else mean(predictions.ranking)
    return replace(predictions.rows(first), probabilities=mean(predictions.probabilities), ranking=ranking)


def site_probabilities(
    train_truth: npt.NDArray[np.integer],
    train_sites: npt.NDArray[np.generic],
    sites: npt.NDArray[np.generic],
    classes: int,
) -> FloatArray:
    """The prediction of who sees the site alone: the class shares of each site's training rows, (N, classes).

    Truth is the class index of each row, or (N, classes) of 0 and 1.

    A site without training rows gets the shares of all of them. Scored like a model, this is what a model reaches
    that has learned nothing but where a slide comes from.
    """
    train_truth, train_sites, sites = np.asarray(train_truth), np.asarray(train_sites), np.asarray(sites)
    out = prior_probabilities(train_truth, len(sites), classes)
    for site in np.unique(train_sites):
        here = train_truth[train_sites == site]
        out[sites == site] = prior_probabilities(here, int((sites == site).sum()), classes)
    return out


def prior_probabilities(train_truth: npt.NDArray[np.integer], rows: int, classes: int) -> FloatArray:
    """The prediction of who sees nothing: the class shares of training for every row, (rows, classes)."""
    truth = np.asarray(train_truth)
    flags = truth if truth.ndim == 2 else np.eye(classes)[truth]
    return np.tile(flags.mean(axis=0), (rows, 1))


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
            _divide((weights * concordant).sum(axis=1), (weights * comparable).sum(axis=1)),
            _divide((early * concordant).sum(axis=1), (early * comparable).sum(axis=1)),
            self._integrated_brier(weights, weights * inverse, free),
        ]
        expected, observed = [], self._limit.at(self._limit.survival(weights), self._horizons)
        for number, horizon in enumerate(self._horizons):
            cases = weights * inverse * (self._time <= horizon)
            later = weights * (self._time > horizon)
            wins = (cases * (later.astype(np.float32) @ self._beats.T)).sum(axis=1)
            columns.append(_divide(wins, cases.sum(axis=1) * later.sum(axis=1)))
            predicted = 1 - self._survival[:, int(np.searchsorted(self._times, horizon))]
            followed = np.where(later.sum(axis=1) > 0, 1 - observed[:, number], np.nan)
            expected.append(_divide(followed * weights.sum(axis=1), weights @ predicted))
        return np.stack([*columns, *expected], axis=1)

    def _integrated_brier(self, weights: FloatArray, cases: FloatArray, free: FloatArray) -> FloatArray:
        """(R,) of the weights, those of events divided by G at their times, and G (R, U)."""
        if len(self._reached) < len(self._times):
            return np.full(len(weights), np.nan)
        later = self._time[:, None] > self._times
        failed = cases @ (~later * self._survival**2)
        followed = _divide(weights @ (later * (1 - self._survival) ** 2), self._limit.at(free, self._times))
        scores = _divide(failed + followed, weights.sum(axis=1, keepdims=True))
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
    if not (event & (time < max(horizons))).any():
        notes.append(f"no row has an event before the last horizon {max(horizons):g}: Uno's C is not defined")
    return notes


def group_curve(name: str, time: FloatArray, event: BoolArray, marks: Sequence[float]) -> dict[str, Any]:
    """The Kaplan-Meier curve of some rows: `times` (U,) at which it steps or a row is censored, `survival` (U,) from
    then on, `censored` (U,) rows then, rows `at_risk` at the `marks`, and `events` in all."""
    limit, ones = ProductLimit(time, event), np.ones((1, len(time)))
    return {
        "name": name,
        "times": limit.times.tolist(),
        "survival": limit.survival(ones)[0].tolist(),
        "censored": limit.counts(ones)[2][0].astype(int).tolist(),
        "marks": list(marks),
        "at_risk": [int((time >= mark).sum()) for mark in marks],
        "events": int(event.sum()),
    }


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
