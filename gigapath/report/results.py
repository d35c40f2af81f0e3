"""What fine-tuning, evaluation and probes left, as blocks that the page shows: scores, curves, confusion, predictions.

A block is a dict of plain JSON values with a `kind`:
    scores       title, unit, columns [name], rows [[score, {value, low, high} or None, ...]], intervals
    confusion    title, classes, counts (row = true class)
    curves       title, x, panels [{y, lines [{name, x, y}]}], mark {x, words} or None
    predictions  title, columns, rows; the first column is the slide's id
    picture      title, src
    notes        sentences
    group        title, blocks; folded away until it is opened
"""

import base64
import contextlib
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.cohort.record import hide_paths, redact
from gigapath.evaluation.intervals import Estimate, Evaluation, plain
from gigapath.evaluation.plots import Curves
from gigapath.evaluation.results import (
    CHANCE,
    EVALUATION,
    FINE_TUNING,
    FOLD,
    RESULTS,
    SITE_ALONE,
    SLIDE_PROBE,
    STUDY,
    TILE_PROBE,
    TILE_TUNING,
    Scores,
    read_results,
)
from gigapath.evaluation.results import Results as Found
from gigapath.evaluation.robustness import ROBUSTNESS
from gigapath.evaluation.scores import score_words
from gigapath.files import read_json

Block = dict[str, Any]

DIFFERENCES = "differences.json"
PRETRAINING = "pretrain.json"  # by its name: the room that writes it needs torch
MOST_ROWS = 5000  # of predictions; above that the least certain of the truth are shown
LEFT_ROWS = 1000
_TITLES = {
    STUDY: "Study",
    TILE_PROBE: "Linear probe of tiles",
    TILE_TUNING: "Fine-tuning of a tile encoder",
    SLIDE_PROBE: "Probe of slide embeddings",
    FOLD: "Fold of a fine-tuning",
    EVALUATION: "Evaluation of a fitted head",
}


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
    own = any((folder / file).is_file() for file in (RESULTS, PRETRAINING, DIFFERENCES))
    places = [folder] if own else sorted(path for path in folder.glob("*/"))
    found = []
    for place in places:
        name = "" if place == folder else place.name
        try:
            if (place / RESULTS).is_file():
                found.append(_results(place, name, read_results(place / RESULTS)))
            elif (place / PRETRAINING).is_file():
                found.append(_pretraining(place, name))
            if (place / DIFFERENCES).is_file():
                found.append(_differences(place, name))
        except (OSError, ValueError, KeyError) as error:
            found.append(Results(name, "Results", (_notes([str(error)]),)))
    return found


def _results(folder: Path, name: str, found: Found) -> Results:
    title = _TITLES.get(found.kind, "Results")
    options: Any = found.details.get("options")
    blocks = [*_scores_of(found), *_target_pictures(folder)]
    rows = _read_csv(folder / "predictions.csv")
    what, note = "slides", ""
    if found.kind == FINE_TUNING:
        title = f"Fine-tuning: {found.task.get('name', 'a task')}"
        options = _options_of_finetune(folder)
        folds = sorted(folder.glob("fold_*/"), key=lambda path: (len(path.name), path.name))
        note = "Each slide as the model of its fold saw it." if len(folds) > 1 else ""
        for fold in folds:
            blocks += list(_fold(fold, alone=len(folds) == 1))
            number = fold.name.removeprefix("fold_")
            rows += [{**row, "fold": number} for row in _read_csv(fold / "predictions.csv")]
    elif found.kind == STUDY:
        title, options = f"Study: {found.task.get('name', '')}", found.details.get("study")
        blocks += list(_study(found))
    elif found.kind == SLIDE_PROBE:
        rows = _mean_over_fits(rows)
        note = "Probabilities are means over the fits that did not train on the slide."
    elif found.kind in (TILE_PROBE, TILE_TUNING):
        what = "tiles"
        rows = [row for row in rows if row.get("split") == "test"] or rows
    if rows:
        blocks.append(_predictions(rows, what=what, note=note))
    blocks.append(_notes(found.notes))
    of_slides = [row for row in rows if row.get("embedding") in (None, next(iter(found.scores)))]
    return Results(
        name,
        title,
        tuple(block for block in blocks if block),
        found.terms,
        redact(options) if options is not None else None,
        None if what == "tiles" else _predicted_of_slides(of_slides),
    )


def _study(found: Found) -> Iterator[Block]:
    """What a study has besides its models' scores: comparisons, outside tests, the checklist."""
    compared = found.details["comparisons"]
    if compared:
        primary = score_words(found.details["study"]["primary"])
        ends = {"p": "p", "p_holm": "p by Holm", "power": "power for 0.1"}
        rows = [
            [
                f"{row['first']} - {row['second']}",
                None
                if row["value"] is None
                else {"signed": True} | {end: row[end] for end in ("value", "low", "high")},
                *(None if row[end] is None else {"value": row[end], "low": None, "high": None} for end in ends),
            ]
            for row in compared
        ]
        title = f"Comparisons: {primary} of the first minus that of the second"
        columns = ["difference", *ends.values()]
        yield {"kind": "scores", "title": title, "columns": columns, "rows": rows, "intervals": ""}
    outside = {name: Scores.from_dict(each).headline for name, each in found.details["outside"].items()}
    if outside:
        yield _scores("Scores on outside test sets", outside)
    items = [line.removeprefix("- ").replace("**", "") for line in found.details["tripod"]]
    yield {"kind": "group", "title": "TRIPOD+AI checklist", "blocks": [_notes(items)]}


def _pretraining(folder: Path, name: str) -> Results:
    """What `gigapath pretrain` left: its curves, R2 beside what needs no learning, and pictures of some slides."""
    facts = read_json(folder / PRETRAINING, keys=("options", "sets", "r2_without_learning"), mend="Pretrain again.")
    rows = _read_csv(folder / "curves.csv")
    points = {
        key: [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key)]
        for key in ("val_loss", "r2", "rank")
    }
    names = {"r2": "R2 of hidden tiles", "val_loss": "loss", "rank": "effective rank of slide vectors"}
    panels: Any = {
        title: {"validation": tuple(zip(*points[key], strict=True))} for key, title in names.items() if points[key]
    }
    blocks: list[Block] = []
    if panels:
        blocks.append({**Curves("By epoch", "epoch", panels).to_dict(), "kind": "curves"})
        scores = {f"after epoch {points['r2'][-1][0]}": points["r2"][-1][1], **facts["r2_without_learning"]}
        cells = [[each, {"value": float(value), "low": None, "high": None}] for each, value in scores.items()]
        title = "R2 of hidden tiles on validation slides, beside what needs no learning"
        blocks.append({"kind": "scores", "title": title, "columns": ["R2"], "rows": cells, "intervals": ""})
    title = "Validation slides: tiles, what was seen, what was predicted, the error (colors: principal components)"
    blocks += _picture(folder / "reconstructions.png", title)
    counts = [f"{each}: {part['slides']:,} slides, {part['tiles']:,} tiles" for each, part in facts["sets"].items()]
    blocks.append(_notes([*counts, *facts.get("notes", ())]))
    return Results(name, "Pretraining of the slide encoder", tuple(blocks), options=redact(facts["options"]))


def _differences(folder: Path, name: str) -> Results:
    """What `gigapath compare` left: differences with their intervals and tests, and their picture."""
    held = read_json(folder / DIFFERENCES, keys=("differences", "covers", "difference"), mend="Compare again.")
    columns: dict[str, dict[str, Estimate]] = {}
    tests = []
    for row in held["differences"]:
        pair, score = f"{row['model']} - {row['minus']}", score_words(row["score"])
        columns.setdefault(pair, {})[row["score"]] = Estimate.from_dict({**row, "undefined": 0})
        numbers = (("p", row["p"]), ("by Holm", row["p_holm"]), (f"power for {held['difference']:g}", row["power"]))
        tests.append(f"{pair}, {score}: " + ", ".join(f"{what} {of:.3f}" for what, of in numbers if of is not None))
    title = "Differences on the same patients and folds"
    blocks: list[Block] = [{**_named(_table(columns)), "title": title, "intervals": held["covers"], "signed": True}]
    blocks += _picture(folder / "differences.png", "Paired differences, 95 % intervals")
    blocks.append(_notes([*tests, *held.get("notes", ())]))
    return Results(name, "Comparison", tuple(blocks), str(held.get("terms", "")))


def _picture(path: Path, title: str) -> Iterator[Block]:
    with contextlib.suppress(OSError):
        drawn = base64.b64encode(path.read_bytes()).decode()
        yield {"kind": "picture", "title": title, "src": f"data:image/png;base64,{drawn}"}


def _target_pictures(folder: Path) -> Iterator[Block]:
    title = "Kaplan-Meier curves above and below the median risk of training, with the numbers at risk"
    yield from _picture(folder / "survival.png", title)
    yield from _picture(folder / "scatter.png", "Predicted against true, with the identity line")


def _fold(folder: Path, *, alone: bool) -> Iterator[Block]:
    """The blocks of one fold, folded away where there are several."""
    title = folder.name.replace("_", " ")
    try:
        found = read_results(folder / RESULTS)
    except OSError:
        yield _notes([f"{title}: not finished."])
        return
    except ValueError as error:
        yield _notes([f"{title}: {error}"])
        return
    shown = () if alone else _target_pictures(folder)  # of a single fold the run has the same
    blocks = [block for block in (*_scores_of(found), *shown, _notes(found.notes)) if block]
    if alone:
        yield from blocks
    else:
        yield {"kind": "group", "title": title.capitalize(), "blocks": blocks}


def _scores_of(found: Found) -> Iterator[Block]:
    """The blocks of the scores that any results hold."""
    name, first = next(iter(found.scores.items()))
    columns = {model: scores.headline for model, scores in found.scores.items()}
    others = {f"{name}, over {unit}": each for unit, each in first.by_unit.items() if unit != first.unit}
    if found.kind != SLIDE_PROBE:  # there as many tables as embeddings
        columns |= others
    if found.validation is not None:
        columns["validation"] = found.validation.headline
    yield _scores(f"Scores on the test set, over {first.unit}", columns)
    leads = {f"{model} - {other}": lead for model, each in found.scores.items() for other, lead in each.leads.items()}
    if leads:
        table = _table({pair: dict(lead) for pair, lead in leads.items()})
        yield {**_named(table), "title": "Differences on the same rows and draws", "intervals": "", "signed": True}
    robust = {model: held for model, each in found.scores.items() if (held := each.facts.get(ROBUSTNESS))}
    if robust:
        cells = [
            [model, _cell(held["index"], held.get("low"), held.get("high")), _cell(held["at_random"])]
            for model, held in robust.items()  # results of older versions have no limits
        ]
        title = "Robustness index: the share of telling neighbors of the same class at another site"
        words = ["robustness index", "of random neighbors"]
        yield {"kind": "scores", "title": title, "columns": words, "rows": cells, "intervals": ""}
    for model, each in found.scores.items():
        for stratum, by in {} if model in (CHANCE, SITE_ALONE) else each.strata.items():
            yield {"kind": "group", "title": f"Scores by {stratum}: {model}", "blocks": [_scores("", by)]}
    classes = [str(each) for each in found.task.get("classes") or ()]
    single = found.kind in (TILE_PROBE, TILE_TUNING, FOLD, EVALUATION)
    if single and first.confusion and len(first.confusion) == len(classes):
        title = f"Confusion matrix, {list(first.by_unit)[-1]}"
        yield {"kind": "confusion", "title": title, "classes": classes, "counts": first.confusion}
    if found.curves:
        yield {**found.curves, "kind": "curves"}


def _cell(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any] | None:
    return None if value is None else {"value": value, "low": low, "high": high}


def _scores(title: str, columns: Mapping[str, Evaluation]) -> Block:
    """A table: a row a score, a column each of `columns`."""
    block = _table({name: found.estimates for name, found in columns.items()})
    for row in block["rows"]:
        for cell, found in zip(row[1:], columns.values(), strict=True):
            if cell is not None and found.by_fold:
                cell["sd"] = plain(found.sd_over_folds(row[0]))
    intervals = next(iter(columns.values())).covers
    folds = "±: standard deviation over folds; " if any(found.by_fold for found in columns.values()) else ""
    return {**_named(block), "title": title, "intervals": folds + intervals}


def _options_of_finetune(folder: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((folder / "finetune.json").read_text(encoding="utf-8"))["options"]
    return {}


def _named(table: Block) -> Block:
    """The table with the scores' names for people."""
    return {**table, "rows": [[score_words(name), *cells] for name, *cells in table["rows"]]}


def _table(columns: Mapping[str, Mapping[str, Estimate]]) -> Block:
    """Rows of estimates by name; scores of single classes are in results.json."""
    names = dict.fromkeys(name for found in columns.values() for name in found if ":" not in name)
    rows: list[list[Any]] = []
    for name in names:
        each = [found.get(name) for found in columns.values()]
        rows.append([name, *(None if one is None or math.isnan(one.value) else one.to_dict() for one in each)])
    return {"kind": "scores", "columns": list(columns), "rows": rows}


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


def _predictions(rows: Sequence[Mapping[str, str]], *, what: str, note: str) -> Block:
    columns = list(rows[0])
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


def _predicted_of_slides(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """slide_id -> its label and what was predicted; a slide that several folds test keeps the last."""
    return {row["slide_id"]: {key: row[key] for key in ("label", "predicted") if row.get(key)} for row in rows}


def _notes(sentences: Any) -> Block:
    """Sentences, or an empty block without any."""
    return {"kind": "notes", "sentences": [hide_paths(str(each)) for each in sentences]} if sentences else {}


def _read_csv(path: Path) -> list[dict[str, str]]:
    with contextlib.suppress(OSError, csv.Error, UnicodeDecodeError), path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key is not None} for row in csv.DictReader(file)]
    return []
