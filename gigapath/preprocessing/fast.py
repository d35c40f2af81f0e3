"""The fast way to a slide's pixels, taken only where it gives OpenSlide's own to the bit.

A tiled TIFF is read as compressed blocks: where each lies in the file, and what decodes it. Many rectangles of a level
are read with each block decoded once; about one row of blocks is held, however high the slide. `auto` does so where
a handful of the level's blocks, those of its edges and those with the most in them among them, equal OpenSlide's.

A block is one compressed tile of the file; a tile is what an encoder gets. Sizes are (width, height) in pixels of the
level, arrays (H, W, 3) uint8 RGB. Only pages that are tiled and as large as one of the slide's levels are taken, never
one by its order, so that no label and no macro picture is ever decoded.
"""

import contextlib
import logging
import math
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gigapath.preprocessing.header import SlideError

if TYPE_CHECKING:
    from gigapath.preprocessing.slide import Slide

UInt8Array = npt.NDArray[np.uint8]
Decode = Callable[[bytes, UInt8Array | None], UInt8Array]

# What OpenSlide calls the formats whose levels are one tiled page each, without overlap or gaps between the blocks.
SERVED = ("aperio", "generic-tiff", "philips")

_NONE, _LZW, _JPEG, _DEFLATE = 1, 5, 7, (8, 32946)
_JP2K_YCBCR, _JP2K_RGB = 33003, 33005  # Aperio's
_RGB, _YCBCR = 2, 6  # photometric
_NOBODY = logging.NullHandler()


class BlockError(Exception):
    """A block that can't be read or decoded here; OpenSlide may or may not."""


@dataclass(frozen=True, eq=False)
class TiffLevel:
    """One level as its compressed blocks: `size` as OpenSlide has it, `block` of every block (the last column and row
    hang over the level), `offsets` and `lengths` (rows, columns) int64 of each block in the file, 0 where it holds
    none; `decode` turns its bytes into pixels, in the array given where there is one."""

    size: tuple[int, int]
    block: tuple[int, int]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    decode: Decode

    def read(self, file: int, row: int, column: int, out: UInt8Array | None = None) -> UInt8Array:
        """Pixels (H, W, 3) of a whole block, from the descriptor of the open file, in `out` (contiguous) where it is
        given; BlockError where the file ends before, or the decoder refuses."""
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


def open_tiff(path: Path) -> Any:
    """The directories of a TIFF, as `tifffile.TiffFile`. Its log quotes the file's own words, which may name a person:
    they reach those who set up logging, not the terminal of everybody."""
    import tifffile

    logging.getLogger("tifffile").addHandler(_NOBODY)
    return tifffile.TiffFile(path)


def tiff_levels(path: Path, vendor: str, level_dimensions: Sequence[tuple[int, int]]) -> dict[int, TiffLevel]:
    """The levels of a slide that can be decoded from its file, by their index; none where the format (`vendor`,
    OpenSlide's word for it) is another one. ImportError where tifffile, simplejpeg or imagecodecs is not installed."""
    if vendor not in SERVED:
        return {}
    import imagecodecs  # noqa: F401  told here, not at the first block
    import simplejpeg  # noqa: F401
    import tifffile  # noqa: F401

    try:
        with open_tiff(path) as file:
            pages = [page for page in file.pages if page.is_tiled and _is_level(page, vendor)]
            found = {}
            for index, size in enumerate(level_dimensions):
                matches = [page for page in pages if _fits(page, size, vendor)]
                decode = _decoder(matches[0]) if len(matches) == 1 else None
                if decode is not None:
                    found[index] = _level(matches[0], size, decode)
            return found
    except Exception:  # whatever the library stumbles over, OpenSlide has opened it
        return {}


def tiff_facts(path: Path, vendor: str) -> tuple[int, int, tuple[int, int] | None]:
    """What OpenSlide leaves unsaid of a TIFF's levels: the first orientation that isn't 1, the channels of a pixel, the
    size of a picture larger than the first; 1, 3 and None of other formats, and where tags can't be read."""
    try:
        with open_tiff(path) as file:
            pages = [page for page in file.pages if page.is_tiled and _is_level(page, vendor)] * (vendor in SERVED)
            turned = (int(page.tags.valueof("Orientation", 1)) for page in pages)
            sizes = [(page.imagewidth, page.imagelength) for page in pages]
            larger = max(sizes, key=math.prod)
            found = next((turn for turn in turned if turn != 1), 1), int(pages[0].samplesperpixel)
            return *found, larger if math.prod(larger) > math.prod(sizes[0]) else None
    except Exception:  # not installed, or whatever the library stumbles over: OpenSlide has opened it
        return 1, 3, None


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
    shape = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    offsets, lengths = (np.asarray(of, np.int64).reshape(shape) for of in (page.dataoffsets, page.databytecounts))
    return TiffLevel(size, (page.tilewidth, page.tilelength), offsets, np.where(offsets > 0, lengths, 0), decode)


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


HELD_BYTES = 2**28  # beyond this, blocks are decoded again when they are wanted again
AHEAD_BYTES = 2**26  # of a row of blocks that the system is asked to fetch


class Regions:
    """Rectangles `boxes` (N, 4) (x, y, width, height in pixels of a level) of an open file, to be read in any order and
    from any thread; the order in which they are given is the cheapest. `served` (N,) are those that lie inside the
    level and whose blocks are all in the file."""

    def __init__(self, file: int, level: TiffLevel, boxes: npt.NDArray[np.int64]) -> None:
        self._file, self._level = file, level
        self._lock = threading.Lock()
        # Decoded blocks, and those that a thread is decoding; None where one can't be decoded.
        self._held: dict[tuple[int, int], Future[UInt8Array | None]] = {}
        self._most = max(1, HELD_BYTES // (level.block[0] * level.block[1] * 3))
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        inside = (start >= 0) & (end > start) & (end <= level.size)
        self.served: npt.NDArray[np.bool_] = np.logical_and.reduce(inside, axis=1)
        first, last = start // level.block, (end - 1) // level.block
        self._boxes, self._spans = boxes, np.concatenate([first, last], axis=1)  # blocks: column, row, column, row
        absent = np.pad((level.lengths == 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        (c0, r0), (c1, r1) = first[self.served].T, last[self.served].T + 1
        self.served[self.served] = absent[r1, c1] - absent[r0, c1] - absent[r1, c0] + absent[r0, c0] == 0
        # Rectangles per block: +1 and -1 at the corners of each span, summed along both axes.
        steps = np.zeros(absent.shape, np.int32)
        (c0, r0), (c1, r1) = first[self.served].T, last[self.served].T + 1
        for rows, columns, step in ((r0, c0, 1), (r1, c1, 1), (r1, c0, -1), (r0, c1, -1)):
            np.add.at(steps, (rows, columns), step)
        self._wanted = steps.cumsum(0).cumsum(1)[:-1, :-1]
        self._fetched = np.zeros(len(level.lengths), bool)

    def read(self, index: int, out: UInt8Array | None = None) -> UInt8Array | None:
        """Pixels (h, w, 3) of a rectangle, in `out` where given; None where they can't be had without OpenSlide."""
        if not self.served[index]:
            return None
        x, y, width, height = self._boxes[index].tolist()
        c0, r0, c1, r1 = self._spans[index].tolist()
        block_width, block_height = self._level.block
        if out is None:
            out = np.empty((height, width, 3), np.uint8)
        whole = (x, y, width, height) == (c0 * block_width, r0 * block_height, block_width, block_height)
        complete = True
        for row in range(r0, r1 + 1):
            top = row * block_height - y  # of the block within the rectangle
            down = slice(max(0, top), min(height, top + block_height))
            for column in range(c0, c1 + 1):
                pixels = self._take(row, column, out if whole else None)
                if pixels is None:
                    complete = False  # the others are taken all the same, so that none is held for ever
                elif pixels is not out:
                    left = column * block_width - x
                    across = slice(max(0, left), min(width, left + block_width))
                    out[down, across] = pixels[
                        down.start - top : down.stop - top, across.start - left : across.stop - left
                    ]
        return out if complete else None

    def _take(self, row: int, column: int, out: UInt8Array | None) -> UInt8Array | None:
        """A block's pixels for one of the rectangles that want it: held, waited for, or decoded here; into `out` where
        nobody else wants it."""
        key = row, column
        with self._lock:
            self._wanted[key] -= 1
            last = self._wanted[key] <= 0
            held = self._held.pop(key, None) if last else self._held.get(key)
            block: Future[UInt8Array | None] = held or Future()
            if held is None and not last and len(self._held) < self._most:
                self._held[key] = block
            ahead, self._fetched[row] = not self._fetched[row], True
        if held is not None:
            return held.result()
        pixels = None
        try:
            if ahead:
                self._fetch(row)
            pixels = self._level.read(self._file, row, column, out if last else None)
        except BlockError:
            pass
        finally:
            block.set_result(pixels)  # an error of another kind ends the reading; nobody may wait for this block then
        return pixels

    def _fetch(self, row: int) -> None:
        """Ask the system for a row of blocks at once, as far as they lie together."""
        wanted = np.flatnonzero(self._wanted[row])
        if not wanted.size or not hasattr(os, "posix_fadvise"):
            return
        offsets, lengths = self._level.offsets[row, wanted], self._level.lengths[row, wanted]
        start, end = int(offsets.min()), int((offsets + lengths).max())
        if end - start <= AHEAD_BYTES:
            os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_WILLNEED)


READERS = ("auto", "openslide")
OPENSLIDE, FAST_EQUAL = "openslide", "fast-equal"  # what a file says that its pixels came by

FEW_BLOCKS = 16  # a level of fewer is read before the comparison would be through
FEW_CHECKED = 4  # blocks that must have been compared


class FastReader:
    """The levels of one open slide that need no OpenSlide."""

    def __init__(self, slide: "Slide", reader: str) -> None:
        self._slide, self._reader = slide, reader
        self._lock = threading.Lock()
        self._file: int | None = None
        self._levels: dict[int, TiffLevel] | None = None
        self._equal: dict[int, bool] = {}

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._levels = None, {}

    def used(self, level: int) -> str:
        """What reads this level: "openslide", or "fast-equal" (compared with OpenSlide)."""
        return OPENSLIDE if self._level(level) is None else FAST_EQUAL

    @property
    def used_so_far(self) -> str:
        """What read the levels that were read until now: "openslide" where it read all."""
        return FAST_EQUAL if any(self._equal.values()) else OPENSLIDE

    def regions(self, level: int, places: npt.NDArray[np.int64]) -> Regions | None:
        """Rectangles to read, or None where OpenSlide has to read them all: `places` (N, 4) int64 x and y of the
        top-left corner in level-0 pixels, width and height in the level's."""
        found = self._level(level)
        if found is None or self._file is None or not len(places):
            return None
        boxes = places.copy()
        exact = places[:, :2] / self._slide.level_downsamples[level]
        boxes[:, :2] = np.rint(exact)
        boxes[(boxes[:, :2] != exact).any(axis=1), 0] = -1  # between pixels: not served
        return Regions(self._file, found, boxes)

    def _level(self, index: int) -> TiffLevel | None:
        """The level as its blocks, where this reader serves it."""
        if self._reader == "openslide":
            return None
        with self._lock:
            if self._levels is None:
                self._levels, slide = {}, self._slide
                with contextlib.suppress(ImportError, OSError):  # not installed: OpenSlide reads, the record says so
                    if levels := tiff_levels(slide.path, slide.vendor, slide.level_dimensions):
                        self._file, self._levels = os.open(slide.path, os.O_RDONLY), levels
            level = self._levels.get(index)
            if level is None:
                return None
            if index not in self._equal:
                self._equal[index] = self._equals_openslide(index, level)
            return level if self._equal[index] else None

    def _equals_openslide(self, index: int, level: TiffLevel) -> bool:
        """Whether a handful of blocks are OpenSlide's to the bit."""
        downsample = self._slide.level_downsamples[index]
        if downsample != round(downsample) or level.lengths.size < FEW_BLOCKS or self._file is None:
            return False
        compared = 0
        for row, column in blocks_to_check(level.lengths):
            x, y = column * level.block[0], row * level.block[1]
            width, height = min(level.block[0], level.size[0] - x), min(level.block[1], level.size[1] - y)
            if width <= 0 or height <= 0:
                continue
            try:
                ours = level.read(self._file, row, column)[:height, :width]
            except BlockError:  # OpenSlide is not asked: where it fails too, it refuses every later read
                continue
            step = round(downsample)
            try:
                theirs = self._slide.read_apart(x * step, y * step, index, width, height)
            except SlideError:
                return False
            if not np.array_equal(ours, theirs):
                return False
            compared += 1
        return compared >= FEW_CHECKED


def blocks_to_check(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(row, column) of the blocks to compare, of `lengths` (rows, columns) bytes: the corners at the right and the
    bottom, the largest, and some between; those of none are left out."""
    rows, columns = lengths.shape
    flat = lengths.ravel()
    held = np.flatnonzero(flat)
    if not held.size:
        return []
    edges = [rows * columns - 1, columns - 1, (rows - 1) * columns]
    largest = np.argsort(flat, kind="stable")[::-1][:2]
    between = held[np.linspace(0, held.size - 1, 7).astype(int)[1:-1:2]]
    chosen = [int(i) for i in dict.fromkeys([*edges, *largest, *between]) if flat[i] > 0]
    return [divmod(i, columns) for i in chosen]
