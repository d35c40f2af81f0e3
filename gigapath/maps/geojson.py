"""Tiles as GeoJSON that QuPath opens: rectangles with measurements and classes, relative to the slide's bounds."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.maps.data import Place


def tiles_geojson(
    place: Place,
    measurements: Mapping[str, npt.NDArray[Any]],
    *,
    classes: Sequence[tuple[str, tuple[int, int, int]]] | None = None,
    colours: npt.NDArray[np.uint8] | None = None,
) -> str:
    """A FeatureCollection (RFC 7946, but in pixels) with one tile object of QuPath's a tile.

    QuPath shows a slide within its bounds (`openslide.bounds-*`), so coordinates are level-0 pixels less the bounds'
    corner.

    Args:
        place: the tiles, with level-0 coordinates.
        measurements: name -> (N,); NaN is left out.
        classes: (name, colour) of each tile's class, or None.
        colours: (N, 3) of tiles without a class, or None.

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
            name, colour = classes[row]
            properties["classification"] = {"name": name, "color": list(colour)}
        if colours is not None:
            properties["color"] = colours[row].tolist()
        geometry = {"type": "Polygon", "coordinates": [[[_plain(x), _plain(y)] for x, y in ring]]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":"), allow_nan=False)


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() else value
