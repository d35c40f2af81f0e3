"""`gigapath inspect FILE`: what a feature file is."""

import argparse
import json
import sys
from pathlib import Path

from gigapath.features.describe import describe, in_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath inspect`."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a feature file: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, slide2vec's",
    )
    parser.add_argument(
        "--tile-size-level0",
        type=float,
        default=None,
        metavar="PIXELS",
        help="distance between neighbouring tiles, in the unit of the files' coordinates, where a file does not say",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a file, one a line, with all attributes")


def run(namespace: argparse.Namespace) -> int:
    """Print what each file is; a file that can't be read is named on stderr, the others go on, and the status is 1."""
    status = 0
    for name in namespace.files:
        path = Path(name)
        try:
            if path.is_dir():
                raise ValueError(f"{name}: expected a feature file, got a folder. Name its files: {path}/*.h5.")
            found = describe(path, tile_size_level0=namespace.tile_size_level0)
        except (ValueError, OSError) as error:
            print(f"gigapath inspect: {error}", file=sys.stderr)
            status = 1
            continue
        if namespace.json:
            print(json.dumps(found, ensure_ascii=False))
        elif len(namespace.files) == 1:
            print("\n".join(in_words(found)))
        else:  # by their paths: folders of several tools hold files of one name
            print("\n".join(in_words({**found, "file": name})) + "\n" * (name != namespace.files[-1]))
    return status
