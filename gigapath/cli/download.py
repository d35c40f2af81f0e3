"""`gigapath download NAME`: weights, demo data and the published tables, checked."""

import argparse
import sys
from pathlib import Path

import huggingface_hub.utils

from gigapath.hub import Collected, download
from gigapath.releases import DOWNLOADS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath download`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, DOWNLOADS))
    names = "\n".join(f"  {name:{width}}  {entry.about}" for name, entry in DOWNLOADS.items())
    parser.epilog = f"names:\n{names}"
    parser.add_argument("name", metavar="NAME", choices=list(DOWNLOADS), help="what to fetch; see the names below")
    parser.add_argument(
        "--to",
        metavar="DIR",
        default=None,
        help="the folder (default: the model hub's cache for a released pair, which HF_HOME moves; else data)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Fetch the files, a bar for each on a terminal, and print a line for each when it is there."""
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    for file in download(namespace.name, namespace.to):
        print(_line(file))
    if DOWNLOADS[namespace.name].note:
        print(DOWNLOADS[namespace.name].note)
    return 0


def _line(file: Collected) -> str:
    if file.missing:
        return f"without {file.path.name}, which the rest can do without: {file.missing}"
    size = Path(file.path).stat().st_size
    checked = f"{file.digest.partition(':')[0]} checked" if file.digest else "no digest is published to check it"
    return f"{file.path}  ({size:,} bytes, {checked}{', was there already' if file.was_there else ''})"
