"""Embeddings of tiles: a table of one matrix with a name for each row, and what the container itself says of splits and
labels; read from a file, or from a zip or a folder of one `.pt` per tile.

On disk a table is an h5 file (`write_table`), which `embed-tiles` makes and which the cache of a zip is; `.npz` and
`.safetensors` of the same entries are read too. Of a zip nothing is unpacked to disk, and no code is run.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from gigapath.evaluation.labels import first_twice
from gigapath.features.h5 import H5Writer, is_complete, open_h5, read_attrs, write_attrs
from gigapath.files import OutputError, real_path
from gigapath.machine import available_cores
from gigapath.progress import Progress
from gigapath.read_ahead import read_ahead

TRAIN, VALIDATION, TEST = "train", "val", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
STAGE = "embedding table"
CHECKED_ROWS = 4096  # rows that share one checksum
_COLUMNS = ("splits", "labels", "groups")
_SUFFIX = re.compile(r"\.(pt|pth|png|jpe?g|tiff?|bmp|webp)$", re.IGNORECASE)

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingTable:
    """N embeddings of width D.

    Args:
        names: N names: paths inside the container with `/`, without the file's suffix; unique.
        features: (N, D) float32, finite.
        splits: N of `SPLITS` or "" where the container says nothing.
        labels: N labels as text, or None.
        groups: N patients or slides as text, or None.
        colours: (N, 6) mean and standard deviation of R, G, B in [0, 255] of the tile's pixels, or None.
    """

    names: tuple[str, ...]
    features: Float32Array
    splits: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    colours: Float32Array | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def split_of_path(name: str) -> str:
    """The split that a path names in one of its own folders ("a/valid/x.pt" -> "val"), "" where none does.

    Only whole parts count, and never the file's own name: "training_data/test/x.pt" is test.
    """
    found = {SPLIT_WORDS[part] for part in name.lower().split("/")[:-1] if part in SPLIT_WORDS}
    if len(found) > 1:
        raise ValueError(f"{name}: its path names several splits ({', '.join(sorted(found))}). Keep one.")
    return found.pop() if found else ""


def split_of_word(word: str, where: str) -> str:
    """The split that a word of a CSV means."""
    split = SPLIT_WORDS.get(word.strip().lower())
    if split is None:
        raise ValueError(f"{where}: expected a split (train, val or valid or validation, test), got {word!r}.")
    return split


def bare_name(path: str) -> str:
    """A tile's name: its path with `/` and without leading `./` and the suffix of a tensor or image file."""
    path = path.strip().replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return _SUFFIX.sub("", path.lstrip("/"))


def check_finite(features: Float32Array, names: Sequence[str], source: str) -> None:
    """Raise ValueError that names the first row which holds NaN or infinity."""
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        rows = np.flatnonzero(bad)
        raise ValueError(
            f"{source}: {len(rows):,} of {len(names):,} embeddings hold NaN or infinity, the first is "
            f"{names[rows[0]]}. Embed these tiles again."
        )


def write_table(path: Path | str, table: EmbeddingTable) -> None:
    """Write a table as one h5 file with checksums, whole or not at all."""
    with H5Writer(path) as writer:
        file = writer.file
        file.create_dataset("features", data=table.features)
        file.create_dataset("checksums", data=np.array(_checksums(table.features), dtype=np.uint32))
        file.create_dataset("names", data=_as_bytes(table.names))
        for column in _COLUMNS:
            values = getattr(table, column)
            if values is not None:
                file.create_dataset(column, data=_as_bytes(values))
        if table.colours is not None:
            file.create_dataset("colours", data=table.colours)
        write_attrs(file, {**table.attrs, "stage": STAGE})


def read_table(path: Path | str) -> EmbeddingTable:
    """Read a table from an `.h5`, `.npz` or `.safetensors` file of `features` (N, D) and `names` (N,).

    `splits`, `labels`, `groups` and `colours` are taken where they are there. In `.safetensors`, which holds no text,
    names and the like are JSON lists in the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, NaN, names that repeat.
    """
    path = Path(path)
    readers = {".h5": _read_h5, ".hdf5": _read_h5, ".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path.name}: expected a .zip, a folder, .h5, .npz or .safetensors, got {path.suffix!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return _table_from(reader(path), path.name)


def _table_from(entries: dict[str, Any], source: str) -> EmbeddingTable:
    for name in ("features", "names"):
        if entries.get(name) is None:
            raise ValueError(f"{source}: expected entries 'features' and 'names', got no {name!r}.")
    features = np.asarray(entries["features"])
    if features.ndim != 2 or features.dtype.kind != "f" or features.shape[1] == 0:
        raise ValueError(
            f"{source}: expected features of shape (N, D) as real numbers, got {features.shape} {features.dtype}."
        )
    features = np.ascontiguousarray(features, dtype=np.float32)
    columns = {name: None if entries.get(name) is None else _as_text(entries[name]) for name in ("names", *_COLUMNS)}
    colours = entries.get("colours")
    for name, values in (*columns.items(), ("colours", colours)):
        if values is not None and len(values) != len(features):
            raise ValueError(f"{source}: expected {len(features)} entries in {name!r}, got {len(values)}.")
    raw_names = columns["names"] or ()
    names = tuple(map(bare_name, raw_names))
    check_unique(names, source)
    check_finite(features, names, source)
    splits = columns["splits"]
    if splits is None:
        known = tuple(split_of_path(name) for name in names)
    else:
        known = tuple(word and split_of_word(word, source) for word in splits)
    return EmbeddingTable(
        names=names,
        features=features,
        splits=known,
        labels=columns["labels"],
        groups=columns["groups"],
        colours=None if colours is None else np.asarray(colours, dtype=np.float32),
        attrs=entries.get("attrs", {}),
    )


def check_unique(names: Sequence[str], source: str) -> None:
    """Raise ValueError that names the first name which occurs twice."""
    if (twice := first_twice(names)) is not None:
        raise ValueError(f"{source}: two embeddings are named {twice}. Give each tile one name.")


def _read_h5(path: Path) -> dict[str, Any]:
    with open_h5(path) as file:
        attrs = read_attrs(file)
        if attrs.get("stage") == STAGE and not is_complete(file):
            raise ValueError(f"{path.name}: it was never finished. Make it again.")
        entries: dict[str, Any] = {
            name: file[name][()] for name in ("names", *_COLUMNS, "colours") if isinstance(file.get(name), h5py.Dataset)
        }
        features = file.get("features")
        if not isinstance(features, h5py.Dataset):
            return entries
        entries["features"] = _read_matrix(path, features)
        checksums = file.get("checksums")
        if isinstance(checksums, h5py.Dataset) and list(checksums[()]) != _checksums(entries["features"]):
            raise ValueError(f"{path.name}: its embeddings are damaged (checksum). Make it again.")
        entries["attrs"] = {name: value for name, value in attrs.items() if name not in ("stage", "complete")}
        return entries


def _read_matrix(path: Path, dataset: h5py.Dataset) -> Any:
    """A dataset as an array; a contiguous one in pieces by several threads, which HDF5 itself can't."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.ndim != 2 or dataset.dtype != np.dtype("<f4") or not len(dataset):
        return dataset[()]
    matrix = np.empty(dataset.shape, dtype=np.float32)
    row_bytes = matrix.shape[1] * 4

    def read_rows(start: int) -> None:
        block = matrix[start : start + CHECKED_ROWS].data.cast("B")
        done = 0
        while done < len(block):
            got = os.preadv(file.fileno(), [block[done:]], offset + start * row_bytes + done)
            if got == 0:
                raise ValueError(f"{path.name}: is cut short. Make it again.")
            done += got

    with path.open("rb") as file, ThreadPoolExecutor(worker_count()) as pool:
        list(pool.map(read_rows, range(0, len(matrix), CHECKED_ROWS)))
    return matrix


def _checksums(features: Float32Array) -> list[int]:
    """CRC-32 of each `CHECKED_ROWS` rows."""
    with ThreadPoolExecutor(worker_count()) as pool:
        starts = range(0, len(features), CHECKED_ROWS)
        return list(pool.map(lambda start: zlib.crc32(features[start : start + CHECKED_ROWS].data), starts))


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("features", "names", *_COLUMNS, "colours") if name in archive}
    except Exception as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path.name}: holds Python objects, which are not loaded since they could run code. "
                "Save names as text: np.array(names, dtype=str)."
            ) from error
        raise ValueError(f"{path.name}: can't be read as an .npz file. Fetch or make it anew.") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            entries: dict[str, Any] = {
                name: file.get_tensor(name) for name in ("features", "colours") if name in set(file.keys())
            }
            metadata = file.metadata() or {}
            for name in ("names", *_COLUMNS):
                with contextlib.suppress(KeyError):
                    entries[name] = json.loads(metadata[name])
    except Exception as error:
        raise ValueError(f"{path.name}: can't be read as a .safetensors file. Fetch or make it anew.") from error
    return entries


def worker_count() -> int:
    """Threads for reading."""
    return min(8, available_cores())


def _as_bytes(values: Sequence[str]) -> npt.NDArray[np.bytes_]:
    encoded = [value.encode("utf-8") for value in values]
    return np.array(encoded, dtype=f"S{max(1, max(map(len, encoded), default=1))}")


def _as_text(values: Any) -> tuple[str, ...]:
    return tuple(value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in list(values))


CACHE_SUFFIX = ".cache.h5"
CACHE_VERSION = 1  # raised when the cache's content changes for the same zip
MOST_BYTES = 1 << 28  # a member larger than this holds neither a vector nor a tile
_ENTRY_BYTES = 46  # of a member in a zip's table, without its name, extra field and comment
_LOCAL_HEADER = 30  # bytes ahead of a member; the lengths of its name and of its extra field are the last four
_END_BYTES = 22  # of a zip's end record, without its comment
_BUFFER_BYTES = 4 << 20  # of the zip, read at once
_NUMPY_TYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8"}
# What zipfile raises for a file that is no zip, damaged, encrypted or packed in a way that it does not know.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError),
    *(ValueError, RuntimeError, NotImplementedError, OverflowError),
)

log = logging.getLogger(__name__)


class ZipFiles:
    """The members of a zip that `accept` takes by their names.

    Attributes:
        names: in the order of the zip's table.
    """

    def __init__(self, path: Path, accept: Callable[[str], bool]) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
        try:
            self._zip = zipfile.ZipFile(path)
            with path.open("rb") as file:
                # A zip that is cut short may end in a member that is a zip itself, which zipfile takes for the whole.
                file.seek(-_END_BYTES - len(self._zip.comment), os.SEEK_END)
                if file.read(4) != b"PK\x05\x06":
                    raise ValueError("it is cut short")
            # A table whose places are off by what is missing ahead of it: zipfile takes them as they are.
            if min((member.header_offset for member in self._zip.infolist()), default=self._zip.start_dir) < 0:
                raise ValueError("its table points ahead of its start")
        except _ZIP_ERRORS as error:
            raise ValueError(f"{path.name}: {_reason(error)}, so it is no whole zip. Fetch it anew.") from None
        self._members = [member for member in self._zip.infolist() if accept(member.filename)]
        self.names = [member.filename for member in self._members]
        for member in self._members:
            if member.file_size > MOST_BYTES:
                raise ValueError(f"{path.name}: {member.filename} claims {member.file_size:,} bytes. Fetch it anew.")

    def identity(self) -> str:
        """Size, time of change and the table of members, which holds every member's name, size and CRC-32."""
        status = self.path.stat()
        size = sum(
            _ENTRY_BYTES + len(member.extra) + len(member.comment)
            + len(member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437"))
            for member in self._zip.infolist()
        )  # fmt: skip
        with self.path.open("rb") as file:
            file.seek(self._zip.start_dir)
            table = file.read(size)
        return f"zip {status.st_size} {status.st_mtime_ns} {hashlib.sha256(table).hexdigest()}"

    def read(self, index: int) -> bytes:
        """A member's bytes, unpacked and checked."""
        member = self._members[index]
        try:
            return self._zip.read(member)
        except _ZIP_ERRORS as error:
            raise ValueError(
                f"{self.path.name}: {member.filename} is damaged or packed otherwise ({_reason(error)}). Fetch it anew."
            ) from None

    def read_all(self) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of every member, in the order in which they lie: as the zip's table has their places, sizes
        and CRC-32; what is packed, or is not what the table says, by zipfile."""
        order = sorted(range(len(self._members)), key=lambda index: self._members[index].header_offset)
        with self.path.open("rb", buffering=_BUFFER_BYTES) as file:
            for index in order:
                member = self._members[index]
                if member.compress_type != zipfile.ZIP_STORED:
                    yield index, self.read(index)
                    continue
                file.seek(member.header_offset)
                header = file.read(_LOCAL_HEADER)
                file.seek(sum(_lengths(header)), 1)
                content = file.read(member.file_size)
                whole = header[:4] == b"PK\x03\x04" and len(content) == member.file_size
                yield index, content if whole and zlib.crc32(content) == member.CRC else self.read(index)


class FolderFiles:
    """The files of a folder, and of the folders below it, that `accept` takes by their paths; `names` are these."""

    def __init__(self, path: Path, accept: Callable[[str], bool]) -> None:
        self.path = path
        self._entries = sorted(_walk(path, "", accept, {real_path(path)}))
        self.names = [name for name, _, _ in self._entries]

    def identity(self) -> str:
        """Names, sizes and times of change of all files."""
        listed = "\n".join(f"{name}\t{size}\t{changed}" for name, size, changed in self._entries)
        return f"folder {len(self._entries)} {hashlib.sha256(listed.encode()).hexdigest()}"

    def read(self, index: int) -> bytes:
        """A file's bytes."""
        try:
            return (self.path / self.names[index]).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.names[index]}: expected a readable file, got {error.strerror!r}.") from error

    def read_all(self) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of every file, read by threads: on a network's disk the wait for each adds up."""
        return read_ahead(lambda index: (index, self.read(index)), range(len(self.names)), threads=worker_count())


Files = ZipFiles | FolderFiles


def visible(name: str) -> bool:
    """Whether a path is neither hidden nor a Mac's shadow of a file."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def read_embeddings(
    path: Path | str, *, cache: bool = True, watch: Progress | None = None
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Read the embeddings of tiles, ordered by split and name whatever they come in.

    Args:
        path: a zip or folder of `.pt` vectors, or an `.h5`, `.npz`, `.safetensors` of `features` and `names`.
        cache: for a zip or folder, use and write `<path>.cache.h5` beside it.
        watch: receives the news of the reading.

    Returns:
        the table, and how it was read: {"identity": ..., "read_from": "files" | "cache"}.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a damaged container, a file that holds code, NaN, vectors of different widths.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".zip":
        kind = FolderFiles if path.is_dir() else ZipFiles
        files = kind(path, lambda name: name.endswith(".pt") and visible(name))
    else:
        table = read_table(path)
        order = sorted(range(len(table)), key=lambda row: (table.splits[row], table.names[row]))
        identity = f"file {path.stat().st_size} {path.stat().st_mtime_ns}"
        return _reordered(table, order), {"identity": identity, "read_from": "files"}
    identity = files.identity()
    cache_path = path.with_name(path.name + CACHE_SUFFIX)
    if cache:
        cached = _read_cache(cache_path, identity)
        if cached is not None:
            return cached, {"identity": identity, "read_from": "cache"}
    table = _read_all(files, path.name, watch or Progress())
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


def _read_all(files: Files, where: str, watch: Progress) -> EmbeddingTable:
    if not files.names:
        raise ValueError(f"{where}: expected .pt files, got none. Name the zip or folder of tile embeddings.")
    names = [bare_name(name) for name in files.names]
    splits = [split_of_path(name) for name in files.names]
    check_unique(names, where)
    order = sorted(range(len(names)), key=lambda index: (splits[index], names[index]))
    row_of_file = np.empty(len(names), dtype=np.int64)
    row_of_file[order] = np.arange(len(names))

    features = np.empty((0, 0), dtype=np.float32)
    vectors = VectorReader()
    first = ""
    for done, (index, content) in enumerate(files.read_all(), start=1):
        vector = vectors.read(content, files.names[index])
        if done == 1:
            features = np.empty((len(names), len(vector)), dtype=np.float32)
            first = files.names[index]
        elif len(vector) != features.shape[1]:
            raise ValueError(
                f"{files.names[index]}: expected a vector of width {features.shape[1]} like {first}, "
                f"got {len(vector)}. Keep the embeddings of one encoder together."
            )
        features[row_of_file[index]] = vector
        if done % 1024 == 0 or done == len(names):
            watch.step("tiles read", done, len(names))
    ordered = tuple(names[index] for index in order)
    check_finite(features, ordered, where)
    return EmbeddingTable(ordered, features, tuple(splits[index] for index in order))


def _lengths(header: bytes) -> tuple[int, int]:
    """Lengths of a member's name and extra field, from its local header."""
    return int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")


class Layout(NamedTuple):
    """Where files keep their vector, and the bytes that those of one layout have in common.

    A `.pt` is a small zip of a pickle, which describes the tensor, and the tensor's bytes. Files of one size whose end
    record (number of members, place of their table), pickle and byte order are equal, and that have the header of the
    tensor's bytes in one place, hold a tensor of one type and size there.
    """

    common: tuple[tuple[slice, bytes], ...]
    dtype: str
    entries: int
    offset: int

    def read(self, content: bytes) -> npt.NDArray[np.float32] | None:
        """The vector (D,) in a file of this layout, None for a file of another one."""
        if any(content[place] != value for place, value in self.common):
            return None
        return np.frombuffer(content, self.dtype, self.entries, self.offset).astype(np.float32)


def _layout_of(content: bytes, tensor: torch.Tensor) -> Layout | None:
    """The layout of a file that torch read as this vector; None where the bytes do not lie side by side, in a type that
    NumPy has, or where they give anything but torch's vector."""
    if tensor.dtype not in _NUMPY_TYPES or not tensor.is_contiguous():
        return None
    try:
        members = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except zipfile.BadZipFile:  # torch's older format
        return None
    places = [slice(len(content) - _END_BYTES, None)]
    starts = []
    for member in members:
        kind, at = member.filename.partition("/")[2], member.header_offset
        name, extra = _lengths(content[at : at + _LOCAL_HEADER])
        name_end = at + _LOCAL_HEADER + name
        start = name_end + extra
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        if kind in ("data.pkl", "byteorder"):
            places.append(slice(start, start + member.file_size))
        elif kind.startswith("data/"):
            places += [slice(at, at + 4), slice(name_end - len(kind) - 1, name_end)]
            places.append(slice(at + _LOCAL_HEADER - 4, at + _LOCAL_HEADER))
            starts.append(start)
    if len(starts) != 1:
        return None
    offset = starts[0] + int(tensor.storage_offset()) * tensor.element_size()
    common = tuple((place, content[place]) for place in places)
    layout = Layout(common, _NUMPY_TYPES[tensor.dtype], tensor.numel(), offset)
    found = layout.read(content)
    same = found is not None and np.array_equal(found, tensor.flatten().to(torch.float32).numpy(), equal_nan=True)
    return layout if same else None


class VectorReader:
    """Reads one vector per file: by torch's restricted reader where the file is laid out like none before."""

    def __init__(self) -> None:
        self._layouts: dict[int, list[Layout]] = {}  # by the size of the file

    def read(self, content: bytes, name: str) -> npt.NDArray[np.float32]:
        """The vector (D,) in a `.pt` file.

        Raises:
            ValueError: no `.pt` file, one that holds code or anything but one vector of real numbers.
        """
        for layout in self._layouts.get(len(content), ()):
            vector = layout.read(content)
            if vector is not None:
                return vector
        tensor = _load(content, name)
        found = _layout_of(content, tensor)
        if found is not None:
            self._layouts.setdefault(len(content), []).append(found)
        return np.asarray(tensor.flatten().to(torch.float32).numpy())


def _load(content: bytes, name: str) -> torch.Tensor:
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


def _reason(error: BaseException) -> str:
    """What zipfile says of a file, on one line, without the file's own words where they are long."""
    return " ".join(str(error).split())[:100] or type(error).__name__


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


def _reordered(table: EmbeddingTable, order: list[int]) -> EmbeddingTable:
    """The rows in another order; where it is the one they have, nothing is copied."""
    if order == list(range(len(order))):
        return table

    columns = {name: getattr(table, name) for name in ("names", "splits", "labels", "groups")}
    texts: dict[str, Any] = {name: values and tuple(values[row] for row in order) for name, values in columns.items()}
    colours = None if table.colours is None else table.colours[order]
    return replace(table, features=table.features[order], colours=colours, **texts)
