"""The files that a probe leaves: figures, predictions, pictures. Everything is written once all of it is known, each
file whole, `results.json` last: where it stands, the others belong to it."""

import csv
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.evaluation import confusion_matrix
from gigapath.evaluation.intervals import Estimate
from gigapath.evaluation.plots import draw_confusion, draw_curves, plotting_available, write_events
from gigapath.evaluation.scores import SCORE_WORDS
from gigapath.files import write_bytes_atomic, write_json_atomic
from gigapath.linear_probe.table import TEST, VALIDATION
from gigapath.linear_probe.tiles import TileProbe

TERMS = (
    "For research use only, not for diagnosis. Embeddings fall under the terms of the weights that made them; "
    "Prov-GigaPath's are for research."
)
SHOWN_SCORES = (
    "accuracy",
    "balanced_accuracy",
    "f1_weighted",
    "precision_macro",
    "recall_macro",
    "auroc",
    "auprc",
    "brier",
    "ece",
)

log = logging.getLogger(__name__)


def write_tile_report(out: Path, probe: TileProbe) -> list[str]:
    """Write all files of a probe of tiles into a folder; returns their names."""
    files = {"results.txt": published_lines(probe).encode(), "predictions.csv": _predictions_csv(probe).encode()}
    if plotting_available():
        files |= {"confusion.png": _confusion(probe), "curve.png": _curve(probe)}
    else:
        log.warning("no pictures: matplotlib is not installed (pip install 'gigapath[train]')")
    names, results, content = list(files), out / "results.json", to_json(probe)
    results.unlink(missing_ok=True)  # those of before stay until these are made, and none is called whole too early
    for name, data in files.items():
        write_bytes_atomic(out / name, data)
    if probe.results[0].looks and _write_tensorboard(out / "tensorboard", probe):
        names.append("tensorboard")
    write_json_atomic(results, content)
    return [*names, "results.json"]


def published_lines(probe: TileProbe) -> str:
    """The two lines of the published `results.txt`, of the first seed, by our definitions; then the areas by the
    published ones."""
    val, test = probe.evaluations[VALIDATION], probe.evaluations[TEST]
    lines = (
        f"Val f1: {val['f1_weighted'].value:.4f}\n"
        f"Test f1: {test['f1_weighted'].value:.4f} Test AUROC: {test['auroc'].value:.4f} "
        f"Test AUPRC: {test['auprc'].value:.4f}\n"
    )
    if published := probe.published_scores(TEST):
        lines += (
            f"Test AUROC (logits, macro): {published['auroc_logits_macro']:.4f} "
            f"Test AUPRC (logits, macro): {published['auprc_logits_macro']:.4f}\n"
        )
    return lines


def to_json(probe: TileProbe) -> dict[str, Any]:
    """Everything about a probe as plain JSON values."""
    first = probe.results[0]
    positive = {"positive_class": probe.data.classes[1]} if len(probe.data.classes) == 2 else {}
    return {
        "task": {"classes": list(probe.data.classes), **positive, "auprc_baseline": "the prevalence"},
        "validation": {
            **probe.evaluations[VALIDATION].to_dict(),
            "calibration_slope": _number(probe.slopes[VALIDATION]),
        },
        "test": {**probe.evaluations[TEST].to_dict(), "calibration_slope": _number(probe.slopes[TEST])},
        "published_definitions": {
            "what": "raw logits against one-hot truth, macro over all classes",
            "validation": _numbers(probe.published_scores(VALIDATION)),
            "test": _numbers(probe.published_scores(TEST)),
        },
        "confusion_test": confusion_matrix(probe.predictions(TEST)).tolist(),
        "chosen": {
            "what": first.chosen,
            "on": "validation",
            "step": first.step,
            **(
                {"tried": {f"{value:g}": score for value, score in probe.choice.tried.items()}}
                | {"criterion": probe.choice.criterion}
                if probe.choice
                else {}
            ),
        },
        "seeds": {
            "seeds": [result.seed for result in probe.results],
            "test": {name: _spread(values) for name, values in probe.seed_scores.items()},
        },
        "controls": {
            name: {
                "test": control.evaluation.to_dict()["scores"],
                "lead_of_the_probe": {
                    score: {"value": _number(lead.value), "low": _number(lead.low), "high": _number(lead.high)}
                    for score, lead in control.lead.items()
                },
            }
            for name, control in probe.controls.items()
        },
        "looks": [
            {"seed": result.seed, "step": look.step, "train_loss": look.train_loss, "val_f1": look.val_f1}
            for result in probe.results
            for look in result.looks
        ],
        "data": probe.data.facts,
        "options": probe.options,
        "device": probe.device,
        "seconds": {name: round(seconds, 3) for name, seconds in probe.seconds.items()},
        "versions": probe.facts,
        "notes": list(probe.notes),
        "terms": TERMS,
    }


def summary_lines(probe: TileProbe) -> Iterator[str]:
    """What a person wants to read, line by line."""
    data = probe.data
    tiles = ", ".join(f"{len(rows):,} {split}" for split, rows in data.rows.items())
    width = data.features.shape[1]
    yield f"{tiles} tiles of {len(data.classes)} classes ({', '.join(data.classes)}), embeddings of width {width}"
    yield f"kept: {probe.results[0].chosen}" + (f" (step {probe.results[0].step})" if probe.results[0].step else "")
    columns = ["test", *(f"{name} alone" for name in probe.controls)]
    if len(probe.results) > 1:
        columns.append(f"mean and SD of {len(probe.results)} seeds")
    rows = [["", *columns]]
    for name in SHOWN_SCORES:
        row = [SCORE_WORDS[name], str(probe.evaluations[TEST][name])]
        row += [_short(control.evaluation[name]) for control in probe.controls.values()]
        if len(probe.results) > 1:
            spread = _spread(probe.seed_scores[name])
            row.append(f"{spread['mean']:.4f} +- {spread['sd']:.4f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"intervals: {probe.evaluations[TEST].covers}"
    prevalence = probe.evaluations[TEST].prevalence[data.classes[-1]]
    if len(data.classes) == 2:
        yield f"positive class: {data.classes[1]} ({prevalence:.1%} of the test tiles)"
    yield from (f"note: {note}" for note in probe.notes)


def _predictions_csv(probe: TileProbe) -> str:
    data = probe.data
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    groups = [data.group_column or "group"] if data.groups is not None else []
    writer.writerow(["name", "split", *groups, "label", "predicted", *(f"p_{name}" for name in data.classes)])
    for split in (VALIDATION, TEST):
        probabilities = probe.results[0].probabilities[split]
        for row, said in zip(data.rows[split].tolist(), probabilities, strict=True):
            group = [] if data.groups is None else [str(data.groups[row])]
            chosen = data.classes[int(said.argmax())]
            shares = [f"{share:.6g}" for share in said]
            writer.writerow([data.names[row], split, *group, data.classes[data.labels[row]], chosen, *shares])
    return text.getvalue()


def _confusion(probe: TileProbe) -> bytes:
    test = probe.evaluations[TEST]
    title = f"Confusion matrix: test set, {test.rows:,} tiles\nbalanced accuracy {test['balanced_accuracy'].value:.3f}"
    return draw_confusion(confusion_matrix(probe.predictions(TEST)), probe.data.classes, title=title)


def _curve(probe: TileProbe) -> bytes:
    """Loss and validation score over the steps; for the solvers without steps the score over what was tried."""
    if probe.choice is not None:
        values = np.array(sorted(probe.choice.tried))
        words = {
            "penalty": "log10 of the penalty (mean loss per squared weight)",
            "neighbours": "log10 of the neighbours k",
        }
        return draw_curves(
            {
                {"penalty": "cross-entropy, validation (nats)", "neighbours": "weighted F1, validation"}[
                    probe.choice.name
                ]: {"tried": (np.log10(values), [probe.choice.tried[value] for value in values.tolist()])}
            },
            x_label=words[probe.choice.name],
            title=f"Choice of the {probe.choice.name}",
            mark=(math.log10(probe.choice.value), f"kept: {probe.choice.value:g}"),
        )
    loss, score = {}, {}
    for result in probe.results[:7]:
        steps = [look.step for look in result.looks]
        loss[f"seed {result.seed}"] = (steps, [look.train_loss for look in result.looks])
        score[f"seed {result.seed}"] = (steps, [look.val_f1 for look in result.looks])
    step = probe.results[0].step or 0
    return draw_curves(
        {"training cross-entropy (nats)": loss, "weighted F1, validation": score},
        x_label=f"step (of {probe.options['batch_size']} tiles)",
        title="Learning curve: linear probe, SGD",
        mark=(step, f"kept: step {step} (seed {probe.results[0].seed})"),
    )


def _write_tensorboard(folder: Path, probe: TileProbe) -> bool:
    written = []
    for result in probe.results:
        curves = {
            "train/loss": [(look.step, look.train_loss) for look in result.looks],
            "validation/f1_weighted": [(look.step, look.val_f1) for look in result.looks],
        }
        written.append(write_events(folder / f"seed_{result.seed}", curves))
    return all(written)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample), least and greatest over seeds."""
    numbers = np.array(values)
    deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return {
        "mean": _number(float(numbers.mean())),
        "sd": _number(deviation),
        "min": _number(float(numbers.min())),
        "max": _number(float(numbers.max())),
        "values": [_number(value) for value in values],
    }


def _numbers(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in scores.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _short(estimate: Estimate) -> str:
    return "not defined" if math.isnan(estimate.value) else f"{estimate.value:.4f}"
