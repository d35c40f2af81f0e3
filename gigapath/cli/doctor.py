"""`gigapath doctor`: what is wrong with this machine or installation, and the mend."""

import argparse
import json
from typing import Any

from gigapath.cli.arguments import add_json
from gigapath.cli.main import EXIT_FAILED_SLIDES
from gigapath.findings import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not ask the model hub")
    add_json(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print what was found; the status is 3 where something is wrong."""
    from gigapath.doctor.diagnose import diagnose  # torch takes seconds

    found = []
    area = ""
    for finding in diagnose(offline=namespace.offline):
        found.append(finding)
        if namespace.json:
            continue
        if finding.area != area:
            area = finding.area
            print(area)
        print(f"  {'WRONG' if finding.wrong else finding.state:5} {finding.text}", flush=True)
        if finding.advice:
            print(f"        {finding.advice}")
    wrong = sum(finding.wrong for finding in found)
    if namespace.json:
        print(json.dumps([_plain(finding) for finding in found], indent=2, ensure_ascii=False))
    else:
        print(f"{len(found)} things looked at, {wrong} wrong.")
    return EXIT_FAILED_SLIDES if wrong else 0


def _plain(finding: Finding) -> dict[str, Any]:
    names = {"area": "area", "name": "name", "state": "state", "text": "text", "mend": "advice", "facts": "facts"}
    return {key: getattr(finding, name) for key, name in names.items()}
