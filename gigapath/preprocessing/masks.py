"""Tissue that a file gives: outlines (GeoJSON), mask images, coordinates of other tools' tiles.

Whatever the file, the result is a mask in the frame of the slide's overview; the tiles are laid on our own grid.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import PIL.Image
from numpy.typing import NDArray

from gigapath.features.foreign import clam_step
from gigapath.features.h5 import open_h5, read_attrs, read_dataset
from gigapath.features.npz import read_npy, read_npz
from gigapath.preprocessing.annotations import choose, fill, read_outlines
from gigapath.preprocessing.published import published_tissue
from gigapath.preprocessing.slide import Overview, Slide
from gigapath.preprocessing.tissue import BoolImage, TissueMask, box_means, find_tissue, make_mask

OUTLINES = (".geojson", ".json", ".geojson.gz", ".json.gz")
IMAGES = (".png", ".tif", ".tiff")
COORDINATES = (".h5", ".hdf5", ".npz", ".npy")

METHODS = ("otsu", "published", "none")

SAME_SHAPE = 0.05  # by which a mask image's aspect may differ from the slide's
IMAGE_PIXELS = 2**28


def tissue_of(
    slide: Slide, overview: Overview, tissue: str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> TissueMask:
    """The tissue of a slide as `--tissue` says.

    Args:
        slide: the open slide.
        overview: the slide at low power.
        tissue: a method, or the path of a file, or of a folder that holds `<slide id>.<suffix>`.
        include: classes of the file that count; all of them when empty.
        exclude: classes of the file that are cut out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no mask of this slide, or classes are asked for where there are none.
    """
    if tissue not in METHODS:
        return read_mask(mask_file(Path(tissue), slide.slide_id), slide, overview, include=include, exclude=exclude)
    if include or exclude:
        raise ValueError(f"--include, --exclude: expected --tissue FILE beside them, got --tissue {tissue}. Give one.")
    return published_tissue(slide, overview) if tissue == "published" else find_tissue(overview, tissue)


def read_mask(
    path: Path, slide: Slide, overview: Overview, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> TissueMask:
    """Read one mask file; see `tissue_of`."""
    suffix = _suffix(path)
    if suffix in OUTLINES:
        kind, mask = "outlines", _outlined(path, slide, overview, include, exclude)
    elif suffix in IMAGES:
        kind, mask = "image", _painted(path, slide, overview, include, exclude)
    elif suffix in COORDINATES:
        if include or exclude:
            raise ValueError(f"--include, --exclude: expected a mask with classes, got coordinates ({path.name}).")
        kind, mask = "coordinates", _covered(path, overview)
    else:
        known = " ".join((*OUTLINES, *IMAGES, *COORDINATES))
        raise ValueError(f"--tissue: expected a method ({', '.join(METHODS)}) or a file ({known}), got {path.name!r}.")
    return make_mask(overview, mask, method=f"file:{kind}", state="tissue" if mask.any() else "blank")


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((end for end in (*OUTLINES, *IMAGES, *COORDINATES) if name.endswith(end)), "")


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
        if outlines:
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


def _read_image(path: Path, overview: Overview) -> NDArray[np.uint8]:
    """(h, w) values of a mask image: grey levels or palette entries, of colours the brightest channel.

    Of a pyramid the coarsest level that is as fine as the overview is read.
    """
    try:
        with openslide.OpenSlide(str(path)) as pyramid:
            fine = [
                level
                for level, (width, height) in enumerate(pyramid.level_dimensions)
                if width >= 2 * overview.image.shape[1] and height >= 2 * overview.image.shape[0]
            ]
            level = fine[-1] if fine else 0
            _check_pixels(pyramid.level_dimensions[level], path)
            pixels = np.asarray(pyramid.read_region((0, 0), level, pyramid.level_dimensions[level]))
            return np.asarray(pixels[..., :3].max(axis=-1) * (pixels[..., 3] > 0), np.uint8)
    except openslide.OpenSlideUnsupportedFormatError:
        pass
    except openslide.OpenSlideError as error:
        raise ValueError(f"{path.name}: expected a readable mask image, got {error}. Write it again.") from error
    try:
        with PIL.Image.open(path) as image:
            _check_pixels(image.size, path)
            pixels = np.asarray(image)
            bands = image.getbands()
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{path.name}: expected a readable mask image, got {error}. Write it again.") from error
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype != np.uint8:
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    if pixels.ndim == 2:
        return pixels
    if bands[-1] == "A":
        return np.asarray(pixels[..., :-1].max(axis=-1) * (pixels[..., -1] > 0), np.uint8)
    return np.asarray(pixels.max(axis=-1), np.uint8)


def _check_pixels(size: tuple[int, int], path: Path) -> None:
    if size[0] * size[1] > IMAGE_PIXELS:
        raise ValueError(
            f"{path.name}: expected a mask of at most {IMAGE_PIXELS // 2**20} megapixels, got {size[0]} x {size[1]}. "
            "Shrink it: a thirtieth of the slide's size is enough."
        )


def _covered(path: Path, overview: Overview) -> BoolImage:
    """The area under the tiles of TRIDENT, CLAM, Mussel (h5), hs2p, slide2vec (npz, npy) or ours."""
    coords, (width, height) = _read_h5(path) if _suffix(path) in (".h5", ".hdf5") else _read_numpy(path)
    mask = np.zeros(overview.image.shape[:2], bool)
    start = (coords - overview.origin_level0) / overview.scale
    end = start + np.array([width, height]) / overview.scale
    first = np.maximum(np.ceil(start - 0.5), 0).astype(np.int64)
    last = np.maximum(np.ceil(end - 0.5), 0).astype(np.int64)
    for (left, top), (right, bottom) in zip(first.tolist(), last.tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return mask


def _read_h5(path: Path) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """(N, 2) level-0 corners and the level-0 size (x, y) of each tile."""
    with open_h5(path) as file:
        if "coords" not in file:
            raise ValueError(f"{path.name}: expected a dataset 'coords', got {', '.join(sorted(file)) or 'nothing'}.")
        coords = read_dataset(file, "coords")
        attrs = {**read_attrs(file), **read_attrs(file["coords"])}
    size: Any = attrs.get("patch_size_level0", attrs.get("tile_size_level0"))
    if size is None and ("mpp" in attrs or "native_mpp" in attrs):
        size = attrs.get("patch_size")  # Mussel's, in level-0 pixels
    if size is None:
        size = clam_step(attrs)
    return _checked(path, coords, size)


def _read_numpy(path: Path) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """hs2p's and slide2vec's: fields x and y; the size as a field, or in the JSON beside."""
    held: Any = read_npz(path) if _suffix(path) == ".npz" else read_npy(path)
    names = held if isinstance(held, dict) else held.dtype.names or ()
    if "x" not in names or "y" not in names or np.shape(held["x"]) != np.shape(held["y"]):
        raise ValueError(f"{path.name}: expected arrays x and y of one length, got {', '.join(names) or 'none'}.")
    x, y = held["x"], held["y"]
    size = held["tile_size_lv0"] if "tile_size_lv0" in names else None
    beside = path.with_name(f"{path.name.removesuffix('.npz')}.meta.json")
    if size is None and beside.is_file():
        try:
            size = _find(json.loads(beside.read_text(encoding="utf-8")), "tile_size_lv0")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside.name}: expected JSON, got something that is not ({error}).") from error
    size = size if size is None or np.ndim(size) == 0 else np.asarray(size).ravel()[:1]
    return _checked(path, np.stack([x, y], axis=-1), size)


def _find(value: Any, name: str) -> Any:
    """The first entry of this name in nested JSON objects."""
    if not isinstance(value, dict):
        return None
    return value.get(name) or next((found for inner in value.values() if (found := _find(inner, name))), None)


def _checked(path: Path, coords: NDArray[Any], size: Any) -> tuple[NDArray[np.float64], tuple[float, float]]:
    if (
        coords.ndim != 2
        or coords.shape[1] != 2
        or coords.dtype.kind not in "iuf"
        or not np.isfinite(coords.astype(np.float64)).all()
    ):
        raise ValueError(f"{path.name}: expected finite coordinates (N, 2), got {coords.shape} of {coords.dtype}.")
    try:
        width, height = np.broadcast_to(np.asarray(size, np.float64), (2,)).tolist()
    except (TypeError, ValueError):
        width = height = 0.0
    if not (width > 0 and height > 0):
        raise ValueError(
            f"{path.name}: expected coordinates with the size of their tiles (patch_size_level0, patch_size with "
            "patch_level and downsample, or tile_size_lv0), got none. Use the tool's own coordinates file."
        )
    return coords.astype(np.float64), (width, height)
