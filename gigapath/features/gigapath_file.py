"""Our files: tiles, tile embeddings, slide embeddings. TRIDENT, CLAM and the published fine-tuning script read the
second as it is: top-level datasets of at least one axis, no groups."""

import contextlib
import time
from collections.abc import Iterator
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
from gigapath.features.kept_rows import KeptRows
from gigapath.files import OutputError

# A slide's rows are made safe this often, and those of a slide left half done where it took longer than WORTH_SECONDS.
KEEP_SECONDS = 30.0
WORTH_SECONDS = 10.0
_KEPT_ROWS = 1024

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


class TileEmbeddingsWriter:
    """Streams the embeddings of one slide into its file, which takes its name when every tile has arrived.

    Memory does not grow with the slide; a killed process leaves a `.partial` and nothing else. With `kept`, rows of a
    slide that takes long are made safe every half minute and when the writer is left by an error: a later writer of
    equal identity begins with them (`kept.find()` tells how many), and its file is the same to the last byte.

    ```python
    with TileEmbeddingsWriter(path, tiles, embed_dim=1536, attrs={"encoder": "gigapath", ...}) as writer:
        writer.write(0, block)  # (n, D), any order, each tile once
    ```

    Args:
        path: where the file goes.
        tiles: the tiles that the embeddings belong to, in their order.
        embed_dim: D.
        dtype: "float32", or "float16" for half the size.
        attrs: the encoder's part of the root attributes (`encoder`, `weights_sha256`, `transform`, `precision`,
            `batch_shape`, `device`, ...), beside those of `tiles`.
        kept: the rows that are safe already, or None to keep none.

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
        self._kept_at = 0.0
        self._began = 0.0

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
            self._take_kept()
            self._h5.check()
        except BaseException as error:
            self._h5.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def amend(self, attrs: Attrs) -> None:
        """Set root attributes that were not known when the file was begun."""
        write_attrs(self._h5.file, attrs)

    def write(self, start: int, block: Array) -> None:
        """Store the embeddings of the tiles `start` to `start + len(block)`.

        Args:
            start: index of the first tile.
            block: (n, D) floats.
        """
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

    def _take_kept(self) -> None:
        """Begin with the rows that an earlier run kept."""
        self._began = self._kept_at = time.monotonic()
        if self._kept is None:
            return
        for first, rows in self._kept.blocks():
            self._features[first : first + len(rows)] = rows
        self._written[: self._kept.count] = True

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

    def _settle_kept(self, error: BaseException | None) -> None:
        """Keep the rows of a slide that was left half done, where they are worth it; else none are left."""
        if self._kept is None:
            return
        if error is None:
            self._kept.discard()
            return
        if not isinstance(error, OutputError) and time.monotonic() - self._began > WORTH_SECONDS:
            with contextlib.suppress(OSError, RuntimeError):
                self._keep()
        self._kept.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None and not self._written.all():
            error = ValueError(
                f"embeddings of {self._tiles.slide_id}: expected {len(self._tiles)} tiles, "
                f"got {int(self._written.sum())}; nothing was kept."
            )
            self._settle_kept(error)
            self._h5.__exit__(ValueError, error, None)
            raise error
        if error is not None:
            self._settle_kept(error)
        self._h5.__exit__(kind, error, traceback)
        if error is None:
            self._settle_kept(None)


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


def read_slide(path: Path | str) -> SlideEmbeddings:
    """Read a file of `write_slide`.

    Raises:
        FeatureFileError: another kind of file, one that is not complete, or whose bytes have changed since.
    """
    check_undamaged(Path(path))
    with open_ours(path, "slide") as file:
        attrs = read_attrs(file)
        arrays = {name: read_dataset(file, name) for name in STATES if name in file or name == "tile_mean"}
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
    write_attrs(coords, {**_trident_attrs(tiles), **_clam_attrs(tiles)})
    file.create_dataset("cells", data=tiles.cells)
    file.create_dataset("tissue_fraction", data=tiles.tissue_fraction)
    file.create_dataset("section", data=tiles.section)
    qc = file.create_dataset("qc", data=tiles.qc)
    write_attrs(qc, {"names": tiles.qc_names})


def _trident_attrs(tiles: Tiles) -> dict[str, Any]:
    """TRIDENT's nine. It knows one step for both axes: the mean where x and y differ, whole either way."""
    width, height = tiles.attrs.get("slide_size", (None, None))
    power = tiles.attrs.get("objective_power")
    nominal = nominal_magnification(tiles.mpp)
    level0 = nominal_magnification(tiles.mpp * tiles.tile_size / tiles.tile_size_level0[0])
    return {
        "patch_size": tiles.tile_size,
        "patch_size_level0": round(sum(tiles.tile_size_level0) / 2),
        "level0_magnification": power if power is not None else level0,
        "target_magnification": nominal,
        "overlap": 0,
        "name": tiles.slide_id,
        "savetodir": None,  # a path: outputs hold none
        "level0_width": width,
        "level0_height": height,
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
