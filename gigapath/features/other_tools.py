"""The files of other tools, a part of this module for each: how its files are recognised and read, what the file
says and no more, and how they are written.

TRIDENT, CLAM, Mussel, STAMP (h5), slide2vec (npz or pt beside a coordinates npz), slideflow (pt beside an index npz),
and the published fine-tuning files (features and float coordinates without attributes). What is refused by name stands
in REFUSED. What a tool's file needs and the source does not say (the slide's mpp) is stated, never guessed.
"""

import contextlib
import dataclasses
import filecmp
import io
from collections.abc import Callable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import h5py
import numpy as np

from gigapath.features.arrays import read_npz, read_tensor
from gigapath.features.cells import (
    SLIDE2VEC_COORDINATES,
    SLIDEFLOW_INDEX,
    all_facts,
    cells_of,
    flat_json,
    tile_mpp,
    tile_pixels,
    two_axes,
)
from gigapath.features.data import CELL, STEP_OPTION, Array, Attrs, Contents, FeatureFileError, TileEmbeddings
from gigapath.features.gigapath_file import nominal_magnification, trident_attrs, write_root
from gigapath.features.h5 import (
    H5Writer,
    as_number,
    as_pair,
    name_in,
    open_h5,
    read_attrs,
    read_dataset,
    withdraw_sha256,
    write_attrs,
)
from gigapath.file_names import safe_name
from gigapath.files import own_folder, publish, small_json, write_bytes_atomic, write_json_atomic

# `numerics_version` of embeddings that another tool computed: never equal to one of ours.
FOREIGN_NUMERICS = 0

Step = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What converting may need beyond the file, each None where it is not stated: microns per pixel of the slide's
    level 0, and of the level that the coordinates count in, for the published files."""

    slide_mpp: float | None = None
    coords_mpp: float | None = None


# ---------------------------------------------------------------------------------------------- recognising and reading


def read_h5(path: Path, file: h5py.File, coordinates: Path | None = None) -> Contents:
    """An open h5 file of another tool; FeatureFileError where it is nothing that is known. `coordinates` is the file of
    the same slide's coordinates, or a folder of such files, for tools that keep them apart; None to look where the tool
    puts them."""
    root = read_attrs(file)
    name = "feats" if "feats" in file else "features"
    found = file.get(name)
    numbers = isinstance(found, h5py.Dataset) and found.dtype.kind in "iuf"
    if numbers and (found.ndim == 1 or (name == "feats" and root.get("feat_type") not in (None, "tile"))):
        return _slide_vector(path, root, file, name)
    held: dict[str, Any] = {"path": path, "slide_id": path.name.removesuffix(path.suffix)}
    if "coords" not in file or (name not in file and not isinstance(file["coords"], h5py.Dataset)):
        inside = ", ".join(sorted(file)[:10]) or "nothing"
        raise FeatureFileError(f"{path.name}: expected datasets 'features' and 'coords', got {inside}.")
    of_coords = read_attrs(file["coords"])
    if name not in file:
        coords = two_axes(read_dataset(file, "coords"))
        held |= {"kind": "tile coordinates", "coords": coords, "attrs": {**root, **of_coords}}
        return _of_coordinates(of_coords, held) or Contents(tool="unknown", **held)
    features, coords = two_axes(read_dataset(file, name)), two_axes(read_dataset(file, "coords"))
    held |= {"features": features, "coords": coords, "attrs": {**root, **read_attrs(file[name]), **of_coords}}
    if name == "feats":
        return _stamp(held)
    of_coords_file = _of_coordinates(of_coords, held)
    if of_coords_file is not None:
        return of_coords_file
    if coords.dtype.kind == "f":
        # Every tool that writes whole level-0 pixels writes them as integers; the published files are float32, at
        # whichever level the tiles were cut.
        return Contents(tool="published", frame="unstated", **held)
    return _clam(held, coordinates)


def read_arrays(path: Path, coordinates: Path | None = None) -> Contents:
    """An `.npz`, `.pt` or `.npy` file of another tool; arguments and errors as `read_h5`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix in REFUSED:
        raise FeatureFileError(f"{path.name}: {REFUSED[path.suffix]}")
    if _is_slide2vec(path):
        return _read_slide2vec(path, coordinates)
    index = _beside(coordinates, [path.with_name(f"{path.stem}{SLIDEFLOW_INDEX}")])
    if index is not None and index.name.endswith(SLIDEFLOW_INDEX):
        return _read_slideflow(path, index)
    return _read_clam_tensor(path, coordinates)


def refused_inside(folder: Path) -> str | None:
    """What a folder is, or holds, of a tool whose files are not read, and what to do; None where nothing is known."""
    if folder.suffix in REFUSED:
        return REFUSED[folder.suffix]
    found = (next(folder.rglob(pattern), None) for pattern in ("*.zarr", "features.npy"))
    return next((f"{path.relative_to(folder)}, {REFUSED[path.suffix]}" for path in found if path is not None), None)


def _slide_vector(path: Path, root: Attrs, file: h5py.File, name: str) -> Contents:
    """Another tool's embedding of a slide, (D,) or of a kind that is no tile's."""
    vector = read_dataset(file, name)
    attrs = {**root, **read_attrs(file[name])}
    return Contents(
        path=path,
        kind="slide embeddings",
        tool="stamp" if name == "feats" else "trident",
        slide_id=path.stem,
        vectors={name: vector[None] if vector.ndim == 1 else vector},
        slide_encoder=name_in(attrs, "encoder"),
        attrs=attrs,
    )


def _of_coordinates(attrs: Attrs, held: dict[str, Any]) -> Contents | None:
    """The tool that the attributes of coordinates tell."""
    if "patch_size_level0" in attrs:
        return _trident(held)
    if "patch_size" not in attrs:
        return None
    # Mussel writes pixels of level 0 and the mpp; CLAM pixels of `patch_level` and its downsample.
    if "mpp" in held["attrs"] or "native_mpp" in held["attrs"]:
        return _mussel(held)
    return Contents(tool="clam", step=clam_step(held["attrs"]), **held)


def _beside(given: Path | None, usual: list[Path]) -> Path | None:
    """The file of coordinates: the one that is given, that in the folder that is given, else the first in its usual
    place."""
    if given is not None and not given.is_dir():
        return given
    places = usual if given is None else [given / path.name for path in usual]
    return next((path for path in places if path.is_file()), None)


# --------------------------------------------------------------------------------------------- what all writers ask for


def convert(
    found: TileEmbeddings, to: str, folder: Path | str, *, scale: Scale | None = None, overwrite: bool = False
) -> tuple[list[Path], bool]:
    """Write the tile embeddings of one slide (read with cells) as another tool's files (`to`, a key of FORMATS), each
    whole or not at all, into the tool's own folders below `folder`.

    Returns:
        its files, the embeddings first, and whether all of them were there already, equal to the last byte.

    Raises:
        ValueError: an unknown format, or one that needs what neither the file nor `scale` says; it names the option. A
            file of that name is there with other content, and `overwrite` is False.
    """
    if to not in FORMATS:
        raise ValueError(f"--to: expected one of {', '.join(FORMATS)}, got {to!r}.")
    if found.cells is None:
        raise ValueError(f"{found.slide_id}: expected tiles with cells; read the file with them.")
    safe_name(found.slide_id)
    # All of a slide is made beside its place, and compared with what is there before anything is moved.
    with own_folder(Path(folder), "converting") as made_in:
        made = FORMATS[to](found, made_in, scale or Scale())
        targets = [Path(folder) / path.relative_to(made_in) for path in made]
        pairs = list(zip(made, targets, strict=True))
        new = [(a, b) for a, b in pairs if not (b.is_file() and filecmp.cmp(a, b, shallow=False))]
        taken = [target for _, target in new if target.exists()]
        if taken and not overwrite:
            raise ValueError(
                f"{found.slide_id}: {taken[0].relative_to(folder)} is there with other content. Convert into another "
                "folder, or put this in its place with --overwrite."
            )
        for path, target in reversed(new):  # the embeddings last
            target.parent.mkdir(parents=True, exist_ok=True)
            withdraw_sha256(target)
            publish(path, target)
    return targets, not new


def coords_at_level0(found: TileEmbeddings, scale: Scale) -> tuple[Array, Step]:
    """(N, 2) int64 top-left corners in level-0 pixels, and the distance (x, y) between neighbours in them.

    Micrometres and pixels of another level are scaled; all are rounded to whole pixels.
    """
    step = _step(found)
    if found.frame == "centers":
        return np.rint(found.coords - np.asarray(step) / 2).astype(np.int64), step
    if found.frame == "level0":
        return np.rint(found.coords).astype(np.int64), step
    if scale.slide_mpp is None:
        raise ValueError(
            f"{found.slide_id}: its coordinates are not level-0 pixels. State the slide's mpp with --slide-mpp."
        )
    factor = 1 / scale.slide_mpp
    if found.frame == "unstated":
        if scale.coords_mpp is None:
            raise ValueError(
                f"{found.slide_id}: the file does not say which level its coordinates count in. State the mpp of that "
                "level with --coords-mpp (0.5 for the published files)."
            )
        factor = scale.coords_mpp / scale.slide_mpp
    return np.rint(found.coords * factor).astype(np.int64), (step[0] * factor, step[1] * factor)


def _step(found: TileEmbeddings) -> Step:
    step = as_pair(found.attrs.get("tile_size_level0")) or as_pair(found.tile_size_level0)
    if step is None:
        raise ValueError(f"{found.slide_id}: expected a known distance between tiles. State it with {STEP_OPTION}.")
    return step


def _whole_step(found: TileEmbeddings, coords: Array, step: Step, tool: str) -> int:
    """The one whole number of level-0 pixels by which a tool divides coordinates: the mean of x and y, rounded;
    ValueError where dividing by it puts tiles in other cells."""
    whole = round(sum(step) / 2)
    try:
        cells = cells_of(coords, (whole, whole), who=found.slide_id)
    except ValueError:
        cells = None
    if cells is None or found.cells is None or len({*map(tuple, (cells - found.cells).tolist())}) > 1:
        raise ValueError(
            f"{found.slide_id}: {tool} divides coordinates by a whole number of pixels, and these tiles lie "
            f"{step[0]:g} x {step[1]:g} apart: some would change their cell. Convert to slide2vec or published."
        )
    return whole


def _slide_mpp(found: TileEmbeddings, scale: Scale) -> Step:
    """Microns per level-0 pixel (x, y): stated, or as the file says."""
    if scale.slide_mpp is not None:
        return scale.slide_mpp, scale.slide_mpp
    for name in ("mpp_level0", "native_mpp"):
        mpp = as_pair(all_facts(found.attrs).get(name))
        if mpp is not None:
            return mpp
    raise ValueError(f"{found.slide_id}: the file does not say the slide's mpp. State it with --slide-mpp.")


def _folder_name(found: TileEmbeddings) -> str:
    return safe_name((found.encoder or "unknown").replace("/", "_"))


def _write_h5(
    path: Path,
    features: Array | None,
    coords: Array,
    *,
    name: str = "features",
    of_features: Mapping[str, Any] | None = None,
    of_coords: Mapping[str, Any] | None = None,
    root: Mapping[str, Any] | None = None,
) -> Path:
    with H5Writer(path) as writer:
        write_attrs(writer.file, root or {})
        if features is not None:
            write_attrs(writer.file.create_dataset(name, data=features), of_features or {})
        write_attrs(writer.file.create_dataset("coords", data=coords), of_coords or {})
        writer.check()
    return path


# -------------------------------------------------------------------------------------------------------------- TRIDENT


def _trident(held: dict[str, Any]) -> Contents:
    found = Contents(tool="trident", encoder=name_in(held["attrs"], "encoder"), **held)
    overlap = as_number(found.attrs.get("overlap"))
    if overlap:
        why = f"its tiles overlap by {overlap:g} pixels. State the distance between them with {STEP_OPTION}"
        return dataclasses.replace(found, missing=why)
    return dataclasses.replace(found, step=as_pair(found.attrs.get("patch_size_level0")))


def _write_trident(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    coords, step = coords_at_level0(found, scale)
    path = folder / f"features_{_folder_name(found)}" / f"{found.slide_id}.h5"
    named = {"name": found.slide_id, "savetodir": None, "encoder": found.encoder}
    attrs = _trident_attrs(found, _whole_step(found, coords, step, "TRIDENT"))
    return [_write_h5(path, found.features, coords, of_features=named, of_coords=attrs)]


def _trident_attrs(found: TileEmbeddings, step: int) -> dict[str, Any]:
    facts, mpp = all_facts(found.attrs), tile_mpp(found.attrs)
    level0 = facts.get("level0_magnification") or facts.get("objective_power")
    target = facts.get("target_magnification") or (None if mpp is None else nominal_magnification(mpp))
    return trident_attrs(
        found.slide_id,
        pixels=tile_pixels(found.attrs, found.source) or step,
        step=step,
        powers=(level0, target),
        size=facts.get("slide_size") or (facts.get("level0_width"), facts.get("level0_height")),
    )


# --------------------------------------------------------------------------------------------------------------- Mussel


def _mussel(held: dict[str, Any]) -> Contents:
    attrs = held["attrs"]
    step = as_pair(attrs.get("step_size")) or as_pair(attrs.get("patch_size"))
    held = {**held, "slide_id": held["slide_id"].removesuffix(".patch")}
    return Contents(tool="mussel", step=step, encoder=name_in(attrs, "model_type", "encoder"), **held)


# ----------------------------------------------------------------------------------------------------------------- CLAM


def _clam(held: dict[str, Any], coordinates: Path | None) -> Contents:
    """CLAM's features carry no attributes; its coordinates file of the same slide does."""
    found = Contents(tool="clam", **held)
    name = f"{found.path.stem}.h5"
    beside = _beside(coordinates, [found.path.parent.parent / "patches" / name])
    if beside is None:
        why = f"{found.missing}, or name CLAM's coordinates file (patches/{name})"
        return dataclasses.replace(found, missing=why)
    coords, attrs, _ = _clam_coordinates(beside)
    if not np.array_equal(coords, held["coords"]):
        raise FeatureFileError(
            f"{found.path.name}: its coordinates differ from those of {beside.name} of CLAM's patches."
        )
    return dataclasses.replace(found, step=clam_step(attrs), attrs={**found.attrs, **attrs})


def _clam_coordinates(path: Path) -> tuple[Array, dict[str, Any], Array | None]:
    """The coordinates of one of CLAM's h5 files, their attributes, and the embeddings that it holds, if any."""
    with open_h5(path) as file:
        features = two_axes(read_dataset(file, "features")) if "features" in file else None
        return two_axes(read_dataset(file, "coords")), read_attrs(file["coords"]), features


def _read_clam_tensor(path: Path, coordinates: Path | None) -> Contents:
    """CLAM's `pt_files/<slide>.pt`, with the coordinates of `h5_files` or `patches` beside."""
    features, root, name = two_axes(read_tensor(path)), path.parent.parent, f"{path.stem}.h5"
    beside = _beside(coordinates, [root / "h5_files" / name, root / "patches" / name])
    if beside is None:
        why = (
            f"a .pt file of CLAM holds no coordinates, and neither h5_files/{name} nor patches/{name} lies beside its "
            "folder. Name the folder of coordinates with gigapath convert --coordinates DIR"
        )
        return Contents(path=path, kind="vectors", tool="clam", slide_id=path.stem, features=features, missing=why)
    coords, attrs, twin = _clam_coordinates(beside)
    if len(coords) != len(features) or not np.array_equal(features if twin is None else twin, features, equal_nan=True):
        raise FeatureFileError(f"{path.name}: {beside.parent.name}/{beside.name} is not of the same tiles.")
    held = {"path": path, "slide_id": path.stem, "features": features, "coords": coords, "attrs": attrs}
    return _clam(held, beside if attrs else None)


def clam_step(attrs: Attrs) -> Step | None:
    """The level-0 size (x, y) of CLAM's patches: `patch_size` at `patch_level` times that level's downsample. Old
    files' `custom_downsample` shrinks the patch after reading and does not change it."""
    size, downsample = as_pair(attrs.get("patch_size")), as_pair(attrs.get("downsample"))
    if downsample is None and as_number(attrs.get("patch_level")) == 0:
        downsample = 1.0, 1.0
    return None if size is None or downsample is None else (size[0] * downsample[0], size[1] * downsample[1])


def _write_clam(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """Embeddings as h5 and pt, and the coordinates file. Its patch is what CLAM reads at level 0: one step."""
    import torch  # seconds, which no other format needs

    coords, step = coords_at_level0(found, scale)
    coords32 = coords.astype(np.int32)
    features = found.features.astype(np.float32)
    name = f"{found.slide_id}.h5"
    size = all_facts(found.attrs).get("slide_size") or all_facts(found.attrs).get("level_dim")
    patches = {
        "patch_size": _whole_step(found, coords, step, "CLAM"),
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": found.slide_id,
        "save_path": None,
    }
    written = _write_h5(folder / "h5_files" / name, features, coords32)
    tensor, buffer = folder / "pt_files" / f"{found.slide_id}.pt", io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(features)), buffer)
    write_bytes_atomic(tensor, buffer.getvalue())
    return [written, tensor, _write_h5(folder / "patches" / name, None, coords32, of_coords=patches)]


# ---------------------------------------------------------------------------------------------------------------- STAMP


def _stamp(held: dict[str, Any]) -> Contents:
    """STAMP counts in micrometres; version 2 calls the tile's size `tile_size`, the first versions counted in 224-px
    tiles."""
    attrs = held["attrs"]
    microns, step = as_pair(attrs.get("tile_size_um")), as_pair(attrs.get("tile_size"))
    encoder = name_in(attrs, "extractor")
    if microns is not None or attrs.get("unit") == "um":
        return Contents(tool="stamp", frame="um", step=microns or step, encoder=encoder, **held)
    why = f"it states no unit (an early STAMP file: 224, if so). State the distance of its tiles with {STEP_OPTION}"
    return Contents(tool="stamp", frame="unstated", step=step, missing=why, encoder=encoder, **held)


def _write_stamp(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """float16 and micrometres of level 0, x and y on one scale."""
    if found.frame == "um":
        microns, size = found.coords, _step(found)
    else:
        coords, step = coords_at_level0(found, scale)
        mpp = _slide_mpp(found, scale)
        microns, size = coords * np.asarray(mpp), (step[0] * mpp[0], step[1] * mpp[1])
    if abs(size[0] - size[1]) > 0.005 * size[0]:
        raise ValueError(
            f"{found.slide_id}: STAMP's tiles are square, these are {size[0]:g} x {size[1]:g} micrometres. "
            "Convert to slide2vec or published."
        )
    with np.errstate(over="ignore"):
        features = found.features.astype(np.float16)
    if not np.isfinite(features).all():
        raise ValueError(f"{found.slide_id}: its embeddings do not fit in STAMP's float16. Convert to trident.")
    root = {
        "stamp_version": "2.0.0",  # whose layout this is
        "extractor": found.encoder or "unknown",
        "unit": "um",
        "tile_size_um": float(np.mean(size)),
        "tile_size_px": tile_pixels(found.attrs, found.source) or CELL,
        "code_hash": "converted",
        "feat_type": "tile",
    }
    path = folder / f"{_folder_name(found)}-converted" / f"{found.slide_id}.h5"
    return [_write_h5(path, features, microns.astype(np.float32), name="feats", root=root)]


# ------------------------------------------------------------------------------------------------------------ slide2vec

_EMBEDDINGS = "tile_embeddings"


def _is_slide2vec(path: Path) -> bool:
    """An `.npz` is nobody else's; a `.pt` is CLAM's unless it lies in slide2vec's folder or has its sidecar."""
    in_folder = any(parent.name == _EMBEDDINGS for parent in path.absolute().parents)
    return path.suffix == ".npz" or in_folder or path.with_name(f"{path.stem}.meta.json").is_file()


def _read_slide2vec(path: Path, coordinates: Path | None) -> Contents:
    """`tile_embeddings/<id>.npz` or `.pt` with `tiles/<id>.coordinates.npz` and the JSON beside them; of a run with
    annotations each in a subfolder of the annotation's name."""
    index = None
    if path.suffix == ".npz":
        held = read_npz(path)
        if "features" not in held:
            names = sorted(held)
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise FeatureFileError(f"{path.name}: expected an array 'features', got {shown or 'none'}.")
        features, index = held["features"], held.get("tile_index")
    else:
        features = read_tensor(path)
    features = two_axes(features)
    sidecar = _read_json(path.with_name(f"{path.stem}.meta.json"))
    usual = _slide2vec_coordinates(path, sidecar)
    beside = _beside(coordinates, usual)
    if beside is None or not beside.is_file():
        raise FileNotFoundError(
            f"{beside or usual[0]}: no such file; it holds the coordinates of {path.name} (slide2vec)."
        )
    places = read_npz(beside)
    missing = [name for name in ("x", "y") if name not in places]
    if missing:
        raise FeatureFileError(f"{beside.name}: expected arrays x and y, got {', '.join(sorted(places)[:10])}.")
    x, y = (places[name].reshape(-1) for name in ("x", "y"))
    if len(x) != len(y):
        raise FeatureFileError(f"{beside.name}: expected as many x as y, got {len(x)} and {len(y)}.")
    coords, fractions = np.stack([x, y], axis=1), places.get("tissue_fractions")
    if index is not None and "tile_index" in places:
        rows = _rows_of(index.reshape(-1), places["tile_index"].reshape(-1), path)
        coords, fractions = coords[rows], None if fractions is None else fractions[rows]
    meta = _read_json(beside.with_name(f"{beside.name.removesuffix('.npz')}.meta.json"))
    attrs = {**flat_json(meta), **flat_json(sidecar)}
    step = as_pair(attrs.get("step_px_lv0"))
    if step is None and not as_number(attrs.get("overlap")):
        step = as_pair(attrs.get("tile_size_lv0"))
    return Contents(
        path=path,
        tool="slide2vec",
        slide_id=path.stem,
        features=features,
        coords=coords,
        step=step,
        encoder=name_in(attrs, "encoder_name"),
        tissue_fraction=None if fractions is None else fractions.astype(np.float32),
        attrs=attrs,
    )


def _slide2vec_coordinates(path: Path, sidecar: Any) -> list[Path]:
    """Where the coordinates of a file may lie: as the sidecar says, seen from the run's folder wherever that is now,
    else in `tiles`, in the subfolder of the same name."""
    folder = path.absolute().parent
    root = next((parent.parent for parent in (folder, *folder.parents) if parent.name == _EMBEDDINGS), folder.parent)
    inside = folder.relative_to(root).parts[1:] if folder.is_relative_to(root) else ()
    usual = [root.joinpath("tiles", *inside, f"{path.stem}{SLIDE2VEC_COORDINATES}")]
    stated = sidecar.get("coordinates_npz_path") if isinstance(sidecar, dict) else None
    if isinstance(stated, str) and stated.endswith(".npz"):
        parts = PureWindowsPath(stated).parts  # takes both kinds of slashes
        after = [at for at, part in enumerate(parts) if part == "tiles"]
        usual = [root.joinpath(*parts[after[-1] :])] * bool(after) + usual + [Path(stated)]
    return usual


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
    found = small_json(path)
    if found is None:
        raise FeatureFileError(f"{path.name}: expected a small JSON file, got something that is not. Fetch it anew.")
    return found


def _write_slide2vec(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """Embeddings and the tiling of hs2p, which orders tiles by x, then y."""
    coords, step = coords_at_level0(found, scale)
    if step[0] != step[1]:
        raise ValueError(
            f"{found.slide_id}: slide2vec's tiles are square in pixels, these are {step[0]:g} x {step[1]:g}. "
            "Convert to published."
        )
    order = np.lexsort((coords[:, 1], coords[:, 0]))
    coords, index = coords[order], np.arange(len(found), dtype=np.int32)
    fractions = np.full(len(found), np.nan) if found.tissue_fraction is None else found.tissue_fraction[order]
    tiling = _hs2p_tiling(found, step[0], float(np.mean(_slide_mpp(found, scale))))
    embeddings = folder / _EMBEDDINGS / f"{found.slide_id}.npz"
    places = folder / "tiles" / f"{found.slide_id}.coordinates.npz"
    meta = {
        "sample_id": found.slide_id,
        "artifact_type": _EMBEDDINGS,
        "format": "npz",
        "feature_dim": found.embed_dim,
        "num_tiles": len(found),
        **tiling["artifact"],
        **({} if found.encoder is None else {"encoder_name": found.encoder}),
        **{name: tiling["tiling"][name] for name in ("tile_size_lv0", "step_px_lv0", "overlap")},
        **{name: tiling["tiling"][name] for name in ("requested_tile_size_px", "requested_spacing_um")},
    }
    _write_npz(
        places,
        tile_index=index,
        x=coords[:, 0],
        y=coords[:, 1],
        tissue_fractions=np.asarray(fractions, np.float32),
    )
    of_places = places.with_name(f"{found.slide_id}.coordinates.meta.json")
    of_embeddings = embeddings.with_name(f"{found.slide_id}.meta.json")
    write_json_atomic(of_places, tiling)
    write_json_atomic(of_embeddings, meta)
    _write_npz(embeddings, features=found.features[order], tile_index=index)
    return [embeddings, places, of_embeddings, of_places]


# The keys of hs2p's groups that say how it found tissue and filtered tiles: all must be there, none is known here.
_HS2P_UNKNOWN = {
    "provenance": "mask_path backend requested_backend spacing_at_level_0 mask_backend requested_mask_backend",
    "segmentation": "requested_seg_downsample seg_downsample seg_level seg_spacing_um sthresh sthresh_up mthresh close "
    "sam2_checkpoint_path sam2_config_path mask_path ref_tile_size_px tissue_mask_tissue_value mask_level "
    "mask_spacing_um",
    "filtering": "a_t a_h filter_white filter_black white_threshold black_threshold fraction_threshold "
    "filter_grayspace grayspace_saturation_threshold grayspace_fraction_threshold filter_blur blur_threshold "
    "qc_spacing_um",
    "artifact": "annotation selection_strategy output_mode",
}


def _hs2p_tiling(found: TileEmbeddings, step: float, mpp_level0: float) -> dict[str, dict[str, Any]]:
    """The six groups that hs2p 4 to 6 ask for, each with all its keys. What reads the tiles at the stated spacing on
    any slide is level 0, so that is the level to read."""
    facts, spacing = all_facts(found.attrs), tile_mpp(found.attrs)
    pixels = tile_pixels(found.attrs, found.source) or (round(step * mpp_level0 / spacing) if spacing else CELL)
    known: dict[str, dict[str, Any]] = {
        "provenance": {"sample_id": found.slide_id, "image_path": found.slide_id},
        "slide": {
            "dimensions": facts.get("slide_size"),
            "base_spacing_um": mpp_level0,
            "level_downsamples": [1.0],
        },
        "tiling": {
            "requested_tile_size_px": pixels,
            "requested_spacing_um": spacing or step * mpp_level0 / pixels,
            "read_level": 0,
            "read_tile_size_px": round(step),
            "read_spacing_um": mpp_level0,
            "tile_size_lv0": round(step),
            "tolerance": None,
            "step_px_lv0": int(step) if step.is_integer() else step,
            "overlap": 0.0,
            "min_tissue_fraction": None,
            "is_within_tolerance": True,
            "n_tiles": len(found),
        },
        "segmentation": {"tissue_method": facts.get("tissue_method") or "unknown"},
        "filtering": {},
        "artifact": {"coordinate_space": "level0_px", "tile_order": "x_then_y"},
    }
    return {group: {**dict.fromkeys(_HS2P_UNKNOWN.get(group, "").split()), **known[group]} for group in known}


def _write_npz(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes_atomic(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------------------ slideflow


def _read_slideflow(path: Path, index: Path) -> Contents:
    """`<slide>.pt` with the tiles' centers in `<slide>.index.npz` and what made them in `bags_config.json`."""
    places = read_npz(index)
    if "arr_0" not in places:
        raise FeatureFileError(
            f"{index.name}: expected an array arr_0, got {', '.join(sorted(places)[:10]) or 'none'}."
        )
    config = flat_json(_read_json(path.with_name("bags_config.json")))
    why = "it does not say how far apart its tiles lie: tile_um of bags_config.json, divided by the slide's mpp"
    return Contents(
        path=path,
        tool="slideflow",
        slide_id=path.stem,
        features=two_axes(read_tensor(path)),
        coords=two_axes(places["arr_0"]),
        frame="centers",
        missing=f"{why}. State it with {STEP_OPTION}",
        attrs=config,
    )


# --------------------------------------------------------------------------------------------------- the published code


def _write_published(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """What the published fine-tuning script reads: coordinates at the tile's level, neighbours CELL apart."""
    assert found.cells is not None
    coords = found.cells.astype(np.float32) * CELL
    return [_write_h5(folder / f"{found.slide_id}.h5", found.features.astype(np.float32), coords)]


# ----------------------------------------------------------------------------------------------------------------- ours


def _write_ours(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """Ours: the datasets of a features file. What the other tool does not know is NaN (tissue fraction) or 0 (section);
    its own attributes stay in `converted_attrs`."""
    if found.source == "gigapath":
        raise ValueError(f"{found.slide_id}: it is one of our files already. Copy it.")
    coords, step = coords_at_level0(found, scale)
    fractions = np.full(len(found), np.nan) if found.tissue_fraction is None else found.tissue_fraction
    path = folder / f"features_{_folder_name(found)}" / f"{found.slide_id}.h5"
    root = {
        "encoder": found.encoder,
        "tile_size": tile_pixels(found.attrs, found.source),
        "tile_size_level0": step,
        "mpp": tile_mpp(found.attrs),
        "mpp_level0": scale.slide_mpp or found.attrs.get("native_mpp"),
        "converted_from": found.source,
        "converted_attrs": {name: found.attrs[name] for name in sorted(found.attrs)},
        "numerics_version": FOREIGN_NUMERICS,
    }
    with H5Writer(path) as writer:
        file = writer.file
        write_root(file, "features", found.slide_id, root)
        places = file.create_dataset("coords", data=coords)
        with contextlib.suppress(ValueError):  # TRIDENT can't read every grid; then the file is ours alone
            write_attrs(places, _trident_attrs(found, _whole_step(found, coords, step, "TRIDENT")))
        file.create_dataset("cells", data=found.cells)
        file.create_dataset("tissue_fraction", data=np.asarray(fractions, np.float32))
        file.create_dataset("section", data=np.zeros(len(found), np.int32))
        file.create_dataset("qc", data=np.zeros((len(found), 0), np.float32))
        file.create_dataset("features", data=found.features)
        writer.check()
    return [path]


_REMEDY = "Write its embeddings and coordinates as h5; the guide to other tools' files shows how."
# What is known and not read, by the ending of the name.
REFUSED = {
    ".zarr": f"a store of LazySlide (wsidata), which needs wsidata to be read. {_REMEDY}",
    ".npy": f"an array of HistoSSLscaling (DeepZoom level, column, row, embedding), or none of tiles. {_REMEDY}",
}

FORMATS: dict[str, Callable[[TileEmbeddings, Path, Scale], list[Path]]] = {
    "gigapath": _write_ours,
    "trident": _write_trident,
    "clam": _write_clam,
    "stamp": _write_stamp,
    "slide2vec": _write_slide2vec,
    "published": _write_published,
}
