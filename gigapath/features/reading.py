"""The one reader of tile embeddings: our files and other tools', to the same dataclass."""

from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.cells import OPTION, cells_of, observed_step, row_major
from gigapath.features.data import Array, FeatureFileError, TileEmbeddings
from gigapath.features.foreign import Held, TensorReader, read_foreign_h5, read_slide2vec
from gigapath.features.h5 import open_h5, read_attrs, read_dataset
from gigapath.features.ours import open_ours, stage_of

# Looked for in this order: a folder that holds some of the first holds no features under the others.
_SUFFIXES = (".h5", ".npz", ".pt")

# Rows that are looked at at once, so that a check needs no second copy of a large array.
_CHECK_ROWS = 4096


def feature_files(folder: Path) -> list[Path]:
    """The files of tile embeddings below a folder; of a run's output folder those of its one `features_*`.

    Raises:
        ValueError: there is none, or the run holds those of several encoders.
    """
    of_a_run = sorted(path for path in folder.glob("features_*") if path.is_dir())
    if len(of_a_run) > 1:
        names = ", ".join(path.name for path in of_a_run)
        raise ValueError(f"{folder}: expected the tile embeddings of one encoder, got {names}. Name one of them.")
    for suffix in _SUFFIXES:
        inside = (of_a_run[0] if of_a_run else folder).rglob(f"*{suffix}")
        found = sorted(path for path in inside if not path.is_dir())
        if found:
            return found
    raise ValueError(f"{folder}: expected files of tile embeddings ({', '.join(_SUFFIXES)}), found none.")


def read_features(
    path: Path | str,
    *,
    tile_size_level0: float | None = None,
    embed_dim: int | None = None,
    cells: bool = True,
    order: str = "row-major",
    coordinates: Path | str | None = None,
    read_tensor: TensorReader | None = None,
) -> TileEmbeddings:
    """Read the tile embeddings of one slide: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, slide2vec's or those of the
    published fine-tuning code.

    Args:
        path: an `.h5`, `.npz` or `.pt` file.
        tile_size_level0: the distance between neighbouring tiles in the unit of the file's coordinates, for a file
            that does not say it; one that says otherwise is an error.
        embed_dim: the width D that is expected, or None for any.
        cells: bring the coordinates to cells of the slide encoder's grid. Without, a file whose step is unknown or
            whose tiles overlap can still be read, and stays in its own order.
        order: "row-major", as the slide encoder was trained, or "file".
        coordinates: for tools that keep coordinates in a second file and where it is not in its usual place: CLAM's
            `patches/<slide>.h5`, slide2vec's `tiles/<id>.coordinates.npz`.
        read_tensor: reads a `.pt` file as an array (N, D); this module has no torch.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: another kind of file, one that is truncated or was never finished, NaN or infinity, another
            width, two tiles on one cell, an unknown step. One sentence that names the file.
    """
    path = Path(path)
    if order not in ("row-major", "file"):
        raise ValueError(f"read_features: expected order row-major or file, got {order!r}.")
    second = None if coordinates is None else Path(coordinates)
    if path.suffix in (".npz", ".pt"):
        held = read_slide2vec(path, coordinates=second, read_tensor=read_tensor)
    else:
        with open_h5(path) as file:
            ours = stage_of(file) is not None
        if ours:
            found = _read_ours(path)
            _check_values(found.features, embed_dim, path)
            if tile_size_level0 is not None and found.tile_size_level0 is not None:
                _check_stated(tile_size_level0, found.tile_size_level0, path)
            return found
        held = read_foreign_h5(path, coordinates=second)
    _check_shapes(held, path)
    _check_values(held.features, embed_dim, path)
    return _embeddings(held, path, stated=tile_size_level0, cells=cells, sort=order == "row-major")


def _read_ours(path: Path) -> TileEmbeddings:
    with open_ours(path, "features") as file:
        attrs = read_attrs(file)
        arrays: dict[str, Any] = {
            name: read_dataset(file, name)
            for name in ("features", "coords", "cells", "tissue_fraction", "section", "qc")
            if name in file or name in ("features", "coords", "cells")
        }
        qc_names = tuple(read_attrs(file["qc"]).get("names") or ()) if "qc" in file else ()
        if row_major(arrays["cells"]) is not None:
            raise FeatureFileError(f"{path.name}: its cells are not in row-major order, each once. Make it again.")
        pitch = attrs.get("tile_size_level0")
        encoder = attrs.get("encoder")
        return TileEmbeddings(
            slide_id=str(attrs.get("slide_id")),
            frame=str(attrs.get("frame") or "level0"),
            tile_size_level0=None if pitch is None else float(np.mean(pitch)),
            qc_names=qc_names,
            attrs=attrs,
            encoder=None if encoder is None else str(encoder),
            **arrays,
        )


def _embeddings(held: Held, path: Path, *, stated: float | None, cells: bool, sort: bool) -> TileEmbeddings:
    """Another tool's file as tile embeddings: float32 or float16, its cells derived and the tiles put in order."""
    features = held.features if held.features.dtype in (np.float32, np.float16) else held.features.astype(np.float32)
    coords = held.coords.astype(np.float64 if held.coords.dtype.kind == "f" else np.int64)
    fractions, step, places, order = held.tissue_fraction, held.step, None, None
    if stated is not None:
        if step is not None:
            _check_stated(stated, float(np.mean(step)), path)
        else:
            step = (stated, stated)
    if cells:
        if step is None:
            seen = observed_step(coords)
            hint = f" (the closest lie {seen:g} apart)" if seen else ""
            raise FeatureFileError(f"{path.name}: {held.no_step}{hint}.")
        places = cells_of(coords, step, who=path.name)
        order = row_major(places) if sort else None
        if order is not None:
            features, coords, places = features[order], coords[order], places[order]
            fractions = None if fractions is None else fractions[order]
    return TileEmbeddings(
        slide_id=path.name.removesuffix(path.suffix).removesuffix(".patch" if held.source == "mussel" else ""),
        features=features,
        coords=coords,
        frame=held.frame,
        cells=places,
        tile_size_level0=None if step is None else float(np.mean(step)),
        tissue_fraction=fractions,
        attrs=held.attrs,
        source=held.source,
        encoder=held.encoder,
        reordered=order is not None,
    )


def _check_stated(stated: float, found: float, path: Path) -> None:
    if abs(stated - found) > 0.005 * found:
        raise FeatureFileError(
            f"{path.name}: the file says that its tiles lie {found:g} apart, {OPTION} says {stated:g}. "
            "Leave the option out."
        )


def _check_shapes(held: Held, path: Path) -> None:
    features, coords, fractions = held.features, held.coords, held.tissue_fraction
    if features.ndim != 2 or features.dtype.kind != "f":
        raise FeatureFileError(
            f"{path.name}: expected embeddings (N, D) of floats, got {features.shape} of {features.dtype}."
        )
    if coords.shape != (len(features), 2) or coords.dtype.kind not in "iuf":
        raise FeatureFileError(
            f"{path.name}: expected coords {(len(features), 2)}, got {coords.shape} of {coords.dtype}."
        )
    if fractions is not None and fractions.shape != (len(features),):
        raise FeatureFileError(f"{path.name}: expected one tissue fraction a tile, got {fractions.shape}.")


def _check_values(features: Array, embed_dim: int | None, path: Path) -> None:
    if embed_dim is not None and features.shape[1] != embed_dim:
        raise FeatureFileError(
            f"{path.name}: expected embeddings of width {embed_dim}, got {features.shape[1]}. "
            "Features of another encoder?"
        )
    for start in range(0, len(features), _CHECK_ROWS):
        finite = np.isfinite(features[start : start + _CHECK_ROWS]).all(axis=1)
        if not finite.all():
            raise FeatureFileError(
                f"{path.name}: expected finite embeddings, got NaN or infinity in row {start + int(np.argmin(finite))}."
            )
