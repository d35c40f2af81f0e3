"""Colour of glass and of stain on an overview, in 8-bit grey levels.

What tells tissue from glass is colour and real darkness; brightness alone also differs from field to field of a
stitched slide, under dust, and where fields were never scanned.
"""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

BoolImage = NDArray[np.bool_]

# Grey levels of plain darkening that are put down to light, dust or stitched fields and not to tissue.
VEIL = 40

# Glass is bright and nearly without colour.
GLASS_DARKEST = 185
GLASS_CHROMA = 14
GLASS_SHARE = 0.0005  # less of the image than this is no background to measure from

PURE_WHITE = 252

BAND_PIXELS = 500_000


def bands(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows that together cover an image (h, w), of BAND_PIXELS each."""
    rows = max(1, BAND_PIXELS // shape[1])
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


def extremes(image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The brightest and the darkest of the three channels of each pixel, (h, w) each."""
    red, green, blue = (image[..., channel] for channel in range(3))
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def glass_colour(image: NDArray[np.uint8], counted: BoolImage) -> tuple[float, float, float] | None:
    """RGB of the glass: the median of what is bright and nearly without colour, or None where there is none of it.

    Pure white is measured only where nothing else is to be had: it is how fields that were never scanned are filled.

    Args:
        image: (h, w, 3) RGB, blurred.
        counted: (h, w), the pixels to measure on.
    """
    brightest, darkest = extremes(image)
    glass = counted & (darkest > GLASS_DARKEST) & (brightest - darkest <= GLASS_CHROMA)
    enough = GLASS_SHARE * np.count_nonzero(counted)
    if np.count_nonzero(glass) <= enough:
        return None
    scanned = glass & (darkest < PURE_WHITE)
    measured = image[scanned if np.count_nonzero(scanned) > enough else glass]
    red, green, blue = (float(np.median(measured[:, channel])) for channel in range(3))
    return red, green, blue


def stain_image(image: NDArray[np.uint8], glass: tuple[float, float, float]) -> NDArray[np.uint8]:
    """How much each pixel differs from glass by colour, or by darkness beyond a veil; (h, w), 0 to 255.

    The image is balanced so that its glass is neutral; then the value is the spread of the three channels plus what
    the brightest of them lacks to the glass beyond VEIL. Glass at any brightness, pure white, dust and shadows lie
    near 0; eosin, haematoxylin and DAB at 20 to 200; black at about 200.

    Args:
        image: (h, w, 3) RGB.
        glass: RGB of the glass.
    """
    level = max(glass)
    balance = np.asarray([level / channel for channel in glass], np.float32)
    values = np.empty(image.shape[:2], np.uint8)
    for rows in bands(image.shape[:2]):  # the floats are 24 times as large as the values
        brightest, darkest = extremes(np.minimum(image[rows] * balance, np.float32(255)))
        stained = brightest - darkest + np.maximum(np.float32(level - VEIL) - brightest, 0)
        values[rows] = np.clip(np.rint(stained), 0, 255)
    return values


def blurred_where_seen(image: NDArray[np.uint8], seen: BoolImage) -> NDArray[np.uint8]:
    """The mean over 3 x 3 pixels, of those that were seen."""
    if seen.all():
        return np.asarray(cv2.blur(image, (3, 3)), np.uint8)
    sums = np.asarray(cv2.blur(np.where(seen[..., None], image, np.uint8(0)), (3, 3)))
    share = np.maximum(np.asarray(cv2.blur(seen.astype(np.float32), (3, 3))), 1 / 9)
    return np.clip(sums / share[..., None], 0, 255).astype(np.uint8)
