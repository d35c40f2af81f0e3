"""Tiles from a slide as pixels: one named filter, through threads or in the caller.

`iter_tiles` gives them in order, in arrays of their own; `read_into` puts them into places that somebody else owns. B
tiles of a batch, T side of a tile. The pixels depend on the tile alone: not on workers or batch size.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from gigapath.features import Tiles
from gigapath.preprocessing.slide import Slide, SlideError
from gigapath.read_ahead import read_ahead

UInt8Array = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Place:
    """Room for tiles that follow each other, the first of index `first`: `pixels`, uint8 (n, S, S, 3), are to be
    filled. `done` hears that they are, or of the problem because of which they never will be."""

    first: int
    pixels: UInt8Array
    done: Callable[[BaseException | None], None]


Take = Callable[[int, int], Place | None]


def fill_places(
    fill: Callable[[int, UInt8Array], object], take: Take, total: int, *, workers: int = 0, start: int = 0
) -> None:
    """Fill one place after the other, from tile `start` on, until no tile is left or no more are wanted.

    Each thread asks for a place by itself, so that none waits for another. When this returns or raises, no thread is
    left and every place is done; the first error in a thread is raised.

    Args:
        fill: puts a tile, by its index, into a row (S, S, 3), from any thread.
        take: from the index of the next tile, and the number of tiles left, to a place for one or more of them; it may
            wait for room. None where no more are wanted. It is called in the tiles' order, by one thread at a time.
        total: tiles.
        workers: threads that fill, of which the caller is one.
    """
    turn = threading.Lock()
    coming = start
    problems: list[BaseException] = []  # the first is the cause: OpenSlide refuses every read after it

    def next_place() -> Place | None:
        nonlocal coming
        with turn:
            place = take(coming, total - coming) if coming < total and not problems else None
            coming += 0 if place is None else len(place.pixels)
            return place

    def work() -> None:
        try:
            while place := next_place():
                try:
                    for index, row in enumerate(place.pixels, place.first):
                        if problems:
                            break
                        fill(index, row)
                except BaseException as error:
                    problems.append(error)
                place.done(problems[0] if problems else None)
        except BaseException as error:
            problems.append(error)

    names = (f"tile-reader_{number}" for number in range(1, min(workers, total - start)))
    threads = [threading.Thread(target=work, name=name, daemon=True) for name in names]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def filter_name(read_size: tuple[int, int], tile_size: int) -> str:
    """What `resample` does to tiles of `read_size` (w, h) pixels, for the record."""
    if read_size == (tile_size, tile_size):
        return "none"
    shrinks, grows = max(read_size) > tile_size, min(read_size) < tile_size
    return "+".join(["cv2-area"] * shrinks + ["cv2-cubic"] * grows)


def resample(pixels: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Pixels (h, w, 3) at another size (w, h): the mean over the area covered where it shrinks, cubic where it grows.

    The only resampling of tiles in this package. OpenCV spreads a resize over threads of its own where none of them
    is busy; the result is the same, and the process-wide switch for it is left alone.
    """
    height, width = pixels.shape[:2]
    shrunk = min(width, size[0]), min(height, size[1])
    out = pixels if shrunk == (width, height) else cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA)
    out = out if shrunk == size else cv2.resize(out, size, interpolation=cv2.INTER_CUBIC)
    return out.astype(np.uint8, copy=False)


class TileReader:
    """Pixels of a slide's tiles (of these indices, each once, cheapest in their order); may be used from several
    threads while the slide is open."""

    def __init__(self, slide: Slide, tiles: Tiles, indices: range) -> None:
        self._tiles, self._start = tiles, indices.start
        corners = tiles.coords_level0[indices.start : indices.stop]
        sizes = np.broadcast_to(np.array(tiles.read_size), corners.shape)
        self._read = slide.reads(tiles.level, np.concatenate([corners, sizes], axis=1).astype(np.int64))
        self._scratch = threading.local()  # one array a thread for pixels that are resampled

    def fill(self, index: int, out: UInt8Array) -> None:
        """Put the pixels of a tile into `out` (T, T, 3); SlideError names the slide and the tile where they can't be
        read."""
        tiles = self._tiles
        (width, height), space = tiles.read_size, out
        if (width, height) != (tiles.tile_size, tiles.tile_size):
            if not hasattr(self._scratch, "pixels"):
                self._scratch.pixels = np.empty((height, width, 3), np.uint8)
            space = self._scratch.pixels
        try:
            pixels = self._read(index - self._start, space)
        except SlideError as error:
            x, y = (int(value) for value in tiles.coords_level0[index])
            raise SlideError(
                f"slide {tiles.slide_id!r}: tile {index} of {len(tiles)} (x {x}, y {y}, level {tiles.level}) can't be "
                "decoded. The file is damaged or cut short: copy it again."
            ) from error
        if pixels is not out:
            out[...] = resample(pixels, (tiles.tile_size, tiles.tile_size))


def read_tile(slide: Slide, tiles: Tiles, index: int) -> UInt8Array:
    """Pixels (T, T, 3) of one tile; SlideError names the slide and the tile where they can't be read."""
    out = np.empty((tiles.tile_size, tiles.tile_size, 3), np.uint8)
    TileReader(slide, tiles, range(index, index + 1)).fill(index, out)
    return out


def iter_tiles(
    slide: Slide, tiles: Tiles, *, batch_size: int, workers: int = 0, start: int = 0
) -> Iterator[tuple[int, UInt8Array]]:
    """Yield (index of the first tile, pixels (n, T, T, 3)) in the order of `tiles`; the last batch may be smaller.

    Close the iterator, or run it to its end, and no thread is left; the first error in a thread is raised here.

    Args:
        slide: the open slide; it must stay open while this runs.
        tiles: which tiles, and how they are read.
        batch_size: B, tiles per batch.
        workers: threads that read; 0 reads in the caller, one batch at a time.
        start: index of the first tile to read.
    """
    if batch_size < 1:
        raise ValueError(f"iter_tiles: expected a batch size of at least 1, got {batch_size!r}.")
    if workers < 0:
        raise ValueError(f"iter_tiles: expected workers of at least 0, got {workers!r}.")
    reader = TileReader(slide, tiles, range(start, len(tiles)))
    failures: list[SlideError] = []  # the first is the cause: OpenSlide refuses every read after it

    def read(first: int) -> tuple[int, UInt8Array]:
        batch = np.empty((min(batch_size, len(tiles) - first), tiles.tile_size, tiles.tile_size, 3), np.uint8)
        try:
            for index, pixels in enumerate(batch, first):
                reader.fill(index, pixels)
        except SlideError as error:
            failures.append(error)
        if failures:
            raise failures[0]
        return first, batch

    starts = range(start, len(tiles), batch_size)
    yield from read_ahead(read, starts, threads=workers) if workers else map(read, starts)


def read_into(
    slide: Slide,
    tiles: Tiles,
    take: Take,
    *,
    fit: Callable[[UInt8Array, UInt8Array], object] | None = None,
    workers: int = 0,
    start: int = 0,
) -> None:
    """Read tiles straight into places that somebody else owns, such as the rows of batches, as `fill_places` does.

    What doesn't fit is read into one tile's array a thread, which stays in the processor's cache.

    Args:
        slide: the open slide; it must stay open while this runs.
        tiles: which tiles, and how they are read.
        take: gives the places.
        fit: puts tiles (n, T, T, 3) into rows (n, S, S, 3), from any thread; None where T is S.
        workers: threads that read, of which the caller is one.
        start: index of the first tile to read.

    Raises:
        SlideError: a tile can't be read; names the slide and the tile.
    """
    reader = TileReader(slide, tiles, range(start, len(tiles)))
    scratch = threading.local()

    def fill(index: int, row: UInt8Array) -> None:
        if fit is None:
            reader.fill(index, row)
            return
        if not hasattr(scratch, "tile"):
            scratch.tile = np.empty((1, tiles.tile_size, tiles.tile_size, 3), np.uint8)
        reader.fill(index, scratch.tile[0])
        fit(scratch.tile, row[None])

    fill_places(fill, take, len(tiles), workers=workers, start=start)
