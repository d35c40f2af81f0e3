"""The files that a probe of slides leaves: one table with paired differences, predictions, a picture."""

import csv
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gigapath
from gigapath.evaluation.plots import draw_intervals, plotting_available
from gigapath.files import write_bytes_atomic, write_json_atomic
from gigapath.linear_probe.report import TERMS
from gigapath.linear_probe.slides import BASELINE, EmbeddingScore, SlideProbe

TABLE_SCORES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "auprc": "AUPRC",
    "f1_weighted": "weighted F1",
}

log = logging.getLogger(__name__)


def write_slide_report(out: Path, probe: SlideProbe) -> list[str]:
    """Write all files of a probe of slides into a folder, `results.json` last; returns their names."""
    files = {"summary.csv": _summary_csv(probe).encode(), "predictions.csv": _predictions_csv(probe).encode()}
    if plotting_available():
        files["comparison.png"] = _comparison(probe)
    else:
        log.warning("no pictures: matplotlib is not installed (pip install 'gigapath[train]')")
    results, content = out / "results.json", to_json(probe)
    results.unlink(missing_ok=True)  # those of before stay until these are made, and none is called whole too early
    for name, data in files.items():
        write_bytes_atomic(out / name, data)
    write_json_atomic(results, content)
    return [*files, "results.json"]


def to_json(probe: SlideProbe) -> dict[str, Any]:
    """Everything about a probe as plain JSON values."""
    return {
        "task": {
            "classes": list(probe.data.classes),
            **({"positive_class": probe.data.classes[1]} if len(probe.data.classes) == 2 else {}),
            "auprc_baseline": "the prevalence",
        },
        "embeddings": {name: _score_json(score) for name, score in probe.scores.items()},
        "controls": {name: _score_json(score) for name, score in probe.controls.items()},
        "chosen": {"what": "penalty", "on": "folds inside the training slides of each fit, by cross-entropy"},
        "differences": f"each embedding minus {BASELINE}, on the same patients, folds and bootstrap draws",
        "data": probe.data.facts,
        "options": probe.options,
        "versions": {"implementation": gigapath.__implementation__, "package_version": gigapath.__version__},
        "notes": list(probe.notes),
        "terms": TERMS,
    }


def slide_summary_lines(probe: SlideProbe) -> Iterator[str]:
    """The table for a person, line by line."""
    data = probe.data
    groups = f" of {data.facts['groups']:,} groups ({data.group_column})" if data.group_column else ""
    counts = ", ".join(f"{count:,} {name}" for name, count in data.facts["slides_of_class"].items())
    positive = f" (positive: {data.classes[1]})" if len(data.classes) == 2 else ""
    yield f"{data.facts['slides']:,} slides{groups}: {counts}{positive}"
    rows = [["embedding", "width", *TABLE_SCORES.values(), f"AUROC against {BASELINE}"]]
    for name, score in (*probe.scores.items(), *probe.controls.items()):
        lead = "" if score.lead is None else f"{score.lead['auroc']:+.4f}"
        shown = [str(score.main[metric]) for metric in TABLE_SCORES]
        rows.append([name, str(score.width or ""), *shown, lead])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"intervals: {next(iter(probe.scores.values())).main.covers}"
    yield from (f"note: {note}" for note in probe.notes)


def _score_json(score: EmbeddingScore) -> dict[str, Any]:
    lead = None
    if score.lead is not None:
        lead = {
            name: {"value": _number(each.value), "low": _number(each.low), "high": _number(each.high)}
            for name, each in score.lead.items()
        }
    return {
        "width": score.width,
        "patients": None if score.by_patient is None else score.by_patient.to_dict(),
        "slides": score.by_slide.to_dict(),
        f"minus_{BASELINE}": lead,
        "sites": {site: evaluation.to_dict() for site, evaluation in score.by_site.items()},
        "penalties": list(score.penalties),
    }


def _summary_csv(probe: SlideProbe) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "embedding",
            "unit",
            "score",
            "value",
            "low",
            "high",
            "undefined",
            "difference",
            "difference_low",
            "difference_high",
        ]
    )
    for name, score in (*probe.scores.items(), *probe.controls.items()):
        unit = "slides" if score.by_patient is None else "patients"
        for metric, estimate in score.main.estimates.items():
            lead = None if score.lead is None else score.lead[metric]
            difference = ["", "", ""] if lead is None else [lead.value, lead.low, lead.high]
            writer.writerow(
                [name, unit, metric, estimate.value, estimate.low, estimate.high, estimate.undefined, *difference]
            )
    return text.getvalue()


def _predictions_csv(probe: SlideProbe) -> str:
    """One row per slide, fit and embedding; `fold` counts the fits through, over folds and repeats."""
    data = probe.data
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    group = [data.group_column] if data.group_column else []
    writer.writerow(["slide_id", *group, "embedding", "fold", "label", *(f"p_{name}" for name in data.classes)])
    for name, score in probe.scores.items():
        folds = np.asarray(score.predictions.folds).tolist()
        for row, fold, said in zip(probe.rows.tolist(), folds, score.predictions.probabilities, strict=True):
            patient = [str(data.groups[row])] if group else []
            shares = [f"{share:.6g}" for share in said]
            writer.writerow([data.ids[row], *patient, name, fold, data.classes[data.labels[row]], *shares])
    return text.getvalue()


def _comparison(probe: SlideProbe) -> bytes:
    rows = {}
    for name, score in (*probe.scores.items(), *probe.controls.items()):
        estimate = score.main["auroc"]
        rows[name] = (estimate.value, estimate.low, estimate.high)
    unit = "patients" if next(iter(probe.scores.values())).by_patient is not None else "slides"
    return draw_intervals(
        rows,
        x_label=f"AUROC, mean over folds, with 95 % interval over {unit}",
        title="Slide embeddings compared by linear probes",
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
