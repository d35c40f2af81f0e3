"""Tissue that a file gives: outlines (GeoJSON), mask images, coordinates of other tools' tiles.

Whatever the file, the result is a mask in the frame of the slide's overview; the tiles are laid on our own grid.
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
import PIL.Image
from numpy.typing import NDArray

from gigapath.features.arrays import read_npy, read_npz
from gigapath.features.h5 import open_h5, read_attrs, read_dataset
from gigapath.features.other_tools import clam_step
from gigapath.preprocessing.fast import open_tiff
from gigapath.preprocessing.header import is_level_of
from gigapath.preprocessing.slide import Overview, Slide
from gigapath.preprocessing.tiling import box_means
from gigapath.preprocessing.tissue import METHODS, BoolImage, TissueMask, make_mask

# Numbers in words pack to a tenth; what packs to a hundredth is none of ours.
_MOST_PACKED = 100
_MOST_UNPACKED = 64 << 20

CROSSINGS = 1 << 18  # of outlines and rows, worked on at once

Ring = NDArray[np.float64]


@dataclass(frozen=True)
class Outline:
    """One closed area: rings (n, 2) of level-0 (x, y), the border and then its holes; `name` is its class, or ""."""

    rings: tuple[Ring, ...]
    name: str


def read_outlines(path: Path) -> list[Outline]:
    """All areas of a GeoJSON file, plain or gzipped; missing cores, and what holds no area (points, lines, rings of
    fewer than three different points), are passed over. ValueError where it is no GeoJSON, holds no area, or an outline
    is broken."""
    try:
        document = json.loads(_unpacked(path.read_bytes()))
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise ValueError(
            f"{path.name}: expected GeoJSON, got something that does not parse ({error}). Export it again."
        ) from error
    outlines, passed_over = [], Counter[str]()
    for number, feature in enumerate(_features(document)):
        if not isinstance(feature, dict) or "type" not in feature:
            raise ValueError(
                f"{path.name}: expected GeoJSON features, got {type(feature).__name__} (number {number}). Export it "
                "again."
            )
        facts = feature.get("properties")
        facts = facts if isinstance(facts, dict) else {}
        if str(facts.get("isMissing", "")).casefold() == "true":  # QuPath's mark of a core that a microarray lost
            passed_over["missing core"] += 1
            continue
        geometry = (feature.get("geometry") if feature["type"] == "Feature" else feature) or {}
        try:
            found = [Outline(rings, _class_name(facts)) for rings in _polygons(geometry)]
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


def _class_name(properties: dict[str, Any]) -> str:
    """QuPath's classification, old and new form; else a plain `class` or `label`."""
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
    """The outlines of a file whose area counts (of the classes in `include`, in any case; all but the excluded ones
    when empty), and those whose area is cut out of it. ValueError where none has an included class, or all have an
    excluded one."""
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
    """(h, w) of `shape`: pixels whose centre lies in one of the outlines; `scale` is level-0 pixels per pixel (x, y),
    `origin_level0` the corner of pixel (0, 0)."""
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


OUTLINES = (".geojson", ".json", ".geojson.gz", ".json.gz")
IMAGES = (".png", ".tif", ".tiff")
COORDINATES = (".h5", ".hdf5", ".npz", ".npy")

SAME_SHAPE = 0.05  # by which a mask image's aspect may differ from the slide's
IMAGE_PIXELS = 2**28


def read_mask(
    path: Path, slide: Slide, overview: Overview, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> TissueMask:
    """Read one mask file; see `tissue_of`."""
    name = path.name.lower()
    if name.endswith(OUTLINES):
        kind, mask = "outlines", _outlined(path, slide, overview, include, exclude)
    elif name.endswith(IMAGES):
        kind, mask = "image", _painted(path, slide, overview, include, exclude)
    elif name.endswith(COORDINATES):
        if include or exclude:
            raise ValueError(f"--include, --exclude: expected a mask with classes, got coordinates ({path.name}).")
        kind, mask = "coordinates", _covered(path, overview)
    else:
        known = " ".join((*OUTLINES, *IMAGES, *COORDINATES))
        raise ValueError(f"--tissue: expected a method ({', '.join(METHODS)}) or a file ({known}), got {path.name!r}.")
    if not mask.any():
        raise ValueError(
            f"{path.name}: expected an area on the slide, got none of a pixel of {overview.mpp:.2g} microns. "
            "Is it this slide's? Else leave the slide out."
        )
    return make_mask(overview, mask, method=f"file:{kind}", state="tissue")


def mask_file(path: Path, slide_id: str) -> Path:
    """The mask of one slide: the file itself, or the one that bears the slide's id in a folder."""
    if path.is_dir():
        ends = (*OUTLINES, *IMAGES, *COORDINATES, "_patches.h5", ".coordinates.npz")
        found = [file for end in ends if (file := path / f"{slide_id}{end}").is_file()]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise FileNotFoundError(
                f"--tissue: expected one mask for slide {slide_id!r} in the folder {path.name}, got {names}. "
                f"Name it {slide_id}.geojson, .png, .tif, .h5 or .npz."
            )
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"--tissue: expected {', '.join(METHODS)} or a file or folder that exists, got {path.name!r}."
        )
    return path


def _outlined(
    path: Path, slide: Slide, overview: Overview, include: Sequence[str], exclude: Sequence[str]
) -> BoolImage:
    outlines = read_outlines(path)
    for outline in outlines:
        points = outline.rings[0]
        if (points.max(axis=0) > 0).all() and (points.min(axis=0) < slide.dimensions).all():
            break
    else:
        raise ValueError(
            f"{path.name}: expected level-0 pixels of a slide of {slide.dimensions[0]} x {slide.dimensions[1]}, "
            f"got outlines that lie outside, such as at {outlines[0].rings[0][0].tolist()}. Is it this slide's?"
        )
    kept, cut = choose(outlines, include, exclude)
    frame = overview.image.shape[:2], overview.origin_level0, overview.scale
    return fill(kept, *frame) & ~fill(cut, *frame)


def _painted(path: Path, slide: Slide, overview: Overview, include: Sequence[str], exclude: Sequence[str]) -> BoolImage:
    """A mask image of the slide or of its bounds, whichever shape it has; what is half covered counts as tissue."""
    values = _read_image(path, overview)
    inside = _chosen_values(values, include, path) if include else values != 0
    if exclude:
        inside &= ~_chosen_values(values, exclude, path)
    if not inside.any():
        wanted = f"a value of {', '.join(include)}" if include else "values other than 0"
        left_out = f", less {', '.join(exclude)}" if exclude else ""
        raise ValueError(
            f"{path.name}: expected {wanted}{left_out}, got none among {values.min()} to {values.max()}. "
            "The mask holds no area: write it again, or leave the slide out."
        )
    height, width = inside.shape
    frames = [((0, 0), slide.dimensions), (slide.bounds[:2], slide.bounds[2:])]
    misfits = [abs((size[0] / width) / (size[1] / height) - 1) for _, size in frames]
    corner, size = frames[int(np.argmin(misfits))]
    if min(misfits) > SAME_SHAPE + 1 / min(width, height):
        raise ValueError(
            f"{path.name}: expected the shape of the slide ({size[0]} x {size[1]}), got {width} x {height}. "
            "Is it this slide's?"
        )
    step = size[0] / width, size[1] / height
    edges = [
        (overview.origin_level0[xy] + np.arange(overview.image.shape[1 - xy] + 1) * overview.scale[xy] - corner[xy])
        / step[xy]
        for xy in (0, 1)
    ]
    covered: BoolImage = box_means(inside, edges[0], edges[1]) >= 0.5
    return covered


def _chosen_values(values: NDArray[Any], names: Sequence[str], path: Path) -> BoolImage:
    try:
        return np.isin(values, [int(name) for name in names])
    except ValueError:
        raise ValueError(
            f"--include, --exclude: expected grey values for the mask image {path.name}, got {', '.join(names)}."
        ) from None


def _read_image(path: Path, overview: Overview) -> NDArray[Any]:
    """(h, w) values of a mask image as the file stores them: labels, palette entries, of colours the brightest channel.

    Of a pyramid the coarsest level that is as fine as the overview is read.
    """
    with path.open("rb") as file:
        head = file.read(26)
    try:
        read = _tiff_values if head[:2] in (b"II", b"MM") else _image_values
        values = read(path, head, overview)
    except (MemoryError, _Unsuited):
        raise
    except Exception as error:  # each decoder raises types of its own
        raise ValueError(f"{path.name}: expected a readable mask image, got {error}. Write it again.") from error
    if values.dtype.kind not in "buif":
        raise _unsuited(path, f"values of type {values.dtype}")
    return np.nan_to_num(values) if values.dtype.kind == "f" else values


class _Unsuited(ValueError):
    """A picture that can be read and is no mask."""


def _unsuited(path: Path, found: str) -> _Unsuited:
    return _Unsuited(f"{path.name}: expected a mask of one channel, or of 8-bit colours, got {found}. Write it again.")


def _tiff_values(path: Path, head: bytes, overview: Overview) -> NDArray[Any]:
    with open_tiff(path) as file:
        first, *others = file.pages
        first = first.aspage()
        others = [page.aspage() for page in others]
        if any(not page.is_reduced and _size(page) == _size(first) for page in others):
            raise _unsuited(path, f"{1 + len(others)} pages")
        levels = [page.aspage() for page in first.pages or ()] + [page for page in others if page.is_reduced]
        levels = [page for page in levels if is_level_of(_size(first), _size(page))]
        fine = [
            page
            for page in levels
            if page.imagewidth >= 2 * overview.image.shape[1] and page.imagelength >= 2 * overview.image.shape[0]
        ]
        page = min(fine, key=_size, default=first)
        _check_pixels(_size(page), path)
        if page.is_tiled:
            _check_pixels((page.tilewidth, page.tilelength), path)
        if max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)), default=0) > path.stat().st_size:
            raise ValueError("a file cut short")
        if page.axes == "YX":
            return np.asarray(page.asarray())
        if page.axes not in ("YXS", "SYX") or page.dtype != np.uint8 or page.samplesperpixel > 4:
            raise _unsuited(path, f"{page.samplesperpixel} channels of {page.dtype}, axes {page.axes}")
        pixels = page.asarray()
        return _brightest(np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels)


def _size(page: Any) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def _image_values(path: Path, head: bytes, overview: Overview) -> NDArray[Any]:
    """Of PNG, and whatever else Pillow knows."""
    depth, colours = (head[24], head[25]) if head.startswith(b"\x89PNG") else (8, 0)
    if depth == 16 and colours:  # Pillow would halve them
        raise _unsuited(path, "16-bit colours")
    with PIL.Image.open(path) as image:
        _check_pixels(image.size, path)
        pixels = np.asarray(image)
    if pixels.ndim == 3:
        return _brightest(pixels)
    # Greys of 2 and 4 bits come spread over 0 to 255.
    return pixels // (255 // (2**depth - 1)) if depth in (2, 4) and not colours else pixels


def _brightest(pixels: NDArray[Any]) -> NDArray[Any]:
    """Of (h, w, channels), of which an even number has alpha last: the brightest colour, 0 where it is transparent."""
    colours = pixels.shape[-1] - (pixels.shape[-1] % 2 == 0)
    brightest: NDArray[Any] = pixels[..., :colours].max(axis=-1)
    return brightest if colours == pixels.shape[-1] else np.where(pixels[..., -1] > 0, brightest, 0)


def _check_pixels(size: tuple[int, int], path: Path) -> None:
    if size[0] * size[1] > IMAGE_PIXELS:
        raise _Unsuited(
            f"{path.name}: expected a mask of at most {IMAGE_PIXELS // 2**20} megapixels, got {size[0]} x {size[1]}. "
            "Shrink it: a thirtieth of the slide's size is enough."
        )


def _covered(path: Path, overview: Overview) -> BoolImage:
    """The area under the tiles of TRIDENT, CLAM, Mussel (h5), hs2p, slide2vec (npz, npy) or ours."""
    coords, size = _read_h5(path) if path.name.lower().endswith((".h5", ".hdf5")) else _read_numpy(path)
    coords, size = _checked(path, coords, size)
    mask = np.zeros(overview.image.shape[:2], bool)
    start = (coords - overview.origin_level0) / overview.scale
    end = start + size / overview.scale
    first = np.maximum(np.ceil(start - 0.5), 0).astype(np.int64)
    last = np.maximum(np.ceil(end - 0.5), 0).astype(np.int64)
    for (left, top), (right, bottom) in zip(first.tolist(), last.tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return mask


def _read_h5(path: Path) -> tuple[NDArray[Any], Any]:
    """Level-0 corners and the level-0 size of the tiles, as the file has them, unchecked; None where it has no size."""
    with open_h5(path) as file:
        if "coords" not in file:
            raise ValueError(f"{path.name}: expected a dataset 'coords', got {', '.join(sorted(file)) or 'nothing'}.")
        coords = read_dataset(file, "coords")
        attrs = {**read_attrs(file), **read_attrs(file["coords"])}
    size: Any = attrs.get("patch_size_level0", attrs.get("tile_size_level0"))
    if size is None and ("mpp" in attrs or "native_mpp" in attrs):
        size = attrs.get("patch_size")  # Mussel's, in level-0 pixels
    return coords, clam_step(attrs) if size is None else size


def _read_numpy(path: Path) -> tuple[NDArray[Any], Any]:
    """hs2p's and slide2vec's: fields x and y; the size as a field, or in the JSON beside."""
    held: Any = read_npz(path) if path.name.lower().endswith(".npz") else read_npy(path)
    names = held if isinstance(held, dict) else held.dtype.names or ()
    if "x" not in names or "y" not in names or np.shape(held["x"]) != np.shape(held["y"]):
        raise ValueError(f"{path.name}: expected arrays x and y of one length, got {', '.join(names) or 'none'}.")
    size = held["tile_size_lv0"] if "tile_size_lv0" in names else None
    beside = path.with_name(f"{path.name.removesuffix('.npz')}.meta.json")
    if size is None and beside.is_file():
        try:
            size = _find(json.loads(beside.read_text(encoding="utf-8")), "tile_size_lv0")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside.name}: expected JSON, got something that is not ({error}).") from error
    size = size if size is None or np.ndim(size) == 0 else np.asarray(size).ravel()[:1]
    return np.stack([held["x"], held["y"]], axis=-1), size


def _find(value: Any, name: str) -> Any:
    """The first entry of this name in nested JSON objects."""
    if not isinstance(value, dict):
        return None
    return value.get(name) or next((found for inner in value.values() if (found := _find(inner, name))), None)


def _checked(path: Path, coords: NDArray[Any], size: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners (N, 2) and the size (x, y) of each tile; ValueError where they are none."""
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iuf" or not np.isfinite(coords).all():
        raise ValueError(f"{path.name}: expected finite coordinates (N, 2), got {coords.shape} of {coords.dtype}.")
    try:
        sides = np.broadcast_to(np.asarray(size, np.float64), (2,))
    except (TypeError, ValueError):
        sides = np.zeros(2)
    if not (sides > 0).all():
        raise ValueError(
            f"{path.name}: expected coordinates with the size of their tiles (patch_size_level0, patch_size with "
            "patch_level and downsample, or tile_size_lv0), got none. Use the tool's own coordinates file."
        )
    return coords.astype(np.float64), sides
