"""The table at the end of a zip: where each member lies, without opening members and without a Python object for each
step. It serves the zip of embeddings, and the `.pt` files in it, which are zips themselves.

Format: APPNOTE.TXT of PKWARE, sections 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end, with and without zip64).
"""

import struct
from typing import NamedTuple

STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2LH")  # signature, disks, entries here, entries, size, offset, comment length
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")

_MAX_TAIL = _END.size + 65535 + _END64_LOCATOR.size  # the longest comment, and the zip64 locator before the end
_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF


class Member(NamedTuple):
    """One member: name, method, whether encrypted, CRC-32, packed and unpacked size in bytes, offset of its header."""

    name: str
    method: int
    encrypted: bool
    crc: int
    packed: int
    size: int
    offset: int


class Directory(NamedTuple):
    """Where the table lies: offset and size in bytes, number of members."""

    offset: int
    size: int
    members: int


def tail_size(file_size: int) -> int:
    """How many bytes from the end of a file `find_directory` needs to see."""
    return min(file_size, _MAX_TAIL + _END64.size)


def find_directory(tail: bytes | memoryview, file_size: int) -> Directory:
    """Find the table from the last bytes of a file.

    Args:
        tail: the last `tail_size(file_size)` bytes, or all of them.
        file_size: of the whole file, in bytes.

    Raises:
        ValueError: no zip, or one that is cut short.
    """
    tail = bytes(tail[-tail_size(file_size) :])
    at = tail.rfind(b"PK\x05\x06")
    # Members may be zips themselves: the end record is the one whose comment ends the file.
    while at >= 0 and not _ends_file(tail, at):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise ValueError("has no end record")
    *_, members, size, offset, _ = _END.unpack_from(tail, at)
    if members == _FULL16 or size == _FULL32 or offset == _FULL32:
        locator = at - _END64_LOCATOR.size
        if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
            end64 = len(tail) - file_size + _END64_LOCATOR.unpack_from(tail, locator)[2]
            if end64 < 0 or tail[end64 : end64 + 4] != b"PK\x06\x06":
                raise ValueError("has a damaged end record")
            *_, members, size, offset = _END64.unpack_from(tail, end64)
    if offset + size > file_size:
        raise ValueError("is cut short")
    return Directory(offset, size, members)


def _ends_file(tail: bytes, at: int) -> bool:
    return at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail)


def read_members(table: bytes | memoryview, members: int) -> list[Member]:
    """The members that a table lists, in its order.

    Raises:
        ValueError: the table is damaged.
    """
    found = []
    at = 0
    try:
        for _ in range(members):
            (
                signature,
                _,
                _,
                flags,
                method,
                _,
                _,
                crc,
                packed,
                size,
                name_length,
                extra_length,
                comment_length,
                *_,
                offset,
            ) = _ENTRY.unpack_from(table, at)
            if signature != b"PK\x01\x02":
                raise ValueError("has a damaged table of members")
            at += _ENTRY.size
            # Bit 11 says UTF-8; without it the name is in the old PC's code page, as zipfile reads it.
            name = bytes(table[at : at + name_length]).decode("utf-8" if flags & 0x800 else "cp437")
            at += name_length
            if _FULL32 in (packed, size, offset):
                packed, size, offset = _zip64_sizes(table[at : at + extra_length], packed, size, offset)
            at += extra_length + comment_length
            found.append(Member(name, method, bool(flags & 1), crc, packed, size, offset))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError("has a damaged table of members") from error
    return found


def _zip64_sizes(extra: bytes | memoryview, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """(packed, size, offset) with those that are full taken from the zip64 extra field, which lists only these."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                size = next(values) if size == _FULL32 else size
                packed = next(values) if packed == _FULL32 else packed
                offset = next(values) if offset == _FULL32 else offset
            except StopIteration:
                raise ValueError("has a damaged table of members") from None
            break
        at += 4 + length
    return packed, size, offset
