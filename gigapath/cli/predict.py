"""`gigapath predict CHECKPOINT FEATURES...`: apply a fitted head."""

import argparse
import sys

from gigapath.cli.arguments import add_options, options_from
from gigapath.cli.main import EXIT_FAILED_SLIDES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath predict`."""
    from gigapath.finetune.options import JoinOptions

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a fitted head, such as OUT/fold_0")
    parser.add_argument("features", nargs="+", metavar="FEATURES", help="feature files, or folders of them")
    parser.add_argument("--out", metavar="CSV", help="write the predictions to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add_options(parser, JoinOptions, title="features")


def run(namespace: argparse.Namespace) -> int:
    """Print a line a slide; a slide that can't be read is named on stderr and the status is 3."""
    from gigapath.finetune import JoinOptions, predict

    found = predict(
        namespace.checkpoint,
        namespace.features,
        join=options_from(namespace, JoinOptions),
        device=namespace.device,
        out=namespace.out,
        on_failed=lambda reason: print(f"gigapath predict: {reason}", file=sys.stderr),
    )
    for row in found.rows:
        shares = ", ".join(f"{name[2:]} {share:.3f}" for name, share in row.items() if name.startswith("p_"))
        print(f"{row['slide_id']}: {row['predicted'] or 'none'} ({shares})")
    if namespace.out:
        print(f"written to {namespace.out}")
    return EXIT_FAILED_SLIDES if found.failed else 0
