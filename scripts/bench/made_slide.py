"""A made slide of any size, to measure on: real files that OpenSlide opens, written in seconds."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

UInt8Array = npt.NDArray[np.uint8]


def write_large(
    path: Path,
    size: tuple[int, int],
    *,
    mpp: float = 0.25,
    steps: Sequence[int] = (1, 2, 4, 8, 16),
    tile: int = 256,
    seed: int = 0,
) -> Path:
    """Write a JPEG pyramid of any `size` (w, h) in a second or two: one painted square is encoded once and repeated.

    Squares of 16 tiles a side are tissue inside an ellipse that touches the sides, and white elsewhere.

    Args:
        path: a .tif.
        size: of level 0.
        mpp: microns per pixel.
        steps: downsample of each level, each a divisor of 16.
        tile: side of the TIFF's own tiles, a multiple of 16.
        seed: of the painting.
    """
    side = 16 * tile
    texture = np.random.default_rng(seed).random((side // 16, side // 16, 1), np.float32)
    density = cv2.resize(texture, (side, side), interpolation=cv2.INTER_CUBIC)[..., None]
    noise = 3 * np.random.default_rng(seed).standard_normal((side, side, 1), np.float32)
    tissue = (
        (1 - density) * np.array((226, 160, 196), np.float32) + density * np.array((120, 70, 150), np.float32) + noise
    )
    painted = np.clip(tissue, 0, 255).astype(np.uint8)
    white = _jpeg(np.full((tile, tile, 3), 243, np.uint8))
    columns, rows = -(-size[0] // side), -(-size[1] // side)
    x, y = (np.arange(columns) + 0.5) / columns - 0.5, (np.arange(rows) + 0.5) / rows - 0.5
    is_tissue = (x[None] ** 2 + y[:, None] ** 2) < 0.25
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for index, step in enumerate(steps):
            n = 16 // step  # tiles of this level along a square
            level = cv2.resize(painted, (n * tile, n * tile), interpolation=cv2.INTER_AREA)
            encoded = [
                [_jpeg(level[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile]) for c in range(n)] for r in range(n)
            ]
            w, h = size[0] // step, size[1] // step
            blocks = (
                encoded[r % n][c % n] if is_tissue[r // n, c // n] else white
                for r in range(-(-h // tile))
                for c in range(-(-w // tile))
            )
            file.write(
                blocks,
                shape=(h, w, 3),
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(1, 1),
                tile=(tile, tile),
                compression="jpeg",
                resolution=(1e4 / (mpp * step), 1e4 / (mpp * step)),
                resolutionunit="CENTIMETER",
                subfiletype=int(index > 0),
                metadata=None,
                software=False,
            )
    return path


def _jpeg(pixels: UInt8Array) -> bytes:
    """Pixels (h, w, 3) as a JPEG in YCbCr of full resolution."""
    return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels), level=80, subsampling="444"))
