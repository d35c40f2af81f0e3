"""The published tissue rule: one luminance threshold for the whole slide, and each tile judged by its own pixels.

Luminance is the plain mean of R, G and B. Otsu's threshold is taken over the whole lowest level; what lies strictly
below it is foreground. Tiles that meet the foreground's bounding box are read, and one is kept when more than a tenth
of its pixels lie strictly below.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.slide import Overview, Slide
from gigapath.preprocessing.tiling import Grid
from gigapath.preprocessing.tissue import TissueMask, make_mask, otsu_cuts

BINS = 256
BAND_PIXELS = 8_000_000
BATCH = 32


def otsu_centre(histogram: NDArray[np.floating], edges: NDArray[np.floating]) -> float:
    """Otsu's threshold as the published code has it: the centre of the last bin of the darker class, of equally good
    ones the first; where there is but one value that one, under which nothing lies. `histogram` (n,) counts bins
    between the darkest and the brightest value, `edges` (n + 1,)."""
    filled = np.flatnonzero(histogram)
    if len(filled) == 1:
        return float((edges[0] + edges[-1]) / 2)
    first = otsu_cuts(histogram)[0]
    return float((edges[first] + edges[first + 1]) / 2)


def share_below(tiles: NDArray[np.uint8], threshold: float) -> NDArray[np.float32]:
    """(N,), 0 to 1: the share of each tile's pixels ((N, T, T, 3) RGB) whose luminance lies strictly below `threshold`,
    in grey levels."""
    dark = _channel_sums(tiles) < sums_below(threshold)
    return np.asarray(dark.mean(axis=(1, 2), dtype=np.float64), np.float32)


def sums_below(threshold: float) -> int:
    """The least R + G + B whose mean is not strictly below `threshold`."""
    return int(np.count_nonzero(np.arange(766) / 3 < threshold))


def _channel_sums(image: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """(..., 3) to (...): R + G + B."""
    sums = image[..., 0].astype(np.uint16)
    sums += image[..., 1]
    sums += image[..., 2]
    return sums


def published_tissue(slide: Slide, overview: Overview) -> TissueMask:
    """Threshold and tissue box of the whole lowest level; the mask is the overview's share of it, for the picture."""
    threshold, box = find_foreground(slide)
    mask = (_channel_sums(overview.image) < sums_below(threshold)) & (box is not None)
    return make_mask(
        overview,
        mask,
        method="published",
        threshold=threshold,
        state="blank" if box is None else "tissue",
        box_level0=box,
    )


def find_foreground(slide: Slide, threshold: float | None = None) -> tuple[float, tuple[int, int, int, int] | None]:
    """Otsu's threshold (or the one given) over the whole lowest level, and the level-0 box (x, y, width, height) around
    what lies below it, or None. The slide needs no mpp."""
    if threshold is None:
        counts = np.zeros(766, np.int64)
        for _, sums in _lowest_level(slide):
            counts += np.bincount(sums.ravel(), minlength=766)
        seen = np.flatnonzero(counts)
        threshold = otsu_centre(*np.histogram(seen / 3, bins=BINS, weights=counts[seen].astype(np.float64)))
    limit = sums_below(threshold)
    columns, rows = (np.zeros(length, bool) for length in slide.level_dimensions[-1])
    for first, sums in _lowest_level(slide):
        dark = sums < limit
        columns |= dark.any(axis=0)
        rows[first : first + len(dark)] = dark.any(axis=1)
    if not rows.any():
        return threshold, None
    x, y = np.flatnonzero(columns), np.flatnonzero(rows)
    step = slide.level_downsamples[-1]
    left, top = math.floor(x[0] * step), math.floor(y[0] * step)
    return threshold, (left, top, math.ceil((x[-1] + 1) * step) - left, math.ceil((y[-1] + 1) * step) - top)


def _lowest_level(slide: Slide) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """R + G + B of the whole lowest level in bands: (first row, (rows, w))."""
    level = len(slide.level_dimensions) - 1
    width, height = slide.level_dimensions[level]
    rows = max(1, BAND_PIXELS // width)
    for first in range(0, height, rows):
        top = round(first * slide.level_downsamples[level])
        yield first, _channel_sums(slide.read(0, top, level, width, min(rows, height - first)))


def cells_in_box(grid: Grid, box: tuple[int, int, int, int], margin: int = 0) -> NDArray[np.int64]:
    """Cells (N, 2) of the tiles that meet a level-0 box (x, y, width, height) grown by a margin, row by row."""
    left, top, width, height = box
    cells = np.stack(np.meshgrid(np.arange(grid.columns), np.arange(grid.rows)), axis=-1).reshape(-1, 2)
    corners = grid.corners(cells)
    before = corners < (left + width + margin, top + height + margin)
    after = corners + np.asarray(grid.pitch) > (left - margin, top - margin)
    inside: NDArray[np.int64] = cells[(before & after).all(axis=1)]
    return inside


def published_shares(slide: Slide, mask: TissueMask, grid: Grid, *, workers: int = 0) -> NDArray[np.float32]:
    """(rows, columns) of the grid: the share of each tile's own pixels below the threshold of `published_tissue`; a
    tile is kept where it exceeds 0.1. Tiles that don't meet the tissue box have 0.

    The tiles are read as an encoder would get them, a batch at a time: memory does not depend on the slide.
    """
    shares = np.zeros((grid.rows, grid.columns), np.float32)
    if mask.box_level0 is None or mask.threshold is None:
        return shares
    cells = cells_in_box(grid, mask.box_level0)
    tiles = grid.tiles(slide.slide_id, cells)
    for first, pixels in iter_tiles(slide, tiles, batch_size=BATCH, workers=workers):
        rows, columns = cells[first : first + len(pixels), 1], cells[first : first + len(pixels), 0]
        shares[rows, columns] = share_below(pixels, mask.threshold)
    return shares
