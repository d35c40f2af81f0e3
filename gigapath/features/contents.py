"""Everything that a feature file holds, read to its last byte without judging it: a wrong file must be readable here,
as far as it goes, so that what is wrong with it can be said."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gigapath.features.cells import as_pair, name_in, two_axes
from gigapath.features.data import Array, FeatureFileError
from gigapath.features.gigapath_file import STATES, stage_of
from gigapath.features.h5 import is_complete, open_h5, read_attrs, read_dataset
from gigapath.features.other_tools import (
    Held,
    NoCoordinatesError,
    coordinates_file_step,
    read_other_tool,
    slide_vector,
)
from gigapath.features.reading import slide_name

# Types of numbers that are read to be judged, fixed text among them; the others are refused as unreadable.
_KINDS = "iufSb"


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds; N tiles, D width.

    Attributes:
        path: the file.
        kind: "tile embeddings", "tiles", "tile coordinates", "slide embeddings" or "vectors" (embeddings whose
            coordinates are not at hand).
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
        slide_encoder: the slide encoder that a slide's file names, or None.
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
    slide_encoder: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    complete: bool | None = None


def read_contents(path: Path, *, tile_size_level0: float | None = None) -> Contents:
    """Read a file.

    Args:
        path: an `.h5`, `.npz` or `.pt` file.
        tile_size_level0: the distance between neighbouring tiles, where the file does not say.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: it can't be read, or holds nothing that is known.
    """
    held = _read(path)
    if held.step is None and tile_size_level0 is not None and held.kind != "slide embeddings":
        held = replace(held, step=(tile_size_level0, tile_size_level0))
    return held


def _read(path: Path) -> Contents:
    if path.suffix not in (".npz", ".pt"):
        with open_h5(path) as file:
            stage = stage_of(file)
            if stage is not None:
                return _of_ours(path, file, stage)
            coordinates, slide = coordinates_file_step(file), slide_vector(file)
            if coordinates is not None:
                tool, step = coordinates
                coords = two_axes(read_dataset(file, "coords", kinds=_KINDS))
                attrs = {**read_attrs(file), **read_attrs(file["coords"])}
                return Contents(path, "tile coordinates", tool, path.stem, coords=coords, step=step, attrs=attrs)
            if slide is not None:
                tool, name, _ = slide
                vectors = {name: read_dataset(file, name, kinds=_KINDS)}
                vectors = {name: vector[None] if vector.ndim == 1 else vector for name, vector in vectors.items()}
                attrs = {**read_attrs(file), **read_attrs(file[name])}
                encoder = name_in(attrs, "encoder")
                return Contents(
                    path, "slide embeddings", tool, path.stem, vectors=vectors, slide_encoder=encoder, attrs=attrs
                )
    try:
        return _of_held(path, read_other_tool(path))
    except NoCoordinatesError as error:
        return Contents(path, "vectors", "clam", path.stem, features=error.features)


def _of_ours(path: Path, file: Any, stage: str) -> Contents:
    attrs = read_attrs(file)
    slide_id, encoder, complete = str(name_in(attrs, "slide_id")), name_in(attrs, "encoder"), is_complete(file)
    if stage == "slide":
        vectors = {name: read_dataset(file, name, kinds=_KINDS) for name in STATES if name in file}
        return Contents(
            path,
            "slide embeddings",
            "gigapath",
            slide_id,
            vectors=vectors,
            encoder=encoder,
            slide_encoder=name_in(attrs, "slide_encoder"),
            attrs=attrs,
            complete=complete,
        )
    if stage not in ("tiles", "features"):
        raise FeatureFileError(f"{path.name}: expected a file of our stages tiles, features or slide, got {stage!r}.")
    needed = {"features", "coords", "cells"} if stage == "features" else {"coords", "cells", "tissue_fraction"}
    names = ("features", "coords", "cells", "tissue_fraction", "section", "qc")
    held = {name: read_dataset(file, name, kinds=_KINDS) for name in names if name in file or name in needed}
    return Contents(
        path,
        "tile embeddings" if stage == "features" else "tiles",
        "gigapath",
        slide_id,
        features=held.get("features"),
        coords=held["coords"],
        cells=held["cells"],
        tissue_fraction=held.get("tissue_fraction"),
        frame=str(attrs.get("frame") or "level0"),
        step=as_pair(attrs.get("tile_size_level0")),
        encoder=encoder,
        attrs=attrs,
        complete=complete,
    )


def _of_held(path: Path, held: Held) -> Contents:
    return Contents(
        path,
        "tile embeddings",
        held.source,
        slide_name(path) if held.source == "mussel" else path.name.removesuffix(path.suffix),
        features=held.features,
        coords=held.coords,
        tissue_fraction=held.tissue_fraction,
        frame=held.frame,
        step=held.step,
        encoder=held.encoder,
        attrs=held.attrs,
    )
