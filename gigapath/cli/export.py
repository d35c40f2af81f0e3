"""`gigapath export DIR --embedding NAME --to FILE`: one table of slide vectors."""

import argparse

from gigapath.cohort.progress import left_out
from gigapath.features import export_table
from gigapath.features.tables import find_slide_folder
from gigapath.text import slides_in_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath export`."""
    parser.add_argument("folder", metavar="DIR", help="the output folder of a run, or one of its slides_* folders")
    parser.add_argument(
        "--embedding",
        default="default",
        metavar="NAME",
        help="default, state:I, last-state or all-states, each with :mean or :class (default :mean); tile-mean; "
        "trident; published-demo (default: %(default)s)",
    )
    parser.add_argument("--to", required=True, metavar="FILE", help="where the table goes: .parquet, .csv or .npz")
    parser.add_argument("--allow-mixed", action="store_true", help="take slides of different numerics together")
    parser.add_argument("--overwrite", action="store_true", help="write over a table of another embedding")


def run(namespace: argparse.Namespace) -> int:
    """Write the table and say what is in it."""
    slides, width = export_table(
        namespace.folder,
        namespace.to,
        embedding=namespace.embedding,
        allow_mixed=namespace.allow_mixed,
        overwrite=namespace.overwrite,
    )
    print(f"{slides_in_words(slides)}, {width} values each ({namespace.embedding}), written to {namespace.to}.")
    if missing := left_out(find_slide_folder(namespace.folder).resolve()):
        are = "has" if missing == 1 else "have"
        print(
            f"{slides_in_words(missing)} of the run {are} no whole result and {are} been left out; see gigapath status."
        )
    return 0
