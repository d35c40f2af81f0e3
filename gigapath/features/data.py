"""Tiles, tile embeddings and slide embeddings: frozen dataclasses of numpy arrays, checked when they are made.

N tiles of a slide, D width of an embedding, K quality measures. Coordinates are (x, y). A cell is a tile's place
(column, row) in the slide encoder's grid: neighbours are one cell apart.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gigapath.file_names import safe_name

if TYPE_CHECKING:
    from gigapath.features.slide_vectors import Recipe

# Raised only when the numbers in the files change; reuse compares these, not the package's version. Each stage has one
# of its own, so that no other is redone for its sake.
NUMERICS_VERSION = 1  # of tile embeddings
TILES_NUMERICS_VERSION = 2  # blocks that are black to the last bit are no tissue
SLIDE_NUMERICS_VERSION = 2  # sums are float32 under autocast

# Pixels of a cell as the published code takes coordinates: its slide encoder only divides by this.
CELL = 256
# Side of the slide encoder's grid: a cell beyond it has no position.
GRID = 1000

# Names of slide embeddings, see `EmbeddingName`.
POOLINGS = ("mean", "class", "tiles")
KINDS = ("default", "state", "last-state", "all-states", "tile-mean")

STEP_OPTION = "--tile-size-level0"

Attrs = Mapping[str, Any]
Array = NDArray[Any]

# What a tile's coordinates in another tool's file are measured in.
FRAMES = {
    "level0": "level-0 pixels",
    "um": "micrometres",
    "centers": "level-0 pixels of tile centers",
    "unstated": "pixels of a level that the file does not state",
}


class FeatureFileError(ValueError):
    """A feature file is not what it should be; the message is one sentence that names the file."""


@dataclasses.dataclass(frozen=True)
class EmbeddingName:
    """A parsed name of a slide embedding; `str()` gives the one way to write it.

        default[:POOLING]      the slide encoder's default output
        state:I[:POOLING]      the output of layer I, 0 the input
        last-state[:POOLING]   the output of the last layer, without the encoder's closing norm (so not `default`)
        all-states[:POOLING]   states 0 to depth, concatenated
        tile-mean              the plain mean of the tile embeddings; needs no slide encoder
        a name of RECIPES      what that tool takes, such as state:11:mean for trident

    POOLING is `mean` (the default: the class token was not trained in pretraining), `class`, or `tiles` for no pooling:
    one vector a tile, which knows the tiles around it. The mean over a slide's tiles, then the model's `norm`, is the
    slide's own vector with `mean`.

    """

    kind: str  # of KINDS
    pooling: str = "mean"  # of POOLINGS; "" for tile-mean
    state: int | None = None  # I of `state:I`

    def __str__(self) -> str:
        return ":".join(
            part for part in (self.kind, "" if self.state is None else str(self.state), self.pooling) if part
        )


def recipe_of(name: str) -> "Recipe | None":
    """How another tool computes an embedding, where the name of one (or of what a run makes) is that tool's."""
    if name.partition(":")[0] in (*KINDS, "slide", "section"):
        return None
    from gigapath.features.slide_vectors import RECIPES  # seldom asked for

    return RECIPES.get(name)


def parse_embedding(name: str) -> EmbeddingName:
    """Read the name of an embedding; an unknown one raises ValueError with the names that exist."""
    recipe = recipe_of(name)
    kind, *rest = (name if recipe is None else recipe.readout).split(":")
    if kind == "tile-mean" and not rest:
        return EmbeddingName(kind, pooling="")
    if kind in KINDS and kind != "tile-mean":
        state = rest.pop(0) if kind == "state" and rest else None
        pooling = rest.pop(0) if rest else "mean"
        numbered = state is not None and state.isascii() and state.isdigit()
        if not rest and pooling in POOLINGS and numbered == (kind == "state"):
            return EmbeddingName(kind, pooling, int(state) if state is not None else None)
    from gigapath.features.slide_vectors import RECIPES

    raise ValueError(
        f"embedding: expected default, state:I, last-state or all-states (with :mean, :class or :tiles), tile-mean, "
        f"{', '.join(RECIPES)}, got {name!r}."
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tiles:
    """What the tiling stage knows of a slide.

    Attributes:
        slide_id: the slide's name in every output.
        coords_level0: (N, 2) int64, top-left (x, y) in absolute OpenSlide level-0 pixels, sorted by (y, x).
        cells: (N, 2) int32, (column, row) from the grid's anchor, no two alike:
            `coords_level0 = anchor + cells * tile_size_level0`.
        tissue_fraction: (N,) float32 in 0 to 1.
        section: (N,) int32, connected piece of tissue counted from 1; 0 is none.
        qc: (N, K) float32, one column per name in `qc_names`.
        qc_names: what the columns of `qc` measure.
        level: the pyramid level that is read.
        read_size: (w, h) pixels read at that level, resampled to `tile_size` where they differ.
        tile_size: pixels of a tile's side as the tile encoder gets it.
        tile_size_level0: the pitch (x, y), whole level-0 pixels.
        mpp: effective microns per pixel of a tile at `tile_size`.
        attrs: everything else that is recorded at the file's root. Names with a meaning here, all optional:
            `slide_size` (W, H) and `level_size` (w, h) in pixels, `level_downsample`, `objective_power`; they become
            attributes that TRIDENT and CLAM know.
    """

    slide_id: str
    coords_level0: Array
    cells: Array
    tissue_fraction: Array
    section: Array
    qc: Array
    qc_names: tuple[str, ...]
    level: int
    read_size: tuple[int, int]
    tile_size: int
    tile_size_level0: tuple[int, int]
    mpp: float
    attrs: Attrs = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        safe_name(self.slide_id)
        count = len(self.coords_level0)
        _cast(self, "coords_level0", np.int64, (count, 2))
        _cast(self, "cells", np.int32, (count, 2))
        _cast(self, "tissue_fraction", np.float32, (count,))
        _cast(self, "section", np.int32, (count,))
        _cast(self, "qc", np.float32, (count, len(self.qc_names)))
        pitch = np.asarray(self.tile_size_level0)
        if pitch.shape != (2,) or pitch.dtype.kind not in "iu" or (pitch < 1).any():
            raise ValueError(
                f"Tiles {self.slide_id}: expected two whole, positive tile_size_level0, got {self.tile_size_level0!r}."
            )
        if count == 0:
            return
        if not in_row_major_order(self.coords_level0):
            raise ValueError(f"Tiles {self.slide_id}: expected coordinates sorted by (y, x), each once.")
        anchors = self.coords_level0 - self.cells.astype(np.int64) * pitch
        if (anchors != anchors[0]).any():
            raise ValueError(
                f"Tiles {self.slide_id}: expected every corner at anchor + cell * pitch, got one that is not."
            )

    def __len__(self) -> int:
        return len(self.coords_level0)

    def take(self, indices: Array) -> "Tiles":
        """The tiles at `indices` (or where a boolean mask is True), which must keep their order."""
        names = ("coords_level0", "cells", "tissue_fraction", "section", "qc")
        return dataclasses.replace(self, **{name: getattr(self, name)[indices] for name in names})


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TileEmbeddings:
    """The tile embeddings of a slide, from our file or another tool's, in row-major order of their cells.

    Attributes:
        slide_id: the slide's name.
        features: (N, D) float32 or float16, as stored.
        coords: (N, 2) top-left (x, y) as the file has them, int64 or float64, in the unit that `frame` names.
        frame: a key of FRAMES.
        cells: (N, 2) int32 (column, row), or None where the caller did without them.
        tile_size_level0: the step between neighbouring tiles in the unit of `coords`, or None where it is not known
            (x and y averaged where they differ).
        tissue_fraction: (N,) float32, or None.
        section: (N,) int32, or None.
        qc: (N, K) float32, or None.
        qc_names: what the columns of `qc` measure.
        attrs: what the file says of itself, root and datasets together.
        source: the tool that wrote the file: "gigapath", "trident", "clam", "stamp", "slide2vec", "mussel",
            "slideflow", "published" (features and float coordinates without attributes) or "unknown".
        encoder: the tile encoder that the file names, or None.
        reordered: True where the file had the tiles in another order.
    """

    slide_id: str
    features: Array
    coords: Array
    frame: str = "level0"
    cells: Array | None = None
    tile_size_level0: float | None = None
    tissue_fraction: Array | None = None
    section: Array | None = None
    qc: Array | None = None
    qc_names: tuple[str, ...] = ()
    attrs: Attrs = dataclasses.field(default_factory=dict)
    source: str = "gigapath"
    encoder: str | None = None
    reordered: bool = False

    def __post_init__(self) -> None:
        if self.frame not in FRAMES:
            raise ValueError(f"TileEmbeddings: expected a frame of {', '.join(FRAMES)}, got {self.frame!r}.")
        count = len(self.features)
        if self.features.ndim != 2:
            raise ValueError(f"TileEmbeddings: expected features (N, D), got {self.features.shape}.")
        shapes = {"coords": (2,), "cells": (2,), "tissue_fraction": (), "section": (), "qc": (len(self.qc_names),)}
        for name, shape in shapes.items():
            if getattr(self, name) is not None:
                _check_shape(self, name, (count, *shape))

    def __repr__(self) -> str:
        """One line: a notebook shows it at the end of a cell, where the arrays would fill pages."""
        width, encoder = self.features.shape[1], self.encoder or "not stated"
        return (
            f"TileEmbeddings({self.slide_id!r}: {len(self):,} tiles, features {len(self)} x {width} "
            f"{self.features.dtype}, encoder {encoder})"
        )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def embed_dim(self) -> int:
        """D, the width of an embedding."""
        return int(self.features.shape[1])

    @property
    def coords_level0(self) -> Array:
        """(N, 2) top-left (x, y) in level-0 pixels; ValueError where the file measures in something else."""
        if self.frame != "level0":
            raise ValueError(
                f"{self.slide_id}: expected coordinates in level-0 pixels, got {FRAMES[self.frame]} ({self.source})."
            )
        return self.coords

    def take(self, indices: Array) -> "TileEmbeddings":
        """The tiles at `indices` (or where a boolean mask is True), which must keep their order."""
        names = ("features", "coords", "cells", "tissue_fraction", "section", "qc")
        held: dict[str, Any] = {name: getattr(self, name) for name in names}
        held = {name: None if value is None else value[indices] for name, value in held.items()}
        return dataclasses.replace(self, **held)

    def encoder_coords(self, tile_size: int = CELL) -> Array:
        """(N, 2) int64, `cells * tile_size`: what the slide encoder takes."""
        if self.cells is None:
            raise ValueError(f"{self.slide_id}: the cells of its tiles are not known; read the file with cells.")
        return self.cells.astype(np.int64) * tile_size


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """All that a feature file of any tool holds, unjudged: what is wrong with it can be said of it. N tiles, D width.

    Arrays are as stored, None where there are none; `coords` in the unit that `frame` (a key of FRAMES) names.

    Attributes:
        kind: "tile embeddings", "tiles", "tile coordinates", "slide embeddings" or "vectors" (embeddings whose
            coordinates are not at hand).
        tool: who wrote it, as `TileEmbeddings.source`.
        slide_id: as the file says, else its name without suffix.
        qc_names: what the columns of `qc` measure.
        vectors: the vectors of a slide's file by name.
        step: the distance (x, y) between neighbouring tiles that the file states, or None.
        missing: what the file lacks (its step, its coordinates) and how to state it.
        encoder, slide_encoder: the tile encoder that the file names, or None; of a slide's file the slide encoder.
        attrs: what the file says of itself, root and datasets together.
        complete: the mark of our files, None for other tools'.
    """

    path: Path
    tool: str
    slide_id: str
    kind: str = "tile embeddings"
    features: Array | None = None
    coords: Array | None = None
    cells: Array | None = None
    tissue_fraction: Array | None = None
    section: Array | None = None
    qc: Array | None = None
    qc_names: tuple[str, ...] = ()
    vectors: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    frame: str = "level0"
    step: tuple[float, float] | None = None
    missing: str = f"it does not say how far apart its tiles lie. State it with {STEP_OPTION}"
    encoder: str | None = None
    slide_encoder: str | None = None
    attrs: Attrs = dataclasses.field(default_factory=dict)
    complete: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SlideEmbeddings:
    """The embeddings of one slide.

    Attributes:
        slide_id: the slide's name.
        tile_mean: (1, in_chans) float32, the plain mean of its tile embeddings.
        states_mean: (depth + 1, D) float32, state i mean-pooled over the tiles, or None without a slide encoder.
        states_class: (depth + 1, D) float32, the class token of state i, or None.
        default_mean: (1, D) float32, the encoder's default output with mean pooling, or None.
        default_class: (1, D) float32, with the class token, or None.
        attrs: what is recorded at the file's root; `trained` is False where weights are random, `recipe` the name of
            another tool's where the embeddings were computed as that tool does.
    """

    slide_id: str
    tile_mean: Array
    states_mean: Array | None = None
    states_class: Array | None = None
    default_mean: Array | None = None
    default_class: Array | None = None
    attrs: Attrs = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        safe_name(self.slide_id)
        for name in ("tile_mean", "default_mean", "default_class"):
            value = getattr(self, name)
            if value is not None:
                _cast(self, name, np.float32, (1, np.asarray(value).shape[-1]))
        for name in ("states_mean", "states_class"):
            value = getattr(self, name)
            if value is not None:
                _cast(self, name, np.float32, np.asarray(value).shape[-2:])

    def select(self, name: str) -> Array:
        """The embedding of that name (`EmbeddingName`) as (D,) float32; ValueError where this slide has no
        such one."""
        wanted, recipe, made = parse_embedding(name), recipe_of(name), self.attrs.get("recipe")
        if made != name and (made is not None or (recipe is not None and not recipe.plain_places)):
            held = "the usual order and places of tiles" if made is None else f"those of {made}"
            raise ValueError(
                f"{self.slide_id}: expected a file made with the order and places of tiles of {name!r}, got one made "
                f"with {held}. Make it with `gigapath slide-embed --embedding {name}`."
            )
        if wanted.kind == "tile-mean":
            return np.asarray(self.tile_mean[0])
        if wanted.pooling == "tiles":
            raise ValueError(
                f"{self.slide_id}: expected one vector a slide, got {wanted}, which is one a tile. Make it with "
                f"`gigapath slide-embed --embedding {wanted}` and read it with read_features."
            )
        held = getattr(self, ("default_" if wanted.kind == "default" else "states_") + wanted.pooling)
        if held is None:
            raise ValueError(f"{self.slide_id}: it holds no {wanted}; without a slide encoder take tile-mean.")
        if wanted.kind == "default":
            return np.asarray(held[0])
        if wanted.kind == "all-states":
            return np.asarray(held.reshape(-1))
        state = len(held) - 1 if wanted.state is None else wanted.state
        if state >= len(held):
            raise ValueError(f"{self.slide_id}: expected a state of 0 to {len(held) - 1}, got {wanted}.")
        return np.asarray(held[state])


def in_row_major_order(places: Array) -> bool:
    """Whether places (N, 2) of (x, y) are sorted by (y, x), each once."""
    x, y = np.asarray(places, dtype=np.int64).T
    return bool(((np.diff(y) > 0) | ((np.diff(y) == 0) & (np.diff(x) > 0))).all())


def _cast(owner: Any, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    """Give a frozen dataclass's array its type; another shape or a value that the type can't hold raises."""
    value = _check_shape(owner, name, shape)
    cast = value.astype(dtype, copy=False)
    if value.dtype.kind in "iuf" and np.dtype(dtype).kind == "i" and not np.array_equal(cast, value):
        raise ValueError(f"{type(owner).__name__} {owner.slide_id}: expected {name} of whole {np.dtype(dtype)} values.")
    object.__setattr__(owner, name, cast)


def _check_shape(owner: Any, name: str, shape: tuple[int, ...]) -> Array:
    value = np.asarray(getattr(owner, name))
    if value.shape != shape:
        raise ValueError(f"{type(owner).__name__} {owner.slide_id}: expected {name} {shape}, got {value.shape}.")
    return value
