"""Whether a TIFF file is as long as its own directory says: a copy that was cut short is found without reading a tile.

Only directories are read (TIFF 6.0, and BigTIFF), never pixels.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_OFFSETS_AND_COUNTS = {273: 279, 324: 325}  # StripOffsets, TileOffsets -> the tags with their byte counts
_DTYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}  # BYTE, SHORT, LONG, LONG8
_DIRECTORIES = 1000  # a chain longer than this is a loop
_ENTRIES = 4096
_NDPI_BYTES = 1 << 32  # Hamamatsu's files beyond this keep the upper half of their offsets elsewhere


def missing_bytes(path: Path) -> int:
    """How many bytes a TIFF lacks at its end, by the tiles and strips that it lists; 0 where it is whole, or no TIFF.

    A directory that can't be read ends the search: what opens the slide says more about that.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            return max(0, _end(file, size) - size)
        except (struct.error, ValueError, OverflowError, MemoryError):
            return 0


def _end(file: BinaryIO, size: int) -> int:
    """The end of the last tile or strip that any directory lists."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return 0
    version = struct.unpack(order + "H", head[2:4])[0]
    if version == 42:
        big, position = False, struct.unpack(order + "I", head[4:8])[0]
    elif version == 43:
        big, position = True, struct.unpack(order + "Q", head[8:16])[0]
    else:
        return 0
    if not big and size >= _NDPI_BYTES:
        return 0
    end = 0
    for _ in range(_DIRECTORIES):
        if position == 0:
            break
        found, position = _directory(file, position, order, big)
        for offsets, counts in _OFFSETS_AND_COUNTS.items():
            starts, lengths = found.get(offsets), found.get(counts)
            if starts is not None and lengths is not None and len(starts) == len(lengths) and len(starts):
                ends = np.where(lengths > 0, starts + lengths, 0)
                end = max(end, int(ends.max()))
    return end


def _directory(file: BinaryIO, position: int, order: str, big: bool) -> tuple[dict[int, npt.NDArray[np.int64]], int]:
    """(the tags of interest -> their values, where the next directory is) of the directory at `position`."""
    file.seek(position)
    form, width = (order + "Q", 20) if big else (order + "H", 12)
    count = struct.unpack(form, file.read(struct.calcsize(form)))[0]
    if count > _ENTRIES:
        raise ValueError("no directory")
    entries = file.read(count * width)
    following = struct.unpack(order + ("Q" if big else "I"), file.read(8 if big else 4))[0]
    found = {}
    for start in range(0, count * width, width):
        tag, kind = struct.unpack_from(order + "HH", entries, start)
        if tag not in _OFFSETS_AND_COUNTS and tag not in _OFFSETS_AND_COUNTS.values():
            continue
        number = struct.unpack_from(order + ("Q" if big else "I"), entries, start + 4)[0]
        dtype = np.dtype(order + _DTYPES[kind]) if kind in _DTYPES else None
        if dtype is None:
            raise ValueError("another type")
        inline = width - (12 if big else 8)
        data = entries[start + width - inline : start + width]
        if number * dtype.itemsize > inline:
            file.seek(struct.unpack(order + ("Q" if big else "I"), data)[0])
            data = file.read(number * dtype.itemsize)
        found[tag] = np.frombuffer(data, dtype, count=number).astype(np.int64)
    return found, following
