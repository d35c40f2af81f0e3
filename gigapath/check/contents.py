"""Everything that a feature file holds, read to its last byte without judging it: a wrong file must be readable here,
as far as it goes, so that what is wrong with it can be said."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.data import Array, FeatureFileError
from gigapath.features.foreign import Held, TensorReader, coordinates_file_step, read_foreign_h5, read_slide2vec
from gigapath.features.h5 import is_complete, open_h5, read_attrs, read_dataset
from gigapath.features.ours import stage_of

# The datasets of our slide files that hold one or more vectors.
VECTORS = ("states_mean", "states_class", "default_mean", "default_class", "tile_mean")


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """What a file holds; N tiles, D width.

    Attributes:
        path: the file.
        kind: as `FileReport.kind`.
        tool: who wrote it, as `TileEmbeddings.source`.
        slide_id: as the file says, else its name without suffix.
        features: (N, D) as stored, or None.
        coords: (N, 2) as stored, in the unit that `frame` names, or None.
        cells: (N, 2) as stored by us, or None.
        tissue_fraction: (N,), or None.
        vectors: the vectors of a slide's file by name.
        frame: a key of `gigapath.features.data.FRAMES`.
        step: the distance (x, y) between neighbouring tiles that the file states, or None.
        encoder: the tile encoder that the file names, or None.
        attrs: what the file says of itself.
        complete: the mark of our files, None for other tools'.
    """

    path: Path
    kind: str
    tool: str
    slide_id: str
    features: Array | None = None
    coords: Array | None = None
    cells: Array | None = None
    tissue_fraction: Array | None = None
    vectors: Mapping[str, Array] = field(default_factory=dict)
    frame: str = "level0"
    step: tuple[float, float] | None = None
    encoder: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    complete: bool | None = None


def read_contents(path: Path, *, read_tensor: TensorReader | None = None) -> Contents:
    """Read a file.

    Args:
        path: an `.h5`, `.npz` or `.pt` file.
        read_tensor: reads a `.pt` file; this module has no torch.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: it can't be read, or holds nothing that is known.
    """
    if path.suffix in (".npz", ".pt"):
        return _of_slide2vec(path, read_tensor)
    with open_h5(path) as file:
        stage = stage_of(file)
        if stage is not None:
            return _of_ours(path, file, stage)
        coordinates = coordinates_file_step(file)
        if coordinates is not None:
            tool, step = coordinates
            attrs = {**read_attrs(file), **read_attrs(file["coords"])}
            return Contents(
                path=path,
                kind="tile coordinates",
                tool=tool,
                slide_id=path.stem,
                coords=read_dataset(file, "coords"),
                step=step,
                attrs=attrs,
            )
        if "features" in file and getattr(file["features"], "ndim", 0) == 1:  # TRIDENT's slide features
            attrs = {**read_attrs(file), **read_attrs(file["features"])}
            vectors = {"features": read_dataset(file, "features")[None]}
            return Contents(
                path=path, kind="slide embeddings", tool="trident", slide_id=path.stem, vectors=vectors, attrs=attrs
            )
    return _of_held(path, read_foreign_h5(path, coordinates=None))


def _of_ours(path: Path, file: Any, stage: str) -> Contents:
    attrs = read_attrs(file)
    slide_id = str(attrs.get("slide_id"))
    if stage == "slide":
        vectors = {name: read_dataset(file, name) for name in VECTORS if name in file}
        return Contents(
            path=path,
            kind="slide embeddings",
            tool="gigapath",
            slide_id=slide_id,
            vectors=vectors,
            encoder=_text(attrs.get("encoder")),
            attrs=attrs,
            complete=is_complete(file),
        )
    if stage not in ("tiles", "features"):
        raise FeatureFileError(f"{path.name}: expected a file of our stages tiles, features or slide, got {stage!r}.")
    needed = {"features", "coords", "cells"} if stage == "features" else {"coords", "cells", "tissue_fraction"}
    names = ("features", "coords", "cells", "tissue_fraction", "section", "qc")
    held = {name: read_dataset(file, name) for name in names if name in file or name in needed}
    return Contents(
        path=path,
        kind="tile embeddings" if stage == "features" else "tiles",
        tool="gigapath",
        slide_id=slide_id,
        features=held.get("features"),
        coords=held["coords"],
        cells=held["cells"],
        tissue_fraction=held.get("tissue_fraction"),
        frame=str(attrs.get("frame") or "level0"),
        step=_pair(attrs.get("tile_size_level0")),
        encoder=_text(attrs.get("encoder")),
        attrs=attrs,
        complete=is_complete(file),
    )


def _of_slide2vec(path: Path, read_tensor: TensorReader | None) -> Contents:
    beside = path.parent.parent / "tiles" / f"{path.stem}.coordinates.npz"
    if path.suffix == ".pt" and not beside.is_file() and read_tensor is not None:
        # CLAM's pt_files and the like: embeddings whose coordinates lie in another file.
        features = read_tensor(path)
        return Contents(path=path, kind="vectors", tool="clam", slide_id=path.stem, features=features)
    return _of_held(path, read_slide2vec(path, coordinates=None, read_tensor=read_tensor))


def _of_held(path: Path, held: Held) -> Contents:
    suffixes = path.suffix, (".patch" if held.source == "mussel" else "")
    return Contents(
        path=path,
        kind="tile embeddings",
        tool=held.source,
        slide_id=path.name.removesuffix(suffixes[0]).removesuffix(suffixes[1]),
        features=held.features,
        coords=held.coords,
        tissue_fraction=held.tissue_fraction,
        frame=held.frame,
        step=held.step,
        encoder=held.encoder,
        attrs=held.attrs,
    )


def _pair(value: Any) -> tuple[float, float] | None:
    """One or two positive numbers as two."""
    try:
        x, y = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,)).tolist()
    except (TypeError, ValueError):
        return None
    return (x, y) if np.isfinite([x, y]).all() and min(x, y) > 0 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
