"""Embeddings with their labels, ready to be fitted: one matrix, and the rows of each split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.labels import class_notes
from gigapath.evaluation.splits import Fold, audit
from gigapath.linear_probe.archive import Report, read_embeddings
from gigapath.linear_probe.labels import Joined, LabelRows, class_names, in_words, join_labels, own_labels, read_labels
from gigapath.linear_probe.options import ProbeOptions
from gigapath.linear_probe.pcam import slides_of_tiles
from gigapath.linear_probe.table import SPLITS, TEST, TRAIN, VALIDATION, EmbeddingTable, Float32Array

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ProbeData:
    """N embeddings of width D, of which the labelled ones belong to a split each.

    Args:
        features: (N, D) float32.
        names: N names.
        rows: split -> its rows of `features`, ascending.
        labels: (N,) class index, -1 where there is none.
        classes: names of the classes; of two the second is the positive one.
        groups: (N,) patient or slide as text, or None.
        group_column: what the groups are called, or None.
        colours: (N, 6) colour statistics of the pixels, or None.
        facts: counts and identities for the report.
        warnings: sentences for the user.
    """

    features: Float32Array
    names: tuple[str, ...]
    rows: dict[str, IntArray]
    labels: IntArray
    classes: tuple[str, ...]
    groups: npt.NDArray[np.str_] | None = None
    group_column: str | None = None
    colours: Float32Array | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def truth(self, split: str) -> IntArray:
        """The classes of a split's rows."""
        return self.labels[self.rows[split]]

    def groups_of(self, split: str) -> npt.NDArray[np.str_] | None:
        """The groups of a split's rows, or None."""
        return None if self.groups is None else self.groups[self.rows[split]]


def load_data(
    embeddings: Path | str,
    labels: Path | str | None,
    options: ProbeOptions,
    *,
    pcam_meta: Path | str | None = None,
    cache: bool = True,
    report: Report | None = None,
) -> ProbeData:
    """Read embeddings and labels, join them, and check that a probe of them means something.

    Args:
        embeddings: zip, folder or file of embeddings.
        labels: a CSV, or None where the embeddings carry their labels.
        options: columns, and what to allow.
        pcam_meta: a folder of PCam's meta files, for groups where the labels name none.
        cache: use and write the cache beside a zip or folder.
        report: progress of the reading, (done, total) tiles.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: one sentence on what is wrong.
    """
    # The CSV first: what is wrong with it should not wait for gigabytes to be read.
    listed = (
        None if labels is None else read_labels(labels, label=options.label, split=options.split, group=options.group)
    )
    table, how = read_embeddings(embeddings, cache=cache, report=report)
    listed = listed or own_labels(table, Path(embeddings).name)
    joined = join_labels(table.names, table.splits, listed, allow_missing=options.allow_missing)
    without_split = [listed.names[index] for index, split in zip(joined.used, joined.splits, strict=True) if not split]
    if without_split:
        raise ValueError(
            f"{listed.source}: {len(without_split):,} tiles have no split, neither in the CSV nor in their path, the "
            f"first is {without_split[0]}. Add a column split."
        )
    used_labels = [listed.labels[index] for index in joined.used]
    index_of_label, classes = class_names(used_labels, options.positive)

    label_of_row = np.full(len(table), -1, dtype=np.int64)
    rows = np.array(joined.rows, dtype=np.int64)
    label_of_row[rows] = [index_of_label[label] for label in used_labels]
    split_of_row = np.full(len(table), "", dtype="U5")
    split_of_row[rows] = joined.splits
    rows_of_split = {split: np.flatnonzero(split_of_row == split) for split in SPLITS}
    _check_splits(rows_of_split, label_of_row, classes, listed.source)
    warnings = []
    groups, group_column = _groups_of_rows(table, listed, joined, label_of_row, pcam_meta)
    units = list(table.names) if groups is None else groups.tolist()
    warnings += class_notes(classes, label_of_row, units, "tile" if group_column is None else group_column)
    if groups is not None:
        warnings += audit(
            [Fold(0, rows_of_split[TRAIN], rows_of_split[VALIDATION], rows_of_split[TEST])],
            table.names,
            fingerprints=None,  # told below: twins of published data sets
            patients=groups.tolist(),
            drawn=False,
            allow_leakage=options.allow_leakage,
            unit=f"groups ({group_column})",
        )
    elif pcam_meta is not None:
        warnings.append("PCam's meta files don't fit these tiles' names and labels, so intervals are over tiles")
    if joined.unembedded or joined.unlabelled:
        lacking = {"labels without an embedding": joined.unembedded, "embeddings without a label": joined.unlabelled}
        warnings.append(f"left out: {in_words(lacking)}")
    twins = identical_across_splits(table, rows_of_split)
    if twins:
        warnings.append(f"{twins:,} embeddings of one split are identical to one of another split")
    return ProbeData(
        features=table.features,
        names=table.names,
        rows=rows_of_split,
        labels=label_of_row,
        classes=classes,
        groups=groups,
        group_column=group_column,
        colours=table.colours,
        facts={
            "embeddings": Path(embeddings).name,
            "labels": None if labels is None else Path(labels).name,
            **how,
            **{f"encoder_{name}": value for name, value in table.attrs.items()},
            "width": table.features.shape[1],
            "tiles": {split: len(found) for split, found in rows_of_split.items()},
            "classes": list(classes),
            "group_column": group_column,
            "labels_without_embedding": len(joined.unembedded),
            "embeddings_without_label": len(joined.unlabelled),
            "identical_across_splits": twins,
        },
        warnings=tuple(warnings),
    )


def _groups_of_rows(
    table: EmbeddingTable, listed: LabelRows, joined: Joined, label_of_row: IntArray, pcam_meta: Path | str | None
) -> tuple[npt.NDArray[np.str_] | None, str | None]:
    """The patient or slide of each row, "" where it has no label, and what they are called; None where nothing says
    them. The labels' own groups come first, then what PCam's meta files say."""
    found: list[str] | None = None
    column = listed.group_column
    if listed.groups is not None:
        found = [listed.groups[index] for index in joined.used]
    elif pcam_meta is not None:
        names, classes = [table.names[row] for row in joined.rows], label_of_row[joined.rows].tolist()
        found, column = slides_of_tiles(Path(pcam_meta), names, joined.splits, classes), "wsi"
    if found is None:
        return None, None
    groups = np.full(len(table), "", dtype=f"U{max(map(len, found), default=1)}")
    groups[joined.rows] = found
    return groups, column


def identical_across_splits(table: EmbeddingTable, rows: dict[str, IntArray]) -> int:
    """How many embeddings have an equal one in another split.

    Raises:
        ValueError: such a pair has one name too: it is one tile in two splits.
    """
    split_of_row = np.full(len(table), "", dtype="U5")
    for split, found in rows.items():
        split_of_row[found] = split
    # Candidates by the bits of their first two entries, so that the matrix is neither sorted nor copied.
    starts = np.zeros((len(table), 2), dtype=np.float32)
    starts[:, : table.features.shape[1]] = table.features[:, :2]
    _, key, count = np.unique(starts.view(np.uint64).ravel(), return_inverse=True, return_counts=True)
    by_content: dict[bytes, list[int]] = {}
    for row in np.flatnonzero((count[key] > 1) & (split_of_row != "")).tolist():
        by_content.setdefault(table.features[row].tobytes(), []).append(row)
    twins = 0
    for equal in by_content.values():
        if len({split_of_row[row] for row in equal}) < 2:
            continue
        twins += len(equal)
        split_of_stem: dict[str, int] = {}
        for row in equal:
            other = split_of_stem.setdefault(table.names[row].rpartition("/")[2], row)
            if split_of_row[other] != split_of_row[row]:
                raise ValueError(
                    f"{table.names[other]} and {table.names[row]} are one tile in two splits. Keep one of them."
                )
    return twins


def _check_splits(rows: dict[str, IntArray], labels: IntArray, classes: tuple[str, ...], source: str) -> None:
    for split, found in rows.items():
        if not len(found):
            raise ValueError(
                f"{source}: the split {split} is empty. A probe needs tiles to train, to validate and to test."
            )
    if len(classes) < 2:
        raise ValueError(f"{source}: all tiles are of one class ({classes[0]}). A probe needs two.")
    seen = set(labels[rows[TRAIN]].tolist())
    unseen = [name for index, name in enumerate(classes) if index not in seen]
    if unseen:
        raise ValueError(
            f"{source}: the class{'es' if len(unseen) > 1 else ''} {', '.join(unseen)} never occur"
            f"{'' if len(unseen) > 1 else 's'} in training. Add tiles of it there, or leave it out."
        )
