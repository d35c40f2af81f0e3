"""Scores where rows belong to patients and sites: averages over a patient, per site, and what the site alone knows."""

import numpy as np
import numpy.typing as npt

from gigapath.metrics.bootstrap import REPLICATES, Evaluation, evaluate
from gigapath.metrics.scores import FloatArray, Predictions


def average_by_group(predictions: Predictions) -> Predictions:
    """One row per group (and fold): the probabilities averaged over its rows.

    Raises:
        ValueError: a group holds rows of different truth, so that it has none itself.
    """
    if predictions.groups is None:
        return predictions
    groups = np.asarray(predictions.groups)
    _, code = np.unique(groups, return_inverse=True)
    if predictions.folds is not None:
        _, fold_code = np.unique(np.asarray(predictions.folds), return_inverse=True)
        code = code * (int(fold_code.max()) + 1) + fold_code
    _, first, code = np.unique(code, return_index=True, return_inverse=True)
    truth = np.asarray(predictions.truth)
    mixed = np.flatnonzero((truth != truth[first][code]).reshape(len(truth), -1).any(axis=1))
    if len(mixed):
        raise ValueError(
            f"average_by_group: expected one label per group, got several in {groups[mixed[0]]!s}. "
            "Evaluate its rows one by one."
        )
    sums = np.zeros((len(first), predictions.probabilities.shape[1]))
    np.add.at(sums, code, np.asarray(predictions.probabilities, dtype=np.float64))
    averaged = predictions.rows(first)
    return Predictions(
        averaged.truth,
        sums / np.bincount(code)[:, None],
        predictions.class_names,
        groups=averaged.groups,
        folds=averaged.folds,
        ordinal=predictions.ordinal,
    )


def evaluate_by_site(
    predictions: Predictions, sites: npt.NDArray[np.generic], *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Evaluation]:
    """The evaluation of each site's rows alone; sites (N,) of any values, in sorted order."""
    sites = np.asarray(sites)
    return {
        str(site): evaluate(predictions.rows(sites == site), replicates=replicates, seed=seed)
        for site in np.unique(sites)
    }


def site_probabilities(
    train_truth: npt.NDArray[np.integer],
    train_sites: npt.NDArray[np.generic],
    sites: npt.NDArray[np.generic],
    classes: int,
) -> FloatArray:
    """What a predictor that sees the site alone says: the class shares of each site's training rows, (N, classes).

    A site without training rows gets the shares of all of them. Scored like a model, this is what a model reaches
    that has learned nothing but where a slide comes from.
    """
    train_truth, train_sites, sites = np.asarray(train_truth), np.asarray(train_sites), np.asarray(sites)
    out = prior_probabilities(train_truth, len(sites), classes)
    for site in np.unique(train_sites):
        counts = np.bincount(train_truth[train_sites == site], minlength=classes)
        out[sites == site] = counts / counts.sum()
    return out


def prior_probabilities(train_truth: npt.NDArray[np.integer], rows: int, classes: int) -> FloatArray:
    """What a predictor that sees nothing says: the class shares of training for every row, (rows, classes)."""
    counts = np.bincount(np.asarray(train_truth), minlength=classes)
    return np.tile(counts / counts.sum(), (rows, 1))
