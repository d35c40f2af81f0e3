"""numpy's files, without running what they hold and without believing what they claim of their size."""

import ast
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gigapath.features.data import Array, FeatureFileError

_MAGIC = b"\x93NUMPY"
_MOST_HEADER = 10_000  # as numpy has it: what parses a header is not made for more


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an npz file, by name.

    Raises:
        FileNotFoundError, PermissionError: it can't be opened.
        FeatureFileError: no npz file, a damaged one, one that holds objects, or claims more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as content:
                    _check_size(content, member.file_size)  # type: ignore[arg-type]
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for broken bytes
        raise _refusal(path, "npz", error) from error


def read_npy(path: Path) -> Array:
    """The array of an npy file; errors as `read_npz`."""
    try:
        with path.open("rb") as content:
            _check_size(content, path.stat().st_size)
        return np.asarray(np.load(path, allow_pickle=False))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise _refusal(path, "npy", error) from error


def _check_size(content: BinaryIO, size: int) -> None:
    """Raise ValueError where an array's header claims more bytes than `size`: numpy reserves them before it reads."""
    start = content.read(12)
    if start[:6] != _MAGIC:
        return  # no array: numpy says so, or hands its bytes over
    wide = start[6] > 1
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    if length > min(size, _MOST_HEADER):
        raise ValueError(f"a header of {length:,} bytes")
    header = (b"" if wide else start[10:]) + content.read(length - (0 if wide else 2))
    described = ast.literal_eval(header.decode("latin-1").strip())
    dtype = np.dtype(described["descr"])
    count = 1
    for side in described["shape"]:
        count *= int(side)
    if count * max(1, dtype.itemsize) > size:
        raise ValueError(f"an array of {described['shape']} does not fit into its {size:,} bytes")


def _refusal(path: Path, kind: str, error: Exception) -> FeatureFileError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return FeatureFileError(f"{path.name}: expected an {kind} file, got something that is not ({reason}).")
