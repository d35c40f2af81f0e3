"""The robustness index of embeddings: how much the neighbors of a slide share its class rather than its site.

RI(k) = sum_i SO_i / sum_i (SO_i + OS_i), where of the k nearest neighbors of slide i (by cosine distance, those of its
own patient left out) SO_i have the same class and another site, OS_i another class and the same site. 1: neighbors
follow the biology, 0: the site. Koemen et al., "Towards Robust Foundation Models for Digital Pathology" (PathoROB,
arXiv 2507.17845), after de Jong et al. (arXiv 2501.18055), who take the ratio SO / OS; pooled over slides, and k chosen
as in the package croma, whose values on made embeddings are a golden of the tests.

Its interval is that of the jackknife over patients at that k: without a patient the slides that had its slides as
neighbors have the next ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.intervals import LEVEL, ROUNDING

ROBUSTNESS = "robustness"  # where the facts of scores hold it
NEIGHBORS = (5, 11, 21)
BLOCK_ROWS = 512  # slides whose distances to all are held at once


@dataclass(frozen=True)
class Robustness:
    """The robustness index of one embedding.

    Attributes:
        index: at `k` neighbors; NaN where no neighbor counts.
        k: of the numbers tried the one by which the neighbors' vote tells the class best (balanced accuracy), the first
            of equals.
        by_k: number of neighbors -> index.
        at_random: the index if all other patients' slides were neighbors: what class and site alone give.
        slides: how many have a site.
        low, high: the 95 % interval of `index` over patients; NaN where leaving out any changes nothing.
    """

    index: float
    k: int
    by_k: dict[str, float]
    at_random: float
    slides: int
    low: float = float("nan")
    high: float = float("nan")


def robustness_index(
    vectors: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    sites: npt.NDArray[np.str_],
    groups: npt.NDArray[np.generic],
    *,
    neighbors: Sequence[int] = NEIGHBORS,
) -> Robustness | None:
    """The robustness index, or None with slides of one site or class only.

    Args:
        vectors: (S, D).
        labels: (S,) class index.
        sites: (S,), "" = not known: the slide is left out.
        groups: (S,) patients.
    """
    known = sites != ""
    vectors, labels, sites = vectors[known], labels[known], sites[known]
    groups, slides_of = np.unique(groups[known], return_inverse=True, return_counts=True)[1:]
    if len(np.unique(sites)) < 2 or len(np.unique(labels)) < 2:
        return None
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    most, classes = min(max(neighbors), len(labels) - 1), int(labels.max()) + 1
    held = min(most + int(slides_of.max()), len(labels) - 1)  # what is left of them without any one patient are enough
    counts, everyone = np.zeros((2, most), np.int64), np.zeros(2, np.int64)  # of SO and OS, up to each neighbor
    votes = np.zeros((len(labels), most), np.int64)
    nearest, told = np.zeros((len(labels), held), np.int64), np.zeros((2, len(labels), held), bool)
    for start in range(0, len(labels), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        same_class, same_site = labels[rows, None] == labels, sites[rows, None] == sites
        other = groups[rows, None] != groups
        kinds = np.stack([same_class & ~same_site & other, ~same_class & same_site & other])  # (2, rows, S)
        everyone += kinds.sum(axis=(1, 2))
        distance = np.where(other, 1 - unit[rows] @ unit.T, np.inf)
        nearest[rows] = np.argsort(distance, axis=1, kind="stable")[:, :held]
        told[:, rows] = np.take_along_axis(kinds, nearest[None, rows], axis=2)
        order = nearest[rows, :most]
        counts += told[:, rows, :most].sum(axis=1).cumsum(axis=1)
        usable = np.take_along_axis(other, order, axis=1)
        votes[rows] = (np.eye(classes)[labels[order]] * usable[..., None]).cumsum(axis=1).argmax(axis=2)
        votes[rows][~usable[:, 0]] = -1  # nobody to vote
    accuracy = {}
    voted = votes[:, 0] >= 0
    for k in neighbors:
        right = votes[:, min(k, most) - 1] == labels
        accuracy[k] = np.mean([right[voted & (labels == each)].mean() for each in np.unique(labels[voted])])
    best = max(neighbors, key=lambda k: accuracy[k])
    by_k = {str(k): _share(counts[:, min(k, most) - 1]) for k in neighbors}
    limits = _limits(by_k[str(best)], groups, groups[nearest], told, min(best, most))
    return Robustness(by_k[str(best)], best, by_k, _share(everyone), len(labels), *limits)


def _limits(
    index: float, groups: npt.NDArray[np.int64], nearest: npt.NDArray[np.int64], told: npt.NDArray[np.bool_], k: int
) -> tuple[float, float]:
    """By the jackknife over patients, t with one less than these; NaN where it has no width.

    Args:
        groups: (S,) patient of a slide, from 0.
        nearest: (S, M) patients of its neighbors, the nearest first; M covers k of them without any one patient.
        told: (2, S, M) whether a neighbor is an SO, an OS.
    """
    from scipy.stats import t

    patients = int(groups.max()) + 1
    by_slide = told[:, :, :k].sum(axis=2)  # (2, S)
    every = by_slide.sum(axis=1)
    # All slides that have a patient's among their first k neighbors, sorted by that patient: few, so that this is fast.
    pairs = np.unique(np.stack([nearest[:, :k].ravel(), np.arange(len(groups)).repeat(k)], axis=1), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(patients + 1))
    without = np.zeros(patients)
    for patient in range(patients):
        own, rows = groups == patient, pairs[starts[patient] : starts[patient + 1], 1]
        rows = rows[~own[rows]]
        stays = nearest[rows] != patient
        stays &= stays.cumsum(axis=1) <= k
        changed = (told[:, rows] & stays).sum(axis=(1, 2)) - by_slide[:, rows].sum(axis=1)
        without[patient] = _share(every - by_slide[:, own].sum(axis=1) + changed)
    half = t.ppf((1 + LEVEL) / 2, patients - 1) * np.sqrt((patients - 1) * without.var())
    if not half >= ROUNDING:  # NaN, too: without one patient no neighbor counts
        return float("nan"), float("nan")
    return max(0.0, index - float(half)), min(1.0, index + float(half))


def _share(counts: npt.NDArray[np.int64]) -> float:
    return float(counts[0] / counts.sum()) if counts.sum() else float("nan")
