"""A map, one value, color or class for every tile of a slide, and where its tiles lie; drawn as a matplotlib figure
with axes in millimetres, as one pixel a cell, and as GeoJSON for QuPath.

N tiles of a slide. Coordinates are (x, y) in absolute level-0 pixels; `bounds` is the scanned area, in which pictures
and GeoJSON are laid.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.plots import COLOURS
from gigapath.features import TileEmbeddings
from gigapath.preprocessing.slide import Overview

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]

# Clusters in up to eight colors of Okabe and Ito, in up to twelve of Tol's discrete rainbow: told apart by all. The
# first few lie farthest apart half transparent over a slide, with red-green blindness too; black hides what is beneath.
FEW = ("#0072B2", "#F0E442", "#009E73", "#D55E00", "#56B4E9", "#E69F00", "#CC79A7", "#000000")
MANY = (
    *("#D1BBD7", "#AE76A3", "#882E72", "#1965B0", "#5289C7", "#7BAFDE"),
    *("#4EB265", "#CAE0AB", "#F7F056", "#F4A736", "#E8601C", "#DC050C"),
)
# Of each slide, the values that the common color range is taken from; and the shares of them that it cuts off.
RANGE_SAMPLE = 20_000
RANGE_PERCENTILES = (1.0, 99.0)

LONG_SIDE = 6.2  # of a panel, inches
SHORT_SIDE = 2.4  # the panels together are not drawn narrower
DPI = 150
_GROUND = "#f2f2f2"
_SOFT = "#444444"
_TITLE_SIZE, _TEXT_SIZE = 11, 9
_LINE, _MARGIN = 0.2, 0.08  # inches


@dataclass(frozen=True, eq=False, kw_only=True)
class Place:
    """Where the tiles of a slide lie.

    Attributes:
        slide_id: the slide's name.
        cells: (N, 2) int32, (column, row), neighbors one apart.
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


@dataclass(frozen=True)
class Colors:
    """How values become colors.

    Attributes:
        palette: "sequential" or "diverging" (of one number a tile), "categories" (of a whole number from 0) or "rgb"
            (of three numbers from 0 to 1).
        label: what the values are, how they are normalized, with their unit: the words at the color bar.
        low: the value of the first color; lower ones take it too.
        high: the value of the last color.
        scope: what the range spans.
        names: of the categories.
    """

    palette: str
    label: str
    low: float = 0.0
    high: float = 1.0
    scope: str = "fixed"
    names: tuple[str, ...] = ()

    def spanning(self, values: FloatArray, scope: str) -> "Colors":
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
        """(N, 3) colors of values (N,), or (N, 3) where the palette is "rgb"."""
        from matplotlib import colormaps

        if self.palette == "rgb":
            return np.asarray(np.rint(np.clip(values, 0, 1) * 255), np.uint8)
        if self.palette == "categories":
            return np.asarray(np.array([_from_hex(code) for code in self.category_colors], np.uint8)[values])
        share = np.clip((np.asarray(values, np.float64) - self.low) / (self.high - self.low), 0, 1)
        return np.asarray(colormaps[self.colormap](share, bytes=True))[..., :3]

    @property
    def colormap(self) -> str:
        """matplotlib's name of it; both are made for color-blind readers too."""
        return "PuOr_r" if self.palette == "diverging" else "viridis"

    @property
    def category_colors(self) -> tuple[str, ...]:
        """Of each category, as "#rrggbb"."""
        return (FEW if len(self.names) <= len(FEW) else MANY)[: len(self.names)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        stated: dict[str, Any] = {"palette": self.palette, "label": self.label, "scope": self.scope}
        if self.palette == "categories":
            both = zip(self.names, self.category_colors, strict=True)
            stated["categories"] = [{"name": name, "colour": color.lower()} for name, color in both]
        elif self.palette != "rgb":
            stated.update(colormap=self.colormap, low=self.low, high=self.high)
        return stated


def _from_hex(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code.removeprefix("#")))


@dataclass(frozen=True, eq=False, kw_only=True)
class TileMap:
    """One map of one slide.

    Attributes:
        name: of its files.
        kind: one of `options.KINDS`.
        values: (N,) what is drawn, or (N, 3) for pca.
        colors: how.
        title: what it shows, without the slide's name.
        facts: what is stated of it: model, trained, layer, head, target, normalization, ...; plain JSON values.
        arrays: further arrays for the `.npz`.
        curve: the deletion and insertion curve of a head's map, or None.
        mark: the tile that the map is about, or None.
    """

    name: str
    kind: str
    values: npt.NDArray[Any]
    colors: Colors
    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    curve: Mapping[str, Any] | None = None
    mark: int | None = None

    def sample(self) -> FloatArray:
        """Values for the common range: all, or evenly spread ones of many."""
        step = -(-len(self.values) // RANGE_SAMPLE)
        return np.asarray(self.values[:: max(1, step)], dtype=np.float64)


@dataclass(frozen=True)
class Frame:
    """The unit of a picture's axes and what they span: x from `left`, y downwards from `top`."""

    unit: str
    per_pixel: tuple[float, float]
    left: float
    top: float
    width: float
    height: float


def draw_map(
    tile_map: TileMap, place: Place, overview: Overview | None = None, *, opacity: float = 0.65, note: str = ""
) -> Any:
    """A matplotlib figure: the slide, and beside it the tiles' colors over it; without a slide the tiles on the grid.

    Args:
        tile_map: what is drawn.
        place: where its tiles lie.
        overview: the slide within its bounds, or None.
        opacity: of the tiles over the slide.
        note: why there is no slide.
    """
    frame = _frame(place, overview)
    tall = frame.height > 0.75 * frame.width
    columns, rows = (2, 1) if overview is not None and tall else (1, 2) if overview is not None else (1, 1)
    scale = LONG_SIDE / max(frame.width, frame.height)
    width, height = max(SHORT_SIDE / columns, frame.width * scale), max(SHORT_SIDE / rows, frame.height * scale)
    figure_width = max(7.5, columns * (width + 0.7) + 1.4)
    heading = _heading(tile_map, place)
    figure = _figure(figure_width, rows * (height + 0.75) + 0.2, heading)
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    if overview is not None:
        _show_slide(axes[0], overview.image, frame)
        axes[0].set_title("slide", fontsize=_TEXT_SIZE)
        _show_slide(axes[1], _pale(overview.image), frame)
    else:
        axes[0].set_facecolor(_GROUND)
    over, opacity = axes[-1], opacity if overview is not None else 1.0
    colors = tile_rgba(tile_map, place, opacity)
    over.imshow(colors, extent=_tiles_extent(place, frame), interpolation="nearest", zorder=2)
    over.set_title("map" if overview is not None else note or "tiles on the grid", fontsize=_TEXT_SIZE)
    if tile_map.mark is not None:
        _outline(over, tile_map.mark, place, frame)
    for axis in axes:
        axis.set_xlim(frame.left, frame.left + frame.width)
        axis.set_ylim(frame.top + frame.height, frame.top)
        axis.set_aspect("equal")
        axis.set_xlabel(f"x ({frame.unit})", fontsize=_TEXT_SIZE)
        axis.set_ylabel(f"y ({frame.unit})", fontsize=_TEXT_SIZE)
        axis.tick_params(labelsize=_TEXT_SIZE)
        axis.label_outer()
    _legend(figure, list(axes), tile_map, opacity)
    return figure


def draw_curve(tile_map: TileMap, place: Place) -> Any:
    """A matplotlib figure of a head's map: the class's score as its first tiles are left out or brought in."""
    curve = tile_map.curve
    if curve is None:
        raise ValueError(f"draw_curve: expected a map of a fitted head, got {tile_map.kind!r}.")
    heading = [
        f"{place.slide_id}: does this map rank tiles by their weight for the score?",
        tile_map.title,
        str(tile_map.facts["model"]),
        str(tile_map.facts["check"]),
    ]
    figure = _figure(9.0, 4.3, heading)
    both = figure.subplots(1, 2, sharey=True)
    for axis, way, words in zip(both, ("deletion", "insertion"), ("tiles left out", "tiles brought in"), strict=True):
        shares = np.asarray(curve["shares"]) * 100
        spread = np.asarray(curve[f"random_{way}"])
        axis.plot(shares, curve[way], color=COLOURS[0], marker="o", label="highest in the map first")
        label = f"at random, mean and range of {len(spread)} orders"
        axis.plot(shares, spread.mean(axis=0), color=COLOURS[1], linestyle="--", marker="s", label=label)
        axis.fill_between(shares, spread.min(axis=0), spread.max(axis=0), color=COLOURS[1], alpha=0.2, linewidth=0)
        axis.set_xlabel(f"{words} (% of {len(tile_map.values):,}; one stays)")
        axis.set_title(
            f"{way}: {curve[f'{way}_minus_random']:+.3g} against random\n"
            f"({'below' if way == 'deletion' else 'above'} 0 speaks for the map)",
            fontsize=10,
        )
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel(str(tile_map.facts.get("score", "score")))
    handles, words = both[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=2, frameon=False, fontsize=_TEXT_SIZE)
    return figure


def tile_rgba(tile_map: TileMap, place: Place, opacity: float = 1.0) -> npt.NDArray[np.uint8]:
    """(rows, columns, 4), one pixel a cell of the smallest rectangle with all tiles; clear where there is none."""
    held = np.isfinite(tile_map.values) if tile_map.values.ndim == 1 else np.ones(len(tile_map.values), bool)
    values = np.where(held, tile_map.values, 0) if tile_map.values.ndim == 1 else tile_map.values
    alpha = np.where(held, round(255 * opacity), 0).astype(np.uint8)
    return place.laid_out(np.concatenate([tile_map.colors.rgb(values), alpha[:, None]], axis=1))


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float, heading: Sequence[str]) -> Any:
    """A figure of `width` x `height` inches beneath a heading, whose first sentence is its title."""
    from matplotlib.figure import Figure

    first, *others = heading
    lines = [(line, True) for line in wrap(first, int(width * 11.5))]
    lines += [(line, False) for sentence in others for line in wrap(sentence, int(width * 15))]
    whole = height + _LINE * len(lines) + 2 * _MARGIN
    figure = Figure(figsize=(width, whole), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / whole))  # type: ignore[call-arg, union-attr]
    for row, (line, is_title) in enumerate(lines):
        figure.text(
            _MARGIN / width,
            1 - (_LINE * row + _MARGIN) / whole,
            line,
            va="top",
            fontsize=_TITLE_SIZE if is_title else _TEXT_SIZE,
            fontweight="bold" if is_title else "normal",
            color="black" if is_title else _SOFT,
            parse_math=False,  # an id may hold a dollar sign
        )
    return figure


def _frame(place: Place, overview: Overview | None) -> Frame:
    """Axes within the bounds where they are known, else around the tiles."""
    grid = place.grid_level0
    if grid is None:
        rows, columns = place.grid_shape
        column, row = place.first_cell
        return Frame("tiles", (1.0, 1.0), column - 0.5, row - 0.5, columns + 1, rows + 1)
    per, unit = (1.0, 1.0), "level-0 pixels"
    if place.mpp_level0 is not None:
        per, unit = (place.mpp_level0[0] / 1000, place.mpp_level0[1] / 1000), "mm"
    if overview is not None:
        height, width = overview.image.shape[:2]
        return Frame(unit, per, 0, 0, width * overview.scale[0] * per[0], height * overview.scale[1] * per[1])
    if place.bounds is not None:
        return Frame(unit, per, 0, 0, place.bounds[2] * per[0], place.bounds[3] * per[1])
    left, top = grid[0] - place.origin[0], grid[1] - place.origin[1]
    margin = 0.03 * max(grid[2:])
    width, height = grid[2] + 2 * margin, grid[3] + 2 * margin
    return Frame(unit, per, (left - margin) * per[0], (top - margin) * per[1], width * per[0], height * per[1])


def _tiles_extent(place: Place, frame: Frame) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of the tiles' rectangle on the axes."""
    if place.grid_level0 is None:
        rows, columns = place.grid_shape
        column, row = place.first_cell
        return column, column + columns, row + rows, row
    x, y, width, height = place.grid_level0
    left, top = x - place.origin[0], y - place.origin[1]
    along, down = frame.per_pixel
    return left * along, (left + width) * along, (top + height) * down, top * down


def _outline(axis: Any, tile: int, place: Place, frame: Frame) -> None:
    """Frame one tile, black on white, so that it is seen on every color."""
    from matplotlib.patches import Rectangle

    left, right, bottom, top = _tiles_extent(place, frame)
    rows, columns = place.grid_shape
    column, row = (place.cells[tile] - place.first_cell).tolist()
    wide, high = (right - left) / columns, (bottom - top) / rows
    for color, width in (("white", 4.0), ("black", 2.0)):
        corner = left + column * wide, top + row * high
        axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=color, linewidth=width, zorder=3))


def _pale(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """In light grays, so that neither stain nor dark tissue mixes with a map's colors."""
    gray = image @ np.array([0.299, 0.587, 0.114])
    return np.repeat((255 - (255 - gray) * 0.45).astype(np.uint8)[..., None], 3, axis=2)


def _show_slide(axis: Any, image: npt.NDArray[np.uint8], frame: Frame) -> None:
    axis.imshow(image, extent=(0, frame.width, frame.height, 0), interpolation="antialiased", zorder=1)


def _heading(tile_map: TileMap, place: Place) -> list[str]:
    """Slide and map; model; what the colors mean; what was divided by what; where weight fell; a curve's verdict."""
    colors, facts = tile_map.colors, tile_map.facts
    scale = ""
    if colors.palette not in ("categories", "rgb"):
        scale = f" from {_figures(colors.low, colors)} to {_figures(colors.high, colors)}"
    sentences = [
        f"{place.slide_id}: {tile_map.title}",
        str(facts["model"]),
        f"color: {colors.label}{scale} ({colors.scope})",
        f"normalization: {facts['normalisation']}",
    ]
    return sentences + [f"{name}: {facts[name]}" for name in ("weight", "check") if facts.get(name)]


def _figures(value: float, colors: Colors) -> str:
    """Three figures of a limit; 0 where it is next to nothing beside the range."""
    return "0" if abs(value) < 1e-3 * (colors.high - colors.low) else f"{value:.3g}"


def _legend(figure: Any, axes: list[Any], tile_map: TileMap, opacity: float) -> None:
    """A color bar, or the clusters that this slide has, in the colors that its tiles have over white."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    colors = tile_map.colors
    if colors.palette == "categories":
        counts = np.bincount(tile_map.values, minlength=len(colors.names))
        patches = [
            Patch(facecolor=(color, opacity), edgecolor="0.3", label=f"{name}: {count:,}")
            for name, color, count in zip(colors.names, colors.category_colors, counts, strict=True)
            if count
        ]
        beside = axes[-1] if axes[-1].get_subplotspec().rowspan.start == 0 else axes[0]
        beside.legend(
            handles=patches,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            frameon=False,
            fontsize=_TEXT_SIZE,
            title="tiles" if len(patches) == len(counts) else f"tiles, {len(patches)} of\n{len(counts)} clusters",
            title_fontsize=_TEXT_SIZE,
            alignment="left",
        )
    elif colors.palette != "rgb":
        shades = ScalarMappable(Normalize(colors.low, colors.high), colors.colormap)
        held = tile_map.values[np.isfinite(tile_map.values)]
        beyond = bool((held < colors.low).any()), bool((held > colors.high).any())
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(beyond, "both")
        bar = figure.colorbar(shades, ax=axes, extend=extend, shrink=0.8, aspect=30, pad=0.02, alpha=opacity)
        bar.set_label("\n".join(wrap(colors.label, 60)), fontsize=_TEXT_SIZE, parse_math=False)
        bar.ax.tick_params(labelsize=_TEXT_SIZE)


def map_geojson(tile_map: TileMap, place: Place) -> str:
    """The map's tiles for QuPath: its values as measurements, clusters as classes."""
    colors = tile_map.colors
    if colors.palette == "rgb":
        measurements = {f"component {i + 1} (0 to 1)": tile_map.values[:, i] for i in range(3)}
        return tiles_geojson(place, measurements, colors=colors.rgb(tile_map.values))
    if colors.palette == "categories":
        both = list(zip(colors.names, map(_from_hex, colors.category_colors), strict=True))
        classes = [both[value] for value in tile_map.values.tolist()]
        return tiles_geojson(place, {"cluster": tile_map.values + 1}, classes=classes)
    shown = colors.rgb(np.nan_to_num(tile_map.values))
    return tiles_geojson(place, {colors.label: tile_map.values}, colors=shown)


def tiles_geojson(
    place: Place,
    measurements: Mapping[str, npt.NDArray[Any]],
    *,
    classes: Sequence[tuple[str, tuple[int, ...]]] | None = None,
    colors: npt.NDArray[np.uint8] | None = None,
) -> str:
    """A FeatureCollection (RFC 7946, but in pixels) with one tile object of QuPath's a tile.

    QuPath shows a slide within its bounds (`openslide.bounds-*`), so coordinates are level-0 pixels less the bounds'
    corner.

    Args:
        place: the tiles, with level-0 coordinates.
        measurements: name -> (N,); NaN is left out.
        classes: (name, color) of each tile's class, or None.
        colors: (N, 3) of tiles without a class, or None.

    Raises:
        ValueError: the coordinates are not in level-0 pixels.
    """
    if place.coords_level0 is None or place.pitch_level0 is None:
        raise ValueError(
            f"{place.slide_id}: expected tiles in level-0 pixels for GeoJSON, got another unit. Convert the "
            "file with gigapath convert, or tile and embed the slide anew."
        )
    corners = np.asarray(place.coords_level0, np.float64) - place.origin
    width, height = place.pitch_level0
    columns = {name: np.asarray(values, np.float64).tolist() for name, values in measurements.items()}
    features = []
    for row, (left, top) in enumerate(corners.tolist()):
        right, bottom = left + width, top + height
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        properties: dict[str, Any] = {
            "objectType": "tile",
            "measurements": {name: values[row] for name, values in columns.items() if values[row] == values[row]},
        }
        if classes is not None:
            name, color = classes[row]
            properties["classification"] = {"name": name, "color": list(color)}
        if colors is not None:
            properties["color"] = colors[row].tolist()
        geometry = {"type": "Polygon", "coordinates": [[[_plain(x), _plain(y)] for x, y in ring]]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":"), allow_nan=False)


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() else value
