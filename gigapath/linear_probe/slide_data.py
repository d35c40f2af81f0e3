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

from gigapath.evaluation.labels import ID_COLUMNS, SITE_COLUMNS, class_notes, first_column, id_maker, patients_of
from gigapath.features import read_slides
from gigapath.linear_probe.labels import class_names, in_words, named_column, splits_of_column
from gigapath.linear_probe.options import ProbeOptions
from gigapath.linear_probe.table import TEST
from gigapath.options import IdOptions
from gigapath.tables import read_table

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


def load_slides(
    folder: Path | str,
    labels: Path,
    names: list[str],
    options: ProbeOptions,
    ids_meet: IdOptions = IdOptions(),  # noqa: B008 - frozen
) -> SlideData:
    """Read slide embeddings and the CSV, join them by slide id, and check that a probe of them means something.

    Args:
        folder: the output folder of `gigapath embed`, or one of its `slides_*` folders.
        labels: CSV with `slide_id` (or `input`, `file`, `name`), the label's column, and the patient's.
        names: names of embeddings, see `gigapath.features.data`.
        options: columns, what to allow.
        ids_meet: how slides meet rows.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong.
    """
    listed = read_table(labels)
    written_ids = listed.filled(named_column(listed, None, ID_COLUMNS, "--labels"))
    all_labels = listed.filled(named_column(listed, options.label, (), "--label"))
    for column, option in ((options.group, "--group"), (options.split, "--split")):
        if column is not None:
            named_column(listed, column, (), option)
    group_column, patients = patients_of(listed, options.group, written_ids, ids_meet.id_rule)
    key_of = id_maker(ids_meet.id_rule, ids_meet.id_regex)
    row_of_key = _rows_by_key([key_of(written) for written in written_ids], listed.source)
    ids, vectors, notes = _read_vectors(folder, names)
    keys = [key_of(slide) for slide in ids]
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
    written_labels = [all_labels[row] for row in rows]
    index_of_label, classes = class_names(written_labels, options.positive)
    if len(classes) < 2:
        raise ValueError(f"{listed.source}: expected slides of two classes, got {', '.join(classes) or 'no slides'}.")
    # Without patients the names as the CSV writes them, as in fine-tuning: their order has a say in the draw of folds.
    groups = np.array([(patients or written_ids)[row] for row in rows])
    if patients is None:
        notes.append("no column names the patients, so each slide counts as one; --group COL names it")
    test = None
    if options.split is not None:
        splits = splits_of_column(listed, options.split)
        test = np.array([splits[row] == TEST for row in rows])
        if test.all() or not test.any():
            raise ValueError(f"{listed.source}: the column {options.split} leaves no slide to {_lacking(test)}.")
        notes.append("slides of train and val train together: the penalty is chosen by folds inside them")
    site_column = first_column(listed, SITE_COLUMNS)
    labels_of_slides = np.array([index_of_label[label] for label in written_labels], dtype=np.int64)
    notes += class_notes(classes, labels_of_slides, groups.tolist(), "slide" if patients is None else "patient")
    return SlideData(
        ids=slide_ids,
        vectors={name: found[kept] for name, found in vectors.items()},
        labels=labels_of_slides,
        classes=classes,
        groups=groups,
        group_column=group_column,
        sites=None if site_column is None else np.array([listed.columns[site_column][row] for row in rows]),
        test=test,
        facts={
            "slides": len(slide_ids),
            "groups": len(set(groups.tolist())),
            "group_column": group_column,
            "site_column": site_column,
            "slides_of_class": dict(zip(classes, np.bincount(labels_of_slides).tolist(), strict=True)),
            "labels": labels.name,
            "labels_without_embedding": len(unembedded),
            "embeddings_without_label": len(unlabelled),
        },
        warnings=tuple(notes),
    )


def _rows_by_key(keys: Sequence[str], source: str) -> dict[str, int]:
    """What a slide is compared by -> its row of the CSV; ValueError where two rows are of one slide."""
    row_of_key: dict[str, int] = {}
    for row, key in enumerate(keys):
        if row_of_key.setdefault(key, row) != row:
            raise ValueError(f"{source}: {key} has two rows ({row_of_key[key] + 2} and {row + 2}). Keep one.")
    return row_of_key


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
