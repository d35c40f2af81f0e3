"""The grid of tiles on a slide, and the tiles that hold tissue. Reads coarse levels and no tile, but for the published
rule, which judges each tile by its own pixels.

Tile (i, j), column i and row j, has its corner at exactly anchor + (i, j) * pitch in level-0 pixels, and its cell in
the slide encoder's grid is (i, j): pitch and anchor are whole numbers, so every tool that divides finds the same cell.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gigapath.features import TILES_NUMERICS_VERSION, Tiles
from gigapath.options import Options, option
from gigapath.preprocessing.reading import filter_name, iter_tiles
from gigapath.preprocessing.slide import SAME_SCALE, Overview, Slide, SlideError
from gigapath.preprocessing.tissue import (
    METHODS,
    BoolImage,
    TissueMask,
    bands,
    by_bands,
    extremes,
    find_tissue,
    glass_pixels,
    has_dark_background,
    is_grey,
    pen_pixels,
    published_tissue,
    saturation,
    share_below,
)

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

    def corners(self, cells: NDArray[np.integer]) -> NDArray[np.int64]:
        """Level-0 corners (N, 2) of the cells (N, 2), both (x, y)."""
        return np.asarray(self.anchor, np.int64) + cells.astype(np.int64) * np.asarray(self.pitch, np.int64)

    def tiles(self, slide_id: str, cells: NDArray[np.integer]) -> Tiles:
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
    misfits = [float(np.abs(own * step / mpp - 1).max()) for step in downsamples]
    level, read_size, upsampled = int(np.argmin(misfits)), np.array([tile_size, tile_size]), 1.0
    if misfits[level] > tolerance:
        fine = [i for i, step in enumerate(downsamples) if (tile_size - wanted / step).max() <= HALF_PIXEL]
        if not fine:
            upsampled = float(own.max() / mpp)
            if upsampled > UPSAMPLING_LIMIT * (1 + 1e-9) and not allow_upsampling:
                raise SlideError(
                    f"slide {slide.slide_id!r}: expected at most {UPSAMPLING_LIMIT * mpp:g} microns per pixel for "
                    f"tiles at {mpp:g}, got {slide.mpp.mean:g} (upsampled {upsampled:.2f} times). Choose a larger "
                    "--mpp, or say --allow-upsampling."
                )
        level = max(fine, key=downsamples.__getitem__, default=0)
        read_size = np.maximum(1, np.rint(wanted / downsamples[level]).astype(int))
    if math.prod(read_size.tolist()) > READ_PIXELS:
        raise SlideError(
            f"slide {slide.slide_id!r}: expected a level near {mpp:g} microns per pixel, got "
            f"{own[0] * downsamples[level]:g} as the coarsest fine enough; one tile would take "
            f"{read_size[0]} x {read_size[1]} pixels. Choose a smaller --mpp, or give the slide a pyramid."
        )
    # The whole downsample that a level was made with, where its rounded sizes shift a tile by half a pixel at most.
    step, whole = downsamples[level], round(downsamples[level])
    nominal = whole if read_size.max() * abs(step / whole - 1) <= HALF_PIXEL else step
    pitch = np.maximum(1, np.rint(read_size * nominal).astype(int))
    effective = pitch * own / tile_size
    columns, rows = (whole_tiles(slide, axis, int(pitch[axis]), int(read_size[axis]), level) for axis in (0, 1))
    if columns * rows > GRID_TILES:
        raise SlideError(
            f"slide {slide.slide_id!r}: expected at most {GRID_TILES} places for tiles, got {columns} x {rows}. "
            "Choose a larger --tile-size or --mpp, or check the slide's size."
        )
    return Grid(
        anchor=slide.bounds[:2],
        pitch=(int(pitch[0]), int(pitch[1])),
        level=level,
        read_size=(int(read_size[0]), int(read_size[1])),
        tile_size=tile_size,
        mpp=(float(effective[0]), float(effective[1])),
        columns=columns,
        rows=rows,
        upsampled=upsampled,
    )


def whole_tiles(slide: Slide, axis: int, pitch: int, read: int, level: int) -> int:
    """Tiles along one axis that lie inside the bounds, and whose pixels the level holds: levels are rounded down, so
    the last tile may miss pixels there that level 0 has."""
    start, extent, downsample = slide.bounds[axis], slide.bounds[2 + axis], slide.level_downsamples[level]
    room = slide.level_dimensions[level][axis] + HALF_PIXEL - read - start / downsample
    if level == 0:
        room = slide.level_dimensions[0][axis] - read - start
    held = math.floor(room * downsample / pitch + 1e-9) + 1 if room >= 0 else 0
    return max(0, min(extent // pitch, held))


def area_shares(values: NDArray[Any], frame: TissueMask | Overview, grid: Grid) -> NDArray[np.float32]:
    """Mean (rows, columns) over each tile's area of values (h, w) in a frame, exact for tiles that cut through its
    pixels; outside they count as 0."""
    x, y = (
        (grid.anchor[xy] + np.arange(count + 1) * grid.pitch[xy] - frame.origin_level0[xy]) / frame.scale[xy]
        for xy, count in ((0, grid.columns), (1, grid.rows))
    )
    return box_means(values, x, y)


def box_means(values: NDArray[Any], x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mean over boxes that lie side by side, exact where they cut through pixels: `x` (columns + 1,) and `y` (rows +
    1,) are their edges in pixels of `values` (h, w), which count as 0 outside; (rows, columns)."""
    # The running sums are 8 times as large as a mask.
    along = [np.diff(_integral(values[rows], x, axis=1)) for rows in bands(values.shape[:2])]
    sums = np.diff(_integral(np.concatenate(along), y, axis=0), axis=0)
    means: NDArray[np.float32] = (sums / np.outer(np.diff(y), np.diff(x))).astype(np.float32)
    return means


def _integral(values: NDArray[Any], edges: NDArray[np.floating], axis: int) -> NDArray[np.float64]:
    """Integral of a step function from its start to each edge along one axis; edges outside are clipped."""
    cumulated = np.insert(np.cumsum(values, axis=axis, dtype=np.float64), 0, 0, axis=axis)
    clipped = np.clip(edges, 0, values.shape[axis])
    whole = np.minimum(clipped.astype(np.int64), values.shape[axis] - 1)
    part = (clipped - whole).reshape((-1, 1) if axis == 0 else (1, -1))
    low, high = np.take(cumulated, whole, axis=axis), np.take(cumulated, whole + 1, axis=axis)
    result: NDArray[np.float64] = low * (1 - part) + high * part
    return result


def tile_sections(mask: TissueMask, grid: Grid) -> NDArray[np.int32]:
    """The connected piece that covers most of each tile's tissue (rows, columns); 0 where there is none. A pixel of the
    mask counts for the tile that holds its centre; of equal pieces the first in reading order wins."""
    cells = [
        np.floor(
            (mask.origin_level0[xy] + (np.arange(length) + 0.5) * mask.scale[xy] - grid.anchor[xy]) / grid.pitch[xy]
        )
        for xy, length in ((0, mask.mask.shape[1]), (1, mask.mask.shape[0]))
    ]
    column, row = (cell.astype(np.int64) for cell in cells)  # of each column and row of pixels
    sections = np.zeros((grid.rows, grid.columns), np.int32)
    inside = (column >= 0) & (column < grid.columns)
    for tile_row in np.unique(row[(row >= 0) & (row < grid.rows)]):
        band = mask.sections[row == tile_row][:, inside]
        keys = column[inside] * (mask.pieces + 1) + band  # tile and piece in one number
        found, count = np.unique(keys[band > 0], return_counts=True)
        tile, piece = np.divmod(found, mask.pieces + 1)
        order = np.lexsort((-piece, count))  # the largest, and of these the first piece, is written last
        sections[tile_row, tile[order]] = piece[order]
    return sections


# Flags per tile, seen at low power: numbers to look at and to filter by later; no tile is left out for them.
QC_NAMES = ("focus", "white", "black", "pen", "saturation")

BLACK_LEVEL = 60  # no channel above this
FOCUS_MPP = 4.0  # cells are 2 to 4 pixels wide here, and most pyramids hold a level near it
FOCUS_PIXELS = 100_000_000  # a level larger than this is not read for the focus alone
STRIP_PIXELS = 1_500_000
RIM = 16  # pixels of the level
TEXTURE = 2.0  # mean grey levels per pixel below which there is nothing to judge the focus by


@dataclass(frozen=True)
class TileOptions(Options):
    """How a slide is cut into tiles; every field changes the result."""

    mpp: float = option(0.5, "microns per pixel of a tile", above=0, at_most=1000)
    mpp_tolerance: float = option(
        0.02, "share by which a level may differ from --mpp and be used pixel for pixel", at_least=0, at_most=0.5
    )
    slide_mpp: float | None = option(
        None, "microns per level-0 pixel, instead of what the slide says", above=0, at_most=1000
    )
    mpp_from_objective: bool = option(False, "take 10 / objective power where the slide states no microns per pixel")
    tile_size: int = option(256, "side of a tile in pixels", at_least=16, at_most=4096)
    tissue: str = option("otsu", "rule that finds tissue, or a mask's file", metavar="otsu|published|none|PATH")
    include: tuple[str, ...] = option((), "annotation classes that count as tissue (with --tissue PATH)")
    exclude: tuple[str, ...] = option((), "annotation classes that don't (with --tissue PATH)")
    min_tissue: float = option(0.1, "share of a tile that must be tissue", at_least=0, at_most=1)
    max_tiles: int | None = option(None, "most tiles of a slide, spread evenly over its tissue", at_least=1)
    seed: int = option(0, "seed of the choice that --max-tiles makes", at_least=0)
    allow_upsampling: bool = option(False, "upsample slides coarser than 1.3 times --mpp")
    allow_dark_background: bool = option(False, "tile slides with a dark background (fluorescence)")


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles of a slide (none where it holds no tissue) and how they were found: the grid of places where they could
    lie, the overview, its tissue; `dropped` places that became no tile, counted by reason (with the tiles they make up
    the grid); warnings for a person, also in `tiles.attrs`."""

    tiles: Tiles
    grid: Grid
    overview: Overview
    mask: TissueMask
    dropped: dict[str, int]
    warnings: tuple[str, ...]


def plan_tiles(slide: Slide, options: TileOptions, *, workers: int = 0) -> TilePlan:
    """Find the tissue of a slide and the whole tiles on it, sorted by (y, x); the same with any number of `workers`.
    `slide_mpp` and `mpp_from_objective` took effect when the slide was opened.

    Raises:
        SlideError: no or implausible mpp, too coarse for the target, dark background, grey, unreadable pixels.
        FileNotFoundError, ValueError: the mask of `--tissue PATH` is missing or none of this slide.
    """
    grid = plan_grid(
        slide,
        mpp=options.mpp,
        tile_size=options.tile_size,
        tolerance=options.mpp_tolerance,
        allow_upsampling=options.allow_upsampling,
    )
    overview = slide.overview(workers=workers)
    slide.compare_levels(overview, len(slide.level_dimensions) - 1 if options.tissue == "published" else grid.level)
    if grid.level >= len(slide.level_dimensions):
        return plan_tiles(slide, options, workers=workers)
    dark = has_dark_background(overview)
    if dark and not options.allow_dark_background:
        raise SlideError(
            f"slide {slide.slide_id!r}: expected a brightfield slide, got a dark background, looks like fluorescence. "
            "The encoders know brightfield stains only; go on all the same with --allow-dark-background."
        )
    if not dark and (slide.one_channel or is_grey(overview)):
        held = "one channel a page" if slide.one_channel else "no colour anywhere"
        raise SlideError(
            f"slide {slide.slide_id!r}: expected a stained slide in colours, got grey pixels ({held}). The encoders "
            "know stains by their colours: write the slide again as RGB."
        )
    mask = tissue_of(slide, overview, options.tissue, include=options.include, exclude=options.exclude)
    if options.tissue == "published":
        fractions = published_shares(slide, mask, grid, workers=workers)
        kept = fractions > options.min_tissue  # "exceeds", as published
    else:
        fractions = area_shares(mask.mask, mask, grid)  # (rows, columns)
        kept = fractions >= options.min_tissue
    sections = tile_sections(mask, grid)
    dropped = count_dropped(mask, grid, fractions, kept, options.min_tissue)
    rows, columns = np.nonzero(kept)
    cells = np.stack([columns, rows], axis=1).astype(np.int32)
    if options.max_tiles is not None and len(cells) > options.max_tiles:
        chosen = spread_evenly(cells, options.max_tiles, options.seed)
        dropped["max tiles"] = len(cells) - len(chosen)
        cells = cells[chosen]
    warnings = tuple(_warnings(slide, grid, options, dark, mask, len(cells)))
    at = cells[:, 1], cells[:, 0]
    tiles = dataclasses.replace(
        grid.tiles(slide.slide_id, cells),
        tissue_fraction=fractions[at],
        section=sections[at],
        qc=tile_qc(slide, overview, grid, cells),
        qc_names=QC_NAMES,
        attrs={
            "slide_size": slide.dimensions,
            "bounds": slide.bounds,
            "vendor": slide.vendor,
            "scanner": slide.scanner,
            "objective_power": slide.objective_power,
            "mpp_level0": (slide.mpp.x, slide.mpp.y),
            "mpp_source": slide.mpp.source,
            "numerics_version": TILES_NUMERICS_VERSION,
            "reader": slide.fast.used_so_far,
            "filter": filter_name(grid.read_size, grid.tile_size),
            "mpp_target": options.mpp,
            "mpp_tolerance": options.mpp_tolerance,
            "mpp_xy": grid.mpp,
            "level_size": slide.level_dimensions[grid.level],
            "level_downsample": slide.level_downsamples[grid.level],
            "anchor": grid.anchor,
            "grid_size": (grid.columns, grid.rows),
            "upsampled": grid.upsampled,
            "tissue_method": mask.method,
            "tissue_threshold": mask.threshold,
            "tissue_state": mask.state,
            "tissue_area_mm2": mask.area_mm2,
            "tissue_pieces": mask.pieces,
            "min_tissue": options.min_tissue,
            "max_tiles": options.max_tiles,
            "seed": options.seed if options.max_tiles is not None else None,
            "dropped": dropped,
            "dark_background": dark,
            "warnings": warnings,
        },
    )
    return TilePlan(tiles=tiles, grid=grid, overview=overview, mask=mask, dropped=dropped, warnings=warnings)


def tissue_of(
    slide: Slide, overview: Overview, tissue: str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> TissueMask:
    """The tissue of a slide as `--tissue` says: a method, or the path of a file, or of a folder that holds `<slide
    id>.<suffix>`; of its classes those in `include` count (all when empty), those in `exclude` are cut out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no mask of this slide, or classes are asked for where there are none.
    """
    if tissue not in METHODS:
        from gigapath.preprocessing.masks import mask_file, read_mask  # where masks are given

        return read_mask(mask_file(Path(tissue), slide.slide_id), slide, overview, include=include, exclude=exclude)
    if include or exclude:
        raise ValueError(f"--include, --exclude: expected --tissue FILE beside them, got --tissue {tissue}. Give one.")
    if tissue == "published":
        return published_tissue(slide, overview)
    return find_tissue(overview, tissue)


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
    for first, pixels in iter_tiles(slide, tiles, batch_size=32, workers=workers):
        rows, columns = cells[first : first + len(pixels), 1], cells[first : first + len(pixels), 0]
        shares[rows, columns] = share_below(pixels, mask.threshold)
    return shares


def count_dropped(
    mask: TissueMask, grid: Grid, fractions: NDArray[np.float32], kept: BoolImage, min_tissue: float
) -> dict[str, int]:
    """Places of the grid that became no tile, by reason.

    A place that would have been kept but for something taken out of the tissue (pen, black, frame, speck) counts for
    what took most of it; the others are "background" without tissue or "little tissue".
    """
    reasons = list(mask.dropped)
    taken = np.stack(
        [area_shares(mask.dropped[reason], mask, grid) for reason in reasons] or [np.zeros_like(fractions)]
    )
    would_be = ~kept & (fractions + taken.sum(axis=0) >= min_tissue) & (taken.max(axis=0) > 0)
    largest = taken.argmax(axis=0)
    counts = {reason: int(np.count_nonzero(would_be & (largest == i))) for i, reason in enumerate(reasons)}
    others = ~kept & ~would_be
    counts["background"] = int(np.count_nonzero(others & (fractions == 0)))
    counts["little tissue"] = int(np.count_nonzero(others & (fractions > 0)))
    return {reason: count for reason, count in counts.items() if count}


def tile_qc(slide: Slide, overview: Overview, grid: Grid, cells: NDArray[np.int32]) -> NDArray[np.float32]:
    """Measure every tile (`cells` (N, 2), column and row): (N, K), columns as in QC_NAMES.

    `focus` is the mean spatial frequency of the tile at 4 microns a pixel, in cycles per millimetre, whatever the
    contrast: sharp sections lie at 90 to 140, blurred by 2 microns at 70, by 4 at 40; NaN where nothing can be judged.
    `white`, `black` and `pen` are shares of the tile's area, `saturation` its mean in 0 to 1, from the overview.
    """
    image, mpp = overview.image, overview.mpp
    maps: dict[str, Callable[[], NDArray[Any]]] = {  # one at a time: each is as large as the overview
        "white": lambda: glass_pixels(image),
        "black": lambda: extremes(image)[0] <= BLACK_LEVEL,
        "pen": lambda: pen_pixels(image, mpp),
        "saturation": lambda: by_bands(image, saturation),
    }
    columns, rows = cells[:, 0], cells[:, 1]
    found = {name: area_shares(values(), overview, grid)[rows, columns] for name, values in maps.items()}
    found["focus"] = _focus(slide, grid, np.unique(rows))[rows, columns]
    return np.stack([found[name] for name in QC_NAMES], axis=1).astype(np.float32)


def _focus(slide: Slide, grid: Grid, rows: NDArray[np.integer]) -> NDArray[np.float32]:
    """(rows, columns) of the grid: the focus of the tiles in these rows, NaN elsewhere.

    The mean square frequency of an image is the power of its Laplacian over the power of its gradient.
    """
    focus = np.full((grid.rows, grid.columns), np.nan, np.float32)
    own = slide.mpp
    fine = [i for i, step in enumerate(slide.level_downsamples) if max(own.x, own.y) * step <= FOCUS_MPP * 1.02]
    if not fine or not rows.size:
        return focus
    level = fine[-1]
    if np.prod(slide.level_dimensions[level], dtype=np.int64) > FOCUS_PIXELS:
        return focus
    step = slide.level_downsamples[level]
    width = grid.columns * grid.pitch[0]  # level-0 pixels
    height = max(1, int(STRIP_PIXELS / (width / step) / (grid.pitch[1] / step)))  # tile rows at once
    strips = []  # first and last row of tiles, lines above them and of them
    places = []
    for first in range(int(rows[0]), int(rows[-1]) + 1, height):
        last = min(first + height, int(rows[-1]) + 1)
        if not ((rows >= first) & (rows < last)).any():
            continue
        # A rim above and below where the grid goes on, so that strips leave no trace.
        above, below = (RIM if first else 0), (RIM if last < grid.rows else 0)
        lines = round((last - first) * grid.pitch[1] / step)
        top = grid.anchor[1] + first * grid.pitch[1] - round(above * step)
        strips.append((first, last, above, lines))
        places.append((grid.anchor[0], top, round(width / step), lines + above + below))
    read = slide.reads(level, np.array(places, np.int64))
    for index, (first, last, above, lines) in enumerate(strips):
        size = places[index][2:]
        strip = cv2.cvtColor(read(index, None), cv2.COLOR_RGB2GRAY)
        shrunk = max(2, round(width * own.x / FOCUS_MPP)), max(2, round(size[1] * step * own.y / FOCUS_MPP))
        grey = cv2.resize(strip, shrunk, interpolation=cv2.INTER_AREA).astype(np.float32)
        across, down = (cv2.Sobel(grey, cv2.CV_32F, dx, 1 - dx, ksize=1, scale=0.5) for dx in (1, 0))
        bend = cv2.Laplacian(grey, cv2.CV_32F, ksize=1)
        x = np.linspace(0, shrunk[0], grid.columns + 1)
        y = np.linspace(above, above + lines, last - first + 1) * shrunk[1] / size[1]
        slope, curve = (box_means(np.asarray(power), x, y) for power in (across**2 + down**2, bend**2))
        judged = slope > TEXTURE**2
        frequency = np.sqrt(curve / np.maximum(slope, TEXTURE**2)) / (2 * np.pi) * (1000 / FOCUS_MPP)
        focus[first:last] = np.where(judged, frequency, np.nan)
    return focus


def spread_evenly(cells: NDArray[np.integer[Any]], count: int, seed: int) -> NDArray[np.int64]:
    """Indices (count,), ascending, of `count` of the cells (N, 2), spread evenly over where they lie: the cells are put
    in the order in which a Hilbert curve passes them, the order is cut into `count` equal runs, and one is drawn from
    each."""
    order = np.argsort(hilbert_index(cells), kind="stable")
    edges = np.arange(count + 1) * len(cells) // count
    drawn = np.random.default_rng(seed).random(count)
    picks = edges[:-1] + (drawn * np.diff(edges)).astype(np.int64)
    chosen: NDArray[np.int64] = np.sort(order[picks])
    return chosen


def hilbert_index(cells: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Where a Hilbert curve over a square of 2^k cells a side passes each cell (N, 2); neighbours on it touch."""
    x, y = cells.T.astype(np.int64)
    index = np.zeros(len(cells), np.int64)
    side = 1 << max(1, int(cells.max(initial=1)).bit_length() - 1)
    while side:
        right, lower = (x & side) > 0, (y & side) > 0
        index += side * side * ((3 * right) ^ lower)
        # Turn the quarter so that the curve enters and leaves it where its neighbours join.
        flip = right & ~lower
        x, y = np.where(flip, side - 1 - (x & (side - 1)), x), np.where(flip, side - 1 - (y & (side - 1)), y)
        x, y = np.where(lower, x, y), np.where(lower, y, x)
        side >>= 1
    return index


def _warnings(
    slide: Slide, grid: Grid, options: TileOptions, dark: bool, mask: TissueMask, count: int
) -> Iterator[str]:
    """What a person should know of a slide that got so many tiles."""
    if grid.upsampled > 1:
        yield (
            f"upsampled {grid.upsampled:.2f} times: the slide has {slide.mpp.mean:g} microns per pixel, "
            f"tiles {options.mpp:g}."
        )
    if slide.misfits:
        sizes = ", ".join(f"{width} x {height}" for width, height in slide.misfits[:3])
        yield (
            f"levels from {len(slide.level_dimensions)} on ({sizes}) are not read: the first of them is not "
            f"{slide.dimensions[0]} x {slide.dimensions[1]} made smaller (padded, cropped, or another picture)."
        )
    stated = slide.stated_mpp
    if stated is not None and stated.source != slide.mpp.source and abs(slide.mpp.mean / stated.mean - 1) > SAME_SCALE:
        yield (
            f"{slide.mpp.source} says {slide.mpp.mean:g} microns per pixel, the slide itself {stated.mean:g} "
            f"({stated.source})."
        )
    if dark:
        yield "dark background, looks like fluorescence: the encoders know brightfield stains only."
    if grid.columns == 0 or grid.rows == 0:
        yield f"no whole tile of {grid.pitch[0]} x {grid.pitch[1]} level-0 pixels fits into the slide."
    elif not count and mask.pieces:
        yield f"no tile holds {options.min_tissue:g} of tissue. Lower --min-tissue where these pieces matter."
    elif not count and mask.method in ("otsu", "published"):
        others = " or ".join(name for name in METHODS if name != mask.method)
        yield (
            "nothing stands out from the glass as stain does. Where its preview shows tissue, faded say, use --tissue "
            f"{others}, or a mask's PATH."
        )
    elif not count and mask.method == "none":
        yield "all of it is transparent: nothing was scanned."
