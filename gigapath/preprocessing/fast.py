"""The fast way to a slide's pixels, taken only where it gives OpenSlide's own to the bit.

`auto` decodes a level's blocks straight from the file where the file is a tiled TIFF and a handful of the level's
blocks, among them those of its edges and those with the most in them, equal what OpenSlide gives.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gigapath.preprocessing.blocks import Regions
from gigapath.preprocessing.handle import SlideError
from gigapath.preprocessing.tiff import BlockError, TiffLevel, tiff_levels

UInt8Array = npt.NDArray[np.uint8]

READERS = ("auto", "openslide")
OPENSLIDE, FAST_EQUAL = "openslide", "fast-equal"  # what a file says that its pixels came by

FEW_BLOCKS = 16  # a level of fewer is read before the comparison would be through
FEW_CHECKED = 4  # blocks that must have been compared

Read = Callable[[int, int, int, int, int], UInt8Array]


class FastReader:
    """The levels of one open slide that need no OpenSlide."""

    def __init__(
        self,
        path: Path,
        vendor: str,
        level_dimensions: tuple[tuple[int, int], ...],
        level_downsamples: tuple[float, ...],
        read: Read,
        reader: str,
    ) -> None:
        """
        Args:
            path: the slide.
            vendor: OpenSlide's word for the format.
            level_dimensions: sizes of the levels.
            level_downsamples: OpenSlide's downsamples.
            read: (x, y, level, width, height) to OpenSlide's pixels, x and y in level-0 pixels; raises SlideError.
            reader: one of READERS.
        """
        self._reader = reader
        self._path, self._vendor, self._read = path, vendor, read
        self._level_dimensions, self._downsamples = level_dimensions, level_downsamples
        self._lock = threading.Lock()
        self._file: int | None = None
        self._levels: dict[int, TiffLevel] | None = None
        self._equal: dict[int, bool] = {}

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._levels = None, {}

    def used(self, level: int) -> str:
        """What reads this level: "openslide", or "fast-equal" (compared with OpenSlide)."""
        return OPENSLIDE if self._level(level) is None else FAST_EQUAL

    @property
    def used_so_far(self) -> str:
        """What read the levels that were read until now: "openslide" where it read all."""
        return FAST_EQUAL if any(self._equal.values()) else OPENSLIDE

    def regions(self, level: int, places: npt.NDArray[np.int64]) -> Regions | None:
        """Rectangles to read, or None where OpenSlide has to read them all.

        Args:
            level: the level.
            places: (N, 4) int64 x and y of the top-left corner in level-0 pixels, width and height in the level's.
        """
        found = self._level(level)
        if found is None or self._file is None or not len(places):
            return None
        boxes = places.copy()
        exact = places[:, :2] / self._downsamples[level]
        boxes[:, :2] = np.rint(exact)
        boxes[(boxes[:, :2] != exact).any(axis=1), 0] = -1  # between pixels: not served
        return Regions(self._file, found, boxes)

    def _level(self, index: int) -> TiffLevel | None:
        """The level as its blocks, where this reader serves it."""
        if self._reader == "openslide":
            return None
        with self._lock:
            if self._levels is None:
                self._levels = self._open()
            level = self._levels.get(index)
            if level is None:
                return None
            if index not in self._equal:
                self._equal[index] = self._equals_openslide(index, level)
            return level if self._equal[index] else None

    def _open(self) -> dict[int, TiffLevel]:
        try:
            levels = tiff_levels(self._path, self._vendor, self._level_dimensions)
            if levels:
                self._file = os.open(self._path, os.O_RDONLY)
            return levels
        except (ImportError, OSError):  # not installed: OpenSlide reads, and the record says so
            return {}

    def _equals_openslide(self, index: int, level: TiffLevel) -> bool:
        """Whether a handful of blocks are OpenSlide's to the bit."""
        downsample = self._downsamples[index]
        if downsample != round(downsample) or level.lengths.size < FEW_BLOCKS or self._file is None:
            return False
        compared = 0
        for row, column in blocks_to_check(level.lengths):
            x, y = column * level.block[0], row * level.block[1]
            width, height = min(level.block[0], level.size[0] - x), min(level.block[1], level.size[1] - y)
            if width <= 0 or height <= 0:
                continue
            try:
                ours = level.read(self._file, row, column)[:height, :width]
            except BlockError:  # OpenSlide is not asked: where it fails too, it refuses every later read
                continue
            step = round(downsample)
            try:
                theirs = self._read(x * step, y * step, index, width, height)
            except SlideError:
                return False
            if not np.array_equal(ours, theirs):
                return False
            compared += 1
        return compared >= FEW_CHECKED


def blocks_to_check(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(row, column) of the blocks to compare: the corners at the right and the bottom, the largest, and some between.

    Args:
        lengths: (rows, columns) bytes of each block; those of none are left out.
    """
    rows, columns = lengths.shape
    flat = lengths.ravel()
    held = np.flatnonzero(flat)
    if not held.size:
        return []
    edges = [rows * columns - 1, columns - 1, (rows - 1) * columns]
    largest = np.argsort(flat, kind="stable")[::-1][:2]
    between = held[np.linspace(0, held.size - 1, 7).astype(int)[1:-1:2]]
    chosen = [int(i) for i in dict.fromkeys([*edges, *largest, *between]) if flat[i] > 0]
    return [divmod(i, columns) for i in chosen]
