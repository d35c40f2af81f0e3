"""Small pictures of a slide and of its tissue box, with and without the tiles."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from gigapath.files import write_bytes_atomic
from gigapath.preprocessing.grid import Grid
from gigapath.preprocessing.slide import Slide

SIDE = 1024  # of the longer side, in pixels
BAND_PIXELS = 1_000_000
LINE = (25, 70, 215)

Box = tuple[int, int, int, int]


def save_thumbnails(folder: Path, name: str, slide: Slide, box: Box, grid: Grid, cells: NDArray[np.int64]) -> None:
    """Write `<name>_original.png`, the whole slide; `_roi.png`, the box; `_roi_tiles.png`, the box with the tiles.

    Args:
        folder: where they go.
        name: how their names begin.
        slide: the open slide.
        box: level-0 (x, y, width, height).
        grid: where tiles can lie.
        cells: (N, 2) column and row of the tiles to draw.
    """
    _save(folder / f"{name}_original.png", thumbnail(slide, (0, 0, *slide.dimensions)))
    roi = thumbnail(slide, box)
    _save(folder / f"{name}_roi.png", roi)
    scale = np.array([box[2] / roi.shape[1], box[3] / roi.shape[0]])
    first = np.rint((grid.corners(cells) - box[:2]) / scale).astype(int)
    last = np.rint((grid.corners(cells) + np.asarray(grid.pitch) - box[:2]) / scale).astype(int)
    for start, end in zip(first.tolist(), last.tolist(), strict=True):
        cv2.rectangle(roi, start, end, LINE, 2)
    _save(folder / f"{name}_roi_tiles.png", roi)


def thumbnail(slide: Slide, box: Box) -> NDArray[np.uint8]:
    """A part of the slide with its longer side at most SIDE pixels, each the mean of what it covers.

    Args:
        slide: the open slide; it needs no mpp.
        box: level-0 (x, y, width, height).

    Returns:
        (h, w, 3) RGB.
    """
    left, top, width, height = box
    factor = max(1.0, max(width, height) / SIDE)
    level = max(index for index, step in enumerate(slide.level_downsamples) if index == 0 or step <= factor * 1.02)
    step = slide.level_downsamples[level]
    size = max(1, round(width / factor)), max(1, round(height / factor))
    columns, rows = max(1, round(width / step)), max(1, round(height / step))
    edges = np.rint(np.arange(size[1] + 1) * rows / size[1]).astype(int)  # rows of the level above each output row
    band = max(1, int(BAND_PIXELS / columns / (rows / size[1])))
    picture = np.empty((size[1], size[0], 3), np.uint8)
    for first in range(0, size[1], band):
        last = min(first + band, size[1])
        lines = max(1, int(edges[last] - edges[first]))
        pixels = slide.read(left, top + round(edges[first] * step), level, columns, lines)
        picture[first:last] = cv2.resize(pixels, (size[0], last - first), interpolation=cv2.INTER_AREA)
    return picture


def _save(path: Path, image: NDArray[np.uint8]) -> None:
    _, content = cv2.imencode(".png", image[..., ::-1])
    write_bytes_atomic(path, content.tobytes())
