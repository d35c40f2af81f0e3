"""`gigapath slide-embed FEATURES`: tile embeddings, ours or another tool's, to slide embeddings."""

import argparse
from pathlib import Path

from gigapath.cli.arguments import add_json, add_options, options_from
from gigapath.cli.progress import Terminal
from gigapath.embedding.options import KeepOptions, SlideEmbedOptions
from gigapath.features import export_table
from gigapath.features.tables import TABLE_FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "features",
        nargs="+",
        metavar="FEATURES",
        help="files of tile embeddings or folders of them: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, slide2vec's, "
        "the published",
    )
    parser.add_argument("--out", metavar="DIR", help="the output folder (default: that of the run which made FEATURES)")
    parser.add_argument(
        "--to", metavar="FILE", help="write a table of --embedding too: .parquet, .csv or .npz, as export does"
    )
    add_json(parser)
    add_options(parser, SlideEmbedOptions, title="slide encoder")
    add_options(parser, KeepOptions, title="run")


def run(namespace: argparse.Namespace) -> int:
    embedding = options_from(namespace, SlideEmbedOptions)
    options = options_from(namespace, KeepOptions)
    if namespace.to and embedding.form.endswith(":tiles"):
        raise ValueError(f"--to: expected the name of one vector a slide, got --embedding {embedding.embedding}.")
    if namespace.to and Path(namespace.to).suffix not in TABLE_FORMATS:
        raise ValueError(f"--to: expected a file ending in {', '.join(TABLE_FORMATS)}, got {namespace.to!r}.")
    from gigapath.embedding.slide_embedding import run_slide_embed  # torch takes seconds: a wrong word is told before

    with Terminal("slide", machine=namespace.json) as watch:
        result = run_slide_embed(
            namespace.features,
            namespace.out,
            embedding=embedding,
            options=options,
            watch=watch,
            command=namespace.words,
        )
    if namespace.to and result.results is not None and result.counts["done"]:
        export_table(
            result.results,
            namespace.to,
            embedding=embedding.embedding,
            allow_mixed=options.allow_mixed,
            overwrite=options.overwrites("slides"),
        )
    return watch.report(result)
