"""Pen on the cover slip, ink on the margins, black fill: told from tissue by colour and by where they lie.

Ink on tissue stays tissue: a surgeon's ink, a pen stroke across a section, pigment. Ink on glass goes.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing import stain

BoolImage = NDArray[np.bool_]

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
    """Pen-coloured pixels, the faint edges of strokes, and the mixed pixels beside them.

    Args:
        image: (h, w, 3) RGB.
        mpp: microns per pixel, for the width of the edges.
    """
    cold, warm = stain.by_bands(image, _is_cold), stain.by_bands(image, _is_warm)
    strokes: BoolImage = cold | warm
    if not strokes.any():
        return strokes
    pen: BoolImage = _grown(cold, SKIRT_UM / mpp)
    pen &= stain.by_bands(image, _is_skirt)
    return pen | _grown(strokes, SOFT_PIXELS)


def _is_cold(image: NDArray[np.uint8]) -> BoolImage:
    """(h, w): green to blue pen."""
    dull = saturation(image) < PEN_SATURATION
    cold: BoolImage = ~dull & (image[..., 1] >= image[..., 0].astype(np.int16) + PEN_GREEN_OVER_RED)
    return cold & (stain.extremes(image)[0] > PEN_DARKEST)


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
    brightest, darkest = stain.extremes(image)
    values: NDArray[np.float32] = (brightest - darkest).astype(np.float32) / np.maximum(brightest, 1)
    return values


def on_tissue(pen: BoolImage, tissue: BoolImage, mpp: float) -> BoolImage:
    """The pen pixels that lie on tissue: between tissue on both sides, or lining its margin.

    Args:
        pen: (h, w) pen-coloured pixels.
        tissue: (h, w) tissue found without them.
        mpp: microns per pixel.
    """
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
