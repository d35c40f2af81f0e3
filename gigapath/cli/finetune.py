"""`gigapath finetune`: fine-tune the slide encoder on labelled slides."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator

from gigapath.cli.arguments import add_options, options_from
from gigapath.cli.main import EXIT_STOPPED
from gigapath.signals import StopFlag, Stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath finetune`."""
    from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions

    parser.add_argument(
        "--task", required=True, metavar="TASK", help="panda, mutation_5_gene, or a YAML file (gigapath init-task)"
    )
    parser.add_argument("--features", required=True, metavar="DIR", help="folder with a feature file a slide")
    parser.add_argument("--labels", required=True, metavar="CSV", help="a row a slide")
    parser.add_argument(
        "--splits",
        metavar="DIR",
        help="folder with train_0.csv, val_0.csv, test_0.csv, ... (default: folds drawn here)",
    )
    parser.add_argument(
        "--pretrained",
        default="hf_hub:prov-gigapath/prov-gigapath",
        metavar="WEIGHTS",
        help="slide encoder: hf_hub:REPO, a file, or '' for random weights (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; a run that it holds goes on")
    parser.add_argument("--controls", action="store_true", help="train controls too, and put all in one table")
    for options, title in (
        (JoinOptions, "labels and features"),
        (SplitOptions, "splits"),
        (ModelOptions, "model"),
        (TrainingOptions, "training"),
    ):
        add_options(parser, options, title=title)


def run(namespace: argparse.Namespace) -> int:
    """Run, telling the plan, each epoch and the table of scores."""
    from gigapath.finetune import (
        Inputs,
        JoinOptions,
        ModelOptions,
        Settings,
        SplitOptions,
        TrainingOptions,
        finetune,
    )

    settings = Settings(
        join=options_from(namespace, JoinOptions),
        split=options_from(namespace, SplitOptions),
        model=options_from(namespace, ModelOptions),
        training=options_from(namespace, TrainingOptions),
        controls=namespace.controls,
    )
    inputs = Inputs(namespace.task, namespace.features, namespace.labels, namespace.splits, namespace.pretrained)
    try:
        with StopFlag() as stop, _news_on_stdout():
            finetune(inputs, namespace.out, settings, say=lambda line: print(line, flush=True), check_stop=stop.check)
    except Stopped as stopped:
        print(f"gigapath finetune: stopped by {stopped}; the same command goes on after the last finished epoch.")
        return EXIT_STOPPED
    print(f"Results: {namespace.out}")
    return 0


@contextlib.contextmanager
def _news_on_stdout() -> Iterator[None]:
    """Print what fine-tuning tells of itself through `logging`, within this block only."""
    logger, handler = logging.getLogger("gigapath.finetune"), logging.StreamHandler(sys.stdout)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
