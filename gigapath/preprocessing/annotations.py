"""Outlines drawn in QuPath or found by TRIDENT (GeoJSON), and which pixels of a mask they hold.

Coordinates in the file are level-0 pixels (x, y). A pixel belongs to an outline that holds its centre.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers in words pack to a tenth; what packs to a hundredth is none of ours.
_MOST_PACKED = 100
_MOST_UNPACKED = 64 << 20

CROSSINGS = 1 << 18  # of outlines and rows, worked on at once

BoolImage = NDArray[np.bool_]
Ring = NDArray[np.float64]


@dataclass(frozen=True)
class Outline:
    """One closed area.

    Attributes:
        rings: (n, 2) level-0 (x, y) each; the first is the border, the others are holes.
        name: the class that was given to it, "" for none.
    """

    rings: tuple[Ring, ...]
    name: str


def read_outlines(path: Path) -> list[Outline]:
    """All areas of a GeoJSON file, plain or gzipped; missing cores, and what holds no area, are passed over.

    Points, lines and rings of fewer than three different points hold none.

    Raises:
        ValueError: it is no GeoJSON, holds no area, or an outline in it is broken.
    """
    try:
        document = json.loads(_unpacked(path.read_bytes()))
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise ValueError(f"{path.name}: expected GeoJSON, got something that does not parse ({error}).") from error
    outlines, passed_over = [], Counter[str]()
    for number, feature in enumerate(_features(document)):
        if not isinstance(feature, dict) or "type" not in feature:
            raise ValueError(f"{path.name}: expected GeoJSON features, got {type(feature).__name__} (number {number}).")
        if _is_missing(feature):
            passed_over["missing core"] += 1
            continue
        geometry = (feature.get("geometry") if feature["type"] == "Feature" else feature) or {}
        try:
            found = [Outline(rings, _class_name(feature)) for rings in _polygons(geometry)]
            passed_over[str(geometry.get("type", "no geometry"))[:40]] += not found
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path.name}: outline {number} is broken ({error}). Export it again.") from error
        outlines += found
    if not outlines:
        held = ", ".join(f"{kind} ({count})" for kind, count in passed_over.most_common(5) if count) or "no feature"
        raise ValueError(
            f"{path.name}: expected polygons of at least three points, got a file that holds no area: {held}. "
            "Export closed annotations, or leave the slide out."
        )
    return outlines


def _features(document: Any) -> Iterator[Any]:
    """What lists and FeatureCollections hold, however deep, in the file's order."""
    waiting = [document]
    while waiting:
        held = waiting.pop()
        if isinstance(held, list):
            waiting += reversed(held)
        elif isinstance(held, dict) and held.get("type") == "FeatureCollection":
            waiting.append(held.get("features", []))
        else:
            yield held


def _is_missing(feature: dict[str, Any]) -> bool:
    """Whether QuPath marks it as a core that the tissue microarray lost."""
    properties = feature.get("properties")
    return isinstance(properties, dict) and str(properties.get("isMissing", "")).casefold() == "true"


def _unpacked(raw: bytes) -> bytes:
    """The bytes of a plain or gzipped file; one that grows far more than outlines do raises ValueError."""
    if raw[:2] != b"\x1f\x8b":
        return raw
    most = max(_MOST_UNPACKED, _MOST_PACKED * len(raw))
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        unpacked = file.read(most + 1)
    if len(unpacked) > most:
        raise ValueError(f"{len(raw):,} bytes unpack to more than {most:,}")
    return unpacked


def _class_name(feature: dict[str, Any]) -> str:
    """QuPath's classification, old and new form; else a plain `class` or `label`."""
    properties = feature.get("properties")
    if not isinstance(properties, dict):
        return ""
    given = properties.get("classification", properties.get("class", properties.get("label", "")))
    if isinstance(given, dict):
        given = given.get("name") or ": ".join(given.get("names") or [])
    return str(given) if given else ""


def _polygons(geometry: dict[str, Any]) -> Iterator[tuple[Ring, ...]]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)
    elif kind in ("Polygon", "MultiPolygon"):
        for polygon in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
            rings = tuple(np.asarray([point[:2] for point in ring], np.float64) for ring in polygon)
            for ring in rings:
                if ring.size and (ring.ndim != 2 or ring.shape[1] != 2 or not np.isfinite(ring).all()):
                    raise ValueError(f"expected finite points (x, y), got {ring.tolist()[:3]}")
            border, *holes = (ring if len(np.unique(ring, axis=0)) >= 3 else None for ring in rings or [np.empty(0)])
            if border is not None:
                yield border, *(hole for hole in holes if hole is not None)


def choose(
    outlines: Sequence[Outline], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Outline], list[Outline]]:
    """The outlines whose area counts, and those whose area is cut out of it.

    Args:
        outlines: of one file.
        include: classes that count, in any case; all but the excluded ones when empty.
        exclude: classes that are cut out; a file without them is complete as it is.

    Raises:
        ValueError: no outline has an included class, or all have an excluded one.
    """
    wanted, unwanted = ({name.casefold() for name in names} for names in (include, exclude))
    out = [outline for outline in outlines if outline.name.casefold() in unwanted]
    kept = [outline for outline in outlines if outline.name.casefold() not in unwanted]
    if not kept:
        raise ValueError(f"--exclude: expected outlines of other classes too, got only {', '.join(exclude)}.")
    if wanted:
        kept = [outline for outline in kept if outline.name.casefold() in wanted]
        if not kept:
            classes = ", ".join(sorted({outline.name for outline in outlines} - {""})) or "none"
            raise ValueError(f"--include: expected outlines of class {', '.join(include)}, got classes: {classes}.")
    return kept, out


def fill(
    outlines: Sequence[Outline], shape: tuple[int, int], origin_level0: tuple[float, float], scale: tuple[float, float]
) -> BoolImage:
    """(h, w): pixels whose centre lies in one of the outlines.

    Args:
        outlines: level-0 coordinates.
        shape: (h, w).
        origin_level0: level-0 (x, y) of the corner of pixel (0, 0).
        scale: level-0 pixels per pixel (x, y).
    """
    height, width = shape
    entered = np.zeros((height, width + 1), np.int32)  # outlines entered at a pixel less those left, along its row
    for outline in outlines:
        for row, column in _crossings([(ring - origin_level0) / scale for ring in outline.rings], shape):
            order = np.sort(row * (width + 1) + column)  # closed rings cross every row an even number of times
            np.add.at(entered.reshape(-1), order[0::2], 1)
            np.add.at(entered.reshape(-1), order[1::2], -1)
    return np.cumsum(entered, axis=1, dtype=np.int32, out=entered)[:, :-1] > 0


def _crossings(rings: list[Ring], shape: tuple[int, int]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Where the rings, in pixels, cross the middle of each row: rows, and the first columns to the right of it.

    Whole rows come at a time, as many as hold CROSSINGS: an outline's memory doesn't grow with its edges' length.
    """
    height, width = shape
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    upper, lower = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.clip(np.ceil(upper - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(lower - 0.5), 0, height).astype(np.int64)
    crossing = np.flatnonzero(last > first)
    if not len(crossing):
        return
    start, end, first, last = start[crossing], end[crossing], first[crossing], last[crossing]
    steps = np.bincount(first, minlength=height + 1) - np.bincount(last, minlength=height + 1)
    before = np.concatenate([[0], np.cumsum(np.cumsum(steps)[:-1])])  # crossings of the rows above each row
    top, bottom = int(first.min()), int(last.max())
    while top < bottom:
        below = max(top + 1, min(bottom, int(np.searchsorted(before, before[top] + CROSSINGS, side="right")) - 1))
        here = np.flatnonzero((first < below) & (last > top))
        begin = np.maximum(first[here], top)
        count = np.minimum(last[here], below) - begin
        edge = np.repeat(here, count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(begin, count)
        along = (row + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
        x = start[edge, 0] + along * (end[edge, 0] - start[edge, 0])
        yield row, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        top = below
