"""Flags per tile, seen at low power: numbers to look at and to filter by later; no tile is left out for them."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing import stain
from gigapath.preprocessing.grid import Grid
from gigapath.preprocessing.slide import Overview, Slide
from gigapath.preprocessing.tissue import box_means

QC_NAMES = ("focus", "white", "black", "pen", "saturation")

BLACK_LEVEL = 60  # no channel above this
FOCUS_MPP = 4.0  # cells are 2 to 4 pixels wide here, and most pyramids hold a level near it
FOCUS_PIXELS = 100_000_000  # a level larger than this is not read for the focus alone
STRIP_PIXELS = 1_500_000
RIM = 16  # pixels of the level
TEXTURE = 2.0  # mean grey levels per pixel below which there is nothing to judge the focus by


def tile_qc(slide: Slide, overview: Overview, grid: Grid, cells: NDArray[np.int32]) -> NDArray[np.float32]:
    """Measure every tile.

    `focus` is the mean spatial frequency of the tile at 4 microns a pixel, in cycles per millimetre, whatever the
    contrast: sharp sections lie at 90 to 140, blurred by 2 microns at 70, by 4 at 40; NaN where nothing can be judged.
    `white`, `black` and `pen` are shares of the tile's area, `saturation` its mean in 0 to 1, from the overview.

    Args:
        slide: the open slide.
        overview: the slide at about 8 microns a pixel.
        grid: the tiles.
        cells: (N, 2) column and row of the tiles to measure.

    Returns:
        (N, K), columns as in QC_NAMES.
    """
    image, mpp = overview.image, overview.mpp
    maps: dict[str, Callable[[], NDArray[Any]]] = {  # one at a time: each is as large as the overview
        "white": lambda: stain.glass_pixels(image),
        "black": lambda: stain.extremes(image)[0] <= BLACK_LEVEL,
        "pen": lambda: stain.pen_pixels(image, mpp),
        "saturation": lambda: stain.by_bands(image, stain.saturation),
    }
    columns, rows = cells[:, 0], cells[:, 1]
    edges = [
        (grid.anchor[xy] + np.arange(count + 1) * grid.pitch[xy] - overview.origin_level0[xy]) / overview.scale[xy]
        for xy, count in ((0, grid.columns), (1, grid.rows))
    ]
    found = {name: box_means(values(), edges[0], edges[1])[rows, columns] for name, values in maps.items()}
    found["focus"] = _focus(slide, grid, np.unique(rows))[rows, columns]
    return np.stack([found[name] for name in QC_NAMES], axis=1).astype(np.float32)


def _focus(slide: Slide, grid: Grid, rows: NDArray[np.integer]) -> NDArray[np.float32]:
    """(rows, columns) of the grid: the focus of the tiles in these rows, NaN elsewhere.

    The mean square frequency of an image is the power of its Laplacian over the power of its gradient.
    """
    focus = np.full((grid.rows, grid.columns), np.nan, np.float32)
    own = slide.mpp
    fine = [i for i, step in enumerate(slide.level_downsamples) if max(own.x, own.y) * step <= FOCUS_MPP * 1.02]
    if not fine or not rows.size:
        return focus
    level = fine[-1]
    if np.prod(slide.level_dimensions[level], dtype=np.int64) > FOCUS_PIXELS:
        return focus
    step = slide.level_downsamples[level]
    width = grid.columns * grid.pitch[0]  # level-0 pixels
    height = max(1, int(STRIP_PIXELS / (width / step) / (grid.pitch[1] / step)))  # tile rows at once
    strips = []  # first and last row of tiles, lines above them and of them
    places = []
    for first in range(int(rows[0]), int(rows[-1]) + 1, height):
        last = min(first + height, int(rows[-1]) + 1)
        if not ((rows >= first) & (rows < last)).any():
            continue
        # A rim above and below where the grid goes on, so that strips leave no trace.
        above, below = (RIM if first else 0), (RIM if last < grid.rows else 0)
        lines = round((last - first) * grid.pitch[1] / step)
        top = grid.anchor[1] + first * grid.pitch[1] - round(above * step)
        strips.append((first, last, above, lines))
        places.append((grid.anchor[0], top, round(width / step), lines + above + below))
    read = slide.reads(level, np.array(places, np.int64))
    for index, (first, last, above, lines) in enumerate(strips):
        size = places[index][2:]
        strip = cv2.cvtColor(read(index, None), cv2.COLOR_RGB2GRAY)
        shrunk = max(2, round(width * own.x / FOCUS_MPP)), max(2, round(size[1] * step * own.y / FOCUS_MPP))
        grey = cv2.resize(strip, shrunk, interpolation=cv2.INTER_AREA).astype(np.float32)
        across, down = (cv2.Sobel(grey, cv2.CV_32F, dx, 1 - dx, ksize=1, scale=0.5) for dx in (1, 0))
        bend = cv2.Laplacian(grey, cv2.CV_32F, ksize=1)
        x = np.linspace(0, shrunk[0], grid.columns + 1)
        y = np.linspace(above, above + lines, last - first + 1) * shrunk[1] / size[1]
        slope, curve = (box_means(np.asarray(power), x, y) for power in (across**2 + down**2, bend**2))
        judged = slope > TEXTURE**2
        frequency = np.sqrt(curve / np.maximum(slope, TEXTURE**2)) / (2 * np.pi) * (1000 / FOCUS_MPP)
        focus[first:last] = np.where(judged, frequency, np.nan)
    return focus
