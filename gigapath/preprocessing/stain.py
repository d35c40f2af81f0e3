"""Colours on an overview, in 8-bit grey levels: glass, stain, pen and black fill.

What tells tissue from glass is colour and real darkness; brightness alone also differs from field to field of a
stitched slide, under dust, and where fields were never scanned.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

BoolImage = NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)

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
    cold, warm = by_bands(image, _is_cold), by_bands(image, _is_warm)
    strokes: BoolImage = cold | warm
    if not strokes.any():
        return strokes
    pen: BoolImage = _grown(cold, SKIRT_UM / mpp)
    pen &= by_bands(image, _is_skirt)
    return pen | _grown(strokes, SOFT_PIXELS)


def _is_cold(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): green to blue pen."""
    dull = saturation(image) < PEN_SATURATION
    cold: BoolImage = ~dull & (image[..., 1] >= image[..., 0].astype(np.int16) + PEN_GREEN_OVER_RED)
    return cold & (extremes(image)[0] > PEN_DARKEST)


def _is_warm(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): bright red pen."""
    _, green, blue = (image[..., channel].astype(np.int16) for channel in range(3))
    bright = (image[..., 0] >= RED_LEVEL) & (saturation(image) >= RED_SATURATION)
    warm: BoolImage = bright & (np.abs(green - blue) <= RED_SPREAD * image[..., 0])
    return warm


def _is_skirt(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): of the hue of green to blue pens, however faint."""
    faint: BoolImage = image[..., 1] >= image[..., 0].astype(np.int16) + PEN_GREEN_OVER_RED // 2
    return faint & (saturation(image) >= SKIRT_SATURATION)


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


def at_border(marks: BoolImage) -> BoolImage:
    """The connected pieces of `marks` that reach the edge of the image."""
    edge = np.zeros_like(marks)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return touching(marks, edge & marks)


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
