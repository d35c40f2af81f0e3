"""Feature files for tests: a slide's tiles off the diagonal, and the files that each tool would write for them.

The layouts are restated from what each tool documents of its own files; no code of theirs runs here.
"""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath.features import TileEmbeddingsWriter, Tiles

# Columns and rows of the kept tiles: not square, not symmetric, with a gap, in row-major order.
CELLS = np.array([[3, 1], [4, 1], [7, 1], [3, 2], [4, 2], [5, 2], [6, 2], [5, 4]], dtype=np.int32)


def make_tiles(slide_id: str = "slide-1", cells: np.ndarray = CELLS, pitch: int = 512, **changes: Any) -> Tiles:
    """Tiles of a 40x slide: 512 level-0 pixels make one 256-px tile at 0.5 mpp, read from level 1 as it is."""
    count = len(cells)
    fields: dict[str, Any] = {
        "slide_id": slide_id,
        "coords_level0": np.asarray(cells, dtype=np.int64) * pitch,
        "cells": cells,
        "tissue_fraction": np.linspace(0.2, 1.0, count),
        "section": np.arange(count) % 2 + 1,
        "qc": np.stack([np.arange(count), -np.arange(count)], axis=1) / 8,
        "qc_names": ("focus", "pen_hue"),
        "level": 1,
        "read_size": (256, 256),
        "tile_size": 256,
        "tile_size_level0": (pitch, pitch),
        "mpp": 0.5,
        "attrs": {
            "slide_size": (6000, 4000),
            "level_size": (3000, 2000),
            "level_downsample": 2.0,
            "objective_power": 40,
            "tissue_method": "otsu",
            "tissue_threshold": None,
        },
    }
    return Tiles(**{**fields, **changes})


def make_features(count: int = len(CELLS), width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def shuffled(count: int) -> np.ndarray:
    """An order that is neither by row nor by column."""
    return np.random.default_rng(5).permutation(count)


def write_gigapath(path: Path, features: np.ndarray, tiles: Tiles | None = None, **options: Any) -> Path:
    """Our own file, written in blocks."""
    tiles = make_tiles() if tiles is None else tiles
    with TileEmbeddingsWriter(path, tiles, embed_dim=features.shape[1], **options) as writer:
        for start in range(0, len(features), 3):
            writer.write(start, features[start : start + 3])
    return path


def write_h5(path: Path, datasets: dict[str, np.ndarray], attrs: dict[str, dict[str, Any]] | None = None) -> Path:
    """A plain h5 file; attributes by dataset name, "" for the root."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file.create_dataset(name, data=data)
        for name, values in (attrs or {}).items():
            for key, value in values.items():
                (file[name] if name else file).attrs[key] = value
    return path


TRIDENT_COORDS = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "slide-1",
    "savetodir": "somewhere",
    "level0_width": 6000,
    "level0_height": 4000,
}
CLAM_COORDS = {
    "patch_size": 256,
    "patch_level": 1,
    "downsample": np.array([2.0, 2.0]),
    "downsampled_level_dim": np.array([3000, 2000]),
    "level_dim": np.array([3000, 2000]),
    "name": "slide-1",
    "save_path": "somewhere",
}
STAMP_ROOT = {
    "stamp_version": "2.4.0",
    "extractor": "gigapath",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "code_hash": "0" * 8,
    "feat_type": "tile",
}


def write_trident(folder: Path, features: np.ndarray, cells: np.ndarray = CELLS, **coords_attrs: Any) -> Path:
    attrs = {**TRIDENT_COORDS, **coords_attrs}
    path = folder / "features_gigapath" / "slide-1.h5"
    coords = np.asarray(cells, np.int64) * 512
    named = {"name": "slide-1", "savetodir": "somewhere", "encoder": "gigapath"}
    return write_h5(path, {"features": features, "coords": coords}, {"coords": attrs, "features": named})


def write_clam(folder: Path, features: np.ndarray, cells: np.ndarray = CELLS, *, patches: bool = True) -> Path:
    coords = np.asarray(cells, np.int32) * 512
    if patches:
        write_h5(folder / "patches" / "slide-1.h5", {"coords": coords}, {"coords": CLAM_COORDS})
    return write_h5(folder / "h5_files" / "slide-1.h5", {"features": features, "coords": coords})


def write_stamp(folder: Path, features: np.ndarray, cells: np.ndarray = CELLS, **root: Any) -> Path:
    coords = (np.asarray(cells) * 256.0).astype(np.float32)
    return write_h5(
        folder / "gigapath-00000000" / "slide-1.h5",
        {"feats": features.astype(np.float16), "coords": coords},
        {"": {**STAMP_ROOT, **root}},
    )


def write_mussel(folder: Path, features: np.ndarray, cells: np.ndarray = CELLS) -> Path:
    path = folder / "tile_h5" / "slide-1.patch.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, compression="gzip", chunks=True)
        # Mussel's grid starts at the tissue, not at the slide's corner.
        coords = file.create_dataset("coords", data=np.asarray(cells, np.int64) * 509 + (101, 300), compression="gzip")
        coords.attrs.update({"patch_size": 509, "step_size": 509, "patch_level": 0, "mpp": 0.5, "native_mpp": 0.2515})
    return path


def write_published(folder: Path, features: np.ndarray, cells: np.ndarray = CELLS) -> Path:
    coords = (np.asarray(cells) * 256).astype(np.float32)
    return write_h5(folder / "h5_files" / "slide-1.h5", {"features": features, "coords": coords})


def write_slide2vec(
    folder: Path, features: np.ndarray, cells: np.ndarray = CELLS, *, order: np.ndarray | None = None
) -> Path:
    """`order` shuffles the embeddings against the coordinates; their tile_index says so."""
    order = np.arange(len(features)) if order is None else order
    (folder / "tile_embeddings").mkdir(parents=True)
    (folder / "tiles").mkdir()
    index = np.arange(len(features), dtype=np.int32)
    path = folder / "tile_embeddings" / "slide-1.npz"
    np.savez_compressed(path, features=features[order], tile_index=index[order])
    np.savez_compressed(
        folder / "tiles" / "slide-1.coordinates.npz",
        tile_index=index,
        x=np.asarray(cells)[:, 0].astype(np.int64) * 512,
        y=np.asarray(cells)[:, 1].astype(np.int64) * 512,
        tissue_fractions=np.linspace(0.2, 1.0, len(features)).astype(np.float32),
    )
    tiling = {"tiling": {"tile_size_lv0": 512, "step_px_lv0": 512, "overlap": 0.0}, "tile_order": "x_then_y"}
    (folder / "tiles" / "slide-1.coordinates.meta.json").write_text(json.dumps(tiling))
    meta = {"encoder_name": "prov-gigapath", "tile_size_lv0": 512, "requested_spacing_um": 0.5}
    (folder / "tile_embeddings" / "slide-1.meta.json").write_text(json.dumps(meta))
    return path


def write_slideflow(folder: Path, features: np.ndarray, cells: np.ndarray = CELLS) -> Path:
    """A bag: the tensor, the centers of its tiles in an index beside it, and what made them."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(features), folder / "slide-1.pt")
    np.savez(folder / "slide-1.index.npz", arr_0=np.asarray(cells, np.int64) * 512 + 256)
    config = {"extractor": {"class": "gigapath"}, "normalizer": None, "num_features": 6, "tile_px": 256, "tile_um": 128}
    (folder / "bags_config.json").write_text(json.dumps(config))
    return folder / "slide-1.pt"


def write_foreign(tool: str, folder: Path, features: np.ndarray, order: np.ndarray) -> Path:
    """The file that `tool` would write for the slide of CELLS, its tiles in `order`."""
    if tool == "slide2vec":
        return write_slide2vec(folder, features, order=order)
    write = {
        "trident": write_trident,
        "clam": write_clam,
        "stamp": write_stamp,
        "mussel": write_mussel,
        "published": write_published,
    }[tool]
    return write(folder, features[order], CELLS[order])
