"""The geometry of tiles: cells of the slide encoder's grid from coordinates; pixels and scale as files state them."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gigapath.features.data import STEP_OPTION, Array, Attrs, FeatureFileError
from gigapath.features.h5 import as_number

SLIDE2VEC_COORDINATES = ".coordinates.npz"
SLIDEFLOW_INDEX = ".index.npz"


def cells_of(coords: Array, step: tuple[float, float], *, who: str) -> Array:
    """The cells `round(coords / step)` of tiles, neighbours one apart.

    Where all tiles lie on one grid of that step, wherever it starts, its phase is taken out before rounding, so that
    corners rounded to whole pixels, or a grid that starts half a step in, cannot put two neighbours into one cell. The
    grid's own first cell is floor(coords / step) then, as the slide encoder and the tools themselves divide.

    Args:
        coords: (N, 2) top-left (x, y), any unit.
        step: distance between neighbouring tiles (x, y) in that unit.
        who: the file, for errors.

    Returns:
        (N, 2) int32 (column, row).

    Raises:
        FeatureFileError: coordinates that are not finite, a step that is not positive, two tiles on one cell.
    """
    pitch = np.asarray(step, dtype=np.float64)
    if pitch.shape != (2,) or not (np.isfinite(pitch) & (pitch > 0)).all():
        raise FeatureFileError(
            f"{who}: expected a positive step between tiles, got {step!r}. State it with {STEP_OPTION}."
        )
    places = np.asarray(coords, dtype=np.float64)
    finite = np.isfinite(places).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise FeatureFileError(f"{who}: expected finite coordinates, got {places[row].tolist()} in row {row}.")
    if len(places) == 0:
        return np.zeros((0, 2), np.int32)
    cells, _ = nearest_cells(places, pitch)
    if np.abs(cells).max() >= 2**31:
        raise FeatureFileError(f"{who}: its coordinates are too far out for a step of {pitch.tolist()}.")
    whole = cells.astype(np.int32)
    twin = _first_twin(whole)
    if twin is not None:
        first, second = (places[row].tolist() for row in twin)
        seen = observed_step(places)
        hint = f" Its tiles lie {seen:g} apart." if seen else ""
        raise FeatureFileError(
            f"{who}: two tiles fall on one cell at a step of {pitch[0]:g} x {pitch[1]:g} ({first} and {second}).{hint} "
            f"State the distance between neighbouring tiles with {STEP_OPTION}, or tile again without overlap."
        )
    return whole


def nearest_cells(places: Array, step: Array) -> tuple[Array, Array]:
    """The cells (N, 2), whole floats, of places (N, 2) of at least one tile, and which tiles (N,) bool lie off the one
    grid of this step that the others may share."""
    origin = places.min(axis=0)
    steps = (places - origin) / step
    off = (np.abs(steps - np.rint(steps)) * step > np.maximum(1.0, 1e-3 * step)).any(axis=1)  # a pixel is rounding
    if off.any():  # halves go up: numpy's halves-to-even would join neighbours
        return np.floor(places / step + 0.5), off
    # Corners on a step that is no whole number were rounded, or cut, by up to one unit; those on one are off by what
    # float32 lacks. Half a step at most: a unit may be larger than a step.
    rounding = np.where(step == np.rint(step), 1e-4 * step, np.minimum(1.0, 0.5 * step))
    return np.rint(steps) + np.floor((origin + rounding) / step), off


def observed_step(coords: Array) -> float | None:
    """The smallest distance between two columns or two rows of tiles: a hint for messages, never a silent choice.

    Differences of up to one unit are rounding, not columns; None where there is only one tile or column.
    """
    gaps = [np.diff(np.unique(np.asarray(coords, dtype=np.float64)[:, axis])) for axis in (0, 1)]
    distances = np.concatenate([gap[gap > 1] for gap in gaps])
    return float(distances.min()) if len(distances) else None


def row_major(cells: Array) -> Array | None:
    """The order that sorts cells by (row, column), or None where they are sorted already."""
    keys = _keys(cells)
    if (np.diff(keys) > 0).all():
        return None
    return np.argsort(keys, kind="stable")


def _keys(cells: Array) -> Array:
    """(N,) int64 that order cells by (row, column)."""
    if len(cells) == 0:
        return np.zeros(0, np.int64)
    low = cells.min(axis=0).astype(np.int64)
    columns, rows = (cells.astype(np.int64) - low).T
    return np.asarray(rows * (columns.max() + 1) + columns)


def _first_twin(cells: Array) -> tuple[int, int] | None:
    """The rows of the first two equal cells, or None."""
    keys = _keys(cells)
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(np.diff(keys[order]) == 0)
    if len(same) == 0:
        return None
    first, second = sorted((int(order[same[0]]), int(order[same[0] + 1])))
    return first, second


def all_facts(attrs: Attrs) -> dict[str, Any]:
    """What the file says of itself, and what the file that it was converted from said."""
    try:
        earlier = json.loads(attrs["converted_attrs"])
    except (KeyError, TypeError, ValueError):  # a file of the tool itself
        earlier = {}
    return {**(earlier if isinstance(earlier, dict) else {}), **attrs}


def flat_json(value: Any) -> dict[str, Any]:
    """The plain values of nested JSON objects by their own names; the outermost of equal names stays."""
    if not isinstance(value, Mapping):
        return {}
    found: dict[str, Any] = {}
    for inner in value.values():
        found.update(flat_json(inner))
    found.update({str(name): entry for name, entry in value.items() if isinstance(entry, str | int | float | bool)})
    return found


def two_axes(array: Array) -> Array:
    """(N, D) of (1, N, D), (N, 1, D) and the like: axes of a batch, wherever some tools leave one."""
    while array.ndim > 2 and 1 in array.shape:
        array = np.squeeze(array, axis=array.shape.index(1))
    return array


def tile_pixels(attrs: Attrs, source: str) -> int | None:
    """Side of a tile in pixels, where the file says so.

    Args:
        attrs: all attributes of the file.
        source: the tool that wrote it.
    """
    facts, origin = all_facts(attrs), attrs.get("converted_from", source)
    for name in ("tile_size", "tile_size_px", "requested_tile_size_px", "patch_size"):
        value = as_number(facts.get(name))
        # CLAM's and Mussel's patch_size counts pixels of a level, not of the encoder's input.
        if value is not None and not (name == "patch_size" and origin in ("clam", "mussel")):
            return int(value)
    return None


def tile_mpp(attrs: Attrs) -> float | None:
    """Microns per pixel of a tile, where the file says so."""
    facts = all_facts(attrs)
    value = as_number(facts.get("mpp") or facts.get("requested_spacing_um"))
    microns, pixels = as_number(facts.get("tile_size_um")), as_number(facts.get("tile_size_px"))
    return microns / pixels if value is None and microns is not None and pixels else value
