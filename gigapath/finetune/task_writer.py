"""A task file from a CSV of labels: columns and classes are read from it, and the result is checked against it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gigapath.evaluation.labels import ID_COLUMNS, LABEL_COLUMNS, column_of, read_labels, sorted_classes
from gigapath.evaluation.task import Task, write_task
from gigapath.tables import read_table

MOST_CLASSES = 50

log = logging.getLogger(__name__)


def new_task(
    labels: Path | str, to: Path | str, *, columns: Sequence[str] = (), name: str | None = None, ordinal: bool = False
) -> tuple[Task, dict[str, int]]:
    """Write the YAML file of a task.

    Args:
        labels: a CSV.
        to: the YAML file.
        columns: of the label; several make a multi-label task; none takes the usual one.
        name: of the task; by default that of the CSV.
        ordinal: the classes are grades.

    Returns:
        the task, and how many slides each label has.

    Raises:
        ValueError: a column is missing, there is one class only, or so many that the column is hardly a label.
    """
    source, path = Path(labels).name, Path(to)
    if path.exists():
        raise ValueError(f"{path}: it is there already. Choose another --to.")
    table = read_table(labels)
    id_column = column_of(table, None, ID_COLUMNS, "the slide's name", "id_column")
    chosen = list(columns) or [column_of(table, None, LABEL_COLUMNS, "the label", "label_column")]
    absent = [column for column in chosen if column not in table.columns]
    if absent:
        raise ValueError(f"{source}: expected columns {', '.join(chosen)}, got {', '.join(table.header[:12])}.")
    title = name or Path(labels).stem
    if len(chosen) > 1:
        task = Task(title, "multi_label", tuple(chosen), id_column=id_column)
    else:
        found = sorted_classes(table.filled(chosen[0]))
        if not 2 <= len(found) <= MOST_CLASSES:
            raise ValueError(
                f"{source}: expected 2 to {MOST_CLASSES} classes under {chosen[0]}, got {len(found)}. Name the label's "
                "column with --label."
            )
        setting = "binary" if len(found) == 2 else "multi_class"
        task = Task(title, setting, tuple(found), ordinal=ordinal, id_column=id_column, label_column=chosen[0])
    read = read_labels(labels, task)
    truth = read.truth
    if task.multi_label:
        counts = dict(zip(task.classes, truth.sum(axis=0).tolist(), strict=True))
    else:
        counts = {label: int((truth == index).sum()) for index, label in enumerate(task.classes)}
    write_task(path, task)
    for note in read.class_notes(task.classes):
        log.warning("note: %s", note)
    return task, counts
