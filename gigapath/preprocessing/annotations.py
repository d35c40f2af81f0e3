"""Outlines drawn in QuPath or found by TRIDENT (GeoJSON), and which pixels of a mask they hold.

Coordinates in the file are level-0 pixels (x, y). A pixel belongs to an outline that holds its centre.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers in words pack to a tenth; what packs to a hundredth is none of ours.
_MOST_PACKED = 100
_MOST_UNPACKED = 64 << 20

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
    """All areas of a GeoJSON file, plain or gzipped; points and lines hold no area and are passed over.

    Raises:
        ValueError: it is no GeoJSON, or an outline in it is broken.
    """
    try:
        document = json.loads(_unpacked(path.read_bytes()))
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise ValueError(f"{path.name}: expected GeoJSON, got something that does not parse ({error}).") from error
    features = document if isinstance(document, list) else [document]
    if len(features) == 1 and isinstance(features[0], dict) and features[0].get("type") == "FeatureCollection":
        features = features[0].get("features", [])
    if not isinstance(features, list):
        raise ValueError(f"{path.name}: expected a list of GeoJSON features, got {type(features).__name__}.")
    outlines = []
    for number, feature in enumerate(features):
        if not isinstance(feature, dict) or "type" not in feature:
            raise ValueError(f"{path.name}: expected GeoJSON features, got {type(feature).__name__} (number {number}).")
        geometry = feature.get("geometry") if feature["type"] == "Feature" else feature
        try:
            outlines += [Outline(rings, _class_name(feature)) for rings in _polygons(geometry or {})]
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path.name}: outline {number} is broken ({error}). Export it again.") from error
    return outlines


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
                if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
                    raise ValueError(f"expected at least three points (x, y), got {ring.tolist()[:3]}")
            if rings:
                yield rings


def choose(
    outlines: Sequence[Outline], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Outline], list[Outline]]:
    """The outlines whose area counts, and those whose area is cut out of it.

    Args:
        outlines: of one file.
        include: classes that count, in any case; all but the excluded ones when empty.
        exclude: classes that are cut out; a file without them is complete as it is.

    Raises:
        ValueError: no outline has an included class.
    """
    wanted, unwanted = ({name.casefold() for name in names} for names in (include, exclude))
    out = [outline for outline in outlines if outline.name.casefold() in unwanted]
    kept = [outline for outline in outlines if outline.name.casefold() not in unwanted]
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
    mask = np.zeros(shape, bool)
    for outline in outlines:
        _fill_one(mask, [(ring - origin_level0) / scale for ring in outline.rings])
    return mask


def _fill_one(mask: BoolImage, rings: list[Ring]) -> None:
    """Mark the pixels of one outline, its rings in pixels: those with an odd number of borders to their left."""
    points = np.concatenate(rings)
    height, width = mask.shape
    left, top = np.clip(np.floor(points.min(axis=0)).astype(np.int64), 0, (width, height))
    right, bottom = np.clip(np.ceil(points.max(axis=0)).astype(np.int64), 0, (width, height))
    if right <= left or bottom <= top:
        return
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    upper, lower = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.clip(np.ceil(upper - 0.5), top, bottom).astype(np.int64)
    count = np.clip(np.ceil(lower - 0.5), top, bottom).astype(np.int64) - first
    edge = np.repeat(np.arange(len(start)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    along = (row + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    x = start[edge, 0] + along * (end[edge, 0] - start[edge, 0])
    column = np.clip(np.ceil(x - 0.5), left, right).astype(np.int64)
    borders = np.zeros((bottom - top, right - left + 1), bool)
    np.bitwise_xor.at(borders, (row - top, column - left), True)
    mask[top:bottom, left:right] |= np.bitwise_xor.accumulate(borders, axis=1)[:, :-1]
