"""What probe, finetune and evaluate find, in one form: the scores of each model on one test set, and their file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.calibration import Calibration, at_thresholds, calibration_slope
from gigapath.evaluation.intervals import Estimate, Evaluation, evaluate, paired_difference, plain
from gigapath.evaluation.scores import Predictions, average_by_group, confusion_matrix
from gigapath.evaluation.task import Task

RESULTS = "results.json"
FORMAT = 2
TILE_PROBE, SLIDE_PROBE = "probe of tiles", "probe of slides"
FINE_TUNING, FOLD, EVALUATION = "fine-tuning", "fold of fine-tuning", "evaluation of a fitted head"
SITE_ALONE = "site alone"
TERMS = (
    "For research use only, not for diagnosis. A slide encoder and embeddings fall under the terms of the weights that "
    "made them; Prov-GigaPath's are for research."
)


@dataclass(frozen=True)
class Scores:
    """What one model, embedding or control reached on one set of rows.

    Attributes:
        by_unit: "patients", where slides are known to be of patients of one label each, then "slides"; or "tiles". The
            first is the headline. Intervals are drawn by patient, or by slide for tiles, where known.
        by_site: site -> the scores of its slides alone, in the unit of the headline.
        leads: another model -> this one's scores minus its scores, on the same rows with the same draws.
        calibration_slope: NaN where it is not defined, and over the models of several folds.
        at_threshold: label -> threshold, sensitivity and specificity, where there are thresholds.
        confusion: counts, row = true class; None with several labels a row.
        facts: how the model was fitted.
        notes: sentences on what is not defined.
        predictions: of the rows; None where the scores were read from a file.
    """

    by_unit: Mapping[str, Evaluation]
    by_site: Mapping[str, Evaluation] = field(default_factory=dict)
    leads: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    calibration_slope: float = math.nan
    at_threshold: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    predictions: Predictions | None = None

    @property
    def unit(self) -> str:
        """What the headline counts."""
        return next(iter(self.by_unit))

    @property
    def headline(self) -> Evaluation:
        """Over patients where they are known, else over slides or tiles."""
        return self.by_unit[self.unit]

    def __getitem__(self, name: str) -> Estimate:
        return self.headline[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "unit": self.unit,
            "by_unit": {unit: found.to_dict() for unit, found in self.by_unit.items()},
            "by_site": {site: found.to_dict() for site, found in self.by_site.items()},
            "leads": {
                other: {name: lead.to_dict() for name, lead in found.items()} for other, found in self.leads.items()
            },
            "calibration_slope": plain(self.calibration_slope),
            "at_threshold": {label: dict(values) for label, values in self.at_threshold.items()},
            "confusion": self.confusion,
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """The inverse of `to_dict`, but for the predictions; KeyError, TypeError or AttributeError where it is none."""
        slope = values["calibration_slope"]
        return cls(
            {unit: Evaluation.from_dict(found) for unit, found in values["by_unit"].items()},
            {site: Evaluation.from_dict(found) for site, found in values["by_site"].items()},
            {
                other: {name: Estimate.from_dict(lead) for name, lead in found.items()}
                for other, found in values["leads"].items()
            },
            math.nan if slope is None else float(slope),
            values["at_threshold"],
            values["confusion"],
            values["facts"],
            tuple(values["notes"]),
        )


def score(
    predictions: Predictions,
    *,
    unit: str = "slides",
    patients: bool = False,
    sites: npt.NDArray[np.generic] | None = None,
    against: Mapping[str, Predictions] | None = None,
    task: Task | None = None,
    how: Calibration | None = None,
    facts: Mapping[str, Any] | None = None,
    replicates: int,
    seed: int,
) -> Scores:
    """Score what one model said.

    Args:
        predictions: of all rows.
        unit: what a row is.
        patients: the groups are patients, over whom the probabilities of slides are averaged.
        sites: (N,) site of each row, or None.
        against: other models' predictions of the same rows.
        task: with `how` what is decided at thresholds is scored too.
        how: temperature and thresholds.
        facts: how the model was fitted.
        replicates: of the bootstrap; 0 for scores without intervals.
        seed: of the bootstrap.
    """

    def over(some: Predictions) -> Evaluation:
        return evaluate(some, replicates=replicates, seed=seed)

    by_unit = {unit: over(predictions)}
    notes = list(by_unit[unit].notes)
    found: Mapping[str, Mapping[str, float | None]] = {}
    if task is not None and how is not None:
        found = at_thresholds(predictions, task, how)
        if task.setting == "binary" and how.thresholds != (0.5,):
            notes.append(
                "accuracy, balanced accuracy and the confusion matrix take the more probable class; what is predicted, "
                f"and at_threshold, take the threshold {how.thresholds[0]:.3g} fitted on {how.fitted_on}"
            )
    if patients:
        try:
            by_unit = {"patients": over(average_by_group(predictions)), **by_unit}
        except ValueError:
            notes.append("a patient has slides of several labels, so scores are over slides, not over patients")

    def units(some: Predictions) -> Predictions:
        return average_by_group(some) if "patients" in by_unit else some

    leads = {
        name: paired_difference(units(predictions), units(other), replicates=replicates, seed=seed)
        for name, other in (against or {}).items()
    }
    by_site = {}
    for site in () if sites is None else np.unique(sites):
        by_site[str(site)] = over(units(predictions.rows(sites == site)))
    several = predictions.multi_label or predictions.folds is not None
    return Scores(
        by_unit,
        by_site,
        leads,
        math.nan if several else calibration_slope(predictions),
        found,
        None if predictions.multi_label else confusion_matrix(predictions).tolist(),
        facts or {},
        tuple(notes),
        predictions,
    )


@dataclass(frozen=True)
class Curves:
    """Lines over one axis.

    Attributes:
        title: of all panels.
        x: what the axis is, with its unit.
        panels: what y is -> {name of the line: (x, y)}.
        mark: (x, words) of what was kept.
        log: the axis is logarithmic.
    """

    title: str
    x: str
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    mark: tuple[float, str] | None = None
    log: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        panels = [
            {"y": y, "lines": [{"name": name, "x": list(xs), "y": list(ys)} for name, (xs, ys) in lines.items()]}
            for y, lines in self.panels.items()
        ]
        mark = None if self.mark is None else {"x": self.mark[0], "words": self.mark[1]}
        return {"title": self.title, "x": self.x, "panels": panels, "mark": mark, "log": self.log}


@dataclass(frozen=True)
class Results:
    """What a run found, as `results.json` holds it.

    Attributes:
        kind: `TILE_PROBE`, `SLIDE_PROBE`, `FINE_TUNING`, `FOLD` or `EVALUATION`.
        task: name, setting and `classes`.
        scores: model -> its scores on the test set, first the one that the run is about, or what others are compared
            with.
        validation: the first model's scores on the validation set, where they were taken.
        curves: of training or of what was tried, in the form of `Curves.to_dict`; None without any.
        details: what this kind of run has besides: options, data, versions, history and the like.
        notes: sentences for people.
        terms: what the results may be used for.
    """

    kind: str
    task: Mapping[str, Any]
    scores: Mapping[str, Scores]
    validation: Scores | None = None
    curves: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    terms: str = TERMS

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "task": dict(self.task),
            "scores": {name: found.to_dict() for name, found in self.scores.items()},
            "validation": None if self.validation is None else self.validation.to_dict(),
            "curves": self.curves,
            **self.details,
            "notes": list(self.notes),
            "terms": self.terms,
        }


def read_results(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        ValueError: not one that this version writes.
        OSError: it can't be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise KeyError("format")
        return Results(
            values.pop("kind"),
            values.pop("task"),
            {name: Scores.from_dict(found) for name, found in values.pop("scores").items()},
            None if (validation := values.pop("validation")) is None else Scores.from_dict(validation),
            values.pop("curves"),
            notes=tuple(values.pop("notes")),
            terms=values.pop("terms"),
            details=values,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is not in the form that this version writes: run the command again.") from error
