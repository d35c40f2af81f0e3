"""`gigapath check PATH...`: what is wrong with feature files, ours and other tools', and what it would do."""

import argparse
import sys
from pathlib import Path

from gigapath.check import CheckOptions, FileReport, Finding, check_paths
from gigapath.check.run import SlideChecker, as_json
from gigapath.cli.arguments import add_json, add_options, options_from
from gigapath.cli.main import EXIT_FAILED_SLIDES
from gigapath.tensors import read_tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="feature files, or folders of them with their subfolders: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, "
        "slide2vec's, the published",
    )
    add_json(parser)
    add_options(parser, CheckOptions)


def run(namespace: argparse.Namespace) -> int:
    """Print what was found; the status is 3 where something is wrong."""
    options = options_from(namespace, CheckOptions)
    checker: SlideChecker | None = None
    if options.slides is not None:
        if not Path(options.slides).exists():
            raise FileNotFoundError(f"--slides: expected a folder, a slide or a manifest, got {options.slides!r}.")
        from gigapath.check.slides import SlideCheck  # torch, which nothing else of this verb needs

        checker = SlideCheck(options)
    say = (lambda report: None) if namespace.json else _print_file
    reports, folders = check_paths(
        namespace.paths, options=options, read_tensor=read_tensor, check_slide=checker, after_file=say
    )
    wrong = sum(report.wrong for report in reports), sum(folder.wrong for folder in folders)
    if namespace.json:
        print(as_json(reports, folders))
    else:
        for folder in folders:
            _print_findings(f"{folder.path} (folder)", folder.findings)
        found = [finding for report in reports for finding in report.findings]
        found += [finding for folder in folders for finding in folder.findings]
        notes = sum(not finding.wrong for finding in found)
        print(_summary(len(reports), wrong, notes))
    return EXIT_FAILED_SLIDES if any(wrong) else 0


def _summary(files: int, wrong: tuple[int, int], notes: int) -> str:
    said = "1 file" if files == 1 else f"{files:,} files"
    found = "nothing wrong" if not any(wrong) else f"{wrong[0]:,} with something wrong"
    found += f", folders with something wrong: {wrong[1]:,}" if wrong[1] else ""
    return f"{said} checked: {found}" + (f"; notes: {notes:,}." if notes else ".")


def _print_file(report: FileReport) -> None:
    _print_findings(str(report.path), report.findings)


def _print_findings(name: str, findings: list[Finding]) -> None:
    if not findings:
        return
    print(f"{name}:")
    for finding in findings:
        mark = "WRONG" if finding.wrong else "note"
        print(f"  {mark} {finding.name}: {' '.join([finding.text, finding.advice]).strip()}")
    sys.stdout.flush()
