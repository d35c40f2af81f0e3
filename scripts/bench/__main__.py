"""`python -m scripts.bench WHAT`: measurements of this machine, as a table or as JSON."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from gigapath.cli.arguments import add_options, options_from
from scripts.bench.protocol import describe_machine

# what -> (module, its options class, one line of help). A module offers that class, `measure(options)` that yields
# rows, `in_words(row)` and `HEADING`.
KINDS = {
    "read": ("scripts.bench.reading", "ReadBench", "reading tiles against a plain loop with OpenSlide"),
    "tile-encoder": ("scripts.bench.tile_encoder", "TileEncoderBench", "the tile encoder against a plain product"),
    "embed": ("scripts.bench.embedding", "EmbedBench", "embed end to end against the encoder and the reader alone"),
    "probe": ("scripts.bench.probe", "ProbeBench", "the linear probe against a plain loop: speed and peak memory"),
    "slide-encoder": ("scripts.bench.slide_encoder", "SlideEncoderBench", "the slide encoder against a plain product"),
    "finetuning": ("scripts.bench.finetuning", "FinetuningBench", "a training step against a plain product"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all measurements, each with its own options."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (module, options_class, line) in KINDS.items():
        sub = kinds.add_parser(name, help=line, description=line, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="one JSON object a row, for machines")
        add_options(sub, getattr(importlib.import_module(module), options_class))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement. Exit status: 0 done, 1 it could not start, 2 the arguments are off."""
    namespace = build_parser().parse_args(argv)
    name, options_class, _ = KINDS[namespace.what]
    module = importlib.import_module(name)
    try:
        options = options_from(namespace, getattr(module, options_class))
        for number, row in enumerate(module.measure(options)):
            if not number and not namespace.json:  # not before: a slide that is missing leaves no table without rows
                print(describe_machine())
                print(module.HEADING)
            print(json.dumps(row) if namespace.json else module.in_words(row), flush=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"{namespace.what}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
