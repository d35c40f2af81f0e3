"""Slide-level probes: logistic regression on slide embeddings (of times Cox with ridge, of amounts ridge regression),
with the plain mean of the tiles always beside.

Every embedding sees the same folds, and what is compared is compared on the same patients. The penalty is chosen
inside the training folds, so that no test slide has a say in anything.

Legend: S slides, D width, C classes, K folds, R repeats.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import gigapath
from gigapath.evaluation.calibration import decisions, default_calibration
from gigapath.evaluation.intervals import Estimate, plain
from gigapath.evaluation.labels import (
    ID_COLUMNS,
    SITE_COLUMNS,
    Task,
    alike_classes,
    class_notes,
    first_column,
    id_maker,
    kinds_of,
    load_task,
    patients_of,
    read_labels,
    shown,
    strata_of,
    strata_of_run,
)
from gigapath.evaluation.plots import draw_intervals
from gigapath.evaluation.results import (
    CHANCE,
    SITE_ALONE,
    SLIDE_PROBE,
    Results,
    Scores,
    TestSet,
    groups_of,
    lock_words,
    numbers_csv,
    numbers_of,
    pictures_of,
    predictions_csv,
    score,
    stratum_lines,
    summary_csv,
    truth_columns,
    write_results,
)
from gigapath.evaluation.robustness import ROBUSTNESS, robustness_index
from gigapath.evaluation.scores import (
    Predictions,
    prior_probabilities,
    rank_by,
    scale_of,
    score_words,
    site_probabilities,
)
from gigapath.evaluation.splits import Fold, audit, check_classes, draw_parts, part_folds, site_parts
from gigapath.features import read_slides
from gigapath.linear_probe import ProbeOptions, SlideProbeOptions
from gigapath.linear_probe.data import class_names, left_over, named_column, splits_of_column
from gigapath.linear_probe.embeddings import TEST
from gigapath.linear_probe.fits import INNER_FOLDS, fit_folds, fit_targets
from gigapath.linear_probe.heads import one_thread
from gigapath.options import IdOptions, to_dict
from gigapath.tables import data_frame, read_table
from gigapath.text import table_lines

BASELINE = "tile-mean"
SHOWN = ("auroc", "balanced_accuracy", "auprc", "f1_weighted")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
TextArray = npt.NDArray[np.str_]


@dataclass(frozen=True)
class SlideData:
    """S labelled slides.

    Args:
        vectors: name of the embedding -> (S, D).
        labels: (S,) class index; of a task (S, 2) time and event, or (S,) amounts.
        groups: (S,) patients; slides themselves where no column says them.
        group_column: what the groups are called, or None where slides stand for themselves.
        sites: (S,) or None.
        test: (S,) bool, the slides of the given test split or of the outside test set; None for folds.
        strata: "scanner", "stain" -> (S,) what each slide has, "" = not known; those that are known.
        task: of times or amounts; None for classes.
    """

    ids: tuple[str, ...]
    vectors: dict[str, FloatArray]
    labels: npt.NDArray[Any]
    classes: tuple[str, ...]
    groups: TextArray
    group_column: str | None
    sites: TextArray | None
    test: npt.NDArray[np.bool_] | None
    strata: dict[str, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    task: Task | None = None
    ordinal: bool = False


def load_slides(
    folder: Path | str,
    labels: Path,
    names: list[str],
    options: ProbeOptions,
    ids_meet: IdOptions = IdOptions(),  # noqa: B008 - frozen
    task: Task | None = None,
) -> SlideData:
    """Read slide embeddings and the CSV, join them by slide id, and check that a probe of them means something.

    Args:
        labels: CSV with `slide_id` (or `input`, `file`, `name`), the label's column, and the patient's.
        task: what the labels mean; None = the classes of `options.label`.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong.
    """
    listed = read_table(labels)
    written_ids = listed.filled(named_column(listed, None, ID_COLUMNS, "--labels"))
    all_labels = [] if task else listed.filled(named_column(listed, options.label, (), "--label"))
    for column, option in ((options.group, "--group"), (options.split, "--split")):
        if column is not None:
            named_column(listed, column, (), option)
    group_column, patients = patients_of(listed, options.group, written_ids, ids_meet.id_rule)
    key_of = id_maker(ids_meet.id_rule, ids_meet.id_regex)
    row_of_key: dict[str, int] = {}
    for row, written in enumerate(written_ids):
        first = row_of_key.setdefault(key_of(written), row)
        if first != row:
            raise ValueError(f"{listed.source}: {key_of(written)} has two rows ({first + 2} and {row + 2}). Keep one.")
    ids, vectors, notes = _read_vectors(folder, names)
    keys = [key_of(slide) for slide in ids]
    unlabelled = [slide for slide, key in zip(ids, keys, strict=True) if key not in row_of_key]
    unembedded = sorted(set(row_of_key) - set(keys))
    if (unlabelled or unembedded) and not options.allow_missing:
        both = left_over({"slides without an embedding": unembedded, "embeddings without a row": unlabelled})
        raise ValueError(
            f"{listed.source}: {both}. Embed them, or see --id-rule where names differ, or go on without "
            "them: --allow-missing."
        )
    if unlabelled or unembedded:
        lacking = {"labels without an embedding": unembedded, "embeddings without a label": unlabelled}
        notes.append(f"left out: {left_over(lacking)}")
    kept = [index for index, key in enumerate(keys) if key in row_of_key]
    rows = [row_of_key[keys[index]] for index in kept]
    slide_ids = tuple(ids[index] for index in kept)
    if task is not None:
        truth, classes = read_labels(labels, task, id_rule=ids_meet.id_rule).truth[rows], task.classes
        events = int(truth[:, 1].sum()) if task.setting == "survival" else len(truth)
        counts = {"with an event": events, "censored": len(truth) - events} if truth.ndim == 2 else {classes[0]: events}
        if task.of_classes:
            counts = dict(zip(classes, np.bincount(truth, minlength=len(classes)).tolist(), strict=True))
    else:
        written_labels = [all_labels[row] for row in rows]
        index_of_label, classes = class_names(written_labels, options.positive)
        if len(classes) < 2:
            got = ", ".join(classes) or "no slides"
            raise ValueError(f"{listed.source}: expected slides of two classes, got {got}.")
        truth = np.array([index_of_label[label] for label in written_labels], dtype=np.int64)
        counts = dict(zip(classes, np.bincount(truth).tolist(), strict=True))
    # Without patients the names as the CSV writes them, as in fine-tuning: their order has a say in the draw of folds.
    groups = np.array([(patients or written_ids)[row] for row in rows])
    if patients is None:
        notes.append("no column names the patients, so each slide counts as one; --group COL names it")
    test = None
    if options.split is not None:
        splits = splits_of_column(listed, options.split)
        test = np.array([splits[row] == TEST for row in rows])
        if test.all() or not test.any():
            lacking_set = "train on" if test.all() else "test on"
            raise ValueError(f"{listed.source}: the column {options.split} leaves no slide to {lacking_set}.")
        notes.append("slides of train and val train together: the penalty is chosen by folds inside them")
    site_column = first_column(listed, SITE_COLUMNS)
    if task is None or task.of_classes:
        notes += class_notes(classes, truth, groups.tolist(), "slide" if patients is None else "patient")
    return SlideData(
        ids=slide_ids,
        vectors={name: found[kept] for name, found in vectors.items()},
        labels=truth,
        classes=classes,
        groups=groups,
        group_column=group_column,
        sites=None if site_column is None else np.array([listed.columns[site_column][row] for row in rows]),
        test=test,
        strata=strata_of_run(Path(folder), slide_ids)
        | {name: tuple(cells[row] for row in rows) for name, cells in strata_of(listed, site_column).items()},
        facts={
            "slides": len(slide_ids),
            "groups": len(set(groups.tolist())),
            "group_column": group_column,
            "site_column": site_column,
            "slides_of_class": counts,
            "labels": labels.name,
            "labels_without_embedding": len(unembedded),
            "embeddings_without_label": len(unlabelled),
        },
        warnings=tuple(notes),
        task=None if task is not None and task.of_classes else task,
        ordinal=task is not None and task.ordinal,
    )


def with_outside(here: SlideData, there: SlideData) -> SlideData:
    """Slides to train on, and those of another cohort to test on.

    Raises:
        ValueError: a slide is in both.
    """
    if both := sorted({*here.ids} & {*there.ids}):
        raise ValueError(f"--test-labels: {len(both):,} slides are in both cohorts ({shown(both)}). Keep them in one.")
    vectors = {}
    for name, found in here.vectors.items():
        if found.shape[1] != (width := there.vectors[name].shape[1]):
            raise ValueError(f"--test-embeddings: expected {name} of width {found.shape[1]}, got {width}.")
        vectors[name] = np.concatenate([found, there.vectors[name]])
    one_kind = here.group_column is not None and there.group_column is not None
    of_here = np.array([""] * len(here.ids)) if here.sites is None else here.sites
    return replace(
        there,
        ids=here.ids + there.ids,
        vectors=vectors,
        labels=np.concatenate([here.labels, there.labels]),
        groups=np.concatenate([here.groups, there.groups]),
        group_column=here.group_column if one_kind else None,
        sites=None if there.sites is None else np.concatenate([of_here, there.sites]),
        test=np.repeat([False, True], [len(here.ids), len(there.ids)]),
        strata={name: ("",) * len(here.ids) + cells for name, cells in there.strata.items()},
        facts={**here.facts, "outside": there.facts},
        warnings=tuple(dict.fromkeys(here.warnings + there.warnings)),
    )


def _read_vectors(folder: Path | str, names: list[str]) -> tuple[list[str], dict[str, FloatArray], list[str]]:
    """(slide ids, name -> vectors (S, D), what the reader warned of)."""
    vectors: dict[str, FloatArray] = {}
    ids: list[str] = []
    notes: list[str] = []
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ids, found = read_slides(folder, name)
        notes += [text for text in map(str, (warning.message for warning in caught)) if text not in notes]
        vectors[name] = found.astype(np.float64)
        if not np.isfinite(vectors[name]).all():
            slide = ids[int(np.flatnonzero(~np.isfinite(vectors[name]).all(axis=1))[0])]
            raise ValueError(f"{slide}: its embedding {name} holds NaN or infinity. Embed the slide again.")
    return ids, vectors, notes


@dataclass(frozen=True, repr=False)
class SlideProbe:
    """What was found: `scores` of the embeddings, `tile-mean` first, then of controls; `rows` says which slide each row
    of their predictions is."""

    data: SlideData
    scores: dict[str, Scores]
    rows: IntArray
    options: dict[str, Any]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """The table of scores, and what is to be noted."""
        return "\n".join(self._lines())

    @property
    def shown(self) -> tuple[str, ...]:
        """The scores of the printed table; the first is drawn."""
        if self.data.task is not None:
            return tuple(self.scores[BASELINE].headline.estimates)[:4]
        return (*SHOWN[:3], "kappa_quadratic") if self.data.ordinal else SHOWN

    def _lines(self) -> Iterator[str]:
        data = self.data
        groups = f" of {data.facts['groups']:,} groups ({data.group_column})" if data.group_column else ""
        counts = ", ".join(f"{count:,} {name}" for name, count in data.facts["slides_of_class"].items())
        positive = f" (positive: {data.classes[1]})" if len(data.classes) == 2 else ""
        yield f"{data.facts['slides']:,} slides{groups}: {counts}{positive}"
        if outside := data.facts.get("outside"):
            yield f"tested on {outside['slides']:,} slides of {outside['labels']}"
        shown, words = self.shown, [score_words(name) for name in self.shown]
        rows = [["embedding", "width", *words, f"{words[0]} against {BASELINE}"]]
        robust = [["robustness index", "value", "neighbors", "of random neighbors"]]
        for name, found in self.scores.items():
            lead = f"{found.leads[BASELINE][shown[0]]:+.4f}" if found.leads else ""
            rows.append([name, str(found.facts.get("width", "")), *(str(found[each]) for each in shown), lead])
            if each := found.facts.get(ROBUSTNESS):
                value = Estimate.from_dict({**each, "value": each["index"], "undefined": 0})
                at_random = "not defined" if each["at_random"] is None else f"{each['at_random']:.4f}"
                robust.append([name, str(value), str(each["k"]), at_random])
        yield from table_lines(rows)
        yield from table_lines(robust) if len(robust) > 1 else ()
        yield f"intervals: {self.scores[BASELINE].headline.covers}"
        yield from stratum_lines({name: found for name, found in self.scores.items() if found.leads} or self.scores)
        yield from (f"note: {note}" for note in self.notes)

    def to_frame(self) -> Any:
        """A `pandas.DataFrame` with a row an embedding and score: value, interval, leads."""
        return data_frame(summary_csv(self.scores))

    @property
    def results(self) -> Results:
        """What `results.json` holds."""
        classes, task = self.data.classes, self.data.task
        of_classes = {
            "classes": list(classes),
            **({"positive_class": classes[1]} if len(classes) == 2 else {}),
            "auprc_baseline": "the prevalence",
        }
        by = "cross-entropy" if task is None else f"their loss ({task.loss})"
        return Results(
            SLIDE_PROBE,
            of_classes if task is None else task.described(),
            self.scores,
            details={
                "chosen": {"what": "penalty", "on": f"folds inside the training slides of each fit, by {by}"},
                "differences": f"each embedding minus {BASELINE}, on the same patients and folds",
                "data": self.data.facts,
                "options": self.options,
                "versions": {"implementation": gigapath.__implementation__, "package_version": gigapath.__version__},
            },
            notes=self.notes,
        )


def probe_slides(
    folder: Path | str, labels: Path | str | None, options: ProbeOptions, slide_options: SlideProbeOptions
) -> SlideProbe:
    """Probe slide embeddings by repeated folds, or by a given split.

    Args:
        labels: CSV with `slide_id` (or `input`, `file`), the label's column, and the patient's.
        options: columns, intervals, what to allow; `split` switches from folds to that column.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong.
    """
    if labels is None:
        raise ValueError("--labels: expected a CSV with slide_id and the label. Slide embeddings carry no labels.")
    names = [name.strip() for name in (slide_options.embedding or "").split(",") if name.strip()]
    wanted = [BASELINE, *(name for name in names if name != BASELINE)]
    task = None if slide_options.task is None else load_task(slide_options.task)
    if task is not None and task.multi_label:
        raise ValueError("--task: expected a task with one label a slide, got several. Name one of them: --label.")
    if task is not None and options.positive is not None:
        raise ValueError("--positive: expected no --task beside it, whose second class is the positive one.")
    data = load_slides(folder, Path(labels), wanted, options, slide_options, task)
    locked: TestSet | None = None
    if slide_options.test_labels is not None:
        if options.split is not None:
            raise ValueError("--test-labels: expected no --split beside it. Leave one out.")
        meant = task or Task("", "multi_class", data.classes, label_column=options.label)
        place, given = Path(slide_options.test_embeddings or ""), Path(slide_options.test_labels)
        there = load_slides(place, given, wanted, options, slide_options, meant)
        digest = read_labels(given, meant, id_rule=slide_options.id_rule).digest
        prints = hashlib.sha256(repr(there.ids).encode() + b"".join(each.tobytes() for each in there.vectors.values()))
        locked = TestSet(given, digest, f"slide embeddings {', '.join(wanted)}", prints.hexdigest())
        locked.evaluations()
        data = with_outside(data, there)
    task = data.task
    notes = list(data.warnings)
    drawn = _folds(data, options, slide_options)
    notes += audit(
        drawn,
        data.ids,
        fingerprints=[vector.tobytes() for vector in data.vectors[BASELINE]],
        patients=None if data.group_column is None else data.groups.tolist(),
        drawn=data.test is None,
        allow_leakage=options.allow_leakage,
    )
    notes += check_classes([fold for fold in drawn if fold.site or task], data.labels, data.classes)
    rows = np.concatenate([fold.test for fold in drawn])
    patients = data.group_column is not None
    sites = None if data.sites is None else data.sites[rows]
    classes = len(data.classes)
    for fold in drawn if task is None else ():
        _refuse_rare_classes(
            data.labels[fold.train],
            data.groups[fold.train],
            INNER_FOLDS,
            data.classes,
            f"fewer than the {INNER_FOLDS} folds by which the penalty is chosen among the training slides. Add slides",
        )
    held = partial(held_out, drawn, data.labels, data.groups, data.classes, task=task, ordinal=data.ordinal)
    found: dict[str, Predictions] = {}
    facts: dict[str, dict[str, Any]] = {}
    trains = [fold.train for fold in drawn]
    places = data.sites
    if places is not None and drawn[0].site:  # a new site tells nothing
        places = np.full_like(places, "")
    with one_thread(torch.device("cpu")):
        for name, vectors in data.vectors.items():
            if task is not None:
                said, chosen = fit_targets(task, vectors, data.labels, data.groups, trains, options.seed)
            else:
                shares, penalties = fit_folds(vectors, data.labels, data.groups, trains, options.seed)
                said, chosen = list(shares), penalties.tolist()
            found[name], scales = held(said)
            facts[name] = {"width": vectors.shape[1], "penalties": chosen}
            if data.test is None:
                facts[name]["scales"] = [scale.tolist() for scale in scales]
        if task is not None and places is not None:
            flags = (places[:, None] == np.unique(places)).astype(np.float64)
            said, _ = fit_targets(task, flags, data.labels, data.groups, trains, options.seed)
            found[SITE_ALONE] = held(said)[0]
    if task is None:
        found[CHANCE] = held([prior_probabilities(data.labels[train], len(data.ids), classes) for train in trains])[0]
    if task is None and places is not None and data.sites is not None:
        alone = [site_probabilities(data.labels[train], places[train], places, classes) for train in trains]
        found[SITE_ALONE] = held(alone)[0]
        for name, vectors in data.vectors.items() if locked is None else ():
            if (robustness := robustness_index(vectors, data.labels, data.sites, data.groups)) is not None:
                facts[name][ROBUSTNESS] = plain(robustness)
    strata = {name: [cells[row] for row in rows.tolist()] for name, cells in data.strata.items()}
    how: dict[str, Any] = {"patients": patients, "sites": sites, "strata": strata}
    how |= {"replicates": options.replicates, "seed": options.seed}
    rivals = {name: {BASELINE: found[BASELINE]} for name in facts if name != BASELINE}
    scores = {name: score(each, against=rivals.get(name), facts=facts.get(name), **how) for name, each in found.items()}
    if locked is not None and (slide_options.lock or locked.file.is_file()):
        head = hashlib.sha256(b"".join(found[name].probabilities.tobytes() for name in facts)).hexdigest()
        data = replace(data, facts={**data.facts, "locked_test_set": (counted := locked.count(head))})
        for name in facts:
            scores[name] = replace(scores[name], notes=(*scores[name].notes, lock_words(counted)))
    notes += scores[BASELINE].notes
    return SlideProbe(data, scores, rows, {**to_dict(options), **to_dict(slide_options)}, tuple(notes))


def held_out(
    drawn: Sequence[Fold],
    labels: npt.NDArray[Any],
    groups: TextArray,
    class_names: tuple[str, ...],
    shares: Sequence[FloatArray] | FloatArray,
    *,
    task: Task | None = None,
    ordinal: bool = False,
) -> tuple[Predictions, list[FloatArray]]:
    """What fits say of the slides that they did not train on, fold after fold, and each fit's own scale, on which rows
    of several are ranked.

    Args:
        labels: (S,) class index; of a task its times and events, or amounts.
        groups: (S,) patients.
        shares: of each fit the probabilities (S, C) of all slides.
    """
    scales = [scale_of(each[fold.train], labels[fold.train]) for each, fold in zip(shares, drawn, strict=True)]
    tested = [each[fold.test] for each, fold in zip(shares, drawn, strict=True)]
    ranked = [rank_by(*each, of_classes=task is None) for each in zip(tested, scales, strict=True)]
    rows = np.concatenate([fold.test for fold in drawn])
    folds = np.repeat([fold.number for fold in drawn], [len(fold.test) for fold in drawn])
    predictions = Predictions(
        labels[rows],
        np.concatenate(tested),
        class_names,
        groups=groups[rows],
        folds=folds if len(drawn) > 1 else None,
        ordinal=ordinal,
        ranking=np.concatenate(ranked),
        times=task.times if task else (),
        horizons=task.horizons if task else (),
    )
    return predictions, scales


def _folds(data: SlideData, options: ProbeOptions, slide_options: SlideProbeOptions) -> list[Fold]:
    """The training and test slides of every fit, the folds of one repeat after the other; those of the first repeat
    test the slides that `finetune` tests with the same seed."""
    if data.test is not None:
        return part_folds(~data.test * 1, 1)
    parts = slide_options.folds
    if isinstance(parts, str):
        sites = None if data.sites is None else data.sites.tolist()
        part, names = site_parts(data.groups.tolist(), sites)
        return part_folds(part, len(names), names)
    if data.task is None:
        too_few = f"fewer than {parts} folds. Take fewer folds"
        _refuse_rare_classes(data.labels, data.groups, parts, data.classes, too_few)
    return repeated_folds(kinds_of(data.labels), data.groups, parts, slide_options.repeats, seed=options.seed)


def repeated_folds(labels: IntArray, groups: TextArray, parts: int, repeats: int, *, seed: int) -> list[Fold]:
    """Folds (without validation) that are drawn anew for each repeat, numbered through."""
    found: list[Fold] = []
    for repeat in range(repeats):
        part = draw_parts(labels, groups.tolist(), parts, seed=seed + repeat)
        found += part_folds(part, parts, first=len(found))
    return found


def _refuse_rare_classes(labels: IntArray, groups: TextArray, folds: int, classes: Sequence[str], too_few: str) -> None:
    """Raise ValueError where a class occurs in fewer groups than there are folds: some would have none to test."""
    counts = {name: len(set(groups[labels == index].tolist())) for index, name in enumerate(classes)}
    rarest = min((name for index, name in enumerate(classes) if (labels == index).any()), key=lambda name: counts[name])
    if counts[rarest] < folds:
        others = [name for names in alike_classes(classes) if rarest in names for name in names if name != rarest]
        raise ValueError(
            f"folds: the class {rarest} occurs in {counts[rarest]} groups, {too_few}, or leave the class out."
            + (f" If it is the same as {others[0]}, write both alike." if others else "")
        )


def write_slide_report(out: Path, probe: SlideProbe) -> list[str]:
    """Write all files of a probe of slides into a folder; returns their names."""
    results, pictures = probe.results, {"comparison.png": lambda: _comparison(probe)}
    if (task := probe.data.task) is not None:
        name = [each for each, found in probe.scores.items() if "width" in found.facts][-1]
        results = replace(results, details={**results.details, **groups_of(probe.scores[name], task)})
        pictures |= pictures_of(probe.scores[name], task, f"{name}, first repeat")
    texts = {"summary.csv": summary_csv(probe.scores), "predictions.csv": _predictions(probe)}
    return write_results(out, results, texts=texts, pictures=pictures)


def _predictions(probe: SlideProbe) -> str:
    """One row per slide, fit and embedding; `fold` counts the fits through, over folds and repeats."""
    data, rows = probe.data, probe.rows
    predicted = {name: found.predictions for name, found in probe.scores.items() if "width" in found.facts}
    probabilities = np.concatenate([each.probabilities for each in predicted.values() if each is not None])
    many = len(predicted)
    columns = {
        "slide_id": [data.ids[row] for row in rows] * many,
        **({data.group_column: data.groups[rows].tolist() * many} if data.group_column else {}),
        "embedding": [name for name in predicted for _ in rows],
        "fold": [int(fold) for each in predicted.values() if each is not None for fold in _folds_of(each)],
    }
    if data.task is not None:
        true = {name: column * many for name, column in truth_columns(data.labels[rows], data.task).items()}
        columns |= true | {"predicted": decisions(probabilities, data.task, default_calibration(data.task))}
        return numbers_csv(columns, numbers_of(probabilities, data.task))
    columns["label"] = [data.classes[label] for label in data.labels[rows]] * many
    columns["predicted"] = [data.classes[index] for index in probabilities.argmax(axis=1)]
    return predictions_csv(columns, probabilities, data.classes)


def _folds_of(predictions: Predictions) -> IntArray:
    return np.zeros(len(predictions.truth), np.int64) if predictions.folds is None else np.asarray(predictions.folds)


def _comparison(probe: SlideProbe) -> bytes:
    drawn = {name: found[probe.shown[0]] for name, found in probe.scores.items()}
    units = probe.scores[BASELINE].headline.units
    unit = "patients" if probe.data.group_column else "slides"
    return draw_intervals(
        {name: (each.value, each.low, each.high) for name, each in drawn.items()},
        x_label=f"{score_words(probe.shown[0])} with 95 % interval over {units:,} {unit}",
        title="Slide embeddings compared by linear probes",
    )
