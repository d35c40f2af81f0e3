"""The robustness index of embeddings: how much the neighbors of a slide share its class rather than its site.

RI(k) = sum_i SO_i / sum_i (SO_i + OS_i), where of the k nearest neighbors of slide i (by cosine distance, those of its
own patient left out) SO_i have the same class and another site, OS_i another class and the same site. 1: neighbors
follow the biology, 0: the site. Koemen et al., "Towards Robust Foundation Models for Digital Pathology" (PathoROB,
arXiv 2507.17845), after de Jong et al. (arXiv 2501.18055), who take the ratio SO / OS; pooled over slides, and k chosen
as in the package croma, whose values on made embeddings are a golden of the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    """

    index: float
    k: int
    by_k: dict[str, float]
    at_random: float
    slides: int


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
    vectors, labels, sites, groups = vectors[known], labels[known], sites[known], groups[known]
    if len(np.unique(sites)) < 2 or len(np.unique(labels)) < 2:
        return None
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    most, classes = min(max(neighbors), len(labels) - 1), int(labels.max()) + 1
    counts, everyone = np.zeros((2, most), np.int64), np.zeros(2, np.int64)  # of SO and OS, up to each neighbor
    votes = np.zeros((len(labels), most), np.int64)
    for start in range(0, len(labels), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        same_class, same_site = labels[rows, None] == labels, sites[rows, None] == sites
        other = groups[rows, None] != groups
        kinds = np.stack([same_class & ~same_site & other, ~same_class & same_site & other])  # (2, rows, S)
        everyone += kinds.sum(axis=(1, 2))
        distance = np.where(other, 1 - unit[rows] @ unit.T, np.inf)
        order = np.argsort(distance, axis=1, kind="stable")[:, :most]
        counts += np.take_along_axis(kinds, order[None], axis=2).sum(axis=1).cumsum(axis=1)
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
    return Robustness(by_k[str(best)], best, by_k, _share(everyone), len(labels))


def _share(counts: npt.NDArray[np.int64]) -> float:
    return float(counts[0] / counts.sum()) if counts.sum() else float("nan")
