"""Opening, checking and writing h5 files: without file locks, one sentence for what is wrong, whole or not at all.

HDF5 itself does not survive a failing disk: after a failed write its file can be neither closed nor forgotten, and
the process dies at exit. So our files reach the disk through `_Disk`, which keeps the first error for us to raise and
lets HDF5 believe that all went well.
"""

import contextlib
import fcntl
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from gigapath.features.data import Array, Attrs, FeatureFileError
from gigapath.files import (
    OutputError,
    discard,
    is_write_error,
    open_temporary,
    output_error,
    publish,
    real_path,
    sha256_of,
    small_json,
    write_json_atomic,
)


@contextlib.contextmanager
def open_h5(path: Path | str) -> Iterator[h5py.File]:
    """Open an h5 file for reading; whatever HDF5 finds wrong with it, then or later, becomes one sentence:
    FeatureFileError where it is none, is being written, or can't be read to the end; FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        file = _open_unlocked(path)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        raise FeatureFileError(f"{path.name}: expected an HDF5 file, {_what_it_is(path, error)}.") from error
    with file:
        if file.id.get_intent() & h5py.h5f.ACC_RDWR:
            raise FeatureFileError(f"{path.name}: this process has it open for writing. Close it there first.")
        try:
            if not heaps_are_sound(path, _datasets(path, file)):
                raise FeatureFileError(f"{path.name}: its text attributes are damaged. Make it again or fetch it anew.")
            yield file
        except (FeatureFileError, FileNotFoundError, PermissionError):
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise FeatureFileError(
                f"{path.name}: could not be read to the end ({_first_line(error)}). Make it again or fetch it anew."
            ) from error


def _open_unlocked(path: Path) -> h5py.File:
    """The file without a lock; or as somebody else in this process has opened it, which HDF5 asks for."""
    try:
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError) as error:
        for locking in ("best-effort", True):
            with contextlib.suppress(OSError, RuntimeError):
                if "flag values don't match" in str(error):
                    return h5py.File(path, "r", locking=locking)
        raise


def _datasets(path: Path, file: h5py.File) -> list[h5py.h5d.DatasetID]:
    """The top-level datasets; what would open another file, or wait for a pipe, is refused: links are looked at, never
    followed, and datasets are asked how they are stored before anything else."""
    found = []
    for name in file.id:  # by HDF5's own calls: h5py's objects take longer than everything else on a small file
        inside = file.id.links.get_info(name).type == h5py.h5l.TYPE_HARD
        if inside:
            item = h5py.h5o.open(file.id, name)
            if isinstance(item, h5py.h5d.DatasetID):
                stored = item.get_create_plist()
                inside = stored.get_layout() != h5py.h5d.VIRTUAL and not stored.get_external_count()
                found.append(item)
        if not inside:
            raise FeatureFileError(
                f"{path.name}: its {_text(name)[:80]!r} lies in another file. Copy it into this one."
            )
    return found


_AGAIN = "Make it again or fetch it anew, unless it is still being written"


def _what_it_is(path: Path, error: Exception) -> str:
    if "unable to lock" in str(error) and "Resource temporarily" not in str(error):
        return "got one on a file system without locks. Set HDF5_USE_FILE_LOCKING=FALSE"
    with path.open("rb") as file:
        start = file.read(8)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as HDF5 does
        except BlockingIOError:
            return "got one that another program has open for writing. Read it when that is done"
        except OSError:  # a file system without locks
            pass
    if not start:
        return f"got an empty one. {_AGAIN}"
    if start != b"\x89HDF\r\n\x1a\n":
        return f"got something else (it begins with {start!r}). Name a feature file"
    if "truncated" in str(error):
        return f"got a truncated one. {_AGAIN}"
    return f"got a damaged one ({_first_line(error)}). {_AGAIN}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().strip("'\"").splitlines()  # a KeyError quotes its key, which may be empty
    return lines[0][:160] if lines else type(error).__name__


# gzip packs at most 1032 bytes into one, the other filters of HDF5 less. Numbers that mean something don't pack so
# well: beyond what any file may take, their ratio is bounded too, and no chunk is larger than its dataset.
_MOST_PACKED = 1100
MOST_PACKED_NUMBERS = 32
ANY_FILE = 1 << 26  # bytes
_KINDS = {"O": "texts or references", "S": "texts", "b": "truth values", "c": "complex numbers", "V": "records"}


def read_dataset(file: h5py.File, name: str, *, kinds: str = "iuf") -> Array:
    """A top-level dataset as an array; errors as `find_dataset`."""
    return np.asarray(find_dataset(file, name, kinds=kinds)[()])


def find_dataset(file: h5py.File, name: str, *, kinds: str = "iuf") -> h5py.Dataset:
    """A top-level dataset of a file that `open_h5` gave, safe to read, of numpy's `kinds` of types; FeatureFileError
    where it is missing, of another type, or claims more than the file holds."""
    path = Path(file.filename)
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        held = ", ".join(sorted(file)[:10]) or "nothing"
        raise FeatureFileError(f"{path.name}: expected a dataset {name!r}, got {held}. Name a feature file.")
    if found.shape is None:
        raise FeatureFileError(f"{path.name}: its dataset {name!r} holds nothing. Make it again.")
    if found.dtype.kind not in kinds:
        what = _KINDS.get(found.dtype.kind, str(found.dtype))
        raise FeatureFileError(f"{path.name}: its dataset {name!r} holds {what} where numbers are expected.")
    size = found.dtype.itemsize * int(np.prod(found.shape, dtype=object))
    # Chunks that were never written cost nothing on disk and everything in memory.
    stored = path.stat().st_size if found.chunks is None else found.id.get_storage_size()
    packed = found.id.get_create_plist().get_nfilters() > 0
    if size > stored * (_MOST_PACKED if packed else 1):
        raise FeatureFileError(f"{path.name}: its dataset {name!r} is cut short. Make it again or fetch it anew.")
    chunk = 0 if found.chunks is None else found.dtype.itemsize * int(np.prod(found.chunks, dtype=object))
    if size > max(ANY_FILE, stored * MOST_PACKED_NUMBERS) or chunk > max(ANY_FILE, size):
        claimed = max(size, chunk)
        raise FeatureFileError(
            f"{path.name}: its dataset {name!r} of {stored:,} bytes claims {claimed:,} in memory. Make it again."
        )
    return found


# Kinds of attributes that are read. No tool needs others, and HDF5 crashes on damaged ones of variable length.
_READ_TYPES = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID, h5py.h5t.TypeStringID)
_MOST_ATTRS, _MOST_ATTR_BYTES = 1000, 1 << 20
# HDF5 reads every attribute whole to list their names. Of a file or dataset with more bytes of them than this, those
# that other tools' files are read by are asked for by name.
_MOST_LISTED_BYTES = 1 << 24
_NAMED = (
    *("patch_size_level0", "patch_size", "overlap", "level0_magnification", "target_magnification", "level0_width"),
    *("level0_height", "encoder", "name", "patch_level", "downsample", "level_dim", "mpp", "native_mpp", "step_size"),
    *("model_type", "stamp_version", "extractor", "unit", "tile_size", "tile_size_um", "tile_size_px", "feat_type"),
)


def read_attrs(item: Any) -> dict[str, Any]:
    """The attributes of a file or dataset as plain values: text as str, numbers as Python numbers, arrays as tuples;
    "None" as TRIDENT and we write it is None. Attributes of other kinds (compounds, references) and of more than a
    megabyte are left out."""
    attrs = item.attrs
    if len(attrs) > _MOST_ATTRS:
        raise FeatureFileError(f"{Path(item.file.filename).name}: it has {len(attrs):,} attributes. Make it again.")
    large = h5py.h5o.get_info(item.id).meta_size.attr.heap_size > _MOST_LISTED_BYTES
    names = [name for name in _NAMED if name in attrs] if large else list(attrs)
    held = ((name, attrs.get_id(name)) for name in names)
    return {_text(name): _value(one) for name, one in held if _is_readable(one)}


def read_attr(item: Any, name: str) -> Any:
    """One attribute as `read_attrs` has it, in a fraction of the time; None where there is none."""
    attrs = item.attrs
    return _value(held) if name in attrs and _is_readable(held := attrs.get_id(name)) else None


def _is_readable(held: h5py.h5a.AttrID) -> bool:
    kind = held.get_type()
    size = kind.get_size() * held.get_space().get_simple_extent_npoints()
    return isinstance(kind, _READ_TYPES) and size <= _MOST_ATTR_BYTES


def _value(held: h5py.h5a.AttrID) -> Any:
    """The value of an attribute; `attrs[name]` takes twice the time."""
    if held.get_space().get_simple_extent_type() == h5py.h5s.NULL:
        return None
    value = np.zeros(held.shape, held.dtype)
    held.read(value)
    return plain_value(value[()])


def plain_value(value: Any) -> Any:
    """A value read from an h5 attribute as plain Python."""
    if isinstance(value, str | bytes):
        value = _text(value)
    if isinstance(value, np.ndarray):
        return tuple(plain_value(item) for item in value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    return None if value == "None" else value


def _text(value: str | bytes) -> str:
    """Text without lone surrogates, by which h5py keeps bytes that are no UTF-8: nothing can write or draw them."""
    content = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return content.decode("utf-8", "replace")


def as_number(value: Any) -> float | None:
    """An attribute as a number: stored as one, as text, or as an array whose entries are all the same; else None."""
    if isinstance(value, tuple | list):
        found = {as_number(entry) for entry in value[:3]} if len(value) <= 2 else {None}
        return found.pop() if len(found) == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_pair(value: Any) -> tuple[float, float] | None:
    """An attribute as a positive measure (x, y): one or two numbers, in any form that `as_number` takes; else None."""
    sides = [as_number(entry) for entry in (value if isinstance(value, tuple | list) and len(value) == 2 else (value,))]
    x, y = sides[0], sides[-1]
    return (x, y) if x is not None and y is not None and min(x, y) > 0 else None


def name_in(attrs: Attrs, *names: str) -> str | None:
    """The first of some attributes that holds a text, as what something is called: not longer than a name may be."""
    found = (attrs.get(name) for name in names)
    return next((value[:100] for value in found if isinstance(value, str) and value), None)


def write_attrs(item: Any, attrs: Mapping[str, Any]) -> None:
    """Write attributes: None as "None", a dict as JSON, a tuple or list as an array; other objects are refused."""
    written = item.attrs
    for name, value in attrs.items():
        if value is None:
            stored: Any = "None"
        elif isinstance(value, Mapping):
            stored = json.dumps(dict(value), sort_keys=True)
        elif isinstance(value, list | tuple):
            stored = _array_value(name, value)
        elif isinstance(value, str | bool | int | float | np.ndarray | np.generic):
            stored = value
        else:
            raise ValueError(f"attribute {name}: expected text, numbers or a dict, got {type(value).__name__}.")
        written[name] = stored


def _array_value(name: str, value: list[Any] | tuple[Any, ...]) -> Any:
    if not value:
        return h5py.Empty("f8")
    if all(isinstance(entry, str) for entry in value):
        return np.array(value, dtype=h5py.string_dtype())
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"attribute {name}: expected all text or all numbers, got {value!r}.")
    return array


class _Disk(io.FileIO):
    """A file for h5py to write to. The first failed write is kept in `error`, everything after it is dropped."""

    error: OSError | None = None

    def write(self, block: Any) -> int:
        data, position, done = memoryview(block).cast("B"), self.tell(), 0
        while self.error is None and done < len(data):
            try:
                done += os.pwrite(self.fileno(), data[done:], position + done)
            except OSError as error:
                self.error = error
        self.seek(position + len(data))
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self.fileno(), size)
            except OSError as error:
                self.error = error
        return size


class H5Writer:
    """An h5 file being made: `with H5Writer(path) as writer`, fill `writer.file`, and it takes its name on exit;
    OutputError where the disk is full, read-only, ...

    `complete = True` is written at the root after everything else; then the file is flushed, opened again and its
    datasets compared with what was made, and renamed. On any error nothing of it is left, and a file that had the name
    before stays. `check` raises where the disk has failed since; call it after a large write. A checksum that is
    recorded under this name is withdrawn first: a kill before the new one is recorded leaves none, never a wrong one.
    """

    file: h5py.File

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __enter__(self) -> "H5Writer":
        self._temporary, self._descriptor = open_temporary(self.path)
        try:
            self._disk = _Disk(self._descriptor, "r+", closefd=False)
            self.file = h5py.File(self._disk, "w")
        except BaseException:
            self._release()
            raise
        return self

    def check(self) -> None:
        """Raise the disk's first error, if there was one."""
        if self._disk.error is not None:
            raise output_error(self.path, self._disk.error) from self._disk.error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is not None:
                with contextlib.suppress(OSError, RuntimeError):
                    self.file.close()
                self.check()  # whatever came after the disk's error came of it
                if isinstance(error, OSError) and is_write_error(error, self._temporary):
                    raise output_error(self.path, error) from error
                return
            made = {name: (dataset.shape, dataset.dtype) for name, dataset in self.file.items()}
            try:
                self.file.flush()
                self.file.attrs["complete"] = True
                self.file.close()
                self.check()
                os.fsync(self._descriptor)
                self._close_descriptor()
            except OutputError:
                raise
            except OSError as problem:
                raise output_error(self.path, problem) from problem
            self._verify(made)
            withdraw_sha256(self.path)
            publish(self._temporary, self.path)
        finally:
            self._release()

    def _verify(self, made: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        with open_h5(self._temporary) as file:
            found = {name: (dataset.shape, dataset.dtype) for name, dataset in file.items()}
            if found != made or not is_complete(file):
                raise FeatureFileError(f"{self.path.name}: what was written does not read back. Check the disk.")

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            self._close_descriptor()
        discard(self._temporary)


def is_complete(file: h5py.File) -> bool:
    """True where one of our files was finished."""
    return bool(read_attr(file, "complete"))


# The run that makes a file records its SHA-256 in the slide's status, `<id>.json` beside it; that of a piece of tissue,
# `<id>.section-N.h5`, stands in the same.
_SECTION = re.compile(r"\.section-\d+$")


def recorded_sha256(path: Path) -> str | None:
    """What the run that made a file recorded of its bytes; None for files of other tools and of versions that recorded
    nothing."""
    for place in dict.fromkeys((path, real_path(path))):
        held = _record_of(place)
        if held is not None:
            return str(held[1]["sha256"][place.name])
    return None


def is_damaged(path: Path) -> bool:
    """Whether a file's bytes are others than when it was made; reads it to its end where a checksum is recorded."""
    recorded = recorded_sha256(path)
    while recorded is not None and sha256_of(path) != recorded:
        before, recorded = recorded, recorded_sha256(path)
        if recorded == before:  # else a run has just made the file again
            return True
    return False


def check_undamaged(path: Path) -> None:
    """Raise FeatureFileError where a file's bytes are others than when it was made."""
    if path.is_file() and is_damaged(path):
        raise FeatureFileError(f"{path.name}: {DAMAGED} {REMAKE_DAMAGED}")


DAMAGED = "its bytes have changed since it was made: its SHA-256 is not the one that its run recorded."
REMAKE_DAMAGED = "Delete the file, and run the command that made it again."


def _record_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The status file that records a checksum of a file, and what it holds."""
    stem = path.name.removesuffix(path.suffix)
    for slide_id in dict.fromkeys((stem, _SECTION.sub("", stem))):
        record = path.with_name(f"{slide_id}.json")
        held = small_json(record)
        with contextlib.suppress(TypeError, LookupError):
            if isinstance(held["sha256"][path.name], str):
                return record, held
    return None


def withdraw_sha256(path: Path) -> None:
    """Forget the checksum of a file that is about to be replaced."""
    found = _record_of(path)
    if found is not None:
        record, held = found
        del held["sha256"][path.name]
        write_json_atomic(record, held)


# Where HDF5 trusts what it reads: text attributes lie in "global heap collections", and on a damaged one HDF5 loops
# for ever, which no `except` can catch. So its chain of objects is walked here first (HDF5 File Format Specification,
# section III.E): `GCOL`, version 1, three zero bytes, the collection's size (8 bytes), then objects of index (2),
# references (2), zeros (4), size (8) and data padded to 8 bytes; index 0 is free space, its size with header.
_SIGNATURE = b"GCOL\x01\0\0\0"
_HEADER = 16
_PIECE = 1 << 20


def heaps_are_sound(path: Path, datasets: Sequence[h5py.h5d.DatasetID]) -> bool:
    """True where every global heap collection of an open file can be walked to its end.

    The stored numbers of contiguous datasets are skipped, so our own files cost a few kB of reading.
    """
    size = path.stat().st_size
    with path.open("rb") as raw:
        for start, stop in _gaps(_contiguous(datasets, size), size):
            for position in _find(raw, start, stop):
                if not _walk(raw, position, size):
                    return False
    return True


def _contiguous(datasets: Sequence[h5py.h5d.DatasetID], size: int) -> list[tuple[int, int]]:
    """Where the numbers of contiguous datasets lie: (first byte, byte after the last); a place that can't be is left
    out, and so searched."""
    spans = []
    for item in datasets:
        start, held = item.get_offset(), item.get_storage_size()  # chunks have no place of their own
        claimed = item.get_space().get_simple_extent_npoints() * item.get_type().get_size()
        if start is not None and held == claimed and start + held <= size:
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
