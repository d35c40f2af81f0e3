"""Slide-level probes: logistic regression on slide embeddings, with the plain mean of the tiles always beside.

Every embedding sees the same folds, and what is compared is compared on the same patients. The penalty is chosen
inside the training folds, so that no test slide has a say in anything.

Legend: S slides, D width, C classes, K folds, R repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gigapath.evaluation import (
    Estimate,
    Evaluation,
    Predictions,
    average_by_group,
    evaluate,
    paired_difference,
    prior_probabilities,
    site_probabilities,
)
from gigapath.evaluation.labels import alike_classes
from gigapath.evaluation.splits import Fold, audit, draw_parts
from gigapath.linear_probe.heads import PATIENCE, PENALTIES, LogisticRegression, cross_entropy, one_thread
from gigapath.linear_probe.options import ProbeOptions, SlideProbeOptions
from gigapath.linear_probe.slide_data import FloatArray, IntArray, SlideData, TextArray, load_slides
from gigapath.options import to_dict

BASELINE = "tile-mean"
INNER_FOLDS = 3
# With fewer patients of a class in a test fold, a replicate of the bootstrap often draws none of them.
FEW_IN_FOLD = 5


@dataclass(frozen=True)
class EmbeddingScore:
    """What a probe of one embedding reached.

    Args:
        predictions: of all test slides of all folds and repeats, rows ordered alike for every embedding.
        by_patient: the evaluation over patients, probabilities of a patient's slides averaged; None where a patient
            has slides of several labels, or nothing says who the patients are.
        by_slide: the same over slides, drawn patient by patient.
        lead: over tile-mean, on the same patients (or slides) and draws; None for tile-mean itself.
        by_site: site -> its evaluation alone, over patients where they are known; empty where no column names sites.
        width: D, None for controls.
        penalties: the penalty chosen in each fit.
    """

    predictions: Predictions
    by_patient: Evaluation | None
    by_slide: Evaluation
    lead: dict[str, Estimate] | None
    by_site: dict[str, Evaluation]
    width: int | None = None
    penalties: tuple[float, ...] = ()

    @property
    def main(self) -> Evaluation:
        """Over patients where they are known, else over slides."""
        return self.by_patient or self.by_slide


@dataclass(frozen=True)
class SlideProbe:
    """The table: embeddings in the order asked for, `tile-mean` first, and controls; `rows` says which slide, fold
    and repeat each row of the predictions is."""

    data: SlideData
    scores: dict[str, EmbeddingScore]
    controls: dict[str, EmbeddingScore]
    rows: IntArray
    options: dict[str, Any]
    notes: tuple[str, ...]


def probe_slides(
    folder: Path | str, labels: Path | str | None, options: ProbeOptions, slide_options: SlideProbeOptions
) -> SlideProbe:
    """Probe slide embeddings by repeated folds, or by a given split.

    Args:
        folder: the output folder of `gigapath embed`, or one of its `slides_*` folders.
        labels: CSV with `slide_id` (or `input`, `file`), the label's column, and the patient's.
        options: columns, intervals, what to allow; `split` switches from folds to that column.
        slide_options: embeddings, folds and repeats.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong.
    """
    if labels is None:
        raise ValueError("--labels: expected a CSV with slide_id and the label. Slide embeddings carry no labels.")
    names = [name.strip() for name in (slide_options.embedding or "").split(",") if name.strip()]
    wanted = [BASELINE, *(name for name in names if name != BASELINE)]
    data = load_slides(folder, Path(labels), wanted, options, slide_options)
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
    folds = [(fold.train, fold.test) for fold in drawn]
    if data.test is None and options.replicates > 0:
        notes += _few_in_fold(data, [test for _, test in folds])
    rows = np.concatenate([test for _, test in folds])
    fold_of_row = np.repeat(np.arange(len(folds)), [len(test) for _, test in folds])

    said: dict[str, FloatArray] = {}
    penalties: dict[str, tuple[float, ...]] = {}
    with one_thread(torch.device("cpu")):
        for name, vectors in data.vectors.items():
            fits = [
                fit_fold(vectors, data.labels, data.groups, train, test, options.seed, names=data.classes)
                for train, test in folds
            ]
            said[name] = np.concatenate([probabilities for probabilities, _ in fits])
            penalties[name] = tuple(penalty for _, penalty in fits)
    classes = len(data.classes)
    controls = {
        "chance": [prior_probabilities(data.labels[train], len(test), classes) for train, test in folds],
    }
    if data.sites is not None:
        places = data.sites
        controls["site alone"] = [
            site_probabilities(data.labels[train], places[train], places[test], classes) for train, test in folds
        ]

    def predictions(probabilities: FloatArray) -> Predictions:
        return Predictions(data.labels[rows], probabilities, data.classes, groups=data.groups[rows], folds=fold_of_row)

    patients = data.group_column is not None and data.one_label_per_group
    if data.group_column is not None and not patients:
        notes.append(
            f"a {data.group_column} has slides of several labels, so scores are over slides, not over patients"
        )
    sites = None if data.sites is None else data.sites[rows]

    def score(probabilities: FloatArray, against: FloatArray | None) -> EmbeddingScore:
        baseline = None if against is None else predictions(against)
        return _score(predictions(probabilities), baseline, sites, patients, options)

    scores = {
        name: replace(
            score(probabilities, None if name == BASELINE else said[BASELINE]),
            width=data.vectors[name].shape[1],
            penalties=penalties[name],
        )
        for name, probabilities in said.items()
    }
    return SlideProbe(
        data=data,
        scores=scores,
        controls={name: score(np.concatenate(parts), None) for name, parts in controls.items()},
        rows=rows,
        options={**to_dict(options), **to_dict(slide_options)},
        notes=tuple(notes),
    )


def _folds(data: SlideData, options: ProbeOptions, slide_options: SlideProbeOptions) -> list[Fold]:
    """The training and test slides of every fit, the folds of one repeat after the other; those of the first repeat
    test the slides that `finetune` tests with the same seed."""
    nobody = np.zeros(0, np.int64)
    if data.test is not None:
        return [Fold(0, np.flatnonzero(~data.test), nobody, np.flatnonzero(data.test))]
    parts = slide_options.folds
    _refuse_rare_classes(data.labels, data.groups, parts, data.classes, f"fewer than {parts} folds. Take fewer folds")
    found: list[Fold] = []
    for repeat in range(slide_options.repeats):
        part = draw_parts(data.labels, data.groups.tolist(), parts, seed=options.seed + repeat)
        for number in range(parts):
            rows = np.flatnonzero(part != number), nobody, np.flatnonzero(part == number)
            found.append(Fold(len(found), *rows))
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


def _few_in_fold(data: SlideData, tests: Sequence[IntArray]) -> list[str]:
    """A sentence where test folds are so small that intervals over them are rough, else nothing."""
    counts = []
    for test in tests:
        pairs = set(zip(data.groups[test].tolist(), data.labels[test].tolist(), strict=True))
        counts += [(sum(label == index for _, label in pairs), name) for index, name in enumerate(data.classes)]
    fewest, name = min(counts)
    if fewest >= FEW_IN_FOLD:
        return []
    unit = "slides" if data.group_column is None else f"groups ({data.group_column})"
    return [
        f"a test fold has only {fewest} {unit} of class {name}: take intervals as rough and too narrow. A replicate "
        "often draws none of them and leaves the fold out, which moves intervals of AUPRC and balanced accuracy up, at "
        "times past the score itself. Take fewer --folds, or more slides"
    ]


def _score(
    predictions: Predictions,
    baseline: Predictions | None,
    sites: TextArray | None,
    patients: bool,
    options: ProbeOptions,
) -> EmbeddingScore:
    """All evaluations of one embedding's (or control's) predictions; `sites` names the site of each of their rows."""

    def units(some: Predictions) -> Predictions:
        return average_by_group(some) if patients else some

    def over(some: Predictions) -> Evaluation:
        return evaluate(some, replicates=options.replicates, seed=options.seed)

    lead = None
    if baseline is not None:
        draws = {"replicates": options.replicates, "seed": options.seed}
        lead = paired_difference(units(predictions), units(baseline), **draws)
    return EmbeddingScore(
        predictions=predictions,
        by_patient=over(units(predictions)) if patients else None,
        by_slide=over(predictions),
        lead=lead,
        by_site={str(site): over(units(predictions.rows(sites == site))) for site in np.unique(sites)}
        if sites is not None
        else {},
    )


def fit_fold(
    vectors: FloatArray,
    labels: IntArray,
    groups: TextArray,
    train: IntArray,
    test: IntArray,
    seed: int,
    *,
    names: Sequence[str],
) -> tuple[FloatArray, float]:
    """Fit on the training slides with the penalty that folds inside them choose.

    Args:
        vectors: (S, D) embeddings.
        labels: (S,) class index.
        groups: (S,) patients; none is on both sides of an inner fold.
        train: rows of the training slides.
        test: rows of the test slides.
        seed: of the inner folds.
        names: of the classes, for messages.

    Returns:
        (len(test), C) probabilities of the test slides, and the penalty.
    """
    classes = int(labels.max()) + 1
    _refuse_rare_classes(
        labels[train],
        groups[train],
        INNER_FOLDS,
        names,
        f"fewer than the {INNER_FOLDS} folds by which the penalty is chosen among the training slides. Add slides",
    )
    part = draw_parts(labels[train], groups[train].tolist(), INNER_FOLDS, seed=seed)
    inner = [(np.flatnonzero(part != number), np.flatnonzero(part == number)) for number in range(INNER_FOLDS)]
    losses: dict[float, float] = dict.fromkeys(PENALTIES, 0.0)
    fits = [_Fit(vectors, labels, train[fit], classes) for fit, _ in inner]
    tried: list[float] = []
    for penalty in PENALTIES:
        for regression, (_, held) in zip(fits, inner, strict=True):
            said = regression.probabilities(penalty, train[held])
            losses[penalty] += cross_entropy(said, labels[train[held]]) * len(held)
        tried.append(penalty)
        if tried.index(min(tried, key=lambda each: losses[each])) + PATIENCE < len(tried):
            break
    best = min(tried, key=lambda each: losses[each])
    final = _Fit(vectors, labels, train, classes)
    return final.probabilities(best, test), best


class _Fit:
    """Logistic regression on some slides, in the space that they span: with fewer slides than entries the penalised
    weights lie in it, and nothing else changes."""

    def __init__(self, vectors: FloatArray, labels: IntArray, rows: IntArray, classes: int) -> None:
        everything, known = torch.from_numpy(vectors), torch.from_numpy(rows)
        mean, deviation = everything[known].mean(dim=0), everything[known].std(dim=0, correction=0)
        scale = torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-300), 0.0)
        self._standardised = (everything - mean) * scale
        if len(rows) < vectors.shape[1]:
            basis = torch.linalg.qr(self._standardised[known].t())[0]  # (D, rows), orthonormal
            self._standardised = self._standardised @ basis
        self._regression = LogisticRegression(
            self._standardised, torch.from_numpy(labels), known, classes, standardise=False
        )

    def probabilities(self, penalty: float, rows: IntArray) -> FloatArray:
        """Probabilities of some slides for a penalty."""
        return self._regression.fit(penalty).probabilities(self._standardised, torch.from_numpy(rows))
