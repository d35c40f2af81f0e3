"""A slide made on the spot: H&E-like texture without a source, for `gigapath demo` where no real slide is to be had.

python -m gigapath.preprocessing.made_slide made-slide.png
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

WHITE = (243, 241, 244)
EOSIN = (226, 158, 190)
HAEMATOXYLIN = (92, 60, 134)


def _waves(rng: np.random.Generator, height: int, width: int, period: float) -> npt.NDArray[Any]:
    """Smooth noise of unit size: coarse normal values stretched to (height, width), features about `period` pixels."""
    coarse = rng.standard_normal((int(height / period) + 4, int(width / period) + 4)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def made_slide(width: int = 1800, height: int = 1400, seed: int = 0) -> npt.NDArray[np.uint8]:
    """One piece of tissue right of and below the middle, on glass: pixels (height, width, 3) uint8.

    Stroma waves in eosin, nuclei of about 8 um (16 px at 0.5 mpp) in haematoxylin, denser in one half than in the
    other, so that its tiles differ.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    radius = np.hypot((x - 0.56 * width) / (0.38 * width), (y - 0.54 * height) / (0.40 * height))
    tissue = radius + 0.07 * _waves(rng, height, width, 150) < 1
    stroma = 0.75 + 0.12 * _waves(rng, height, width, 40) + 0.06 * _waves(rng, height, width, 7)
    nuclei = np.zeros((height, width), np.float32)
    for centre_x, centre_y in rng.uniform((0, 0), (width, height), (6000, 2)):
        if rng.random() < 0.35 + 0.65 * (centre_x > 0.56 * width):
            long, short = rng.uniform(6, 9), rng.uniform(4, 6)
            left, top = int(centre_x) - 10, int(centre_y) - 10
            window = (slice(max(top, 0), max(top + 21, 0)), slice(max(left, 0), max(left + 21, 0)))
            inside = ((x[window] - centre_x) / long) ** 2 + ((y[window] - centre_y) / short) ** 2 < 1
            nuclei[window][inside] = rng.uniform(0.7, 1)
    image = np.empty((height, width, 3), np.float32)
    for channel in range(3):
        stained = WHITE[channel] + stroma * (EOSIN[channel] - WHITE[channel])
        stained += nuclei * (HAEMATOXYLIN[channel] - stained)
        image[..., channel] = np.where(tissue, stained, WHITE[channel])
    image += rng.normal(0, 2.5, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_made_slide(path: Path) -> Path:
    """Write it as a PNG, which states no mpp: it is read with `--slide-mpp 0.5`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(made_slide()).save(path)
    return path


if __name__ == "__main__":
    write_made_slide(Path(sys.argv[1]))
