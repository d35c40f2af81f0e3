"""Embeddings that know class and site to a stated degree, several slides a patient."""

import numpy as np

NEIGHBORS = (3, 5, 11, 21)
CASES = {
    "biology": {"patients": 30, "classes": 3, "sites": 3, "of_class": 3.0, "of_site": 0.5, "seed": 0},
    "site": {"patients": 30, "classes": 2, "sites": 4, "of_class": 0.5, "of_site": 3.0, "seed": 1},
    "both": {"patients": 60, "classes": 2, "sites": 2, "of_class": 1.5, "of_site": 1.5, "seed": 2},
    "few": {"patients": 16, "classes": 2, "sites": 2, "of_class": 1.0, "of_site": 1.0, "seed": 3},
}


def made_sites(
    *, patients: int, classes: int, sites: int, of_class: float, of_site: float, seed: int, width: int = 12
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(vectors (S, width), labels (S,), sites (S,), patients (S,)): every class and site has a direction of its own."""
    random = np.random.RandomState(seed)
    groups = np.repeat(np.arange(patients), 1 + np.arange(patients) % 3)
    labels = (groups % classes).astype(np.int64)
    places = random.randint(0, sites, patients)[groups]
    vectors = random.standard_normal((len(groups), width)) + 0.8 * random.standard_normal((patients, width))[groups]
    vectors[np.arange(len(groups)), labels] += of_class
    vectors[np.arange(len(groups)), classes + places] += of_site
    return vectors, labels, np.array([f"site {place}" for place in places]), groups
