"""Labelled tile images, as data sets ship them, through a tile encoder into one table of embeddings: folders by split
and class, a zip with a CSV, PCam's own HDF5 files. A run that was cut off goes on where it was.

Legend: M tiles, D width, B tiles of a batch, T pixels of a tile's side.
"""

import contextlib
import io
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from gigapath.cohort.stage import Ownership, check_same, digest
from gigapath.devices import device_identity
from gigapath.features import NUMERICS_VERSION, FeatureFileError
from gigapath.features.gigapath_file import KeptRows
from gigapath.features.h5 import is_complete, open_h5, read_attrs
from gigapath.linear_probe.data import LabelRows, join_labels, read_meta, rows_of_table
from gigapath.linear_probe.embeddings import (
    SPLIT_WORDS,
    EmbeddingTable,
    Files,
    Float32Array,
    FolderFiles,
    ZipFiles,
    bare_name,
    check_unique,
    split_of_path,
    visible,
    worker_count,
    write_table,
)
from gigapath.progress import Progress
from gigapath.read_ahead import read_ahead
from gigapath.tables import parse_table
from gigapath.tile_encoder import TileEncoder

IMAGES = re.compile(r"\.(png|jpe?g|tiff?|bmp|webp)$", re.IGNORECASE)
# The HDF5 files of PatchCamelyon under the names that torchvision keeps; the tiles are in `x`, the labels in `y`.
_PCAM = re.compile(r"camelyonpatch_level_2_split_(train|valid|test)_x\.h5")
COLOURS = 6
FLUSH_EVERY = 16  # batches

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

    def read(rows: Sequence[int]) -> list[Pixels]:
        return [_decode(files.read(images[row]), members[images[row]]) for row in rows]

    return _ordered(names, splits, labels if any(labels) else None, groups, group_column, read, files.identity())


def _ordered(
    names: Sequence[str],
    splits: Sequence[str],
    labels: Sequence[str] | None,
    groups: Sequence[str] | None,
    group_column: str | None,
    read: Callable[[Sequence[int]], list[Pixels]],
    identity: str,
) -> TileSet:
    """Tiles as they were found, in order of split and name."""
    order = sorted(range(len(names)), key=lambda row: (splits[row], names[row]))

    def ordered(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[row] for row in order)

    return TileSet(
        ordered(names),
        ordered(splits),
        None if labels is None else ordered(labels),
        None if groups is None else ordered(groups),
        group_column,
        lambda rows: read([order[row] for row in rows]),
        identity,
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

    def read(rows: Sequence[int]) -> list[Pixels]:
        wanted: dict[Path, list[int]] = {}
        for row in rows:
            path, index = where[row]
            wanted.setdefault(path, []).append(index)
        found: dict[tuple[Path, int], Pixels] = {}
        for path, indices in wanted.items():
            start, end = min(indices), max(indices) + 1  # neighbours, when tiles are asked for in order
            with open_h5(path) as file:
                block = np.asarray(file["x"][start:end])
            found.update({(path, index): block[index - start] for index in indices})
        return [found[where[row]] for row in rows]

    identity = " ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
    known = all(groups)
    return _ordered(names, splits, labels, groups if known else None, "wsi" if known else None, read, identity)


def _pcam_slides(path: Path, count: int) -> list[str]:
    """The slide of each tile from PCam's meta file, "" where it is not there."""
    meta = path.with_name(path.name.replace("_x.h5", "_meta.csv"))
    if not meta.is_file():
        return [""] * count
    slides, _ = read_meta(meta)
    if len(slides) != count:
        raise ValueError(f"{meta.name}: expected {count} rows as {path.name} has tiles, got {len(slides)}.")
    return slides


def embed_tiles(
    tiles: TileSet,
    encoder: TileEncoder,
    out: Path | str,
    *,
    batch_size: int = 64,
    overwrite: bool = False,
    watch: Progress | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> int:
    """Embed every tile of a set and write one table with names, splits, labels and colour statistics.

    The encoder sees full batches of one shape (the last is padded and cut), in one order, so that a run in pieces
    gives the bytes of a run in one piece.

    Args:
        out: the table's file, ending in `.h5`. Beside it lies `<out>.rows.partial` until the table is whole.
        overwrite: embed again where the table is there already; it stays until the new one is whole.
        watch: receives the news.
        check_stop: called before each batch; what it raises ends the run, which can be continued.

    Returns:
        the number of tiles that were taken over from a run before.

    Raises:
        FolderTaken: another run makes this table with other options.
        ValueError: the table is there, of other tiles or options; tiles of different sizes, unreadable ones, vectors
            that are not finite.
    """
    out = Path(out)
    attrs = {
        "tiles": tiles.identity,
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256 or "none",
        "trained": encoder.trained,
        "transform": encoder.transform_name,
        "precision": encoder.precision,
        "device": device_identity(encoder.device),
        "batch_size": batch_size,
        "numerics_version": NUMERICS_VERSION,
    }
    with Ownership({out.with_name(f".{out.name}.runs"): attrs}):
        if not overwrite and made_before(out, attrs):
            return len(tiles)
        return _embed(tiles, encoder, out, attrs, batch_size, watch or Progress(), check_stop)


def made_before(out: Path, attrs: Mapping[str, Any]) -> bool:
    """Whether the table is there, whole and made in this way.

    Raises:
        ValueError: it was made of other tiles or with other options.
    """
    try:
        with open_h5(out) as file:
            found = read_attrs(file) if is_complete(file) else {}
    except (FeatureFileError, OSError):  # none, or a damaged one
        return False
    if found:
        check_same(out.name, {name: found.get(name) for name in attrs}, attrs)
    return bool(found)


def _embed(
    tiles: TileSet,
    encoder: TileEncoder,
    out: Path,
    attrs: dict[str, Any],
    batch_size: int,
    watch: Progress,
    check_stop: Callable[[], None],
) -> int:
    width = encoder.embed_dim
    features, colours = np.empty((len(tiles), width), np.float32), np.empty((len(tiles), COLOURS), np.float32)
    identity = digest({**attrs, "rows": len(tiles)})
    kept = KeptRows(out, identity, (len(tiles), width + COLOURS), np.dtype(np.float32), step=batch_size)
    for first, rows in kept.blocks():
        features[first : first + len(rows)], colours[first : first + len(rows)] = rows[:, :width], rows[:, width:]
    resumed = kept.count
    with contextlib.closing(_batches(tiles, resumed, batch_size)) as batches:
        try:
            for number, (first, pixels) in enumerate(batches, start=1):
                check_stop()
                count = len(pixels)
                padded = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - count, axis=0)])
                rows = np.hstack([encoder.encode(padded)[:count], colour_statistics(pixels)])
                features[first : first + count], colours[first : first + count] = rows[:, :width], rows[:, width:]
                kept.keep(rows)
                if number % FLUSH_EVERY == 0:
                    kept.commit()
                watch.step("tiles", first + count, len(tiles))
        finally:
            kept.commit()
            kept.close()
    write_table(
        out,
        EmbeddingTable(
            names=tiles.names,
            features=features,
            splits=tiles.splits,
            labels=tiles.labels,
            groups=tiles.groups,
            colours=colours,
            attrs={**attrs, **({"group_column": tiles.group_column} if tiles.group_column else {})},
        ),
    )
    kept.discard()
    return resumed


def colour_statistics(pixels: npt.NDArray[np.uint8]) -> Float32Array:
    """Mean of R, G, B and standard deviation of R, G, B in [0, 255] of each tile (n, T, T, 3): (n, 6)."""
    flat = pixels.reshape(len(pixels), -1, 3).astype(np.float32)
    return np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1)


def _batches(tiles: TileSet, start: int, batch_size: int) -> Generator[tuple[int, npt.NDArray[np.uint8]], None, None]:
    """(position of the first tile, pixels (n, T, T, 3)) from `start` on; threads read ahead."""
    size: list[tuple[int, ...]] = []

    def load(first: int) -> tuple[int, npt.NDArray[np.uint8]]:
        pixels = tiles.read(range(first, min(first + batch_size, len(tiles))))
        for offset, tile in enumerate(pixels):
            if not size:
                size.append(tile.shape)
            if tile.shape != size[0]:
                raise ValueError(
                    f"{tiles.names[first + offset]}: expected a tile of {size[0][1]} x {size[0][0]} like the others, "
                    f"got {tile.shape[1]} x {tile.shape[0]}. Bring the tiles to one size."
                )
        return first, np.stack(pixels)

    return read_ahead(load, range(start, len(tiles), batch_size), threads=worker_count())
