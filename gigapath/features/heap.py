"""A look at the part of an h5 file where HDF5 trusts what it reads.

Text attributes live in "global heap collections". On a damaged one HDF5 loops for ever, which no `except` can catch; so
its chain of objects is walked here first. The layout is that of the HDF5 File Format
Specification, section III.E: a collection is `GCOL`, version 1, three zero bytes, its size (8 bytes), and objects of
index (2), references (2), zeros (4), size (8) and data padded to 8 bytes; index 0 is free space, its size with header.
"""

from pathlib import Path
from typing import BinaryIO

import h5py

_SIGNATURE = b"GCOL\x01\0\0\0"
_HEADER = 16
_PIECE = 1 << 20


def heaps_are_sound(path: Path, file: h5py.File) -> bool:
    """True where every global heap collection of an open file can be walked to its end.

    The stored numbers of contiguous datasets are skipped, so our own files cost a few kB of reading.
    """
    size = path.stat().st_size
    with path.open("rb") as raw:
        for start, stop in _gaps(_contiguous(file, size), size):
            for position in _find(raw, start, stop):
                if not _walk(raw, position, size):
                    return False
    return True


def _contiguous(file: h5py.File, size: int) -> list[tuple[int, int]]:
    """Where the numbers of top-level contiguous datasets lie: (first byte, byte after the last); a place that can't
    be is left out, and so searched."""
    spans = []
    for item in file.values():
        if isinstance(item, h5py.Dataset) and item.chunks is None:
            start, held = item.id.get_offset(), item.id.get_storage_size()
            if start is not None and held == item.nbytes and start + held <= size:
                spans.append((int(start), int(start + held)))
    return sorted(spans)


def _gaps(spans: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What `spans` leave of a file."""
    gaps, end = [], 0
    for start, stop in spans:
        if start > end:
            gaps.append((end, min(start, size)))
        end = max(end, stop)
    return [*gaps, (end, size)]


def _find(raw: BinaryIO, start: int, stop: int) -> list[int]:
    """The positions of collections in a part of the file."""
    found = []
    while start < stop:
        raw.seek(start)
        # A little further than the piece, so that a signature across its end is seen whole.
        piece = raw.read(min(_PIECE, stop - start) + len(_SIGNATURE) - 1)
        at = piece.find(_SIGNATURE)
        while at >= 0:
            found.append(start + at)
            at = piece.find(_SIGNATURE, at + 1)
        start += _PIECE
    return found


def _walk(raw: BinaryIO, position: int, size: int) -> bool:
    """Go through the objects of one collection; False where one does not fit."""
    raw.seek(position + 8)
    length = int.from_bytes(raw.read(8), "little")
    if length < _HEADER or position + length > size:
        return True  # HDF5 sees this by itself
    content = raw.read(length - _HEADER)
    at = 0
    while len(content) - at >= _HEADER:
        index = int.from_bytes(content[at : at + 2], "little")
        held = int.from_bytes(content[at + 8 : at + 16], "little")
        step = held if index == 0 else _HEADER + (held + 7) // 8 * 8
        if step < _HEADER or at + step > len(content):
            return False
        at += step
    return True
