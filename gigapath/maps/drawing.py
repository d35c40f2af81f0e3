"""Maps as matplotlib figures: tiles over the slide with axes in millimetres, and the curves of a head's map."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.plots import COLOURS
from gigapath.maps.data import Colours, Place, TileMap, category_colour
from gigapath.preprocessing.slide import Overview

LONG_SIDE = 6.2  # of a panel, inches
SHORT_SIDE = 2.4  # the panels together are not drawn narrower
DPI = 150
_GROUND = "#f2f2f2"
_SOFT = "#444444"
_TITLE_SIZE, _TEXT_SIZE = 11, 9
_LINE, _MARGIN = 0.2, 0.08  # inches


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
    """A matplotlib figure: the slide, and beside it the tiles' colours over it; without a slide the tiles on the grid.

    Args:
        tile_map: what is drawn.
        place: where its tiles lie.
        overview: the slide within its bounds, or None.
        opacity: of the tiles over the slide.
        note: why there is no slide, in words.
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
    over.imshow(
        tile_rgba(tile_map, place, opacity),
        extent=_tiles_extent(place, frame),
        interpolation="nearest",
        zorder=2,
    )
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
        axis.plot(
            shares,
            spread.mean(axis=0),
            color=COLOURS[1],
            linestyle="--",
            marker="s",
            label=f"at random, mean and range of {len(spread)} orders",
        )
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
    return place.laid_out(np.concatenate([tile_map.colours.rgb(values), alpha[:, None]], axis=1))


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
    return Frame(
        unit,
        per,
        (left - margin) * per[0],
        (top - margin) * per[1],
        (grid[2] + 2 * margin) * per[0],
        (grid[3] + 2 * margin) * per[1],
    )


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
    """Frame one tile, black on white, so that it is seen on every colour."""
    from matplotlib.patches import Rectangle

    left, right, bottom, top = _tiles_extent(place, frame)
    rows, columns = place.grid_shape
    column, row = (place.cells[tile] - place.first_cell).tolist()
    wide, high = (right - left) / columns, (bottom - top) / rows
    for colour, width in (("white", 4.0), ("black", 2.0)):
        corner = left + column * wide, top + row * high
        axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=width, zorder=3))


def _pale(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """In light greys, so that neither stain nor dark tissue mixes with a map's colours."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return np.repeat((255 - (255 - grey) * 0.45).astype(np.uint8)[..., None], 3, axis=2)


def _show_slide(axis: Any, image: npt.NDArray[np.uint8], frame: Frame) -> None:
    axis.imshow(
        image,
        extent=(0, frame.width, frame.height, 0),
        interpolation="antialiased",
        zorder=1,
    )


def _heading(tile_map: TileMap, place: Place) -> list[str]:
    """Slide and map; model; what the colours mean; what was divided by what; where weight fell; a curve's verdict."""
    colours, facts = tile_map.colours, tile_map.facts
    scale = ""
    if colours.palette not in ("categories", "rgb"):
        scale = f" from {_figures(colours.low, colours)} to {_figures(colours.high, colours)}"
    sentences = [
        f"{place.slide_id}: {tile_map.title}",
        str(facts["model"]),
        f"colour: {colours.label}{scale} ({colours.scope})",
        f"normalisation: {facts['normalisation']}",
    ]
    return sentences + [f"{name}: {facts[name]}" for name in ("weight", "check") if facts.get(name)]


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _figures(value: float, colours: Colours) -> str:
    """Three figures of a limit; 0 where it is next to nothing beside the range."""
    return "0" if abs(value) < 1e-3 * (colours.high - colours.low) else f"{value:.3g}"


def _legend(figure: Any, axes: list[Any], tile_map: TileMap, opacity: float) -> None:
    """A colour bar, or the clusters that this slide has, in the colours that its tiles have over white."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    colours = tile_map.colours
    if colours.palette == "categories":
        counts = np.bincount(tile_map.values, minlength=len(colours.names))
        patches = [
            Patch(
                facecolor=(_hex(category_colour(index, len(colours.names))), opacity),
                edgecolor="0.3",
                label=f"{name}: {count:,}",
            )
            for index, (name, count) in enumerate(zip(colours.names, counts, strict=True))
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
    elif colours.palette != "rgb":
        shades = ScalarMappable(Normalize(colours.low, colours.high), colours.colormap)
        held = tile_map.values[np.isfinite(tile_map.values)]
        beyond = bool((held < colours.low).any()), bool((held > colours.high).any())
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(beyond, "both")
        bar = figure.colorbar(shades, ax=axes, extend=extend, shrink=0.8, aspect=30, pad=0.02, alpha=opacity)
        bar.set_label("\n".join(wrap(colours.label, 60)), fontsize=_TEXT_SIZE, parse_math=False)
        bar.ax.tick_params(labelsize=_TEXT_SIZE)
