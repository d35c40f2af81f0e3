"""What is wrong with feature files, ours and other tools': each file by itself, then the files of a folder together.

A finding has a name that is the same in every release, and says what it does to the slide embedding.
"""

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.cells import all_facts, cells_of, nearest_cells, observed_step, row_major, tile_mpp, tile_pixels
from gigapath.features.data import CELL, FRAMES, GRID, STEP_OPTION, Array, Contents, FeatureFileError
from gigapath.features.folders import SUFFIXES, list_feature_files
from gigapath.features.h5 import DAMAGED, REMAKE_DAMAGED, as_number, as_pair, check_undamaged, is_damaged
from gigapath.features.other_tools import refused_inside
from gigapath.features.reading import read_contents
from gigapath.features.tables import SAME_THROUGHOUT
from gigapath.files import PARTIAL_SUFFIX
from gigapath.findings import NOTE, WRONG, Finding
from gigapath.releases import RELEASES, release_of

# Rows that are looked at at once, so that a check needs no second copy of a large array.
_ROWS = 4096
# Blank tiles of a slide with a constant background can be equal to the last bit; more of them than this share can't.
_DUPLICATES = 0.01
# Below this many tiles a column that stays the same says nothing; a few of them are the encoder's own dead units.
_FEW_TILES = 16
_DEAD_COLUMNS = 0.05
# Fewer gaps between columns and rows than this say nothing about the grid: a few tiles picked from it may all be far
# from each other.
_FEW_GAPS = 4

_MOVED = "The slide encoder gets these tiles at other places: its attention windows and positions are wrong."
# The released tile encoders were trained on these.
_TILE_SIZE = 256
_MPP = 0.5
# A tile of this much other scale is no longer what the encoder knows; scanners called "20x" lie within it.
_SCALE = 0.1
# A pitch is a whole number of pixels and mpp are stated with few digits: more than this is a contradiction.
_SAME = 0.02
# Magnifications are names, not measures: a "40x" scan has 0.2265 to 0.2628 microns a pixel.
_SAME_BY_POWER = 0.15
# Effective scales of slides differ by the rounding of the pitch.
_SAME_SCALE = 0.02

_EFFECTS = {
    "encoder": "Their embeddings live in different spaces: nothing fitted on them together means anything.",
    "width": "They can't come from one encoder, and no reader puts them into one matrix.",
    "scale": "The encoder saw different magnifications: a model fitted on them learns the scale.",
    "tool": "Tools differ in filter, order and rounding: a model can learn which tool made a file.",
}
_OTHER = "A difference that follows site or date looks like a finding. Make them alike."


@dataclass
class Report:
    """What was found about a file, or about the files of a folder together."""

    path: Path
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether something is wrong with it."""
        return any(finding.wrong for finding in self.findings)

    def add(self, name: str, text: str, effect: str = "", *, state: str = WRONG) -> None:
        """Add a finding."""
        self.findings.append(Finding(name, text, effect, state=state))


@dataclass
class FileReport(Report):
    """What was found about one file, with what its folder is compared by: `kind` as `Contents.kind` ("" where it could
    not be told), `compared` what must be equal throughout a folder, by name, `digest` equal where two files hold the
    same embeddings in any order ("" where there is nothing to compare)."""

    kind: str = ""
    tool: str = ""
    slide_id: str = ""
    tiles: int | None = None
    compared: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


def some(names: list[str], limit: int = 3) -> str:
    """The first of some names, and how many there are beside."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _share(marks: Any, total: int, what: str = "tiles") -> str:
    """A part of a whole, marked or counted, in words such as "3 of 40 tiles"."""
    return f"{int(np.sum(marks)):,} of {total:,} {what}"


# ---------------------------------------------------------------------------------------------------- files and folders


def files_to_check(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and every feature file below the folders that are named, each once; FileNotFoundError
    where a path doesn't exist, or a folder holds none."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder.")
        inside = list_feature_files(path) if path.is_dir() else [path]
        if not inside:
            known = refused_inside(path) or "none."
            raise FileNotFoundError(
                f"{path}: expected a folder with feature files ({', '.join(SUFFIXES)}), found {known}"
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def check_file(path: Path, *, tile_size_level0: float | None = None) -> FileReport:
    """Check one file; whatever is wrong with it is in the report. `tile_size_level0` is the distance between
    neighbouring tiles, where the file does not say."""
    report = FileReport(path)
    try:
        if not (path.is_file() and is_damaged(path)):
            return check_contents(read_contents(path, tile_size_level0=tile_size_level0))
        report.add("checksum", DAMAGED, f"Its numbers are wrong. {REMAKE_DAMAGED}")  # and whatever else is said of it
    except (ValueError, OSError) as error:
        report.add("unreadable", str(error).removeprefix(f"{path.name}: "), "Nothing can be taken from it.")
    return report


def check_contents(held: Contents) -> FileReport:
    """Check what a file holds."""
    report = FileReport(held.path, kind=held.kind, tool=held.tool, slide_id=held.slide_id, compared=compared(held))
    rows = held.features if held.features is not None else held.coords
    report.tiles = None if rows is None or not rows.shape else len(rows)
    if held.complete is False:
        text = "it was never finished: the mark `complete` is missing."
        report.add("incomplete", text, "Some of its tiles may be missing. Make it again.")
    named = held.attrs.get("name") if held.tool == "trident" else held.slide_id
    stem = held.path.name.removesuffix(held.path.suffix)
    if isinstance(named, str) and named != stem and not stem.startswith((f"{named}.section-", f"{named}.patch")):
        text = f"it says that it is of slide {named!r}."
        report.add("name", text, "A label that is joined by the file's name goes to the wrong slide.")
    if held.kind == "slide embeddings":
        _check_vectors(report, held)
    elif held.features is not None:
        _check_values(report, held.features)
    _check_places(report, held)
    _check_scale(report, held)
    return report


def as_json(reports: Sequence[FileReport], folders: Sequence[Report]) -> str:
    """Everything that was found, as one JSON document; paths are as they were given."""
    document: dict[str, Any] = {
        "files": [
            {
                "file": str(report.path),
                "kind": report.kind or None,
                "tool": report.tool or None,
                "slide_id": report.slide_id or None,
                "tiles": report.tiles,
                **_plain(report),
            }
            for report in reports
        ],
        "folders": [{"folder": str(folder.path), **_plain(folder)} for folder in folders],
        "files_wrong": sum(report.wrong for report in reports),
        "folders_wrong": sum(folder.wrong for folder in folders),
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _plain(report: Report) -> dict[str, Any]:
    findings = [
        {"name": finding.name, "wrong": finding.wrong, "text": finding.text, "effect": finding.advice}
        for finding in report.findings
    ]
    return {"wrong": report.wrong, "findings": findings}


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
        facts |= {"scale": mpp} if mpp is not None and mpp > 0 else {}
    return facts


def check_folder(folder: Path, reports: Sequence[FileReport]) -> list[Finding]:
    """Compare the files of one folder, of which there is a report each."""
    together = Report(folder)
    for kind in dict.fromkeys(report.kind for report in reports if report.kind):
        alike = [report for report in reports if report.kind == kind]
        _check_mixed(together, alike)
        _check_ids(together, alike)
    left = sorted(path.name for path in folder.glob(f"*{PARTIAL_SUFFIX}"))
    if left:
        text = f"{len(left)} files are being written, or were left by a killed run: {some(left, 1)}."
        together.add("left-over", text, "No reader takes them.", state=NOTE)
    return together.findings


def _check_mixed(folder: Report, reports: Sequence[FileReport]) -> None:
    for name in sorted({name for report in reports for name in report.compared}):
        groups: dict[str, list[str]] = defaultdict(list)
        for report in reports:
            groups[_shown(name, report.compared.get(name), reports)].append(report.path.name)
        if len(groups) > 1:
            ordered = sorted(groups.items(), key=lambda item: len(item[1]))
            values = "; ".join(f"{value}: {some(sorted(files))}" for value, files in ordered)
            effect = _EFFECTS.get(name, _OTHER)
            folder.add(f"mixed-{name.replace('_', '-')}", f"its files differ in {name} ({values}).", effect)


def _shown(name: str, value: Any, reports: Sequence[FileReport]) -> str:
    """A value as a word by which files are grouped; scales within the rounding of a pitch are one."""
    if name == "scale" and isinstance(value, float):
        known = sorted(report.compared["scale"] for report in reports if "scale" in report.compared)
        near = next(other for other in known if abs(other - value) <= _SAME_SCALE * value)
        return f"{near:.3g} microns a pixel"
    return "not stated" if value is None else str(value)[:40]


def _check_ids(folder: Report, reports: Sequence[FileReport]) -> None:
    by_id: dict[str, list[str]] = defaultdict(list)
    by_digest: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        by_id[report.slide_id].append(report.path.name)
        if report.digest:
            by_digest[report.digest].add(report.slide_id)
    for slide_id, names in by_id.items():
        if len(names) > 1 and not all(re.search(r"\.section-\d+\.h5$", name) for name in names):
            text = f"{len(names)} files are of slide {slide_id!r}: {some(names)}."
            folder.add("two-files", text, "It counts twice, and may fall into two sets of a split.")
    for ids in by_digest.values():
        if len(ids) > 1:
            effect = "One slide under two ids: in two sets of a split it leaks, in one it counts twice."
            folder.add("equal-features", f"{some(sorted(ids))} hold the same embeddings.", effect)


# ----------------------------------------------------------------------------------------------------------- embeddings


def _check_values(report: FileReport, features: Array) -> None:
    """Look at every embedding of a file."""
    if features.ndim != 2 or features.dtype.kind != "f":
        text = f"expected embeddings (N, D) of floats, got {features.shape} of {features.dtype}."
        return report.add("shapes", text, "No reader can take them for embeddings of tiles.")
    count = len(features)
    if count == 0:
        return report.add("no-tiles", "it has no tiles.", "The slide gets no embedding.", state=NOTE)
    rows: list[bytes] = []
    infinite, zero = np.zeros(count, bool), np.zeros(count, bool)
    varies = np.zeros(features.shape[1], bool)
    for start in range(0, count, _ROWS):
        block = np.ascontiguousarray(features[start : start + _ROWS])
        infinite[start : start + _ROWS] = ~np.isfinite(block).all(axis=1)
        zero[start : start + _ROWS] = ~block.any(axis=1)
        varies |= (block != features[0]).any(axis=0)
        rows += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in block]
    report.digest = hashlib.sha256(b"".join(sorted(rows))).hexdigest()
    if infinite.any():
        text = f"{_share(infinite, count)} have NaN or infinity in their embedding, the first in row "
        effect = "Attention carries one NaN to every tile: the slide embedding becomes NaN."
        report.add("not-finite", f"{text}{int(np.argmax(infinite))}.", effect)
    if zero.any():
        text = f"{_share(zero, count)} have an embedding of zeros alone, the first in row {int(np.argmax(zero))}."
        effect = "Such rows were reserved and never written; the slide embedding takes them for tissue."
        report.add("zero-rows", text, effect)
    distinct = len(set(rows))
    if distinct == 1 and count > 1:
        effect = (
            "The encoder saw nothing of the tiles (random weights with a small layer scale do this): the slide "
            "embedding says nothing about the slide."
        )
        return report.add("constant", f"all {count:,} tiles have the same embedding.", effect)
    if count > distinct:
        effect = "A batch written twice does this, and so do blank tiles: "
        effect += "the slide embedding counts one place several times."
        text = f"{_share(count - distinct, count)} repeat the embedding of another tile to the last bit."
        report.add("duplicated-rows", text, effect, state=WRONG if count - distinct > _DUPLICATES * count else NOTE)
    if np.sum(~varies) > _DEAD_COLUMNS * len(varies) and count >= _FEW_TILES:
        text = f"{_share(~varies, len(varies), 'columns')} have one value for all tiles."
        effect = "They add nothing to the slide embedding; an encoder that was cut off or padded does this."
        report.add("dead-columns", text, effect, state=NOTE)


def _check_vectors(report: FileReport, held: Contents) -> None:
    """A slide's file: each matrix finite, the states as many as the poolings say, one width."""
    if not held.vectors:
        return report.add("shapes", "it holds no embedding of the slide.", "There is nothing to use.")
    for name, value in held.vectors.items():
        if value.ndim != 2 or value.dtype.kind != "f" or 0 in value.shape:
            report.add("shapes", f"expected {name} (rows, D) of floats, got {value.shape}.")
        elif not np.isfinite(value).all():
            report.add("not-finite", f"its {name} holds NaN or infinity.", "Nothing can be fitted on it.")
        elif not value.any(axis=1).all():
            report.add("zero-rows", f"its {name} has rows of zeros alone.", "They were never written.")
    shapes = {name: value.shape for name, value in held.vectors.items() if name != "tile_mean"}
    states = {shape for name, shape in shapes.items() if name.startswith("states_")}
    if len(states) > 1 or len({shape[-1] for shape in shapes.values() if shape}) > 1:
        report.add("shapes", f"its states and its default output do not fit together: {shapes}.")
    first = held.vectors.get("tile_mean", next(iter(held.vectors.values())))
    report.digest = hashlib.sha256(np.ascontiguousarray(first).tobytes()).hexdigest()


# -------------------------------------------------------------------------------------------------- where the tiles lie


def _check_places(report: FileReport, held: Contents) -> None:
    """Look at every coordinate of a file."""
    coords = held.coords
    if coords is None:
        return
    if coords.ndim == 0 or (held.features is not None and held.features.ndim == 0):
        return report.add("shapes", "it holds single numbers where embeddings and coordinates should be.")
    count = len(coords) if held.features is None else len(held.features)
    unknown = "Which tile lies where can't be told."
    if coords.shape != (count, 2) or coords.dtype.kind not in "iuf":
        return report.add("shapes", f"expected coords {(count, 2)}, got {coords.shape} of {coords.dtype}.", unknown)
    if held.cells is not None and (held.cells.shape != coords.shape or held.cells.dtype.kind not in "iu"):
        text = f"expected whole cells {coords.shape}, got {held.cells.shape} of {held.cells.dtype}."
        return report.add("shapes", text, unknown)
    if count == 0:
        return
    places = coords.astype(np.float64)
    finite = np.isfinite(places).all(axis=1)
    if not finite.all():
        text = f"{_share(~finite, count)} have coordinates that are not finite, the first in row "
        effect = "They have no place: the slide encoder refuses the file."
        return report.add("coords-not-finite", f"{text}{int(np.argmin(finite))}.", effect)
    if coords.dtype == np.float16:
        text = "its coordinates are in half precision, which holds no odd pixel above 2048 and nothing above 65504."
        report.add("coords-type", text, "Tiles move by up to 16 pixels, and neighbours fall on one cell.")
    _check_inside(report, held, places)
    pitch = held.step
    if pitch is None and held.tool == "published":  # whose code divides by this
        pitch = float(CELL), float(CELL)
    if pitch is None:
        seen = observed_step(places)
        hint = "" if seen is None else f"; the closest lie {seen:g} apart"
        text = f"it does not say how far apart its tiles lie{hint}. State it with --tile-size-level0."
        return report.add("no-step", text, "Without it no tile has a cell.", state=NOTE)
    cells, off = nearest_cells(places, np.asarray(pitch))
    clam = held.tool == "clam"
    # A few tiles off the grid are those tiles' fault, many are the distance's; CLAM starts a grid at each contour.
    spaced = _wrong_spacing(held, places, pitch) if not off.any() or (off.mean() > 0.5 and not clam) else None
    if spaced is not None:
        report.add(*spaced)
    elif off.any():
        unit = FRAMES.get(held.frame, held.frame)
        text = f"{_share(off, len(off))} do not lie on one grid of {pitch[0]:g} x {pitch[1]:g} {unit} with the "
        text += "others (CLAM starts one at each contour)." if clam else "others."
        effect = "Each goes to the nearest cell: up to half a cell off, and two may meet in one."
        report.add("off-grid", text, effect, state=NOTE if clam else WRONG)
    _check_cells(report, held, places, pitch, cells)
    fractions = held.tissue_fraction
    if fractions is not None and (fractions.shape != (count,) or (fractions < 0).any() or (fractions > 1).any()):
        report.add("tissue-fraction", "its tissue fractions are not one number of 0 to 1 a tile.")


def _check_inside(report: FileReport, held: Contents, places: Array) -> None:
    facts = all_facts(held.attrs)
    size = facts.get("slide_size") or (facts.get("level0_width"), facts.get("level0_height"))
    negative = (places < 0).any(axis=1)
    if negative.any():
        row = int(np.argmax(negative))
        text = f"{_share(negative, len(places))} lie left of or above the slide, the first in row {row} at "
        return report.add("outside-slide", f"{text}{places[row].tolist()}.", _MOVED)
    known = isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int | float) for side in size)
    if held.frame != "level0" or not known:
        return
    # Our tiles lie inside whole; other tools let the last ones hang over.
    room = np.asarray(held.step if held.tool == "gigapath" and held.step else (1, 1), dtype=np.float64)
    beyond = (places + room > np.asarray(size, dtype=np.float64)).any(axis=1)
    if beyond.any():
        row = int(np.argmax(beyond))
        swapped = not (places[:, ::-1] + room > np.asarray(size, dtype=np.float64)).any()
        hint = " With x and y exchanged all would lie inside." if swapped else ""
        text = (
            f"{_share(beyond, len(places))} lie beyond the slide of {size[0]:g} x {size[1]:g} pixels, the first in row "
            f"{row} at {places[row].tolist()}.{hint}"
        )
        report.add("outside-slide", text, _MOVED)


def _wrong_spacing(held: Contents, places: Array, pitch: tuple[float, float]) -> tuple[str, str, str] | None:
    """The finding where tiles lie at another distance than the file, or the tool that would read it, takes them to."""
    gaps = [np.diff(np.unique(places[:, axis])) for axis in (0, 1)]
    both = np.concatenate([gap[gap > 1] / pitch[axis] for axis, gap in enumerate(gaps)])  # less is rounding
    if len(both) < _FEW_GAPS:
        return None
    cells = np.rint(both)
    if (np.abs(both - cells) < 0.02).all() and (cells >= 1).all():
        apart = float(np.gcd.reduce(cells.astype(np.int64)))
    else:
        apart = float(both.min())
    if abs(apart - 1) < 0.02:
        return None
    seen = f"its closest tiles lie {apart * pitch[0]:g} apart, taken as {pitch[0]:g}"
    if apart < 1.5:
        text = f"{seen}: its tiles {'overlap' if apart < 1 else 'leave gaps'}, or the distance is wrong."
        return "pitch", text, "Neighbours share a cell or skip one: positions drift by a cell every few tiles."
    power = "" if held.frame == "um" else f"level 0 of a {20 * apart:g}x slide used with tile size {pitch[0]:g}"
    looks = f"coordinates look like {power}: " if power and held.step is None else f"{seen}: "
    number = {2.0: "two", 3.0: "three", 4.0: "four"}.get(apart, f"{apart:.3g}")
    effect = (
        "The slide encoder takes neighbours for strangers: on random weights the cosine with the right embedding was "
        "0.58 at two cells. State the distance with --tile-size-level0, or convert the file."
    )
    return "neighbours", f"{looks}neighbours are {number} cells apart.", effect


def _check_cells(report: FileReport, held: Contents, places: Array, pitch: tuple[float, float], cells: Array) -> None:
    count = len(places)
    if held.cells is not None:
        stored = held.cells.astype(np.int64)
        moved = (stored - stored[0] != np.rint((places - places[0]) / pitch)).any(axis=1)
        if moved.any():
            text = f"{_share(moved, count)} have a cell that is not where their coordinates lie."
            report.add("cells", text, _MOVED)
        cells = held.cells.astype(np.float64)
    if np.abs(cells).max() >= 2**31:
        return report.add("beyond-grid", "its coordinates are absurdly far out.", "No cell is that far.")
    whole = cells.astype(np.int64)
    unique = len(np.unique(whole, axis=0))
    if unique < count:
        text = f"{_share(count - unique, count)} share a cell with another one at a step of {pitch[0]:g}."
        effect = "Two tiles of one position: the slide encoder can't tell them apart, and readers refuse the file."
        report.add("cells-shared", text, effect)
    low, high = int(whole.min()), int(whole.max())
    if low < -1 or high >= GRID:
        text = f"its cells run from {low} to {high}, beyond the slide encoder's 0 to {GRID - 1}."
        report.add("beyond-grid", text, "The slide encoder refuses it; the published one wraps around.")
    if unique == count and row_major(whole) is not None:
        stored_by = "neither by row nor by column" if row_major(whole[:, ::-1]) is not None else "column by column"
        ours = held.tool == "gigapath"
        effect = "The slide encoder was trained row by row, and its result depends on the order. "
        effect += "Our readers refuse such a file." if ours else "Ours sorts the tiles first; other readers do not."
        report.add("order", f"its tiles are stored {stored_by}.", effect, state=WRONG if ours else NOTE)


# ------------------------------------------------------------------------------------------------------- size and scale


def _check_scale(report: FileReport, held: Contents) -> None:
    """Look at what a file says of its encoder, its tiles' size, their scale and their distance."""
    if held.kind == "slide embeddings" and held.attrs.get("trained") is False:
        text = "the slide encoder's weights are random: its vectors mean nothing."
        report.add("untrained", text, "They are for trying things.", state=NOTE)
    elif held.kind in ("tile embeddings", "tiles"):
        if held.kind == "tile embeddings":
            _check_encoder(report, held)
        _check_distance(report, held)


def _check_encoder(report: FileReport, held: Contents) -> None:
    if held.encoder is None:
        effect = "GigaPath, UNI2-h and H-optimus are all 1536 wide: of another one the slide encoder makes noise."
        return report.add("no-encoder", "it does not name its tile encoder.", effect, state=NOTE)
    if held.attrs.get("trained") is False:
        text = f"its tile encoder {held.encoder} has random weights."
        report.add("untrained", text, "The embeddings are for trying things.", state=NOTE)
    release = RELEASES.get(release_of(held.encoder.removesuffix("-random")))
    if release is None:
        return
    width = None if held.features is None or held.features.ndim != 2 else held.features.shape[1]
    if width not in (None, release.tile_dim):
        text = f"it names {held.encoder}, whose embeddings have {release.tile_dim} values; these have {width}."
        report.add("width", text, "They are another encoder's: the slide encoder refuses them.")
    pixels, mpp = tile_pixels(held.attrs, held.tool), tile_mpp(held.attrs)
    power = _positive(all_facts(held.attrs).get("target_magnification"))
    if mpp is None and power is not None:  # the magnification is all the file says
        mpp = 10 / power
    if pixels is not None and pixels != _TILE_SIZE:
        text = f"its tiles are {pixels} pixels wide, where {held.encoder} was trained on {_TILE_SIZE}."
        effect = "Each embedding sees another piece of tissue than in training, and neighbours lie at another distance."
        report.add("tile-size", text, effect)
    if mpp is not None and abs(mpp - _MPP) > _SCALE * _MPP:
        text = f"its tiles have {mpp:.4g} microns a pixel, where {held.encoder} was trained on {_MPP}."
        effect = "Cells look larger or smaller than in training: the embeddings drift, and so does the slide embedding."
        report.add("mpp", text, effect)


def _check_distance(report: FileReport, held: Contents) -> None:
    """Whether the pitch is what tile size and scale make of it."""
    facts, pixels, mpp = all_facts(held.attrs), tile_pixels(held.attrs, held.tool), tile_mpp(held.attrs)
    if held.step is None or held.frame != "level0" or pixels is None:
        return
    level0 = as_pair(facts.get("mpp_level0")) or as_pair(facts.get("native_mpp"))
    source, target = (_positive(facts.get(f"{name}_magnification")) for name in ("level0", "target"))
    tolerance = _SAME
    if mpp is not None and level0 is not None:
        expected = pixels * mpp / np.asarray(level0)
        by = f"{pixels} pixels of {mpp:.4g} microns on a slide of {float(np.mean(level0)):.4g}"
    elif source is not None and target is not None:
        expected, tolerance = np.full(2, pixels * source / target), _SAME_BY_POWER
        by = f"{pixels} pixels at {target:g}x on a slide of {source:g}x"
    else:
        return
    step = np.asarray(held.step)
    if np.isfinite(expected).all() and not (np.abs(step - expected) <= tolerance * expected).all():
        text = f"its tiles lie {step[0]:g} level-0 pixels apart, where {by} make {expected[0]:.4g}."
        effect = "Tiles overlap or leave gaps, or the scale is wrong: "
        effect += "the encoder saw another magnification than is stated."
        report.add("distance", text, effect)


def _positive(value: Any) -> float | None:
    number = as_number(value)
    return number if number is not None and number > 0 else None


# ------------------------------------------------------------------------------------------------- what a file is

_TOOLS = {
    **{"trident": "TRIDENT", "clam": "CLAM", "mussel": "Mussel", "stamp": "STAMP"},
    "published": "the published fine-tuning code (or another tool that writes no attributes)",
    "unknown": "an unknown tool",
}

# Findings that leave nothing to describe.
_NOT_DESCRIBED = ("shapes", "coords-not-finite", "not-finite", "incomplete")
# Findings that bear on what the file is; whether its numbers are right is asked of `gigapath check`.
_DESCRIBED_FAULTS = (
    *("no-encoder", "untrained", "no-tiles", "no-step", "off-grid", "pitch", "neighbours", "cells-shared"),
    *("cells", "outside-slide", "beyond-grid"),
)


def describe(path: Path | str, *, tile_size_level0: float | None = None) -> dict[str, Any]:
    """Say what a feature file, ours or another tool's, is, as plain JSON values.

    `file`, `kind` (as `Contents.kind`), `tool`, `slide_id`, `complete` (None where the tool has no such mark),
    `warnings`, `attrs`; for tiles `tiles`, `frame`, `step`, `columns`, `rows`, `order`, `mpp`; for embeddings `width`,
    `dtype`, `encoder`, `precision`, `numerics_version`, `weights_sha256`, and for slides `embeddings` and `trained`.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: a file that can't be read, or one that holds none of these.
    """
    path = Path(path)
    check_undamaged(path)
    held = read_contents(path, tile_size_level0=tile_size_level0)
    findings = check_contents(held).findings
    for finding in findings:
        if finding.name in _NOT_DESCRIBED:
            raise FeatureFileError(f"{path.name}: {finding.text}")
    attrs = held.attrs
    version = attrs.get("package_version") or attrs.get("stamp_version")
    found: dict[str, Any] = {
        "file": path.name,
        "kind": held.kind,
        "tool": held.tool,
        "tool_version": None if version is None else str(version),
        "slide_id": held.slide_id,
        "numerics_version": attrs.get("numerics_version"),
    }
    if held.coords is not None:
        found |= {"tiles": len(held.coords), "mpp": tile_mpp(attrs), **_grid_facts(held)}
    vectors = held.features
    if held.vectors:
        found |= {"mpp": as_number(attrs.get("mpp")), "slide_encoder": held.slide_encoder}
        found |= {"embeddings": _names(held), "trained": attrs.get("trained")}
        vectors = held.vectors.get("default_mean", held.vectors.get("default_class", next(iter(held.vectors.values()))))
    if vectors is not None:
        found |= {"tiles": len(vectors)} if held.kind == "vectors" else {}
        found |= {"width": int(vectors.shape[1]), "dtype": str(vectors.dtype), "encoder": held.encoder}
        found |= {name: attrs.get(name) for name in ("weights_sha256", "precision")}
    warnings = [finding.text for finding in findings if finding.name in _DESCRIBED_FAULTS]
    if held.tool == "published" and held.step is None:  # whose readers take 256 for granted
        warnings.append(f"it does not say how far apart its tiles lie. State it with {STEP_OPTION}.")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(attrs.items())}
    return {**found, "complete": held.complete, "warnings": warnings, "attrs": plain}


def _names(held: Contents) -> list[str]:
    """The slide embeddings of a file, by the names that `read_slides` takes; another tool's by its dataset's."""
    names = ["tile-mean"] if "tile_mean" in held.vectors else []
    for pooling in ("mean", "class"):
        states = held.vectors.get(f"states_{pooling}")
        names += [f"default:{pooling}"] if f"default_{pooling}" in held.vectors else []
        names += [] if states is None else [f"state:0:{pooling} to state:{len(states) - 1}:{pooling}"]
    return names or list(held.vectors)


def _grid_facts(held: Contents) -> dict[str, Any]:
    coords, cells = held.coords, held.cells
    assert coords is not None
    if cells is None and held.step is not None:
        with contextlib.suppress(FeatureFileError):  # which the warnings say
            cells = cells_of(coords, held.step, who=held.path.name)
    spans: dict[str, Any] = {"columns": None, "rows": None, "order": None}
    if cells is not None and len(cells):
        low, high = cells.min(axis=0).tolist(), cells.max(axis=0).tolist()
        by_row, by_column = row_major(cells) is None, row_major(cells[:, ::-1]) is None
        order = "row-major" if by_row else "column-major" if by_column else "neither by row nor by column"
        spans = {"columns": [low[0], high[0]], "rows": [low[1], high[1]], "order": order}
    step = None if held.step is None else float(np.mean(held.step))
    return {"frame": held.frame, "unit": FRAMES[held.frame], "step": step, "closest": observed_step(coords), **spans}


def description_in_words(description: dict[str, Any]) -> list[str]:
    """A description as sentences, one a line."""
    known = {name: value for name, value in description.items() if value is not None}
    version = f" {known['tool_version']}" if "tool_version" in known else ""
    tool = f"{_TOOLS.get(known['tool'], known['tool'])}{version}"
    sizes = [f"{known['tiles']:,} tiles"] if "tiles" in known else []
    encoders, places, cells = [], [], []
    if "dtype" in known:
        sizes += [f"{known['width']} values each, {known['dtype']}"]
        encoders = [f"tile encoder: {known.get('encoder', 'not stated')}"]
        if "weights_sha256" in known:
            encoders.append(f"weights sha256 {str(known['weights_sha256'])[:12]}")
        if "slide_encoder" in known:
            trained = {True: "trained", False: "untrained"}.get(known.get("trained", ""), "not said whether trained")
            name = f"{known['slide_encoder']}, {trained}"
            encoders.append(f"slide encoder: {'none, the mean of the tiles' if name.startswith('mean,') else name}")
        encoders.append(f"precision {known.get('precision', 'not stated')}")
    if "frame" in known:
        step = f"tiles {known['step']:g} apart" if "step" in known else "how far apart the tiles lie is not stated"
        places = [f"{known['mpp']:g} microns per pixel"] if "mpp" in known else []
        places.append(f"coordinates in {known['unit']}, {step}")
    if "columns" in known:
        (left, right), (top, bottom) = known["columns"], known["rows"]
        cells = [f"columns {left} to {right}, rows {top} to {bottom}", f"stored in {known['order']} order"]
    vectors = [f"embeddings: {', '.join(known['embeddings'])}"] if "embeddings" in known else []
    state = [f"numerics version {known['numerics_version']}"] if "numerics_version" in known else []
    state.append("complete" if known.get("complete") else "no mark of completeness")
    sentences = ["; ".join(parts) for parts in (sizes, encoders, places, cells, vectors, state) if parts]
    return [
        f"{known['file']}: {known['kind']} of slide {known['slide_id']}, written by {tool}.",
        *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences),
        *(f"Warning: {warning}" for warning in known["warnings"]),
    ]
