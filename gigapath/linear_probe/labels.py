"""Labels of tiles: read from a CSV or from the table itself, joined to embeddings by name, checked before anything is
trained."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gigapath.evaluation.labels import canonical_label, first_column, shown, sorted_classes
from gigapath.linear_probe.table import EmbeddingTable, bare_name, split_of_word
from gigapath.tables import Table, read_table, separator_hint

NAME_COLUMNS = ("input", "file", "name")
GROUP_COLUMNS = ("group", "patient_id", "patient", "slide_id", "slide", "wsi")


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


def read_labels(path: Path | str, *, label: str, split: str | None, group: str | None) -> LabelRows:
    """Read a CSV with a column `input`, `file` or `name`, and the columns of label, split and group.

    Args:
        path: the CSV, UTF-8.
        label: column of the label.
        split: column of the split; None takes `split` if it is there, else the split is the embeddings' own.
        group: column of the group; None takes the first of `GROUP_COLUMNS` that is there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a label is missing, a split is none, a row is short.
    """
    return rows_of_table(read_table(path), label=label, split=split, group=group)


def rows_of_table(table: Table, *, label: str, split: str | None, group: str | None) -> LabelRows:
    """The same for a table that was read."""
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
            f"{table.source}: expected a column {stated or ' or '.join(usual)}, got {', '.join(table.header[:12])}. "
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
    """Which embedding each label belongs to.

    Args:
        rows: for each used label its row in the table.
        used: for each used label its row among the labels.
        splits: for each used label its split.
        unlabelled: names of embeddings that no label speaks of.
        unembedded: names in the labels that have no embedding.
    """

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
        tiles: names of the embeddings, without suffix.
        tile_splits: their splits as far as their own paths say them, "" elsewhere.
        labels: what was read of labels.
        allow_missing: go on where labels or tiles are left over.
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
        row = by_path.get(name, -1)
        if row < 0:
            candidates = by_stem.get(name.rpartition("/")[2], [])
            fitting = [each for each in candidates if not split or tile_splits[each] in ("", split)]
            if len(fitting) > 1:
                raise ValueError(
                    f"{labels.source}: {written} fits several {noun}s "
                    f"({shown([tiles[candidate] for candidate in fitting])}). "
                    "Write its whole path."
                )
            if not candidates:
                unembedded.append(written)
                continue
            if not fitting:
                contradicting.append(f"{written} ({split} against {tile_splits[candidates[0]]})")
                continue
            row = fitting[0]
        elif split and tile_splits[row] not in ("", split):
            contradicting.append(f"{written} ({split} against {tile_splits[row]})")
            continue
        rows.append(row)
        used.append(index)
        splits.append(split or tile_splits[row])

    _refuse_double_rows(rows, used, splits, labels)
    if contradicting:
        raise ValueError(
            f"{labels.source}: {len(contradicting):,} splits contradict the paths of the {noun}s: "
            f"{shown(contradicting)}. Correct the CSV, or take the right {noun}s."
        )
    taken = set(rows)
    unlabelled = [name for row, name in enumerate(tiles) if row not in taken]
    if (unembedded or unlabelled) and not allow_missing:
        lacking = in_words({f"rows without {noun}": unembedded, f"{noun}s without a row": unlabelled})
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


def _refuse_double_rows(rows: list[int], used: list[int], splits: list[str], labels: LabelRows) -> None:
    if len(set(rows)) == len(rows):
        return
    first: dict[int, int] = {}
    for position, row in enumerate(rows):
        before = first.setdefault(row, position)
        if before != position:
            name = labels.names[used[position]]
            if splits[before] != splits[position]:
                raise ValueError(
                    f"{labels.source}: {name} stands in two splits ({splits[before]} and {splits[position]}). Keep one."
                )
            raise ValueError(
                f"{labels.source}: {name} has two rows ({used[before] + 2} and {used[position] + 2}). Keep one."
            )


def in_words(lacking: Mapping[str, list[str]]) -> str:
    """How many names there are of each kind, and the first of them; of kinds without any, nothing."""
    return ", ".join(f"{kind}: {len(names):,} ({shown(names)})" for kind, names in lacking.items() if names)
