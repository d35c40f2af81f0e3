"""Losses, scores and curves of survival against lifelines and scikit-survival, weights against repeated rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_survival import SETS, made_survival

from gigapath.evaluation.calibration import (
    baseline_hazard,
    cox_loss,
    discrete_loss,
    discrete_survival,
    interval_edges,
)
from gigapath.evaluation.scores import ProductLimit, SurvivalScores, group_curve, log_rank, survival_notes

GOLDENS = Path(__file__).parent / "goldens" / "survival.npz"


def scorer(made: dict[str, np.ndarray]) -> SurvivalScores:
    times = made["times"]
    horizons = [times[0], times[-1]] if len(times) > 1 else [times[0]]
    return SurvivalScores(made["time"], made["event"], made["risk"], made["survival"], times, horizons)


def ours(number: int) -> dict[str, float]:
    made = made_survival(number)
    time, event, last = made["time"], made["event"], made["times"][-1]
    one = scorer(made)
    found = dict(zip(one.names, one(np.ones((1, len(time))))[0].tolist(), strict=True))
    aurocs = [value for name, value in found.items() if name.startswith("auroc")]
    limit = ProductLimit(time, event)
    statistic, p = log_rank(time, event, made["group"])
    return {
        "harrell_c": found["harrell_c"],
        "harrell_c_sksurv": found["harrell_c"],
        "uno_c": found["uno_c"],
        "integrated_brier": found["integrated_brier"],
        "auroc_first": aurocs[0],
        "auroc_last": aurocs[-1],
        "kaplan_meier": float(limit.at(limit.survival(np.ones((1, len(time)))), [last])[0, 0]),
        "log_rank": statistic,
        "log_rank_p": p,
    }


def test_scores_equal_lifelines_and_scikit_survival() -> None:
    with np.load(GOLDENS) as held:
        names, values = held["names"].tolist(), held["values"]
    assert len(values) == SETS
    tied = 0
    # scikit-survival gives no AUROC at all where the last row is censored together with an event, before it or not.
    assert np.isnan(values).any(axis=1).sum() <= 3
    for number, row in enumerate(values):
        golden, made = dict(zip(names, row.tolist(), strict=True)), made_survival(number)
        time, event = torch.from_numpy(made["time"]), torch.from_numpy(made["event"])
        tied += len(np.unique(made["time"][made["event"]])) < made["event"].sum()
        for name, value in ours(number).items():
            assert np.isnan(golden[name]) or value == pytest.approx(golden[name], abs=1e-6), (number, name)
        risk = made["x"] @ [golden["coefficient_0"], golden["coefficient_1"]]
        efron = float(cox_loss(torch.from_numpy(risk), time, event))
        assert efron == pytest.approx(golden["cox_efron"], abs=1e-6), number
        risk = made["x"] @ [golden["breslow_coefficient_0"], golden["breslow_coefficient_1"]]
        hazard = baseline_hazard(risk, made["time"], made["event"], [made["times"][-1]])[0]
        assert hazard == pytest.approx(golden["breslow"], abs=1e-6), number
    assert tied > SETS / 2


@pytest.mark.parametrize("number", range(6))
def test_losses_have_the_gradient_of_their_value(number: int) -> None:
    made = made_survival(number)
    time, event = torch.from_numpy(made["time"]), torch.from_numpy(made["event"])
    risk = torch.from_numpy(made["risk"]).requires_grad_()
    assert torch.autograd.gradcheck(lambda risk: cox_loss(risk, time, event), (risk,))
    edges = interval_edges(made["time"], made["event"], 4)
    logits = torch.randn(len(time), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    assert torch.autograd.gradcheck(lambda each: discrete_loss(each, time, event, edges), (logits.requires_grad_(),))


def test_cox_loss_by_hand_and_far_from_zero() -> None:
    """Efron's denominators written out for two tied events of four rows; risks of +-300 neither overflow nor vanish."""
    risk, time, event = [0.3, -0.2, 1.0, 0.0], [1.0, 1.0, 2.0, 1.0], [1, 1, 1, 0]
    e = np.exp(risk)
    by_hand = np.log(e.sum()) + np.log(e.sum() - 0.5 * (e[0] + e[1])) + np.log(e[2]) - sum(risk[:3])
    args = torch.tensor(time), torch.tensor(event)
    assert float(cox_loss(torch.tensor(risk, dtype=torch.float64), *args)) == pytest.approx(by_hand, abs=1e-12)
    far = torch.tensor([300.0, -300.0, -300.0, 300.0], requires_grad=True)
    cox_loss(far, *args).backward()
    assert torch.isfinite(far.grad).all() and far.grad.abs().max() > 0.1
    nobody = torch.tensor(risk, requires_grad=True)
    cox_loss(nobody, args[0], torch.zeros(4)).backward()
    assert not nobody.grad.any()


def test_discrete_hazards_by_hand() -> None:
    hazard = np.array([0.2, 0.5, 0.3])
    logits = torch.tensor(np.log(hazard / (1 - hazard)))[None]
    edges = [1.0, 2.0, 4.0]
    cases = {
        (0.5, 1): 0.2,
        (1.0, 1): 0.2,  # an interval holds its end
        (3.0, 1): 0.8 * 0.5 * 0.3,
        (1.5, 0): 0.8,  # censored inside the second: nothing is known of it
        (2.0, 0): 0.8 * 0.5,
        (9.0, 0): 0.8 * 0.5 * 0.7,
        (9.0, 1): 0.8 * 0.5 * 0.7,
    }
    for (time, event), likelihood in cases.items():
        loss = discrete_loss(logits, torch.tensor([time]).double(), torch.tensor([event]), edges)
        assert float(loss) == pytest.approx(-np.log(likelihood), abs=1e-9), (time, event)
    curve = discrete_survival(logits.numpy(), edges, [0.5, 1.0, 3.0, 4.0, 9.0])[0]
    assert curve == pytest.approx([0.9, 0.8, 0.5 * (0.4 + 0.28), 0.28, 0.28])
    assert discrete_survival(logits.numpy(), [1.0, 2.0, 2.0], [2.0])[0, 0] == pytest.approx(0.28)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_weights_are_repeated_rows(number: int) -> None:
    made = made_survival(number)
    random = np.random.default_rng(number)
    weights = random.integers(0, 4, (5, len(made["time"]))).astype(np.float64)
    one = scorer(made)
    for drawn, found in zip(weights, one(weights), strict=True):
        rows = np.repeat(np.arange(len(drawn)), drawn.astype(int))
        again = {key: value if key == "times" else value[rows] for key, value in made.items()}
        ends = made["time"].max() in again["time"]  # else the horizon may lie behind what was drawn
        expected = scorer(again)(np.ones((1, len(rows))))[0]
        assert not ends or found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_degenerate_follow_up_gets_a_sentence_and_no_number() -> None:
    time, risk = np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 3.0, 2.0, 1.0])
    none, one, early = np.zeros(4, bool), np.array([True, False, False, False]), np.array([False, False, True, True])

    def found(event: np.ndarray, horizon: float) -> dict[str, float]:
        scores = SurvivalScores(time, event, risk, np.full((4, 1), 0.5), [horizon], [horizon])
        return dict(zip(scores.names, scores(np.ones((1, 4)))[0].tolist(), strict=True))

    assert "none of the 4 rows has an event" in survival_notes(time, none, [2.5])[0]
    assert np.isnan(found(none, 2.5)["harrell_c"]) and np.isnan(found(none, 2.5)["auroc_at_2.5"])
    assert "a single row has an event" in survival_notes(time, one, [2.5])[0]
    assert found(one, 2.5)["harrell_c"] == 1
    assert "no row has an event by the horizon 2.5" in survival_notes(time, early, [2.5])[0]
    assert np.isnan(found(early, 2.5)["auroc_at_2.5"])
    (last,) = survival_notes(time, early, [4.0])
    assert "not before the end of the last follow-up" in last
    scores = found(early, 4.0)
    assert all(np.isnan(scores[name]) for name in ("integrated_brier", "auroc_at_4", "observed_over_expected_at_4"))
    assert survival_notes(time, early, [3.5]) == []
    assert all(map(np.isnan, log_rank(time, none, np.arange(4) // 2)))


def test_group_curve_counts_who_is_left() -> None:
    curve = group_curve("high", np.array([1.0, 2, 2, 5]), np.array([True, True, False, True]), [0, 2, 3])
    assert (curve["at_risk"], curve["events"]) == ([4, 3, 1], 3)
    assert (curve["times"], curve["censored"]) == ([1, 2, 5], [0, 1, 0])
    assert curve["survival"] == pytest.approx([0.75, 0.5, 0])
