"""How fast tiles are read, beside a plain loop over the same tiles with OpenSlide and Pillow in the same run."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import PIL.Image
import torch

from gigapath.features import Tiles
from gigapath.options import Options, option
from gigapath.preprocessing.fast import OPENSLIDE, READERS, TiffLevel, tiff_levels
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.slide import Slide, open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from scripts.bench.made_slide import write_large
from scripts.bench.protocol import Work, compare

# The made slides at 0.25 microns a pixel: name -> (downsamples of the levels, side of the compressed blocks).
MADE = {
    "steps of 2, blocks of 256": ((1, 2, 4, 8, 16), 256),
    "steps 1-4-16, blocks of 240": ((1, 4, 16), 240),
    "steps 1-4-16, blocks of 256": ((1, 4, 16), 256),
}
_BATCH = 64


@dataclass(frozen=True)
class ReadBench(Options):
    """What `python -m scripts.bench read` measures."""

    slide: tuple[str, ...] = option((), "slides to read (default: three made ones)", metavar="FILE")
    slide_mpp: float | None = option(None, "microns per level-0 pixel, where the slides don't say", above=0)
    size: tuple[int, ...] = option((30_000, 28_000), "width and height of the made slides", metavar="N")
    mpp: float = option(0.5, "microns per pixel of a tile", above=0)
    tiles: int = option(1000, "tiles that a turn reads, at most", at_least=1)
    pairs: int = option(7, "pairs of turns, ours and the plain loop's", at_least=1)
    reader: str = option("auto", "as for embed", choices=READERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) != 2 or min(self.size) < 4096:
            raise ValueError(f"--size: expected a width and a height of at least 4096, got {self.size}.")


def measure(options: ReadBench) -> Iterator[dict[str, Any]]:
    """Measure one slide after the other.

    Every turn opens the slide, with all that its reader has to find out. `ratio` is against the plain loop, one thread
    each; `two_threads` against ours with one, over all tiles of the slide; `whole` is the time of planning the slide
    and reading all its tiles over that of decoding the same compressed blocks once in a bare loop, None where OpenSlide
    reads. Medians with least and most. `cold` rates are of one turn after the file was dropped from the
    system's cache; `store` is the file's own rate then, in bytes per second, None where the system can't drop it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, path in _slides(options, Path(folder)):
            yield _row(name, path, options)


def _slides(options: ReadBench, folder: Path) -> Iterator[tuple[str, Path]]:
    if options.slide:
        yield from ((Path(path).name, Path(path)) for path in options.slide)
        return
    for name, (steps, block) in MADE.items():
        path = folder / "made.tif"
        write_large(path, (options.size[0], options.size[1]), steps=steps, tile=block)
        yield name, path


def _row(name: str, path: Path, options: ReadBench) -> dict[str, Any]:
    cpu = torch.device("cpu")
    tiling = TileOptions(mpp=options.mpp)
    with _opened(path, options) as slide:
        plan = plan_tiles(slide, tiling).tiles
        if not len(plan):
            raise ValueError(f"{name}: expected a slide with tissue, got no tile. Name another.")
        used = slide.fast.used(plan.level)
        levels = tiff_levels(path, slide.vendor, slide.level_dimensions) if used != OPENSLIDE else {}
        downsample = slide.level_downsamples[plan.level]
    start = max(0, (len(plan) - options.tiles) // 2)
    tiles = plan.take(np.arange(start, min(len(plan), start + options.tiles)))

    def ours(workers: int, found: Tiles | None = None) -> Callable[[], None]:
        def read() -> None:
            with _opened(path, options) as slide:
                wanted = plan_tiles(slide, tiling).tiles if found is None else found
                for _ in iter_tiles(slide, wanted, batch_size=_BATCH, workers=workers):
                    pass

        return read

    one, plain = Work(ours(0, tiles), len(tiles)), Work(lambda: plain_loop(path, tiles), len(tiles))
    ratio = compare(one, plain, options.pairs, cpu)
    two = compare(Work(ours(2, plan), len(plan)), Work(ours(0, plan), len(plan)), options.pairs, cpu)
    row: dict[str, Any] = {
        "slide": name,
        "reader": used,
        "tiles": len(tiles),
        "read_size": plan.read_size[0],
        "tiles_per_second": ratio.ours,
        "plain_per_second": ratio.theirs,
        "ratio": ratio.median,
        "ratio_least": ratio.least,
        "ratio_most": ratio.most,
        "two_threads": two.median,
        "two_threads_least": two.least,
        "two_threads_most": two.most,
        "whole": None,
        "tiles_of_slide": len(plan),
        "store": _rate(path, lambda: _read_file(path), path.stat().st_size),
        "cold_per_second": _rate(path, one.call, one.amount),
        "cold_plain_per_second": _rate(path, plain.call, plain.amount),
    }
    if levels:
        bare = partial(_decode_once, path, levels[plan.level], plan, downsample)
        whole = compare(Work(bare, 1.0), Work(ours(0), 1.0), options.pairs, cpu)
        row |= {"whole": whole.median, "whole_least": whole.least, "whole_most": whole.most}
    return row


def _opened(path: Path, options: ReadBench) -> Slide:
    return open_slide(path, slide_mpp=options.slide_mpp, reader=options.reader)


def _decode_once(path: Path, level: TiffLevel, tiles: Tiles, downsample: float) -> None:
    """Decode each compressed block that the tiles lie on, and do nothing with it."""
    first = (tiles.coords_level0 / downsample).astype(int)
    last = first + tiles.read_size - 1
    wanted = {
        (row, column)
        for (left, top), (right, bottom) in zip(first // level.block, last // level.block, strict=True)
        for row in range(top, bottom + 1)
        for column in range(left, right + 1)
    }
    file = os.open(path, os.O_RDONLY)
    for row, column in sorted(wanted):
        level.read(file, row, column)
    os.close(file)


def plain_loop(path: Path, tiles: Tiles) -> None:
    """What one writes without further thought: read_region, RGB, Pillow's resize."""
    size = tiles.tile_size, tiles.tile_size
    with openslide.OpenSlide(path) as slide:
        for x, y in tiles.coords_level0.tolist():
            picture = slide.read_region((x, y), tiles.level, tiles.read_size).convert("RGB")
            np.asarray(picture if picture.size == size else picture.resize(size, PIL.Image.Resampling.BICUBIC))


def _read_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def _rate(path: Path, call: Callable[[], object], amount: float) -> float | None:
    """Amount per second of one call on a file that the system has to fetch anew."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are still to be written can't be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    call()
    return amount / (time.perf_counter() - started)


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""

    def spread(name: str) -> str:
        if row[name] is None:
            return "-"
        return f"{row[name]:.2f} ({row[name + '_least']:.2f} to {row[name + '_most']:.2f})"

    def rate(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:,.0f}"

    store = "-" if row["store"] is None else f"{row['store'] / 1e6:,.0f}"
    return (
        f"| {row['slide']} | {row['reader']} | {row['read_size']} | {rate('tiles_per_second')} | "
        f"{rate('plain_per_second')} | {spread('ratio')} | {spread('two_threads')} | {spread('whole')} | "
        f"{rate('cold_per_second')} | {rate('cold_plain_per_second')} | {store} |"
    )


HEADING = (
    "| slide | reader | px read | tiles/s | plain loop | ratio | two threads / one | plan and read / bare decode | "
    "cold tiles/s | cold plain loop | store MB/s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
