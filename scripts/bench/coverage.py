"""How often intervals of cross-validated scores hold the truth, and how often `compare` finds a difference of nothing.

Cohorts are made of Gaussian features, so that what every fitted model reaches on new patients is known; fits, folds,
scores and intervals are the package's own. The truth of a cell is the mean over all its fitted models: the performance
of the procedure. Cohorts come in pairs of the same patients, seen by two embeddings of equal worth: null studies.

All cells grow together; with `--out` a run that was cut short leaves what it measured, and goes on.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtr, ndtri

from gigapath.evaluation.intervals import bootstrap_weights, closed_limits, degrees_of_freedom, paired_difference, power
from gigapath.evaluation.scores import Predictions, Scorer, average_by_group
from gigapath.files import write_bytes_atomic
from gigapath.linear_probe.fits import fit_folds
from gigapath.linear_probe.heads import one_thread
from gigapath.linear_probe.slides import held_out, repeated_folds
from gigapath.options import Options, option

WIDTH, FOLDS, REPEATS = 30, 5, 5
SCORES = ("auroc", "auprc", "accuracy", "balanced_accuracy", "kappa_quadratic")
SLIDES, ALIKE = 3, 0.5  # of a patient in the clustered cell, and the share of variance that they have in common
CORRELATIONS = (0.0, 0.7)  # of the two embeddings of a null study, in turn
OLD_STUDIES, OLD_REPLICATES = 100, 400
BATCH = 10  # studies that are fitted at once
DIFFERENCE = 0.1  # whose power is told
HEADING = (
    "| patients, share, AUROC, penalty | cohorts | AUROC | AUPRC | accuracy | balanced accuracy | kappa | "
    "old bootstrap (AUROC, AUPRC) | type-I error (AUROC, accuracy) | power for 0.1 |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CoverageBench(Options):
    """What `python -m scripts.bench coverage` measures."""

    cohorts: int = option(2000, "cohorts of a cell with a fixed penalty at 20 and 40 patients; half at 100", at_least=2)
    tuned: int = option(500, "cohorts of a cell with a penalty chosen inside the folds; 0 = none", at_least=0)
    penalty: float = option(0.1, "the fixed penalty", above=0)
    sizes: str = option("20,40,100", "patients of a cohort, with commas", metavar="NUMBERS")
    seed: int = option(0, "of all that is drawn", at_least=0)
    processes: int = option(1, "processes that share the work", at_least=1)
    device: str = option("cpu", "where the regressions are fitted: cpu, cuda", metavar="DEVICE")
    out: str | None = option(None, "keep what was measured, and go on with it (default: nothing kept)", metavar="DIR")


@dataclass(frozen=True)
class Cell:
    """One kind of cohort: patients, share of positives, AUROC of the best rule, slides a patient, penalty (None = by
    inner folds)."""

    patients: int
    share: float
    auroc: float
    slides: int
    penalty: float | None


def measure(options: CoverageBench) -> Iterator[dict[str, Any]]:
    """Measure all cells, `BATCH` studies of each in turn; what `--out` holds is gone on with.

    Yields:
        Rows with the cell, `cohorts`, and by score: `truth`, `estimate` (means), `coverage` of the procedure's truth,
        `own` (of the mean of the cohort's own models), `width`, `type_1`, and `old` where the old bootstrap was drawn.
    """
    sizes = [int(size) for size in options.sizes.split(",")]
    wanted: dict[Cell, int] = {}
    for penalty in (options.penalty, None):
        for patients in sizes:
            count = options.tuned if penalty is None else options.cohorts // (2 if patients >= 100 else 1)
            for share in (0.5, 0.25):
                for auroc in (0.5, 0.65, 0.8, 0.95):
                    wanted[Cell(patients, share, auroc, 1, penalty)] = count
            if patients == 40 and penalty is not None:
                wanted[Cell(patients, 0.5, 0.8, SLIDES, penalty)] = count
    folder = None if options.out is None else Path(options.out)
    held = {cell: _read(folder, cell) for cell in wanted}
    tasks = [
        (cell, number)
        for turn in range(max(wanted.values()) // BATCH // 2 + 1)
        for cell, count in wanted.items()
        if len(held[cell]) <= (number := turn * BATCH) < count / 2
    ]
    work = partial(_work, seed=options.seed, device=options.device)
    with _mapping(options.processes) as mapped:
        for (cell, _), studies in zip(tasks, mapped(work, tasks), strict=True):
            held[cell] += list(studies)
            if folder is not None:
                _write(folder, cell, held[cell])
    yield from (row_of(cell, studies) for cell, studies in held.items() if len(studies))


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Any]:
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield pool.map


def _work(task: tuple[Cell, int], seed: int, device: str) -> FloatArray:
    with one_thread(torch.device("cpu")):
        return studies_of(*task, seed=seed, device=device)


def in_words(row: dict[str, Any]) -> str:
    """A row of the table: coverage and mean width of each score."""
    penalty = "by inner folds" if row["penalty"] is None else f"{row['penalty']:g}"
    slides = f" of {row['slides']} slides" if row["slides"] > 1 else ""
    cells = [f"{row['scores'][name]['coverage']:.3f} ({row['scores'][name]['width']:.2f})" for name in SCORES]
    old = [row["scores"][name].get("old") for name in ("auroc", "auprc")]
    wrong = " ".join(f"{row['scores'][name]['type_1']:.3f}" for name in ("auroc", "accuracy"))
    words = [
        f"{row['patients']}{slides}, {row['share']:g}, {row['auroc']:g}, {penalty}",
        f"{row['cohorts']:,}",
        *cells,
        " ".join(f"{each:.3f}" for each in old if each is not None),
        wrong,
        f"{row['power']:.2f}",
    ]
    return f"| {' | '.join(words)} |"


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{'_'.join(map(str, vars(cell).values()))}.npy"


def _read(folder: Path | None, cell: Cell) -> list[FloatArray]:
    if folder is None or not _path(folder, cell).is_file():
        return []
    return list(np.load(_path(folder, cell), allow_pickle=False))


def _write(folder: Path, cell: Cell, studies: list[FloatArray]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array(studies))
    write_bytes_atomic(_path(folder, cell), buffer.getvalue())


def studies_of(cell: Cell, first: int, *, seed: int, device: str = "cpu") -> FloatArray:
    """`BATCH` studies from a number on, all with the same folds; each of two cohorts of the same patients.

    Returns:
        (studies, scores, 2 x 6 + 2): of each cohort truth, value, low, high, low and high of the old bootstrap (NaN
        where it was not drawn); then p and power of the difference.
    """
    generator = np.random.default_rng(
        [seed, first, cell.patients, round(cell.share * 100), round(cell.auroc * 100), cell.slides]
    )
    found, pair = [], []
    for cohort, (predictions, truth) in enumerate(_cohorts(cell, generator, first, device)):
        values = Scorer(predictions).plain()
        limits = closed_limits(predictions, values)
        drawn = first + cohort // 2 < OLD_STUDIES and cell.penalty is not None and cell.auroc in (0.65, 0.8)
        old = _old_bootstrap(predictions) if drawn else np.full((len(SCORES), 2), np.nan)
        columns = [truth, [values[name] for name in SCORES], *zip(*(limits[name] for name in SCORES), strict=True)]
        pair.append((predictions, [*columns, *old.T]))
        if len(pair) == 2:
            (one, ours), (other, theirs) = pair
            difference, df = paired_difference(one, other), degrees_of_freedom(one)
            p = [difference[name].p for name in SCORES]
            found.append([*ours, *theirs, p, [power(DIFFERENCE, difference[name], df) for name in SCORES]])
            pair = []
    return np.array(found, dtype=np.float64).swapaxes(1, 2)


def row_of(cell: Cell, studies: Sequence[FloatArray]) -> dict[str, Any]:
    """Coverage, width and type-I error in one cell; of each study (scores, 2 x 6 + 2)."""
    scores = {}
    every = np.array(studies)
    for place, name in enumerate(SCORES):
        truth, value, low, high, old_low, old_high = every[:, place, :12].reshape(-1, 6).T
        mean, drawn = truth.mean(), ~np.isnan(old_low)
        p = every[:, place, 12]
        found = {
            "truth": mean,
            "estimate": value.mean(),
            "coverage": ((low <= mean) & (mean <= high)).mean(),
            "own": ((low <= truth) & (truth <= high)).mean(),
            "width": (high - low).mean(),
            "type_1": (p < 0.05).mean(),
        }
        if len(p) > 1:
            found["type_1_correlated"] = (p[1::2] < 0.05).mean()
        if drawn.any():
            found["old"] = ((old_low <= mean) & (mean <= old_high))[drawn].mean()
        scores[name] = {key: round(float(each), 4) for key, each in found.items()}
    return {**vars(cell), "cohorts": 2 * len(studies), "scores": scores, "power": float(every[:, 0, 13].mean())}


def _cohorts(
    cell: Cell, generator: np.random.Generator, number: int, device: str
) -> Iterator[tuple[Predictions, list[float]]]:
    """Cohorts, two by two of the same patients: out-of-fold predictions, and what their models reach on new ones."""
    labels = np.repeat([0, 1], [cell.patients - round(cell.share * cell.patients), round(cell.share * cell.patients)])
    half = np.sqrt(2) * ndtri(cell.auroc) / 2  # of the distance between the classes, along the first feature
    slides_of = np.repeat(np.arange(cell.patients), cell.slides)
    if cell.slides > 1:  # so that the best rule reaches the same on the patients' means
        half *= np.sqrt(ALIKE + (1 - ALIKE) / cell.slides)
    stack = []
    for study in range(BATCH):
        shared, alike = _noise(cell, generator, slides_of), CORRELATIONS[study % len(CORRELATIONS)]
        for weight in (1.0, alike):
            features = weight * shared + np.sqrt(1 - weight**2) * _noise(cell, generator, slides_of)
            features[:, 0] += half * (2 * labels[slides_of] - 1)
            # Logits at the origin and one step along each feature tell a fitted model's weights.
            stack.append(np.concatenate([features, np.zeros((1, WIDTH)), np.eye(WIDTH)]))
    folds = repeated_folds(labels[slides_of], slides_of.astype(str), FOLDS, REPEATS, seed=number)
    marked = np.concatenate([labels[slides_of], np.zeros(WIDTH + 1, np.int64)])
    groups = np.concatenate([slides_of.astype(str), np.full(WIDTH + 1, "probe")])
    trains = [fold.train for fold in folds]
    every, _ = fit_folds(np.stack(stack), marked, groups, trains, number, penalty=cell.penalty, device=device)
    for shares in every:
        logits = np.log(shares[:, -WIDTH - 1 :, 1] / shares[:, -WIDTH - 1 :, 0])
        predictions, _ = held_out(folds, marked, groups, ("negative", "positive"), shares)
        graded = replace(predictions, ordinal=True)  # kappa is among its scores
        yield average_by_group(graded), _truth(cell, half, logits, float(labels.mean()))


def _noise(cell: Cell, generator: np.random.Generator, slides_of: IntArray) -> FloatArray:
    """Of variance 1, shared in part by the slides of a patient."""
    own = generator.normal(size=(len(slides_of), WIDTH))
    if cell.slides == 1:
        return own
    return np.sqrt(ALIKE) * generator.normal(size=(cell.patients, WIDTH))[slides_of] + np.sqrt(1 - ALIKE) * own


def _truth(cell: Cell, half: float, logits: FloatArray, prevalence: float) -> list[float]:
    """The means over the fitted models of `SCORES` on new patients; logits (models, 1 + WIDTH)."""
    weights = logits[:, 1:] - logits[:, :1]
    size = np.maximum(np.linalg.norm(weights, axis=1), 1e-12)
    negative, positive = (logits[:, 0] + sign * half * weights[:, 0] for sign in (-1, 1))
    spread = size * np.sqrt(ALIKE + (1 - ALIKE) / cell.slides if cell.slides > 1 else 1.0)
    apart = (positive - negative) / spread
    if cell.slides == 1:
        hits, alarms = ndtr(positive / spread), ndtr(negative / spread)
    else:  # probabilities of the slides are averaged: no closed form
        hits, alarms = (_above_half(mean, size, cell.slides) for mean in (positive, negative))
    accuracy = prevalence * hits + (1 - prevalence) * (1 - alarms)
    said = prevalence * hits + (1 - prevalence) * alarms
    chance = prevalence * said + (1 - prevalence) * (1 - said)
    # Precision at each positive's own threshold, z above its mean.
    z = ndtri((np.arange(400) + 0.5) / 400)
    found = prevalence * ndtr(-z) / (prevalence * ndtr(-z) + (1 - prevalence) * ndtr(-z - apart[:, None]))
    values = (
        ndtr(apart / np.sqrt(2)),
        found.mean(axis=1),
        accuracy,
        (hits + 1 - alarms) / 2,
        (accuracy - chance) / (1 - chance),
    )
    return [float(each.mean()) for each in values]


def _above_half(mean: FloatArray, size: FloatArray, slides: int) -> FloatArray:
    """How often the mean probability of a patient's slides is above one half, (models,)."""
    generator = np.random.default_rng(0)
    common = np.sqrt(ALIKE) * generator.normal(size=(5000, 1))
    draws = common + np.sqrt(1 - ALIKE) * generator.normal(size=(5000, slides))
    shares = [(1 / (1 + np.exp(-m - s * draws))).mean(axis=1) for m, s in zip(mean, size, strict=True)]
    return np.array([(each > 0.5).mean() for each in shares])


def _old_bootstrap(predictions: Predictions) -> FloatArray:
    """(scores, 2): percentiles over drawn patients of scores within folds, as they were before: a negative control."""
    folds = np.asarray(predictions.folds)
    parts = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    scorers = [Scorer(Predictions(*_of_one(predictions, rows), ordinal=True)) for rows in parts]
    drawn = []
    for weights in bootstrap_weights(predictions.truth, predictions.groups, replicates=OLD_REPLICATES, seed=0):
        drawn.append(np.stack([scorer(weights[:, rows]) for scorer, rows in zip(scorers, parts, strict=True)]))
    with np.errstate(all="ignore"):
        means = np.nanmean(np.concatenate(drawn, axis=1), axis=0)
    chosen = [scorers[0].names.index(name) for name in SCORES]
    return np.nanquantile(means[:, chosen], [0.025, 0.975], axis=0).T


def _of_one(predictions: Predictions, rows: npt.NDArray[np.intp]) -> tuple[Any, ...]:
    return np.asarray(predictions.truth)[rows], np.asarray(predictions.probabilities)[rows], predictions.class_names
