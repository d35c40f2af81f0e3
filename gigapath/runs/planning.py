"""What a run is going to cost: tiles, bytes and time, told before the work."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

from gigapath.cohort.manifest import SlideEntry
from gigapath.preprocessing.grid import plan_grid
from gigapath.preprocessing.tiling import TileOptions
from gigapath.runs.entries import open_entry

# So many slides are opened for an estimate; the others are taken to be like them.
_SAMPLE = 20
# Share of a slide's grid that is tissue, about, where nothing is known yet.
_TISSUE_SHARE = 0.3
# A first call includes what is done once (memory, kernels); a slow one is believed all the same.
_BELIEVED_SECONDS = 2.0


def guess_tiles(entry: SlideEntry, tiling: TileOptions) -> int | None:
    """About how many tiles a slide is going to have, from its header alone; None where it can't be opened."""
    with contextlib.suppress(ValueError, OSError):
        with open_entry(entry, tiling) as slide:
            grid = plan_grid(slide, mpp=tiling.mpp, tile_size=tiling.tile_size, tolerance=tiling.mpp_tolerance)
        places = grid.columns * grid.rows
        guess = places if tiling.tissue == "none" else math.ceil(places * _TISSUE_SHARE)
        return guess if tiling.max_tiles is None else min(guess, tiling.max_tiles)
    return None


def estimate_tiles(counted: Sequence[int], unknown: Sequence[SlideEntry], tiling: TileOptions) -> int:
    """Tiles of slides whose tiles are known, and of those still to be tiled by a sample of their headers."""
    if not unknown:
        return sum(counted)
    step = max(1, len(unknown) // _SAMPLE)
    guesses = [guess_tiles(entry, tiling) for entry in unknown[::step][:_SAMPLE]]
    # A slide that can't be opened is going to give none.
    mean = sum(guess for guess in guesses if guess is not None) / len(guesses)
    return sum(counted) + round(mean * len(unknown))


def measure_rate(encode_batch: Callable[[], object], batch_size: int) -> float:
    """Tiles/s of an encoder on this machine: of one batch after a warm-up, or of the warm-up itself if that is slow."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        encode_batch()
        seconds = time.perf_counter() - started
        if seconds > _BELIEVED_SECONDS:
            break
    return batch_size / max(seconds, 1e-9)
