"""Runs compared on the same patients and folds: paired differences, their test, its power, and Holm's correction.

A run is the folder of a probe of slides or of a fine-tuning over several folds. Both draw folds alike, so that one may
be compared with the other.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.evaluation.intervals import Estimate, degrees_of_freedom, evaluate, paired_difference, plain, power
from gigapath.evaluation.labels import first_twice, shown
from gigapath.evaluation.plots import draw_intervals, plotting_available
from gigapath.evaluation.results import FINE_TUNING, RESULTS, SLIDE_PROBE, TERMS, Results, read_results
from gigapath.evaluation.scores import FloatArray, Predictions, average_by_group, rank_by, score_words
from gigapath.files import check_replaceable, write_bytes_atomic, write_json_atomic, write_text_atomic
from gigapath.tables import Table, csv_text, read_table
from gigapath.text import table_lines

DIFFERENCES = "differences.json"
SCORES = (
    *("auroc", "auprc", "accuracy", "balanced_accuracy", "kappa_quadratic"),
    *("r2", "mae", "pearson", "spearman"),
    *("harrell_c", "uno_c"),  # integrated_brier would need survival at more times than predictions.csv holds
)


@dataclass(frozen=True)
class _Run:
    """What a run left: of each fold the slides (id -> patient, label, or time and event); of each model and fold the
    probabilities, amounts or risks by id, and the model's own scale."""

    name: str
    results: Results
    folds: list[dict[str, tuple[str, str]]]
    models: dict[str, list[tuple[dict[str, FloatArray], FloatArray]]]
    patients: bool


@dataclass(frozen=True)
class Comparison:
    """Models, and each one's scores minus the first one's.

    Attributes:
        models: name -> score -> estimate.
        differences: name -> score -> estimate; the first model has none.
        adjusted: name -> score -> p by Holm over all models.
        powers: name -> score -> how often a true difference of `difference` would be found.
        covers: of what the intervals are.
    """

    models: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    adjusted: dict[str, dict[str, float]]
    powers: dict[str, dict[str, float]]
    difference: float
    covers: str
    notes: tuple[str, ...]

    @property
    def first(self) -> str:
        """What the others are compared with."""
        return next(iter(self.models))

    def rows(self) -> list[dict[str, Any]]:
        """One a model and score."""
        return [
            {
                **{"model": name, "minus": self.first, "score": score},
                **{end: getattr(each, end) for end in ("value", "low", "high", "p")},
                **{"p_holm": self.adjusted[name][score], "power": self.powers[name][score]},
            }
            for name, found in self.differences.items()
            for score, each in found.items()
        ]

    def __repr__(self) -> str:
        """The table, of what it is, and what is to be noted."""
        header = ["", "score", "difference", "p", "p by Holm", f"power for {self.difference:g}"]
        table = [
            [
                f"{row['model']} - {row['minus']}",
                score_words(row["score"]),
                f"{self.differences[row['model']][row['score']]:+.4f}",
                *("" if math.isnan(row[end]) else f"{row[end]:.3f}" for end in ("p", "p_holm", "power")),
            ]
            for row in self.rows()
        ]
        return "\n".join([*table_lines([header, *table]), self.covers, *(f"note: {note}" for note in self.notes)])


def compare(
    runs: Sequence[Path | str], *, models: Sequence[str] = (), difference: float = 0.1, score: str | None = None
) -> Comparison:
    """Compare models of runs, each with the first: all of one run, or of several runs those that each is about.

    Args:
        models: names of embeddings or models to take instead, of every run that has them; the first is the one that
            the others are compared with.
        difference: whose power is told.
        score: the first of the table; None = "auroc", "r2" or "harrell_c", by the task.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is missing, or on the first thing in which runs differ.
    """
    if twice := first_twice(str(Path(run).resolve()) for run in runs):
        raise ValueError(f"compare: expected several runs, got {Path(twice).name} twice.")
    read = [_read(Path(run)) for run in runs]
    if len({run.name for run in read}) < len(read):
        read = [replace(run, name=str(path)) for run, path in zip(read, runs, strict=True)]
    for run in read[1:]:
        _check_alike(read[0], run)
    kept = min(len(run.folds) for run in read)
    notes = [
        f"{run.name}: of its {len(run.folds)} fits only the first {kept} are compared, which all runs have"
        for run in read
        if len(run.folds) > kept
    ]
    found: dict[str, Predictions] = {}
    for name in models or [""]:
        for run in read:
            of_run = [*run.models]
            if not models and len(read) > 1:  # what the run is about: not the baseline beside it, nor its controls
                of_run = of_run[1:] if run.results.kind == SLIDE_PROBE and len(of_run) > 1 else of_run[:1]
            for model in of_run:
                if name in ("", model):
                    found[model if len(read) == 1 else f"{run.name}: {model}"] = _predictions(run, model, kept)
    if len(found) < 2:
        known = ", ".join(dict.fromkeys(model for run in read for model in run.models))
        raise ValueError(f"compare: expected two models or more, got {len(found)}. The runs hold {known}.")
    first, *others = found
    unit = "patients" if read[0].patients else "slides"
    evaluations = {name: evaluate(each, unit=unit) for name, each in found.items()}
    evaluation = evaluations[first]
    scored = [each for each in evaluation.estimates if each != "integrated_brier"]
    usual = [each for each in SCORES if each in scored]
    score = score or usual[0]
    if score not in scored:
        raise ValueError(f"--score: expected one of {', '.join(scored)}, got {score!r}.")
    shown_scores = [score, *(each for each in usual if each != score)]
    df = degrees_of_freedom(found[first])
    pairs = {name: paired_difference(found[name], found[first]) for name in others}
    differences = {name: {each: pair[each] for each in shown_scores} for name, pair in pairs.items()}
    adjusted: dict[str, dict[str, float]] = {name: {} for name in others}
    for each in shown_scores:
        for name, p in zip(others, holm([differences[name][each].p for name in others]), strict=True):
            adjusted[name][each] = p
    powers = {name: {each: power(difference, pair[each], df) for each in pair} for name, pair in differences.items()}
    weak = [powers[name][score] for name in others if powers[name][score] < 0.8]
    if weak:
        words = score_words(score)
        notes.append(
            f"a true difference of {difference:g} in {words} would be found in {min(weak):.0%} of such studies: that "
            "none was found says little"
        )
    covers = (
        f"95 %, over {evaluation.units:,} {unit}, of the difference of two procedures on new {unit}: jackknife, "
        f"t with {df} degrees of freedom; p by Holm: over the models, for each score"
        + ("" if found[first].of_classes else "; coverage not measured (uncalibrated)")
    )
    values = {name: {each: one[each] for each in shown_scores} for name, one in evaluations.items()}
    return Comparison(values, differences, adjusted, powers, difference, covers, tuple(notes))


def holm(values: Sequence[float]) -> list[float]:
    """p adjusted by Holm's steps (1979) for being the least of several; NaN stay out of it."""
    order = sorted((number for number, p in enumerate(values) if not math.isnan(p)), key=lambda number: values[number])
    adjusted, reached = [math.nan] * len(values), 0.0
    for place, number in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - place) * values[number]))
        adjusted[number] = reached
    return adjusted


def write_comparison(folder: Path, found: Comparison, *, overwrite: bool = False) -> list[str]:
    """Write the table as CSV and JSON, and the differences in its first score as a picture, where matplotlib is there.

    Raises:
        ValueError: the folder holds another comparison, and `overwrite` is False.
    """
    rows = found.rows()
    cells = [
        [each if isinstance(each, str) else f"{each:.6g}".replace("nan", "") for each in row.values()] for row in rows
    ]
    table = csv_text([[*rows[0]], *cells])
    check_replaceable(folder / "differences.csv", table, overwrite)
    write_text_atomic(folder / "differences.csv", table)
    written = ["differences.csv"]
    if plotting_available():
        score = rows[0]["score"]
        drawn = {
            f"{name} - {found.first}": (each[score].value, each[score].low, each[score].high)
            for name, each in found.differences.items()
        }
        label = f"difference in {score_words(score)}, 95 % interval"
        picture = draw_intervals(drawn, x_label=label, title="Paired differences", zero=True)
        write_bytes_atomic(folder / "differences.png", picture)
        written.append("differences.png")
    models = {name: {key: each.to_dict() for key, each in of.items()} for name, of in found.models.items()}
    content = {"format": 1, "models": models, "differences": plain(rows), "difference": found.difference}
    write_json_atomic(
        folder / DIFFERENCES, {**content, "covers": found.covers, "notes": list(found.notes), "terms": TERMS}
    )
    return [*written, DIFFERENCES]


def _read(folder: Path) -> _Run:
    if not (folder / RESULTS).is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a probe or a fine-tuning, found no {RESULTS} in it.")
    results = read_results(folder / RESULTS)
    models: dict[str, list[tuple[dict[str, FloatArray], FloatArray]]] = {}
    slides: list[dict[str, tuple[str, str]]] = []
    setting, horizons = results.task.get("setting"), results.task.get("horizons", ())
    outputs = [f"p_{each}" for each in results.task["classes"]]
    if setting == "regression":
        outputs = ["value"]
    elif setting == "survival":
        outputs = ["risk", *(f"survival_at_{each:g}" for each in horizons)]
    of_truth = ("time", "event") if setting == "survival" else ("label",)

    def take(model: str, table: Table, rows: Iterable[int], scale: Any, patient: str | None) -> None:
        rows, cells = list(rows), table.columns
        shares = np.array([[float(cells[each][row]) for each in outputs] for row in rows])
        ids = [cells["slide_id"][row] for row in rows]
        of = models.setdefault(model, [])
        of.append((dict(zip(ids, shares, strict=True)), np.asarray(scale, dtype=np.float64)))
        if len(slides) < len(of):
            who = cells[patient] if patient else cells["slide_id"]
            labels = {row: " ".join(cells[each][row] for each in of_truth) for row in rows}
            slides.append({cells["slide_id"][row]: (who[row], labels[row]) for row in rows})

    known = False
    try:
        if results.kind == SLIDE_PROBE:
            table = read_table(folder / "predictions.csv")
            patient = results.details["data"]["group_column"]
            known = patient is not None
            of_row = list(zip(table.columns["embedding"], map(int, table.columns["fold"]), strict=True))
            for model in dict.fromkeys(table.columns["embedding"]):
                for fold, scale in enumerate(results.scores[model].facts["scales"]):
                    chosen = [row for row, each in enumerate(of_row) if each == (model, fold)]
                    take(model, table, chosen, scale, patient)
        elif results.kind == FINE_TUNING:
            folds = sorted(folder.glob("fold_*/"), key=lambda path: (len(path.name), path.name))
            for place in [each for fold in folds for each in (fold, *sorted(fold.glob("controls/*/")))]:
                held, table = read_results(place / RESULTS), read_table(place / "predictions.csv")
                known = "patient_id" in table.columns
                scale, patient = held.details["scale"], "patient_id" if known else None
                take(next(iter(held.scores)), table, range(len(table)), scale, patient)
        else:
            raise KeyError(results.kind)
    except KeyError as error:
        raise ValueError(
            f"{folder}: expected a probe of slides or a fine-tuning over several folds, by this version; {error} is "
            "missing or something else. Run it again, with folds."
        ) from error
    return _Run(folder.resolve().name, results, slides, models, known)


def _check_alike(one: _Run, other: _Run) -> None:
    """ValueError with the first thing in which runs differ."""
    what, both = "", f"{one.name} and {other.name}"
    ours, theirs = (list(run.results.task["classes"]) for run in (one, other))
    if ours != theirs:
        raise ValueError(
            f"{both}: the classes differ ({', '.join(ours)}; {', '.join(theirs)}). Compare runs of one task."
        )
    mine_at, its_at = (run.results.task.get("horizons", []) for run in (one, other))
    if mine_at != its_at:
        raise ValueError(f"{both}: the horizons differ ({mine_at}; {its_at}). Compare runs of one task.")
    for number, (mine, its) in enumerate(zip(one.folds, other.folds, strict=False)):
        apart = sorted(mine.keys() ^ its.keys())
        changed = [
            (slide, end) for slide in mine for end in (0, 1) if slide in its and mine[slide][end] != its[slide][end]
        ]
        if apart:
            what = f"fold {number} tests other slides ({shown(apart)} in one alone)"
        elif changed:
            slide, end = changed[0]
            what = f"the {('patient', 'label')[end]} of {slide} differs ({mine[slide][end]}, {its[slide][end]})"
        if what:
            raise ValueError(f"{both}: {what}. Compare runs of the same slides, labels, patients, --folds and --seed.")


def _predictions(run: _Run, model: str, folds: int) -> Predictions:
    """Of one model, over patients where each has one label."""
    task = run.results.task
    classes, setting = tuple(task["classes"]), task.get("setting")
    targets, several = setting in ("survival", "regression"), setting == "multi_label"
    truth: list[Any] = []
    shares, groups, numbers, ranking = [], [], [], []
    for number, (of_slide, (said, scale)) in enumerate(zip(run.folds[:folds], run.models[model][:folds], strict=True)):
        ids = sorted(of_slide)
        for label in (of_slide[slide][1] for slide in ids):
            if setting == "survival":
                truth.append([float(each) for each in label.split()])
            elif targets:
                truth.append(float(label))
            else:
                truth.append([each in label.split(";") for each in classes] if several else classes.index(label))
        groups += [of_slide[slide][0] for slide in ids]
        numbers += [number] * len(ids)
        shares.append(np.stack([said[slide] for slide in ids]))
        ranking.append(rank_by(shares[-1], scale, multi_label=several, of_classes=not targets))
    horizons = tuple(task.get("horizons", ()))
    found = Predictions(
        np.asarray(truth, dtype=np.float64 if targets else np.int64),
        np.concatenate(shares),
        classes,
        groups=np.asarray(groups),
        folds=np.asarray(numbers),
        ordinal="kappa_quadratic" in next(iter(run.results.scores.values())).headline.estimates,
        ranking=np.concatenate(ranking),
        times=horizons,
        horizons=horizons,
    )
    try:
        return average_by_group(found)
    except ValueError:  # a patient has slides of several labels: they are scored one by one, as the run did
        return found
