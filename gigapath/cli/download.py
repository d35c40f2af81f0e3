"""`gigapath download NAME`: weights, demo data and the published tables, resumed and checked."""

import argparse
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.utils
from tqdm import tqdm

from gigapath.downloads import DOWNLOADS, Collected, download


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
    shown = sys.stderr.isatty()
    if not shown:
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    bars = _Bars() if shown else None
    try:
        collected = download(namespace.name, namespace.to, progress=bars)
    finally:
        if bars:
            bars.close()
    for file in collected:
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


class _Bars:
    """One bar at a time, for the file that grows."""

    def __init__(self) -> None:
        self.name = ""
        self.bar: Any = None

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if name != self.name:
            self.close()
            self.name = name
            self.bar = tqdm(desc=name, total=total, unit="B", unit_scale=True)
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
