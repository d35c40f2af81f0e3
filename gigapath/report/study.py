"""What the parts of a study found, in one place: tables, a plot, and the items of TRIPOD+AI (Collins et al. 2024, BMJ
385:e078378) that its files can fill; their numbers are the statement's, their wording is ours."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gigapath
from gigapath.cohort.record import hide_paths
from gigapath.evaluation.compare import compare, holm
from gigapath.evaluation.intervals import plain
from gigapath.evaluation.labels import SITE_COLUMNS, first_column
from gigapath.evaluation.plots import draw_intervals
from gigapath.evaluation.results import (
    CHANCE,
    LOCKED,
    RESULTS,
    SITE_ALONE,
    SLIDE_PROBE,
    STUDY,
    Results,
    Scores,
    read_results,
    stratum_lines,
    summary_csv,
    write_results,
)
from gigapath.evaluation.scores import score_words
from gigapath.tables import csv_text, read_table
from gigapath.text import table_lines

_COMPARED = ("first", "second", "score", "value", "low", "high", "p", "p_holm", "power")
_OUTPUTS = {"survival": "a risk, and the probability of no event at each horizon", "regression": "an amount"}
_POWER_FOR = 0.1  # difference whose power is given


def write_study(folder: Path, about: Mapping[str, Any], labels: Path) -> list[str]:
    """Write `results.json`, `study.csv`, `comparisons.csv`, `study.png` and `tripod.md` from the parts in a folder.

    Args:
        folder: of the study.
        about: what its file says.
        labels: the CSV of the cohort.

    Returns:
        lines for people.

    Raises:
        ValueError: a model has no such primary score.
    """
    parts = {name: read_results(folder / "models" / name / RESULTS) for name in about["models"]}
    models = {name: _main(found) for name, found in parts.items()}
    primary, title = about["primary"], about["title"] or folder.name
    for name, each in models.items():
        if primary not in each.headline.estimates:
            known = ", ".join(key for key in each.headline.estimates if ":" not in key)
            raise ValueError(f"primary: expected a score of the model {name} ({known}), got {primary!r}.")
    controls, own = dict[str, Scores](), {_name_of(found) for found in parts.values()}
    for name, found in parts.items():
        for other in (
            each for each in found.scores if each not in own
        ):  # of chance and site the first, which is the same for all
            controls.setdefault(other if other in (CHANCE, SITE_ALONE) else f"{name}: {other}", found.scores[other])
    tests = {
        f"{path.parent.name} on {path.parent.parent.name}, {path.name}": _main(read_results(path / RESULTS))
        for path in sorted(each for kind in ("fold_*/", "all/") for each in folder.glob(f"outside/*/*/{kind}"))
    }
    notes = [note for found in parts.values() for note in found.notes]
    notes += [f"{name}: {note}" for name, each in tests.items() for note in each.notes if note.startswith(LOCKED)]
    for place, test in about["outside"].items():
        for name, model in about["models"].items():
            if (needed := "embeddings" if "probe" in model else "features") not in test:
                notes.append(f"{name} is not tested on {place}, for which the study names no {needed}")
    compared = _compared(folder, about["compare"], primary, notes.append)
    everything = {**models, **controls, **tests}
    checklist = tripod_lines(_filled(about, parts, models, tests, labels))
    intervals = {
        name: (each[primary].value, each[primary].low, each[primary].high) for name, each in everything.items()
    }
    write_results(
        folder,
        Results(
            STUDY,
            {"name": title, "classes": next(iter(parts.values())).task.get("classes", [])},
            {**models, **controls},
            details={
                "study": dict(about),
                "outside": {name: each.to_dict() for name, each in tests.items()},
                "comparisons": compared,
                "tripod": checklist,
            },
            notes=tuple(dict.fromkeys(notes)),
        ),
        texts={
            "study.csv": summary_csv(everything),
            "comparisons.csv": csv_text([_COMPARED, *([row[key] for key in _COMPARED] for row in compared)]),
            "tripod.md": "# TRIPOD+AI\n\n" + "\n".join(checklist) + "\n",
        },
        pictures={
            "study.png": lambda: draw_intervals(
                intervals, x_label=f"{score_words(primary)} with 95 % interval", title=title
            )
        },
    )
    lines = table_lines(
        [
            ["", "over", score_words(primary)],
            *([name, each.unit, str(each[primary])] for name, each in everything.items()),
        ]
    )
    header = ["difference", "value", "p", "p by Holm", f"power for {_POWER_FOR:g}"]
    cells = [
        [
            f"{row['first']} - {row['second']}",
            row["text"],
            *("" if row[end] is None else f"{row[end]:.3f}" for end in ("p", "p_holm", "power")),
        ]
        for row in compared
    ]
    lines += table_lines([header, *cells]) if cells else []
    filled = sum(line.startswith("- [x]") for line in checklist)
    lines += [f"note: {note}" for note in notes if note not in {n for found in parts.values() for n in found.notes}]
    return [*lines, *stratum_lines(models), f"TRIPOD+AI: {filled} of {len(checklist)} items are filled in tripod.md"]


def _name_of(found: Results) -> str:
    """What the model that a run is about is called in it."""
    of_probe = found.kind == SLIDE_PROBE
    return str(found.details["options"]["embedding"]) if of_probe else next(iter(found.scores))


def _main(found: Results) -> Scores:
    return found.scores[_name_of(found)]


def _compared(
    folder: Path, pairs: Sequence[Sequence[str]], primary: str, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The first model's primary score minus the second's, as `gigapath compare` has it; Holm over all pairs. `note`
    gets a sentence on a pair that can't be compared."""
    rows: list[dict[str, Any]] = []
    for first, second in pairs:
        try:
            found = compare(
                [folder / "models" / name for name in (second, first)], difference=_POWER_FOR, score=primary
            )
        except ValueError as error:
            note(f"{first} and {second} are not compared: {hide_paths(str(error))}")
            continue
        ((name, of),) = found.differences.items()
        each, power = of[primary], found.powers[name][primary]
        row: dict[str, Any] = {"first": first, "second": second, "score": primary, "p": each.p, "power": power}
        rows.append(row | {end: getattr(each, end) for end in ("value", "low", "high")} | {"text": f"{each:+.4f}"})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return [plain(row) for row in rows]


def _filled(
    about: Mapping[str, Any],
    parts: Mapping[str, Results],
    models: Mapping[str, Scores],
    tests: Mapping[str, Scores],
    labels: Path,
) -> dict[str, str]:
    """Items of TRIPOD+AI that the files answer, each with a sentence; "" where they do not."""
    table, first, primary = read_table(labels), next(iter(models.values())), about["primary"]
    slides, unit, splits = f"{len(table):,} slides", first.unit, about["splits"]
    site_column = first_column(table, SITE_COLUMNS)
    sites = sorted(set(table.columns[site_column])) if site_column else []
    several, setting = len(first.by_site) > 1, next(iter(parts.values())).task.get("setting", "classes")
    tuned = [name for name, model in about["models"].items() if "finetune" in model]

    def shares(of: Scores) -> str:
        return ", ".join(f"{name} {share:.0%}" for name, share in of.headline.prevalence.items())

    def scores(of: Mapping[str, Scores]) -> str:
        return "; ".join(f"{name} {each[primary]!s}" for name, each in of.items())

    missing = [note for found in parts.values() for note in found.notes if "left out" in note or "no features" in note]
    compared = "; ".join(" against ".join(pair) for pair in about["compare"])
    drawn = f"{splits} folds" if isinstance(splits, int) else f"{splits}"
    measures = ", ".join(score_words(name) for name in first.headline.estimates if ":" not in name)
    made = [
        f"{name}: {'linear probe of ' + _name_of(found) if name not in tuned else 'fine-tuning, ' + _name_of(found)}"
        for name, found in parts.items()
    ]
    return {
        "4": f"{score_words(primary)} decides; models: {', '.join(models)}; compared: {compared or 'none'}",
        "5a": f"{slides} in {labels.name}; whom they represent is for the authors to say",
        "6a": f"{len(sites):,} sites ({', '.join(site or 'not known' for site in sites)})" if sites else "",
        "7": "slides enter as embeddings; gigapath report --methods on their run says how these were made",
        "8a": f"{setting.replace('_', ' ')}: {', '.join(first.headline.prevalence)}; how it was assessed is for the "
        "authors to say",
        "9b": "embeddings of the whole slide, or of all its tiles; nothing else",
        "10": f"{first.headline.units:,} {unit}; the program calculated no size",
        "11": "; ".join(dict.fromkeys(missing)) or "every listed slide has a label and features",
        "12a": f"cross-validation: {drawn}; outside test sets: {', '.join(about['outside']) or 'none'}",
        "12c": f"{'; '.join(made)}; penalties of probes are chosen by folds inside the training slides; the recipes "
        f"stand in models/; seed {about['seed']}",
        "12d": "scores by site, and what the site alone reaches" if several else "",
        "12e": f"{measures}; {first.headline.covers}",
        "12g": "each fold's frozen model on slides that did not train it"
        + ("; outside, probes fitted on all slides" if any(name.endswith(", all") for name in tests) else ""),
        "13": f"class shares {shares(first)}; folds have even shares of each" if isinstance(splits, int) else "",
        "15": _OUTPUTS.get(setting, "a probability of each class; thresholds, where fitted, stand with each head"),
        "16": "; ".join(f"{name}: {each.headline.units:,} {each.unit}, {shares(each)}" for name, each in tests.items()),
        "18f": f"gigapath {gigapath.__version__}; the study file is kept in study.json",
        "20a": f"{slides} listed, {first.headline.units:,} {unit} scored; {shares(first)}",
        "20b": f"classes and scores by site in {RESULTS}" if several else "",
        "21": "; ".join(f"{name}: {each.headline.units:,} {each.unit}" for name, each in models.items()),
        "22": "heads in models/*/fold_*, which gigapath predict applies" if tuned else "",
        "23a": scores({**models, **tests}),
        "23b": "; ".join(f"{site} {each[primary]!s}" for site, each in first.by_site.items()) if several else "",
    }


ITEMS = {
    "1": "title: development or evaluation of a prediction model, population, outcome",
    "2": "abstract",
    "3a": "clinical background and models that exist",
    "3b": "who the model is for, and where in the pathway of care",
    "3c": "known health inequalities",
    "4": "objectives",
    "5a": "sources of the data and how representative they are",
    "5b": "dates of the data",
    "6a": "setting and number of centers",
    "6b": "eligibility of participants",
    "6c": "treatments received",
    "7": "preparation of the data and checks of its quality",
    "8a": "outcome: definition, time horizon, how assessed",
    "8b": "who assessed the outcome, where that takes judgment",
    "8c": "blinding of the outcome's assessment",
    "9a": "choice of predictors",
    "9b": "predictors: definition and how measured",
    "9c": "who assessed predictors, where that takes judgment",
    "10": "sample size and its justification",
    "11": "missing data",
    "12a": "which data developed and which evaluated the model",
    "12b": "form of the predictors in the analysis",
    "12c": "type of model, steps of its making, tuning, internal validation",
    "12d": "differences between clusters such as centers",
    "12e": "measures and plots of performance",
    "12f": "updating of the model, such as calibration",
    "12g": "how predictions were computed for the evaluation",
    "13": "class imbalance",
    "14": "fairness",
    "15": "output of the model, thresholds",
    "16": "differences between training and evaluation data",
    "17": "ethical approval",
    "18a": "funding",
    "18b": "conflicts of interest",
    "18c": "protocol",
    "18d": "registration",
    "18e": "availability of data",
    "18f": "availability of code",
    "19": "involvement of patients and the public",
    "20a": "flow of participants, with and without the outcome",
    "20b": "characteristics, by center too",
    "20c": "predictors and outcome in evaluation beside development",
    "21": "participants and events in each analysis",
    "22": "the model in full, so that others can use it",
    "23a": "performance with intervals, in subgroups too",
    "23b": "heterogeneity of performance between clusters",
    "24": "results of updating the model",
    "25": "interpretation, fairness included",
    "26": "limitations",
    "27a": "use: poor or missing input",
    "27b": "use: what users have to do and know",
    "27c": "next steps of research",
}
UNKNOWN = "not known to the program"


def tripod_lines(filled: Mapping[str, str]) -> list[str]:
    """A line of Markdown an item, ticked where it is filled.

    Args:
        filled: number of an item -> a sentence; every number is of `ITEMS`.
    """
    return [
        f"- [{'x' if filled.get(item) else ' '}] **{item}** {topic}: {filled.get(item) or UNKNOWN}"
        for item, topic in ITEMS.items()
    ]
