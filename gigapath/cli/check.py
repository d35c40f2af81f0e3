"""`gigapath check PATH...`: what is wrong with feature files, ours and other tools', and what it would do."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from gigapath.cli.arguments import add_json, add_options, options_from
from gigapath.cli.main import EXIT_FAILED_SLIDES
from gigapath.cohort.reuse import mixed_options
from gigapath.cohort.status import read_statuses
from gigapath.embedding.options import CheckOptions
from gigapath.features.check import (
    FileReport,
    Report,
    as_json,
    check_file,
    check_folder,
    files_to_check,
    some,
)
from gigapath.findings import NOTE, Finding


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
    comparison = None
    if options.slides is not None:
        if not Path(options.slides).exists():
            raise FileNotFoundError(f"--slides: expected a folder, a slide or a manifest, got {options.slides!r}.")
        from gigapath.embedding.check_slides import SlideCheck  # torch, which nothing else of this verb needs

        comparison = SlideCheck(options)
    by_folder: dict[Path, list[FileReport]] = defaultdict(list)
    reports = []
    for path in files_to_check(namespace.paths):
        report = check_file(path, tile_size_level0=options.tile_size_level0)
        report.findings += [] if comparison is None else comparison.check(report)
        reports.append(report)
        by_folder[path.parent].append(report)
        if not namespace.json:
            _print_findings(str(path), report.findings)
    folders = []
    for folder, inside in by_folder.items():
        unmet = _check_statuses(folder, {report.path.name for report in inside})
        folders.append(Report(folder, check_folder(folder, inside) + unmet))
    wrong = sum(report.wrong for report in reports), sum(folder.wrong for folder in folders)
    if namespace.json:
        print(as_json(reports, folders))
    else:
        for together in folders:
            _print_findings(f"{together.path} (folder)", together.findings)
        found = [finding for report in reports for finding in report.findings]
        found += [finding for together in folders for finding in together.findings]
        print(_summary(len(reports), wrong, sum(not finding.wrong for finding in found)))
    return EXIT_FAILED_SLIDES if any(wrong) else 0


def _check_statuses(folder: Path, there: Collection[str]) -> list[Finding]:
    """What the status files of our runs promise, against the names of the files that are there."""
    findings = []
    statuses = read_statuses(folder)
    lost = [
        slide_id
        for slide_id, status in statuses.items()
        if status.status == "done"
        and f"{slide_id}.h5" not in there
        and not any(name.startswith(f"{slide_id}.section-") for name in there)
    ]
    if lost:
        text = f"{len(lost)} slides are done by their status, but their files are missing: {some(lost)}."
        findings.append(Finding("missing-file", text, "They take no part. Run the same command again."))
    mixed = mixed_options(statuses.values())
    if mixed:
        text = f"its results are of different options: {'; '.join(mixed)}."
        findings.append(Finding("mixed-options", text, "Make them alike with --overwrite, or keep a folder for each."))
    unsummed = [name for name, status in statuses.items() if status.finished and not status.sha256]
    unsummed = [f"{name}.h5" for name in unsummed if f"{name}.h5" in there]
    if unsummed:
        text = f"{len(unsummed)} of its files have no checksum: {some(unsummed)}."
        advice = "Bytes that change in them may not be noticed; what is made from now on has one."
        findings.append(Finding("no-checksum", text, advice, state=NOTE))
    open_ones = [f"{slide_id} ({status.status})" for slide_id, status in statuses.items() if not status.finished]
    if open_ones:
        text = f"{len(open_ones)} slides are not finished: {some(open_ones)}."
        findings.append(Finding("unfinished", text, "They take no part, or with an earlier run's numbers."))
    return findings


def _summary(files: int, wrong: tuple[int, int], notes: int) -> str:
    said = "1 file" if files == 1 else f"{files:,} files"
    found = "nothing wrong" if not any(wrong) else f"{wrong[0]:,} with something wrong"
    found += f", folders with something wrong: {wrong[1]:,}" if wrong[1] else ""
    return f"{said} checked: {found}" + (f"; notes: {notes:,}." if notes else ".")


def _print_findings(name: str, findings: list[Finding]) -> None:
    if not findings:
        return
    print(f"{name}:")
    for finding in findings:
        mark = "WRONG" if finding.wrong else "note"
        print(f"  {mark} {finding.name}: {' '.join([finding.text, finding.advice]).strip()}")
    sys.stdout.flush()
