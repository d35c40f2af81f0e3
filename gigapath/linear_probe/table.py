"""A table of embeddings: one matrix, a name for each row, and what the container itself says of splits and labels.

On disk it is an h5 file (`write_table`), which `embed-tiles` makes and which the cache of a zip is; `.npz` and
`.safetensors` of the same entries are read too.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from gigapath.features.h5 import H5Writer, is_complete, open_h5, read_attrs, write_attrs

TRAIN, VALIDATION, TEST = "train", "val", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
SPLIT_WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
    "testing": TEST,
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
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        ".h5": _read_h5,
        ".hdf5": _read_h5,
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
    }
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
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
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
    """Threads for reading: the processors that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _as_bytes(values: Sequence[str]) -> npt.NDArray[np.bytes_]:
    encoded = [value.encode("utf-8") for value in values]
    return np.array(encoded, dtype=f"S{max(1, max(map(len, encoded), default=1))}")


def _as_text(values: Any) -> tuple[str, ...]:
    return tuple(value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in list(values))
