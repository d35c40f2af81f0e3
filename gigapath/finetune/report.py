"""The files that a run leaves: predictions, results, a summary over folds, pictures; `results.json` comes last."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.evaluation import Evaluation, confusion_matrix
from gigapath.evaluation.labels import Labels
from gigapath.evaluation.plots import draw_confusion, draw_curves, plotting_available, write_events
from gigapath.evaluation.scores import SCORE_WORDS
from gigapath.evaluation.task import Task
from gigapath.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from gigapath.finetune.evaluation import Calibration, CohortResult, FloatArray, decisions
from gigapath.finetune.fitted import TERMS
from gigapath.finetune.training import Epoch

SHOWN = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "auprc",
    "auroc_micro",
    "auprc_micro",
    "kappa_quadratic",
    "brier",
    "ece",
)

log = logging.getLogger(__name__)


def predictions_csv(labels: Labels | None, ids: Sequence[str], said: FloatArray, task: Task, how: Calibration) -> str:
    """One row a slide: id, patient and site where known, truth where known, what is predicted, probabilities."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    patients = labels.patients if labels else None
    sites = labels.sites if labels else None
    names = (["patient_id"] if patients else []) + (["site"] if sites else []) + (["label"] if labels else [])
    writer.writerow(["slide_id", *names, "predicted", *(f"p_{name}" for name in task.classes)])
    for row, (slide_id, predicted) in enumerate(zip(ids, decisions(said, task, how), strict=True)):
        more = ([patients[row]] if patients else []) + ([sites[row]] if sites else [])
        if labels is not None:
            truth = labels.truth[row]
            chosen = (
                [task.classes[i] for i in np.flatnonzero(truth)] if task.multi_label else [task.classes[int(truth)]]
            )
            more.append(";".join(chosen))
        writer.writerow([slide_id, *more, predicted, *(f"{share:.6g}" for share in said[row])])
    return text.getvalue()


def write_cohort(
    folder: Path,
    labels: Labels,
    said: FloatArray,
    task: Task,
    how: Calibration,
    result: CohortResult,
    facts: Mapping[str, Any],
    *,
    what: str,
) -> None:
    """Write predictions.csv, confusion.png and results.json of one model on one cohort.

    Args:
        folder: where they go.
        labels: the S slides that were tested.
        said: probabilities (S, C).
        task: the classes.
        how: what made decisions of the probabilities.
        result: the scores.
        facts: more entries of results.json.
        what: which model and cohort, for the picture's title.
    """
    (folder / "results.json").unlink(missing_ok=True)
    write_text_atomic(folder / "predictions.csv", predictions_csv(labels, labels.slide_ids, said, task, how))
    if not task.multi_label and plotting_available():
        title = f"Confusion matrix: {task.name}, {what}\n{len(labels):,} test slides, the most probable class"
        picture = draw_confusion(confusion_matrix(result.slides), task.classes, title=title)
        write_bytes_atomic(folder / "confusion.png", picture)
    write_json_atomic(folder / "results.json", {"test": result.to_dict(), **facts, "terms": TERMS})


def write_curves(folder: Path, history: Sequence[Epoch], title: str) -> None:
    """Write the learning curves as PNG, and for TensorBoard where it is installed."""
    epochs = [entry.epoch for entry in history]
    if plotting_available():
        losses = {"training, while it goes on": (epochs, [entry.train_loss for entry in history])}
        if all(entry.val_loss is not None for entry in history):
            losses["validation, after the epoch"] = (epochs, [float(entry.val_loss or 0) for entry in history])
        picture = draw_curves(
            {"mean loss of a slide (nats)": losses}, x_label="epoch", title=f"Learning curve: {title}"
        )
        write_bytes_atomic(folder / "curves.png", picture)
    else:
        log.warning("no pictures: matplotlib is not installed (pip install 'gigapath[train]')")
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in asdict(entry).items():
            if name != "epoch" and value is not None:
                curves.setdefault(name, []).append((entry.epoch, value))
    write_events(folder / "tensorboard", curves)


def summary(evaluations: Mapping[str, Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """Rows of mean, standard deviation and values over the folds: for each model and score.

    A score is taken within each fold and averaged, never pooled over the folds' models.
    """
    rows = []
    for model, folds in evaluations.items():
        for name in folds[0].estimates:
            values = [fold[name].value for fold in folds if name in fold.estimates]
            defined = [value for value in values if not math.isnan(value)]
            rows.append(
                {
                    "model": model,
                    "score": name,
                    "mean": float(np.mean(defined)) if defined else None,
                    "sd_over_folds": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
                    "folds_defined": len(defined),
                    "low": None if len(folds) > 1 else _json(folds[0][name].low),
                    "high": None if len(folds) > 1 else _json(folds[0][name].high),
                    "values": [_json(value) for value in values],
                }
            )
    return rows


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value


def summary_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table; values of folds are joined with spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("model", "score", "mean", "sd_over_folds", "folds_defined", "low", "high")
    writer.writerow([*columns, "values"])
    for row in rows:
        values = " ".join("" if value is None else f"{value:.6g}" for value in row["values"])
        writer.writerow([*("" if row[c] is None else row[c] for c in columns), values])
    return text.getvalue()


def lines(evaluations: Mapping[str, Sequence[Evaluation]]) -> list[str]:
    """A table for people: a line a score, a column a model."""
    names = [name for name in SHOWN if name in next(iter(evaluations.values()))[0].estimates]
    table = [["", *evaluations]]
    for name in names:
        cells = []
        for folds in evaluations.values():
            values = [fold[name].value for fold in folds]
            defined = [value for value in values if not math.isnan(value)]
            if not defined:
                cells.append("not defined")
            elif len(folds) == 1:
                cells.append(str(folds[0][name]))
            else:
                spread = f" +- {np.std(defined, ddof=1):.4f}" if len(defined) > 1 else ""
                cells.append(f"{np.mean(defined):.4f}{spread} ({len(defined)} folds)")
        table.append([SCORE_WORDS.get(name, name), *cells])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    first = next(iter(evaluations.values()))[0]
    if any(len(folds) > 1 for folds in evaluations.values()):
        return [*shown, "+-: standard deviation over folds; each fold's results.json has its own intervals"]
    return [*shown, f"intervals: {first.covers}"]
