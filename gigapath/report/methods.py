"""The methods paragraph of a paper, from the status files and run records of an output folder, with BibTeX.

Everything stated comes from what was recorded beside the results; where slides differ, every value is stated with the
number of its slides.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gigapath.cohort.record import RUNS
from gigapath.cohort.status import Status, failures_by_kind, read_statuses
from gigapath.features.h5 import open_h5, read_attrs
from gigapath.preprocessing.reading import filter_name
from gigapath.releases import RELEASES
from gigapath.report.write import read_asset
from gigapath.text import slides_in_words

_TISSUE_RULES = {
    "otsu": "by Otsu's threshold [otsu1979threshold] on the stain of an overview at about 8 microns per pixel, from "
    "which transparent, pure black and pen-colored pixels were left out",
    "published": "by the published rule (pixels of mean luminance below Otsu's threshold [otsu1979threshold] over the "
    "lowest level)",
    "none": "by no rule: every whole tile was kept",
}
# Package as a run records it -> its name in the text, with the work to cite.
_SOFTWARE = {
    "gigapath": "gigapath [gigapath_open]",
    "openslide-library": "OpenSlide [goode2013openslide]",
    "torch": "PyTorch",
    "timm": "timm",
    "numpy": "NumPy",
    "opencv-python-headless": "OpenCV",
    "python": "Python",
}

# What a recorded error says -> the clause of it, the first that fits. A paper has no use for messages and remedies.
_REASONS = (
    ("dark background", "they were not brightfield (dark background)"),
    ("got grey pixels", "they held no color"),
    ("expected about", "their stated resolution contradicted their objective"),
    ("microns per pixel in the file, got none", "no resolution was stated"),
    ("microns per pixel for tiles", "they were scanned too coarsely"),
    ("microns per pixel", "their resolution did not fit"),
    ("mask", "their mask could not be used"),
    ("MD5", "their file had changed"),
    ("as when it was tiled", "their file had changed"),
    ("its tiles", "they had not been tiled"),
    ("of the name", "their file was missing"),
    ("decode", "their pixels could not be read"),
    ("expected", "their file could not be opened"),
)

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Methods:
    """What can be stated of an output folder.

    Attributes:
        paragraphs: of the methods section; works are cited as [key].
        cautions: what a reader must see plainly: stand-ins, random weights, mixed settings, unfinished slides.
        bibtex: the entries of the works that are cited.
    """

    paragraphs: list[str]
    cautions: list[str]
    bibtex: list[str]


def methods(folder: Path | str) -> Methods:
    """Write the methods of an output folder of `gigapath tile` or `gigapath embed`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it was made by a run.
    """
    folder = Path(folder)
    tiles = read_statuses(folder / "tiles")
    features = {path: read_statuses(path) for path in sorted(folder.glob("features_*")) if path.is_dir()}
    slides = {path: read_statuses(path) for path in sorted(folder.glob("slides_*")) if path.is_dir()}
    stages = [tiles, *features.values(), *slides.values()]
    if not any(stages):
        raise FileNotFoundError(
            f"{folder}: expected the output folder of gigapath tile or embed, found no status file."
        )
    records = _records(folder)
    cautions: list[str] = []
    facts = _tile_facts(tiles, features)
    every = [
        _cohort(stages, facts),
        _tiling(list(facts.values()), cautions),
        *(_tile_encoder(path, statuses, records, cautions) for path, statuses in features.items() if statuses),
        *(_slide_encoder(path, statuses, records, cautions) for path, statuses in slides.items() if statuses),
        _software(records, cautions),
    ]
    paragraphs = [text for text in dict.fromkeys(every) if text]  # two encoders without a slide encoder say so once
    warned = {slide_id: " ".join(fact.get("warnings") or ()) for slide_id, fact in facts.items()}
    for sentence, ids in failures_by_kind({slide_id: text for slide_id, text in warned.items() if text}).items():
        cautions.append(f"{slides_in_words(len(ids))} ({ids[0]}{', ...' * (len(ids) > 1)}): {sentence}")
    unfinished = {each.slide_id for stage in stages for each in stage.values() if each.status in ("stopped", "todo")}
    if unfinished:
        cautions.append(f"{slides_in_words(len(unfinished))} not finished: run it to the end.")
    version = max((str(record.get("versions", {}).get("gigapath", "")) for record in records), default="")
    return Methods(paragraphs, cautions, _cited(" ".join(paragraphs), version))


def _cited(text: str, version: str) -> list[str]:
    """The BibTeX entries whose [key] stands in the text."""
    entries = read_asset("citations.bib").strip().split("\n\n")
    keyed = {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
    return [entry.replace("VERSION", version) for key, entry in keyed.items() if f"[{key}]" in text]


def _records(folder: Path) -> list[dict[str, Any]]:
    """The run records that can be read, oldest first."""
    found = []
    for path in sorted((folder / RUNS).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # cut short or foreign: the results speak for themselves
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _tile_facts(
    tiles: Mapping[str, Status], features: Mapping[Path, Mapping[str, Status]]
) -> dict[str, dict[str, Any]]:
    """What was recorded of each slide's tiles: from their status, else (`--tiles` of another folder) from the file."""
    found: dict[str, dict[str, Any]] = {}
    for slide_id, status in tiles.items():
        if status.status == "done":
            counted = {"tiles": status.tiles, "warnings": status.warnings}
            found[slide_id] = {**status.identity, "target": status.identity.get("mpp"), **status.facts, **counted}
    if tiles:
        return found
    for folder, statuses in features.items():
        for slide_id, status in statuses.items():
            path = folder / f"{slide_id}.h5"
            if status.status == "done" and slide_id not in found and path.is_file():
                with open_h5(path) as file:
                    attrs = read_attrs(file)
                read, scale = attrs.get("read_size") or (None, None), attrs.get("mpp_level0") or (None, None)
                named = {"tissue": attrs.get("tissue_method"), "target": attrs.get("mpp_target")}
                sizes = {"read_width": read[0], "read_height": read[1], "mpp_x": scale[0], "mpp_y": scale[1]}
                found[slide_id] = {**attrs, **named, **sizes, "tiles": status.tiles}
    return found


def _cohort(stages: Sequence[Mapping[str, Status]], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """How many slides there were, of which scanners, which were left out and why."""
    latest: dict[str, Status] = {}
    for stage in stages:
        for slide_id, status in stage.items():
            if slide_id not in latest or latest[slide_id].finished:
                latest[slide_id] = status
    left_out: Counter[str] = Counter()
    for slide_id, status in latest.items():
        if any(stage[slide_id].status == "no_tissue" for stage in stages if slide_id in stage):
            left_out["no tissue was found"] += 1
        elif status.status == "failed":
            left_out[_reason(status)] += 1
    kept = [fact for slide_id, fact in facts.items() if latest[slide_id].status == "done"]
    text = f"We processed {slides_in_words(len(latest))}"
    vendors = _counted(kept, "vendor")
    if vendors and vendors[0][0] is not None:
        text += f" ({_listed(vendors, str)})"
    scale = [float(fact["mpp_x"]) for fact in kept if fact.get("mpp_x")]
    if scale:
        text += f" with a native resolution of {_range(scale)} microns per pixel"
        text += f" (from {_listed(_counted(kept, 'mpp_source'), str)})"
    text += "."
    if left_out:
        count = left_out.total()
        reasons = "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common())
        text += f" {slides_in_words(count)} {'was' if count == 1 else 'were'} excluded: {reasons}."
    counts = sorted(int(fact["tiles"]) for fact in kept)
    if counts:
        text += f" {slides_in_words(len(counts))} remained, with {sum(counts):,} tiles"
        spread = f" (median {median(counts):,.0f}, range {counts[0]:,} to {counts[-1]:,} a slide)"
        text += f"{spread if counts[1:] else ''}."
    return text


def _reason(status: Status) -> str:
    """A clause on why a slide failed; the message itself is in slides.csv."""
    return next((clause for part, clause in _REASONS if part in status.error), "they could not be processed")


def _tiling(rows: Rows, cautions: list[str]) -> str:
    """Size, resolution, resampling, tissue."""
    if not rows:
        return ""
    size = _stated(rows, "tile_size", "tile size", cautions, lambda v: f"{v} x {v}")
    target = _stated(rows, "target", "resolution", cautions, lambda v: f"{v:g}")
    text = f"Slides were cut into non-overlapping tiles of {size} pixels at {target} microns per pixel"
    real = [float(row["mpp"]) for row in rows if row.get("mpp")]
    text += f" (effective {_range(real)})" if real else ""
    text += ", on a grid anchored at the corner of the scanned area whose pitch is a whole number of level-0 pixels."
    filters = Counter(
        filter_name((int(row["read_width"]), int(row["read_height"])), int(row["tile_size"]))
        for row in rows
        if row.get("read_width") and row.get("read_height") and row.get("tile_size")
    )
    tolerance = _stated(rows, "mpp_tolerance", "mpp tolerance", cautions, _percent)
    if unscaled := filters.pop("none", 0):
        text += f" A level within {tolerance} of the target was read pixel for pixel ({slides_in_words(unscaled)})."
    words = {"cv2-area": "averaging over areas", "cv2-cubic": "cubic interpolation"}
    for name, count in filters.most_common():
        how = " and ".join(words.get(part, part) for part in name.split("+"))
        text += f" Tiles of {slides_in_words(count)} were resampled from another level by {how}."
    rule = _stated(rows, "tissue", "tissue rule", cautions, _tissue_rule)
    share = _stated(rows, "min_tissue", "share of tissue", cautions, _percent)
    text += f" Tissue was found {rule}"
    limits = [float(row["tissue_threshold"]) for row in rows if row.get("tissue_threshold") is not None]
    text += f" (threshold {_range(limits)} of 255)" if limits else ""
    everything = {row.get("tissue") for row in rows} == {"none"}
    text += "." if everything else f"; tiles with at least {share} tissue were kept."
    most = _counted(rows, "max_tiles")
    if most[0][0] is not None:
        text += f" At most {_listed(most, str)} tiles a slide were taken, spread evenly over its tissue."
    return text


def _tissue_rule(value: Any) -> str:
    digest = f" (SHA-256 {value[7:19]})" if str(value).startswith("sha256:") else ""
    return _TISSUE_RULES.get(value, f"from masks or annotations{digest}")


def _tile_encoder(folder: Path, statuses: Mapping[str, Status], records: Rows, cautions: list[str]) -> str:
    name = folder.name.removeprefix("features_")
    rows = [status.identity for status in statuses.values() if status.finished]
    text = f"Tiles were embedded with {_encoder('tile_encoder', name, records, rows, cautions)}"
    keys = ("transform", "precision", "device", "batch_size")
    steps, precision, device, batch = (_stated(rows, key, key.replace("_", " "), cautions, str) for key in keys)
    if name == "standin":
        cautions.append(
            "The tile encoder is a STAND-IN (EfficientNet-Lite0, ImageNet weights): these are no GigaPath embeddings."
        )
    return f"{text} (input: {steps}; {precision} on {device}, batches of {batch})."


def _slide_encoder(folder: Path, statuses: Mapping[str, Status], records: Rows, cautions: list[str]) -> str:
    name = folder.name.removeprefix("slides_").partition("__")[0]
    piece = "connected piece of tissue" if folder.name.endswith("__sections") else "slide"
    if name == "mean":
        return f"The embedding of a {piece} is the plain mean of its tile embeddings; no slide encoder was used."
    rows = [status.identity for status in statuses.values() if status.finished]
    precision = _stated(rows, "precision", "slide encoder's precision", cautions, str)
    return (
        f"Tile embeddings of each {piece} were encoded, in row-major order and with the tiles' grid cells as "
        f"positions, with {_encoder('slide_encoder', name, records, rows, cautions)}, a LongNet [ding2023longnet] "
        f"({precision}). The files hold every layer's output, pooled as the mean over tiles and as the class token: "
        "say which was used (the mean of the default output, unless another was named)."
    )


def _encoder(kind: str, name: str, records: Rows, rows: Rows, cautions: list[str]) -> str:
    """An encoder with its release and the digest of its weights, by the latest run that used it."""
    described = [(record.get("facts") or {}).get(kind) for record in records]
    about = next((each for each in reversed(described) if isinstance(each, dict) and each.get("name") == name), {})
    random, release = name.endswith("-random"), RELEASES.get(name.removesuffix("-random"))
    if random or about.get("trained") is False:
        cautions.append(f"The encoder {name} had RANDOM WEIGHTS: its embeddings mean nothing.")
    text = str(about.get("description") or name)
    if release is not None:
        text = f"{'Prov-GigaPath' if release.name == 'gigapath' else 'GigaPath-Flash'} [xu2024gigapath]"
        text += "" if random else f" ({release.repo}, revision {release.revision[:12]})"
    digests = _counted(rows, "weights_sha256")
    if len(digests) > 1:
        cautions.append(f"The weights of {name} are mixed: {_listed(digests, lambda v: str(v)[:12])}.")
    if digests and digests[0][0] is not None:
        text += f", weights SHA-256 {', '.join(str(value)[:16] for value, _ in digests)}"
    return text


def _software(records: Rows, cautions: list[str]) -> str:
    versions = [record["versions"] for record in records if isinstance(record.get("versions"), dict)]
    stated = []
    for package, name in _SOFTWARE.items():
        found = sorted({str(row[package]) for row in versions if package in row})
        if found:
            stated.append(f"{name} {' and '.join(found)}")
        if len(found) > 1 and package in ("gigapath", "openslide-library", "torch"):
            cautions.append(f"Runs used several versions of {package}: {', '.join(found)}.")
    return f"Software: {', '.join(stated)}." if versions else ""


def _stated(rows: Rows, key: str, what: str, cautions: list[str], word: Callable[[Any], str]) -> str:
    """A setting; where slides differ, all its values with the number of slides, and a caution."""
    counted = [(value, count) for value, count in _counted(rows, key) if value is not None]
    if not counted:
        return "an unrecorded value"
    text = _listed(counted, word)
    if len(counted) > 1:
        cautions.append(f"Slides differ in their {what}: {text}.")
    return text


def _counted(rows: Rows, key: str) -> list[tuple[Any, int]]:
    """Values with how many slides have them, the most frequent first; lists count as tuples."""
    values = (row.get(key) for row in rows)
    return Counter(tuple(value) if isinstance(value, list) else value for value in values).most_common()


def _listed(counted: Iterable[tuple[Any, int]], word: Callable[[Any], str]) -> str:
    texts = [("not stated" if value is None else word(value), count) for value, count in counted]
    if len(texts) == 1:
        return texts[0][0]
    return ", ".join(f"{text} ({slides_in_words(count)})" for text, count in texts)


def _percent(share: Any) -> str:
    return f"{100 * float(share):g} %"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}, median {median(values):.4g}"
