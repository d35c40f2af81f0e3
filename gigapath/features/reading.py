"""The one reader of tile embeddings: our files and other tools', to the same dataclass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.data import STEP_OPTION, Contents, FeatureFileError, TileEmbeddings, in_row_major_order
from gigapath.features.gigapath_file import STATES, stage_of
from gigapath.features.h5 import as_pair, check_undamaged, is_complete, name_in, open_h5, read_attrs, read_dataset

# Our stages: what their files hold, the datasets that each has, and all that are read.
_TILES = ("coords", "cells", "tissue_fraction", "section", "qc")
_OURS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "tiles": ("tiles", ("coords", "cells", "tissue_fraction"), _TILES),
    "features": ("tile embeddings", ("features", "coords", "cells"), ("features", *_TILES)),
    "slide": ("slide embeddings", (), STATES),
}

# Rows that are looked at at once, so that a check needs no second copy of a large array.
_CHECK_ROWS = 4096


def read_features(
    path: Path | str,
    *,
    tile_size_level0: float | None = None,
    embed_dim: int | None = None,
    cells: bool = True,
    order: str = "row-major",
    coordinates: Path | str | None = None,
    verify: bool = True,
) -> TileEmbeddings:
    """Read the tile embeddings of one slide: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, slide2vec's, slideflow's or
    those of the published fine-tuning code.

    Args:
        path: an `.h5`, `.npz` or `.pt` file.
        tile_size_level0: the distance between neighbouring tiles in the unit of the file's coordinates, for a file
            that does not say it; one that says otherwise is an error.
        embed_dim: the width D that is expected, or None for any.
        cells: bring the coordinates to cells of the slide encoder's grid. Without, a file whose step is unknown or
            whose tiles overlap can still be read, and stays in its own order.
        order: "row-major", as the slide encoder was trained, or "file".
        coordinates: for tools that keep coordinates in a second file and where it is not in its usual place: that file
            or a folder of such files (CLAM's `patches/<slide>.h5`, slide2vec's `tiles/<id>.coordinates.npz`,
            slideflow's `<slide>.index.npz`).
        verify: compare the file with the SHA-256 that its run recorded; False where that was done already.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: another kind of file, one that is truncated or was never finished, NaN or infinity, another
            width, two tiles on one cell, an unknown step, bytes that have changed since its run. One sentence that
            names the file.
    """
    path = Path(path)
    if order not in ("row-major", "file"):
        raise ValueError(f"read_features: expected order row-major or file, got {order!r}.")
    if verify:
        check_undamaged(path)
    held = _read(path, None if coordinates is None else Path(coordinates))
    _check_kind(held)
    _check_arrays(held, embed_dim)
    step, stated = held.step, tile_size_level0
    if stated is not None and step is None and held.complete is None:
        step = (stated, stated)
    elif stated is not None and step is not None and abs(stated - np.mean(step)) > 0.005 * np.mean(step):
        raise FeatureFileError(
            f"{path.name}: the file says that its tiles lie {np.mean(step):g} apart, {STEP_OPTION} says {stated:g}. "
            "Leave the option out."
        )
    return _embeddings(held, step, cells=cells, sort=order == "row-major")


def read_contents(path: Path, *, tile_size_level0: float | None = None, coordinates: Path | None = None) -> Contents:
    """Read a feature file of any kind and tool to its last byte, without judging it; arguments as `read_features`.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: it can't be read, or holds nothing that is known.
    """
    held = _read(path, coordinates, kinds="iufSb")  # texts and truth values among them, of ours
    if held.step is None and tile_size_level0 is not None and held.kind != "slide embeddings":
        held = replace(held, step=(tile_size_level0, tile_size_level0))
    return held


def _read(path: Path, coordinates: Path | None, *, kinds: str = "iuf") -> Contents:
    if path.suffix in (".npz", ".pt", ".npy"):
        from gigapath.features.other_tools import read_arrays

        return read_arrays(path, coordinates)
    with open_h5(path) as file:
        stage = stage_of(file)
        if stage is None:
            from gigapath.features.other_tools import read_h5  # runs over our own files need none of it

            return read_h5(path, file, coordinates)
        if stage not in _OURS:
            raise FeatureFileError(f"{path.name}: expected a file of our stages {', '.join(_OURS)}, got {stage!r}.")
        kind, needed, names = _OURS[stage]
        attrs = read_attrs(file)
        arrays: dict[str, Any] = {
            name: read_dataset(file, name, kinds=kinds) for name in names if name in file or name in needed
        }
        return Contents(
            path=path,
            kind=kind,
            tool="gigapath",
            slide_id=str(name_in(attrs, "slide_id")),
            qc_names=tuple(read_attrs(file["qc"]).get("names") or ()) if "qc" in arrays else (),
            frame=str(attrs.get("frame") or "level0"),
            step=as_pair(attrs.get("tile_size_level0")) if stage != "slide" else None,
            encoder=name_in(attrs, "encoder"),
            slide_encoder=name_in(attrs, "slide_encoder") if stage == "slide" else None,
            attrs=attrs,
            complete=is_complete(file),
            **({"vectors": arrays} if stage == "slide" else arrays),
        )


def _check_kind(held: Contents) -> None:
    """Raise FeatureFileError where a file holds something else than tile embeddings, or was never finished."""
    name = held.path.name
    if held.kind == "vectors":
        raise FeatureFileError(f"{name}: {held.missing}.")
    if held.vectors and held.complete is None:
        (vector,) = held.vectors.values()
        kind = f" of feat_type {held.attrs['feat_type']!r}" if "feat_type" in held.attrs else ""
        raise FeatureFileError(
            f"{name}: expected tile embeddings (N, D), got one slide vector, {vector.shape}{kind}, as "
            f"{held.tool.upper()} writes them. Name the files of its tiles."
        )
    if held.kind != "tile embeddings":
        if held.complete is None:
            raise FeatureFileError(f"{name}: expected tile embeddings, features and coords, got {held.kind}.")
        stage = held.attrs["stage"]
        raise FeatureFileError(f"{name}: expected a file of our stage 'features', got one of stage {stage!r}.")
    if held.complete is False:
        raise FeatureFileError(f"{name}: it was never finished. Make it again.")


def _embeddings(held: Contents, step: tuple[float, float] | None, *, cells: bool, sort: bool) -> TileEmbeddings:
    """A file's tile embeddings: float32 or float16, with cells (ours as stored, others' derived), in their order."""
    path, features, coords, order = held.path, held.features, held.coords, None
    assert features is not None and coords is not None
    fractions, places = held.tissue_fraction, held.cells
    if held.complete is not None:
        assert places is not None
        if not in_row_major_order(places):
            raise FeatureFileError(f"{path.name}: its cells are not in row-major order, each once. Make it again.")
    else:
        features = features if features.dtype in (np.float32, np.float16) else features.astype(np.float32)
        coords = coords.astype(np.float64 if coords.dtype.kind == "f" else np.int64)
        if cells:
            from gigapath.features.cells import cells_of, observed_step, row_major  # our own files need none of it

            if step is None:
                seen = observed_step(coords)
                hint = f" (the closest lie {seen:g} apart)" if seen else ""
                raise FeatureFileError(f"{path.name}: {held.missing}{hint}.")
            places = cells_of(coords, step, who=path.name)
            order = row_major(places) if sort else None
            if order is not None:
                features, coords, places = features[order], coords[order], places[order]
                fractions = None if fractions is None else fractions[order]
    return TileEmbeddings(
        slide_id=held.slide_id,
        features=features,
        coords=coords,
        frame=held.frame,
        cells=places,
        tile_size_level0=None if step is None else float(np.mean(step)),
        tissue_fraction=fractions,
        section=held.section,
        qc=held.qc,
        qc_names=held.qc_names,
        attrs=held.attrs,
        source=held.tool,
        encoder=held.encoder,
        reordered=order is not None,
    )


def _check_arrays(held: Contents, embed_dim: int | None) -> None:
    """Raise FeatureFileError where embeddings are not finite floats, or coordinates and fractions not one a tile."""
    features, coords, fractions, name = held.features, held.coords, held.tissue_fraction, held.path.name
    assert features is not None and coords is not None
    if features.ndim != 2 or features.dtype.kind != "f":
        raise FeatureFileError(
            f"{name}: expected embeddings (N, D) of floats, got {features.shape} of {features.dtype}."
        )
    if coords.shape != (len(features), 2) or coords.dtype.kind not in "iuf":
        raise FeatureFileError(f"{name}: expected coords {(len(features), 2)}, got {coords.shape} of {coords.dtype}.")
    if coords.dtype.kind == "u" and coords.size and coords.max() > np.iinfo(np.int64).max:
        raise FeatureFileError(f"{name}: its coordinates reach {coords.max()}, which no slide does.")
    if fractions is not None and fractions.shape != (len(features),):
        raise FeatureFileError(f"{name}: expected one tissue fraction a tile, got {fractions.shape}.")
    if embed_dim is not None and features.shape[1] != embed_dim:
        raise FeatureFileError(
            f"{name}: expected embeddings of width {embed_dim}, got {features.shape[1]}. Features of another encoder?"
        )
    for start in range(0, len(features), _CHECK_ROWS):
        finite = np.isfinite(features[start : start + _CHECK_ROWS]).all(axis=1)
        if not finite.all():
            raise FeatureFileError(
                f"{name}: expected finite embeddings, got NaN or infinity in row {start + int(np.argmin(finite))}."
            )
