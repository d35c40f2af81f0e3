"""`gigapath methods DIR`: the methods paragraph of a paper, from what was recorded beside the results."""

import argparse
import dataclasses
import json
import sys
import textwrap

from gigapath.cli.arguments import add_json
from gigapath.report.methods import methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the output folder of gigapath tile or embed")
    add_json(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print the paragraphs and the BibTeX entries; cautions go to stderr too where stdout is no terminal."""
    found = methods(namespace.folder)
    if namespace.json:
        print(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
        return 0
    for caution in found.cautions:
        print(f"CAUTION: {caution}")
        if not sys.stdout.isatty():
            print(f"gigapath methods: {caution}", file=sys.stderr)
    print("\n\n".join(textwrap.fill(paragraph, 100) for paragraph in found.paragraphs))
    print()
    print("\n\n".join(found.bibtex))
    return 0
