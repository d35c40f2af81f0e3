"""A map: one value, colour or class for every tile of a slide, and where the tiles lie.

N tiles of a slide. Coordinates are (x, y) in absolute level-0 pixels; `bounds` is the scanned area, in which pictures
and GeoJSON are laid.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.features import TileEmbeddings

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]

# Clusters in up to eight colours of Okabe and Ito, in up to twelve of Tol's discrete rainbow: told apart by all.
FEW = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
MANY = (
    *("#D1BBD7", "#AE76A3", "#882E72", "#1965B0", "#5289C7", "#7BAFDE"),
    *("#4EB265", "#CAE0AB", "#F7F056", "#F4A736", "#E8601C", "#DC050C"),
)
# Of each slide, the values that the common colour range is taken from; and the shares of them that it cuts off.
RANGE_SAMPLE = 20_000
RANGE_PERCENTILES = (1.0, 99.0)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Place:
    """Where the tiles of a slide lie.

    Attributes:
        slide_id: the slide's name.
        cells: (N, 2) int32, (column, row), neighbours one apart.
        coords_level0: (N, 2) top-left corners, or None where the file has another unit.
        pitch_level0: (x, y) step between tiles in level-0 pixels, or None.
        mpp_level0: (x, y) microns per level-0 pixel, or None.
        slide_size: (W, H) of level 0, or None.
        bounds: (x, y, w, h) of the scanned area, or None where neither the file nor the slide says.
    """

    slide_id: str
    cells: IntArray
    coords_level0: npt.NDArray[Any] | None = None
    pitch_level0: tuple[float, float] | None = None
    mpp_level0: tuple[float, float] | None = None
    slide_size: tuple[int, int] | None = None
    bounds: tuple[int, int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def origin(self) -> tuple[int, int]:
        """Level-0 corner of the scanned area; (0, 0) where it is not known."""
        return (0, 0) if self.bounds is None else self.bounds[:2]

    @property
    def first_cell(self) -> tuple[int, int]:
        """The least column and the least row in use."""
        left, top = self.cells.min(axis=0).tolist()
        return int(left), int(top)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of the smallest rectangle of cells that holds all tiles."""
        columns, rows = (self.cells.max(axis=0) - self.cells.min(axis=0) + 1).tolist()
        return int(rows), int(columns)

    @property
    def grid_level0(self) -> tuple[float, float, float, float] | None:
        """(x, y, w, h) of that rectangle in absolute level-0 pixels, or None where coordinates are in another unit."""
        if self.coords_level0 is None or self.pitch_level0 is None:
            return None
        pitch = np.asarray(self.pitch_level0)
        corner = np.median(self.coords_level0 - (self.cells - self.first_cell) * pitch, axis=0)
        rows, columns = self.grid_shape
        return float(corner[0]), float(corner[1]), float(columns * pitch[0]), float(rows * pitch[1])

    def laid_out(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values (N, ...) at their cells: (rows, columns, ...), zero where there is no tile."""
        grid = np.zeros((*self.grid_shape, *values.shape[1:]), values.dtype)
        columns, rows = (self.cells - self.first_cell).T
        grid[rows, columns] = values
        return grid


def place_of(tiles: TileEmbeddings) -> Place:
    """What a feature file says of where its tiles lie; the tiles must have cells."""
    attrs, known = tiles.attrs, tiles.frame == "level0"
    step = tiles.tile_size_level0
    pitch = attrs.get("tile_size_level0") if tiles.source == "gigapath" else None
    pair = None if step is None or not known else _pair(step if pitch is None else pitch)
    size, mpp = attrs.get("slide_size"), attrs.get("mpp_level0")
    if size is None and attrs.get("level0_width") is not None and attrs.get("level0_height") is not None:
        size = attrs["level0_width"], attrs["level0_height"]  # TRIDENT's
    bounds = attrs.get("bounds")
    return Place(
        slide_id=tiles.slide_id,
        cells=np.asarray(tiles.encoder_coords(1), np.int32),
        coords_level0=tiles.coords if known else None,
        pitch_level0=pair,
        mpp_level0=None if mpp is None else _pair(mpp),
        slide_size=None if size is None else (int(size[0]), int(size[1])),
        bounds=None if bounds is None else (int(bounds[0]), int(bounds[1]), int(bounds[2]), int(bounds[3])),
    )


def _pair(value: Any) -> tuple[float, float]:
    x, y = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,)).tolist()
    return x, y


@dataclasses.dataclass(frozen=True)
class Colours:
    """How values become colours.

    Attributes:
        palette: "sequential" or "diverging" (of one number a tile), "categories" (of a whole number from 0) or "rgb"
            (of three numbers from 0 to 1).
        label: what the values are, how they are normalised, with their unit: the words at the colour bar.
        low: the value of the first colour; lower ones take it too.
        high: the value of the last colour.
        scope: what the range spans, in words.
        names: of the categories.
    """

    palette: str
    label: str
    low: float = 0.0
    high: float = 1.0
    scope: str = "fixed"
    names: tuple[str, ...] = ()

    def spanning(self, values: FloatArray, scope: str) -> "Colours":
        """The same with the range of `values`; a diverging one is symmetric about 0, others have none."""
        if self.palette not in ("sequential", "diverging"):
            return self
        held = values[np.isfinite(values)]
        low, high = np.percentile(held, RANGE_PERCENTILES).tolist() if len(held) else (0.0, 0.0)
        if self.palette == "diverging":
            high = max(abs(low), abs(high)) or 1.0
            low = -high
        if not high > low:  # one value everywhere
            high = low + (abs(low) or 1.0) * 1e-6
        return dataclasses.replace(self, low=low, high=high, scope=scope)

    def rgb(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """(N, 3) colours of values (N,), or (N, 3) where the palette is "rgb"."""
        from matplotlib import colormaps

        if self.palette == "rgb":
            return np.asarray(np.rint(np.clip(values, 0, 1) * 255), np.uint8)
        if self.palette == "categories":
            table = [category_colour(index, len(self.names)) for index in range(len(self.names))]
            return np.asarray(np.array(table, np.uint8)[values])
        share = np.clip((np.asarray(values, np.float64) - self.low) / (self.high - self.low), 0, 1)
        return np.asarray(colormaps[self.colormap](share, bytes=True))[..., :3]

    @property
    def colormap(self) -> str:
        """matplotlib's name of it; both are made for colour-blind readers too."""
        return "PuOr_r" if self.palette == "diverging" else "viridis"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        said: dict[str, Any] = {"palette": self.palette, "label": self.label, "scope": self.scope}
        if self.palette == "categories":
            colours = [
                "#{:02x}{:02x}{:02x}".format(*category_colour(i, len(self.names))) for i in range(len(self.names))
            ]
            said["categories"] = [
                {"name": name, "colour": colour} for name, colour in zip(self.names, colours, strict=True)
            ]
        elif self.palette != "rgb":
            said.update(colormap=self.colormap, low=self.low, high=self.high)
        return said


def category_colour(index: int, count: int) -> tuple[int, int, int]:
    """The colour of category `index` of `count`, 0 to 255."""
    code = (FEW if count <= len(FEW) else MANY)[index].lstrip("#")
    return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TileMap:
    """One map of one slide.

    Attributes:
        name: of its files.
        kind: one of `options.KINDS`.
        values: (N,) what is drawn, or (N, 3) for pca.
        colours: how.
        title: what it shows, without the slide's name.
        facts: what is stated of it: model, trained, layer, head, target, normalisation, ...; plain JSON values.
        arrays: further arrays for the `.npz`.
        curve: the deletion and insertion curve of a head's map, or None.
        mark: the tile that the map is about, or None.
    """

    name: str
    kind: str
    values: npt.NDArray[Any]
    colours: Colours
    title: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)
    curve: Mapping[str, Any] | None = None
    mark: int | None = None

    def sample(self) -> FloatArray:
        """Values for the common range: all, or evenly spread ones of many."""
        step = -(-len(self.values) // RANGE_SAMPLE)
        return np.asarray(self.values[:: max(1, step)], dtype=np.float64)
