"""Embeddings of tiles with their labels, joined by name and ready to be fitted: one matrix, the rows of each split."""

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.labels import canonical_label, class_notes, first_column, shown, sorted_classes
from gigapath.evaluation.splits import Fold, audit
from gigapath.linear_probe import ProbeOptions
from gigapath.linear_probe.embeddings import (
    SPLIT_WORDS,
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    EmbeddingTable,
    Float32Array,
    bare_name,
    read_embeddings,
    split_of_word,
)
from gigapath.progress import Progress
from gigapath.tables import Table, read_table, separator_hint, some_names

NAME_COLUMNS = ("input", "file", "name")
GROUP_COLUMNS = ("group", "patient_id", "patient", "slide_id", "slide", "wsi")
# PCam's own tables of the slide that each tile was cut from.
META = "camelyonpatch_level_2_split_{}_meta.csv"
# Columns that hold the label: tumour in the centre of the tile is what PCam's `y` says, tumour anywhere is the other.
_META_LABELS = ("center_tumor_patch", "tumor_patch")
_NUMBER = re.compile(r"(\d+)$")

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelRows:
    """M labelled tiles: names as written, labels as text, splits ("" = not said), groups or None, the source's name
    for messages, and what the groups are called."""

    names: list[str]
    labels: list[str]
    splits: list[str]
    groups: list[str] | None
    source: str
    group_column: str | None = None


def rows_of_table(table: Table, *, label: str, split: str | None, group: str | None) -> LabelRows:
    """The labels in a table with a column `input`, `file` or `name`, and the columns of label, split and group.

    Args:
        split: column of the split; None takes `split` if it is there, else the split is the embeddings' own.
        group: column of the group; None takes the first of `GROUP_COLUMNS` that is there.

    Raises:
        ValueError: a column is missing, a label is missing, a split is none.
    """
    name_column = named_column(table, None, NAME_COLUMNS, "--labels")
    named_column(table, label, (), "--label")
    if group is not None:
        named_column(table, group, (), "--group")
    if split is not None:
        named_column(table, split, (), "--split")
    group = group or first_column(table, GROUP_COLUMNS)
    split = split or first_column(table, ("split",))
    return LabelRows(
        names=table.columns[name_column],
        labels=table.filled(label),
        splits=[""] * len(table) if split is None else splits_of_column(table, split),
        groups=table.filled(group) if group else None,
        source=table.source,
        group_column=group,
    )


def named_column(table: Table, stated: str | None, usual: Sequence[str], option: str) -> str:
    """The stated column, or the first usual one; ValueError names the option by which it is named."""
    column = first_column(table, usual if stated is None else (stated,))
    if column is None:
        raise ValueError(
            f"{table.source}: expected a column {stated or ' or '.join(usual)}, got {some_names(table.header)}. "
            f"See {option}." + separator_hint(table.header)
        )
    return column


def splits_of_column(table: Table, column: str) -> list[str]:
    """The split of each row; ValueError names the row whose word is none."""
    known: dict[str, str] = {}
    for number, word in enumerate(table.columns[column], start=2):
        if word not in known:
            known[word] = split_of_word(word, f"{table.source}, row {number}")
    return [known[word] for word in table.columns[column]]


def own_labels(table: EmbeddingTable, source: str) -> LabelRows:
    """The labels that a table carries itself, as `embed-tiles` writes them where folders or a CSV say them.

    Raises:
        ValueError: it carries none.
    """
    if table.labels is None:
        raise ValueError(f"{source}: carries no labels. Give them with --labels CSV (columns input, label, split).")
    labelled = [row for row, label in enumerate(table.labels) if label]
    groups = table.groups
    return LabelRows(
        names=[table.names[row] for row in labelled],
        labels=[table.labels[row] for row in labelled],
        splits=[table.splits[row] for row in labelled],
        groups=None if groups is None else [groups[row] for row in labelled],
        source=source,
        group_column=None if groups is None else str(table.attrs.get("group_column", "groups")),
    )


@dataclass(frozen=True)
class Joined:
    """Which embedding each label belongs to."""

    rows: list[int]
    used: list[int]
    splits: list[str]
    unlabelled: list[str]
    unembedded: list[str]


def join_labels(
    tiles: Sequence[str], tile_splits: Sequence[str], labels: LabelRows, *, allow_missing: bool, noun: str = "embedding"
) -> Joined:
    """Find the tile of each label by its path, else by the last part of its path, within its split where both say one.

    Args:
        tile_splits: their splits as far as their own paths say them, "" elsewhere.
        noun: what a tile is called in messages.

    Raises:
        ValueError: labels or tiles are left over, a name fits several tiles, a tile has two labels or stands in two
            splits, the labels contradict the split in the tiles' path.
    """
    composed = [unicodedata.normalize("NFC", name) for name in tiles]
    by_path = {name: row for row, name in enumerate(composed)}
    by_stem: dict[str, list[int]] = {}
    for row, name in enumerate(composed):
        by_stem.setdefault(name.rpartition("/")[2], []).append(row)

    rows: list[int] = []
    used: list[int] = []
    splits: list[str] = []
    unembedded: list[str] = []
    contradicting: list[str] = []
    for index, written in enumerate(labels.names):
        name, split = unicodedata.normalize("NFC", bare_name(written)), labels.splits[index]
        exact = by_path.get(name)
        candidates = by_stem.get(name.rpartition("/")[2], []) if exact is None else [exact]
        fitting = [each for each in candidates if not split or tile_splits[each] in ("", split)]
        if len(fitting) > 1:
            raise ValueError(
                f"{labels.source}: {written} fits several {noun}s ({shown([tiles[each] for each in fitting])}). Write "
                "its whole path."
            )
        if not candidates:
            unembedded.append(written)
            continue
        if not fitting:
            contradicting.append(f"{written} ({split} against {tile_splits[candidates[0]]})")
            continue
        rows.append(fitting[0])
        used.append(index)
        splits.append(split or tile_splits[fitting[0]])

    first: dict[int, int] = {}
    for position, row in enumerate(rows):
        before, again = first.setdefault(row, position), labels.names[used[position]]
        if splits[before] != splits[position]:
            both = f"{splits[before]} and {splits[position]}"
            raise ValueError(f"{labels.source}: {again} stands in two splits ({both}). Keep one.")
        if before != position:
            both = f"{used[before] + 2} and {used[position] + 2}"
            raise ValueError(f"{labels.source}: {again} has two rows ({both}). Keep one.")
    if contradicting:
        raise ValueError(
            f"{labels.source}: {len(contradicting):,} splits contradict the paths of the {noun}s: "
            f"{shown(contradicting)}. Correct the CSV, or take the right {noun}s."
        )
    taken = set(rows)
    unlabelled = [name for row, name in enumerate(tiles) if row not in taken]
    if (unembedded or unlabelled) and not allow_missing:
        lacking = left_over({f"rows without {noun}": unembedded, f"{noun}s without a row": unlabelled})
        raise ValueError(
            f"{labels.source}: {lacking}, of {len(labels.names):,} rows and {len(tiles):,} {noun}s. Complete them, or "
            "go on without them: --allow-missing."
        )
    return Joined(rows, used, splits, unlabelled, unembedded)


def class_names(labels: Sequence[str], positive: str | None) -> tuple[dict[str, int], tuple[str, ...]]:
    """One map from label to class for all splits: numbers in their order, then text in its order.

    Args:
        labels: all labels in use, as text; "1" and "1.0" are the same.
        positive: of two classes the one to put second, or None.

    Returns:
        label as written -> class index, and the names of the classes.
    """
    names = sorted_classes(labels)
    if positive is not None:
        wanted = canonical_label(positive)
        if len(names) != 2 or wanted not in names:
            raise ValueError(f"--positive: expected one of two classes, got {positive!r} of {', '.join(names)}.")
        names = [name for name in names if name != wanted] + [wanted]
    index = {name: number for number, name in enumerate(names)}
    return {label: index[canonical_label(label)] for label in set(labels)}, tuple(names)


def left_over(lacking: Mapping[str, list[str]]) -> str:
    """How many names there are of each kind, and the first of them; of kinds without any, nothing."""
    return ", ".join(f"{kind}: {len(names):,} ({shown(names)})" for kind, names in lacking.items() if names)


def read_meta(path: Path) -> tuple[list[str], list[list[str]]]:
    """(slide of each row, the label columns of each row as "0" and "1") of one of PCam's meta files."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    slides = [row.get("wsi") or "" for row in rows]
    if not rows or "" in slides:
        raise ValueError(f"{path.name}: expected PCam's columns, wsi among them. Fetch it anew.")
    truth = {"true": "1", "false": "0"}
    labels = [[truth.get((row.get(name) or "").lower(), row.get(name) or "") for name in _META_LABELS] for row in rows]
    return slides, labels


def slides_of_tiles(
    folder: Path, names: Sequence[str], splits: Sequence[str], classes: Sequence[int]
) -> list[str] | None:
    """The slide of each tile, where the tiles' numbers are PCam's own; None where that can't be told for sure.

    The number at the end of a name must count the rows of its split's meta file from 0, each once, and the labels of
    all tiles must be those of the rows: thousands of agreements don't happen by chance.

    Args:
        classes: their classes, 1 = tumour.
    """
    found = [""] * len(names)
    for word in ("train", "valid", "test"):
        path = folder / META.format(word)
        members = [row for row, split in enumerate(splits) if split == SPLIT_WORDS[word]]
        if not path.is_file():
            return None
        slides, labels = read_meta(path)
        numbers = [int(match[1]) if (match := _NUMBER.search(names[row])) else -1 for row in members]
        if sorted(numbers) != list(range(len(slides))):
            return None
        truth = [labels[number] for number in numbers]
        if not any(
            all(row[column] == str(classes[member]) for row, member in zip(truth, members, strict=True))
            for column in range(len(_META_LABELS))
        ):
            return None
        for member, number in zip(members, numbers, strict=True):
            found[member] = slides[number]
    return found


def label_tiles(
    tiles: Sequence[str],
    tile_splits: Sequence[str],
    listed: LabelRows,
    options: ProbeOptions,
    *,
    noun: str = "embedding",
) -> tuple[Joined, IntArray, dict[str, IntArray], tuple[str, ...]]:
    """Join tiles to their labels, and check that each split has some of several classes.

    Returns:
        who belongs to whom, the class of each tile (-1 without a label), the tiles of each split, the classes' names.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    joined = join_labels(tiles, tile_splits, listed, allow_missing=options.allow_missing, noun=noun)
    without_split = [listed.names[index] for index, split in zip(joined.used, joined.splits, strict=True) if not split]
    if without_split:
        raise ValueError(
            f"{listed.source}: {len(without_split):,} tiles have no split, neither in the CSV nor in their path, the "
            f"first is {without_split[0]}. Add a column split."
        )
    used_labels = [listed.labels[index] for index in joined.used]
    index_of_label, classes = class_names(used_labels, options.positive)

    label_of_row = np.full(len(tiles), -1, dtype=np.int64)
    rows = np.array(joined.rows, dtype=np.int64)
    label_of_row[rows] = [index_of_label[label] for label in used_labels]
    split_of_row = np.full(len(tiles), "", dtype="U5")
    split_of_row[rows] = joined.splits
    rows_of_split = {split: np.flatnonzero(split_of_row == split) for split in SPLITS}
    _check_splits(rows_of_split, label_of_row, classes, listed.source)
    return joined, label_of_row, rows_of_split, classes


@dataclass(frozen=True)
class ProbeData:
    """N embeddings of width D, of which the labelled ones belong to a split each.

    Args:
        features: (N, D) float32.
        rows: split -> its rows of `features`, ascending.
        labels: (N,) class index, -1 where there is none.
        classes: names of the classes; of two the second is the positive one.
        groups: (N,) patient or slide as text, or None.
        group_column: what the groups are called, or None.
        colours: (N, 6) colour statistics of the pixels, or None.
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
    watch: Progress | None = None,
) -> ProbeData:
    """Read embeddings and labels, join them, and check that a probe of them means something.

    Args:
        labels: a CSV, or None where the embeddings carry their labels.
        watch: receives the news of the reading.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: one sentence on what is wrong.
    """
    # The CSV first: what is wrong with it should not wait for gigabytes to be read.
    listed = None
    if labels is not None:
        listed = rows_of_table(read_table(labels), label=options.label, split=options.split, group=options.group)
    table, how = read_embeddings(embeddings, cache=cache, watch=watch)
    listed = listed or own_labels(table, Path(embeddings).name)
    joined, label_of_row, rows_of_split, classes = label_tiles(table.names, table.splits, listed, options)
    warnings = []
    groups, group_column = _groups_of_rows(table, listed, joined, label_of_row, pcam_meta)
    units = list(table.names) if groups is None else groups.tolist()
    warnings += class_notes(classes, label_of_row, units, "tile" if group_column is None else group_column)
    if groups is not None:
        warnings += audit(
            [Fold(0, rows_of_split[TRAIN], rows_of_split[VALIDATION], rows_of_split[TEST])],
            table.names,
            fingerprints=None,  # reported below: twins of published data sets
            patients=groups.tolist(),
            drawn=False,
            allow_leakage=options.allow_leakage,
            unit=f"groups ({group_column})",
        )
    elif pcam_meta is not None:
        warnings.append("PCam's meta files don't fit these tiles' names and labels, so intervals are over tiles")
    if joined.unembedded or joined.unlabelled:
        lacking = {"labels without an embedding": joined.unembedded, "embeddings without a label": joined.unlabelled}
        warnings.append(f"left out: {left_over(lacking)}")
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
