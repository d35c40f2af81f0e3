"""The tile embeddings of other tools, each read into the same `Held`: what the file says and no more.

TRIDENT, CLAM, Mussel, STAMP (h5), slide2vec (npz or pt beside a coordinates npz), and the published fine-tuning
files (features and float coordinates without attributes). Which tool it was is told by what the file holds.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath.features.cells import OPTION
from gigapath.features.data import Array, Attrs, FeatureFileError
from gigapath.features.h5 import open_h5, read_attrs, read_dataset
from gigapath.features.npz import read_npz

# Reads the one tensor of a `.pt` file as (N, D): handed in by code that may import torch.
TensorReader = Callable[[Path], Array]

_NO_STEP = f"it does not say how far apart its tiles lie. State it with {OPTION}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What a file of another tool holds.

    Attributes:
        source: the tool.
        features: (N, D).
        coords: (N, 2) (x, y) in the unit that `frame` names.
        frame: a key of `gigapath.features.data.FRAMES`.
        step: distance between neighbouring tiles (x, y) in that unit, None where the file does not say.
        no_step: why `step` is None.
        encoder: the tile encoder that the file names.
        tissue_fraction: (N,), or None.
        attrs: all attributes together.
    """

    source: str
    features: Array
    coords: Array
    frame: str
    step: tuple[float, float] | None
    no_step: str = _NO_STEP
    encoder: str | None = None
    tissue_fraction: Array | None = None
    attrs: Attrs = dataclasses.field(default_factory=dict)


def read_foreign_h5(path: Path, *, coordinates: Path | None) -> Held:
    """An h5 file of TRIDENT, CLAM, Mussel, STAMP or the published fine-tuning code.

    Args:
        path: the file.
        coordinates: CLAM's coordinates file of the same slide, or None to look in the `patches` folder beside the
            features' own folders.
    """
    with open_h5(path) as file:
        name = "feats" if "feats" in file else "features"
        if name not in file or "coords" not in file:
            inside = ", ".join(sorted(file)) or "nothing"
            raise FeatureFileError(f"{path.name}: expected datasets 'features' and 'coords', got {inside}.")
        features = _squeezed(read_dataset(file, name), path)
        coords = read_dataset(file, "coords")
        root, of_features, of_coords = read_attrs(file), read_attrs(file[name]), read_attrs(file["coords"])
    attrs = {**root, **of_features, **of_coords}
    if name == "feats":
        return _stamp(features, coords, attrs, path)
    if "patch_size_level0" in of_coords:
        return _trident(features, coords, attrs)
    if "patch_size" in of_coords:
        return _mussel_or_clam(features, coords, attrs)
    if coords.dtype.kind == "f":
        # Every tool that writes whole level-0 pixels writes them as integers; the published files are float32, at
        # whichever level the tiles were cut.
        return Held(source="published", features=features, coords=coords, frame="unstated", step=None, attrs=attrs)
    return _clam(features, coords, attrs, path, coordinates)


def _squeezed(features: Array, path: Path) -> Array:
    """(N, D) of (N, D) or of some forks' (1, N, D)."""
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    if features.ndim == 1:
        raise FeatureFileError(f"{path.name}: expected tile embeddings (N, D), got one slide vector {features.shape}.")
    return features


def _trident(features: Array, coords: Array, attrs: Attrs) -> Held:
    size = _number(attrs, "patch_size_level0")
    overlap = _number(attrs, "overlap") or 0
    step, why = ((size, size) if size else None), _NO_STEP
    if overlap:
        step, why = None, f"its tiles overlap by {overlap:g} pixels. State the distance between them with {OPTION}"
    return Held(
        source="trident",
        features=features,
        coords=coords,
        frame="level0",
        step=step,
        no_step=why,
        encoder=_text(attrs, "encoder"),
        attrs=attrs,
    )


def _mussel_or_clam(features: Array, coords: Array, attrs: Attrs) -> Held:
    """Mussel writes pixels of level 0 and the mpp; CLAM pixels of `patch_level` and its downsample."""
    if "mpp" in attrs or "native_mpp" in attrs:
        size = _number(attrs, "step_size") or _number(attrs, "patch_size")
        step = (size, size) if size else None
        encoder = _text(attrs, "model_type") or _text(attrs, "encoder")
        return Held(
            source="mussel",
            features=features,
            coords=coords,
            frame="level0",
            step=step,
            encoder=encoder,
            attrs=attrs,
        )
    return Held(source="clam", features=features, coords=coords, frame="level0", step=clam_step(attrs), attrs=attrs)


def _clam(features: Array, coords: Array, attrs: Attrs, path: Path, coordinates: Path | None) -> Held:
    """CLAM's features carry no attributes; its coordinates file of the same slide does."""
    beside = coordinates or path.parent.parent / "patches" / path.name
    if coordinates is None and not beside.is_file():
        why = f"{_NO_STEP}, or name CLAM's coordinates file (patches/{path.name})"
        return Held(
            source="clam", features=features, coords=coords, frame="level0", step=None, no_step=why, attrs=attrs
        )
    with open_h5(beside) as file:
        stored = read_dataset(file, "coords")
        beside_attrs = read_attrs(file["coords"])
    if not np.array_equal(stored, coords):
        raise FeatureFileError(f"{path.name}: its coordinates differ from those of {beside.name} of CLAM's patches.")
    step = clam_step(beside_attrs)
    return Held(
        source="clam", features=features, coords=coords, frame="level0", step=step, attrs={**attrs, **beside_attrs}
    )


def clam_step(attrs: Attrs) -> tuple[float, float] | None:
    """The level-0 size (x, y) of CLAM's patches: `patch_size` at `patch_level` times that level's downsample. Old
    files' `custom_downsample` shrinks the patch after reading and does not change it."""
    size = _number(attrs, "patch_size")
    downsample = attrs.get("downsample")
    if downsample is None and attrs.get("patch_level") == 0:
        downsample = 1.0
    if not size or downsample is None:
        return None
    try:
        x, y = np.broadcast_to(np.asarray(downsample, dtype=np.float64), (2,)).tolist()
    except ValueError:
        return None
    return size * x, size * y


def _stamp(features: Array, coords: Array, attrs: Attrs, path: Path) -> Held:
    """STAMP counts in micrometres; version 2 calls the tile's size `tile_size`, the first versions counted in 224-px
    tiles."""
    if attrs.get("feat_type") not in (None, "tile"):
        raise FeatureFileError(f"{path.name}: expected STAMP tile features, got feat_type {attrs['feat_type']!r}.")
    size, frame, why = _number(attrs, "tile_size_um"), "um", _NO_STEP
    if size is None and attrs.get("unit") == "um":
        size = _number(attrs, "tile_size")
    elif size is None:
        size, frame = _number(attrs, "tile_size"), "unstated"
        why = f"it states no unit (an early STAMP file: 224, if so). State the distance of its tiles with {OPTION}"
    return Held(
        source="stamp",
        features=features,
        coords=coords,
        frame=frame,
        step=(size, size) if size else None,
        no_step=why,
        encoder=_text(attrs, "extractor"),
        attrs=attrs,
    )


def read_slide2vec(path: Path, *, coordinates: Path | None, read_tensor: TensorReader | None) -> Held:
    """slide2vec's `tile_embeddings/<id>.npz` or `.pt` with `tiles/<id>.coordinates.npz` and the JSON beside them.

    Args:
        path: the embeddings.
        coordinates: the coordinates npz, or None to look in the `tiles` folder beside `tile_embeddings`.
        read_tensor: reads a `.pt` file; without one, such a file is an error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    beside = coordinates or path.parent.parent / "tiles" / f"{path.stem}.coordinates.npz"
    if path.suffix == ".npz":
        held = read_npz(path)
        if "features" not in held:
            names = sorted(held)
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise FeatureFileError(f"{path.name}: expected an array 'features', got {shown or 'none'}.")
        features, index = held["features"], held.get("tile_index")
    elif read_tensor is None:
        raise FeatureFileError(
            f"{path.name}: a .pt file needs torch to be read. Pass read_tensor, or give the .npz or .h5 of this slide."
        )
    else:
        features, index = np.asarray(read_tensor(path)), None
    features = _squeezed(features, path)
    if not beside.is_file():
        raise FileNotFoundError(f"{beside}: no such file; it holds the coordinates of {path.name} (slide2vec).")
    places = read_npz(beside)
    missing = [name for name in ("x", "y") if name not in places]
    if missing:
        raise FeatureFileError(f"{beside.name}: expected arrays x and y, got {', '.join(sorted(places))}.")
    coords = np.stack([places["x"], places["y"]], axis=1)
    fractions = places.get("tissue_fractions")
    if index is not None and "tile_index" in places:
        rows = _rows_of(index, places["tile_index"], path)
        coords, fractions = coords[rows], None if fractions is None else fractions[rows]
    meta = _read_json(beside.with_name(f"{beside.name.removesuffix('.npz')}.meta.json"))
    attrs = {**_flat(meta), **_flat(_read_json(path.with_name(f"{path.stem}.meta.json")))}
    size = _number(attrs, "step_px_lv0") or (None if _number(attrs, "overlap") else _number(attrs, "tile_size_lv0"))
    return Held(
        source="slide2vec",
        features=features,
        coords=coords,
        frame="level0",
        step=(size, size) if size else None,
        encoder=_text(attrs, "encoder_name"),
        tissue_fraction=None if fractions is None else fractions.astype(np.float32),
        attrs=attrs,
    )


def _rows_of(wanted: Array, held: Array, path: Path) -> Array:
    """Where each tile index of the embeddings stands among those of the coordinates."""
    order = np.argsort(held, kind="stable")
    positions = np.searchsorted(held, wanted, sorter=order)
    found = np.append(held[order], -1)[positions] == wanted
    if not found.all() or len(np.unique(wanted)) != len(wanted) or len(np.unique(held)) != len(held):
        raise FeatureFileError(f"{path.name}: its tile_index does not match the coordinates of the slide one to one.")
    return np.asarray(order[positions])


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FeatureFileError(f"{path.name}: expected JSON, got something that is not ({error}).") from error


def _flat(value: Any) -> dict[str, Any]:
    """The plain values of nested JSON objects by their own names; the outermost of equal names stays."""
    if not isinstance(value, Mapping):
        return {}
    found: dict[str, Any] = {}
    for inner in value.values():
        found.update(_flat(inner))
    found.update({str(name): entry for name, entry in value.items() if isinstance(entry, str | int | float | bool)})
    return found


def _number(attrs: Attrs, name: str) -> float | None:
    value = attrs.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return float(value)


def _text(attrs: Attrs, name: str) -> str | None:
    value = attrs.get(name)
    return value if isinstance(value, str) and value else None


def coordinates_file_step(file: h5py.File) -> tuple[str, tuple[float, float] | None] | None:
    """The tool and step of a file that holds coordinates alone (TRIDENT's, CLAM's or Mussel's), else None."""
    if "coords" not in file or "features" in file or "feats" in file:
        return None
    attrs = read_attrs(file["coords"])
    nothing = np.zeros((0, 0), np.float32)
    if "patch_size_level0" in attrs:
        held = _trident(nothing, nothing, attrs)
    elif "patch_size" in attrs:
        held = _mussel_or_clam(nothing, nothing, attrs)
    else:
        return "unknown", None
    return held.source, held.step
