"""`gigapath bench WHAT`: measurements of this machine, as a table or as JSON."""

import argparse
import importlib
import json

from gigapath.cli.arguments import add_options, options_from

# what -> (module, its options class, one line of help). A module offers that class, `measure(options)` that yields
# rows, `in_words(row)` and `HEADING`.
KINDS = {
    "read": ("gigapath.bench.reading", "ReadBench", "reading tiles against a plain loop with OpenSlide"),
    "tile-encoder": ("gigapath.bench.tile_encoder", "TileEncoderBench", "the tile encoder against a plain product"),
    "embed": ("gigapath.bench.embedding", "EmbedBench", "embed end to end against the encoder and the reader alone"),
    "probe": ("gigapath.bench.probe", "ProbeBench", "the linear probe against a plain loop: speed and peak memory"),
    "slide-encoder": ("gigapath.bench.slide_encoder", "SlideEncoderBench", "the slide encoder against a plain product"),
    "finetuning": ("gigapath.bench.finetuning", "FinetuningBench", "a training step against a plain product"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (module, options_class, line) in KINDS.items():
        sub = kinds.add_parser(name, help=line, description=line, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="one JSON object a row, for machines")
        add_options(sub, getattr(importlib.import_module(module), options_class))


def run(namespace: argparse.Namespace) -> int:
    name, options_class, _ = KINDS[namespace.what]
    module = importlib.import_module(name)
    options = options_from(namespace, getattr(module, options_class))
    for number, row in enumerate(module.measure(options)):
        if not number and not namespace.json:  # not before: a slide that is missing leaves no table without rows
            from gigapath.bench.protocol import describe_machine

            print(describe_machine())
            print(module.HEADING)
        print(json.dumps(row) if namespace.json else module.in_words(row), flush=True)
    return 0
