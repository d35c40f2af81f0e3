"""Feature files, ours and other tools': check, convert."""

import json
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gigapath.cli.arguments import EXIT_FAILED_SLIDES, Features, Folder, Json, verb
from gigapath.cohort.stage import mixed_options
from gigapath.cohort.status import left_out, read_statuses
from gigapath.embedding.options import CheckOptions
from gigapath.features import export_table, read_features
from gigapath.features.check import (
    FileReport,
    Report,
    check_file,
    check_folder,
    description_in_words,
    files_to_check,
    some,
)
from gigapath.features.check import as_json as reports_as_json
from gigapath.features.check import describe as describe_file
from gigapath.features.folders import find_feature_files
from gigapath.features.other_tools import FORMATS, Scale
from gigapath.features.other_tools import convert as convert_file
from gigapath.features.tables import TABLE_FORMATS, find_slide_folder
from gigapath.findings import NOTE, Finding
from gigapath.options import Options, PitchOptions, option, to_dict
from gigapath.text import slides_in_words


@verb
def check(features: Features = (), /, *, describe: bool = False, as_json: Json = False, files: CheckOptions) -> int:
    """Print what was found; the status is 3 where something is wrong.

    Args:
        describe: say what each file is, and look for no faults
    """
    if files.slide_embeddings:
        from gigapath.embedding.referee import compare_files, in_words  # torch

        verdicts = compare_files(files)
        print(json.dumps(verdicts) if as_json else "\n".join(in_words(verdicts)))
        return EXIT_FAILED_SLIDES if any(tool["none_of_these"] for tool in verdicts["tools"]) else 0
    if not features:
        raise ValueError("expected FEATURES, files or folders of tile embeddings, or --slide-embeddings, got neither.")
    if describe:
        return _describe(features, as_json, files.tile_size_level0)
    comparison = None
    if files.slides is not None:
        if not Path(files.slides).exists():
            raise FileNotFoundError(f"--slides: expected a folder, a slide or a manifest, got {files.slides!r}.")
        from gigapath.embedding.referee import SlideCheck  # torch, which nothing else of this verb needs

        comparison = SlideCheck(files)
    by_folder: dict[Path, list[FileReport]] = defaultdict(list)
    reports = []
    for path in files_to_check(features):
        report = check_file(path, tile_size_level0=files.tile_size_level0)
        report.findings += [] if comparison is None else comparison.check(report)
        reports.append(report)
        by_folder[path.parent].append(report)
        if not as_json:
            _print_findings(str(path), report.findings)
    folders = []
    for folder, inside in by_folder.items():
        folders.append(Report(folder, check_folder(folder, inside)))
        _check_statuses(folders[-1], {report.path.name for report in inside})
    wrong = sum(report.wrong for report in reports), sum(folder.wrong for folder in folders)
    if as_json:
        print(reports_as_json(reports, folders))
    else:
        for together in folders:
            _print_findings(f"{together.path} (folder)", together.findings)
        found = [finding for report in reports for finding in report.findings]
        found += [finding for folder in folders for finding in folder.findings]
        notes = sum(not finding.wrong for finding in found)
        checked = "1 file" if len(reports) == 1 else f"{len(reports):,} files"
        outcome = "nothing wrong" if not any(wrong) else f"{wrong[0]:,} with something wrong"
        outcome += f", folders with something wrong: {wrong[1]:,}" if wrong[1] else ""
        print(f"{checked} checked: {outcome}" + (f"; notes: {notes:,}." if notes else "."))
    return EXIT_FAILED_SLIDES if any(wrong) else 0


def _check_statuses(folder: Report, there: Collection[str]) -> None:
    """What the status files of our runs promise, against the names of the files that are there."""
    statuses = read_statuses(folder.path)
    lost = [
        slide_id
        for slide_id, status in statuses.items()
        if status.status == "done"
        and f"{slide_id}.h5" not in there
        and not any(name.startswith(f"{slide_id}.section-") for name in there)
    ]
    if lost:
        text = f"{len(lost)} slides are done by their status, but their files are missing: {some(lost)}."
        folder.add("missing-file", text, "They take no part. Run the same command again.")
    mixed = mixed_options(statuses.values())
    if mixed:
        text = f"its results are of different options: {'; '.join(mixed)}."
        folder.add("mixed-options", text, "Make them alike with --overwrite, or keep a folder for each.")
    unsummed = [name for name, status in statuses.items() if status.finished and not status.sha256]
    unsummed = [f"{name}.h5" for name in unsummed if f"{name}.h5" in there]
    if unsummed:
        text = f"{len(unsummed)} of its files have no checksum: {some(unsummed)}."
        advice = "Bytes that change in them may not be noticed; what is made from now on has one."
        folder.add("no-checksum", text, advice, state=NOTE)
    refused = [slide_id for slide_id, status in statuses.items() if status.refused]
    if refused:
        text = f"{len(refused)} slides were refused, as no stained brightfield slides: {some(refused)}."
        folder.add("refused", text, "They take no part.", state=NOTE)
    open_ones = [
        f"{slide_id} ({status.status})"
        for slide_id, status in statuses.items()
        if not (status.finished or status.refused)
    ]
    if open_ones:
        text = f"{len(open_ones)} slides are not finished: {some(open_ones)}."
        folder.add("unfinished", text, "They take no part, or with an earlier run's numbers.")


def _print_findings(name: str, findings: list[Finding]) -> None:
    if not findings:
        return
    print(f"{name}:")
    for finding in findings:
        mark = "WRONG" if finding.wrong else "note"
        print(f"  {mark} {finding.name}: {' '.join([finding.text, finding.advice]).strip()}")
    sys.stdout.flush()


def _describe(names: tuple[str, ...], as_json: bool, tile_size_level0: float | None) -> int:
    """Print what each file is; a file that can't be read is named on stderr, the others go on, and the status is 1."""
    status = 0
    for name in names:
        path = Path(name)
        try:
            if path.is_dir():
                raise ValueError(f"{name}: expected a feature file, got a folder. Name its files: {path}/*.h5.")
            found = describe_file(path, tile_size_level0=tile_size_level0)
        except (ValueError, OSError) as error:
            print(f"gigapath check: {error}", file=sys.stderr)
            status = 1
            continue
        if as_json:
            print(json.dumps(found, ensure_ascii=False))
        elif len(names) == 1:
            print("\n".join(description_in_words(found)))
        else:  # by their paths: folders of several tools hold files of one name
            print("\n".join(description_in_words({**found, "file": name})) + "\n" * (name != names[-1]))
    return status


@dataclass(frozen=True)
class ConvertOptions(PitchOptions):
    """What converting to another tool's files takes beside what the files say."""

    coordinates: str | None = option(
        None,
        "the folder of CLAM's or slide2vec's coordinates, where they lie in files of their own elsewhere",
        metavar="DIR",
    )
    slide_mpp: float | None = option(None, "microns per level-0 pixel of the slides", metavar="MPP", above=0)
    coords_mpp: float | None = option(
        None,
        "microns per pixel of the level that the coordinates of published files count in (0.5)",
        metavar="MPP",
        above=0,
    )


@dataclass(frozen=True)
class TableOptions(Options):
    """What a table of slide vectors holds."""

    embedding: str = option(
        "default",
        "default, state:I, last-state or all-states, each with :mean or :class (default :mean); tile-mean; the name of "
        "another tool, such as trident",
        metavar="NAME",
    )
    allow_mixed: bool = option(False, "take slides of different numerics together")


def _check_target(_: type, to: str) -> None:
    if to not in FORMATS and Path(to).suffix not in TABLE_FORMATS:
        raise ValueError(f"expected one of {', '.join(FORMATS)}, or a file ending in {', '.join(TABLE_FORMATS)}.")


@verb
def convert(
    results: Annotated[
        tuple[str, ...],
        Parameter(name="FEATURES", help="files or folders of tile embeddings; for a table, the output folder of a run"),
    ],
    /,
    *,
    to: Annotated[str, Parameter(metavar="TOOL|FILE", validator=_check_target)],
    out: Folder | None = None,
    overwrite: bool = False,
    files: ConvertOptions,
    table: TableOptions,
) -> int:
    """Convert each file, or write one table; a file that fails is named on stderr and the others go on.

    Args:
        to: whose files to write: gigapath (ours), trident, clam, stamp, slide2vec or published; or the table to write,
            a file ending in .parquet, .csv or .npz
        out: the folder that takes the tool's own folders
        overwrite: write over files of other content, or a table of another embedding or of other vectors
    """
    if to not in FORMATS:
        if len(results) > 1 or out or files != ConvertOptions():
            raise ValueError(f"--to {to}: expected one folder of slide vectors and no options of files, for a table.")
        return _write_table(results[0], to, table, overwrite)
    if out is None or table != TableOptions():
        raise ValueError(f"--to {to}: expected --out DIR and no options of tables, for files of tile embeddings.")
    if files.coordinates is not None and not Path(files.coordinates).exists():
        raise FileNotFoundError(f"--coordinates: expected a folder, got {files.coordinates!r}.")
    scale = Scale(files.slide_mpp, files.coords_mpp)
    paths = find_feature_files(results)
    failed, kept, done = 0, 0, set[str]()
    for path in paths:
        try:
            found = read_features(path, tile_size_level0=files.tile_size_level0, coordinates=files.coordinates)
            if found.slide_id in done:
                raise ValueError(f"{path}: a second file of slide {found.slide_id!r}. Convert it into another folder.")
            written, there = convert_file(found, to, out, scale=scale, overwrite=overwrite)
        except (ValueError, FileNotFoundError) as error:
            print(f"gigapath convert: {error}", file=sys.stderr)
            failed += 1
            continue
        done.add(found.slide_id)
        kept += there
        print(f"{path.name}: {len(found):,} tiles, {found.source} to {to}: {written[0]}{', there already' * there}")
    already = f", {kept} were there already" if kept else ""
    print(f"{len(paths) - failed - kept} of {len(paths)} files converted{already}.")
    return EXIT_FAILED_SLIDES if failed else 0


def _write_table(folder: str, to: str, table: TableOptions, overwrite: bool) -> int:
    """Write the table and say what is in it."""
    slides, width = export_table(folder, to, overwrite=overwrite, **to_dict(table))
    print(f"{slides_in_words(slides)}, {width} values each ({table.embedding}), written to {to}.")
    if missing := left_out(find_slide_folder(folder).resolve()):
        are = "has" if missing == 1 else "have"
        print(
            f"{slides_in_words(missing)} of the run {are} no whole result and {are} been left out; see gigapath status."
        )
    return 0
