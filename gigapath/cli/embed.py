"""`gigapath embed SLIDES --out DIR`: slides to tiles, tile embeddings and slide embeddings."""

import argparse

from gigapath.cli.arguments import add_json, add_options, options_from
from gigapath.cli.progress import Terminal
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.preprocessing.tiling import TileOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "slides",
        nargs="*",
        metavar="SLIDES",
        help="slide files, folders of them, manifests (.csv); with --tiles they may be left out",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the output folder; what is done there is kept")
    add_json(parser)
    add_options(parser, EmbedOptions, title="encoders")
    add_options(parser, TileOptions, title="tiles")
    add_options(parser, RunOptions, title="run")


def run(namespace: argparse.Namespace) -> int:
    tiling = options_from(namespace, TileOptions)
    embedding = options_from(namespace, EmbedOptions)
    options = options_from(namespace, RunOptions)
    from gigapath.embedding.run import run_embed  # torch takes seconds: a wrong word is told before

    with Terminal("tile", machine=namespace.json) as watch:
        result = run_embed(
            namespace.slides,
            namespace.out,
            tiling=tiling,
            embedding=embedding,
            options=options,
            watch=watch,
            command=namespace.words,
        )
    return watch.report(result)
