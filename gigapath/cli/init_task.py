"""`gigapath init-task labels.csv`: write a task file from a CSV of labels, and check it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath init-task`."""
    parser.add_argument("labels", metavar="LABELS", help="a CSV with a row a slide")
    parser.add_argument(
        "--label", nargs="+", default=(), metavar="COL", help="column of the label; several = several labels"
    )
    parser.add_argument(
        "--ordinal", action="store_true", help="the classes are grades: report quadratic-weighted kappa"
    )
    parser.add_argument("--name", help="of the task (default: that of the CSV)")
    parser.add_argument("--to", metavar="YAML", help="where the task goes (default: beside the CSV)")


def run(namespace: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    from gigapath.finetune.task_writer import new_task

    to = Path(namespace.to or Path(namespace.labels).with_suffix(".yaml"))
    task, counts = new_task(
        namespace.labels, to, columns=namespace.label, name=namespace.name, ordinal=namespace.ordinal
    )
    shares = ", ".join(f"{label} {count:,}" for label, count in counts.items())
    print(f"{to}: task {task.name}, {task.setting}; slides a label: {shares}.")
    return 0
