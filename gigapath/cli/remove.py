"""`gigapath remove SLIDE_ID DIR`: everything of one slide leaves an output folder, for consent withdrawn."""

import argparse
import dataclasses
import json
from pathlib import Path

from gigapath.cli.arguments import add_json
from gigapath.cohort.removal import remove_slide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slide_id", metavar="SLIDE_ID", help="the slide, by its whole id")
    parser.add_argument("out", metavar="DIR", help="the output folder; no run may work on it meanwhile")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and change nothing")
    add_json(parser)


def run(namespace: argparse.Namespace) -> int:
    removed = remove_slide(Path(namespace.out), namespace.slide_id, dry_run=namespace.dry_run)
    if namespace.json:
        print(json.dumps(dataclasses.asdict(removed), indent=2, ensure_ascii=False))
    else:
        would = "would be " * namespace.dry_run
        for title, names in (
            (f"{would}removed", removed.files),
            (f"{would}taken out of", removed.edited),
            (f"{would}drawn anew", removed.redrawn),
            ("still named in, and left", removed.mentions),
        ):
            for name in names:
                print(f"{title}: {name}")
        if removed:
            print("Nothing outside was looked at: the slide itself, manifests, exported tables, fitted models.")
    if not removed:
        raise ValueError(f"{namespace.out}: it holds nothing of a slide {namespace.slide_id!r}. Give its whole id.")
    return 0
