"""Many rectangles of one level, each of its compressed blocks decoded once.

How often every block is going to be wanted is counted beforehand. A block is decoded by the thread that wants it
first, held until the last rectangle that touches it has its pixels, and let go. Where the rectangles come row by row,
about one row of blocks is held, however high the slide.
"""

import os
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gigapath.preprocessing.tiff import BlockError, TiffLevel

UInt8Array = npt.NDArray[np.uint8]

HELD_BYTES = 2**28  # beyond this, blocks are decoded again when they are wanted again
AHEAD_BYTES = 2**26  # of a row of blocks that the system is asked to fetch


@dataclass(eq=False)
class _Block:
    """A decoded block, or one that a thread is decoding."""

    done: threading.Event = field(default_factory=threading.Event)
    pixels: UInt8Array | None = None  # stays None where it can't be decoded


class Regions:
    """Rectangles of a level, to be read in any order and from any thread; the order in which they are given is the
    cheapest.

    Attributes:
        served: (N,) bool, rectangles that lie inside the level and whose blocks are all in the file.
    """

    def __init__(self, file: int, level: TiffLevel, boxes: npt.NDArray[np.int64]) -> None:
        """
        Args:
            file: descriptor of the open file, which must stay open.
            level: the level.
            boxes: (N, 4) int64 x, y, width, height in pixels of the level.
        """
        self._file, self._level = file, level
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], _Block] = {}
        self._most = max(1, HELD_BYTES // (level.block[0] * level.block[1] * 3))
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        inside = (start >= 0) & (end > start) & (end <= level.size)
        self.served: npt.NDArray[np.bool_] = np.logical_and.reduce(inside, axis=1)
        first, last = start // level.block, (end - 1) // level.block
        self._boxes, self._spans = boxes, np.concatenate([first, last], axis=1)  # blocks: column, row, column, row
        absent = np.zeros((level.rows + 1, level.columns + 1), np.int64)
        absent[1:, 1:] = (level.lengths == 0).cumsum(0).cumsum(1)
        (c0, r0), (c1, r1) = first[self.served].T, last[self.served].T + 1
        self.served[self.served] = absent[r1, c1] - absent[r0, c1] - absent[r1, c0] + absent[r0, c0] == 0
        # Rectangles per block: +1 and -1 at the corners of each span, summed along both axes.
        steps = np.zeros((level.rows + 1, level.columns + 1), np.int32)
        (c0, r0), (c1, r1) = first[self.served].T, last[self.served].T + 1
        for rows, columns, step in ((r0, c0, 1), (r1, c1, 1), (r1, c0, -1), (r0, c1, -1)):
            np.add.at(steps, (rows, columns), step)
        self._wanted = steps.cumsum(0).cumsum(1)[:-1, :-1]
        self._fetched = np.zeros(level.rows, bool)

    def read(self, index: int, out: UInt8Array | None = None) -> UInt8Array | None:
        """Pixels (h, w, 3) of a rectangle, in `out` where given; None where they can't be had without OpenSlide."""
        if not self.served[index]:
            return None
        x, y, width, height = self._boxes[index].tolist()
        c0, r0, c1, r1 = self._spans[index].tolist()
        block_width, block_height = self._level.block
        if out is None:
            out = np.empty((height, width, 3), np.uint8)
        whole = (x, y, width, height) == (c0 * block_width, r0 * block_height, block_width, block_height)
        complete = True
        for row in range(r0, r1 + 1):
            top = row * block_height - y  # of the block within the rectangle
            down = slice(max(0, top), min(height, top + block_height))
            for column in range(c0, c1 + 1):
                pixels = self._take(row, column, out if whole else None)
                if pixels is None:
                    complete = False  # the others are taken all the same, so that none is held for ever
                elif pixels is not out:
                    left = column * block_width - x
                    across = slice(max(0, left), min(width, left + block_width))
                    out[down, across] = pixels[
                        down.start - top : down.stop - top, across.start - left : across.stop - left
                    ]
        return out if complete else None

    def _take(self, row: int, column: int, out: UInt8Array | None) -> UInt8Array | None:
        """A block's pixels for one of the rectangles that want it: held, waited for, or decoded here; into `out` where
        nobody else wants it."""
        key = row, column
        with self._lock:
            self._wanted[key] -= 1
            last = self._wanted[key] <= 0
            held = self._held.pop(key, None) if last else self._held.get(key)
            block = held or _Block()
            if held is None and not last and len(self._held) < self._most:
                self._held[key] = block
            ahead, self._fetched[row] = not self._fetched[row], True
        if held is not None:
            held.done.wait()
            return held.pixels
        try:
            if ahead:
                self._fetch(row)
            block.pixels = self._level.read(self._file, row, column, out if last else None)
        except BlockError:
            pass
        finally:
            block.done.set()  # an error of another kind ends the reading; nobody may wait for this block then
        return block.pixels

    def _fetch(self, row: int) -> None:
        """Ask the system for a row of blocks at once, as far as they lie together."""
        wanted = np.flatnonzero(self._wanted[row])
        if not wanted.size or not hasattr(os, "posix_fadvise"):
            return
        offsets, lengths = self._level.offsets[row, wanted], self._level.lengths[row, wanted]
        start, end = int(offsets.min()), int((offsets + lengths).max())
        if end - start <= AHEAD_BYTES:
            os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_WILLNEED)
