"""The files of a map, which the report reads too.

`OUT/<slide_id>/` holds for every map, with the same stem NAME:

    NAME.json          what the map is (below); written last, so a map with a JSON is whole
    NAME.png           the figure: slide beside map, axes in mm, title, colour bar
    NAME_overlay.png   RGBA, one pixel a cell, clear where there is no tile: to lay over the slide, scaled up without
                       smoothing, at `overlay.level0` less the corner of `slide.bounds`
    NAME.geojson       tiles for QuPath, relative to the bounds; absent where coordinates are not level-0 pixels
    NAME.npz           `values` (N,) or (N, 3) as drawn, `coords_level0` (N, 2), `cells` (N, 2), and by kind `weights`
                       (H, N), `class_token`, `zero_keys` (H,), `branches` (H, B), `components` (3, D), ...
    NAME_curve.png     for maps of a fitted head: deletion and insertion

The JSON: `format` 1, `slide_id`, `name`, `kind` (of `options.KINDS`), `title`, `model` (in words), `trained` (false
where a part has random weights), `layer`, `head`, `query`, `target` (null where it has none), `normalisation`,
`heuristic` (true for rollout), `weight` (of attention: its shares on tiles, class token and zero keys), `check` (of a
head's map: what its curve says of it), `made_from` (below), `colour` (`palette`, `label`, `scope`; `low`, `high`,
`colormap`; or `categories` of `name`, `colour` and `tiles`), `tiles`, `tile` (`pitch_level0`, `pitch_mm`), `slide`
(`size`, `bounds`, `mpp_level0`, `at_hand`), `overlay` (`level0` [x, y, w, h] absolute, `shape` [rows, columns]),
`marked_tile` (the row that the map is about, outlined in the figure), `files` (their names by role), `curve` (numbers
of the curve), `details` (what else the kind states, such as the weight on zero keys), `note`, `version`, `terms`. What
is not known is null. No paths.

`made_from` tells a map that is out of date: `features_sha256` and `tiles_sha256` of the slide's embeddings and of the
places of its tiles, `features_folder` and `features_digest` as the run's status file names them (null where there is
none), `cohort_sha256` of all slides that gave the range and what is fitted, `head_sha256` of a fitted head's tensors.
A map that is made again loses its JSON first, so that what a stopped run leaves is never taken for whole.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gigapath
from gigapath.files import atomic_file, write_bytes_atomic, write_json_atomic, write_text_atomic
from gigapath.maps.data import Place, TileMap, category_colour
from gigapath.maps.drawing import draw_curve, draw_map, png, tile_rgba
from gigapath.maps.geojson import tiles_geojson
from gigapath.preprocessing.slide import Overview

FORMAT = 1
TERMS = "For research use only, not for diagnosis."
STATED = ("model", "trained", "layer", "head", "query", "target", "normalisation", "heuristic", "weight", "check")


def write_arrays(folder: Path, tile_map: TileMap, place: Place) -> None:
    """Write `NAME.npz`, whole or not at all; the JSON of an earlier map of that name goes before."""
    with contextlib.suppress(FileNotFoundError):
        (folder / f"{tile_map.name}.json").unlink()
    arrays = {"values": tile_map.values, "cells": place.cells, **tile_map.arrays}
    if place.coords_level0 is not None:
        arrays["coords_level0"] = place.coords_level0
    with atomic_file(folder / f"{tile_map.name}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_pictures(
    folder: Path,
    tile_map: TileMap,
    place: Place,
    overview: Overview | None,
    *,
    made_from: Mapping[str, Any],
    opacity: float,
    note: str = "",
) -> list[str]:
    """Write everything of a map but its arrays, its JSON last.

    Args:
        folder: of the slide's maps.
        tile_map: the map, with its range.
        place: where its tiles lie.
        overview: the slide to draw on, or None for the tiles' grid alone.
        made_from: digests of what it was made of, for the JSON.
        opacity: of the map on the slide, 0 to 1.
        note: what to say beneath the picture, such as why the slide is not shown.

    Returns:
        the names of all its files, the arrays' too.
    """
    name = tile_map.name
    files = {"npz": f"{name}.npz", "png": f"{name}.png", "overlay": f"{name}_overlay.png"}
    write_bytes_atomic(folder / files["png"], png(draw_map(tile_map, place, overview, opacity=opacity, note=note)))
    with atomic_file(folder / files["overlay"]) as temporary:
        Image.fromarray(tile_rgba(tile_map, place)).save(temporary, format="PNG")
    if place.coords_level0 is not None and place.pitch_level0 is not None:
        files["geojson"] = f"{name}.geojson"
        write_text_atomic(folder / files["geojson"], map_geojson(tile_map, place))
    if tile_map.curve is not None:
        files["curve"] = f"{name}_curve.png"
        write_bytes_atomic(folder / files["curve"], png(draw_curve(tile_map, place)))
    said = describe(tile_map, place, files, made_from=made_from, at_hand=overview is not None, note=note)
    write_json_atomic(folder / f"{name}.json", said)
    return [*files.values(), f"{name}.json"]


def map_geojson(tile_map: TileMap, place: Place) -> str:
    """The map's tiles for QuPath: its values as measurements, clusters as classes."""
    colours = tile_map.colours
    if colours.palette == "rgb":
        measurements = {f"component {i + 1} (0 to 1)": tile_map.values[:, i] for i in range(3)}
        return tiles_geojson(place, measurements, colours=colours.rgb(tile_map.values))
    if colours.palette == "categories":
        count = len(colours.names)
        classes = [(colours.names[value], category_colour(value, count)) for value in tile_map.values.tolist()]
        return tiles_geojson(place, {"cluster": tile_map.values + 1}, classes=classes)
    shown = colours.rgb(np.nan_to_num(tile_map.values))
    return tiles_geojson(place, {colours.label: tile_map.values}, colours=shown)


def describe(
    tile_map: TileMap,
    place: Place,
    files: dict[str, str],
    *,
    made_from: Mapping[str, Any],
    at_hand: bool,
    note: str = "",
) -> dict[str, Any]:
    """The JSON of a map; see this module's docstring."""
    facts = dict(tile_map.facts)
    pitch, mpp, grid = place.pitch_level0, place.mpp_level0, place.grid_level0
    pitch_mm = None if pitch is None or mpp is None else [p * m / 1000 for p, m in zip(pitch, mpp, strict=True)]
    stated = {name: facts.pop(name, None) for name in STATED}
    colour = tile_map.colours.to_dict()
    if "categories" in colour:
        counts = np.bincount(tile_map.values, minlength=len(tile_map.colours.names)).tolist()
        colour["categories"] = [{**each, "tiles": n} for each, n in zip(colour["categories"], counts, strict=True)]
    return {
        "format": FORMAT,
        "slide_id": place.slide_id,
        "name": tile_map.name,
        "kind": tile_map.kind,
        "title": tile_map.title,
        **stated,
        "heuristic": bool(stated["heuristic"]),
        "made_from": {**made_from, "head_sha256": facts.pop("head_sha256", None)},
        "colour": colour,
        "tiles": len(place),
        "tile": {"pitch_level0": None if pitch is None else list(pitch), "pitch_mm": pitch_mm},
        "slide": {
            "size": None if place.slide_size is None else list(place.slide_size),
            "bounds": None if place.bounds is None else list(place.bounds),
            "mpp_level0": None if mpp is None else list(mpp),
            "at_hand": at_hand,
        },
        "overlay": {"level0": None if grid is None else list(grid), "shape": list(place.grid_shape)},
        "files": files,
        "curve": None if tile_map.curve is None else dict(tile_map.curve),
        "marked_tile": tile_map.mark,
        "details": facts,
        "note": note,
        "version": gigapath.__version__,
        "terms": TERMS,
    }
