"""Slide embeddings with their labels: joined by slide id, patients known, checked before anything is fitted.

Legend: S slides, D width.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.features import read_slides
from gigapath.linear_probe.labels import LabelRows, class_names, in_words, parse_labels
from gigapath.linear_probe.options import ProbeOptions
from gigapath.linear_probe.table import TEST

NAME_COLUMNS = ("slide_id", "input", "file", "name")
GROUP_COLUMNS = ("patient_id", "patient", "group", "case_id")
SITE_COLUMNS = ("site", "data_provider", "provider", "hospital")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
TextArray = npt.NDArray[np.str_]


@dataclass(frozen=True)
class SlideData:
    """S labelled slides.

    Args:
        ids: S slide ids, sorted.
        vectors: name of the embedding -> (S, D).
        labels: (S,) class index.
        classes: names of the classes.
        groups: (S,) patients; slides themselves where no column says them.
        group_column: what the groups are called, or None where slides stand for themselves.
        sites: (S,) or None.
        test: (S,) bool, the slides of the given test split; None for folds.
        facts: counts for the report.
        warnings: sentences for the user.
    """

    ids: tuple[str, ...]
    vectors: dict[str, FloatArray]
    labels: IntArray
    classes: tuple[str, ...]
    groups: TextArray
    group_column: str | None
    sites: TextArray | None
    test: npt.NDArray[np.bool_] | None
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def one_label_per_group(self) -> bool:
        """Whether all slides of each patient have one label."""
        pairs = set(zip(self.groups.tolist(), self.labels.tolist(), strict=True))
        return len(pairs) == len(set(self.groups.tolist()))


def slide_key(written: str, id_rule: str) -> str:
    """What ids are compared by: themselves, or with the rule `tcga` what stands before the first dot."""
    return written.partition(".")[0] if id_rule == "tcga" else written


def load_slides(
    folder: Path | str, labels: Path, names: list[str], options: ProbeOptions, *, id_rule: str = "exact"
) -> SlideData:
    """Read slide embeddings and the CSV, join them by slide id, and check that a probe of them means something.

    Args:
        folder: the output folder of `gigapath embed`, or one of its `slides_*` folders.
        labels: CSV with `slide_id` (or `input`, `file`, `name`), the label's column, and the patient's.
        names: names of embeddings, see `gigapath.features.names`.
        options: columns, what to allow.
        id_rule: "exact" or "tcga".

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong.
    """
    if not labels.is_file():
        raise FileNotFoundError(f"{labels}: no such file.")
    listed = parse_labels(
        labels.read_bytes(),
        labels.name,
        label=options.label,
        split=options.split,
        group=options.group,
        name_columns=NAME_COLUMNS,
        group_columns=GROUP_COLUMNS,
        more_columns=SITE_COLUMNS,
    )
    row_of_key = _rows_by_key(listed, id_rule)
    ids, vectors, notes = _read_vectors(folder, names)
    keys = [slide_key(slide, id_rule) for slide in ids]
    unlabelled = [slide for slide, key in zip(ids, keys, strict=True) if key not in row_of_key]
    unembedded = sorted(set(row_of_key) - set(keys))
    if (unlabelled or unembedded) and not options.allow_missing:
        both = in_words({"slides without an embedding": unembedded, "embeddings without a row": unlabelled})
        raise ValueError(
            f"{listed.source}: {both}. Complete them (see --id-rule), or go on without them: --allow-missing."
        )
    if unlabelled or unembedded:
        lacking = {"labels without an embedding": unembedded, "embeddings without a label": unlabelled}
        notes.append(f"left out: {in_words(lacking)}")
    kept = [index for index, key in enumerate(keys) if key in row_of_key]
    rows = [row_of_key[keys[index]] for index in kept]
    slide_ids = tuple(ids[index] for index in kept)
    written_labels = [listed.labels[row] for row in rows]
    index_of_label, classes = class_names(written_labels, options.positive)
    if len(classes) < 2:
        raise ValueError(f"{listed.source}: expected slides of two classes, got {', '.join(classes) or 'no slides'}.")
    groups = _groups_of_slides(listed, rows, slide_ids)
    if listed.groups is None:
        notes.append("no column names the patients, so each slide counts as one; --group COL names it")
    test = None
    if options.split is not None:
        test = np.array([listed.splits[row] == TEST for row in rows])
        if test.all() or not test.any():
            raise ValueError(f"{listed.source}: the column {options.split} leaves no slide to {_lacking(test)}.")
        notes.append("slides of train and val train together: the penalty is chosen by folds inside them")
    site_column = next((column for column in SITE_COLUMNS if column in listed.more), None)
    labels_of_slides = np.array([index_of_label[label] for label in written_labels], dtype=np.int64)
    return SlideData(
        ids=slide_ids,
        vectors={name: found[kept] for name, found in vectors.items()},
        labels=labels_of_slides,
        classes=classes,
        groups=groups,
        group_column=listed.group_column,
        sites=None if site_column is None else np.array([listed.more[site_column][row] for row in rows]),
        test=test,
        facts={
            "slides": len(slide_ids),
            "groups": len(set(groups.tolist())),
            "group_column": listed.group_column,
            "site_column": site_column,
            "slides_of_class": dict(zip(classes, np.bincount(labels_of_slides).tolist(), strict=True)),
            "labels": labels.name,
            "labels_without_embedding": len(unembedded),
            "embeddings_without_label": len(unlabelled),
        },
        warnings=tuple(notes),
    )


def _rows_by_key(listed: LabelRows, id_rule: str) -> dict[str, int]:
    """What a slide is compared by -> its row of the CSV; ValueError where two rows are of one slide."""
    row_of_key: dict[str, int] = {}
    for row, written in enumerate(listed.names):
        key = slide_key(written, id_rule)
        if row_of_key.setdefault(key, row) != row:
            raise ValueError(f"{listed.source}: {key} has two rows ({row_of_key[key] + 2} and {row + 2}). Keep one.")
    return row_of_key


def _groups_of_slides(listed: LabelRows, rows: Sequence[int], slide_ids: Sequence[str]) -> TextArray:
    """(S,) patients by the CSV, or the slides themselves where no column says them; ValueError where one is empty."""
    if listed.groups is None:
        return np.array(slide_ids)
    groups = np.array([listed.groups[row] for row in rows])
    if (groups == "").any():
        empty = slide_ids[int(np.flatnonzero(groups == "")[0])]
        raise ValueError(f"{listed.source}: {empty} has no {listed.group_column}. Fill it in.")
    return groups


def _read_vectors(folder: Path | str, names: list[str]) -> tuple[list[str], dict[str, FloatArray], list[str]]:
    """(slide ids, name -> vectors (S, D), what the reader warned of)."""
    vectors: dict[str, FloatArray] = {}
    ids: list[str] = []
    notes: list[str] = []
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ids, found = read_slides(folder, name)
        notes += [text for text in map(str, (warning.message for warning in caught)) if text not in notes]
        vectors[name] = found.astype(np.float64)
        if not np.isfinite(vectors[name]).all():
            slide = ids[int(np.flatnonzero(~np.isfinite(vectors[name]).all(axis=1))[0])]
            raise ValueError(f"{slide}: its embedding {name} holds NaN or infinity. Embed the slide again.")
    return ids, vectors, notes


def _lacking(test: npt.NDArray[np.bool_]) -> str:
    return "train on" if test.all() else "test on"
