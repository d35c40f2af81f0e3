"""How often the interval of the robustness index holds the mean index of such cohorts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gigapath.evaluation.robustness import NEIGHBORS, robustness_index
from gigapath.options import Options, option

STRENGTHS = ((0.0, 0.0), (1.5, 1.5), (3.0, 0.5), (0.5, 3.0))  # how well embeddings know class and site
HEADING = (
    "| patients, of class, of site | neighbors | cohorts | coverage (mean width) | mean index |\n|---|---|---|---|---|"
)


@dataclass(frozen=True)
class RobustnessBench(Options):
    """What `python -m scripts.bench robustness` measures."""

    cohorts: int = option(400, "cohorts of a cell", at_least=2)
    sizes: str = option("20,40,100", "patients of a cohort, with commas", metavar="NUMBERS")
    seed: int = option(10_000, "of the first cohort; the next ones follow", at_least=0)


def measure(options: RobustnessBench) -> Iterator[dict[str, Any]]:
    """Yields a row a kind of cohort and way to choose the neighbors: `coverage`, `width` and `index` (means), `defined`
    (cohorts with an interval)."""
    for patients in map(int, options.sizes.split(",")):
        for of_class, of_site in STRENGTHS:
            for name, neighbors in (("5", (5,)), ("chosen", NEIGHBORS)):
                found = []
                for seed in range(options.seed, options.seed + options.cohorts):
                    made = made_sites(
                        patients=patients, classes=2, sites=3, of_class=of_class, of_site=of_site, seed=seed
                    )
                    one = robustness_index(*made, neighbors=neighbors)
                    if one is not None and one.index == one.index:
                        found.append((one.index, one.low, one.high))
                index, low, high = np.array(found).T
                defined = ~np.isnan(low)
                held = (low <= index.mean()) & (index.mean() <= high)
                yield {
                    "patients": patients,
                    "of_class": of_class,
                    "of_site": of_site,
                    "neighbors": name,
                    "cohorts": options.cohorts,
                    "defined": int(defined.sum()),
                    "coverage": float(held[defined].mean()),
                    "width": float((high - low)[defined].mean()),
                    "index": float(index.mean()),
                }


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    what = f"{row['patients']}, {row['of_class']:g}, {row['of_site']:g}"
    coverage = f"{row['coverage']:.3f} ({row['width']:.2f})"
    return f"| {what} | {row['neighbors']} | {row['defined']} | {coverage} | {row['index']:.2f} |"


def made_sites(
    *, patients: int, classes: int, sites: int, of_class: float, of_site: float, seed: int, width: int = 12
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(vectors (S, width), labels (S,), sites (S,), patients (S,)) of one to three slides a patient: every class and
    site has a direction of its own, in which it lies `of_class` or `of_site` standard deviations off."""
    random = np.random.RandomState(seed)
    groups = np.repeat(np.arange(patients), 1 + np.arange(patients) % 3)
    labels = (groups % classes).astype(np.int64)
    places = random.randint(0, sites, patients)[groups]
    vectors = random.standard_normal((len(groups), width)) + 0.8 * random.standard_normal((patients, width))[groups]
    vectors[np.arange(len(groups)), labels] += of_class
    vectors[np.arange(len(groups)), classes + places] += of_site
    return vectors, labels, np.array([f"site {place}" for place in places]), groups
