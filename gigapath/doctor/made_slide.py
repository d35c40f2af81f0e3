"""A made slide without a library that writes slides: a tiled TIFF of one level, in a few lines."""

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

# TIFF's numbers for how a tile is packed; Aperio's for JPEG 2000 in RGB.
COMPRESSIONS = {"none": 1, "jpeg": 7, "jpeg2000": 33005}
_TILE = 256
_SHORT, _LONG, _RATIONAL, _ASCII = 3, 4, 5, 2


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
    height, width = image.shape[:2]
    columns, rows = -(-width // _TILE), -(-height // _TILE)
    padded = np.full((rows * _TILE, columns * _TILE, 3), 255, np.uint8)
    padded[:height, :width] = image
    blocks = [
        _packed(padded[r * _TILE : (r + 1) * _TILE, c * _TILE : (c + 1) * _TILE], compression)
        for r in range(rows)
        for c in range(columns)
    ]
    aperio = compression == "jpeg2000"
    text = (
        f"Aperio Image Library\r\n{width}x{height} ({_TILE}x{_TILE})|AppMag = {10 / mpp:g}|MPP = {mpp}"
        if aperio
        else "made"
    )
    # Pixels a centimetre, as a fraction.
    density = (round(1e8 / mpp), 10_000)
    description = text.encode() + b"\0"
    # (tag, type, values)
    entries: list[tuple[int, int, bytes | list[int]]] = [
        (256, _LONG, [width]),
        (257, _LONG, [height]),
        (258, _SHORT, [8, 8, 8]),
        (259, _SHORT, [COMPRESSIONS[compression]]),
        (262, _SHORT, [6 if compression == "jpeg" else 2]),
        (270, _ASCII, description),
        (277, _SHORT, [3]),
        (282, _RATIONAL, list(density)),
        (283, _RATIONAL, list(density)),
        (284, _SHORT, [1]),
        (296, _SHORT, [3]),
        (322, _LONG, [_TILE]),
        (323, _LONG, [_TILE]),
        (324, _LONG, [0] * len(blocks)),
        (325, _LONG, [len(block) for block in blocks]),
    ]
    directory = 8
    end = directory + 2 + 12 * len(entries) + 4
    sizes = {_SHORT: 2, _LONG: 4, _RATIONAL: 4, _ASCII: 1}
    # Where each entry's values go that do not fit into it, then the tiles.
    places = {}
    for tag, kind, values in entries:
        size = len(values) * sizes[kind]
        if size > 4:
            places[tag] = end
            end += size + size % 2
    starts = list(np.cumsum([end, *(len(block) for block in blocks[:-1])]).tolist())
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, directory) + struct.pack("<H", len(entries)))
        tail = b""
        for tag, kind, values in entries:
            content = starts if tag == 324 else values
            code = {_SHORT: "H", _LONG: "I", _RATIONAL: "I"}.get(kind)
            data = content if isinstance(content, bytes) else struct.pack(f"<{len(content)}{code}", *content)
            count = len(content) // 2 if kind == _RATIONAL else len(content)
            inline = data.ljust(4, b"\0") if tag not in places else struct.pack("<I", places[tag])
            file.write(struct.pack("<HHI", tag, kind, count) + inline)
            tail += b"" if tag not in places else data + b"\0" * (len(data) % 2)
        file.write(struct.pack("<I", 0) + tail + b"".join(blocks))


def _packed(block: UInt8Array, compression: str) -> bytes:
    if compression == "none":
        return block.tobytes()
    content = io.BytesIO()
    if compression == "jpeg":
        Image.fromarray(block).save(content, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(block).save(content, "JPEG2000", irreversible=False, no_jp2=True)
    return content.getvalue()
