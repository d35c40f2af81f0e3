"""Rows of a large slide that are safe already: a run that is stopped or killed goes on behind them.

They lie beside the file that is being made, as `<name>.rows.partial`: a header, then the rows as the file will hold
them. Rows are flushed before the header counts them, and the header carries their checksum, so that what it says holds
after a power cut, and after two runs wrote the same file at once.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.data import Array
from gigapath.files import PARTIAL_SUFFIX, open_own

_MAGIC = b"GPROWS1\n"
# magic, identity, rows of the whole, width, type, rows kept, their CRC-32; the header's own CRC-32 follows.
_HEADER = struct.Struct("<8s32sQQ8sQI")
_START = 4096  # where the rows begin
_BLOCK_BYTES = 1 << 22


@dataclass
class KeptRows:
    """The kept rows of one file in the making. Rows are the first ones of the whole, without a gap.

    Attributes:
        path: the file in the making.
        identity: everything that the rows depend on, in at most 32 letters; rows of another identity count for nothing.
        shape: (N, D) of the whole.
        dtype: of the rows as stored.
        step: rows are kept in whole multiples of this, but for the last ones of the whole.
    """

    path: Path
    identity: str
    shape: tuple[int, int]
    dtype: "np.dtype[Any]"
    step: int = 1
    _count: int = 0
    _crc: int = 0
    _descriptor: int = -1

    @property
    def file(self) -> Path:
        """Where the rows lie."""
        return rows_file(self.path)

    @property
    def count(self) -> int:
        """How many rows are kept, as far as this object has read or written them."""
        return self._count

    def find(self) -> int:
        """Look for rows that an earlier run kept, and check every byte; how many there are."""
        for _ in self.blocks():
            pass
        return self._count

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """(index of the first row, rows (n, D)) of what an earlier run kept; `count` holds at the end.

        Nothing that came may be used where `count` is 0 then: its checksum was wrong.
        """
        self._count = self._crc = 0
        with contextlib.suppress(OSError), os.fdopen(open_own(self.file, os.O_RDONLY), "rb") as file:
            said = self._read_header(file.read(_START))
            if said is None:
                return
            count, checksum = said
            step = max(1, _BLOCK_BYTES // self._row_bytes)
            crc = 0
            for first in range(0, count, step):
                n = min(step, count - first)
                data = file.read(n * self._row_bytes)
                if len(data) < n * self._row_bytes:
                    return
                crc = zlib.crc32(data, crc)
                yield first, np.frombuffer(data, self.dtype).reshape(n, self.shape[1])
            if crc == checksum:
                self._count, self._crc = count, crc

    def keep(self, rows: Array) -> None:
        """Add the rows that follow, without counting them yet. A disk that refuses ends the keeping, not the run."""
        data = np.ascontiguousarray(rows, self.dtype).tobytes()
        try:
            if self._descriptor < 0:
                if not self._count:  # whatever has that name holds nothing of ours
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    self.file.unlink(missing_ok=True)
                self._descriptor = open_own(self.file, os.O_RDWR | (0 if self._count else os.O_CREAT | os.O_EXCL))
            position = _START + self._count * self._row_bytes
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], position + done)
        except OSError:
            self.discard()
            return
        self._crc = zlib.crc32(data, self._crc)
        self._count += len(rows)

    def commit(self) -> None:
        """Make the rows durable, then the header that counts them."""
        if self._descriptor < 0:
            return
        kind = self.dtype.str.encode()
        fields = (_MAGIC, self.identity.encode(), *self.shape, kind, self._count, self._crc)
        header = _HEADER.pack(*fields)
        try:
            os.fsync(self._descriptor)
            os.pwrite(self._descriptor, header + struct.pack("<I", zlib.crc32(header)), 0)
            os.fsync(self._descriptor)
        except OSError:
            self.discard()

    def close(self) -> None:
        """Leave the rows for a later run."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def discard(self) -> None:
        """Remove the rows: the whole is there, or they can't be kept."""
        self.close()
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.dtype.itemsize

    def _read_header(self, data: bytes) -> tuple[int, int] | None:
        """(rows, their checksum) where the header is whole and of this identity."""
        if len(data) < _HEADER.size + 4:
            return None
        if struct.unpack_from("<I", data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
            return None
        magic, identity, whole, width, kind, count, crc = _HEADER.unpack_from(data)
        found = magic, identity.rstrip(b"\0"), (whole, width), kind.rstrip(b"\0")
        mine = _MAGIC, self.identity.encode(), self.shape, self.dtype.str.encode()
        return (count, crc) if found == mine and count <= whole else None


def rows_file(path: Path) -> Path:
    """Where the kept rows of a file in the making lie."""
    return path.with_name(f"{path.name}.rows{PARTIAL_SUFFIX}")
