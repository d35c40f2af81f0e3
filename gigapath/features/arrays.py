"""Arrays from numpy's and torch's files, without running what they hold and without believing what they claim of their
size."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from gigapath.features.data import Array, FeatureFileError
from gigapath.features.h5 import ANY_FILE, MOST_PACKED_NUMBERS


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an npz file, by name; FileNotFoundError, PermissionError, or FeatureFileError where it is none, is
    damaged, holds objects, or claims more than it holds."""
    with _refusals(path, "npz"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > max(ANY_FILE, member.compress_size * MOST_PACKED_NUMBERS):
                    raise ValueError(f"{member.compress_size:,} bytes claim {member.file_size:,} in memory")
                with archive.open(member) as content:
                    _check_size(content, member.file_size)
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}


def read_npy(path: Path) -> Array:
    """The array of an npy file; errors as `read_npz`."""
    with _refusals(path, "npy"):
        with path.open("rb") as content:
            _check_size(content, path.stat().st_size)
        return np.asarray(np.load(path, allow_pickle=False))


def read_tensor(path: Path | str) -> Array:
    """The tensor of a `.pt` file as an array of its own floating type (bfloat16, which numpy lacks, as float32);
    FileNotFoundError, or FeatureFileError where it is no file of one tensor of floats."""
    import torch  # takes seconds, which only `.pt` files need

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise FeatureFileError(
            f"{path.name}: expected a .pt file of one tensor, could not be read ({reason})."
        ) from error
    if not isinstance(held, torch.Tensor) or not held.is_floating_point() or held.layout != torch.strided:
        what = f"one of {held.dtype}, {held.layout}" if isinstance(held, torch.Tensor) else type(held).__name__
        raise FeatureFileError(f"{path.name}: expected a .pt file of one tensor of floats, got {what}.")
    return np.asarray((held.float() if held.dtype == torch.bfloat16 else held).detach().numpy())


def _check_size(content: IO[bytes], size: int) -> None:
    """Raise ValueError where an array's header claims more bytes than `size`: numpy reserves them before it reads."""
    try:
        version = np.lib.format.read_magic(content)
    except ValueError:  # no array: numpy says so, or hands its bytes over
        return
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(content)
    if math.prod(shape) * max(1, dtype.itemsize) > size:
        raise ValueError(f"an array of {shape} does not fit into its {size:,} bytes")


@contextlib.contextmanager
def _refusals(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for broken bytes
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise FeatureFileError(
            f"{path.name}: expected an {kind} file, got something that is not ({reason})."
        ) from error
