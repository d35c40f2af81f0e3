"""`gigapath tile SLIDES --out DIR`: tissue, tiles and previews; a person looks before anything is embedded."""

import argparse

from gigapath.cli.arguments import add_json, add_options, options_from
from gigapath.cli.progress import Terminal
from gigapath.embedding.options import RunOptions
from gigapath.embedding.tiling import run_tile
from gigapath.preprocessing.tiling import TileOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slides", nargs="+", metavar="SLIDES", help="slide files, folders of them, manifests (.csv)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the output folder; what is done there is kept")
    add_json(parser)
    add_options(parser, TileOptions, title="tiles")
    add_options(parser, RunOptions, title="run")


def run(namespace: argparse.Namespace) -> int:
    with Terminal("slide", machine=namespace.json) as watch:
        result = run_tile(
            namespace.slides,
            namespace.out,
            tiling=options_from(namespace, TileOptions),
            options=options_from(namespace, RunOptions),
            watch=watch,
            command=namespace.words,
        )
    return watch.report(result)
