"""The recipe against a plain loop, the solvers against scikit-learn, all of them against a rule that is known."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as SkLogistic
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors as SkNeighbours

from gigapath.evaluation.scores import f1_weighted
from gigapath.linear_probe import TileProbeOptions, heads
from gigapath.linear_probe.heads import (
    LogisticRegression,
    NearestNeighbours,
    blocks,
    choose_neighbours,
    choose_penalty,
    cross_entropy,
    draw_batches,
    first_weights,
    standardisation,
    train,
)

CPU = torch.device("cpu")
HUNDRED = torch.arange(60), torch.arange(60, 100)


def planted(
    rows: int, width: int, classes: int = 2, *, seed: int = 0, separation: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal classes of unit variance whose means lie apart along the first axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    features = torch.randn(rows, width, generator=generator)
    if classes == 2:
        features[:, 0] += separation * (labels - 0.5)
    else:
        features[torch.arange(rows), labels] += separation
    return features, labels


# ----------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize("classes", [2, 4])
def test_recipe_gives_the_weights_of_a_plain_loop(classes: int) -> None:
    """Tolerance 1e-5: the same float32 arithmetic in another order over 600 steps, on entries up to 1."""
    features, labels = planted(900, 24, classes)
    train_rows, val_rows = torch.arange(600), torch.arange(600, 900)
    recipe = TileProbeOptions(steps=600, batch_size=32, lr=0.02, weight_decay=0.01, eval_every=100)
    fit = train(features, labels, train_rows, val_rows, classes, recipe, seed=3)

    layer = torch.nn.Linear(24, classes)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), first_weights(classes, 24, 3), strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=600, eta_min=0.0)
    looks, best, losses = [], (-1.0, 0, torch.empty(0)), []
    for step, rows in enumerate(draw_batches(600, 600, 32, 3)):
        loss = torch.nn.functional.cross_entropy(layer(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            said = layer(features[val_rows]).argmax(dim=1)
            f1 = float(f1_score(labels[val_rows], said, average="weighted"))
            looks.append((step + 1, f1, sum(losses[-100:]) / 100))
            if f1 > best[0]:
                best = (f1, step + 1, layer.weight.detach().clone())
    assert [(look.step, look.val_f1) for look in fit.looks] == [
        (step, pytest.approx(f1, abs=1e-12)) for step, f1, _ in looks
    ]
    assert [look.train_loss for look in fit.looks] == pytest.approx([loss for *_, loss in looks], abs=1e-5)
    assert fit.step == best[1]
    assert torch.allclose(fit.head.weight, best[2], atol=1e-5, rtol=0)
    assert (fit.head.weight - first_weights(classes, 24, 3)[0]).abs().max() > 1e-2


def test_recipe_is_the_same_bit_for_bit_and_another_for_another_seed() -> None:
    features, labels = planted(500, 8)
    rows = torch.arange(500)
    recipe = TileProbeOptions(steps=60, batch_size=16, eval_every=20)
    first, again, other = (train(features, labels, rows[:300], rows[300:], 2, recipe, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.head.weight, again.head.weight) and first.looks == again.looks
    assert not torch.equal(first.head.weight, other.head.weight)


def test_recipe_leaves_the_threads_and_the_generator_of_the_caller_alone() -> None:
    features, labels = planted(100, 8)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    fit = train(features, labels, *HUNDRED, 2, TileProbeOptions(steps=25, batch_size=4, eval_every=10), seed=0)
    assert [look.step for look in fit.looks] == [10, 20, 25]  # the last steps too
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)


def test_draws_are_fresh_at_every_step_and_with_replacement() -> None:
    batches = draw_batches(1000, 2000, 16, seed=0)
    assert len({tuple(batch.tolist()) for batch in batches}) == 2000
    counts = torch.bincount(batches.flatten(), minlength=1000)
    assert counts.min() > 0 and abs(float(counts.float().std()) - math.sqrt(32)) < 1  # Poisson: mean 32
    assert any(len(set(batch.tolist())) < 16 for batch in batches)


def test_loss_that_is_not_finite_is_an_error() -> None:
    features, labels = planted(100, 8)
    with pytest.raises(ValueError, match="--lr"):
        train(features * 1e30, labels, *HUNDRED, 2, TileProbeOptions(steps=50, lr=1e9), seed=0)


def test_quick_f1_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    truth, said = generator.integers(0, 3, 200), generator.integers(0, 4, 200)
    assert f1_weighted(truth, said, 5) == pytest.approx(f1_score(truth, said, average="weighted"))


def test_rows_side_by_side_are_not_copied() -> None:
    features = torch.arange(40.0).view(10, 4)
    parts = list(blocks(features, torch.arange(2, 9), size=3))
    assert all(x.data_ptr() == features[int(rows[0])].data_ptr() for rows, x in parts)
    scattered = torch.tensor([5, 1, 2])
    assert torch.equal(next(iter(blocks(features, scattered)))[1], features[scattered])
    reversed_rows = torch.tensor([3, 1, 1])  # first and last two apart, as three rows in order would be
    assert torch.equal(next(iter(blocks(features, reversed_rows)))[1], features[reversed_rows])


# ---------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_logistic_regression_is_scikit_learns(classes: int, penalty: float) -> None:
    """The minimum is one point: mean loss + penalty / 2 |W|^2 is scikit-learn's with C = 1 / (rows * penalty).

    Tolerance: both stop at a small gradient, 1e-5 here."""
    features, labels = planted(300, 10, classes)
    features = features.double() * torch.linspace(0.1, 30, 10) + 5
    head = LogisticRegression(features, labels, torch.arange(300), classes).fit(penalty)
    mean, deviation = features.mean(dim=0), features.std(dim=0, unbiased=False)
    reference = SkLogistic(C=1 / (300 * penalty), tol=1e-10, max_iter=10_000)
    # Two classes there have one row of weights, twice as far for the same split: half the penalty on each side.
    if classes == 2:
        reference.set_params(C=1 / (300 * penalty / 2))
    reference.fit(((features - mean) / deviation).numpy(), labels.numpy())
    ours = head.probabilities(features, torch.arange(300))
    assert np.abs(ours - reference.predict_proba(((features - mean) / deviation).numpy())).max() < 1e-3
    assert np.allclose(ours.sum(axis=1), 1)


def test_entries_that_never_change_are_left_out() -> None:
    features, labels = planted(200, 6)
    features[:, 3] = 7.0
    _, scale = standardisation(features, torch.arange(200))
    assert scale[3] == 0 and (scale[[0, 1, 2, 4, 5]] > 0).all()
    head = LogisticRegression(features, labels, torch.arange(200), 2).fit(0.1)
    assert torch.isfinite(head.weight).all() and not head.weight[:, 3].any()


def test_penalty_is_the_one_with_the_least_loss_on_validation() -> None:
    features, labels = planted(400, 60, separation=1.0)
    train_rows, val_rows = torch.arange(100), torch.arange(100, 400)
    head, choice = choose_penalty(features, labels, train_rows, val_rows, 2)
    assert choice.tried[choice.value] == min(choice.tried.values())
    said = head.probabilities(features, val_rows)
    assert cross_entropy(said, labels[val_rows].numpy()) == pytest.approx(choice.tried[choice.value], abs=1e-12)
    # With 100 rows of 60 entries the weakest penalties overfit: the search went past its best and then ended.
    assert list(choice.tried).index(choice.value) == len(choice.tried) - 1 - heads.PATIENCE
    assert len(choice.tried) < len(heads.PENALTIES)


def test_neighbours_are_scikit_learns_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = planted(500, 8, 3)
    features[:, 5] += 3
    train_rows, query = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:400], torch.arange(450, 500)
    monkeypatch.setattr(heads.blocks, "__defaults__", (64,))
    said = NearestNeighbours(features, labels, train_rows, 3).probabilities(query, [1, 7, 100])
    reference = SkNeighbours(n_neighbors=100, metric="cosine").fit(features[train_rows].numpy())
    distance, index = reference.kneighbors(features[query].numpy())
    votes = np.exp((1 - distance) / heads.TEMPERATURE)
    for k, shares in said.items():
        expected = np.zeros((50, 3))
        for row in range(50):
            np.add.at(expected[row], labels[train_rows].numpy()[index[row, :k]], votes[row, :k])
        assert np.abs(shares - expected / expected.sum(axis=1, keepdims=True)).max() < 1e-4, k


def test_number_of_neighbours_never_exceeds_the_training_rows() -> None:
    features, labels = planted(60, 4)
    _, choice = choose_neighbours(features, labels, torch.arange(15), torch.arange(15, 60), 2)
    assert set(choice.tried) == {1.0, 3.0, 5.0, 10.0}


@pytest.mark.parametrize("solver", ["sgd", "lbfgs", "knn"])
def test_solvers_reach_the_rate_of_the_planted_rule(solver: str) -> None:
    """Means two standard deviations apart: no rule errs less than 1 - Phi(1) = 0.1587 of the time."""
    features, labels = planted(6000, 6)
    rows = torch.arange(6000)
    if solver == "sgd":
        fit = train(features, labels, rows[:3000], rows[3000:4000], 2, TileProbeOptions(steps=2000), seed=0)
        said = fit.head.logits(features, rows[4000:])
        direction = fit.head.weight[1] - fit.head.weight[0]
        assert float(direction[0] / direction.norm()) > 0.98
    elif solver == "lbfgs":
        head, _ = choose_penalty(features, labels, rows[:3000], rows[3000:4000], 2)
        said = head.probabilities(features, rows[4000:])
    else:
        neighbours, choice = choose_neighbours(features, labels, rows[:3000], rows[3000:4000], 2)
        said = neighbours.probabilities(rows[4000:], [int(choice.value)])[int(choice.value)]
    accuracy = float((said.argmax(axis=1) == labels[4000:].numpy()).mean())
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert bayes - (0.06 if solver == "knn" else 0.025) < accuracy < bayes + 0.025
