"""A zip or a folder of one `.pt` per tile, read once into one matrix: in parallel, in the order in which the bytes lie,
without unpacking to disk and without running what the files hold. A checked cache beside it makes the second reading
quick."""

import collections
import hashlib
import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from gigapath.files import OutputError
from gigapath.linear_probe.table import (
    EmbeddingTable,
    bare_name,
    check_finite,
    check_unique,
    read_table,
    split_of_path,
    worker_count,
    write_table,
)
from gigapath.linear_probe.tensor_files import VectorReader
from gigapath.linear_probe.zip_directory import (
    DEFLATED,
    LOCAL_HEADER,
    STORED,
    Member,
    find_directory,
    read_members,
    tail_size,
)

CACHE_SUFFIX = ".cache.h5"
CACHE_VERSION = 1  # raised when the cache's content changes for the same zip
SPAN_BYTES = 4 << 20  # read at once
SPAN_GAP = 256 << 10  # bytes between two members that are worth reading over
REPORT_EVERY = 1024  # tiles
_LOCAL_EXTRA = 1024  # a local header may carry more than the table says; a span's last member gets this much room

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]  # (tiles read, tiles in all)


def read_embeddings(
    path: Path | str, *, cache: bool = True, report: Report | None = None
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Read the embeddings of tiles, ordered by split and name whatever they come in.

    Args:
        path: a zip or folder of `.pt` vectors, or an `.h5`, `.npz`, `.safetensors` of `features` and `names`.
        cache: for a zip or folder, use and write `<path>.cache.h5` beside it.
        report: called now and then with the number of tiles read and the number there is.

    Returns:
        the table, and how it was read: {"identity": ..., "read_from": "files" | "cache"}.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a damaged container, a file that holds code, NaN, vectors of different widths.
    """
    path = Path(path)
    if path.is_dir():
        source: _Source = _Folder(path)
    elif path.suffix.lower() == ".zip":
        source = _Zip(path)
    else:
        table = read_table(path)
        order = sorted(range(len(table)), key=lambda row: (table.splits[row], table.names[row]))
        return _reordered(table, order), {"identity": _file_identity(path), "read_from": "files"}
    identity = source.identity()
    cache_path = path.with_name(path.name + CACHE_SUFFIX)
    if cache:
        cached = _read_cache(cache_path, identity)
        if cached is not None:
            return cached, {"identity": identity, "read_from": "cache"}
    table = _read_all(source, path.name, report or (lambda done, total: None))
    if cache:
        try:
            write_table(cache_path, replace(table, attrs={"identity": identity, "cache_version": CACHE_VERSION}))
        except OutputError as error:
            log.warning("no cache was written: %s", error)
    return table, {"identity": identity, "read_from": "files"}


def _read_cache(path: Path, identity: str) -> EmbeddingTable | None:
    """The cached table if it is whole and of these very files, else None."""
    if not path.is_file():
        return None
    try:
        table = read_table(path)
    except (ValueError, OSError) as error:
        log.warning("the cache is not used: %s", error)
        return None
    if table.attrs.get("identity") != identity or table.attrs.get("cache_version") != CACHE_VERSION:
        return None
    return replace(table, attrs={})


def _read_all(source: "_Source", where: str, report: Report) -> EmbeddingTable:
    members = source.members()
    if not members:
        raise ValueError(f"{where}: expected .pt files, got none. Name the zip or folder of tile embeddings.")
    names = [bare_name(member) for member in members]
    splits = [split_of_path(member) for member in members]
    check_unique(names, where)
    order = sorted(range(len(members)), key=lambda index: (splits[index], names[index]))
    row_of_member = np.empty(len(members), dtype=np.int64)
    row_of_member[order] = np.arange(len(members))

    features = np.empty((0, 0), dtype=np.float32)
    reader = VectorReader()
    for done, (index, content) in enumerate(_contents(source), start=1):
        vector = reader.read(content, members[index])
        if done == 1:
            features = np.empty((len(members), len(vector)), dtype=np.float32)
            first = members[index]
        elif len(vector) != features.shape[1]:
            raise ValueError(
                f"{members[index]}: expected a vector of width {features.shape[1]} like {first}, "
                f"got {len(vector)}. Keep the embeddings of one encoder together."
            )
        features[row_of_member[index]] = vector
        if done % REPORT_EVERY == 0 or done == len(members):
            report(done, len(members))
    ordered = tuple(names[index] for index in order)
    check_finite(features, ordered, where)
    return EmbeddingTable(ordered, features, tuple(splits[index] for index in order))


def _contents(source: "_Source") -> Iterator[tuple[int, bytes | memoryview]]:
    """(number of the member, its bytes) of all members, in the order in which they lie.

    Threads read and unpack ahead, a span at a time; the many small steps for each member stay in one thread, since
    handing Python's lock over for each of them costs more than it gives (measured: three times slower).
    """
    workers = worker_count()
    spans = iter(source.spans())
    ahead: collections.deque[Future[list[tuple[int, bytes | memoryview]]]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            ahead.extend(pool.submit(source.load, span) for span in itertools.islice(spans, 2 * workers))
            while ahead:
                loaded = ahead.popleft().result()
                ahead.extend(pool.submit(source.load, span) for span in itertools.islice(spans, 1))
                for index, content in loaded:
                    source.check(index, content)
                    yield index, content
        finally:
            for task in ahead:
                task.cancel()


class _Zip:
    """The `.pt` members of a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
        self._members = [member for member in everything if _is_vector(member.name)]
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


class _Folder:
    """The `.pt` files of a folder and the folders below it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = sorted(_walk(path, ""))

    def identity(self) -> str:
        """Names, sizes and times of change of all files."""
        listed = "\n".join(f"{name}\t{size}\t{changed}" for name, size, changed in self._entries)
        return f"folder {len(self._entries)} {hashlib.sha256(listed.encode()).hexdigest()}"

    def members(self) -> list[str]:
        return [name for name, _, _ in self._entries]

    def spans(self) -> list[list[int]]:
        rows = range(len(self._entries))
        return [list(rows[start : start + 512]) for start in rows[::512]]

    def load(self, span: Sequence[int]) -> list[tuple[int, bytes | memoryview]]:
        return [(index, (self.path / self._entries[index][0]).read_bytes()) for index in span]

    def check(self, index: int, content: bytes | memoryview) -> None:
        """Nothing is known of a file in a folder but what its reader finds."""


_Source = _Zip | _Folder


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
        return zlib.decompressobj(-15).decompress(content, member.size)
    except zlib.error:
        return b""


def _is_vector(name: str) -> bool:
    """Whether a path is an embedding's: a `.pt` that is neither hidden nor a Mac's shadow of a file."""
    parts = name.split("/")
    return parts[-1].endswith(".pt") and not parts[-1].startswith(".") and "__MACOSX" not in parts


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                yield from _walk(Path(entry.path), name + "/")
            elif _is_vector(name):
                status = entry.stat()
                yield name, status.st_size, status.st_mtime_ns


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end of the file."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _file_identity(path: Path) -> str:
    status = path.stat()
    return f"file {status.st_size} {status.st_mtime_ns}"


def _reordered(table: EmbeddingTable, order: list[int]) -> EmbeddingTable:
    """The rows in another order; where it is the one they have, nothing is copied."""
    if order == list(range(len(order))):
        return table

    def text(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(values[row] for row in order)

    return replace(
        table,
        names=tuple(table.names[row] for row in order),
        splits=tuple(table.splits[row] for row in order),
        features=table.features[order],
        colours=None if table.colours is None else table.colours[order],
        labels=text(table.labels),
        groups=text(table.groups),
    )
