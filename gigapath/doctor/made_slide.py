"""A made slide, the same on every machine: a tiled TIFF of one level."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

# TIFF's numbers for how a tile is packed; Aperio's for JPEG 2000 in RGB.
COMPRESSIONS = {"none": 1, "jpeg": 7, "jpeg2000": 33005}
_TILE = 256


def paint(width: int, height: int) -> UInt8Array:
    """A pale field with two ellipses of texture, by arithmetic alone: the same bytes on every machine; (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.full((height, width, 3), (243, 241, 244), np.int64)
    grain = (x * 7 + y * 13 + (x // 16) * (y // 16) * 5) % 61
    for centre, axes in (((0.30, 0.42), (0.22, 0.34)), ((0.77, 0.70), (0.15, 0.20))):
        dx, dy = (x - int(centre[0] * width)), (y - int(centre[1] * height))
        a, b = int(axes[0] * width), int(axes[1] * height)
        inside = dx * dx * b * b + dy * dy * a * a <= a * a * b * b
        image[inside] = (np.array((200, 120, 170)) - grain[..., None] // np.array((1, 2, 3)))[inside]
    return image.astype(np.uint8)


def write_slide(path: Path, image: UInt8Array, *, mpp: float, compression: str = "none") -> None:
    """Write `image` as a tiled TIFF of one level that OpenSlide reads.

    Args:
        path: the file.
        image: (H, W, 3).
        mpp: microns per pixel.
        compression: a key of COMPRESSIONS; "jpeg2000" writes an Aperio header, whose reader knows it.
    """
    import tifffile  # where it is broken, the look that writes a slide says so, and the others go on

    height, width = image.shape[:2]
    columns, rows = -(-width // _TILE), -(-height // _TILE)
    padded = np.full((rows * _TILE, columns * _TILE, 3), 255, np.uint8)
    padded[:height, :width] = image
    blocks = (
        _packed(padded[r * _TILE : (r + 1) * _TILE, c * _TILE : (c + 1) * _TILE], compression)
        for r in range(rows)
        for c in range(columns)
    )
    aperio = f"Aperio Image Library\r\n{width}x{height} ({_TILE}x{_TILE})|AppMag = {10 / mpp:g}|MPP = {mpp}"
    with tifffile.TiffWriter(path) as file:
        file.write(
            blocks,
            shape=image.shape,
            dtype=np.uint8,
            tile=(_TILE, _TILE),
            photometric="ycbcr" if compression == "jpeg" else "rgb",
            subsampling=(1, 1) if compression == "jpeg" else None,
            compression=COMPRESSIONS[compression],
            resolution=(1e4 / mpp, 1e4 / mpp),
            resolutionunit="CENTIMETER",
            description=aperio if compression == "jpeg2000" else None,
            metadata=None,
            software=False,
        )


def _packed(block: UInt8Array, compression: str) -> bytes:
    if compression == "none":
        return block.tobytes()
    content = io.BytesIO()
    if compression == "jpeg":
        Image.fromarray(block).save(content, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(block).save(content, "JPEG2000", irreversible=False, no_jp2=True)
    return content.getvalue()
