"""Which files below a folder hold tile embeddings, and what each says of itself before it is read."""

import fnmatch
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigapath.features.cells import SLIDE2VEC_COORDINATES, SLIDEFLOW_INDEX, all_facts, flat_json, two_axes
from gigapath.features.data import Array, Attrs, FeatureFileError
from gigapath.features.gigapath_file import check_ours, stage_of
from gigapath.features.h5 import find_dataset, name_in, open_h5, read_attrs
from gigapath.features.reading import read_features
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
            read_features(path, cells=False)  # says what is wrong with it
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
