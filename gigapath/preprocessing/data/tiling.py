"""Cut an array into square tiles."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def tile_array_2d(
    array: NDArray[Any], tile_size: int, channels_first: bool = True, **pad_kwargs: Any
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Pad an image to whole tiles, the same on opposite sides, and cut it into them.

    Args:
        array: (C, H, W), or (H, W, C) without `channels_first`.
        tile_size: T, side of a tile in pixels.
        channels_first: which of the two.
        pad_kwargs: for `numpy.pad`, such as `constant_values=255`.

    Returns:
        tiles (N, C, T, T) or (N, T, T, C), row by row, and their corners (N, 2) as (x, y) in the array as it was
        given: negative where a tile begins in the padding.
    """
    if array.ndim != 3:
        raise ValueError(f"tile_array_2d: expected an image of three axes, got {array.ndim}. Give one image.")
    if tile_size < 1:
        raise ValueError(f"tile_array_2d: expected a tile size of at least 1, got {tile_size!r}.")
    axes = (1, 2) if channels_first else (0, 1)
    missing = [-array.shape[axis] % tile_size for axis in axes]
    before = [pixels // 2 for pixels in missing]
    padding = [(0, 0)] * 3
    for axis, pixels, first in zip(axes, missing, before, strict=True):
        padding[axis] = (first, pixels - first)
    padded = np.pad(array, padding, **pad_kwargs)
    rows, columns = (padded.shape[axis] // tile_size for axis in axes)
    if channels_first:
        blocks = padded.reshape(padded.shape[0], rows, tile_size, columns, tile_size).transpose(1, 3, 0, 2, 4)
    else:
        blocks = padded.reshape(rows, tile_size, columns, tile_size, padded.shape[2]).transpose(0, 2, 1, 3, 4)
    tiles = blocks.reshape(rows * columns, *blocks.shape[2:])
    y, x = np.indices((rows, columns))
    corners = np.stack([x.ravel() * tile_size - before[1], y.ravel() * tile_size - before[0]], axis=1)
    return tiles, corners.astype(np.int64)
