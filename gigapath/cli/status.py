"""`gigapath status DIR`: how far a cohort is, from the status files alone."""

import argparse
import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path

from gigapath.cli.arguments import add_json
from gigapath.cohort.progress import StageProgress, read_progress
from gigapath.cohort.status import STATES, failure_lines
from gigapath.text import in_words, slides_in_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="DIR", help="the output folder of tile or embed")
    add_json(parser)


def run(namespace: argparse.Namespace) -> int:
    slides, stages = read_progress(Path(namespace.out))
    if namespace.json:
        print(json.dumps({"slides": slides, "stages": [dataclasses.asdict(stage) for stage in stages]}, indent=2))
        return 0
    print(f"{namespace.out}: {slides_in_words(slides)}")
    width = max(len(stage.folder) for stage in stages) if stages else 0
    titles = [state.replace("_", " ") for state in STATES]
    print(f"  {'':{width}}  " + "  ".join(f"{title:>9}" for title in [*titles, "tiles"]))
    for stage in stages:
        cells = [*(stage.counts[state] for state in STATES), stage.tiles]
        print(f"  {stage.folder:{width}}  " + "  ".join(f"{cell:>9,}" for cell in cells))
    for stage in stages:
        line = _pace(stage)
        if line:
            print(line)
    for stage in stages:
        for line in failure_lines(stage.failures):
            print(f"{stage.folder}: {line}")
    if any(stage.counts["failed"] for stage in stages):
        print("What failed is not counted as left: the same command tries it again, --only failed tries it alone.")
    return 0


def _pace(stage: StageProgress) -> str:
    if not stage.last:
        return ""
    when = datetime.fromtimestamp(stage.last, timezone.utc)
    line = f"{stage.folder}: last result {when:%Y-%m-%d %H:%M} UTC"
    if stage.slides_per_second:
        line += f"; {_rate(stage.slides_per_second * 60)} slides/min"
        if stage.folder != "tiles":
            line += f", {_rate(stage.tiles_per_second or 0)} tiles/s"
    if stage.left and stage.seconds_left is not None:
        tiles = "" if stage.folder == "tiles" else f" with about {stage.tiles_left:,} tiles"
        line += f"; {slides_in_words(stage.left)}{tiles} left: about {in_words(stage.seconds_left)}"
    return line + "."


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
