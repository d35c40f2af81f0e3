"""Tiles and slides as `anndata.AnnData`, which scanpy and squidpy take. N tiles, S slides, D width."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.data import FRAMES, TileEmbeddings
from gigapath.features.reading import read_features
from gigapath.features.tables import find_slide_folder, read_slides
from gigapath.tables import data_frame

_ATTRS = ("mpp", "tile_size", "level", "tissue_method")  # of a file of tile embeddings, where it states them


def to_anndata(source: Any, *, embedding: str = "default", allow_mixed: bool = False) -> Any:
    """Bring a slide's tiles, or a cohort's slides, into an AnnData; `write_h5ad` and `write_zarr` of the result write
    it.

    Tiles: X (N, D) float32; obs has `slide_id`, the top-left `x`, `y`, `array_row`, `array_col` (cells), and what the
    file holds of `tissue_fraction`, `section` and quality; obsm["spatial"] (N, 2) float64 are the tiles' centers (x, y)
    in level-0 pixels (`uns["gigapath"]["unit"]` says so, or which other unit the file has); `uns["spatial"]` gives
    squidpy the tiles' size. Slides: X (S, D) float32; obs has the columns of slides.csv, the manifest's among them.

    Args:
        source: tiles: a feature file, `TileEmbeddings`, or what `gigapath.read_features(folder)` gives, for the tiles
            of all its slides; slides: the output folder of a run, one of its `slides_*` folders, or the run's result.
        embedding: of slides, as for `gigapath.read_slides`, and so is `allow_mixed`.

    Raises:
        ImportError: anndata is not installed.
        FileNotFoundError, ValueError: as `gigapath.read_features` and `gigapath.read_slides`.
    """
    try:
        import anndata
    except ImportError as error:
        raise ImportError(
            "to_anndata: expected anndata, which is not installed. Install it: pip install 'gigapath[anndata]'."
        ) from error
    if isinstance(source, TileEmbeddings):
        return _of_tiles(source, anndata)
    if isinstance(source, Mapping):
        return anndata.concat([_of_tiles(tiles, anndata) for tiles in source.values()], uns_merge="unique")
    path = Path(getattr(source, "results", None) or getattr(source, "out", source))
    if path.is_dir():
        return _of_slides(path, embedding, allow_mixed, anndata)
    return _of_tiles(read_features(path), anndata)


def _of_tiles(tiles: TileEmbeddings, anndata: Any) -> Any:
    size = tiles.tile_size_level0
    columns: dict[str, Any] = {
        "slide_id": [tiles.slide_id] * len(tiles),
        "x": tiles.coords[:, 0],
        "y": tiles.coords[:, 1],
    }
    if tiles.cells is not None:
        columns |= {"array_row": tiles.cells[:, 1], "array_col": tiles.cells[:, 0]}
    columns |= {name: values for name in ("tissue_fraction", "section") if (values := getattr(tiles, name)) is not None}
    columns |= {name: tiles.qc[:, index] for index, name in enumerate(tiles.qc_names) if tiles.qc is not None}
    obs = data_frame(columns)
    obs.index = [f"{tiles.slide_id}-{index}" for index in range(len(tiles))]
    facts = {name: tiles.attrs[name] for name in _ATTRS if isinstance(tiles.attrs.get(name), str | int | float)}
    scale = {"spot_diameter_fullres": float(size or 1), "tissue_hires_scalef": 1.0}
    return anndata.AnnData(
        np.asarray(tiles.features, np.float32),
        obs=obs.astype({"slide_id": "category"}),
        obsm={"spatial": tiles.coords.astype(np.float64) + (size or 0) / 2},
        uns={
            "gigapath": {"encoder": tiles.encoder or "", "source": tiles.source, "unit": FRAMES[tiles.frame], **facts},
            "spatial": {tiles.slide_id: {"images": {}, "scalefactors": scale, "metadata": {}}},
        },
    )


def _of_slides(folder: Path, embedding: str, allow_mixed: bool, anndata: Any) -> Any:
    ids, vectors = read_slides(folder, embedding, allow_mixed=allow_mixed)
    found = find_slide_folder(folder)
    table = found.parent / "slides.csv"
    obs = data_frame(table.read_text(encoding="utf-8")) if table.is_file() else data_frame({"slide_id": []})
    obs = obs.astype({"slide_id": str}).set_index("slide_id").reindex(ids).dropna(axis="columns", how="all")
    obs.columns = [name.replace("/", "_per_") for name in obs.columns]  # a "/" is a group to HDF5 and zarr
    for name in obs.select_dtypes(exclude="number").columns:  # texts with gaps are written as categories
        obs[name] = obs[name].map(str, na_action="ignore").astype("category")
    obs.index.name = None
    return anndata.AnnData(vectors, obs=obs, uns={"gigapath": {"embedding": embedding, "folder": found.name}})
