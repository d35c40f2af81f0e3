"""Where the files of a data set lie: the members of a zip, or the files of a folder; read in the order of their bytes,
ahead of whoever uses them."""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gigapath.files import real_path
from gigapath.linear_probe.table import worker_count
from gigapath.linear_probe.zip_directory import (
    DEFLATED,
    LOCAL_HEADER,
    STORED,
    Member,
    find_directory,
    read_members,
    tail_size,
)
from gigapath.read_ahead import read_ahead

SPAN_BYTES = 4 << 20  # read at once
SPAN_GAP = 256 << 10  # bytes between two members that are worth reading over
SPAN_FILES = 512  # files of a folder read by one task
_MOST_UNPACKED = 1 << 30  # a member larger than this holds no vector
_LOCAL_EXTRA = 1024  # a local header may carry more than the table says; a span's last member gets this much room


class ZipSource:
    """The members of a zip that `accept` takes by their names."""

    def __init__(self, path: Path, accept: Callable[[str], bool]) -> None:
        self.path, self._accept = path, accept
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
        size = path.stat().st_size
        with path.open("rb") as file:
            try:
                file.seek(size - tail_size(size))
                directory = find_directory(file.read(), size)
                file.seek(directory.offset)
                self._table = file.read(directory.size)
                self._count = directory.members
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}, so it is no whole zip. Fetch it anew.") from None
        self._members: list[Member] = []

    def identity(self) -> str:
        """Size, time of change and the table of members, which holds every member's name, size and CRC-32."""
        status = self.path.stat()
        return f"zip {status.st_size} {status.st_mtime_ns} {hashlib.sha256(self._table).hexdigest()}"

    def members(self) -> list[str]:
        """The names, in the order of the table."""
        try:
            everything = read_members(self._table, self._count)
        except ValueError as error:
            raise ValueError(f"{self.path.name}: {error}. Fetch it anew.") from None
        self._members = [member for member in everything if self._accept(member.name)]
        for member in self._members:
            if member.encrypted or member.method not in (STORED, DEFLATED):
                raise ValueError(
                    f"{self.path.name}: {member.name} is encrypted or packed by method {member.method}. "
                    "Pack it anew without encryption, stored or deflated."
                )
        return [member.name for member in self._members]

    def spans(self) -> list[list[int]]:
        """Members in the order of their bytes, grouped to be read at once."""
        spans: list[list[int]] = []
        start = end = 0
        for index in sorted(range(len(self._members)), key=lambda index: self._members[index].offset):
            member = self._members[index]
            last = member.offset + LOCAL_HEADER.size + len(member.name) + member.packed
            if not spans or member.offset - end > SPAN_GAP or last - start > SPAN_BYTES:
                spans.append([])
                start = member.offset
            spans[-1].append(index)
            end = last
        return spans

    def load(self, span: Sequence[int]) -> list[tuple[int, bytes | memoryview]]:
        """The unpacked bytes of the members of a span; b"" where they can't be had."""
        first, last = self._members[span[0]], self._members[span[-1]]
        size = last.offset + LOCAL_HEADER.size + len(last.name.encode()) + last.packed + _LOCAL_EXTRA - first.offset
        with self.path.open("rb", buffering=0) as file:
            block = memoryview(_read_at(file.fileno(), first.offset, size))
        members = ((index, self._members[index]) for index in span)
        return [(index, _unpacked(member, block, member.offset - first.offset)) for index, member in members]

    def check(self, index: int, content: bytes | memoryview) -> None:
        """Raise ValueError where a member's bytes differ from its size and CRC-32."""
        member = self._members[index]
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise ValueError(f"{self.path.name}: {member.name} is damaged (checksum). Fetch it anew.")


class FolderSource:
    """The files of a folder, and of the folders below it, that `accept` takes by their paths."""

    def __init__(self, path: Path, accept: Callable[[str], bool]) -> None:
        self.path = path
        self._entries = sorted(_walk(path, "", accept, {real_path(path)}))

    def identity(self) -> str:
        """Names, sizes and times of change of all files."""
        listed = "\n".join(f"{name}\t{size}\t{changed}" for name, size, changed in self._entries)
        return f"folder {len(self._entries)} {hashlib.sha256(listed.encode()).hexdigest()}"

    def members(self) -> list[str]:
        return [name for name, _, _ in self._entries]

    def spans(self) -> list[list[int]]:
        rows = range(len(self._entries))
        return [list(rows[start : start + SPAN_FILES]) for start in rows[::SPAN_FILES]]

    def load(self, span: Sequence[int]) -> list[tuple[int, bytes | memoryview]]:
        return [(index, self._bytes(self._entries[index][0])) for index in span]

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: expected a file that can be read, got {error.strerror!r}.") from error

    def check(self, index: int, content: bytes | memoryview) -> None:
        """Nothing is known of a file in a folder but what its reader finds."""


def _unpacked(member: Member, block: memoryview, at: int) -> bytes | memoryview:
    """A member's bytes out of a block in which its local header begins at `at`; b"" where they are not there."""
    header = block[at : at + LOCAL_HEADER.size]
    if len(header) < LOCAL_HEADER.size or header[:4].tobytes() != b"PK\x03\x04":
        return b""
    *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
    start = at + LOCAL_HEADER.size + name_length + extra_length
    content = block[start : start + member.packed]
    if member.method == STORED:
        return content
    try:
        # One byte more than it should be: a member that unpacks to more is found out by its size. 0 means no limit.
        return zlib.decompressobj(-15).decompress(content, min(member.size, _MOST_UNPACKED) + 1)
    except zlib.error:
        return b""


Source = ZipSource | FolderSource


def read_members_ahead(source: Source) -> Iterator[tuple[int, bytes | memoryview]]:
    """(number of the member, its bytes) of all members, in the order in which they lie.

    Threads read and unpack ahead, a span at a time; the many small steps for each member stay in one thread, since
    handing Python's lock over for each of them costs more than it gives (measured: three times slower).
    """
    workers = worker_count()
    with contextlib.closing(read_ahead(source.load, source.spans(), threads=workers, ahead=2 * workers)) as spans:
        for loaded in spans:
            for index, content in loaded:
                source.check(index, content)
                yield index, content


def visible(name: str) -> bool:
    """Whether a path is neither hidden nor a Mac's shadow of a file."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _walk(folder: Path, prefix: str, accept: Callable[[str], bool], seen: set[Path]) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of each file; a folder that `seen` holds, such as one that links back, is not
    entered."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            try:
                inner = real_path(Path(entry.path)) if entry.is_dir() else None
                status = entry.stat() if inner is None and accept(name) else None
            except OSError as error:  # a link to nothing, or to itself
                raise ValueError(f"{name}: expected a file, got {error.strerror!r}. Mend or remove it.") from error
            if status is not None:
                yield name, status.st_size, status.st_mtime_ns
            elif inner is not None and inner not in seen:
                seen.add(inner)
                yield from _walk(Path(entry.path), name + "/", accept, seen)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end of the file."""
    pieces = []
    size = min(size, os.fstat(descriptor).st_size - offset)  # a damaged table may claim anything
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
