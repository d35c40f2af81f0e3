"""The fast transform: tiles that must shrink, from JPEG blocks decoded smaller and a filter that is quick.

A block of a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, no smaller than the tile is to be; what is left to shrink
is interpolated linearly. Both are approximations of the mean over area, which `gigapath.preprocessing.reading` takes:
the pixels are other ones, at the same places, so a name of their own stands in the record.
"""

import threading

import cv2
import numpy as np
import numpy.typing as npt

from gigapath.preprocessing.blocks import Regions
from gigapath.preprocessing.tiff import TiffLevel

UInt8Array = npt.NDArray[np.uint8]

FACTORS = (8, 4, 2)


class ShrunkTiles:
    """Tiles of one level, to be read once each, in any order and from any thread.

    Attributes:
        filter: what is done to the tiles, for the record.
    """

    def __init__(self, file: int, level: TiffLevel, boxes: npt.NDArray[np.int64], tile_size: int, factor: int) -> None:
        """
        Args:
            file: descriptor of the open file, which must stay open.
            level: the level, whose blocks can be decoded at 1 / `factor`.
            boxes: (N, 4) int64 x, y, width, height in pixels of the level, the sides at least `factor` tile's.
            tile_size: side T of a tile.
            factor: 1, 2, 4 or 8.
        """
        shrunk = level if factor == 1 else level.shrunk(factor)
        assert shrunk is not None
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        first = start // factor
        # Pixels that hang over the level mix in whatever the file has there: the last whole ones stand for them.
        last = np.minimum(-(-end // factor), np.array(level.size) // factor)
        first[(start < 0).any(axis=1) | (end > level.size).any(axis=1)] = -1  # not served
        self._regions = Regions(file, shrunk, np.concatenate([first, last - first], axis=1))
        # From the centre of a box's first pixel to that of the tile's first one, and from there to the next.
        self._step = boxes[:, 2:] / (factor * tile_size)  # (N, 2) pixels of the shrunk level
        self._offset = start / factor - first + self._step / 2 - 0.5
        self._whole = ((start % factor == 0) & (end % factor == 0)).all(axis=1)  # begins and ends with whole pixels
        self._as_decoded = bool(self._whole.all() and (boxes[:, 2:] == factor * tile_size).all())
        self.filter = "+".join([f"jpeg-scaled-{factor}"] * (factor > 1) + ["cv2-linear"] * (not self._as_decoded))
        self._tile_size = tile_size
        self._sides = (last - first)[:, ::-1]  # height, width
        self._most = int(self._sides[self._regions.served].prod(axis=1).max(initial=0)) * 3
        self._scratch = threading.local()  # one array a thread for pixels that are resampled

    @property
    def any_served(self) -> bool:
        """Whether there is a tile that can be read here."""
        return bool(self._regions.served.any())

    def read(self, index: int, out: UInt8Array) -> bool:
        """Put a tile's pixels into `out` (T, T, 3); False where they can't be had without OpenSlide."""
        if not self._regions.served[index]:
            return False
        if self._as_decoded:
            return self._regions.read(index, out) is not None
        pixels = self._regions.read(index, self._space(index))
        if pixels is None:
            return False
        size, how = (self._tile_size, self._tile_size), cv2.INTER_LINEAR
        if self._whole[index]:
            out[...] = cv2.resize(pixels, size, interpolation=how)
        else:  # the same within rounding, but five times as long
            (right, down), (x, y) = self._step[index].tolist(), self._offset[index].tolist()
            from_tile = np.array([[right, 0, x], [0, down, y]])
            how |= cv2.WARP_INVERSE_MAP
            out[...] = cv2.warpAffine(pixels, from_tile, size, flags=how, borderMode=cv2.BORDER_REPLICATE)
        return True

    def _space(self, index: int) -> UInt8Array:
        """Where a tile's pixels of the shrunk level go."""
        if not hasattr(self._scratch, "pixels"):
            self._scratch.pixels = np.empty(self._most, np.uint8)
        height, width = self._sides[index].tolist()
        space: UInt8Array = self._scratch.pixels[: height * width * 3].reshape(height, width, 3)
        return space


def shrunk_tiles(file: int, level: TiffLevel, boxes: npt.NDArray[np.int64], tile_size: int) -> ShrunkTiles | None:
    """The tiles of these boxes (N, 4) of a level, or None where the fast transform can do nothing for them."""
    least, most = int(boxes[:, 2:].min()), int(boxes[:, 2:].max())
    if level.decode_to is None or least < tile_size or most == tile_size:
        return None
    factors = (factor for factor in FACTORS if least >= factor * tile_size and level.shrunk(factor) is not None)
    tiles = ShrunkTiles(file, level, boxes, tile_size, next(factors, 1))
    return tiles if tiles.any_served else None
