"""The files of one folder together: one encoder, one kind of numbers, one slide a file, none missing."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigapath.check.contents import Contents
from gigapath.check.findings import FileReport, some
from gigapath.cohort.status import read_statuses
from gigapath.features.scale import tile_mpp, tile_pixels
from gigapath.features.tables import SAME_THROUGHOUT
from gigapath.files import PARTIAL_SUFFIX
from gigapath.findings import NOTE, Finding

# Effective scales of slides differ by the rounding of the pitch.
_SAME_SCALE = 0.02

_EFFECTS = {
    "encoder": "Their embeddings live in different spaces: nothing fitted on them together means anything.",
    "width": "They can't come from one encoder, and no reader puts them into one matrix.",
    "scale": "The encoder saw different magnifications: a model fitted on them learns the scale.",
    "tool": "Tools differ in filter, order and rounding: a model can learn which tool made a file.",
}
_OTHER = "A difference that follows site or date looks like a finding. Make them alike."


def compared(held: Contents) -> dict[str, Any]:
    """What must be equal throughout a folder, as one file says it; what it does not say is left out."""
    facts = {name: held.attrs[name] for name in SAME_THROUGHOUT if held.attrs.get(name) is not None}
    facts["tool"] = held.attrs.get("converted_from", held.tool)
    if held.encoder is not None:
        facts["encoder"] = held.encoder
    if held.features is not None and held.features.ndim == 2:
        facts["width"], facts["dtype"] = int(held.features.shape[1]), str(held.features.dtype)
    if held.kind in ("tile embeddings", "tiles"):
        pixels, mpp = tile_pixels(held.attrs, held.tool), tile_mpp(held.attrs)
        facts |= {} if pixels is None else {"tile_size": pixels}
        facts |= {} if mpp is None else {"scale": mpp}
    return facts


def check_folder(folder: Path, reports: Sequence[FileReport]) -> list[Finding]:
    """Compare the files of one folder.

    Args:
        folder: the folder.
        reports: one for each of its files.
    """
    findings = []
    by_kind: dict[str, list[FileReport]] = defaultdict(list)
    for report in reports:
        if report.kind:
            by_kind[report.kind].append(report)
    for alike in by_kind.values():
        findings += _check_mixed(alike)
        findings += _check_ids(alike)
    return findings + _check_complete(folder, reports)


def _check_mixed(reports: Sequence[FileReport]) -> list[Finding]:
    findings = []
    for name in sorted({name for report in reports for name in report.compared}):
        groups: dict[str, list[str]] = defaultdict(list)
        for report in reports:
            groups[_shown(name, report.compared.get(name), reports)].append(report.path.name)
        if len(groups) < 2:
            continue
        ordered = sorted(groups.items(), key=lambda item: len(item[1]))
        said = "; ".join(f"{value}: {some(sorted(files))}" for value, files in ordered)
        text = f"its files differ in {name} ({said})."
        findings.append(Finding(f"mixed-{name.replace('_', '-')}", text, _EFFECTS.get(name, _OTHER)))
    return findings


def _shown(name: str, value: Any, reports: Sequence[FileReport]) -> str:
    """A value as a word by which files are grouped; scales within the rounding of a pitch are one."""
    if name == "scale" and isinstance(value, float):
        known = sorted(report.compared["scale"] for report in reports if "scale" in report.compared)
        near = next(other for other in known if abs(other - value) <= _SAME_SCALE * value)
        return f"{near:.3g} microns a pixel"
    return "not stated" if value is None else str(value)[:40]


def _check_ids(reports: Sequence[FileReport]) -> list[Finding]:
    findings = []
    by_id: dict[str, list[FileReport]] = defaultdict(list)
    by_digest: dict[str, list[FileReport]] = defaultdict(list)
    for report in reports:
        by_id[report.slide_id].append(report)
        if report.digest:
            by_digest[report.digest].append(report)
    for slide_id, twins in by_id.items():
        if len(twins) > 1 and not all(_is_section(report) for report in twins):
            text = f"{len(twins)} files are of slide {slide_id!r}: {some([report.path.name for report in twins])}."
            findings.append(Finding("two-files", text, "It counts twice, and may fall into two sets of a split."))
    for twins in by_digest.values():
        ids = sorted({report.slide_id for report in twins})
        if len(ids) > 1:
            text = f"{some(ids)} hold the same embeddings."
            effect = "One slide under two ids: in two sets of a split it leaks, in one it counts twice."
            findings.append(Finding("equal-features", text, effect))
    return findings


def _is_section(report: FileReport) -> bool:
    return re.search(r"\.section-\d+\.h5$", report.path.name) is not None


def _check_complete(folder: Path, reports: Sequence[FileReport]) -> list[Finding]:
    """What the status files of our runs say, against the files that are there."""
    findings = []
    there = {report.path.name for report in reports}
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
    open_ones = [f"{slide_id} ({status.status})" for slide_id, status in statuses.items() if not status.finished]
    if open_ones:
        text = f"{len(open_ones)} slides are not finished: {some(open_ones)}."
        findings.append(Finding("unfinished", text, "They take no part, or with an earlier run's numbers."))
    left = sorted(path.name for path in folder.glob(f"*{PARTIAL_SUFFIX}"))
    if left:
        text = f"{len(left)} files are being written, or were left by a killed run: {some(left, 1)}."
        findings.append(Finding("left-over", text, "No reader takes them.", state=NOTE))
    return findings
