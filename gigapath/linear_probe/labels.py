"""Labels of tiles: read from a CSV or from the table itself, joined to embeddings by name, checked before anything is
trained."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gigapath.files import separator_hint
from gigapath.linear_probe.table import EmbeddingTable, bare_name, split_of_word

NAME_COLUMNS = ("input", "file", "name")
GROUP_COLUMNS = ("group", "patient_id", "patient", "slide_id", "slide", "wsi")
SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class LabelRows:
    """M labelled tiles: names as written, labels as text, splits ("" = not said), groups or None, the source's name
    for messages, and further columns that were asked for."""

    names: list[str]
    labels: list[str]
    splits: list[str]
    groups: list[str] | None
    source: str
    group_column: str | None = None
    more: dict[str, list[str]] = field(default_factory=dict)


def read_labels(path: Path | str, *, label: str, split: str | None, group: str | None) -> LabelRows:
    """Read a CSV with a column `input`, `file` or `name`, and the columns of label, split and group.

    Args:
        path: the CSV, UTF-8.
        label: column of the label.
        split: column of the split; None takes `split` if it is there, else the split is the embeddings' own.
        group: column of the group; None takes the first of `GROUP_COLUMNS` that is there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a label is empty, a split is none, a row is short.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return parse_labels(path.read_bytes(), path.name, label=label, split=split, group=group)


def parse_labels(
    content: bytes,
    source: str,
    *,
    label: str,
    split: str | None,
    group: str | None,
    name_columns: Sequence[str] = NAME_COLUMNS,
    group_columns: Sequence[str] = GROUP_COLUMNS,
    more_columns: Sequence[str] = (),
) -> LabelRows:
    """The same for a CSV's bytes.

    Args:
        content: the bytes, UTF-8.
        source: the CSV's name for messages.
        label: column of the label.
        split: as for `read_labels`.
        group: as for `read_labels`.
        name_columns: columns that can hold the name, the first that is there.
        group_columns: columns that can hold the group.
        more_columns: columns to give back where they are there.
    """
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source}: expected a CSV in UTF-8, got something else ({error}).") from error
    if not rows:
        raise ValueError(f"{source}: expected a CSV with a header, got an empty file.")
    header = [column.strip() for column in rows[0]]
    where = {column: index for index, column in reversed(list(enumerate(header)))}
    name_column = next((column for column in name_columns if column in where), None)
    if name_column is None:
        raise ValueError(
            f"{source}: expected a column {' or '.join(name_columns)}, got {', '.join(header)}."
            + separator_hint(header)
        )
    if label not in where:
        raise ValueError(f"{source}: expected a column {label}, got {', '.join(header)}. Name it with --label.")
    if group is not None and group not in where:
        raise ValueError(f"{source}: expected a column {group}, got {', '.join(header)}. Name it with --group.")
    group = group or next((column for column in group_columns if column in where), None)
    if split is not None and split not in where:
        raise ValueError(f"{source}: expected a column {split}, got {', '.join(header)}. Name it with --split.")
    split = split or "split"
    body = [row for row in rows[1:] if row]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(f"{source}: expected {len(header)} values in row {number}, got {len(row)}.")

    def column_of(name: str) -> list[str]:
        index = where[name]
        return [row[index].strip() for row in body]

    labels = column_of(label)
    if "" in labels:
        raise ValueError(f"{source}: row {labels.index('') + 2} has no {label}. Fill it in or leave the row out.")
    known: dict[str, str] = {}
    splits = []
    for number, word in enumerate(column_of(split) if split in where else [""] * len(body), start=2):
        if word not in known:
            known[word] = split_of_word(word, f"{source}, row {number}") if split in where else ""
        splits.append(known[word])
    return LabelRows(
        names=column_of(name_column),
        labels=labels,
        splits=splits,
        groups=column_of(group) if group else None,
        source=source,
        group_column=group,
        more={name: column_of(name) for name in more_columns if name in where},
    )


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
    by_path = {name: row for row, name in enumerate(tiles)}
    by_stem: dict[str, list[int]] = {}
    for row, name in enumerate(tiles):
        by_stem.setdefault(name.rpartition("/")[2], []).append(row)

    rows: list[int] = []
    used: list[int] = []
    splits: list[str] = []
    unembedded: list[str] = []
    contradicting: list[str] = []
    for index, written in enumerate(labels.names):
        name, split = bare_name(written), labels.splits[index]
        row = by_path.get(name, -1)
        if row < 0:
            candidates = by_stem.get(name.rpartition("/")[2], [])
            fitting = [each for each in candidates if not split or tile_splits[each] in ("", split)]
            if len(fitting) > 1:
                raise ValueError(
                    f"{labels.source}: {written} fits several {noun}s "
                    f"({_shown([tiles[candidate] for candidate in fitting])}). "
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
            f"{_shown(contradicting)}. Correct the CSV, or take the right {noun}s."
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
    """One map from label to class for all splits: whole numbers in their order, else text in its order.

    Args:
        labels: all labels in use, as text; "1" and "1.0" are the same.
        positive: of two classes the one to put second, or None.

    Returns:
        label as written -> class index, and the names of the classes.
    """
    canonical = {label: _canonical(label) for label in set(labels)}
    found = set(canonical.values())
    numbers = all(name.lstrip("-").isdigit() for name in found)
    names = sorted(found, key=int) if numbers else sorted(found)
    if positive is not None:
        wanted = _canonical(positive)
        if len(names) != 2 or wanted not in names:
            raise ValueError(f"--positive: expected one of two classes, got {positive!r} of {', '.join(names)}.")
        names = [name for name in names if name != wanted] + [wanted]
    index = {name: number for number, name in enumerate(names)}
    return {label: index[name] for label, name in canonical.items()}, tuple(names)


def _canonical(label: str) -> str:
    """A label as text; a whole number loses its decimal point."""
    try:
        number = float(label)
    except ValueError:
        return label
    return str(int(number)) if math.isfinite(number) and number == int(number) else label


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
    return ", ".join(f"{kind}: {len(names):,} ({_shown(names)})" for kind, names in lacking.items() if names)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
