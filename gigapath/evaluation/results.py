"""What probe, finetune and evaluate find, in one form: the scores of each model on one test set, the files that they
leave, and the tables that they print.

Files are written once all is known, each whole, `results.json` last: where it stands, the others belong to it.

A locked test set has a file beside its labels with the digest of what was locked, and a line an evaluation: text with a
JSON value a line, only ever appended to. Whoever wants to cheat can delete it; who does not is told how often the set
was looked at, which is what a reader of the score has to know.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.calibration import Calibration, at_thresholds, calibration_slope
from gigapath.evaluation.intervals import Estimate, Evaluation, evaluate, paired_difference, plain
from gigapath.evaluation.labels import Task
from gigapath.evaluation.plots import draw_confusion, draw_scatter, draw_survival, plotting_available, write_events
from gigapath.evaluation.scores import (
    FloatArray,
    Predictions,
    Scorer,
    average_by_group,
    confusion_matrix,
    risk_groups,
    score_words,
)
from gigapath.files import write_bytes_atomic, write_json_atomic
from gigapath.tables import csv_text
from gigapath.text import table_lines

log = logging.getLogger(__name__)

RESULTS = "results.json"
FORMAT = 2
TILE_PROBE, SLIDE_PROBE = "probe of tiles", "probe of slides"
TILE_TUNING = "fine-tuning of a tile encoder"
FINE_TUNING, FOLD, EVALUATION = "fine-tuning", "fold of fine-tuning", "evaluation of a fitted head"
STUDY = "study"
CHANCE, SITE_ALONE = "chance", "site alone"
STRATUM_SCORES = ("auroc", "balanced_accuracy", "auprc")  # of a site, scanner or stain in a printed table
TERMS = (
    "For research use only, not for diagnosis. A slide encoder and embeddings fall under the terms of the weights that "
    "made them; Prov-GigaPath's are for research."
)


@dataclass(frozen=True)
class Scores:
    """What one model, embedding or control reached on one set of rows.

    Attributes:
        by_unit: "patients", where slides are known to be of patients of one label each, then "slides"; or "tiles". The
            first is the headline. Intervals are over patients, or over slides for tiles, where known.
        by_site: site -> the scores of its slides alone, in the unit of the headline.
        by_stratum: likewise "scanner" and "stain" -> what there is of them -> scores.
        leads: another model -> this one's scores minus its scores, on the same rows (with the same draws, or by the
            jackknife over the folds' patients).
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
    by_stratum: Mapping[str, Mapping[str, Evaluation]] = field(default_factory=dict)

    @property
    def strata(self) -> dict[str, Mapping[str, Evaluation]]:
        """Sites, scanners and stains where slides are of several."""
        return {name: found for name, found in {"site": self.by_site, **self.by_stratum}.items() if len(found) > 1}

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
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "predictions"}
        return {"unit": self.unit, **plain(values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """The inverse of `to_dict`, but for the predictions; KeyError, TypeError or AttributeError where it is none."""

        def evaluations(of: Mapping[str, Any]) -> dict[str, Evaluation]:
            return {name: Evaluation.from_dict(found) for name, found in of.items()}

        slope, leads = values["calibration_slope"], values["leads"].items()
        return cls(
            evaluations(values["by_unit"]),
            evaluations(values["by_site"]),
            {other: {name: Estimate.from_dict(lead) for name, lead in found.items()} for other, found in leads},
            math.nan if slope is None else float(slope),
            values["at_threshold"],
            values["confusion"],
            values["facts"],
            tuple(values["notes"]),
            by_stratum={name: evaluations(of) for name, of in values.get("by_stratum", {}).items()},
        )


def score(
    predictions: Predictions,
    *,
    unit: str = "slides",
    patients: bool = False,
    sites: npt.NDArray[np.generic] | None = None,
    strata: Mapping[str, Sequence[str]] | None = None,
    against: Mapping[str, Predictions] | None = None,
    task: Task | None = None,
    how: Calibration | None = None,
    facts: Mapping[str, Any] | None = None,
    replicates: int,
    seed: int,
) -> Scores:
    """Score one model's predictions.

    Args:
        sites: (N,) site of each row, or None.
        strata: "scanner", "stain" -> (N,) what each row has.
        replicates: of the bootstrap; 0 for scores without intervals.
    """

    drawn = "patients" if patients else "slides" if unit == "slides" else None  # what the groups, or else the rows, are

    def over(some: Predictions) -> Evaluation:
        return evaluate(some, replicates=replicates, seed=seed, unit=drawn)

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

    def apart(column: npt.NDArray[np.generic]) -> dict[str, Evaluation]:
        return {str(each) or "not known": over(units(predictions.rows(column == each))) for each in np.unique(column)}

    several = predictions.multi_label or predictions.folds is not None
    return Scores(
        by_unit,
        {} if sites is None else apart(sites),
        leads,
        math.nan if several else calibration_slope(predictions),
        found,
        confusion_matrix(predictions).tolist() if predictions.of_classes and not predictions.multi_label else None,
        facts or {},
        tuple(notes),
        predictions,
        {name: apart(np.asarray(column)) for name, column in (strata or {}).items()},
    )


def score_names(task: Task | None) -> tuple[str, ...]:
    """The scores of models of a task; None = of classes that nothing names yet."""
    task = task or Task("", "binary", ("no", "yes"))
    width = len(task.classes) + len(task.times)
    truths = {"survival": np.zeros((1, 2)), "regression": np.zeros(1), "multi_label": np.zeros((1, width), np.int64)}
    return Scorer(
        Predictions(
            truths.get(task.setting, np.zeros(1, np.int64)),
            np.zeros((1, width)),
            task.classes,
            ordinal=task.ordinal,
            times=task.times,
            horizons=task.horizons,
        )
    ).names


@dataclass(frozen=True)
class Results:
    """What a run found, as `results.json` holds it.

    Attributes:
        kind: `TILE_PROBE`, `TILE_TUNING`, `SLIDE_PROBE`, `FINE_TUNING`, `FOLD`, `EVALUATION` or `STUDY`.
        task: name, setting and `classes`.
        scores: model -> its scores on the test set, first the one that the run is about, or what others are compared
            with.
        validation: the first model's scores on the validation set, where they were taken.
        curves: of training or of what was tried, in the form of `plots.Curves.to_dict`; None without any.
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


def write_results(
    folder: Path,
    results: Results,
    *,
    texts: Mapping[str, str],
    pictures: Mapping[str, Callable[[], bytes]] | None = None,
    events: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] | None = None,
) -> list[str]:
    """Write what a run found into a folder.

    Args:
        texts: other files -> their content.
        pictures: files -> what draws them, where matplotlib is installed.
        events: folders of TensorBoard's curves below `tensorboard` -> curves, where it is installed.

    Returns:
        the names of what was written.
    """
    files = {name: text.encode() for name, text in texts.items()}
    if pictures and not plotting_available():
        log.warning("no pictures: matplotlib is not installed (pip install 'gigapath[train]')")
    elif pictures:
        files |= {name: draw() for name, draw in pictures.items()}
    content, names = results.to_dict(), list(files)
    (folder / RESULTS).unlink(missing_ok=True)  # those of before stay until these are made
    for name, data in files.items():
        write_bytes_atomic(folder / name, data)
    for inner, curves in (events or {}).items():
        if write_events(folder / "tensorboard" / inner, curves) and "tensorboard" not in names:
            names.append("tensorboard")
    write_json_atomic(folder / RESULTS, content)
    return [*names, RESULTS]


@dataclass(frozen=True)
class Predicted:
    """What a head says of slides: a row a slide, and the reasons why others have none."""

    rows: list[dict[str, Any]]
    failed: dict[str, str]


def predictions_csv(
    columns: Mapping[str, Iterable[object]], shares: FloatArray, classes: Sequence[str], *, prefix: str = "p_"
) -> str:
    """Some columns, then the probability of each class.

    Args:
        columns: name -> N cells.
        shares: (N, C) probabilities, or other numbers by another prefix of their columns.
    """
    rows = zip(*columns.values(), strict=True)
    numbers = ([f"{share:.6g}" for share in row] for row in shares)
    header = [*columns, *(f"{prefix}{name}" for name in classes)]
    return csv_text([header, *([*row, *more] for row, more in zip(rows, numbers, strict=True))])


def truth_columns(truth: npt.NDArray[Any], task: Task) -> dict[str, list[str]]:
    """Column -> (S,) cells of the truth: time and event, or the label."""
    if task.setting == "survival":
        times, events = truth.T
        return {"time": [f"{each:.10g}" for each in times], "event": [f"{each:.0f}" for each in events]}
    if task.setting == "regression":
        return {"label": [f"{each:.10g}" for each in truth]}
    names = np.asarray(task.classes)
    return {"label": [";".join(names[np.flatnonzero(row)]) if task.multi_label else str(names[row]) for row in truth]}


def numbers_of(shares: npt.NDArray[np.float64], task: Task) -> dict[str, npt.NDArray[np.float64]]:
    """Column -> (S,) of `calibration.outputs`: probabilities, the amount, or the risk and survival at the horizons."""
    if task.setting == "regression":
        return {"value": shares[:, 0]}
    if task.setting == "survival":
        at = {f"survival_at_{each:g}": shares[:, 1 + task.times.index(each)] for each in task.horizons}
        return {"risk": shares[:, 0], **at}
    return {f"p_{name}": column for name, column in zip(task.classes, shares.T, strict=True)}


def groups_of(found: Scores, task: Task) -> dict[str, Any]:
    """Of survival the Kaplan-Meier curves of slides above and below the median risk of training, in the unit of the
    headline, with the log-rank test; else nothing."""
    if task.setting != "survival" or found.predictions is None:
        return {}
    rows = _first_repeat(found.predictions)
    rows = average_by_group(rows) if found.unit == "patients" else rows
    return {"groups": plain(risk_groups(np.asarray(rows.truth), np.asarray(rows.probabilities)[:, 0]))}


def pictures_of(found: Scores, task: Task, what: str) -> dict[str, Callable[[], bytes]]:
    """The picture of the confusion matrix, none with several labels; of survival the curves of the risk groups, of
    regression what is predicted against the truth."""
    title = f"{task.name}, {what}"
    if task.multi_label or found.predictions is None:
        return {}
    rows = _first_repeat(found.predictions)
    if task.of_classes:
        return {"confusion.png": lambda: confusion_picture(found, task.classes, title)}
    if task.setting == "survival":
        return {"survival.png": lambda: draw_survival(groups_of(found, task)["groups"], f"{title}, {found.unit}")}
    said = np.asarray(rows.probabilities)[:, 0]
    return {"scatter.png": lambda: draw_scatter(np.asarray(rows.truth), said, name=task.classes[0], title=title)}


def _first_repeat(predictions: Predictions) -> Predictions:
    """Each slide once."""
    return predictions.rows(predictions.repeats == 0)


def numbers_csv(columns: Mapping[str, Iterable[object]], numbers: Mapping[str, FloatArray]) -> str:
    """Some columns, then those of `numbers_of`."""
    return predictions_csv(columns, np.stack([*numbers.values()], axis=1), [*numbers], prefix="")


def summary_csv(scores: Mapping[str, Scores]) -> str:
    """A row a model and score: its value with its interval, its values over folds, and its leads over other models."""
    others = list(dict.fromkeys(other for found in scores.values() for other in found.leads))
    header = ["model", "unit", "score", "value", "low", "high", "undefined", "sd_over_folds", "values"]
    rows = [[*header, *(f"minus_{other}{end}" for other in others for end in ("", "_low", "_high"))]]
    for model, found in scores.items():
        for name, estimate in found.headline.estimates.items():
            held = found.headline.by_fold.get(name, [estimate.value])
            values = " ".join("" if math.isnan(value) else f"{value:.6g}" for value in held)
            numbers = [estimate.value, estimate.low, estimate.high]
            leads = [found.leads[other][name] if other in found.leads else None for other in others]
            row = [model, found.unit, name, *map(_cell, numbers), str(estimate.undefined)]
            row += [_cell(found.headline.sd_over_folds(name)), values]
            for lead in leads:
                row += ["", "", ""] if lead is None else [_cell(each) for each in (lead.value, lead.low, lead.high)]
            rows.append(row)
    return csv_text(rows)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def confusion_picture(scores: Scores, classes: Sequence[str], what: str) -> bytes:
    """The confusion matrix of a model on a test set."""
    (unit, rows) = list(scores.by_unit.items())[-1]
    title = f"Confusion matrix: {what}, {rows.rows:,} {unit}\nbalanced accuracy {rows['balanced_accuracy'].value:.3f}"
    return draw_confusion(np.asarray(scores.confusion), classes, title=title)


def score_lines(scores: Mapping[str, Scores], more: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
    """A table for people: a line a score, a column a model, then some columns of cells; scores of single classes are in
    the files."""
    first = next(iter(scores.values())).headline
    table = [["", *scores, *(more or {})]]
    for name in first.estimates:
        if ":" in name:
            continue
        cells = []
        for found in scores.values():
            deviation = found.headline.sd_over_folds(name)
            cells.append(str(found[name]) + ("" if math.isnan(deviation) else f" +- {deviation:.4f}"))
        table.append([score_words(name), *cells, *(column[name] for column in (more or {}).values())])
    folds = ["+-: standard deviation over folds"] if first.by_fold else []
    return [*table_lines(table), *folds, f"intervals: {first.covers}"]


def stratum_lines(scores: Mapping[str, Scores]) -> list[str]:
    """Tables for people of the first model with scores by site, scanner or stain: a line each of them."""
    lines: list[str] = []
    model, found = next(((name, each) for name, each in scores.items() if each.strata), next(iter(scores.items())))
    for stratum, by in found.strata.items():
        names = [name for name in next(iter(by.values())).estimates if ":" not in name]
        shown = ([name for name in STRATUM_SCORES if name in names] or names)[:3]
        rows = [[f"{model} by {stratum}", found.unit, *(score_words(name) for name in shown)]]
        rows += [[each, f"{one.units:,}", *(str(one[name]) for name in shown)] for each, one in by.items()]
        lines += table_lines(rows)
    return lines


LOCK_SUFFIX = ".lock"
LOCK_FORMAT = 1
LOCKED = "locked test set"


@dataclass(frozen=True)
class TestSet:
    """Labels and features that may be locked.

    Attributes:
        labels: the CSV, beside which the lock lies.
        digest: of the labels.
        encoder: that made the features; each encoder's are locked when it is first tested.
        features: digest of the features.
    """

    __test__ = False  # no class of tests, for all its name

    labels: Path
    digest: str
    encoder: str
    features: str

    @property
    def file(self) -> Path:
        """Where the lock lies."""
        return self.labels.with_name(self.labels.name + LOCK_SUFFIX)

    def evaluations(self) -> list[Mapping[str, Any]]:
        """The evaluations so far; none where nothing is locked.

        Raises:
            ValueError: other labels, or other features of this encoder, than were locked; a damaged lock.
        """
        if not self.file.is_file():
            return []
        try:
            first, *tested = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
            held, known = first["labels"], {each["encoder"]: each["features"] for each in reversed(tested)}
            if first["format"] != LOCK_FORMAT or any("head" not in each for each in tested):
                raise KeyError("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.file.name}: expected a lock of a test set, got a damaged one. Restore it."
            ) from error
        for what, before, now in (("labels", held, self.digest), ("features", known.get(self.encoder), self.features)):
            if before not in (None, now):
                raise ValueError(
                    f"{self.labels.name}: its {what} are not those that were locked ({self.file.name}), or the task is "
                    "another. Restore them, or name the new test set otherwise."
                )
        return tested

    def count(self, head: str) -> dict[str, Any]:
        """Lock what is not locked yet, and write that a head was evaluated.

        Args:
            head: SHA-256 of its tensors.

        Returns:
            for results: which evaluation this is, of how many heads, and the digests.
        """
        before, now = self.evaluations(), datetime.now(UTC).isoformat(timespec="seconds")
        if not self.file.exists():
            self._append({"format": LOCK_FORMAT, "labels": self.digest, "locked": now})
        self._append({"head": head, "encoder": self.encoder, "features": self.features, "time": now})
        heads = {each["head"] for each in before} | {head}
        digests = {"labels": self.digest, "features": self.features}
        return {"evaluation": len(before) + 1, "heads": len(heads), **digests}

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:  # one write, so that two at once do not mix
            file.write(json.dumps(line) + "\n")


def lock_words(counted: Mapping[str, Any]) -> str:
    """What `TestSet.count` found, in a sentence."""
    number, heads = counted["evaluation"], counted["heads"]
    if number == 1:
        return f"{LOCKED}: this is the first evaluation on it"
    return f"{LOCKED}: evaluation {number:,} on it, of {heads:,} head{'s' * (heads > 1)}"
