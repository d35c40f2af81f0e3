"""Scores against scikit-learn, weights against repeated rows, intervals against what they promise."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as t_distribution
from sklearn import metrics as sk

from gigapath.evaluation import intervals as intervals_module
from gigapath.evaluation.calibration import calibration_slope
from gigapath.evaluation.intervals import (
    Estimate,
    auroc_limits,
    bootstrap_weights,
    degrees_of_freedom,
    evaluate,
    kappa_limits,
    mean_limits,
    paired_difference,
    power,
    share_limits,
)
from gigapath.evaluation.results import FOLD, Results, read_results, score, stratum_lines, summary_csv, write_results
from gigapath.evaluation.scores import (
    Predictions,
    Scorer,
    average_by_group,
    confusion_matrix,
    macro_curves,
    prior_probabilities,
    rank_by,
    scale_of,
    site_probabilities,
)


def made(rows: int, classes: int, seed: int = 0, *, decimals: int | None = None, signal: float = 1.0) -> Predictions:
    """Predictions with some skill; rounding makes ties."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, classes, rows)
    logits = generator.normal(size=(rows, classes)) + signal * np.eye(classes)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if decimals is not None:
        probabilities = np.round(probabilities, decimals)
    return Predictions(truth, probabilities, tuple(f"class {c}" for c in range(classes)))


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("decimals", [None, 1])
def test_scores_equal_scikit_learn(classes: int, decimals: int | None) -> None:
    predictions = made(401, classes, decimals=decimals)
    predictions = Predictions(predictions.truth, predictions.probabilities, predictions.class_names, ordinal=True)
    truth, said, chosen = predictions.truth, predictions.probabilities, predictions.predicted
    ours = Scorer(predictions).plain()
    one_hot = np.eye(classes)[truth]
    curves = range(1, 2) if classes == 2 else range(classes)
    expected = {
        "accuracy": sk.accuracy_score(truth, chosen),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, chosen),
        "f1_weighted": sk.f1_score(truth, chosen, average="weighted"),
        "precision_macro": sk.precision_score(truth, chosen, average="macro", zero_division=0),
        "recall_macro": sk.recall_score(truth, chosen, average="macro", zero_division=0),
        "auroc": np.mean([sk.roc_auc_score(one_hot[:, c], said[:, c]) for c in curves]),
        "auprc": np.mean([sk.average_precision_score(one_hot[:, c], said[:, c]) for c in curves]),
        "kappa_quadratic": sk.cohen_kappa_score(truth, chosen, weights="quadratic", labels=range(classes)),
        "brier": ((said - one_hot) ** 2).sum(axis=1).mean() / (2 if classes == 2 else 1),
    }
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
    assert np.array_equal(confusion_matrix(predictions), sk.confusion_matrix(truth, chosen))


def test_scores_with_a_class_missing_equal_scikit_learn_and_say_so() -> None:
    predictions = made(200, 3).rows(made(200, 3).truth != 2)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = sk.balanced_accuracy_score(predictions.truth, predictions.predicted)
    evaluation = evaluate(predictions, replicates=20)
    assert evaluation["balanced_accuracy"].value == pytest.approx(balanced, abs=1e-12)
    assert evaluation["f1_weighted"].value == pytest.approx(
        sk.f1_score(predictions.truth, predictions.predicted, average="weighted"), abs=1e-12
    )
    assert np.isnan(evaluation["auroc:class 2"].value) and evaluation["auroc:class 2"].undefined == 20
    one_hot = np.eye(3)[predictions.truth]
    expected = np.mean([sk.roc_auc_score(one_hot[:, c], predictions.probabilities[:, c]) for c in (0, 1)])
    assert evaluation["auroc"].value == pytest.approx(expected, abs=1e-12)
    assert evaluation.notes == ("class class 2 has no row: its AUROC and AUPRC are not defined and left out of means",)
    assert json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))["scores"]["auroc:class 2"]["value"] is None


def test_expected_calibration_error_of_a_made_case() -> None:
    # Two rows say 0.9 and one is right, two say 0.6 and both are right: (2 |0.9 - 0.5| + 2 |0.6 - 1|) / 4.
    said = np.array([[0.1, 0.9], [0.1, 0.9], [0.4, 0.6], [0.4, 0.6]])
    assert Scorer(Predictions(np.array([1, 0, 1, 1]), said, ("a", "b"))).plain()["ece"] == pytest.approx(0.4)


def test_multi_label_scores_equal_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    truth = generator.integers(0, 2, (300, 5))
    said = np.round(np.clip(generator.normal(0.4 + 0.2 * truth, 0.2), 0, 1), 2)
    ours = Scorer(Predictions(truth, said, tuple("abcde"))).plain()
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(truth, said, average="macro"), abs=1e-12)
    assert ours["auroc_micro"] == pytest.approx(sk.roc_auc_score(truth, said, average="micro"), abs=1e-12)
    assert ours["auprc"] == pytest.approx(sk.average_precision_score(truth, said, average="macro"), abs=1e-12)
    assert ours["auprc_micro"] == pytest.approx(sk.average_precision_score(truth, said, average="micro"), abs=1e-12)
    assert ours["auroc:c"] == pytest.approx(sk.roc_auc_score(truth[:, 2], said[:, 2]), abs=1e-12)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.integers(2, 4).flatmap(
        lambda classes: st.lists(
            st.tuples(st.integers(0, classes - 1), st.integers(0, 3), *[st.integers(0, 3)] * classes),
            min_size=1,
            max_size=12,
        )
    )
)
def test_weights_equal_repeated_rows(rows: list[tuple[int, ...]]) -> None:
    table = np.array(rows)
    truth, weights, said = table[:, 0], table[:, 1], table[:, 2:] / 3
    names = tuple("abcd"[: said.shape[1]])
    weighted = dict(
        zip(
            Scorer(Predictions(truth, said, names, ordinal=True)).names,
            Scorer(Predictions(truth, said, names, ordinal=True))(weights[None].astype(float))[0],
            strict=True,
        )
    )
    if weights.sum() == 0:
        assert np.isnan(weighted["accuracy"])
        return
    repeated = Scorer(Predictions(truth.repeat(weights), said.repeat(weights, axis=0), names, ordinal=True)).plain()
    for name, value in repeated.items():
        assert weighted[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_bootstrap_draws_whole_groups_and_keeps_the_classes() -> None:
    truth = np.array([0, 0, 0, 1, 1, 1, 0, 1])
    groups = np.array(["p1", "p1", "p2", "p3", "p3", "p4", "p5", "p5"])  # p5 holds both classes
    weights = np.concatenate(list(bootstrap_weights(truth, groups, replicates=400, seed=1)))
    assert weights.shape == (400, 8)
    for first, second in ((0, 1), (3, 4), (6, 7)):
        assert np.array_equal(weights[:, first], weights[:, second])
    assert np.array_equal(weights[:, 0] + weights[:, 2], np.full(400, 2.0))  # p1, p2: two draws of the class-0 units
    assert np.array_equal(weights[:, 3] + weights[:, 5], np.full(400, 2.0))
    assert np.array_equal(weights[:, 6], np.ones(400))
    assert len(np.unique(weights[:, 0])) == 3


def test_bootstrap_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.arange(30) % 3
    whole = np.concatenate(list(bootstrap_weights(truth, None, replicates=50, seed=2)))
    monkeypatch.setattr(intervals_module, "BLOCK_ENTRIES", 70)
    blocks = list(bootstrap_weights(truth, None, replicates=50, seed=2))
    assert len(blocks) == 25 and np.array_equal(np.concatenate(blocks), whole)
    assert not np.array_equal(whole, np.concatenate(list(bootstrap_weights(truth, None, replicates=50, seed=3))))


def test_interval_of_accuracy_is_the_binomial_one() -> None:
    truth = np.zeros(400, dtype=int)
    truth[200:] = 1
    right = np.arange(400) % 5 > 0  # 0.8 in both classes
    said = np.where((truth == 1) == right, 0.9, 0.1)
    accuracy = evaluate(Predictions(truth, np.stack([1 - said, said], axis=1), ("a", "b")))["accuracy"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert accuracy.value == pytest.approx(0.8)
    assert accuracy.low == pytest.approx(0.8 - half, abs=0.006)
    assert accuracy.high == pytest.approx(0.8 + half, abs=0.006)


def test_clustered_interval_is_wider_when_rows_of_a_group_agree() -> None:
    predictions = made(40, 2, seed=4)
    doubled = [np.repeat(column, 10, axis=0) for column in (predictions.truth, predictions.probabilities)]
    groups = np.repeat(np.arange(40), 10)
    single = evaluate(predictions, seed=5)
    clustered = evaluate(Predictions(*doubled, ("a", "b"), groups=groups), seed=5)
    pretended = evaluate(Predictions(*doubled, ("a", "b")), seed=5)
    assert clustered["auroc"].low == pytest.approx(single["auroc"].low, abs=1e-12)
    assert clustered["auroc"].high == pytest.approx(single["auroc"].high, abs=1e-12)
    width = clustered["auroc"].high - clustered["auroc"].low
    assert width > 2 * (pretended["auroc"].high - pretended["auroc"].low)
    assert clustered.units == 40 and clustered.rows == 400
    assert "groups" in clustered.covers and "rows" in pretended.covers


def test_undefined_replicates_are_counted() -> None:
    truth = np.array([[1, 0], [0, 1], [0, 1], [0, 0]])  # labels are not stratified: the one positive may be missed
    predictions = Predictions(truth, np.linspace(0.1, 0.8, 8).reshape(4, 2), ("a", "b"))
    drawn = np.concatenate(list(bootstrap_weights(truth, None, replicates=200, seed=0)))
    missed = int(((drawn[:, 0] == 0) | (drawn[:, 0] == 4)).sum())
    evaluation = evaluate(predictions, replicates=200)
    assert evaluation["auroc:a"].undefined == missed > 0
    assert evaluation["accuracy"].undefined == 0


def test_an_interval_of_zero_width_is_none() -> None:
    right = Predictions(np.arange(40) % 2, np.eye(2)[np.arange(40) % 2] * 0.8 + 0.1, ("a", "b"))
    one_group = replace(made(40, 2, seed=4), groups=np.zeros(40))
    for predictions in (right, one_group):
        found = evaluate(predictions, replicates=50)
        assert np.isnan([found["accuracy"].low, found["accuracy"].high]).all()
        assert f"{found['accuracy']:+.4f}" == f"{found['accuracy'].value:+.4f}"
        assert any("no interval for accuracy" in note for note in found.notes)
        assert found.to_dict()["scores"]["accuracy"]["low"] is None
    assert not evaluate(right, replicates=0).notes


def test_a_small_error_is_no_zero() -> None:
    assert [str(Estimate(each, each / 2, 2 * each, 0)) for each in (2e-9, 0.25)] == [
        "2e-09 [1e-09, 4e-09]",
        "0.2500 [0.1250, 0.5000]",
    ]


def test_an_interval_holds_its_score() -> None:
    """Of confidences that are right to the row, which every draw of the rows makes worse."""
    sure = np.repeat([0.55, 0.65, 0.75, 0.85, 0.95], 40)
    truth = np.arange(200) % 2
    right = np.concatenate([np.arange(40) // 2 < round(20 * each) for each in sure[::40]])
    of_one = np.where(right == (truth == 1), sure, 1 - sure)
    found = evaluate(Predictions(truth, np.stack([1 - of_one, of_one], axis=1), ("a", "b")), replicates=200)
    assert found["ece"].low <= found["ece"].value < 1e-9 < found["ece"].high


@pytest.mark.parametrize("classes", [2, 4])
def test_macro_curves_are_scikit_learns_of_one_hot_truth(classes: int) -> None:
    generator = np.random.default_rng(3)
    truth = np.arange(120) % classes
    logits = generator.normal(size=(120, classes)).round(1)
    one_hot = np.eye(classes)[truth]
    auroc, auprc = macro_curves(truth, logits)
    assert auroc == pytest.approx(sk.roc_auc_score(one_hot, logits, average="macro"), abs=1e-12)
    assert auprc == pytest.approx(sk.average_precision_score(one_hot, logits, average="macro"), abs=1e-12)
    assert np.isnan(macro_curves(np.zeros(5, dtype=int), logits[:5])).all()


def cross_validated(patients: int = 40, classes: int = 2, repeats: int = 3, seed: int = 6, **more) -> Predictions:
    """Four folds a repeat; every fit has an offset and a spread of its own, which its training slides tell."""
    generator = np.random.default_rng(seed)
    truth = np.arange(patients) % classes
    logits, scales, folds, rows = [], [], [], []
    for fit in range(4 * repeats):
        held = np.random.default_rng([seed, fit // 4]).permutation(patients)[fit % 4 :: 4]
        centre, spread = generator.normal(scale=5, size=classes), np.exp(generator.normal())
        said = centre + spread * (generator.normal(size=(patients, classes)) + 1.5 * np.eye(classes)[truth])
        shares = np.exp(said) / np.exp(said).sum(axis=1, keepdims=True)
        scale = scale_of(np.delete(shares, held, axis=0), np.delete(truth, held))
        logits.append(shares[held]), scales.append(rank_by(shares[held], scale)), rows.append(held)
        folds.append(np.full(len(held), fit))
    rows = np.concatenate(rows)
    return Predictions(
        truth[rows],
        np.concatenate(logits),
        tuple("abcd"[:classes]),
        groups=rows,
        folds=np.concatenate(folds),
        ranking=np.concatenate(scales),
        **more,
    )


def test_held_out_patients_of_a_repeat_are_pooled_on_the_scale_of_their_fits() -> None:
    predictions = cross_validated()
    assert predictions.repeats.tolist() == np.repeat([0, 1, 2], 40).tolist()
    auroc, auprc = [], []
    for repeat in range(3):
        rows = predictions.repeats == repeat
        truth, marks = predictions.truth[rows], predictions.ranking[rows, 1]
        auroc.append(sk.roc_auc_score(truth, marks))
        ranks = np.argsort(np.argsort(-marks)) + 1
        hits = [(truth[ranks <= rank].sum() - 0.5) / (rank - 0.5) for rank in ranks[truth == 1]]
        auprc.append(np.mean(hits))
    found = Scorer(predictions).plain()
    assert found["auroc"] == pytest.approx(np.mean(auroc), abs=1e-12)
    assert found["auprc"] == pytest.approx(np.mean(auprc), abs=1e-12)
    # The fits' offsets hide in probabilities what they know.
    assert found["auroc"] > Scorer(replace(predictions, ranking=None)).plain()["auroc"] + 0.1
    assert found["accuracy"] == pytest.approx((predictions.predicted == predictions.truth).mean())
    twice = evaluate(predictions, replicates=0).by_fold["auroc"]
    alone = evaluate(replace(predictions.rows(np.asarray(predictions.folds) == 5), folds=None), replicates=0)
    assert len(twice) == 12 and twice[5] == alone["auroc"].value


def test_precision_of_nothing_is_nearer_to_the_prevalence_than_the_usual_one() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        said = generator.random(12)
        predictions = Predictions(
            np.arange(12) % 3 // 2, np.stack([1 - said, said], axis=1), ("a", "b"), folds=np.zeros(12)
        )
        found.append(
            [Scorer(each).plain()["auprc"] - 1 / 3 for each in (predictions, replace(predictions, folds=None))]
        )
    ours, usual = np.mean(found, axis=0)
    assert 0 < ours < 0.7 * usual


def test_intervals_over_folds_count_patients_and_say_what_they_are_of() -> None:
    found = evaluate(cross_validated(ordinal=True), unit="patients")
    assert found.units == 40 and found.rows == 120
    for words in ("40 patients (20 a, 20 b)", "3/4 of so many", "repeated 3 times", "uncalibrated"):
        assert words in found.covers
    assert set(found.uncalibrated) == {"f1_weighted", "precision_macro", "recall_macro", "brier", "ece"}
    for name, each in found.estimates.items():
        assert each.low < each.value < each.high, name
    # Slides of one patient are no more patients: the interval stays as wide.
    few = cross_validated()
    doubled = replace(few.rows(np.repeat(np.arange(120), 2)), ranking=np.repeat(few.ranking, 2, axis=0))
    for name in ("auroc", "auprc", "accuracy", "balanced_accuracy"):
        one, two = evaluate(few)[name], evaluate(doubled)[name]
        assert two.high - two.low == pytest.approx(one.high - one.low, rel=0.05), name
    assert evaluate(few) == evaluate(few, replicates=7, seed=3)  # nothing is drawn


def test_no_interval_reaches_beyond_what_a_score_can_be() -> None:
    truth = np.arange(12) % 2
    said = np.where(np.arange(12) == 3, 0.4, np.where(truth == 1, 0.9, 0.1))
    amounts = truth + 0.3 * np.sin(np.arange(12.0))
    found = evaluate(Predictions(truth, np.stack([1 - said, said], axis=1), ("a", "b"), folds=np.zeros(12)))
    assert found["f1_weighted"].high == 1.0 and found["brier"].low == 0.0
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found.estimates.values())
    found = evaluate(Predictions(amounts, said[:, None], ("amount",), folds=np.zeros(12)))
    assert found["r2"].high == 1.0 == found["pearson"].high and found["mae"].low >= 0


def test_macro_intervals_are_means_of_those_of_one_class_against_the_rest() -> None:
    found = evaluate(cross_validated(60, 3))
    for curve in ("auroc", "auprc"):
        for end in ("low", "high"):
            each = [getattr(found[f"{curve}:{name}"], end) for name in "abc"]
            assert getattr(found[curve], end) == pytest.approx(np.mean(each))
    assert "auroc" not in found.uncalibrated and "auprc" in found.uncalibrated


def test_nothing_is_estimated_of_one_patient_or_a_class_of_one() -> None:
    whole = cross_validated()
    lonely = whole.rows((np.asarray(whole.truth) == 0) | (np.asarray(whole.groups) == 1))
    single = replace(whole, groups=np.zeros(120))
    for predictions in (lonely, single):
        found = evaluate(predictions, unit="patients")
        assert all(np.isnan([each.low, each.high]).all() for each in found.estimates.values())
        assert any("not estimable" in note and "patients" in note for note in found.notes)
        assert found.to_dict()["scores"]["accuracy"]["low"] is None
    difference = paired_difference(lonely, replace(lonely, ranking=-lonely.ranking))["auroc"]
    assert np.isnan([difference.low, difference.p]).all()


def test_no_interval_over_folds_has_zero_width() -> None:
    truth = np.tile(np.arange(20) % 2, 2)
    right = Predictions(
        truth,
        np.eye(2)[truth] * 0.8 + 0.1,
        ("a", "b"),
        groups=np.tile(np.arange(20), 2),
        folds=np.arange(40) // 5,
        ordinal=True,
    )
    found = evaluate(right)
    for name in ("auroc", "auprc", "accuracy", "balanced_accuracy", "kappa_quadratic"):
        assert found[name].value == found[name].high == pytest.approx(1) and 0 < found[name].low < 0.95
    same = paired_difference(right, right)["auroc"]
    floor = 1.96**2 / (20 / 2 + 1.96**2)
    assert (same.value, same.p) == (0, 1) and same.high == -same.low == pytest.approx(floor, rel=1e-3)


def test_limits_solve_what_defines_them() -> None:
    from scipy.stats import binomtest

    for value, positives, negatives in ((0.5, 10, 10), (0.9, 5, 15), (1.0, 20, 20), (0.02, 10, 30), (0.731, 3, 90)):
        low, high = auroc_limits(value, positives, negatives)
        assert low <= value <= high
        pairs = (positives + negatives) / 2 - 1
        for t in (low, high):
            if 0 < t < 1:
                spread = t * (1 - t) * (1 + pairs * (1 - t) / (2 - t) + pairs * t / (1 + t)) / (positives * negatives)
                assert (value - t) ** 2 == pytest.approx(1.959964**2 * 1.75 * spread, rel=1e-5)
        mirrored = auroc_limits(1 - value, positives, negatives)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    for hits, count in ((0, 10), (7, 10), (30, 30)):
        said = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert share_limits(hits / count, count) == pytest.approx((said.low, said.high))
    assert mean_limits([(0.7, 10)]) == pytest.approx(share_limits(0.7, 10))
    low, high = mean_limits([(0.7, 10), (0.7, 10)])
    assert high - low == pytest.approx((share_limits(0.7, 10)[1] - share_limits(0.7, 10)[0]) / np.sqrt(2))


def test_kappas_variance_is_that_of_drawn_tables() -> None:
    generator = np.random.default_rng(1)
    table = np.array([[0.25, 0.06, 0.01], [0.08, 0.2, 0.05], [0.02, 0.08, 0.25]])
    count = 400

    def kappa(shares: np.ndarray) -> float:
        truth, predicted = np.repeat(np.arange(9), np.rint(shares.ravel() * count).astype(int)) // 3, None
        predicted = np.repeat(np.arange(9), np.rint(shares.ravel() * count).astype(int)) % 3
        return sk.cohen_kappa_score(truth, predicted, weights="quadratic")

    drawn = [kappa(each.reshape(3, 3) / count) for each in generator.multinomial(count, table.ravel(), size=600)]
    low, high = kappa_limits(table, count)
    half = (np.arctanh(high) - np.arctanh(low)) / 2 / 1.959964 / np.sqrt(1.5)
    assert half == pytest.approx(np.std(np.arctanh(drawn)), rel=0.1)
    assert (np.arctanh(high) + np.arctanh(low)) / 2 == pytest.approx(np.arctanh(kappa(table)), abs=0.02)


def test_differences_over_folds_are_jackknifed_by_patient() -> None:
    first = cross_validated(seed=6)
    second = replace(first, ranking=first.ranking + np.random.default_rng(0).normal(size=first.ranking.shape))
    found = paired_difference(first, second)["auroc"]
    groups, truth = np.asarray(first.groups), np.arange(40) % 2
    without = []
    for patient in range(40):
        rows = groups != patient
        each = [Scorer(one.rows(rows)).plain()["auroc"] for one in (first, second)]
        without.append(each[0] - each[1])
    without = np.array(without)
    variance = sum(19 / 20 * ((without[truth == c] - without[truth == c].mean()) ** 2).sum() for c in (0, 1))
    half = t_distribution.ppf(0.975, 19) * np.sqrt(2 * variance)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert found.p == pytest.approx(2 * t_distribution.sf(abs(found.value) / np.sqrt(2 * variance), 19))
    assert degrees_of_freedom(first) == 19
    assert power(0.0, found, 19) == pytest.approx(0.05) and power(half * 3, found, 19) > 0.99
    assert power(0.1, found, 19) == power(-0.1, found, 19) < power(0.2, found, 19)


def test_paired_difference_is_zero_for_equals_and_tight_for_alikes() -> None:
    predictions = made(300, 2, seed=8)
    same = paired_difference(predictions, predictions, replicates=100)["auroc"]
    assert same.value == 0.0 and np.isnan([same.low, same.high]).all()
    noise = np.clip(predictions.probabilities[:, 1] + 0.05 * np.random.default_rng(0).normal(size=300), 0, 1)
    other = Predictions(predictions.truth, np.stack([1 - noise, noise], axis=1), predictions.class_names)
    difference = paired_difference(predictions, other)["auroc"]
    alone = evaluate(predictions)["auroc"]
    assert difference.value == pytest.approx(alone.value - evaluate(other, replicates=0)["auroc"].value)
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(predictions, made(300, 2, seed=9))
    grouped = replace(predictions, groups=np.arange(300) // 3)
    with pytest.raises(ValueError, match="same groups"):
        paired_difference(grouped, predictions)
    with pytest.raises(ValueError, match="same groups"):
        paired_difference(grouped, replace(predictions, groups=np.arange(300) // 2))
    with pytest.raises(ValueError, match="same folds"):
        paired_difference(replace(predictions, folds=np.arange(300) % 2), predictions)


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_calibration_slope_finds_the_planted_one(slope: float, classes: int) -> None:
    generator = np.random.default_rng(10)
    logits = generator.normal(size=(40_000, classes))
    said, real = (np.exp(scale * logits) for scale in (1.0, slope))
    real /= real.sum(axis=1, keepdims=True)
    truth = (generator.random(40_000)[:, None] > np.cumsum(real, axis=1)).sum(axis=1)
    predictions = Predictions(truth, said / said.sum(axis=1, keepdims=True), tuple("abc"[:classes]))
    assert calibration_slope(predictions) == pytest.approx(slope, rel=0.04)


def test_calibration_slope_of_a_model_that_is_far_too_sure_is_found() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 20
    truth = (logits / 40 + generator.gumbel(size=logits.shape)).argmax(axis=1)  # logits forty times too large
    said = np.exp(logits - logits.max(axis=1, keepdims=True))
    predictions = Predictions(truth, said / said.sum(axis=1, keepdims=True), tuple("abc"))
    # Probabilities below 1e-12 are taken for it, which leaves a slope a little above 1 / 40.
    assert 0.02 < calibration_slope(predictions) < 0.05


def test_calibration_slope_is_not_defined_where_classes_separate() -> None:
    said = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    assert np.isnan(calibration_slope(Predictions(np.array([0, 0, 1, 1]), said, ("a", "b"))))
    assert np.isnan(calibration_slope(Predictions(np.array([1, 1, 1, 1]), said, ("a", "b"))))


def test_average_by_group_averages_a_patients_slides() -> None:
    said = np.array([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9], [0.7, 0.3]])
    predictions = Predictions(np.array([1, 1, 1, 0]), said, ("a", "b"), groups=np.array(["x", "x", "y", "z"]))
    averaged = average_by_group(predictions)
    assert averaged.groups is not None and averaged.groups.tolist() == ["x", "y", "z"]
    assert averaged.truth.tolist() == [1, 1, 0]
    assert np.allclose(averaged.probabilities[:, 1], [0.6, 0.9, 0.3])
    mixed = Predictions(np.array([1, 0, 1, 0]), said, ("a", "b"), groups=predictions.groups)
    with pytest.raises(ValueError, match="several in x"):
        average_by_group(mixed)
    whole = replace(predictions, truth=np.ones(4, int), groups=np.array(["x"] * 4), folds=np.array([0, 0, 1, 1]))
    by_fold = average_by_group(whole)
    assert by_fold.folds is not None and by_fold.folds.tolist() == [0, 1]
    assert np.allclose(by_fold.probabilities[:, 1], [0.6, 0.6])


def test_site_alone_scores_what_the_site_knows() -> None:
    generator = np.random.default_rng(11)
    sites = generator.choice(["here", "there"], 4000)
    truth = (generator.random(4000) < np.where(sites == "here", 0.8, 0.3)).astype(int)
    said = site_probabilities(truth[:2000], sites[:2000], sites[2000:], 2)
    by_site = Predictions(truth[2000:], said, ("a", "b"))
    assert evaluate(by_site, replicates=0)["accuracy"].value == pytest.approx(0.75, abs=0.03)
    nothing = Predictions(truth[2000:], prior_probabilities(truth[:2000], 2000, 2), ("a", "b"))
    assert evaluate(nothing, replicates=0)["auroc"].value == 0.5
    unknown = site_probabilities(truth[:2000], sites[:2000], np.array(["elsewhere"]), 2)
    assert unknown[0].tolist() == pytest.approx(prior_probabilities(truth[:2000], 1, 2)[0].tolist())
    flags = np.array([[1, 0], [1, 1], [0, 0]])
    shares = site_probabilities(flags, np.array(["a", "a", "b"]), np.array(["b", "a", "new"]), 2)
    assert shares.tolist() == [[0, 0], [1, 0.5], [pytest.approx(2 / 3), pytest.approx(1 / 3)]]
    per_site = score(by_site, sites=sites[2000:], replicates=0, seed=0).by_site
    assert list(per_site) == ["here", "there"] and per_site["here"].rows == int((sites[2000:] == "here").sum())


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    predictions = replace(made(60, 3), groups=np.arange(60) // 2 + 60 * (np.arange(60) % 2), folds=np.arange(60) // 30)
    other = replace(predictions, probabilities=predictions.probabilities[:, ::-1])
    sites = np.array(["a", "b"])[np.arange(60) % 2]
    more = {"replicates": 20, "seed": 0}
    strata = {"scanner": ["S1", "", "S2"] * 20}
    found = score(
        predictions, patients=True, sites=sites, strata=strata, against={"other": other}, facts={"width": 3}, **more
    )
    assert set(found.by_stratum["scanner"]) == {"S1", "S2", "not known"} and list(found.strata) == ["site", "scanner"]
    assert sum(each.rows for each in found.by_stratum["scanner"].values()) == 60
    said = stratum_lines({"model": found})
    assert len(said) == 2 + 1 + 3 + 1 and any(line.startswith("not known") for line in said)
    assert list(found.by_unit) == ["patients", "slides"] and set(found.by_site) == {"a", "b"}
    lead = found.leads["other"]["accuracy"]
    assert lead.value == pytest.approx(found["accuracy"].value - score(other, patients=True, **more)["accuracy"].value)
    per_fold = [score(predictions.rows(np.asarray(predictions.folds) == fold), **more) for fold in (0, 1)]
    assert found.by_unit["slides"].by_fold["auroc"] == [each["auroc"].value for each in per_fold]
    results = Results(FOLD, {"classes": ["a", "b", "c"]}, {"model": found}, details={"seconds": 3}, notes=("one",))
    written = write_results(tmp_path, results, texts={"summary.csv": summary_csv(results.scores)})
    assert written == ["summary.csv", "results.json"]
    again = read_results(tmp_path / "results.json")
    assert again.to_dict() == results.to_dict() == json.loads((tmp_path / "results.json").read_text())
    for text in ("[]", "{}", '{"format": 1}', json.dumps({**results.to_dict(), "scores": {"model": {}}})):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="run the command again"):
            read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("truth", "said", "message"),
    [
        ([], np.empty((0, 2)), "at least one row"),
        ([0, 1], [[0.5, 0.5]], r"shape \(2, 2\), got \(1, 2\)"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "finite probabilities.*row 1"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "truth between 0 and 1, got 0 to 2"),
        ([0, 1], [[2.0, -1.0], [0.3, 0.7]], r"between 0 and 1, got \[ ?2\. -1\. ?\] in row 0.*softmax"),
        ([[0, 1], [1, 1]], [[2.0, -1.0], [0.3, 0.7]], r"between 0 and 1, got .*sigmoid"),
    ],
)
def test_predictions_refuse_what_makes_no_sense(truth: list, said: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictions(np.array(truth, dtype=int), np.array(said), ("a", "b"))
