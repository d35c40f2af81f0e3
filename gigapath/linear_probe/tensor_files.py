"""Vectors out of `.pt` files, without running what they hold.

A `.pt` is a small zip: a pickle that describes the tensor, and its bytes. Files of one data set share the pickle to
the last bit, so the pickle is read once, by torch's own restricted reader, and afterwards only compared: equal pickles
mean equal layout, and the vector is taken straight from the bytes.
"""

import io
import pickle
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gigapath.linear_probe.zip_directory import LOCAL_HEADER, STORED, find_directory, read_members

FloatVector = npt.NDArray[np.float32]

_NUMPY_TYPES: dict[torch.dtype, str] = {
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
}


class _Layout(NamedTuple):
    """Where a vector lies in its storage: type, offset in bytes, number of entries, and the bytes of the storage."""

    dtype: str
    offset: int
    entries: int
    storage_bytes: int


class VectorReader:
    """Reads one vector per file; remembers the layouts it has met."""

    def __init__(self) -> None:
        self._layouts: dict[bytes, _Layout] = {}

    def read(self, content: bytes | memoryview, name: str) -> FloatVector:
        """The vector (D,) in a `.pt` file.

        Args:
            content: the file's bytes.
            name: for messages.

        Raises:
            ValueError: no `.pt` file, one that holds code or anything but one vector of real numbers.
        """
        records = _records(content)
        if records is not None:
            layout = self._layouts.get(bytes(records[0]))
            if layout is not None and len(records[1]) == layout.storage_bytes:
                return np.frombuffer(records[1], layout.dtype, layout.entries, layout.offset).astype(np.float32)
        tensor = _load(content, name)
        vector = tensor.flatten()
        # Kept only for what the quick way reads right: little-endian, one storage, entries side by side.
        if records is not None and tensor.dtype in _NUMPY_TYPES and tensor.is_contiguous():
            storage_bytes = tensor.untyped_storage().nbytes()
            if len(records[1]) == storage_bytes:
                offset = int(tensor.storage_offset()) * tensor.element_size()
                self._layouts[bytes(records[0])] = _Layout(
                    _NUMPY_TYPES[tensor.dtype], offset, vector.numel(), storage_bytes
                )
        return np.asarray(vector.to(torch.float32).numpy())


def _records(content: bytes | memoryview) -> tuple[memoryview, memoryview] | None:
    """(pickle, bytes of the only storage) of a `.pt` in torch's zip format; None for any other file."""
    view = memoryview(content)
    described = stored = None
    try:
        directory = find_directory(view, len(view))
        table = view[directory.offset : directory.offset + directory.size]
        for member in read_members(table, directory.members):
            kind = member.name.partition("/")[2]
            if kind not in ("data.pkl", "byteorder") and not kind.startswith("data/"):
                continue
            if member.method != STORED or member.encrypted:
                return None
            header = LOCAL_HEADER.unpack_from(view, member.offset)
            start = member.offset + LOCAL_HEADER.size + header[-2] + header[-1]
            record = view[start : start + member.size]
            if kind == "byteorder":
                if record.tobytes() != b"little":
                    return None
            elif kind == "data.pkl":
                described = record
            elif stored is None:
                stored = record
            else:
                return None
    except Exception:  # whatever is wrong with it, torch's own reader says so
        return None
    return None if described is None or stored is None else (described, stored)


def _load(content: bytes | memoryview, name: str) -> torch.Tensor:
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(
                f"{name}: holds objects other than tensors, and loading those could run code. "
                "Save the plain vector (torch.save(embedding.cpu(), path))."
            ) from error
        raise ValueError(f"{name}: can't be read as a .pt file. Fetch or make it anew.") from error
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected one tensor, got {type(tensor).__name__}. Save the plain vector.")
    if tensor.layout != torch.strided or not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a vector of real numbers, got {tensor.dtype}.")
    if tensor.numel() == 0 or tensor.numel() != max(tensor.shape, default=0):
        raise ValueError(f"{name}: expected one vector, got shape {tuple(tensor.shape)}.")
    return tensor.detach()
