"""The robustness index: equal to the package croma's, and what it says of embeddings that know class or site only."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_sites import CASES, NEIGHBORS
from scipy.stats import t

from gigapath.evaluation.robustness import BLOCK_ROWS, robustness_index
from scripts.bench.robustness import RobustnessBench, made_sites, measure

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "robustness.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_index_is_that_of_croma(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels, sites, groups = made_sites(**CASES[name])
    found = robustness_index(vectors, labels, sites, groups, neighbors=NEIGHBORS)
    golden = GOLDENS[name]
    assert found is not None and found.k == golden["k"]
    assert found.index == pytest.approx(golden["index"], abs=1e-12)
    assert found.by_k == pytest.approx(golden["by_k"], abs=1e-12)
    assert len(labels) < BLOCK_ROWS
    monkeypatch.setattr("gigapath.evaluation.robustness.BLOCK_ROWS", 7)  # in blocks as at once
    assert robustness_index(vectors, labels, sites, groups, neighbors=NEIGHBORS) == found


@pytest.mark.parametrize("name", CASES)
def test_interval_is_that_of_leaving_each_patient_out(name: str) -> None:
    made = made_sites(**CASES[name])
    found, groups = robustness_index(*made), made[3]
    assert found is not None
    left = []
    for patient in np.unique(groups):
        without = robustness_index(*(each[groups != patient] for each in made), neighbors=[found.k])
        assert without is not None
        left.append(without.index)
    half = t.ppf(0.975, len(left) - 1) * math.sqrt((len(left) - 1) * np.var(left))
    assert half > 0.01  # it depends on who is there
    assert (found.low, found.high) == pytest.approx((max(0, found.index - half), min(1, found.index + half)), abs=1e-12)


def test_its_interval_holds_the_mean_of_such_cohorts() -> None:
    rows = list(measure(RobustnessBench(cohorts=60, sizes="40")))
    assert {row["neighbors"] for row in rows} == {"5", "chosen"} and len(rows) == 8
    assert all(row["coverage"] >= (0.88 if row["neighbors"] == "5" else 0.8) for row in rows)


def test_index_says_what_neighbors_share() -> None:
    vectors, labels, sites, groups = made_sites(patients=40, classes=2, sites=2, of_class=0, of_site=0, seed=5)
    by_class, by_site = (np.eye(2)[codes] for codes in (labels, (sites == "site 0").astype(int)))
    pure = [robustness_index(each, labels, sites, groups) for each in (by_class, by_site, vectors)]
    assert pure[0].index == 1 and pure[1].index == 0 and math.isnan(pure[0].low)  # no width says that nothing is known
    assert abs(pure[2].index - pure[2].at_random) < 0.1
    assert pure[0].at_random == pure[1].at_random  # of class and site alone


def test_index_is_not_defined_without_two_sites_and_leaves_out_slides_without_one() -> None:
    vectors, labels, sites, groups = made_sites(**CASES["both"])
    assert robustness_index(vectors, labels, np.full_like(sites, "one"), groups) is None
    assert robustness_index(vectors, np.zeros_like(labels), sites, groups) is None
    unknown = np.where(np.arange(len(sites)) % 5 == 0, "", sites)
    some = unknown != ""
    left = robustness_index(vectors[some], labels[some], sites[some], groups[some])
    assert robustness_index(vectors, labels, unknown, groups) == left and left.slides == some.sum()
    apart = robustness_index(np.eye(4), np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"]), np.arange(4))
    assert math.isnan(apart.index)  # class and site are one: no neighbor tells them apart
