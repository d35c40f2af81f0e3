"""What a machine needs: download, doctor."""

import json
import sys
from typing import Annotated

from cyclopts import Parameter

from gigapath.cli.arguments import EXIT_FAILED_SLIDES, Folder, Json, verb
from gigapath.doctor.options import VerifyOptions
from gigapath.releases import DOWNLOADS

_NAMES = "what to fetch:\n" + "\n".join(f"{name}: {entry.about}" for name, entry in DOWNLOADS.items())


@verb
def download(
    name: Annotated[str, Parameter(help=_NAMES, choices=tuple(DOWNLOADS), show_choices=False)],
    /,
    *,
    to: Folder | None = None,
) -> int:
    """Fetch the files, a bar for each on a terminal, and print a line for each when it is there.

    Args:
        to: the folder (default: the model hub's cache for a released pair, which HF_HOME moves; else data)
    """
    import huggingface_hub.utils

    from gigapath.hub import download

    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    for file in download(name, to):
        if file.missing:
            print(f"without {file.path.name}, which the rest can do without: {file.missing}")
            continue
        checked = f"{file.digest.partition(':')[0]} checked" if file.digest else "no digest is published to check it"
        was_there = ", was there already" if file.was_there else ""
        print(f"{file.path}  ({file.path.stat().st_size:,} bytes, {checked}{was_there})")
    if DOWNLOADS[name].note:
        print(DOWNLOADS[name].note)
    return 0


@verb
def doctor(*, offline: bool = False, as_json: Json = False, verify: bool = False, with_verify: VerifyOptions) -> int:
    """Print what was found; the status is 3 where something is wrong with the machine, 1 where a pair failed.

    Args:
        offline: do not ask the model hub
        verify: check a released pair instead: files, demo tile, slide encoder, PANDA tiles; a report to paste
    """
    if verify:
        return _verify(with_verify)
    if with_verify != VerifyOptions():
        raise ValueError("expected --verify beside the options of a released pair. Add it, or leave them out.")
    from gigapath.doctor.diagnose import diagnose

    found = []
    area = ""
    for finding in diagnose(offline=offline):
        found.append(finding)
        if as_json:
            continue
        if finding.area != area:
            area = finding.area
            print(area)
        print(f"  {'WRONG' if finding.wrong else finding.state:5} {finding.text}", flush=True)
        if finding.advice:
            print(f"        {finding.advice}")
    wrong = sum(finding.wrong for finding in found)
    if as_json:
        names = {"area": "area", "name": "name", "state": "state", "text": "text", "mend": "advice", "facts": "facts"}
        rows = [{key: getattr(finding, name) for key, name in names.items()} for finding in found]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print(f"{len(found)} checks, {wrong} failed.")
    return EXIT_FAILED_SLIDES if wrong else 0


def _verify(options: VerifyOptions) -> int:
    from gigapath.doctor.verify import STATUS, verify

    report = verify(
        options, after_check=lambda check: print(f"{STATUS[check.state]}: {check.name}: {check.text}", flush=True)
    )
    print(f"\n{report['table']}\n\nwritten to {options.out}")
    return 1 if report["verdict"] == "failed" else 0
