"""Folds in which a group stays together and every fold gets its share of each class."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def group_folds(
    labels: IntArray,
    groups: npt.NDArray[np.generic],
    folds: int,
    *,
    seed: int,
    names: Sequence[str],
    too_few: str = "fewer than {folds} folds. Take fewer folds",
) -> IntArray:
    """The fold (N,) 0 .. folds-1 of each row.

    Groups are taken in a drawn order, those with most rows of one kind first, and each goes where it leaves the
    classes' counts most even, counted in shares of the class.

    Args:
        labels: (N,) class index.
        groups: (N,) rows of one value stay together.
        folds: number of folds.
        seed: of the order.
        names: of the classes, for the error.
        too_few: what the error says of a class that occurs in fewer groups.

    Raises:
        ValueError: a class occurs in fewer groups than there are folds.
    """
    _, group_of_row = np.unique(groups, return_inverse=True)
    count = int(group_of_row.max()) + 1
    classes = int(labels.max()) + 1
    rows = np.zeros((count, classes))  # rows of each class in each group
    np.add.at(rows, (group_of_row, labels), 1)
    groups_of_class = (rows > 0).sum(axis=0)
    present = rows.sum(axis=0) > 0
    rarest = int(np.where(present, groups_of_class, count + 1).argmin())
    if groups_of_class[rarest] < folds:
        raise ValueError(
            f"folds: the class {names[rarest]} occurs in {groups_of_class[rarest]} groups, "
            f"{too_few.format(folds=folds)}, or leave the class out."
        )
    shares = rows[:, present] / rows[:, present].sum(axis=0)
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-shares[order].max(axis=1), kind="stable")]
    filled = np.zeros((folds, shares.shape[1]))
    fold_of_group = np.empty(count, dtype=np.int64)
    for group in order:
        # After adding the group to fold f, how uneven are the classes over the folds? The emptiest fold of equals.
        uneven = [_unevenness(filled, fold, shares[group]) for fold in range(folds)]
        fold = min(range(folds), key=lambda fold: (round(uneven[fold], 12), filled[fold].sum(), fold))
        filled[fold] += shares[group]
        fold_of_group[group] = fold
    return fold_of_group[group_of_row]


def _unevenness(filled: npt.NDArray[np.float64], fold: int, share: npt.NDArray[np.float64]) -> float:
    tried = filled.copy()
    tried[fold] += share
    return float(tried.std(axis=0).mean())


def splits_of_folds(fold_of_row: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """(training rows, test rows) of each fold."""
    for fold in range(int(fold_of_row.max()) + 1):
        yield np.flatnonzero(fold_of_row != fold), np.flatnonzero(fold_of_row == fold)
