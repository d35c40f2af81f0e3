"""Our files: tiles, tile embeddings, slide embeddings. TRIDENT, CLAM and the published fine-tuning script read the
second as it is: top-level datasets of at least one axis, no groups."""

import contextlib
import os
import struct
import time
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import gigapath
from gigapath.features.data import (
    NUMERICS_VERSION,
    SLIDE_NUMERICS_VERSION,
    TILES_NUMERICS_VERSION,
    Array,
    Attrs,
    FeatureFileError,
    SlideEmbeddings,
    TileEmbeddings,
    Tiles,
)
from gigapath.features.h5 import (
    H5Writer,
    check_undamaged,
    is_complete,
    open_h5,
    read_attr,
    read_attrs,
    read_dataset,
    write_attrs,
)
from gigapath.files import PARTIAL_SUFFIX, OutputError, open_own

# A slide's rows are made safe this often, and those of a slide left half done where it took longer than WORTH_SECONDS.
KEEP_SECONDS = 30.0
WORTH_SECONDS = 10.0
_KEPT_ROWS = 1024

# Rows of a large slide that are safe already lie beside the file in the making, as `<name>.rows.partial`: a header,
# then the rows as the file will hold them. Rows are flushed before the header counts them, and the header carries their
# checksum, so that what it says holds after a power cut, and after two runs wrote the same file at once.
_MAGIC = b"GPROWS1\n"
# magic, identity, rows of the whole, width, type, rows kept, their CRC-32; the header's own CRC-32 follows.
_HEADER = struct.Struct("<8s32sQQ8sQI")
_START = 4096  # where the rows begin
_BLOCK_BYTES = 1 << 22

STATES = ("states_mean", "states_class", "default_mean", "default_class", "tile_mean")
_TILE_FIELDS = ("level", "read_size", "tile_size", "tile_size_level0", "mpp")
# Written by this module, so no business of `attrs`.
_OWN_ATTRS = frozenset({"slide_id", "stage", "complete", "package_version", "implementation", *_TILE_FIELDS})


def write_tiles(path: Path | str, tiles: Tiles) -> None:
    """Write the tiling stage's file of one slide, whole or not at all."""
    with H5Writer(path) as writer:
        attrs = {"numerics_version": TILES_NUMERICS_VERSION, **tiles.attrs, **_geometry(tiles)}
        write_root(writer.file, "tiles", tiles.slide_id, attrs)
        _write_places(writer.file, tiles)


def read_tiles(path: Path | str) -> Tiles:
    """Read a file of `write_tiles`.

    Raises:
        FeatureFileError: another kind of file, one that is not complete, or whose bytes have changed since.
    """
    check_undamaged(Path(path))
    with open_ours(path, "tiles") as file:
        attrs = read_attrs(file)
        qc = file["qc"]
        missing = [name for name in ("slide_id", *_TILE_FIELDS) if attrs.get(name) is None]
        if missing:
            raise FeatureFileError(
                f"{Path(path).name}: its attributes lack {', '.join(missing)}. Tile the slide again."
            )
        return Tiles(
            slide_id=attrs["slide_id"],
            coords_level0=read_dataset(file, "coords"),
            cells=read_dataset(file, "cells"),
            tissue_fraction=read_dataset(file, "tissue_fraction"),
            section=read_dataset(file, "section"),
            qc=read_dataset(file, "qc"),
            qc_names=tuple(read_attrs(qc).get("names") or ()),
            attrs={name: value for name, value in attrs.items() if name not in _OWN_ATTRS},
            **{name: attrs[name] for name in _TILE_FIELDS},
        )


@dataclass
class KeptRows:
    """The kept rows of one file in the making, the first ones of the whole (`shape` (N, D)), without a gap, in whole
    multiples of `step` but for the last. Rows of another `identity` (everything that they depend on, in at most 32
    letters) count for nothing."""

    path: Path
    identity: str
    shape: tuple[int, int]
    dtype: "np.dtype[Any]"
    step: int = 1
    count: int = field(default=0, init=False)  # how many rows are kept, as far as this object has read or written them
    _crc: int = field(default=0, init=False)
    _descriptor: int = field(default=-1, init=False)

    @property
    def file(self) -> Path:
        """Where the rows lie."""
        return rows_file(self.path)

    def find(self) -> int:
        """Look for rows that an earlier run kept, and check every byte; how many there are."""
        for _ in self.blocks():
            pass
        return self.count

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """(index of the first row, rows (n, D)) of what an earlier run kept; `count` holds at the end.

        Nothing that came may be used where `count` is 0 then: its checksum was wrong.
        """
        self.count = self._crc = 0
        with contextlib.suppress(OSError), os.fdopen(open_own(self.file, os.O_RDONLY), "rb") as file:
            header = self._read_header(file.read(_START))
            if header is None:
                return
            count, checksum = header
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
                self.count, self._crc = count, crc

    def keep(self, rows: Array) -> None:
        """Add the rows that follow, without counting them yet. A disk that refuses ends the keeping, not the run."""
        data = np.ascontiguousarray(rows, self.dtype).tobytes()
        try:
            if self._descriptor < 0:
                if not self.count:  # whatever has that name holds nothing of ours
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    self.file.unlink(missing_ok=True)
                self._descriptor = open_own(self.file, os.O_RDWR | (0 if self.count else os.O_CREAT | os.O_EXCL))
            position = _START + self.count * self._row_bytes
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], position + done)
        except OSError:
            self.discard()
            return
        self._crc = zlib.crc32(data, self._crc)
        self.count += len(rows)

    def commit(self) -> None:
        """Make the rows durable, then the header that counts them."""
        if self._descriptor < 0:
            return
        kind = self.dtype.str.encode()
        fields = (_MAGIC, self.identity.encode(), *self.shape, kind, self.count, self._crc)
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


class TileEmbeddingsWriter:
    """Streams the embeddings of one slide into its file, which takes its name when every tile has arrived.

    Memory does not grow with the slide; a killed process leaves a `.partial` and nothing else. With `kept`, rows of a
    slide that takes long are made safe every half minute and when the writer is left by an error: a later writer of
    equal identity begins with them (`kept.find()` tells how many), and its file is the same to the last byte. `attrs`
    are the encoder's part of the root attributes (`encoder`, `weights_sha256`, `transform`, ...), beside those of
    `tiles`.

        with TileEmbeddingsWriter(path, tiles, embed_dim=1536, attrs={"encoder": "gigapath", ...}) as writer:
            writer.write(0, block)  # (n, D), any order, each tile once

    Raises:
        gigapath.files.OutputError: the disk is full, read-only, ...
        ValueError: blocks of another width, embeddings that are not finite as stored, tiles missing at the end.
    """

    def __init__(
        self,
        path: Path | str,
        tiles: Tiles,
        *,
        embed_dim: int,
        dtype: str = "float32",
        attrs: Attrs | None = None,
        kept: KeptRows | None = None,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"TileEmbeddingsWriter: expected dtype float32 or float16, got {dtype!r}.")
        self._tiles = tiles
        self._dtype = np.dtype(dtype)
        self._embed_dim = embed_dim
        self._attrs = dict(attrs or {})
        self._written = np.zeros(len(tiles), dtype=bool)
        self._h5 = H5Writer(path)
        self._kept = kept

    def __enter__(self) -> "TileEmbeddingsWriter":
        self._h5.__enter__()
        try:
            file, tiles = self._h5.file, self._tiles
            versions = {
                "tiles_numerics_version": tiles.attrs.get("numerics_version", TILES_NUMERICS_VERSION),
                "numerics_version": NUMERICS_VERSION,
            }
            attrs = {**tiles.attrs, **versions, **self._attrs, **_geometry(tiles)}
            write_root(file, "features", tiles.slide_id, attrs)
            _write_places(file, tiles)
            self._features = file.create_dataset("features", (len(tiles), self._embed_dim), self._dtype)
            names = {"name": tiles.slide_id, "savetodir": None, "encoder": self._attrs.get("encoder")}
            write_attrs(self._features, names)
            self._began = self._kept_at = time.monotonic()
            if self._kept is not None:  # the rows that an earlier run kept
                for first, rows in self._kept.blocks():
                    self._features[first : first + len(rows)] = rows
                self._written[: self._kept.count] = True
            self._h5.check()
        except BaseException as error:
            self._h5.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def amend(self, attrs: Attrs) -> None:
        """Set root attributes that were not known when the file was begun."""
        write_attrs(self._h5.file, attrs)

    def write(self, start: int, block: Array) -> None:
        """Add the embeddings (n, D) of the tiles from `start` on."""
        stop = start + len(block)
        who = f"embeddings of {self._tiles.slide_id}"
        if block.ndim != 2 or block.shape[1] != self._embed_dim or start < 0 or stop > len(self._tiles):
            raise ValueError(
                f"{who}: expected a block (n, {self._embed_dim}) within {len(self._tiles)} tiles, "
                f"got {block.shape} at {start}."
            )
        with np.errstate(over="ignore"):
            stored = np.asarray(block).astype(self._dtype, copy=False)
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            tile = start + int(np.argmin(finite))
            raise ValueError(
                f"{who}: expected finite values, got NaN or infinity in tile {tile} as {self._dtype}. "
                "Try --precision fp32 and --store float32."
            )
        self._features[start:stop] = stored
        self._written[start:stop] = True
        self._h5.check()
        if time.monotonic() - self._kept_at > KEEP_SECONDS:
            self._keep()

    def _keep(self) -> None:
        """Make the rows so far safe, up to the first one that has not arrived."""
        if self._kept is None:
            return
        whole = len(self._written)
        if not self._written.all():
            whole = int(np.argmin(self._written)) // self._kept.step * self._kept.step
        for first in range(self._kept.count, whole, _KEPT_ROWS):
            self._kept.keep(self._features[first : min(whole, first + _KEPT_ROWS)])
        self._kept.commit()
        self._kept_at = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        missing = None
        if error is None and not self._written.all():
            error = missing = ValueError(
                f"embeddings of {self._tiles.slide_id}: expected {len(self._tiles)} tiles, "
                f"got {int(self._written.sum())}; nothing was kept."
            )
        if error is not None and self._kept is not None:  # the rows are left where they are worth it
            if not isinstance(error, OutputError) and time.monotonic() - self._began > WORTH_SECONDS:
                with contextlib.suppress(OSError, RuntimeError):
                    self._keep()
            self._kept.close()
        self._h5.__exit__(None if error is None else type(error), error, traceback)
        if missing is not None:
            raise missing
        if self._kept is not None and error is None:
            self._kept.discard()


def write_slide(path: Path | str, embeddings: SlideEmbeddings) -> None:
    """Write the embeddings of one slide, whole or not at all."""
    with H5Writer(path) as writer:
        attrs = {"numerics_version": SLIDE_NUMERICS_VERSION, **embeddings.attrs}
        write_root(writer.file, "slide", embeddings.slide_id, attrs)
        for name in STATES:
            value = getattr(embeddings, name)
            if value is not None:
                writer.file.create_dataset(name, data=value)


def write_tile_vectors(path: Path | str, tiles: TileEmbeddings, attrs: Attrs) -> None:
    """Write one vector a tile as a file of our features' form, whole or not at all; its coordinates and flags are those
    that `tiles` has, in the unit that its `frame` names."""
    step = tiles.tile_size_level0
    with H5Writer(path) as writer:
        own = {"numerics_version": SLIDE_NUMERICS_VERSION, "tile_size_level0": step, "frame": tiles.frame}
        write_root(writer.file, "features", tiles.slide_id, {**own, **attrs})
        for name in ("features", "coords", "cells", "tissue_fraction", "section", "qc"):
            value = getattr(tiles, name)
            if value is not None:
                writer.file.create_dataset(name, data=value)
        if tiles.qc is not None:
            write_attrs(writer.file["qc"], {"names": tiles.qc_names})
        if step is not None and tiles.frame == "level0":
            write_attrs(writer.file["coords"], {"patch_size_level0": round(step), "overlap": 0})
        write_attrs(writer.file["features"], {"name": tiles.slide_id, "encoder": attrs.get("encoder")})


def read_slide(path: Path | str, *, only: Collection[str] = STATES) -> SlideEmbeddings:
    """Read a file of `write_slide`, of its arrays but `tile_mean` `only` those; FeatureFileError for another kind of
    file, one that is not complete, or whose bytes have changed since."""
    check_undamaged(Path(path))
    with open_ours(path, "slide") as file:
        attrs = read_attrs(file)
        arrays = {
            name: read_dataset(file, name) for name in STATES if name == "tile_mean" or (name in only and name in file)
        }
        kept = {name: value for name, value in attrs.items() if name not in _OWN_ATTRS}
        return SlideEmbeddings(slide_id=str(attrs.get("slide_id")), attrs=kept, **arrays)


def stage_of(file: h5py.File) -> str | None:
    """The stage that one of our files belongs to ("tiles", "features", "slide"), None for other tools' files."""
    stage = read_attr(file, "stage")
    ours = "numerics_version" in file.attrs and "implementation" in file.attrs
    return str(stage) if ours and stage else None


@contextlib.contextmanager
def open_ours(path: Path | str, stage: str) -> Iterator[h5py.File]:
    """Open one of our files of a given stage; another tool's, another stage's or an incomplete one is an error."""
    with open_h5(path) as file:
        check_ours(file, stage)
        yield file


def check_ours(file: h5py.File, stage: str) -> None:
    """Raise FeatureFileError where an open file is not one of ours of that stage, or was never finished."""
    found, name = stage_of(file), Path(file.filename).name
    if found != stage:
        held = f"one of stage {found!r}" if found else "another tool's"
        raise FeatureFileError(f"{name}: expected a file of our stage {stage!r}, got {held}.")
    if not is_complete(file):
        raise FeatureFileError(f"{name}: it was never finished. Make it again.")


def _geometry(tiles: Tiles) -> dict[str, Any]:
    return {name: getattr(tiles, name) for name in _TILE_FIELDS}


def write_root(file: h5py.File, stage: str, slide_id: str, attrs: Attrs) -> None:
    """Write the root attributes of one of our files."""
    own = {
        "slide_id": slide_id,
        "stage": stage,
        "package_version": gigapath.__version__,
        "implementation": gigapath.__implementation__,
    }
    write_attrs(file, {**attrs, **own})


def _write_places(file: h5py.File, tiles: Tiles) -> None:
    """The datasets of both the tiles' and the features' file, with the attributes that TRIDENT and CLAM look for."""
    coords = file.create_dataset("coords", data=tiles.coords_level0)
    level0 = tiles.attrs.get("objective_power")
    if level0 is None:
        level0 = nominal_magnification(tiles.mpp * tiles.tile_size / tiles.tile_size_level0[0])
    trident = trident_attrs(
        tiles.slide_id,
        pixels=tiles.tile_size,
        step=round(sum(tiles.tile_size_level0) / 2),  # the mean where x and y differ
        powers=(level0, nominal_magnification(tiles.mpp)),
        size=tiles.attrs.get("slide_size", (None, None)),
    )
    write_attrs(coords, {**trident, **_clam_attrs(tiles)})
    file.create_dataset("cells", data=tiles.cells)
    file.create_dataset("tissue_fraction", data=tiles.tissue_fraction)
    file.create_dataset("section", data=tiles.section)
    qc = file.create_dataset("qc", data=tiles.qc)
    write_attrs(qc, {"names": tiles.qc_names})


def trident_attrs(
    slide_id: str, *, pixels: int, step: int, powers: tuple[Any, Any], size: tuple[Any, Any]
) -> dict[str, Any]:
    """TRIDENT's nine attributes of coordinates: tiles of so many `pixels`, `step` level-0 pixels apart on both axes,
    magnifications of level 0 and of the tiles (`powers`), (W, H) of level 0; None where a value is not known."""
    return {
        "patch_size": pixels,
        "patch_size_level0": step,
        "level0_magnification": powers[0],
        "target_magnification": powers[1],
        "overlap": 0,
        "name": slide_id,
        "savetodir": None,  # a path: outputs hold none
        "level0_width": size[0],
        "level0_height": size[1],
    }


def _clam_attrs(tiles: Tiles) -> dict[str, Any]:
    """CLAM reads `patch_size` pixels of `patch_level`: true only where a level was read without resampling."""
    downsample, size = tiles.attrs.get("level_downsample"), tiles.attrs.get("level_size")
    if tiles.read_size != (tiles.tile_size, tiles.tile_size) or downsample is None or size is None:
        return {}
    factors = np.broadcast_to(np.asarray(downsample, dtype=np.float64), (2,))
    return {"patch_level": tiles.level, "downsample": factors, "level_dim": np.asarray(size, dtype=np.int64)}


def nominal_magnification(mpp: float) -> float:
    """The objective power that a scanner would name for this resolution: 10 / mpp on the scale 1.25, 2.5, ..., 80."""
    powers = 1.25 * 2.0 ** np.arange(7)
    nearest = float(powers[np.abs(np.log2(powers * mpp / 10)).argmin()])
    return int(nearest) if nearest.is_integer() else nearest
