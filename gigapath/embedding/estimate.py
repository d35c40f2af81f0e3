"""What a run is going to cost: tiles, bytes and time, told before the work."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from gigapath.cohort.manifest import SlideEntry
from gigapath.embedding.slides import open_entry
from gigapath.preprocessing.grid import plan_grid
from gigapath.preprocessing.slide import Slide
from gigapath.preprocessing.tiling import TileOptions

# So many slides are opened for an estimate; the others are taken to be like them.
_SAMPLE = 20
# Share of a slide's grid that is tissue, about, where nothing is known yet.
TISSUE_SHARE = 0.3
# Pixels a side that are read to learn how fast a slide can be decoded.
_BLOCK = 1024
# What tiling a slide takes beside decoding: tissue, flags, preview. As measured on two cores for any size of slide.
_SECONDS_A_SLIDE = 0.4


def guess_tiles(slide: Slide, tiling: TileOptions) -> int:
    """About how many tiles a slide is going to have, from its header alone."""
    grid = plan_grid(slide, mpp=tiling.mpp, tile_size=tiling.tile_size, tolerance=tiling.mpp_tolerance)
    places = grid.columns * grid.rows
    guess = places if tiling.tissue == "none" else math.ceil(places * TISSUE_SHARE)
    return guess if tiling.max_tiles is None else min(guess, tiling.max_tiles)


def estimate_tiles(counted: Sequence[int], unknown: Sequence[SlideEntry], tiling: TileOptions) -> int:
    """Tiles of slides whose tiles are known, and of those still to be tiled by a sample of their headers."""
    return sum(counted) + round(_over_sample(unknown, tiling, lambda slide: guess_tiles(slide, tiling)))


def estimate_tiling(todo: Sequence[SlideEntry], tiling: TileOptions, workers: int) -> float:
    """Seconds that tiling is going to take here, by a block of pixels read from each slide of a sample."""
    return _over_sample(todo, tiling, lambda slide: _tiling_seconds(slide, tiling, workers))


def _over_sample(entries: Sequence[SlideEntry], tiling: TileOptions, cost: Callable[[Slide], float]) -> float:
    """The sum of `cost` over slides, from a sample of them; a slide that can't be opened costs nothing."""
    step = max(1, len(entries) // _SAMPLE)
    sample = entries[::step][:_SAMPLE]
    found = 0.0
    for entry in sample:
        with contextlib.suppress(ValueError, OSError), open_entry(entry, tiling) as slide:
            found += cost(slide)
    return found * len(entries) / len(sample) if sample else 0.0


def _tiling_seconds(slide: Slide, tiling: TileOptions, workers: int) -> float:
    """The level that the overview comes from is read as a whole, that of the tiles too by the published rule."""
    level, columns, rows = slide.overview_source()
    pixels = columns * rows
    if tiling.tissue == "published":
        grid = plan_grid(slide, mpp=tiling.mpp, tile_size=tiling.tile_size, tolerance=tiling.mpp_tolerance)
        pixels += grid.columns * grid.rows * grid.read_size[0] * grid.read_size[1]
    width, height = min(_BLOCK, columns), min(_BLOCK, rows)
    left, top, w, h = slide.bounds
    down = slide.level_downsamples[level]
    corner = left + max(0, int((w - width * down) / 2)), top + max(0, int((h - height * down) / 2))
    started = time.perf_counter()
    slide.reads(level, np.array([(*corner, width, height)]))(0, None)
    seconds = time.perf_counter() - started
    return _SECONDS_A_SLIDE + seconds * pixels / (width * height) / max(1, workers)
