"""Otsu's threshold, taken down to the palest tissue, on the stain of an overview (0 to 255)."""

import numpy as np
from numpy.typing import NDArray

from gigapath.preprocessing.stain import GLASS_CHROMA

# Stain, in grey levels, by which tissue must stand out from glass. Empty glass, blurred, scatters by 2 to 6; the
# palest tissue that is still worth a tile stands out by about 15.
CONTRAST = 12

# Thresholds where there are no two classes.
EVERYTHING, NOTHING = 0, 256


def otsu_threshold(histogram: NDArray[np.int64]) -> int:
    """Otsu's threshold: the first bin of the upper class, where the variance between the classes is largest.

    Between two far peaks every cut of the gap is equally good; the middle one is taken.

    Args:
        histogram: (n,) counts, at least two of them not 0.
    """
    counts = histogram.astype(np.float64)
    below = np.cumsum(counts)[:-1]
    sums = np.cumsum(counts * np.arange(len(counts)))
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / counts.sum() - sums[:-1]) ** 2 / (below * above)
    between = np.nan_to_num(between, nan=-1.0, posinf=-1.0)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return int(best[len(best) // 2]) + 1


def palest_tissue(values: NDArray[np.uint8]) -> int:
    """Tissue by Otsu's threshold, taken again on the paler class as long as the classes stand CONTRAST apart.

    One threshold over dark and pale tissue would lie between those two. Going on until only glass is left finds the
    palest tissue, whatever pigment, DAB or haemorrhage lies beside it. The glass's own scatter is flattened first,
    lest its width outvote a needle biopsy.

    Args:
        values: (n,) stain.

    Returns:
        the least value that is tissue: EVERYTHING or NOTHING where there are no two classes.
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
        cut = otsu_threshold(histogram)
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
