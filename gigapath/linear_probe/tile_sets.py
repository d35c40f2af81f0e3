"""Labelled tile images as data sets ship them: folders by split and class, a zip with a CSV, PCam's own HDF5 files.

Legend: T pixels of a tile's side.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from gigapath.features.h5 import open_h5
from gigapath.linear_probe.archive import Files, FolderFiles, ZipFiles, visible
from gigapath.linear_probe.labels import LabelRows, join_labels, rows_of_table
from gigapath.linear_probe.pcam import read_meta
from gigapath.linear_probe.table import SPLIT_WORDS, bare_name, check_unique, split_of_path
from gigapath.tables import parse_table

IMAGES = re.compile(r"\.(png|jpe?g|tiff?|bmp|webp)$", re.IGNORECASE)
# The HDF5 files of PatchCamelyon under the names that torchvision keeps; the tiles are in `x`, the labels in `y`.
_PCAM = re.compile(r"camelyonpatch_level_2_split_(train|valid|test)_x\.h5")

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TileSet:
    """M tiles, ordered by split and name.

    Args:
        names: unique, without suffix.
        splits: "train", "val", "test" or "" where nothing says it.
        labels: as text, or None where nothing says them.
        groups: slides or patients as text, or None.
        group_column: what the groups are called, or None.
        read: positions in `names` -> their pixels, uint8 RGB (T, T, 3) each.
        identity: changes when the tiles do.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...] | None
    groups: tuple[str, ...] | None
    group_column: str | None
    read: Callable[[Sequence[int]], list[Pixels]]
    identity: str

    def __len__(self) -> int:
        return len(self.names)


def open_tile_set(path: Path | str) -> TileSet:
    """Find the tiles of a folder, a zip or PCam's HDF5 files, with what is said of their splits, labels and slides.

    A CSV among the tiles (columns `file` or `input`, `label`, `split`, maybe a group) goes before the folders' names;
    without one a tile's class is the folder it lies in.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no tiles in it, or a CSV that does not fit.
    """
    path = Path(path)
    if path.suffix.lower() in (".h5", ".hdf5"):
        return _pcam([path])
    if path.is_dir():
        files = sorted(path.glob("*.h5")) or sorted((path / "pcam").glob("*.h5"))
        if any(_PCAM.fullmatch(file.name) for file in files):
            return _pcam([file for file in files if _PCAM.fullmatch(file.name)])
        return _images(FolderFiles(path, _is_tile_or_csv), path.name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.suffix.lower() != ".zip":
        raise ValueError(f"{path.name}: expected a folder, a .zip or PCam's .h5 files of tiles, got {path.suffix!r}.")
    return _images(ZipFiles(path, _is_tile_or_csv), path.name)


def _is_tile_or_csv(name: str) -> bool:
    return visible(name) and (IMAGES.search(name) is not None or name.lower().endswith(".csv"))


def _images(files: Files, where: str) -> TileSet:
    members = files.names
    images = [index for index, member in enumerate(members) if IMAGES.search(member)]
    tables = [index for index, member in enumerate(members) if not IMAGES.search(member)]
    if not images:
        raise ValueError(f"{where}: expected tile images (png, jpg, tif), got none.")
    if len(tables) > 1:
        found = ", ".join(members[index] for index in tables[:3])
        raise ValueError(f"{where}: expected at most one CSV beside the tiles, got {found}. Keep one.")
    names = [bare_name(members[index]) for index in images]
    check_unique(names, where)
    splits = [split_of_path(members[index]) for index in images]
    groups: list[str] | None = None
    group_column: str | None = None
    if tables:
        table = parse_table(files.read(tables[0]), members[tables[0]])
        listed = rows_of_table(table, label="label", split=None, group=None)
        labels, splits, groups = _from_csv(listed, names, splits)
        group_column = listed.group_column
    else:
        folders = [PurePosixPath(members[index]).parent.name for index in images]
        labels = ["" if folder.lower() in SPLIT_WORDS else folder for folder in folders]
    order = sorted(range(len(images)), key=lambda row: (splits[row], names[row]))

    def read(rows: Sequence[int]) -> list[Pixels]:
        indices = [images[order[row]] for row in rows]
        return [_decode(files.read(index), members[index]) for index in indices]

    return TileSet(
        names=tuple(names[row] for row in order),
        splits=tuple(splits[row] for row in order),
        labels=tuple(labels[row] for row in order) if any(labels) else None,
        groups=None if groups is None else tuple(groups[row] for row in order),
        group_column=group_column,
        read=read,
        identity=files.identity(),
    )


def _from_csv(listed: LabelRows, names: list[str], splits: list[str]) -> tuple[list[str], list[str], list[str] | None]:
    """Labels, splits and groups of the tiles, "" for tiles without a row; a row without a tile is an error."""
    joined = join_labels(names, splits, listed, allow_missing=True, noun="tile")
    if joined.unembedded:
        raise ValueError(
            f"{listed.source}: {len(joined.unembedded):,} of its rows have no tile, the first is "
            f"{joined.unembedded[0]}. Complete the tiles, or leave the rows out."
        )
    labels, groups, splits = [""] * len(names), [""] * len(names), list(splits)
    for row, index, split in zip(joined.rows, joined.used, joined.splits, strict=True):
        labels[row], splits[row] = listed.labels[index], split
        groups[row] = listed.groups[index] if listed.groups else ""
    return labels, splits, groups if listed.groups else None


def _decode(content: bytes, name: str) -> Pixels:
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: can't be read as an image. Fetch or make it anew.") from error
    if pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"{name}: expected a square tile, got {pixels.shape[1]} x {pixels.shape[0]}. Cut it first.")
    return pixels


def _pcam(paths: list[Path]) -> TileSet:
    """PCam's HDF5 files: `..._x.h5` with the pixels, `..._y.h5` with the labels and `..._meta.csv` with the slides."""
    names: list[str] = []
    splits: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    where: list[tuple[Path, int]] = []
    for path in paths:
        match = _PCAM.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"{path.name}: expected PCam's own name camelyonpatch_level_2_split_(train|valid|test)_x.h5. "
                "Give the folder or the file as torchvision keeps it."
            )
        with open_h5(path) as file:
            pixels = file.get("x")
            if not isinstance(pixels, h5py.Dataset) or pixels.ndim != 4 or pixels.dtype != np.uint8:
                raise ValueError(f"{path.name}: expected a dataset x of uint8 tiles (N, T, T, 3).")
            count = len(pixels)
        with open_h5(path.with_name(path.name.replace("_x.h5", "_y.h5"))) as file:
            truth = np.asarray(file["y"][()]).reshape(-1)
        if len(truth) != count:
            raise ValueError(f"{path.name}: expected {count} labels beside it, got {len(truth)}. Fetch both anew.")
        names += [f"{match[1]}/{match[1]}_{row:06d}" for row in range(count)]
        splits += [SPLIT_WORDS[match[1]]] * count
        labels += [str(int(value)) for value in truth]
        groups += _pcam_slides(path, count)
        where += [(path, row) for row in range(count)]
    order = sorted(range(len(names)), key=lambda row: (splits[row], names[row]))

    def read(rows: Sequence[int]) -> list[Pixels]:
        wanted: dict[Path, list[int]] = {}
        for row in rows:
            path, index = where[order[row]]
            wanted.setdefault(path, []).append(index)
        found: dict[tuple[Path, int], Pixels] = {}
        for path, indices in wanted.items():
            start, end = min(indices), max(indices) + 1  # neighbours, when tiles are asked for in order
            with open_h5(path) as file:
                block = np.asarray(file["x"][start:end])
            found.update({(path, index): block[index - start] for index in indices})
        return [found[where[order[row]]] for row in rows]

    return TileSet(
        names=tuple(names[row] for row in order),
        splits=tuple(splits[row] for row in order),
        labels=tuple(labels[row] for row in order),
        groups=tuple(groups[row] for row in order) if all(groups) else None,
        group_column="wsi" if all(groups) else None,
        read=read,
        identity=" ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths),
    )


def _pcam_slides(path: Path, count: int) -> list[str]:
    """The slide of each tile from PCam's meta file, "" where it is not there."""
    meta = path.with_name(path.name.replace("_x.h5", "_meta.csv"))
    if not meta.is_file():
        return [""] * count
    slides, _ = read_meta(meta)
    if len(slides) != count:
        raise ValueError(f"{meta.name}: expected {count} rows as {path.name} has tiles, got {len(slides)}.")
    return slides
