"""`gigapath map FEATURES --kind KIND --out DIR`: maps of tiles on their slides."""

import argparse

from gigapath.cli.arguments import add_options, options_from
from gigapath.cli.main import EXIT_FAILED_SLIDES
from gigapath.maps.options import MapOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "features", nargs="+", metavar="FEATURES", help="the folder of a run, or files of tile embeddings"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of the maps, one below it a slide")
    add_options(parser, MapOptions, title="maps")


def run(namespace: argparse.Namespace) -> int:
    """Print a line a slide; the status is 3 where a slide failed."""
    options = options_from(namespace, MapOptions)
    from gigapath.devices import at_most_threads  # torch takes seconds: a wrong word is told before
    from gigapath.machine import available_cores
    from gigapath.maps import make_maps

    with at_most_threads(available_cores()):
        result = make_maps(namespace.features, namespace.out, options, tell=print)
    return EXIT_FAILED_SLIDES if result.failed else 0
