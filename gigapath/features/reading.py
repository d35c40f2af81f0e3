"""Which files hold tile embeddings, and the one reader of them: our files and other tools', to the same dataclass."""

import fnmatch
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath.features.cells import (
    SLIDE2VEC_COORDINATES,
    SLIDEFLOW_INDEX,
    all_facts,
    as_pair,
    cells_of,
    flat_json,
    name_in,
    observed_step,
    row_major,
    two_axes,
)
from gigapath.features.data import STEP_OPTION, Array, Attrs, Contents, FeatureFileError, TileEmbeddings
from gigapath.features.gigapath_file import STATES, check_ours, stage_of
from gigapath.features.h5 import check_undamaged, find_dataset, is_complete, open_h5, read_attrs, read_dataset
from gigapath.files import is_hidden, real_path, small_json, visible_files

# Looked for in this order: a folder that holds some of the first holds no features under the others.
SUFFIXES = (".h5", ".npz", ".pt")
# Folders of a run, ours or another tool's, that hold something else than tile embeddings.
_OTHER_FOLDERS = (
    *("tiles", "patches", "slides_*", "as-*", "slide_features_*", "slide_embeddings"),
    *("maps", "private", "runs"),
)
# What `gigapath map` and `gigapath convert` write: no tile embeddings, and no fault where they lie in the folder.
_NO_FEATURES = ({"values.npy", "cells.npy"}, {"slide_ids.npy", "vectors.npy"})
# Attributes by which files say how far apart their tiles lie (ours, TRIDENT's, CLAM's and Mussel's, STAMP's).
_STEPS = ("tile_size_level0", "patch_size_level0", "patch_size", "step_size", "tile_size_um", "tile_size_lv0")

# Where hints at an encoder are looked for.
_ENCODER = re.compile(r"encoder|extractor|model|backbone", re.IGNORECASE)
_FEW_FILES = 8

# Our stages: what their files hold, the datasets that each has, and all that are read.
_TILES = ("coords", "cells", "tissue_fraction", "section", "qc")
_OURS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "tiles": ("tiles", ("coords", "cells", "tissue_fraction"), _TILES),
    "features": ("tile embeddings", ("features", "coords", "cells"), ("features", *_TILES)),
    "slide": ("slide embeddings", (), STATES),
}

# Rows that are looked at at once, so that a check needs no second copy of a large array.
_CHECK_ROWS = 4096


def list_feature_files(folder: Path, *, leave_out: Sequence[str] = ()) -> list[Path]:
    """Every file below a folder that may be a feature file of any kind, sorted; folders whose names match `leave_out`
    are not entered. Hidden files and folders, temporary files, maps, tables, slide2vec's coordinates and slideflow's
    are none."""
    found, seen = [], set[Path]()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out)
        ]
        real = real_path(Path(place))
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        paths = [Path(place, name) for name in names if Path(name).suffix in SUFFIXES and not is_hidden(name)]
        apart = (SLIDE2VEC_COORDINATES, SLIDEFLOW_INDEX)
        found += [path for path in paths if not path.name.endswith(apart) and not _is_map_or_table(path)]
    return sorted(found)


def _is_map_or_table(path: Path) -> bool:
    """Whether an .npz is a map or an exported table; one that can't be opened counts as a feature file."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    return any(own <= names for own in _NO_FEATURES)


def find_feature_files(inputs: Path | str | Iterable[Path | str]) -> list[Path]:
    """The files of tile embeddings that are named, and those below folders that are named, each once.

    Of a run's folder, ours or another tool's, these are the files of its one encoder. FileNotFoundError where an input
    does not exist, ValueError where a folder has none, or those of several encoders.
    """
    found: dict[Path, None] = {}
    for path in map(Path, [inputs] if isinstance(inputs, Path | str) else inputs):
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a file or folder of tile embeddings, found none.")
        found.update(dict.fromkeys(_inside(path) if path.is_dir() else [path]))
    return list(found)


def _inside(folder: Path) -> list[Path]:
    files = list_feature_files(folder, leave_out=_OTHER_FOLDERS)
    of_encoders: dict[str, list[Path]] = {}
    for path in files:
        below = path.relative_to(folder).parts[:-1]
        name = next((part for part in below if part.startswith("features_")), None)
        if name is not None:
            of_encoders.setdefault(name, []).append(path)
    if len(of_encoders) > 1:
        names = ", ".join(sorted(of_encoders))
        raise ValueError(f"{folder}: expected the tile embeddings of one encoder, got {names}. Name one of them.")
    files = next(iter(of_encoders.values()), files)
    for suffix in SUFFIXES:
        found = [path for path in files if path.suffix == suffix]
        if found:
            return found
    from gigapath.features.other_tools import refused_inside

    refused = refused_inside(folder)
    if refused is not None:
        raise ValueError(f"{folder}: expected files of tile embeddings ({', '.join(SUFFIXES)}), found {refused}")
    others = [str(path.relative_to(folder)) for path in list_feature_files(folder)[:1]]
    found_there = f"only such as {others[0]}" if others else "none"
    raise ValueError(f"{folder}: expected files of tile embeddings ({', '.join(SUFFIXES)}), found {found_there}.")


def slide_name(path: Path) -> str:
    """The slide of a feature file by its name: without the suffix, and without Mussel's `.patch`."""
    return path.name.removesuffix(path.suffix).removesuffix(".patch")


@dataclass(frozen=True)
class FeatureFacts:
    """What a file of `tiles` x `width` embeddings says of itself: the tile encoder that it names, or None; all
    attributes; the first and the last embeddings (`ends`), which tell slides apart; whether it says how far apart its
    tiles lie."""

    tiles: int
    width: int
    encoder: str | None
    attrs: Attrs
    ends: Array
    states_step: bool

    @property
    def of_our_run(self) -> bool:
        """Whether this package computed the embeddings: such a file names its encoder."""
        return "implementation" in self.attrs and "converted_from" not in self.attrs


def encoder_hints(path: Path, attrs: Attrs) -> list[str]:
    """What a file of tile embeddings, the JSON files beside it and its folders say of the encoder, in words."""
    found = [f"{name} {value!r}"[:100] for name, value in all_facts(attrs).items() if _ENCODER.search(name)]
    folder = path.absolute().parent
    beside = [file for place in (folder, folder.parent) for file in visible_files(place, "*.json")[:_FEW_FILES]]
    for file in beside:
        stated = flat_json(small_json(file))
        found += [f"{name} {stated[name]!r}"[:100] for name in stated if _ENCODER.search(name)]
    return [*list(dict.fromkeys(found))[:_FEW_FILES], f"folder {folder.parent.name}/{folder.name}"]


def look_at_features(path: Path) -> FeatureFacts:
    """What a file says of itself; the embeddings of an h5 file are not read, but for a few. FileNotFoundError, or
    FeatureFileError where it is none of tile embeddings, is cut off or has no coordinates."""
    if path.suffix != ".h5":
        found = read_features(path, cells=False)
        return _facts(found.features.shape, found.encoder, found.attrs, found.features[:4], found.features[-4:])
    with open_h5(path) as file:
        if stage_of(file) is not None:
            check_ours(file, "features")
        name = "feats" if "feats" in file else "features"
        if name not in file or "coords" not in file or getattr(file[name], "ndim", 0) < 2:  # a group has none
            _check_kind(_read_open(path, file, None, "iuf"))
        features, coords = find_dataset(file, name), find_dataset(file, "coords")
        shape = two_axes(np.broadcast_to(np.float32(0), features.shape)).shape
        if len(shape) != 2 or features.dtype.kind != "f":
            raise FeatureFileError(
                f"{path.name}: expected embeddings (N, D) of floats, got {features.shape} of {features.dtype}."
            )
        attrs = {**read_attrs(file), **read_attrs(coords), **read_attrs(features)}
        batch = (slice(None),) * (features.ndim - 2 if features.shape[0] == 1 else 0)
        first, last = (features[batch + (slice(at, at + 4),)] for at in (0, max(0, shape[0] - 4)))  # noqa: RUF005
    return _facts(shape, name_in(attrs, "encoder", "extractor"), attrs, first, last)


def _facts(shape: tuple[int, ...], encoder: str | None, attrs: Attrs, *ends: Array) -> FeatureFacts:
    some = np.concatenate([end.reshape(-1) for end in ends])
    return FeatureFacts(
        int(shape[0]), int(shape[1]), encoder, attrs, some, any(attrs.get(name) is not None for name in _STEPS)
    )


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
    _check_shapes(held)
    _check_values(held, embed_dim)
    step = held.step
    if tile_size_level0 is not None:
        if step is not None:
            _check_stated(tile_size_level0, float(np.mean(step)), path)
        elif held.complete is None:
            step = (tile_size_level0, tile_size_level0)
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
        return _read_open(path, file, coordinates, kinds)


def _read_open(path: Path, file: h5py.File, coordinates: Path | None, kinds: str) -> Contents:
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
    qc_names = tuple(read_attrs(file["qc"]).get("names") or ()) if "qc" in arrays else ()
    return Contents(
        path=path,
        kind=kind,
        tool="gigapath",
        slide_id=str(name_in(attrs, "slide_id")),
        qc_names=qc_names,
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


def is_ours(path: Path) -> bool:
    """Whether a file is one of this package's, rather than another tool's."""
    if path.suffix in (".npz", ".pt"):
        return False
    with open_h5(path) as file:
        return stage_of(file) is not None


def _embeddings(held: Contents, step: tuple[float, float] | None, *, cells: bool, sort: bool) -> TileEmbeddings:
    """A file's tile embeddings: float32 or float16, with cells (ours as stored, others' derived), in their order."""
    path, features, coords, order = held.path, held.features, held.coords, None
    assert features is not None and coords is not None  # `_check_shapes` has seen them
    fractions, places = held.tissue_fraction, held.cells
    if held.complete is not None:
        assert places is not None
        if row_major(places) is not None:
            raise FeatureFileError(f"{path.name}: its cells are not in row-major order, each once. Make it again.")
    else:
        features = features if features.dtype in (np.float32, np.float16) else features.astype(np.float32)
        coords = coords.astype(np.float64 if coords.dtype.kind == "f" else np.int64)
        if cells:
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


def _check_stated(stated: float, found: float, path: Path) -> None:
    if abs(stated - found) > 0.005 * found:
        raise FeatureFileError(
            f"{path.name}: the file says that its tiles lie {found:g} apart, {STEP_OPTION} says {stated:g}. "
            "Leave the option out."
        )


def _check_shapes(held: Contents) -> None:
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


def _check_values(held: Contents, embed_dim: int | None) -> None:
    features, name = held.features, held.path.name
    assert features is not None
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
