"""The levels of a tiled TIFF as compressed blocks: where each lies in the file, and what decodes it.

A block is one compressed tile of the file; a tile is what an encoder gets. Sizes are (width, height) in pixels of the
level, arrays (H, W, 3) uint8 RGB. Only pages that are tiled and as large as one of the slide's levels are taken, never
one by its order, so that no label and no macro picture is ever decoded.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Decode = Callable[[bytes, UInt8Array | None], UInt8Array]

# What OpenSlide calls the formats whose levels are one tiled page each, without overlap or gaps between the blocks.
SERVED = ("aperio", "generic-tiff", "philips")

_NONE, _LZW, _JPEG, _DEFLATE = 1, 5, 7, (8, 32946)
_JP2K_YCBCR, _JP2K_RGB = 33003, 33005  # Aperio's
_RGB, _YCBCR = 2, 6  # photometric


class BlockError(Exception):
    """A block that can't be read or decoded here; OpenSlide may or may not."""


@dataclass(frozen=True, eq=False)
class TiffLevel:
    """One level as its compressed blocks.

    Attributes:
        size: of the level, as OpenSlide has it.
        block: size of every block; the last column and row hang over the level.
        columns: blocks from left to right.
        rows: blocks from top to bottom.
        offsets: (rows, columns) int64, where each block begins in the file.
        lengths: (rows, columns) int64, its bytes; 0 where the file holds none.
        decode: bytes of a block to its pixels, in the array given where there is one.
    """

    size: tuple[int, int]
    block: tuple[int, int]
    columns: int
    rows: int
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    decode: Decode

    def read(self, file: int, row: int, column: int, out: UInt8Array | None = None) -> UInt8Array:
        """Pixels (H, W, 3) of a whole block, in `out` where it is given.

        Args:
            file: descriptor of the open file.
            row: of the block.
            column: of the block.
            out: (H, W, 3) contiguous.

        Raises:
            BlockError: the file ends before, or the decoder refuses.
        """
        length = int(self.lengths[row, column])
        data = os.pread(file, length, int(self.offsets[row, column]))
        if len(data) != length:
            raise BlockError(f"block {column}, {row}: expected {length} bytes, got {len(data)}.")
        try:
            pixels = self.decode(data, out)
        except Exception as error:  # each codec of the library has an error of its own, and zlib too
            raise BlockError(f"block {column}, {row}: {error}") from error
        if pixels.shape != (self.block[1], self.block[0], 3) or pixels.dtype != np.uint8:
            raise BlockError(f"block {column}, {row}: expected {self.block} pixels, got {pixels.shape}.")
        return pixels


def tiff_levels(path: Path, vendor: str, level_dimensions: Sequence[tuple[int, int]]) -> dict[int, TiffLevel]:
    """The levels of a slide that can be decoded from its file, by their index; none where the format is another one.

    Args:
        path: the slide.
        vendor: OpenSlide's word for the format.
        level_dimensions: sizes of the slide's levels.

    Raises:
        ImportError: tifffile, simplejpeg or imagecodecs is not installed.
    """
    if vendor not in SERVED:
        return {}
    import imagecodecs  # noqa: F401  told here, not at the first block
    import simplejpeg  # noqa: F401
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if page.is_tiled and _is_level(page, vendor)]
            found = {}
            for index, size in enumerate(level_dimensions):
                matches = [page for page in pages if _fits(page, size, vendor)]
                decode = _decoder(matches[0]) if len(matches) == 1 else None
                if decode is not None:
                    found[index] = _level(matches[0], size, decode)
            return found
    except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError, TypeError):
        return {}  # whatever the library stumbles over, OpenSlide has opened it


def orientation_and_channels(path: Path, vendor: str) -> tuple[int, int]:
    """What OpenSlide leaves unsaid of a TIFF's levels: the first orientation that isn't 1, and channels a pixel.

    Returns:
        (1, 3) where nothing else is known.
    """
    if vendor not in SERVED:
        return 1, 3
    try:
        import tifffile
    except ImportError:
        return 1, 3
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if page.is_tiled and _is_level(page, vendor)]
            turned = (int(page.tags.valueof("Orientation", 1)) for page in pages)
            return next((turn for turn in turned if turn != 1), 1), int(pages[0].samplesperpixel)
    except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError, TypeError):
        return 1, 3


def _is_level(page: Any, vendor: str) -> bool:
    """Aperio marks its label 1 and its macro picture 9; elsewhere 1 is a level of reduced size."""
    return page.subfiletype in ((0,) if vendor == "aperio" else (0, 1))


def _fits(page: Any, size: tuple[int, int], vendor: str) -> bool:
    """Whether a page is the level of this size; Philips pads its pages to whole blocks."""
    beyond: tuple[int, int] = page.imagewidth - size[0], page.imagelength - size[1]
    if vendor == "philips":
        return beyond[0] in range(page.tilewidth) and beyond[1] in range(page.tilelength)
    return beyond == (0, 0)


def _level(page: Any, size: tuple[int, int], decode: Decode) -> TiffLevel:
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    offsets = np.asarray(page.dataoffsets, np.int64).reshape(rows, columns)
    lengths = np.asarray(page.databytecounts, np.int64).reshape(rows, columns)
    lengths = np.where(offsets > 0, lengths, 0)
    return TiffLevel(size, (page.tilewidth, page.tilelength), columns, rows, offsets, lengths, decode)


def _decoder(page: Any) -> Decode | None:
    """What decodes a page's blocks to RGB as OpenSlide would, or None where nothing here does."""
    plain = (page.samplesperpixel, page.bitspersample, page.sampleformat, page.planarconfig, page.fillorder)
    if plain != (3, 8, 1, 1, 1) or page.photometric not in (_RGB, _YCBCR):
        return None
    compression, ycbcr = int(page.compression), page.photometric == _YCBCR
    if compression == _JPEG and page.jpegheader is None:
        return partial(_decode_jpeg, head=_jpeg_head(page.jpegtables, ycbcr))
    if compression in (_JP2K_YCBCR, _JP2K_RGB):
        return partial(_decode_jp2k, ycbcr=compression == _JP2K_YCBCR)
    if ycbcr or page.predictor not in (1, 2):
        return None
    shape = page.tilelength, page.tilewidth, 3
    if compression in (_NONE, _LZW, *_DEFLATE):
        return partial(_decode_lossless, shape=shape, compression=compression, differences=page.predictor == 2)
    return None


def _jpeg_head(tables: bytes | None, ycbcr: bool) -> bytes:
    """What goes before a block's own stream, less its start marker: the page's tables, and Adobe's marker (APP14) that
    says what the channels are. OpenSlide takes that from the page too, not from the block."""
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if ycbcr else b"\x00")
    return b"\xff\xd8" + adobe + (tables[2:-2] if tables else b"")


def _decode_jpeg(data: bytes, out: UInt8Array | None, *, head: bytes) -> UInt8Array:
    """Strict, as OpenSlide is: corrupt data is an error, never a grey smear."""
    from simplejpeg import decode_jpeg

    start = 2
    if data[2:4] == b"\xff\xe0":  # a JFIF marker would count for more than Adobe's
        start += 2 + int.from_bytes(data[4:6], "big")
    pixels: UInt8Array = decode_jpeg(head + data[start:], "RGB", fastdct=False, fastupsample=False, buffer=out)
    return pixels


def _decode_jp2k(data: bytes, out: UInt8Array | None, *, ycbcr: bool) -> UInt8Array:
    from imagecodecs import jpeg2k_decode

    pixels: UInt8Array = jpeg2k_decode(data, numthreads=1, out=out)
    if ycbcr:
        pixels[...] = _rgb_of_ycbcr(pixels)
    return pixels


def _decode_lossless(
    data: bytes, out: UInt8Array | None, *, shape: tuple[int, int, int], compression: int, differences: bool
) -> UInt8Array:
    from imagecodecs import lzw_decode

    if compression in _DEFLATE:
        data = zlib.decompress(data)
    elif compression == _LZW:
        data = bytes(lzw_decode(data))
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    if differences:  # each sample minus the one of the pixel to its left
        summed: UInt8Array = np.add.accumulate(pixels, axis=1, dtype=np.uint8, out=out)
        return summed
    if out is None:
        return pixels
    out[...] = pixels
    return out


def _rgb_of_ycbcr(pixels: UInt8Array) -> UInt8Array:
    """(H, W, 3) YCbCr of full range to RGB (ITU-T T.871, the factors as JFIF 1.02 gives them).

    Red and blue take one product each, rounded; green adds two in 16-bit fractions and rounds their sum, as OpenSlide
    does, whose pixels these are to be.
    """
    chroma = np.arange(-128, 128)
    half, one = 0.5, 1 << 16
    y, cb, cr = pixels[..., 0].astype(np.int32), pixels[..., 1], pixels[..., 2]
    red = y + np.rint(1.402 * chroma).astype(np.int32)[cr]
    of_cb = np.rint(one * (half - 0.34414 * chroma)).astype(np.int32)
    of_cr = np.rint(one * -0.71414 * chroma).astype(np.int32)
    green = y + ((of_cb[cb] + of_cr[cr]) >> 16)
    blue = y + np.rint(1.772 * chroma).astype(np.int32)[cb]
    rgb: UInt8Array = np.clip(np.stack([red, green, blue], axis=-1), 0, 255).astype(np.uint8)
    return rgb
