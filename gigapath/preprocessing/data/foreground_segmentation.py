"""Foreground by luminance."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing.tissue import BINS, otsu_centre


def segment_foreground(slide: NDArray[Any], threshold: float | None = None) -> tuple[NDArray[np.bool_], float]:
    """Mark the pixels whose luminance, the plain mean of the channels in float32, lies strictly below a threshold.

    Args:
        slide: (*, C, H, W).
        threshold: luminance; Otsu's over all of `slide` when None.

    Returns:
        (*, H, W), True = foreground, and the threshold.
    """
    if slide.ndim < 3:
        raise ValueError(f"segment_foreground: expected (*, C, H, W), got {slide.shape}. Put the channels third last.")
    luminance = slide.mean(axis=-3, dtype=np.float32)
    if threshold is None:
        threshold = otsu_centre(*np.histogram(luminance, bins=BINS)) if luminance.size else 0.0
    foreground: NDArray[np.bool_] = luminance < threshold
    return foreground, float(threshold)
