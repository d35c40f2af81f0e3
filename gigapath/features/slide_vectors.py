"""One vector a slide, from the files of any tool: what `gigapath check --slide-embeddings` compares."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.arrays import read_npy, read_npz, read_tensor
from gigapath.features.cells import flat_json
from gigapath.features.data import Array, FeatureFileError
from gigapath.features.gigapath_file import read_slide, stage_of
from gigapath.features.h5 import open_h5, read_attrs, read_dataset
from gigapath.files import small_json, visible_files

_SUFFIXES = (".h5", ".pt", ".npz", ".npy")
# What a file may say of how its vectors were made.
_STATED = (
    *("tool", "recipe", "embedding", "encoder", "slide_encoder", "encoder_name", "slide_precision", "precision"),
    *("trained", "version", "package_version", "feat_type", "aggregation_revision"),
)


@dataclass(frozen=True)
class SlideVectors:
    """Vectors of slides, of one tool: slide id -> (E,) float32, and what the files say of how they were made (the
    first, of several)."""

    path: Path
    vectors: Mapping[str, Array]
    stated: Mapping[str, Any]

    @property
    def width(self) -> int:
        """E."""
        return len(next(iter(self.vectors.values())))


def read_slide_vectors(path: Path | str) -> SlideVectors:
    """Read a file of slide vectors or a folder of such files: ours (of our own files the default embedding, or that of
    the tool that they name), tables of `gigapath convert`, TRIDENT's, STAMP's (one file for all slides), slide2vec's,
    and plain vectors (.npy, .pt, .npz). FileNotFoundError; FeatureFileError for nothing that is known, vectors of
    several widths, values that are not finite."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file or folder of slide vectors, found none.")
    files = visible_files(path, "*") if path.is_dir() else [path]
    files = [file for file in files if file.suffix in _SUFFIXES] if path.is_dir() else files
    found: dict[str, Array] = {}
    stated: dict[str, Any] = {}
    for file in files:
        vectors, attrs = _read(file)
        stated = stated or {name: attrs[name] for name in _STATED if attrs.get(name) not in (None, "")}
        for slide_id, vector in vectors.items():
            found[slide_id] = np.asarray(vector, dtype=np.float32).reshape(-1)
    if not found or len({len(vector) for vector in found.values()}) > 1:
        raise FeatureFileError(f"{path}: expected vectors of slides, all of one width, got {len(found)} vectors.")
    broken = next((slide_id for slide_id, vector in found.items() if not np.isfinite(vector).all()), None)
    if broken is not None:
        raise FeatureFileError(f"{path}: expected finite values, got NaN or infinity in the vector of {broken!r}.")
    return SlideVectors(path, found, stated)


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """The vectors of one file by slide, and its attributes."""
    if path.suffix == ".h5":
        return _read_h5(path)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in rows[0] if name.removeprefix("e").isdigit()] if rows else []
        if not columns or "slide_id" not in rows[0]:
            raise FeatureFileError(
                f"{path.name}: expected the columns slide_id, e0, e1, ..., as a table of `gigapath convert` has."
            )
        table = {row["slide_id"]: np.array([row[name] for name in columns], dtype=np.float32) for row in rows}
        return table, {"tool": "gigapath", **{name: value for name, value in rows[0].items() if name in _STATED}}
    sidecar = flat_json(small_json(path.with_name(f"{path.stem}.meta.json")) or {})
    stated = {"tool": "slide2vec", **sidecar} if sidecar else {}
    if path.suffix == ".npy":
        return _one(path, read_npy(path)), stated
    if path.suffix == ".pt":
        return _one(path, read_tensor(path)), stated
    held = read_npz(path)
    if {"slide_ids", "vectors"} <= set(held):
        attrs = json.loads(str(held["attrs"])) if "attrs" in held else {}
        return dict(zip(map(str, held["slide_ids"]), held["vectors"], strict=True)), {"tool": "gigapath", **attrs}
    if "features" in held:
        return _one(path, held["features"]), stated
    return {name: vector for name, vector in held.items() if vector.ndim == 1}, stated


def _read_h5(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    with open_h5(path) as file:
        ours, attrs = stage_of(file), read_attrs(file)
        if ours is None:
            names = [name for name in file if getattr(file[name], "ndim", 0) in (1, 2) and file[name].dtype.kind == "f"]
            single = next((name for name in ("features", "feats") if name in names), None)
            if single is not None:
                tool = {"tool": "trident"} if single == "features" else {"tool": "stamp"}
                return _one(path, read_dataset(file, single)), {**tool, **attrs, **read_attrs(file[single])}
            return {name: read_dataset(file, name) for name in names}, {"tool": "stamp", **attrs}
    slide = read_slide(path)
    recipe = slide.attrs.get("recipe")
    name = str(recipe or "default" if slide.default_mean is not None else "tile-mean")
    return {slide.slide_id: slide.select(name)}, {"tool": "gigapath", "embedding": name, **slide.attrs}


def _one(path: Path, vector: Array) -> dict[str, Array]:
    if vector.ndim == 0 or vector.size != vector.shape[-1]:
        raise FeatureFileError(f"{path.name}: expected one vector of a slide, got {vector.shape}.")
    return {path.stem: vector}
