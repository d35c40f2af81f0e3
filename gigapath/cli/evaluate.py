"""`gigapath evaluate CHECKPOINT FEATURES --labels CSV`: test a frozen head on another cohort."""

import argparse

from gigapath.cli.arguments import add_options, options_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath evaluate`."""
    from gigapath.finetune.options import JoinOptions

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a fitted head, such as OUT/fold_0")
    parser.add_argument("features", metavar="FEATURES", help="folder with a feature file a slide")
    parser.add_argument("--labels", required=True, metavar="CSV", help="a row a slide, with the labels of the task")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for predictions.csv and results.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--replicates", type=int, default=2000, help="bootstrap replicates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    parser.add_argument("--allow-leakage", action="store_true", help="take slides that trained the head, too")
    add_options(parser, JoinOptions, title="labels and features")


def run(namespace: argparse.Namespace) -> int:
    """Print the table of scores."""
    from gigapath.finetune import JoinOptions, evaluate_head
    from gigapath.finetune.report import lines

    result = evaluate_head(
        namespace.checkpoint,
        namespace.features,
        namespace.labels,
        namespace.out,
        join=options_from(namespace, JoinOptions),
        device=namespace.device,
        replicates=namespace.replicates,
        seed=namespace.seed,
        allow_seen=namespace.allow_leakage,
    )
    for line in lines({"frozen head": [result.headline]}):
        print(line)
    for note in result.notes:
        print(f"note: {note}")
    print(f"Results: {namespace.out}")
    return 0
