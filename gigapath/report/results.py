"""What fine-tuning, evaluation and probes left, as blocks that the page shows: scores, curves, confusion, predictions.

A block is a dict of plain JSON values with a `kind`:
    scores       title, unit, columns [name], rows [[score, {value, low, high} or None, ...]], intervals
    confusion    title, classes, counts (row = true class)
    curves       title, x, panels [{y, lines [{name, x, y}]}], mark {x, words} or None
    predictions  title, columns, rows; the first column is the slide's id
    notes        sentences
    group        title, blocks; folded away until it is opened
"""

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.cohort.privacy import hide_paths, redact
from gigapath.evaluation.scores import SCORE_WORDS

Block = dict[str, Any]

MOST_ROWS = 5000  # of predictions; above that the least certain of the truth are shown
LEFT_ROWS = 1000


@dataclass(frozen=True)
class Results:
    """One folder with scores.

    Attributes:
        name: of the folder, "" where it is the report's own.
        title: what was done.
        blocks: what is shown.
        terms: what the results may be used for.
        options: how it was done.
        predictions: slide_id -> {"label": ..., "predicted": ...} for the table of slides.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]
    terms: str = ""
    options: Mapping[str, Any] | None = None
    predictions: Mapping[str, Mapping[str, str]] | None = None


def collect_results(folder: Path) -> list[Results]:
    """The results in a folder, or else in the folders right below it; what can't be read is named."""
    places = [folder] if (folder / "results.json").is_file() else sorted(path for path in folder.glob("*/"))
    found = []
    for place in places:
        values = _read_json(place / "results.json")
        name = "" if place == folder else place.name
        try:
            results = None if values is None else _results(place, name, values)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            sentence = "results.json is not in the form that this version writes: run the command again."
            results = Results(name, "Results", (_notes([sentence]),))
        found += [results] if results is not None else []
    return found


def _results(folder: Path, name: str, values: Mapping[str, Any]) -> Results | None:
    if "summary" in values:
        return _finetuning(folder, name, values)
    if "embeddings" in values:
        return _slide_probe(folder, name, values)
    if "validation" in values and "test" in values:
        return _tile_probe(folder, name, values)
    return _evaluation(folder, name, values) if "test" in values else None


def _read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else None
    return None


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def _finetuning(folder: Path, name: str, values: Mapping[str, Any]) -> Results:
    task = values.get("task") or {}
    blocks: list[Block] = [_summary(values["summary"])]
    folds = sorted(
        (path for path in folder.glob("fold_*") if path.is_dir()), key=lambda path: (len(path.name), path.name)
    )
    rows: list[dict[str, str]] = []
    for fold in folds:
        found = _read_json(fold / "results.json")
        if found is None:
            blocks.append(_notes([f"{fold.name.replace('_', ' ')}: not finished."]))
            continue
        of_fold = _read_csv(fold / "predictions.csv")
        rows += [{**row, "fold": fold.name.removeprefix("fold_")} for row in of_fold]
        of_model = [block for block in _cohort_blocks(found, _class_names(task, of_fold)) if block]
        title = fold.name.replace("_", " ").capitalize()
        blocks += of_model if len(folds) == 1 else [{"kind": "group", "title": title, "blocks": of_model}]
    blocks += [_predictions(rows, several=len(folds) > 1)] if rows else []
    blocks += [_notes(values.get("notes"))]
    run = _read_json(folder / "finetune.json") or {}
    return Results(
        name,
        f"Fine-tuning: {task.get('name', 'a task')}",
        tuple(block for block in blocks if block),
        str(values.get("terms", "")),
        redact(run.get("options") or {}),
        _said_of_slides(rows),
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Models beside each other: a row a score, over folds where there are several."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    scores = [name for name in dict.fromkeys(row["score"] for row in rows) if ":" not in name]
    held = {(row["model"], row["score"]): row for row in rows}
    several = any(len(row.get("values") or ()) > 1 for row in rows)
    table = []
    for score in scores:
        cells: list[Any] = []
        for model in models:
            row = held.get((model, score))
            if row is None or row["mean"] is None:
                cells.append(None)
            else:
                cells.append({"value": row["mean"], "low": row["low"], "high": row["high"], "sd": row["sd_over_folds"]})
        table.append([SCORE_WORDS.get(score, score), *cells])
    return {
        "kind": "scores",
        "title": "Scores on the test set" + (", mean over folds" if several else ""),
        "columns": models,
        "rows": table,
        "intervals": "±: standard deviation over folds; the intervals of each fold stand below" if several else "",
    }


def _evaluation(folder: Path, name: str, values: Mapping[str, Any]) -> Results:
    rows = _read_csv(folder / "predictions.csv")
    blocks = [*_cohort_blocks(values, _class_names({}, rows)), _predictions(rows) if rows else {}]
    return Results(
        name,
        "Evaluation of a fitted head" if "fitted_here" in values else "Test",
        tuple(block for block in blocks if block),
        str(values.get("terms", "")),
        None,
        _said_of_slides(rows),
    )


def _cohort_blocks(values: Mapping[str, Any], classes: Sequence[str]) -> Iterator[Block]:
    """The blocks of one model on one cohort."""
    test = values["test"]
    columns = {"slides": test["by_slide"]}
    if test.get("by_patient"):
        columns = {"patients": test["by_patient"], **columns}
    if test.get("site_alone"):
        columns["the site alone"] = test["site_alone"]
    yield _scores("Test set", columns)
    if test.get("by_site"):
        yield {"kind": "group", "title": "Test set by site", "blocks": [_scores("", test["by_site"])]}
    if test.get("confusion") and len(test["confusion"]) == len(classes):
        yield {"kind": "confusion", "title": "Confusion matrix", "classes": classes, "counts": test["confusion"]}
    history = values.get("history") or []
    if history:
        yield _history(history)
    yield _notes(test.get("notes"))


def _history(history: Sequence[Mapping[str, Any]]) -> Block:
    epochs = [entry["epoch"] for entry in history]
    lines = [{"name": "training", "x": epochs, "y": [entry["train_loss"] for entry in history]}]
    if all(entry.get("val_loss") is not None for entry in history):
        lines.append({"name": "validation", "x": epochs, "y": [entry["val_loss"] for entry in history]})
    return {
        "kind": "curves",
        "title": "Learning curve",
        "x": "epoch",
        "panels": [{"y": "mean loss of a slide (nats, lower is better)", "lines": lines}],
    }


def _class_names(task: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> list[str]:
    if task.get("classes"):
        return [str(name) for name in task["classes"]]
    return [name.removeprefix("p_") for name in rows[0] if name.startswith("p_")] if rows else []


# --------------------------------------------------------------------------------------------------------------- probes


def _tile_probe(folder: Path, name: str, values: Mapping[str, Any]) -> Results:
    task = values.get("task") or {}
    columns = {"test": values["test"], "validation": values["validation"]}
    for control, found in (values.get("controls") or {}).items():
        columns[f"{control} alone, test"] = {"scores": found["test"]}
    blocks = [_scores("Scores", columns)]
    classes = [str(each) for each in task.get("classes") or ()]
    if values.get("confusion_test"):
        title = "Confusion matrix, test set"
        blocks.append({"kind": "confusion", "title": title, "classes": classes, "counts": values["confusion_test"]})
    if values.get("looks"):
        blocks.append(_looks(values["looks"], values.get("chosen") or {}))
    elif (values.get("chosen") or {}).get("tried"):
        blocks.append(_tried(values["chosen"]))
    rows = _read_csv(folder / "predictions.csv")
    rows = [row for row in rows if row.get("split") == "test"] or rows
    blocks += [_predictions(rows, what="tiles")] if rows else []
    blocks.append(_notes(values.get("notes")))
    title = "Linear probe of tiles"
    return Results(
        name,
        title,
        tuple(block for block in blocks if block),
        str(values.get("terms", "")),
        redact(values.get("options")),
    )


def _looks(looks: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Block:
    panels = []
    for key, y in (("train_loss", "training cross-entropy (nats)"), ("val_f1", "weighted F1, validation")):
        lines = []
        for seed in list(dict.fromkeys(look["seed"] for look in looks))[:7]:
            of_seed = [look for look in looks if look["seed"] == seed]
            lines.append({"name": f"seed {seed}", "x": [e["step"] for e in of_seed], "y": [e[key] for e in of_seed]})
        panels.append({"y": y, "lines": lines})
    mark = {"x": chosen["step"], "words": f"kept: step {chosen['step']}"} if chosen.get("step") else None
    return {"kind": "curves", "title": "Learning curve", "x": "step", "panels": panels, "mark": mark}


def _tried(chosen: Mapping[str, Any]) -> Block:
    pairs = sorted((float(value), score) for value, score in chosen["tried"].items())
    line = {"name": "tried", "x": [value for value, _ in pairs], "y": [score for _, score in pairs]}
    panel = {"y": f"{chosen.get('criterion') or 'score'}, validation", "lines": [line]}
    return {"kind": "curves", "title": f"Choice: {chosen['what']}", "x": "value (log)", "log": True, "panels": [panel]}


def _slide_probe(folder: Path, name: str, values: Mapping[str, Any]) -> Results:
    everything = {**values["embeddings"], **(values.get("controls") or {})}
    columns = {each: found.get("patients") or found["slides"] for each, found in everything.items()}
    unit = "patients" if any(found.get("patients") for found in everything.values()) else "slides"
    blocks = [_scores(f"Scores over {unit}, mean over folds", columns)]
    leads = {
        each: {"scores": lead}
        for each, found in everything.items()
        for key, lead in found.items()
        if key.startswith("minus_") and lead
    }
    if leads:
        blocks.append({**_scores(f"Differences: {values.get('differences', '')}", leads), "signed": True})
    rows = _mean_over_fits(_read_csv(folder / "predictions.csv"))
    blocks += [_predictions(rows, averaged=True)] if rows else []
    blocks.append(_notes(values.get("notes")))
    return Results(
        name,
        "Probe of slide embeddings",
        tuple(block for block in blocks if block),
        str(values.get("terms", "")),
        redact(values.get("options")),
        _said_of_slides([row for row in rows if row["embedding"] == next(iter(values["embeddings"]))]),
    )


def _mean_over_fits(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One row a slide and embedding: probabilities averaged over the fits in which the slide was tested."""
    grouped: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        grouped.setdefault((row["slide_id"], row["embedding"]), []).append(row)
    out = []
    for fits in grouped.values():
        shares = {key: sum(float(fit[key]) for fit in fits) / len(fits) for key in fits[0] if key.startswith("p_")}
        kept = {key: value for key, value in fits[0].items() if key not in shares and key != "fold"}
        best = max(shares, key=lambda key: shares[key], default="p_")
        out.append({**kept, "predicted": best.removeprefix("p_"), **{k: f"{v:.4f}" for k, v in shares.items()}})
    return out


# --------------------------------------------------------------------------------------------------------------- blocks


def _scores(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Block:
    """A table: a row a score, a column each of `columns` (an evaluation as plain JSON values)."""
    names = dict.fromkeys(name for found in columns.values() for name in found["scores"])
    rows: list[list[Any]] = []
    for name in names:
        if ":" in name:  # scores of single classes are in results.json
            continue
        cells = []
        for found in columns.values():
            score = found["scores"].get(name)
            shown = isinstance(score, Mapping) and score.get("value") is not None
            cells.append({key: score.get(key) for key in ("value", "low", "high")} if shown else None)
        rows.append([SCORE_WORDS.get(name, name), *cells])
    intervals = next((found["intervals"] for found in columns.values() if found.get("intervals")), "")
    return {"kind": "scores", "title": title, "columns": list(columns), "rows": rows, "intervals": intervals}


def _predictions(
    rows: Sequence[Mapping[str, str]], *, what: str = "slides", several: bool = False, averaged: bool = False
) -> Block:
    columns = list(rows[0])
    note = "Probabilities are means over the fits that did not train on the slide." if averaged else ""
    note = "Each slide as the model of its fold saw it." if several else note
    shown = list(rows)
    if len(rows) > MOST_ROWS:
        shown = sorted(rows, key=_share_of_the_truth)[:LEFT_ROWS]
        note += f" The {LEFT_ROWS:,} of {len(rows):,} {what} with the least probability of their true class."
    return {
        "kind": "predictions",
        "title": f"Predictions, {len(rows):,} {what}",
        "columns": columns,
        "rows": [[hide_paths(row.get(name) or "") for name in columns] for row in shown],
        "note": note.strip(),
        "of_slides": what == "slides",
    }


def _share_of_the_truth(row: Mapping[str, str]) -> float:
    try:
        return float(row[f"p_{row['label']}"])
    except (KeyError, ValueError):
        return 1.0


def _said_of_slides(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """slide_id -> its label and what was predicted; a slide that several folds test keeps the last."""
    return {row["slide_id"]: {key: row[key] for key in ("label", "predicted") if row.get(key)} for row in rows}


def _notes(sentences: Any) -> Block:
    """Sentences, or an empty block without any."""
    return {"kind": "notes", "sentences": [hide_paths(str(each)) for each in sentences]} if sentences else {}


def _read_csv(path: Path) -> list[dict[str, str]]:
    with contextlib.suppress(OSError, csv.Error, UnicodeDecodeError), path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key is not None} for row in csv.DictReader(file)]
    return []
