"""The files that a probe, a fine-tuning or an evaluation leaves, and the tables that it prints. Everything is written
once all of it is known, each file whole, `results.json` last: where it stands, the others belong to it."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gigapath.evaluation.plots import draw_confusion, draw_curves, plotting_available, write_events
from gigapath.evaluation.results import RESULTS, Curves, Results, Scores
from gigapath.evaluation.scores import SCORE_WORDS, FloatArray
from gigapath.files import write_bytes_atomic, write_json_atomic
from gigapath.tables import csv_text
from gigapath.text import table_lines

log = logging.getLogger(__name__)


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
        folder: where the files go.
        results: what `results.json` holds.
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


def predictions_csv(columns: Mapping[str, Iterable[object]], said: FloatArray, classes: Sequence[str]) -> str:
    """Some columns, then the probability of each class.

    Args:
        columns: name -> N cells.
        said: (N, C) probabilities.
        classes: C names.
    """
    rows = zip(*columns.values(), strict=True)
    shares = ([f"{share:.6g}" for share in row] for row in said)
    header = [*columns, *(f"p_{name}" for name in classes)]
    return csv_text([header, *([*row, *numbers] for row, numbers in zip(rows, shares, strict=True))])


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


def curves_picture(curves: Curves) -> bytes:
    """The curves of training, or of what was tried."""
    at = np.log10 if curves.log else np.asarray
    panels = {
        y: {name: (at(np.asarray(xs, dtype=float)), ys) for name, (xs, ys) in lines.items()}
        for y, lines in curves.panels.items()
    }
    mark = None if curves.mark is None else (float(at(curves.mark[0])), curves.mark[1])
    return draw_curves(
        panels, x_label=f"log10 of the {curves.x}" if curves.log else curves.x, title=curves.title, mark=mark
    )


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
        table.append([SCORE_WORDS.get(name, name), *cells, *(column[name] for column in (more or {}).values())])
    folds = ["+-: standard deviation over folds"] if first.by_fold else []
    return [*table_lines(table), *folds, f"intervals: {first.covers}"]
