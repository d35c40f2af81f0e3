"""From logits to scores: probabilities, calibration, and the evaluation of a cohort with patients and sites."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation import (
    Evaluation,
    Predictions,
    average_by_group,
    calibration_slope,
    confusion_matrix,
    evaluate,
    evaluate_by_site,
    site_probabilities,
)
from gigapath.evaluation.labels import Labels
from gigapath.evaluation.task import Task

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """How logits become probabilities and decisions.

    Attributes:
        temperature: logits are divided by it.
        thresholds: for a binary task one, for several labels one a label: above it the answer is yes. Classes of a
            multi-class task have none: the most probable one is predicted.
        fitted_on: the set on which they were fitted, or "nothing" for the defaults.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    fitted_on: str = "nothing"


@dataclass(frozen=True)
class CohortResult:
    """The scores of one fitted model on one cohort.

    Attributes:
        slides: one row a slide, in the order of the labels.
        by_slide: scores over slides, intervals drawn by patient where known.
        by_patient: scores over patients, whose slides' probabilities are averaged; None where patients are not known
            or a patient's slides have different labels.
        by_site: scores of each site's slides alone.
        site_alone: scores of a predictor that knows the site only, over the units of `headline`; None without sites or
            with several labels.
        slope: of the calibration.
        at_threshold: label -> threshold, sensitivity and specificity, where there are thresholds.
        notes: sentences on what is not defined.
    """

    slides: Predictions
    by_slide: Evaluation
    by_patient: Evaluation | None = None
    by_site: Mapping[str, Evaluation] = field(default_factory=dict)
    site_alone: Evaluation | None = None
    slope: float = math.nan
    at_threshold: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> Evaluation:
        """Over patients where they are known, else over slides."""
        return self.by_slide if self.by_patient is None else self.by_patient

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        confusion = None if self.slides.multi_label else confusion_matrix(self.slides).tolist()
        return {
            "unit": "slides" if self.by_patient is None else "patients",
            "by_patient": None if self.by_patient is None else self.by_patient.to_dict(),
            "by_slide": self.by_slide.to_dict(),
            "by_site": {site: found.to_dict() for site, found in self.by_site.items()},
            "site_alone": None if self.site_alone is None else self.site_alone.to_dict(),
            "calibration_slope": None if math.isnan(self.slope) else self.slope,
            "at_threshold": {name: dict(values) for name, values in self.at_threshold.items()},
            "confusion": confusion,
            "notes": list(self.notes),
        }


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
    said = probabilities(logits, task, temperature)
    pairs = []
    if task.multi_label:
        pairs = [(truth[:, c] == 1, said[:, c]) for c in range(len(task.classes))]
    elif task.setting == "binary":
        pairs = [(truth == 1, said[:, 1])]
    return Calibration(temperature, tuple(_best_threshold(*pair) for pair in pairs), "val")


def _log_loss(logits: FloatArray, truth: IntArray, task: Task, temperature: float) -> float:
    said = np.clip(probabilities(logits, task, temperature), 1e-12, 1 - 1e-12)
    if task.multi_label:
        return float(-(truth * np.log(said) + (1 - truth) * np.log(1 - said)).mean())
    return float(-np.log(said[np.arange(len(truth)), truth]).mean())


def _best_threshold(positive: npt.NDArray[np.bool_], said: FloatArray) -> float:
    """The middle between the two values around the best cut; one half where a side is missing."""
    if positive.all() or not positive.any():
        return 0.5
    values = np.unique(said)
    cuts = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2])
    gains = [(said[positive] > cut).mean() - (said[~positive] > cut).mean() for cut in cuts]
    return float(cuts[int(np.argmax(gains))])


def threshold_count(task: Task) -> int:
    """How many thresholds a task has: one a label, one where there are two classes, else none."""
    return len(task.classes) if task.multi_label else int(task.setting == "binary")


def decisions(said: FloatArray, task: Task, calibration: Calibration) -> list[str]:
    """What is predicted of each slide in words: a class, or the labels that are above their threshold."""
    if task.multi_label:
        names = np.array(task.classes)
        return [";".join(names[row > np.array(calibration.thresholds)]) for row in said]
    if task.setting == "binary":
        return [task.classes[int(row[1] > calibration.thresholds[0])] for row in said]
    return [task.classes[int(index)] for index in said.argmax(axis=1)]


def evaluate_cohort(
    labels: Labels,
    said: FloatArray,
    task: Task,
    calibration: Calibration,
    *,
    training: Labels | None,
    replicates: int,
    seed: int,
) -> CohortResult:
    """Score what a model said of a cohort.

    Args:
        labels: the cohort's slides.
        said: probabilities (S, C).
        task: the classes.
        calibration: the thresholds.
        training: the slides that trained, for the score of the site alone; None where they are not known.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    patients = None if labels.patients is None else np.asarray(labels.patients)
    slides = Predictions(labels.truth, said, task.classes, groups=patients, ordinal=task.ordinal)
    by_slide = evaluate(slides, replicates=replicates, seed=seed)
    notes = list(by_slide.notes)
    if task.setting == "binary" and calibration.thresholds != (0.5,):
        notes.append(
            "accuracy, balanced accuracy and the confusion matrix take the more probable class; what is predicted, and "
            f"at_threshold, take the threshold {calibration.thresholds[0]:.3g} fitted on {calibration.fitted_on}"
        )
    by_patient = None
    if patients is not None:
        try:
            averaged = average_by_group(slides)
        except ValueError:
            notes.append("a patient has slides of several labels, so scores are over slides, not over patients")
        else:
            by_patient = evaluate(averaged, replicates=replicates, seed=seed)
    by_site: dict[str, Evaluation] = {}
    site_alone = None
    if labels.sites is not None:
        sites = np.asarray(labels.sites)
        by_site = evaluate_by_site(slides, sites, replicates=replicates, seed=seed)
        if training is not None and training.sites is not None and not task.multi_label:
            known = site_probabilities(training.truth, np.asarray(training.sites), sites, len(task.classes))
            blind = Predictions(labels.truth, known, task.classes, groups=patients, ordinal=task.ordinal)
            units = blind if by_patient is None else average_by_group(blind)
            site_alone = evaluate(units, replicates=replicates, seed=seed)
    return CohortResult(
        slides=slides,
        by_slide=by_slide,
        by_patient=by_patient,
        by_site=by_site,
        site_alone=site_alone,
        slope=math.nan if task.multi_label else calibration_slope(slides),
        at_threshold=_at_thresholds(labels.truth, said, task, calibration),
        notes=tuple(notes),
    )


def _at_thresholds(
    truth: IntArray, said: FloatArray, task: Task, calibration: Calibration
) -> dict[str, dict[str, float | None]]:
    columns = range(len(task.classes)) if task.multi_label else [1]
    found = {}
    for threshold, column in zip(calibration.thresholds, columns, strict=False):
        positive = truth[:, column] == 1 if task.multi_label else truth == 1
        yes = said[:, column] > threshold
        found[task.classes[column]] = {
            "threshold": threshold,
            "sensitivity": float(yes[positive].mean()) if positive.any() else None,
            "specificity": float((~yes[~positive]).mean()) if not positive.all() else None,
        }
    return found
