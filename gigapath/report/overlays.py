"""Pictures that lie over a slide: a few pixels for each cell of its grid, clear where there is no tile.

A cell is square in microns, and so it is in the picture; the page stretches the picture over its place on the slide.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gigapath.features import Tiles

LARGEST = 2048  # pixels of a side, where cells keep at least LEAST_CELL
LEAST_CELL, MOST_CELL = 3, 32  # pixels of a cell's side
LINE = (37, 92, 235)
FILL_ALPHA = 46

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Placed:
    """A picture and where it lies.

    Attributes:
        png: its bytes.
        pixels: (width, height) of it.
        rectangle_level0: (x, y, w, h) in level-0 pixels.
    """

    png: bytes
    pixels: tuple[int, int]
    rectangle_level0: tuple[int, int, int, int]

    def to_dict(self, file: str) -> dict[str, Any]:
        """What the page needs to lay it over the slide."""
        return {"file": file, **dict(zip("xywh", self.rectangle_level0, strict=True)), "pixels": list(self.pixels)}


def draw_tiles(tiles: Tiles) -> Placed:
    """The outlines of the tiles, faintly filled."""
    cells, size, side = _grid(tiles)
    kept = np.zeros((size[1] + 1, size[0] + 1), bool)  # with a column and a row of nothing at the end
    kept[cells[:, 1], cells[:, 0]] = True
    inside = kept[:-1, :-1]
    shades = np.kron(inside, np.ones((side, side), np.uint8)).astype(np.uint8)
    shades[::side][np.repeat(inside, side, axis=1)] = 2
    shades[:, ::side][np.repeat(inside, side, axis=0)] = 2
    last_right = inside & ~kept[:-1, 1:]
    last_down = inside & ~kept[1:, :-1]
    shades[:, side - 1 :: side][np.repeat(last_right, side, axis=0)] = 2
    shades[side - 1 :: side][np.repeat(last_down, side, axis=1)] = 2
    palette = np.array([LINE, LINE, LINE], np.uint8)
    png = _png(shades, palette, (0, FILL_ALPHA, 255))
    return Placed(png, (size[0] * side, size[1] * side), _rectangle(tiles, cells, size))


def enlarge(cells: Image.Image, rectangle_level0: tuple[int, int, int, int]) -> Placed:
    """A picture of one pixel a cell with several pixels a cell, so that the edges of tiles stay sharp on the slide."""
    side = _cell_side(*cells.size)
    size = cells.width * side, cells.height * side
    large = cells.convert("RGBA").resize(size, Image.Resampling.NEAREST)
    return Placed(_encode(large), size, rectangle_level0)


def _grid(tiles: Tiles) -> tuple[npt.NDArray[np.int64], tuple[int, int], int]:
    """(cells from the first column and row on, (columns, rows), pixels of a cell's side)."""
    cells = tiles.cells.astype(np.int64)
    cells = cells - cells.min(axis=0)
    columns, rows = (int(value) + 1 for value in cells.max(axis=0))
    return cells, (columns, rows), _cell_side(columns, rows)


def _cell_side(columns: int, rows: int) -> int:
    return max(LEAST_CELL, min(MOST_CELL, LARGEST // max(columns, rows)))


def _rectangle(tiles: Tiles, cells: npt.NDArray[np.int64], size: tuple[int, int]) -> tuple[int, int, int, int]:
    pitch = tiles.tile_size_level0
    left, top = (int(value) for value in tiles.coords_level0[0] - cells[0] * pitch)
    return left, top, size[0] * pitch[0], size[1] * pitch[1]


def _png(shades: UInt8Array, palette: UInt8Array, alphas: tuple[int, ...]) -> bytes:
    image = Image.fromarray(shades).convert("P")
    image.putpalette(palette.tobytes())
    return _encode(image, transparency=bytes(alphas))


def _encode(image: Image.Image, **given: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **given)
    return buffer.getvalue()
