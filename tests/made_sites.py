"""Cases of embeddings that know class and site to a stated degree, for `made_sites` of scripts.bench.robustness."""

NEIGHBORS = (3, 5, 11, 21)
CASES = {
    "biology": {"patients": 30, "classes": 3, "sites": 3, "of_class": 3.0, "of_site": 0.5, "seed": 0},
    "site": {"patients": 30, "classes": 2, "sites": 4, "of_class": 0.5, "of_site": 3.0, "seed": 1},
    "both": {"patients": 60, "classes": 2, "sites": 2, "of_class": 1.5, "of_site": 1.5, "seed": 2},
    "few": {"patients": 16, "classes": 2, "sites": 2, "of_class": 1.0, "of_site": 1.0, "seed": 3},
}
