"""How often intervals of cross-validated scores of times and amounts hold the truth.

Cohorts are made of Gaussian features on which a hazard or an amount depends; fits, folds, scores and intervals are the
package's own. The truth of a cell is the mean over all its fitted models of their scores on new patients.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gigapath.evaluation.intervals import evaluate
from gigapath.evaluation.labels import Task
from gigapath.evaluation.scores import Scorer
from gigapath.linear_probe.fits import fit_targets
from gigapath.linear_probe.heads import one_thread
from gigapath.linear_probe.slides import held_out, repeated_folds
from gigapath.options import Options, option

WIDTH, FOLDS, REPEATS = 30, 5, 5
NEW = 400  # patients on whom each fitted model is tried
STRENGTHS = {"regression": (0.0, 0.5, 0.8), "survival": (0.0, 0.7, 1.6)}  # R2 of the rule; deviation of its log hazard
CENSORED = 0.5  # rate of censoring over the mean hazard: about a third of the patients
HORIZON = 1.5  # in mean survival times
HEADING = "| task, patients, strength | cohorts | coverage (mean width) of each score: truth, estimate |\n|---|---|---|"
TASKS = {
    "regression": Task("amounts", "regression", ("amount",), loss="mse"),
    "survival": Task("times", "survival", ("risk",), horizons=(HORIZON,), loss="cox"),
}


@dataclass(frozen=True)
class TargetCoverageBench(Options):
    """What `python -m scripts.bench target-coverage` measures."""

    cohorts: int = option(200, "cohorts of a cell", at_least=2)
    sizes: str = option("40,100", "patients of a cohort, with commas", metavar="NUMBERS")
    seed: int = option(0, "of all that is drawn", at_least=0)
    processes: int = option(1, "processes that share the work", at_least=1)


@dataclass(frozen=True)
class Cell:
    """One kind of cohort."""

    setting: str
    patients: int
    strength: float


def measure(options: TargetCoverageBench) -> Iterator[dict[str, Any]]:
    """Yields a row a cell: by score `truth`, `estimate` (means), `coverage`, `width`, `defined` (share of cohorts)."""
    sizes = [int(size) for size in options.sizes.split(",")]
    cells = [Cell(setting, size, strength) for setting in TASKS for size in sizes for strength in STRENGTHS[setting]]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for cell in cells:
            work = partial(cohort_of, cell, seed=options.seed)
            yield {**vars(cell), **row_of(list(pool.map(work, range(options.cohorts))))}


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        f"{name} {each['coverage']:.2f} ({each['width']:.2f}): {each['truth']:.2f}, {each['estimate']:.2f}"
        for name, each in row["scores"].items()
    ]
    return f"| {row['setting']}, {row['patients']}, {row['strength']:g} | {row['cohorts']} | {'; '.join(cells)} |"


def cohort_of(cell: Cell, number: int, *, seed: int) -> dict[str, list[float]]:
    """By score: truth, value, low, high in one cohort."""
    task = TASKS[cell.setting]
    generator = np.random.default_rng([seed, number, cell.patients, round(100 * cell.strength)])
    features = generator.normal(size=(cell.patients + NEW, WIDTH))
    truth = _truth(cell, features[:, 0], generator)
    known = np.arange(cell.patients)
    kinds = truth[:, 1].astype(np.int64) if task.times else np.zeros(len(truth), np.int64)
    groups = np.arange(len(truth)).astype(str)
    folds = repeated_folds(kinds[known], groups[known], FOLDS, REPEATS, seed=number)
    with one_thread(torch.device("cpu")):
        said, _ = fit_targets(task, features, truth, groups, [fold.train for fold in folds], number)
    predictions, _ = held_out(folds, truth, groups, task.classes, said, task=task)
    found = evaluate(predictions).estimates
    new = [
        Scorer(
            replace(
                predictions,
                truth=truth[cell.patients :],
                probabilities=each[cell.patients :],
                folds=None,
                ranking=None,
                groups=None,
            )
        ).plain()
        for each in said
    ]
    return {
        name: [float(np.nanmean([each[name] for each in new])), each.value, each.low, each.high]
        for name, each in found.items()
    }


def _truth(cell: Cell, first: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    if cell.setting == "regression":
        noise = generator.normal(size=len(first))
        return np.asarray(np.sqrt(cell.strength) * first + np.sqrt(1 - cell.strength) * noise)
    time = generator.exponential(size=len(first)) * np.exp(-cell.strength * first)
    censored = generator.exponential(size=len(first)) / CENSORED
    return np.stack([np.minimum(time, censored), time <= censored], axis=1).astype(np.float64)


def row_of(cohorts: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Coverage and width of each score over the cohorts in which it has an interval."""
    scores = {}
    for name in cohorts[0]:
        truth, value, low, high = np.array([cohort[name] for cohort in cohorts]).T
        defined = ~np.isnan(low)
        held = (low <= truth.mean()) & (truth.mean() <= high)
        if not defined.any():
            continue
        scores[name] = {
            "truth": round(float(truth.mean()), 4),
            "estimate": round(float(np.nanmean(value)), 4),
            "coverage": round(float(held[defined].mean()), 4),
            "width": round(float((high - low)[defined].mean()), 4),
            "defined": round(float(defined.mean()), 4),
        }
    return {"cohorts": len(cohorts), "scores": scores}
