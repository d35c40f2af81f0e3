"""Where the tissue is, found on an overview of about 8 microns a pixel by Otsu's threshold on the stain, taken down to
the palest tissue.

Frames: overview pixels are (row, column) of `mask`; level-0 pixels are OpenSlide's absolute (x, y); a `TissueMask`
carries the step from the one to the other. Colours are 8-bit RGB. The rules are those of three methods: `otsu` and
`none` here, `published` in `gigapath.preprocessing.published`; masks that come as files are read in
`gigapath.preprocessing.masks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing import stain
from gigapath.preprocessing.grid import Grid
from gigapath.preprocessing.slide import Overview
from gigapath.preprocessing.stain import GLASS_CHROMA

# Rules by which `--tissue` finds tissue; whatever else it names is a file or a folder of files.
METHODS = ("otsu", "published", "none")

# Stain, in grey levels, by which tissue must stand out from glass. Empty glass, blurred, scatters by 2 to 6; the
# palest tissue that is still worth a tile stands out by about 15.
CONTRAST = 12

# Thresholds where there are no two classes.
EVERYTHING, NOTHING = 0, 256


def otsu_cuts(histogram: NDArray[Any]) -> NDArray[np.int64]:
    """Otsu's threshold on a histogram (n,), at least two counts not 0: the last bins of the lower class for which the
    variance between the classes is largest. Between two far peaks every cut of the gap is equally good; all are given,
    ascending."""
    counts = histogram.astype(np.float64)
    below = np.cumsum(counts)[:-1]
    sums = np.cumsum(counts * np.arange(len(counts)))
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / counts.sum() - sums[:-1]) ** 2 / (below * above)
    between = np.nan_to_num(between, nan=-1.0, posinf=-1.0)
    return np.flatnonzero(between >= between.max() * (1 - 1e-12))


def palest_tissue(values: NDArray[np.uint8]) -> int:
    """The least of the stain values (n,) that is tissue; EVERYTHING or NOTHING where there are no two classes: Otsu's
    threshold, taken again on the paler class as long as the classes stand CONTRAST apart.

    One threshold over dark and pale tissue would lie between those two. Going on until only glass is left finds the
    palest tissue, whatever pigment, DAB or haemorrhage lies beside it. The glass's own scatter is flattened first, lest
    its width outvote a needle biopsy.
    """
    if not values.size:
        return NOTHING
    glass = values[values <= GLASS_CHROMA]
    level = float(np.median(glass)) if glass.size else 0.0
    scatter = _scatter(np.bincount(glass), level)
    histogram = np.bincount(values, minlength=256)
    flat = int(min(level + 3 * 1.4826 * scatter, CONTRAST))
    histogram[flat] = histogram[: flat + 1].sum()
    histogram[:flat] = 0
    threshold = None
    while np.count_nonzero(histogram) > 1:
        cuts = otsu_cuts(histogram)
        cut = int(cuts[len(cuts) // 2]) + 1  # in the middle of a gap
        if cut + _median(histogram[cut:]) - _median(histogram[:cut]) < CONTRAST:
            break
        threshold, histogram = cut, histogram[:cut]
    if threshold is None and glass.size >= 0.5 * values.size:
        return NOTHING
    # Where hardly any glass is to be seen, Otsu's threshold falls between tissue and tissue, or nowhere.
    paler = histogram if threshold is not None else np.bincount(values[values > GLASS_CHROMA], minlength=256)
    if not glass.size or not paler.any():
        return EVERYTHING if threshold is None else threshold
    if _median(paler) >= level + CONTRAST:
        return round(level) + CONTRAST
    return EVERYTHING if threshold is None else threshold


def _scatter(histogram: NDArray[np.int64], level: float) -> float:
    """Median distance from `level` of the values that a histogram counts; 0 where it counts none."""
    distances = np.abs(np.arange(len(histogram)) - level)
    order = np.argsort(distances)
    cumulated = np.cumsum(histogram[order])
    if not cumulated.size or not cumulated[-1]:
        return 0.0
    middle = np.searchsorted(cumulated, [(cumulated[-1] - 1) // 2, cumulated[-1] // 2], side="right")
    return float(distances[order][middle].mean())


def _median(histogram: NDArray[np.int64]) -> int:
    cumulated = np.cumsum(histogram)
    return int(np.searchsorted(cumulated, cumulated[-1] / 2))


BoolImage = NDArray[np.bool_]
State = Literal["tissue", "blank", "full"]

SPECK_UM2 = 4_000.0  # a quarter of a tile of 128 microns
HOLE_UM2 = 2_500.0

# Fluorescence: most of the field nearly black, nothing bright and pale in it. A brightfield slide has glass or pale
# tissue somewhere, however much of it was never scanned.
DARK_LEVEL = 30
DARK_SHARE = 0.25
DARK_PALE_SHARE = 0.005
DARK_PALE_LEVEL = 140

GREY_CHROMA = 2  # what rounding of YCbCr leaves of grey
GREY_LEVEL = 215  # glass is lighter
GREY_SHARE = 0.002

FRAME_DARKEST = 130
FRAME_CHROMA = 30
FRAME_DEPTH = 0.05  # of the side, at least 3 pixels


@dataclass(frozen=True)
class TissueMask:
    """Tissue of one slide on its overview, in whose frame (`origin_level0`, level-0 pixels per mask pixel `scale`) it
    lies.

    Attributes:
        mask: (h, w), True = tissue.
        sections: (h, w), connected piece of tissue, counted from 1 in reading order; 0 = none.
        mpp: microns per mask pixel.
        method: the rule that made the mask.
        threshold: what the rule compared with, in its own unit; None where it compared nothing.
        state: "tissue"; "blank", no tissue at all; "full", no background at all.
        dropped: (h, w) by reason: what looked like tissue and was taken out.
        background: RGB of the glass; None where none was seen.
        box_level0: (x, y, width, height) of all foreground, where the rule wants it.
    """

    mask: BoolImage
    sections: NDArray[np.int32]
    origin_level0: tuple[float, float]
    scale: tuple[float, float]
    mpp: float
    method: str
    threshold: float | None
    state: State
    dropped: Mapping[str, BoolImage] = field(default_factory=dict)
    background: tuple[int, int, int] | None = None
    box_level0: tuple[int, int, int, int] | None = None

    @property
    def area_mm2(self) -> float:
        """Area of the tissue."""
        return float(np.count_nonzero(self.mask)) * self.mpp**2 / 1e6

    @property
    def pieces(self) -> int:
        """Number of connected pieces."""
        return int(self.sections.max(initial=0))


def find_tissue(overview: Overview, method: str = "otsu") -> TissueMask:
    """Find the tissue on an overview by "otsu", or "none": everything that was scanned counts. ValueError for another
    method."""
    if method == "none":
        return make_mask(overview, overview.opaque.copy(), method=method, state="full")
    if method != "otsu":
        raise ValueError(f"tissue: expected otsu or none, got {method!r}. Give one of them.")
    image = overview.image
    if has_dark_background(overview):
        return _bright_on_dark(overview)
    fill = overview.opaque & (stain.extremes(image)[0] <= stain.FILL_LEVEL)
    unscanned = stain.at_border(fill) | _missing(image)
    frame = _dark_frame(image) & ~fill
    frame |= _grey_edges(image, frame | unscanned)
    pen = stain.pen_pixels(image, overview.mpp)
    seen = overview.opaque & ~frame & ~unscanned
    counted = seen & ~fill & ~pen
    blurred = stain.blurred_where_seen(image, seen)
    glass = stain.glass_colour(blurred, counted)
    threshold, stained = EVERYTHING, np.ones_like(counted)
    if glass is not None:
        smooth, sharp = stain.stain_image(blurred, glass), stain.stain_image(image, glass)
        threshold = palest_tissue(smooth[counted])
        stained = (smooth >= threshold) & (sharp >= threshold)  # the smooth image alone would give tissue a rim
    found = counted & stained
    if found.any():
        pen &= stained  # without tissue the whole stroke is recorded
    kept_pen = stain.on_tissue(pen, found, overview.mpp)
    kept_fill = stain.touching(fill & ~unscanned, found)
    found |= kept_pen | kept_fill
    dropped = {"pen": pen & ~kept_pen, "black": fill & ~kept_fill, "frame": frame}
    whole = _without_specks(_without_holes(found, overview.mpp) & ~dropped["pen"] & overview.opaque, overview.mpp)
    dropped["speck"] = found & ~whole
    return make_mask(
        overview,
        whole,
        method=method,
        threshold=float(threshold) if EVERYTHING < threshold < NOTHING else None,
        state="blank" if not whole.any() else "full" if threshold == EVERYTHING else "tissue",
        dropped=dropped,
        background=None if glass is None else (round(glass[0]), round(glass[1]), round(glass[2])),
    )


def is_grey(overview: Overview) -> bool:
    """Whether something is to be seen on a slide, and all of it in greys, as in a file of one channel."""
    lightest, darkest = overview.image.max(axis=-1), overview.image.min(axis=-1)
    seen = overview.opaque & (darkest < GREY_LEVEL)
    enough = np.count_nonzero(seen) >= GREY_SHARE * overview.opaque.sum() > 0
    return bool(enough and (lightest - darkest)[overview.opaque].max() <= GREY_CHROMA)


def has_dark_background(overview: Overview) -> bool:
    """Whether the slide looks like fluorescence: bright things on black."""
    brightest, darkest = (values[overview.opaque] for values in stain.extremes(overview.image))
    if not brightest.size:
        return False
    dark = np.count_nonzero(brightest <= DARK_LEVEL) / brightest.size
    pale = np.count_nonzero(darkest >= DARK_PALE_LEVEL) / brightest.size
    return bool(dark >= DARK_SHARE and pale < DARK_PALE_SHARE)


def _bright_on_dark(overview: Overview) -> TissueMask:
    """Tissue of a fluorescence slide: the same rule on the brightest channel, specks left out."""
    brightest = stain.extremes(cv2.blur(overview.image, (3, 3)))[0]
    threshold = palest_tissue(brightest[overview.opaque])
    found = overview.opaque & (brightest >= threshold)
    whole = _without_specks(_without_holes(found, overview.mpp) & overview.opaque, overview.mpp)
    return make_mask(
        overview,
        whole,
        method="otsu",
        threshold=float(threshold),
        state="tissue" if whole.any() else "blank",
        dropped={"speck": found & ~whole},
        background=(0, 0, 0),
    )


def make_mask(
    overview: Overview,
    mask: BoolImage,
    *,
    method: str,
    state: State = "tissue",
    threshold: float | None = None,
    dropped: Mapping[str, BoolImage] | None = None,
    background: tuple[int, int, int] | None = None,
    box_level0: tuple[int, int, int, int] | None = None,
) -> TissueMask:
    """A TissueMask in the frame of `overview`, its pieces counted; areas in `dropped` without a pixel are not kept."""
    return TissueMask(
        mask=mask,
        sections=_pieces(mask)[0],
        origin_level0=overview.origin_level0,
        scale=overview.scale,
        mpp=overview.mpp,
        method=method,
        threshold=threshold,
        state=state,
        dropped={reason: area for reason, area in (dropped or {}).items() if area.any()},
        background=background,
        box_level0=box_level0,
    )


def _dark_frame(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): thin dark lines that run along at least half of a side, near the border.

    Dark rows that go on beyond the depth looked at are tissue or pigment, not a frame.
    """
    brightest, darkest = stain.extremes(image)
    chroma = brightest - darkest
    dark: BoolImage = (brightest < FRAME_DARKEST) & (chroma < FRAME_CHROMA)
    frame = np.zeros_like(dark)
    for turns in range(4):
        rows, marks = np.rot90(dark, turns), np.rot90(frame, turns)  # views: each side in turn lies on top
        depth = min(max(3, int(FRAME_DEPTH * len(rows))), len(rows) // 3)
        lines = rows[:depth].mean(axis=1) >= 0.5
        clear = np.flatnonzero(~lines)
        for row in np.flatnonzero(lines[: clear[-1]]) if clear.size else ():
            marks[row] |= rows[row]
    return frame


def _missing(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): blocks that are black to the last bit, as scanners leave what they could not read; no pigment is."""
    black: BoolImage = stain.extremes(image)[0] == 0
    return np.asarray(cv2.morphologyEx(black.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))) > 0


def _grey_edges(image: NDArray[np.uint8], dark: BoolImage) -> BoolImage:
    """(h, w): grey pixels up to two steps from `dark`, mixed from it and from glass."""
    if not dark.any():
        return dark
    brightest, darkest = stain.extremes(image)
    beside = cv2.dilate(dark.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    edges: BoolImage = beside & ~dark & (brightest < 230) & (brightest - darkest < FRAME_CHROMA)
    return edges


def _without_specks(mask: BoolImage, mpp: float) -> BoolImage:
    """The mask without pieces smaller than SPECK_UM2 (and than 4 pixels)."""
    labels, areas = _pieces(mask)
    keep = areas >= max(SPECK_UM2 / mpp**2, 4)
    keep[0] = False
    return keep[labels]


def _without_holes(mask: BoolImage, mpp: float) -> BoolImage:
    """The mask with holes smaller than HOLE_UM2 filled."""
    labels, areas = _pieces(~mask, connectivity=4)
    fill = areas < HOLE_UM2 / mpp**2
    fill[0] = False
    return mask | fill[labels]


def _pieces(mask: BoolImage, connectivity: int = 8) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(h, w) labels, 0 = outside, and the area of each label in pixels."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    return np.asarray(labels, np.int32), np.asarray(statistics[:, cv2.CC_STAT_AREA], np.int32)


def tile_fractions(mask: TissueMask, grid: Grid) -> NDArray[np.float32]:
    """Share (rows, columns) of each tile that is tissue, 0 to 1 by area, exact for tiles that cut through mask pixels;
    what a tile has outside the mask counts as no tissue."""
    return area_shares(mask.mask, mask, grid)


def area_shares(values: NDArray[Any], mask: TissueMask, grid: Grid) -> NDArray[np.float32]:
    """Mean (rows, columns) over each tile's area of values (h, w) in the frame of `mask`; outside they count as 0."""
    return box_means(values, *tile_edges(mask, grid))


def tile_edges(frame: TissueMask | Overview, grid: Grid) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Where the grid's columns (columns + 1,) and rows (rows + 1,) begin and end, in pixels of the frame."""
    x, y = (
        (grid.anchor[xy] + np.arange(count + 1) * grid.pitch[xy] - frame.origin_level0[xy]) / frame.scale[xy]
        for xy, count in ((0, grid.columns), (1, grid.rows))
    )
    return x, y


def box_means(values: NDArray[Any], x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mean over boxes that lie side by side, exact where they cut through pixels: `x` (columns + 1,) and `y` (rows +
    1,) are their edges in pixels of `values` (h, w), which count as 0 outside; (rows, columns)."""
    # The running sums are 8 times as large as a mask.
    along = [np.diff(_integral(values[rows], x, axis=1)) for rows in stain.bands(values.shape[:2])]
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
