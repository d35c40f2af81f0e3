"""Slide embeddings as other tools compute them with GigaPath's slide encoder (one table, from their sources), and the
vectors of their files: what `slide-embed --embedding TOOL` and `check --slide-embeddings` go by.

Places are what becomes of a tile's coordinates before the encoder divides by 256; the order "file" is that of the file
of tile embeddings.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.arrays import read_npy, read_npz, read_tensor
from gigapath.features.cells import flat_json
from gigapath.features.data import CELL, FRAMES, Array, FeatureFileError, TileEmbeddings
from gigapath.features.gigapath_file import read_slide, stage_of
from gigapath.features.h5 import as_number, open_h5, read_attrs, read_dataset
from gigapath.features.tables import read_table
from gigapath.files import small_json, visible_files

ORDERS = ("file", "row-major", "column-major")
# What becomes the tile's cell (column, row) in the encoder's grid.
PLACES = (
    "cells",  # its place in the grid of tiles
    "pitch",  # floor(level-0 pixels / level-0 pixels of a tile)
    "level0",  # floor(level-0 pixels / 256), whatever the slide's scale
    "unit",  # its place as a share of the slide's extent, of 1000, divided by 256: a grid of 4 x 4
    "swapped",  # its place with x and y exchanged
    "none",  # one cell for all tiles
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tool gets from tile embeddings to a slide embedding; docs/guides/whose-embedding.md says of which version
    that was read, and what else is particular to it.

    `readout` is the embedding that it takes, by the name that `parse_embedding` knows; `order` of the tiles, of ORDERS,
    and `places`, of PLACES; with `half_places` coordinates go through float16; `precision` on a CPU and on CUDA:
    "fp32", "fp16" and "bf16" by autocast, "half" for weights, sums and inputs in float16; a model that is not
    `evaluated` is left in training mode: dropout makes every run another.
    """

    readout: str
    order: str = "file"
    places: str = "pitch"
    half_places: bool = False
    precision: tuple[str, str] = ("fp32", "fp16")
    evaluated: bool = True

    @property
    def plain_places(self) -> bool:
        """Whether tiles come to stand where our files have them, so that our states serve."""
        return self.places in ("cells", "pitch") and self.evaluated


DEFAULT = Recipe(readout="default:mean", order="row-major", places="cells")
RECIPES = {
    "slide2vec": Recipe(readout="default:class"),
    "slide2vec-5": Recipe(readout="default:class", evaluated=False),
    "mussel": Recipe(readout="default:class", places="level0", precision=("fp16", "fp16")),
    "lazyslide": Recipe(readout="default:class", places="level0", precision=("fp32", "bf16")),
    "stamp": Recipe(readout="default:class", places="unit", half_places=True, precision=("half", "half")),
    "raw2features": Recipe(readout="last-state:mean"),
    "trident": Recipe(readout="state:11:mean"),
    "published-demo": Recipe(readout="last-state:class", places="cells"),
}


def tiles_as(tiles: TileEmbeddings, recipe: Recipe) -> TileEmbeddings:
    """The tiles (in the order of their file, with cells) in the order and on the cells that a recipe gives them;
    ValueError for coordinates of another unit than it needs, or beyond float16's range."""
    assert tiles.cells is not None
    size = as_number(tiles.attrs.get("patch_size_level0")) or as_number(tiles.attrs.get("tile_size_lv0"))
    size = size or tiles.tile_size_level0 or 0.0  # of a tile: where tiles overlap, the tools divide by it all the same
    places, unit = np.asarray(tiles.coords, dtype=np.float32), size
    if recipe.places == "level0":
        if tiles.frame == "um":
            raise ValueError(f"{tiles.slide_id}: expected level-0 pixels, got {FRAMES[tiles.frame]}.")
        unit = float(CELL)
    elif recipe.places == "unit":
        places, unit = places / (places.max(axis=0) + np.float32(size)) * np.float32(1000), float(CELL)
    elif recipe.places != "pitch" and not recipe.half_places:
        places, unit = np.asarray(tiles.cells, dtype=np.float32), 1.0
    with np.errstate(over="ignore"):
        places = places.astype(np.float16 if recipe.half_places else np.float32).astype(np.float64)
    if not np.isfinite(places).all():
        raise ValueError(f"{tiles.slide_id}: its coordinates are beyond what float16 holds.")
    cells = np.floor(places / unit).astype(np.int32)
    if recipe.places == "swapped":
        cells = cells[:, ::-1]
    if recipe.places == "none":
        cells = np.zeros_like(cells)
    x, y = tiles.cells.T
    order = {"row-major": np.lexsort((x, y)), "column-major": np.lexsort((y, x))}.get(recipe.order)
    found = dataclasses.replace(tiles, cells=np.ascontiguousarray(cells))
    return found if order is None else found.take(order)


_SUFFIXES = (".h5", ".pt", ".npz", ".npy")
# What a file may say of how its vectors were made.
_STATED = (
    *("tool", "recipe", "embedding", "encoder", "slide_encoder", "encoder_name", "slide_precision", "precision"),
    *("trained", "version", "package_version", "feat_type", "aggregation_revision"),
)


@dataclass(frozen=True)
class SlideVectors:
    """Vectors of slides, of one tool: slide id -> (E,) float32, and what the files say of how they were made (the
    first, of several)."""

    path: Path
    vectors: Mapping[str, Array]
    stated: Mapping[str, Any]

    @property
    def width(self) -> int:
        """E."""
        return len(next(iter(self.vectors.values())))


def read_slide_vectors(path: Path | str) -> SlideVectors:
    """Read a file of slide vectors or a folder of such files: ours (of our own files the default embedding, or that of
    the tool that they name), tables of `gigapath convert`, TRIDENT's, STAMP's (one file for all slides), slide2vec's,
    and plain vectors (.npy, .pt, .npz). FileNotFoundError; FeatureFileError for nothing that is known, vectors of
    several widths, values that are not finite."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file or folder of slide vectors, found none.")
    files = visible_files(path, "*") if path.is_dir() else [path]
    files = [file for file in files if file.suffix in _SUFFIXES] if path.is_dir() else files
    found: dict[str, Array] = {}
    stated: dict[str, Any] = {}
    for file in files:
        vectors, attrs = _read(file)
        stated = stated or {name: attrs[name] for name in _STATED if attrs.get(name) not in (None, "")}
        for slide_id, vector in vectors.items():
            found[slide_id] = np.asarray(vector, dtype=np.float32).reshape(-1)
    if not found or len({len(vector) for vector in found.values()}) > 1:
        raise FeatureFileError(f"{path}: expected vectors of slides, all of one width, got {len(found)} vectors.")
    broken = next((slide_id for slide_id, vector in found.items() if not np.isfinite(vector).all()), None)
    if broken is not None:
        raise FeatureFileError(f"{path}: expected finite values, got NaN or infinity in the vector of {broken!r}.")
    return SlideVectors(path, found, stated)


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """The vectors of one file by slide, and its attributes."""
    if path.suffix == ".h5":
        return _read_h5(path)
    if path.suffix == ".csv":
        attrs, table = read_table(path)
        return table, {"tool": "gigapath", **{name: value for name, value in attrs.items() if name in _STATED}}
    sidecar = flat_json(small_json(path.with_name(f"{path.stem}.meta.json")) or {})
    stated = {"tool": "slide2vec", **sidecar} if sidecar else {}
    if path.suffix == ".npy":
        return _one(path, read_npy(path)), stated
    if path.suffix == ".pt":
        return _one(path, read_tensor(path)), stated
    held = read_npz(path)
    if {"slide_ids", "vectors"} <= set(held):
        attrs, table = read_table(path)
        return table, {"tool": "gigapath", **attrs}
    if "features" in held:
        return _one(path, held["features"]), stated
    return {name: vector for name, vector in held.items() if vector.ndim == 1}, stated


def _read_h5(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    with open_h5(path) as file:
        ours, attrs = stage_of(file), read_attrs(file)
        if ours is None:
            names = [name for name in file if getattr(file[name], "ndim", 0) in (1, 2) and file[name].dtype.kind == "f"]
            single = next((name for name in ("features", "feats") if name in names), None)
            if single is not None:
                tool = {"tool": "trident"} if single == "features" else {"tool": "stamp"}
                return _one(path, read_dataset(file, single)), {**tool, **attrs, **read_attrs(file[single])}
            return {name: read_dataset(file, name) for name in names}, {"tool": "stamp", **attrs}
    slide = read_slide(path)
    recipe = slide.attrs.get("recipe")
    name = str(recipe or "default" if slide.default_mean is not None else "tile-mean")
    return {slide.slide_id: slide.select(name)}, {"tool": "gigapath", "embedding": name, **slide.attrs}


def _one(path: Path, vector: Array) -> dict[str, Array]:
    if vector.ndim == 0 or vector.size != vector.shape[-1]:
        raise FeatureFileError(f"{path.name}: expected one vector of a slide, got {vector.shape}.")
    return {path.stem: vector}
