"""Where the tissue is, found on an overview of about 8 microns a pixel by Otsu's threshold on the stain, taken down to
the palest tissue.

Frames: overview pixels are (row, column) of `mask`; level-0 pixels are OpenSlide's absolute (x, y); a `TissueMask`
carries the step from the one to the other. Colours are 8-bit RGB. The rules are those of three methods: `otsu`, `none`
and, at the end, `published`; masks that come as files are read in `gigapath.preprocessing.masks`.

What tells tissue from glass is colour and real darkness; brightness alone also differs from field to field of a
stitched slide, under dust, and where fields were never scanned.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing.slide import Overview, Slide

BoolImage = NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)

# Rules by which `--tissue` finds tissue; whatever else it names is a file or a folder of files.
METHODS = ("otsu", "published", "none")

BAND_PIXELS = 500_000

# Grey levels of plain darkening that are put down to light, dust or stitched fields and not to tissue.
VEIL = 10

# Glass is bright and nearly without colour, or less bright and without any.
GLASS_DARKEST, GLASS_CHROMA = 185, 14
DIM_GLASS_DARKEST, DIM_GLASS_CHROMA = 140, 6
GLASS_SHARE = 0.0005  # less of the image than this is no background to measure from
PURE_WHITE = 252
# Beside this share of pure white, what is tinted more is pale tissue, and the white is the glass.
WHITE_SHARE, TINT = 0.1, 9
DIM, DIM_TINT = 220, 4
SAMPLE = 200_000  # pixels are enough for a median
SHADING = 12  # grey levels by which glass may differ over a slide
SCANNED_SHARE = 0.02  # of what looks like glass: less of it than this is not the glass, pure white is


def bands(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows that together cover an image (h, w), of BAND_PIXELS each."""
    rows = max(1, BAND_PIXELS // shape[1])
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


def extremes(image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The brightest and the darkest of the three channels of each pixel, (h, w) each."""
    red, green, blue = (image[..., channel] for channel in range(3))
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def by_bands(image: NDArray[np.uint8], values: Callable[[NDArray[np.uint8]], NDArray[T]]) -> NDArray[T]:
    """`values` (each pixel by itself, from (rows, w, 3) to (rows, w)) of an image (h, w, 3), taken in bands of rows:
    what it needs on the way stays small."""
    return np.concatenate([values(image[rows]) for rows in bands(image.shape[:2])] or [values(image)])


def glass_pixels(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): pixels as bright and as free of colour as glass."""

    def is_glass(band: NDArray[np.uint8]) -> BoolImage:
        brightest, darkest = extremes(band)
        chroma = brightest - darkest
        bright: BoolImage = (darkest > GLASS_DARKEST) & (chroma <= GLASS_CHROMA)
        bright |= (darkest > DIM_GLASS_DARKEST) & (chroma <= DIM_GLASS_CHROMA)
        return bright

    return by_bands(image, is_glass)


def glass_colour(image: NDArray[np.uint8], counted: BoolImage) -> tuple[float, float, float] | None:
    """RGB of the glass on `counted` pixels of a blurred image: the median of the brightest and least coloured of what
    looks like it, or None where nothing does.

    Pure white is measured only where hardly anything else is to be had: fields that were never scanned are filled with
    it. Of the rest the brightest and least coloured count, since pale tissue looks like glass by itself.
    """
    glass = counted & glass_pixels(image)
    count = np.count_nonzero(glass)
    if count <= GLASS_SHARE * np.count_nonzero(counted):
        return None
    white = glass & (extremes(image)[1] >= PURE_WHITE)
    beside_white = np.asarray(cv2.dilate(white.astype(np.uint8), np.ones((5, 5), np.uint8))) > 0
    scanned = glass & ~beside_white
    if np.count_nonzero(scanned) <= SCANNED_SHARE * count:
        return _median_colour(image[glass])
    places = np.flatnonzero(scanned)
    pixels = image.reshape(-1, 3)[places[:: max(1, len(places) // SAMPLE)]]
    brightest, darkest = extremes(pixels)
    top = brightest >= np.percentile(brightest, 99) - SHADING
    chroma = brightest - darkest
    colour = _median_colour(pixels[top & (chroma <= np.percentile(chroma[top], 2) + 4)])
    tint = TINT if max(colour) >= DIM else DIM_TINT
    if max(colour) - min(colour) > tint and np.count_nonzero(white) > WHITE_SHARE * count:
        return _median_colour(image[white])  # the white is glass, the tinted is pale tissue
    return colour


def _median_colour(pixels: NDArray[np.uint8]) -> tuple[float, float, float]:
    """The median of each channel of (n, 3) pixels."""
    red, green, blue = (float(np.median(pixels[:, channel])) for channel in range(3))
    return red, green, blue


def stain_image(image: NDArray[np.uint8], glass: tuple[float, float, float]) -> NDArray[np.uint8]:
    """How much each pixel differs from glass of that RGB by colour, or by darkness beyond a veil; (h, w), 0 to 255.

    The image is balanced so that its glass is neutral; then the value is the spread of the three channels plus what the
    brightest of them lacks to the glass beyond VEIL. Glass, pure white and the steps between stitched fields lie near
    0, pale tissue at 12 to 30, dense tissue at 60 to 150, black at 230.
    """
    level = max(glass)
    balance = np.asarray([level / channel for channel in glass], np.float32)

    def stain(band: NDArray[np.uint8]) -> NDArray[np.uint8]:
        brightest, darkest = extremes(np.minimum(band * balance, np.float32(255)))
        values = brightest - darkest + np.maximum(np.float32(level - VEIL) - brightest, 0)
        return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)

    return by_bands(image, stain)


def blurred_where_seen(image: NDArray[np.uint8], seen: BoolImage) -> NDArray[np.uint8]:
    """The mean over 3 x 3 pixels, of those that were seen."""
    if seen.all():
        return np.asarray(cv2.blur(image, (3, 3)), np.uint8)
    sums = np.asarray(cv2.blur(np.where(seen[..., None], image, np.uint8(0)), (3, 3)))
    share = np.asarray(cv2.blur(seen.astype(np.uint8) * np.uint8(255), (3, 3)))
    edge = share < 255
    sums[edge] = np.clip(sums[edge] * (np.float32(255) / np.maximum(share[edge], 28))[:, None], 0, 255)
    return sums.astype(np.uint8, copy=False)


# Ink on tissue stays tissue: a surgeon's ink, a pen stroke across a section, pigment. Ink on glass goes.
FILL_LEVEL = 5  # no channel above this: the black that software fills unscanned fields with

# Green to blue pens: green above red, which no haematoxylin is, and strongly coloured.
PEN_GREEN_OVER_RED = 8
PEN_SATURATION = 0.4
PEN_DARKEST = 25  # of the brightest channel: black has no hue
# Bright red pens; blood is darker or leans to orange.
RED_LEVEL = 180
RED_SATURATION = 0.75
RED_SPREAD = 0.08  # of green against blue
# The faint edge of a stroke: the same hue, near the stroke.
SKIRT_SATURATION = 0.12
SKIRT_UM = 40.0
SOFT_PIXELS = 2  # pixels beside a stroke are mixtures, whatever their colour

BRIDGE_UM = 300.0  # ink with tissue on both sides within this lies on tissue
LINING = 8.0  # contact squared over area: ink this stretched out along tissue lines its margin
LINING_UM = 200.0


def pen_pixels(image: NDArray[np.uint8], mpp: float) -> BoolImage:
    """Pen-coloured pixels, the faint edges of strokes (SKIRT_UM wide), and the mixed pixels beside them."""
    found = by_bands(image, _pens)
    strokes: BoolImage = (found & 3) > 0
    if not strokes.any():
        return strokes
    pen = _grown((found & 1) > 0, SKIRT_UM / mpp) & ((found & 4) > 0)
    return pen | _grown(strokes, SOFT_PIXELS)


def _pens(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w): 1 for green to blue pen, 2 for bright red pen, 4 for the hue of green to blue pens, however faint; summed
    where several hold."""
    red, green, blue = (image[..., channel].astype(np.int16) for channel in range(3))
    colour, over_red = saturation(image), green - red
    cold = (colour >= PEN_SATURATION) & (over_red >= PEN_GREEN_OVER_RED) & (extremes(image)[0] > PEN_DARKEST)
    warm = (colour >= RED_SATURATION) & (red >= RED_LEVEL) & (np.abs(green - blue) <= RED_SPREAD * red)
    skirt = (colour >= SKIRT_SATURATION) & (over_red >= PEN_GREEN_OVER_RED // 2)
    return np.asarray(cold + 2 * warm + 4 * skirt, np.uint8)


def saturation(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(h, w), 0 to 1: the spread of the channels over the brightest."""
    brightest, darkest = extremes(image)
    values: NDArray[np.float32] = (brightest - darkest).astype(np.float32) / np.maximum(brightest, 1)
    return values


def on_tissue(pen: BoolImage, tissue: BoolImage, mpp: float) -> BoolImage:
    """The pen pixels (h, w) that lie on tissue, which was found without them: between tissue on both sides, or lining
    its margin."""
    if not pen.any() or not tissue.any():
        return np.zeros_like(pen)
    kept = pen & _closed(tissue, BRIDGE_UM / mpp)
    beside = _grown(tissue, 1)
    near = _grown(tissue, LINING_UM / mpp)
    rest = pen & ~kept
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(rest.astype(np.uint8), connectivity=8)
    areas = statistics[:, cv2.CC_STAT_AREA]
    contacts = np.bincount(labels[beside], minlength=len(areas))
    lining = contacts.astype(np.float64) ** 2 >= LINING * areas
    lining[0] = False
    kept |= near & lining[labels]
    return kept


def touching(marks: BoolImage, tissue: BoolImage) -> BoolImage:
    """The connected pieces of `marks` that touch `tissue`."""
    if not marks.any():
        return marks
    count, labels = cv2.connectedComponents(marks.astype(np.uint8), connectivity=8)
    touches = np.zeros(count, bool)
    touches[np.unique(labels[_grown(tissue, 1)])] = True
    touches[0] = False
    pieces: BoolImage = touches[labels]
    return pieces


def _grown(mask: BoolImage, radius: float) -> BoolImage:
    """The pixels within `radius` of the mask."""
    if not mask.any():
        return mask
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    grown: BoolImage = distance <= max(radius, 1.5)
    return grown


def _closed(mask: BoolImage, radius: float) -> BoolImage:
    """The mask with every gap closed that no disc of this radius fits into; the image's border closes nothing."""
    margin = int(np.ceil(radius)) + 1
    wide = np.pad(mask, margin)
    back: BoolImage = ~_grown(~_grown(wide, radius), radius)
    return (back | wide)[margin:-margin, margin:-margin]


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
    fill = overview.opaque & (extremes(image)[0] <= FILL_LEVEL)
    # Blocks that are black to the last bit, as scanners leave what they could not read; no pigment is.
    black = (extremes(image)[0] == 0).astype(np.uint8)
    edge = np.zeros_like(fill)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    unscanned = touching(fill, edge & fill) | (cv2.morphologyEx(black, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0)
    frame = _dark_frame(image) & ~fill
    frame |= _grey_edges(image, frame | unscanned)
    pen = pen_pixels(image, overview.mpp)
    seen = overview.opaque & ~frame & ~unscanned
    counted = seen & ~fill & ~pen
    blurred = blurred_where_seen(image, seen)
    glass = glass_colour(blurred, counted)
    threshold, stained = EVERYTHING, np.ones_like(counted)
    if glass is not None:
        smooth, sharp = stain_image(blurred, glass), stain_image(image, glass)
        threshold = palest_tissue(smooth[counted])
        stained = (smooth >= threshold) & (sharp >= threshold)  # the smooth image alone would give tissue a rim
    found = counted & stained
    if found.any():
        pen &= stained  # without tissue the whole stroke is recorded
    kept_pen = on_tissue(pen, found, overview.mpp)
    kept_fill = touching(fill & ~unscanned, found)
    found |= kept_pen | kept_fill
    dropped = {"pen": pen & ~kept_pen, "black": fill & ~kept_fill, "frame": frame}
    whole = _pieces_of(found, ~dropped["pen"] & overview.opaque, overview.mpp)
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
    brightest, darkest = (values[overview.opaque] for values in extremes(overview.image))
    if not brightest.size:
        return False
    dark = np.count_nonzero(brightest <= DARK_LEVEL) / brightest.size
    pale = np.count_nonzero(darkest >= DARK_PALE_LEVEL) / brightest.size
    return bool(dark >= DARK_SHARE and pale < DARK_PALE_SHARE)


def _bright_on_dark(overview: Overview) -> TissueMask:
    """Tissue of a fluorescence slide: the same rule on the brightest channel, specks left out."""
    brightest = extremes(cv2.blur(overview.image, (3, 3)))[0]
    threshold = palest_tissue(brightest[overview.opaque])
    found = overview.opaque & (brightest >= threshold)
    whole = _pieces_of(found, overview.opaque, overview.mpp)
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
    brightest, darkest = extremes(image)
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


def _grey_edges(image: NDArray[np.uint8], dark: BoolImage) -> BoolImage:
    """(h, w): grey pixels up to two steps from `dark`, mixed from it and from glass."""
    if not dark.any():
        return dark
    brightest, darkest = extremes(image)
    beside = cv2.dilate(dark.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    edges: BoolImage = beside & ~dark & (brightest < 230) & (brightest - darkest < FRAME_CHROMA)
    return edges


def _pieces_of(found: BoolImage, within: BoolImage, mpp: float) -> BoolImage:
    """What was found with holes smaller than HOLE_UM2 filled, as far as it lies `within`, and without pieces smaller
    than SPECK_UM2 (and than 4 pixels)."""
    labels, areas = _pieces(~found, connectivity=4)
    fill = areas < HOLE_UM2 / mpp**2
    fill[0] = False
    labels, areas = _pieces((found | fill[labels]) & within)
    keep = areas >= max(SPECK_UM2 / mpp**2, 4)
    keep[0] = False
    return keep[labels]


def _pieces(mask: BoolImage, connectivity: int = 8) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(h, w) labels, 0 = outside, and the area of each label in pixels."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    return np.asarray(labels, np.int32), np.asarray(statistics[:, cv2.CC_STAT_AREA], np.int32)


# The published rule: one luminance threshold for the whole slide, and each tile judged by its own pixels. Luminance is
# the plain mean of R, G and B. Otsu's threshold is taken over the whole lowest level; what lies strictly below it is
# foreground. Tiles that meet the foreground's bounding box are read, and one is kept when more than a tenth of its
# pixels lie strictly below.
BINS = 256
LEVEL_PIXELS = 8_000_000  # of the lowest level, read at once


def otsu_centre(histogram: NDArray[np.floating], edges: NDArray[np.floating]) -> float:
    """Otsu's threshold as the published code has it: the centre of the last bin of the darker class, of equally good
    ones the first; where there is but one value that one, under which nothing lies. `histogram` (n,) counts bins
    between the darkest and the brightest value, `edges` (n + 1,)."""
    filled = np.flatnonzero(histogram)
    if len(filled) == 1:
        return float((edges[0] + edges[-1]) / 2)
    first = otsu_cuts(histogram)[0]
    return float((edges[first] + edges[first + 1]) / 2)


def share_below(tiles: NDArray[np.uint8], threshold: float) -> NDArray[np.float32]:
    """(N,), 0 to 1: the share of each tile's pixels ((N, T, T, 3) RGB) whose luminance lies strictly below `threshold`,
    in grey levels."""
    dark = _channel_sums(tiles) < sums_below(threshold)
    return np.asarray(dark.mean(axis=(1, 2), dtype=np.float64), np.float32)


def sums_below(threshold: float) -> int:
    """The least R + G + B whose mean is not strictly below `threshold`."""
    return int(np.count_nonzero(np.arange(766) / 3 < threshold))


def _channel_sums(image: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """(..., 3) to (...): R + G + B."""
    sums = image[..., 0].astype(np.uint16)
    sums += image[..., 1]
    sums += image[..., 2]
    return sums


def published_tissue(slide: Slide, overview: Overview) -> TissueMask:
    """Threshold and tissue box of the whole lowest level; the mask is the overview's share of it, for the picture."""
    threshold, box = find_foreground(slide)
    mask = (_channel_sums(overview.image) < sums_below(threshold)) & (box is not None)
    return make_mask(
        overview,
        mask,
        method="published",
        threshold=threshold,
        state="blank" if box is None else "tissue",
        box_level0=box,
    )


def find_foreground(slide: Slide, threshold: float | None = None) -> tuple[float, tuple[int, int, int, int] | None]:
    """Otsu's threshold (or the one given) over the whole lowest level, and the level-0 box (x, y, width, height) around
    what lies below it, or None. The slide needs no mpp."""
    if threshold is None:
        counts = np.zeros(766, np.int64)
        for _, sums in _lowest_level(slide):
            counts += np.bincount(sums.ravel(), minlength=766)
        seen = np.flatnonzero(counts)
        threshold = otsu_centre(*np.histogram(seen / 3, bins=BINS, weights=counts[seen].astype(np.float64)))
    limit = sums_below(threshold)
    columns, rows = (np.zeros(length, bool) for length in slide.level_dimensions[-1])
    for first, sums in _lowest_level(slide):
        dark = sums < limit
        columns |= dark.any(axis=0)
        rows[first : first + len(dark)] = dark.any(axis=1)
    if not rows.any():
        return threshold, None
    x, y = np.flatnonzero(columns), np.flatnonzero(rows)
    step = slide.level_downsamples[-1]
    left, top = math.floor(x[0] * step), math.floor(y[0] * step)
    return threshold, (left, top, math.ceil((x[-1] + 1) * step) - left, math.ceil((y[-1] + 1) * step) - top)


def _lowest_level(slide: Slide) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """R + G + B of the whole lowest level in bands: (first row, (rows, w))."""
    level = len(slide.level_dimensions) - 1
    width, height = slide.level_dimensions[level]
    rows = max(1, LEVEL_PIXELS // width)
    for first in range(0, height, rows):
        top = round(first * slide.level_downsamples[level])
        yield first, _channel_sums(slide.read(0, top, level, width, min(rows, height - first)))
