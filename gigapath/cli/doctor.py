"""`gigapath doctor`: what is wrong with this machine or installation, and the mend."""

import argparse
import dataclasses
import json

from gigapath.cli.arguments import add_json
from gigapath.cli.main import EXIT_FAILED_SLIDES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not ask the model hub")
    add_json(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print what was found; the status is 3 where something is wrong."""
    from gigapath.doctor import diagnose  # torch takes seconds

    found = []
    area = ""
    for diagnosis in diagnose(offline=namespace.offline):
        found.append(diagnosis)
        if namespace.json:
            continue
        if diagnosis.area != area:
            area = diagnosis.area
            print(area)
        mark = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}[diagnosis.state]
        print(f"  {mark} {diagnosis.text}", flush=True)
        if diagnosis.mend:
            print(f"        {diagnosis.mend}")
    wrong = sum(diagnosis.state == "wrong" for diagnosis in found)
    if namespace.json:
        print(json.dumps([dataclasses.asdict(diagnosis) for diagnosis in found], indent=2, ensure_ascii=False))
    else:
        print(f"{len(found)} things looked at, {wrong} wrong.")
    return EXIT_FAILED_SLIDES if wrong else 0
