"""Which DICOM series a file belongs to, read from its header: a slide is a series, and a series is many files.

Only the header is walked (DICOM PS3.5, explicit and implicit little-endian); no pixel is touched.
"""

import struct
from pathlib import Path

_SERIES_INSTANCE_UID = (0x0020, 0x000E)
_TRANSFER_SYNTAX_UID = (0x0002, 0x0010)
_ITEM = 0xFFFE
_ITEM_END = (_ITEM, 0xE00D)
_SEQUENCE_END = (_ITEM, 0xE0DD)
_IMPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2"
_UNREADABLE_SYNTAXES = {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"}  # deflated, big-endian
_UNDEFINED = 0xFFFFFFFF
# Value representations whose length takes four bytes, after two reserved ones (PS3.5, table 7.1-1).
_LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
# The series' identifier stands in group 0020, ahead of everything big (ICC profiles, frame tables, pixels).
_HEADER_BYTES = 1 << 20


def series_uid(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file; None where it is no DICOM file or doesn't say."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER_BYTES)
    except OSError:
        return None
    if data[128:132] != b"DICM":
        return None
    try:
        return _find_series_uid(data)
    except (struct.error, RecursionError):  # cut off inside the header, or no header at all
        return None


def _find_series_uid(data: bytes) -> str | None:
    position, explicit = 132, True
    while position < len(data):
        meta = data[position : position + 2] == b"\x02\x00"  # the file's meta group is explicit whatever follows
        tag, length, position = _element(data, position, explicit or meta)
        if tag == _SERIES_INSTANCE_UID:
            return _text(data, position, length)
        if not meta and tag > _SERIES_INSTANCE_UID:  # elements stand in the order of their tags
            return None
        if tag == _TRANSFER_SYNTAX_UID:
            syntax = _text(data, position, length)
            if syntax in _UNREADABLE_SYNTAXES:
                return None
            explicit = syntax != _IMPLICIT_LITTLE_ENDIAN
        position = _skip(data, position, length, explicit)
    return None


def _element(data: bytes, position: int, explicit: bool) -> tuple[tuple[int, int], int, int]:
    """(tag, length of the value in bytes, where the value starts) of the element at `position`."""
    group, number = struct.unpack_from("<HH", data, position)
    if group == _ITEM or not explicit:
        return (group, number), struct.unpack_from("<I", data, position + 4)[0], position + 8
    if data[position + 4 : position + 6] in _LONG_VRS:
        return (group, number), struct.unpack_from("<I", data, position + 8)[0], position + 12
    return (group, number), struct.unpack_from("<H", data, position + 6)[0], position + 8


def _skip(data: bytes, position: int, length: int, explicit: bool) -> int:
    """Where the element ends whose value starts at `position`; sequences of undefined length are walked through."""
    if length != _UNDEFINED:
        return position + length
    while True:
        tag, length, position = _element(data, position, explicit)
        if tag in (_SEQUENCE_END, _ITEM_END):
            return position
        position = _skip(data, position, length, explicit)


def _text(data: bytes, position: int, length: int) -> str:
    if position + length > len(data):
        raise struct.error("cut off")
    return data[position : position + length].decode("ascii", "replace").strip("\0 ")
