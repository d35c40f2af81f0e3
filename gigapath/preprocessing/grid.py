"""The grid of tiles on a slide: which level is read, how many pixels, and where tile (i, j) lies.

Tile (i, j), column i and row j, has its corner at exactly anchor + (i, j) * pitch in level-0 pixels, and its cell in
the slide encoder's grid is (i, j): pitch and anchor are whole numbers, so every tool that divides finds the same cell.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gigapath.features import Tiles
from gigapath.preprocessing.slide import Slide, SlideError

UPSAMPLING_LIMIT = 1.3
HALF_PIXEL = 0.5  # what a tile may lack of its side before a level counts as too coarse
READ_PIXELS = 2**26  # no tile is made from more pixels than this
GRID_TILES = 10**8  # a hundred times what the largest slides hold


@dataclass(frozen=True)
class Grid:
    """Where tiles can lie on a slide; pairs are (x, y), or (columns, rows).

    Attributes:
        anchor: level-0 corner of tile (0, 0).
        pitch: whole level-0 pixels from a tile to the next.
        level, read_size: the level that is read, and its pixels that make one tile; resampled where not tile_size.
        tile_size: side of a tile as an encoder gets it, in pixels.
        mpp: effective microns per pixel of a tile along x and y.
        columns, rows: whole tiles that fit from left to right, and from top to bottom.
        upsampled: how much coarser the slide is than the target, or 1.0 where nothing is invented.
    """

    anchor: tuple[int, int]
    pitch: tuple[int, int]
    level: int
    read_size: tuple[int, int]
    tile_size: int
    mpp: tuple[float, float]
    columns: int
    rows: int
    upsampled: float = 1.0

    def corners(self, cells: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Level-0 corners (N, 2) of the cells (N, 2), both (x, y)."""
        return np.asarray(self.anchor, np.int64) + cells.astype(np.int64) * np.asarray(self.pitch, np.int64)

    def tiles(self, slide_id: str, cells: npt.NDArray[np.integer]) -> Tiles:
        """The tiles on the cells (N, 2) of a slide's grid, of which nothing more is known yet."""
        unknown = np.zeros(len(cells), np.float32)
        return Tiles(
            slide_id=slide_id,
            coords_level0=self.corners(cells),
            cells=cells,
            tissue_fraction=unknown,
            section=unknown,
            qc=unknown[:, None][:, :0],
            qc_names=(),
            level=self.level,
            read_size=self.read_size,
            tile_size=self.tile_size,
            tile_size_level0=self.pitch,
            mpp=(self.mpp[0] + self.mpp[1]) / 2,
        )


def plan_grid(
    slide: Slide,
    *,
    mpp: float = 0.5,
    tile_size: int = 256,
    tolerance: float = 0.02,
    allow_upsampling: bool = False,
) -> Grid:
    """The grid of whole tiles (`tile_size` pixels of `mpp` microns a side) within the slide's bounds.

    A level within a share of `tolerance` of `mpp` is used pixel for pixel. Else the tile is resampled from the coarsest
    level that lacks at most half a pixel of its side. A slide coarser than that is upsampled, up to 1.3 times, or
    beyond with `allow_upsampling`.

    Raises:
        SlideError: the slide is too coarse for `mpp`; a tile would take, or the grid would hold, absurdly many.
    """
    own = np.array([slide.mpp.x, slide.mpp.y])
    downsamples = slide.level_downsamples
    wanted = tile_size * mpp / own  # (2,) level-0 pixels of one tile, fractional

    def misfit(level: int) -> float:
        return float(np.abs(own * downsamples[level] / mpp - 1).max())

    def lacks(level: int) -> float:
        return float((tile_size - wanted / downsamples[level]).max())

    levels = range(len(downsamples))
    closest = min(levels, key=misfit)
    fine_enough = [level for level in levels if lacks(level) <= HALF_PIXEL]
    upsampled = 1.0
    if misfit(closest) <= tolerance:
        level, read_size = closest, np.array([tile_size, tile_size])
    else:
        if not fine_enough:
            upsampled = float(own.max() / mpp)
            _check_upsampling(slide, mpp, upsampled, allow_upsampling)
        level = max(fine_enough, key=lambda index: downsamples[index], default=0)
        read_size = np.maximum(1, np.rint(wanted / downsamples[level]).astype(int))
    if math.prod(read_size.tolist()) > READ_PIXELS:
        raise SlideError(
            f"slide {slide.slide_id!r}: expected a level near {mpp:g} microns per pixel, got "
            f"{own[0] * downsamples[level]:g} as the coarsest fine enough; one tile would take "
            f"{read_size[0]} x {read_size[1]} pixels. Choose a smaller --mpp, or give the slide a pyramid."
        )
    pitch = np.maximum(1, np.rint(read_size * _nominal(downsamples[level], int(read_size.max()))).astype(int))
    left, top, width, height = slide.bounds
    effective = pitch * own / tile_size
    columns = _whole_tiles(slide, 0, left, width, int(pitch[0]), int(read_size[0]), level)
    rows = _whole_tiles(slide, 1, top, height, int(pitch[1]), int(read_size[1]), level)
    if columns * rows > GRID_TILES:
        raise SlideError(
            f"slide {slide.slide_id!r}: expected at most {GRID_TILES} places for tiles, got {columns} x {rows}. "
            "Choose a larger --tile-size or --mpp, or check the slide's size."
        )
    return Grid(
        anchor=(left, top),
        pitch=(int(pitch[0]), int(pitch[1])),
        level=level,
        read_size=(int(read_size[0]), int(read_size[1])),
        tile_size=tile_size,
        mpp=(float(effective[0]), float(effective[1])),
        columns=columns,
        rows=rows,
        upsampled=upsampled,
    )


def _nominal(downsample: float, read_size: int) -> float:
    """The whole downsample that a level was made with, where its rounded sizes shift a tile by half a pixel at most."""
    whole = round(downsample)
    return whole if read_size * abs(downsample / whole - 1) <= HALF_PIXEL else downsample


def _check_upsampling(slide: Slide, mpp: float, factor: float, allowed: bool) -> None:
    if factor > UPSAMPLING_LIMIT * (1 + 1e-9) and not allowed:
        raise SlideError(
            f"slide {slide.slide_id!r}: expected at most {UPSAMPLING_LIMIT * mpp:g} microns per pixel for tiles at "
            f"{mpp:g}, got {slide.mpp.mean:g} (upsampled {factor:.2f} times). Choose a larger --mpp, or say "
            "--allow-upsampling."
        )


def _whole_tiles(slide: Slide, axis: int, start: int, extent: int, pitch: int, read: int, level: int) -> int:
    """Tiles along one axis that lie inside the bounds, and whose pixels the level holds: levels are rounded down, so
    the last tile may miss pixels there that level 0 has."""
    downsample = slide.level_downsamples[level]
    room = slide.level_dimensions[level][axis] + HALF_PIXEL - read - start / downsample
    if level == 0:
        room = slide.level_dimensions[0][axis] - read - start
    held = math.floor(room * downsample / pitch + 1e-9) + 1 if room >= 0 else 0
    return max(0, min(extent // pitch, held))
