"""Labels of slides: read from a CSV, checked against the task, joined to feature files by name."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.task import Task
from gigapath.files import separator_hint

ID_COLUMNS = ("slide_id", "image_id", "slide", "image")
LABEL_COLUMNS = ("label", "isup_grade")
PATIENT_COLUMNS = ("patient_id", "pat_id", "patient", "case_submitter_id", "case_id")
SITE_COLUMNS = ("site", "data_provider", "provider", "center", "scanner")
SHOWN = 3  # examples in a message

_YES = {"1", "1.0", "true", "yes"}
_NO = {"0", "0.0", "false", "no"}
_BARCODE = re.compile(r"TCGA-\w{2}-\w{4}")

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """The labelled slides of a CSV.

    Attributes:
        slide_ids: S names, each once.
        truth: (S,) index of the class; of a multi-label task (S, C) of 0 and 1.
        patients: (S,) or None where they are not known.
        sites: (S,) or None.
        source: the CSV's name.
        digest: SHA-256 over what is above; a split is reused only where it is the same.
    """

    slide_ids: tuple[str, ...]
    truth: IntArray
    patients: tuple[str, ...] | None
    sites: tuple[str, ...] | None
    source: str
    digest: str

    def __len__(self) -> int:
        return len(self.slide_ids)

    def take(self, rows: Sequence[int] | IntArray) -> "Labels":
        """Some of the slides, in the order given; the digest stays that of the whole CSV."""
        index = [int(row) for row in rows]
        return Labels(
            tuple(self.slide_ids[row] for row in index),
            self.truth[index],
            None if self.patients is None else tuple(self.patients[row] for row in index),
            None if self.sites is None else tuple(self.sites[row] for row in index),
            self.source,
            self.digest,
        )


def read_table(path: Path | str) -> tuple[list[str], list[dict[str, str]]]:
    """(header, rows) of a CSV; ValueError where it is none, or a row is short."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name}: expected a CSV in UTF-8, got something else ({error}).") from error
    if not rows:
        raise ValueError(f"{path.name}: expected a CSV with a header, got an empty file.")
    header = [name.strip() for name in rows[0]]
    body = [row for row in rows[1:] if any(cell.strip() for cell in row)]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path.name}: expected {len(header)} values in row {number}, got {len(row)}.")
    if not body:
        raise ValueError(f"{path.name}: expected rows below the header, got none.")
    return header, [dict(zip(header, (cell.strip() for cell in row), strict=True)) for row in body]


def read_labels(path: Path | str, task: Task, *, id_rule: str = "exact") -> Labels:
    """Read and check labels.

    Args:
        path: a CSV with the columns that the task names, or the usual ones: the published PANDA table, Kaggle's
            train.csv (image_id, isup_grade), the published mutation table.
        task: what the labels mean.
        id_rule: "tcga" takes the patient from the barcode where no column has it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a label that the task does not know, a slide in two rows.
    """
    header, rows = read_table(path)
    name = Path(path).name
    id_column = column_of(header, task.id_column, ID_COLUMNS, f"{name}: the slide's name", "id_column")
    slide_ids = [row[id_column] for row in rows]
    if "" in slide_ids:
        raise ValueError(f"{name}: row {slide_ids.index('') + 2} has no {id_column}.")
    twice = _first_twice(slide_ids)
    if twice is not None:
        raise ValueError(f"{name}: {twice} has two rows. Keep one.")
    if task.multi_label:
        truth = _flags(rows, header, task, name)
    else:
        label_column = column_of(header, task.label_column, LABEL_COLUMNS, f"{name}: the label", "label_column")
        truth = _class_of_rows([row[label_column] for row in rows], task, name)
    patients = _optional(header, rows, task.patient_column, PATIENT_COLUMNS, name)
    if patients is None and id_rule == "tcga":
        barcodes = [_BARCODE.match(slide_id) for slide_id in slide_ids]
        patients = [found[0] for found in barcodes if found] if all(barcodes) else None
    if patients is not None and "" in patients:
        raise ValueError(f"{name}: row {patients.index('') + 2} has no patient. Fill it in, or leave the column out.")
    sites = _optional(header, rows, task.site_column, SITE_COLUMNS, name)
    digest = hashlib.sha256(repr((slide_ids, truth.tolist(), patients, sites)).encode()).hexdigest()
    return Labels(
        tuple(slide_ids), truth, tuple(patients) if patients else None, tuple(sites) if sites else None, name, digest
    )


def column_of(header: Sequence[str], stated: str | None, usual: Sequence[str], what: str, key: str) -> str:
    """The column that the task states, or the first usual one."""
    if stated is not None and stated not in header:
        raise ValueError(
            f"{what}: expected a column {stated}, got {', '.join(header[:12])}. Correct {key} of the task."
        )
    found = stated or next((column for column in usual if column in header), None)
    if found is None:
        raise ValueError(
            f"{what}: expected a column {' or '.join(usual)}, got {', '.join(header[:12])}. "
            f"Name it as {key} of the task"
            + (" (`gigapath init-task --label COL` writes it)." if key == "label_column" else ".")
            + separator_hint(header)
        )
    return found


def _optional(
    header: Sequence[str], rows: Sequence[Mapping[str, str]], stated: str | None, usual: Sequence[str], name: str
) -> list[str] | None:
    found = next((column for column in usual if column in header), None)
    if stated is not None and stated in header:
        found = stated
    elif stated is not None and usual is PATIENT_COLUMNS:
        raise ValueError(f"{name}: expected a column {stated}, got {', '.join(header[:12])}. Correct the task.")
    return None if found is None else [row[found] for row in rows]


def _class_of_rows(labels: Sequence[str], task: Task, name: str) -> IntArray:
    index = {_canonical(label): number for number, label in enumerate(task.classes)}
    unknown = [row for row, label in enumerate(labels) if _canonical(label) not in index]
    if unknown:
        row = unknown[0]
        raise ValueError(
            f"{name}: row {row + 2} has the label {labels[row]!r}, and {len(unknown):,} rows have labels that the "
            f"task {task.name} does not know ({', '.join(task.classes)}). Correct the CSV or the task."
        )
    return np.array([index[_canonical(label)] for label in labels], dtype=np.int64)


def _flags(rows: Sequence[Mapping[str, str]], header: Sequence[str], task: Task, name: str) -> IntArray:
    missing = [column for column in task.classes if column not in header]
    if missing:
        raise ValueError(f"{name}: expected columns {', '.join(task.classes)}, {', '.join(missing)} is not there.")
    truth = np.empty((len(rows), len(task.classes)), dtype=np.int64)
    for number, row in enumerate(rows):
        for place, column in enumerate(task.classes):
            word = row[column].lower()
            if word not in _YES | _NO:
                raise ValueError(f"{name}: row {number + 2} has {row[column]!r} under {column}, expected 0 or 1.")
            truth[number, place] = word in _YES
    return truth


def _canonical(label: str) -> str:
    """A label as text; a whole number loses its decimal point."""
    try:
        number = float(label)
    except ValueError:
        return label
    return str(int(number)) if number.is_integer() else label


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


@dataclass(frozen=True)
class Joined:
    """Labelled slides and their files.

    Attributes:
        labels: the slides that have a file, in the order of the CSV.
        files: (S,) their feature files.
        missing: labelled slides without a file.
        unlabelled: files without a label.
    """

    labels: Labels
    files: tuple[Path, ...]
    missing: tuple[str, ...]
    unlabelled: tuple[str, ...]


def id_maker(id_rule: str, id_regex: str | None) -> Callable[[str], str]:
    """What makes a name, of a file or in a row, the id by which the two meet."""
    if id_regex is not None:
        pattern = re.compile(id_regex)

        def cut(name: str) -> str:
            found = pattern.search(name)
            return name if found is None else found[1] if pattern.groups else found[0]

        return cut
    if id_rule == "tcga":
        return lambda name: name.partition(".")[0]
    return lambda name: name


def join_labels(
    labels: Labels,
    files: Sequence[Path],
    *,
    id_rule: str = "exact",
    id_regex: str | None = None,
    allow_missing: bool = False,
) -> Joined:
    """Find the file of each labelled slide; nothing is ever substituted.

    Args:
        labels: the slides.
        files: their feature files.
        id_rule: "exact", or "tcga" for what stands before the first dot.
        id_regex: a pattern whose first group (or whole match) is the id; goes before `id_rule`.
        allow_missing: go on without the slides that have no file.

    Raises:
        ValueError: two files or two rows share an id, no file has a row, or slides have no file and
            `allow_missing` is not set.
    """
    make = id_maker(id_rule, id_regex)
    by_id: dict[str, Path] = {}
    for file in files:
        key = make(bare_name(file))
        if key in by_id:
            raise ValueError(f"two files have the id {key}: {by_id[key].name} and {file.name}. Keep one.")
        by_id[key] = file
    keys = [make(slide_id) for slide_id in labels.slide_ids]
    twice = _first_twice(keys)
    if twice is not None:
        raise ValueError(f"{labels.source}: two rows have the id {twice}. Make the id rule more exact.")
    found = [row for row, key in enumerate(keys) if key in by_id]
    missing = tuple(slide_id for slide_id, key in zip(labels.slide_ids, keys, strict=True) if key not in by_id)
    wanted = set(keys)
    unlabelled = tuple(file.name for key, file in by_id.items() if key not in wanted)
    if not found:
        raise ValueError(
            f"{labels.source}: none of its {len(labels):,} slides (such as {labels.slide_ids[0]}) is among the "
            f"{len(files):,} feature files (such as {files[0].name}). See --id-rule and --id-regex."
        )
    if missing and not allow_missing:
        raise ValueError(
            f"{labels.source}: {len(missing):,} of {len(labels):,} slides have no features ({shown(missing)}). "
            "Embed them, or go on without them: --allow-missing."
        )
    return Joined(labels.take(found), tuple(by_id[keys[row]] for row in found), missing, unlabelled)


def bare_name(file: Path) -> str:
    """A feature file's name without its suffix (Mussel's `.patch` included)."""
    return file.stem.removesuffix(".patch")


def shown(names: Sequence[str]) -> str:
    """A few of the names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
