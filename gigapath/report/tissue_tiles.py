"""The most typical and the most unusual tiles of a slide, by its tile embeddings.

Both go by the Euclidean distance between a tile's embedding and the mean of all embeddings of its slide: typical tiles
lie nearest to the mean, unusual ones farthest from it. Rare tissue, folds, ink and blur all lie far away; which of them
it is, a person sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from gigapath.features import Tiles
from gigapath.preprocessing.reading import read_tile
from gigapath.preprocessing.slide import Slide

METHOD = (
    "By the distance of a tile's embedding from the mean of its slide's: typical tiles lie nearest, unusual ones "
    "farthest. The figure is the distance over the slide's median distance."
)
EACH = 6  # typical tiles, and as many unusual ones
CROP_SIDE = 192  # pixels of a crop in the picture of all of them
_ROWS = 4096  # embeddings that are widened at once

FloatArray = npt.NDArray[np.float64]
RGBImage = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pick:
    """One tile to look at.

    Attributes:
        index: its row in the slide's tiles.
        distance: from the slide's mean, in units of the slide's median distance.
    """

    index: int
    distance: float


def distances(features: npt.NDArray[Any]) -> FloatArray:
    """(N,) Euclidean distance of each embedding (N, D) from their mean."""
    mean = features.mean(axis=0, dtype=np.float64)
    out = np.empty(len(features))
    for start in range(0, len(features), _ROWS):
        part = features[start : start + _ROWS].astype(np.float64) - mean
        out[start : start + _ROWS] = np.sqrt(np.einsum("nd,nd->n", part, part))
    return out


def pick_tiles(features: npt.NDArray[Any]) -> tuple[list[Pick], list[Pick]]:
    """(typical, unusual) tiles of embeddings (N, D), no tile in both, the clearest cases first."""
    if len(features) == 0:
        return [], []
    away = distances(features)
    order = np.argsort(away, kind="stable")
    median = float(np.median(away)) or 1.0  # all tiles alike: every distance is 0
    typical = order[: min(EACH, (len(order) + 1) // 2)]
    unusual = order[max(len(order) - EACH, len(typical)) :][::-1]
    typical_picks = [Pick(int(index), float(away[index]) / median) for index in typical]
    return typical_picks, [Pick(int(index), float(away[index]) / median) for index in unusual]


def draw_crops(slide: Slide, tiles: Tiles, picks: Sequence[Pick]) -> RGBImage:
    """The picked tiles side by side, (CROP_SIDE, len(picks) * CROP_SIDE, 3) RGB.

    Raises:
        SlideError: a tile can't be read.
    """
    out = np.empty((CROP_SIDE, CROP_SIDE * len(picks), 3), np.uint8)
    for place, pick in enumerate(picks):
        pixels = read_tile(slide, tiles, pick.index)
        how = cv2.INTER_AREA if pixels.shape[0] > CROP_SIDE else cv2.INTER_CUBIC
        out[:, place * CROP_SIDE : (place + 1) * CROP_SIDE] = cv2.resize(
            pixels, (CROP_SIDE, CROP_SIDE), interpolation=how
        )
    return out
