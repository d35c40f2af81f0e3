"""Tile embeddings from one tool's files to another's: TRIDENT, CLAM, STAMP, slide2vec, the published fine-tuning code
and ours.

Every direction goes through `read_features`: embeddings in row-major order, cells, and coordinates in the unit of the
file. What a tool's file needs and the source does not say (the slide's mpp) is stated, never guessed.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import gigapath
from gigapath.features import TileEmbeddings
from gigapath.features.cells import cells_of
from gigapath.features.data import CELL, Array
from gigapath.features.h5 import H5Writer, write_attrs
from gigapath.features.ours import nominal_magnification
from gigapath.features.scale import all_facts, tile_mpp, tile_pixels
from gigapath.file_names import safe_name
from gigapath.files import write_bytes_atomic, write_json_atomic

# `numerics_version` of embeddings that another tool computed: never equal to one of ours.
FOREIGN_NUMERICS = 0


@dataclasses.dataclass(frozen=True)
class Scale:
    """What converting may need beyond the file, each None where it is not stated.

    Attributes:
        slide_mpp: microns per pixel of the slide's level 0.
        coords_mpp: microns per pixel of the level that the coordinates count in, for the published files.
    """

    slide_mpp: float | None = None
    coords_mpp: float | None = None


def convert(found: TileEmbeddings, to: str, folder: Path | str, *, scale: Scale | None = None) -> list[Path]:
    """Write the tile embeddings of one slide as another tool's files, each whole or not at all.

    Args:
        found: what `read_features` gave, with cells.
        to: a key of FORMATS.
        folder: the folder that takes the tool's own folders.
        scale: what the file does not say.

    Returns:
        the files written, the embeddings first.

    Raises:
        ValueError: an unknown format, or one that needs what neither the file nor `scale` says; it names the option.
    """
    if to not in FORMATS:
        raise ValueError(f"--to: expected one of {', '.join(FORMATS)}, got {to!r}.")
    if found.cells is None:
        raise ValueError(f"{found.slide_id}: expected tiles with cells; read the file with them.")
    safe_name(found.slide_id)
    return FORMATS[to](found, Path(folder), scale or Scale())


def coords_at_level0(found: TileEmbeddings, scale: Scale) -> tuple[Array, tuple[float, float]]:
    """(N, 2) int64 top-left corners in level-0 pixels, and the distance (x, y) between neighbours in them.

    Micrometres and pixels of another level are scaled; all are rounded to whole pixels.
    """
    step = _step(found)
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


def _step(found: TileEmbeddings) -> tuple[float, float]:
    pitch = found.attrs.get("tile_size_level0")
    if isinstance(pitch, tuple) and len(pitch) == 2:
        return float(pitch[0]), float(pitch[1])
    if found.tile_size_level0 is None:
        raise ValueError(
            f"{found.slide_id}: expected a known distance between tiles. State it with --tile-size-level0."
        )
    return found.tile_size_level0, found.tile_size_level0


def _whole_step(found: TileEmbeddings, coords: Array, step: tuple[float, float], tool: str) -> int:
    """The one whole number of level-0 pixels by which a tool divides coordinates: the mean of x and y, rounded.

    Raises:
        ValueError: dividing by it puts tiles in other cells.
    """
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


def _slide_mpp(found: TileEmbeddings, scale: Scale) -> tuple[float, float]:
    """Microns per level-0 pixel (x, y): stated, or as the file says."""
    if scale.slide_mpp is not None:
        return scale.slide_mpp, scale.slide_mpp
    for name in ("mpp_level0", "native_mpp"):
        value = all_facts(found.attrs).get(name)
        if value is not None:
            x, y = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,)).tolist()
            return x, y
    raise ValueError(f"{found.slide_id}: the file does not say the slide's mpp. State it with --slide-mpp.")


def _folder_name(found: TileEmbeddings) -> str:
    return safe_name((found.encoder or "unknown").replace("/", "_"))


def _to_ours(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """Ours: the datasets of a features file. What the other tool does not know is NaN (tissue fraction) or 0 (section);
    its own attributes stay in `converted_attrs`."""
    if found.source == "gigapath":
        raise ValueError(f"{found.slide_id}: it is one of our files already. Copy it.")
    coords, step = coords_at_level0(found, scale)
    fractions = np.full(len(found), np.nan) if found.tissue_fraction is None else found.tissue_fraction
    path = folder / f"features_{_folder_name(found)}" / f"{found.slide_id}.h5"
    root = {
        "slide_id": found.slide_id,
        "stage": "features",
        "encoder": found.encoder,
        "tile_size": tile_pixels(found.attrs, found.source),
        "tile_size_level0": step,
        "mpp": tile_mpp(found.attrs),
        "mpp_level0": scale.slide_mpp or found.attrs.get("native_mpp"),
        "converted_from": found.source,
        "converted_attrs": {name: found.attrs[name] for name in sorted(found.attrs)},
        "numerics_version": FOREIGN_NUMERICS,
        "package_version": gigapath.__version__,
        "implementation": gigapath.__implementation__,
    }
    with H5Writer(path) as writer:
        file = writer.file
        write_attrs(file, root)
        places = file.create_dataset("coords", data=coords)
        with contextlib.suppress(ValueError):  # TRIDENT can't read every grid; then the file is ours alone
            write_attrs(places, _trident_coords(found, _whole_step(found, coords, step, "TRIDENT")))
        file.create_dataset("cells", data=found.cells)
        file.create_dataset("tissue_fraction", data=np.asarray(fractions, np.float32))
        file.create_dataset("section", data=np.zeros(len(found), np.int32))
        file.create_dataset("qc", data=np.zeros((len(found), 0), np.float32))
        file.create_dataset("features", data=found.features)
        writer.check()
    return [path]


def _to_trident(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    coords, step = coords_at_level0(found, scale)
    path = folder / f"features_{_folder_name(found)}" / f"{found.slide_id}.h5"
    named = {"name": found.slide_id, "savetodir": None, "encoder": found.encoder}
    attrs = _trident_coords(found, _whole_step(found, coords, step, "TRIDENT"))
    return [_write_h5(path, found.features, coords, of_features=named, of_coords=attrs)]


def _trident_coords(found: TileEmbeddings, step: int) -> dict[str, Any]:
    """TRIDENT's nine."""
    facts, mpp = all_facts(found.attrs), tile_mpp(found.attrs)
    width, height = facts.get("slide_size") or (facts.get("level0_width"), facts.get("level0_height"))
    return {
        "patch_size": tile_pixels(found.attrs, found.source) or step,
        "patch_size_level0": step,
        "level0_magnification": facts.get("level0_magnification") or facts.get("objective_power"),
        "target_magnification": facts.get("target_magnification")
        or (None if mpp is None else nominal_magnification(mpp)),
        "overlap": 0,
        "name": found.slide_id,
        "savetodir": None,
        "level0_width": width,
        "level0_height": height,
    }


def _to_clam(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """CLAM: embeddings as h5 and pt, and the coordinates file. Its patch is what it reads at level 0: one step."""
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
    return [
        _write_h5(folder / "h5_files" / name, features, coords32),
        _write_tensor(folder / "pt_files" / f"{found.slide_id}.pt", features),
        _write_h5(folder / "patches" / name, None, coords32, of_coords=patches),
    ]


def _write_tensor(path: Path, features: Array) -> Path:
    import torch  # seconds, which no other format needs

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(features)), buffer)
    write_bytes_atomic(path, buffer.getvalue())
    return path


def _to_stamp(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """STAMP: float16 and micrometres of level 0, x and y on one scale."""
    if found.frame == "um":
        microns, size = found.coords, _step(found)
    else:
        coords, step = coords_at_level0(found, scale)
        mpp = np.asarray(_slide_mpp(found, scale))
        microns, size = coords * mpp, (step[0] * float(mpp[0]), step[1] * float(mpp[1]))
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


def _to_slide2vec(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    coords, step = coords_at_level0(found, scale)
    if step[0] != step[1]:
        raise ValueError(
            f"{found.slide_id}: slide2vec's tiles are square in pixels, these are {step[0]:g} x {step[1]:g}. "
            "Convert to published."
        )
    index = np.arange(len(found), dtype=np.int32)
    fractions = np.full(len(found), np.nan) if found.tissue_fraction is None else found.tissue_fraction
    size: dict[str, Any] = {"tile_size_lv0": _whole(step[0]), "step_px_lv0": _whole(step[0]), "overlap": 0.0}
    mpp, pixels = tile_mpp(found.attrs), tile_pixels(found.attrs, found.source)
    size |= {} if pixels is None else {"requested_tile_size_px": pixels}
    size |= {} if mpp is None else {"requested_spacing_um": mpp}
    embeddings = folder / "tile_embeddings" / f"{found.slide_id}.npz"
    places = folder / "tiles" / f"{found.slide_id}.coordinates.npz"
    meta = {
        "sample_id": found.slide_id,
        "artifact_type": "tile_embeddings",
        "format": "npz",
        "feature_dim": found.embed_dim,
        "num_tiles": len(found),
        "tile_order": "y_then_x",
        **({} if found.encoder is None else {"encoder_name": found.encoder}),
        **size,
    }
    tiling = {"sample_id": found.slide_id, "n_tiles": len(found), "tile_order": "y_then_x", **size}
    _write_npz(
        places,
        tile_index=index,
        x=coords[:, 0],
        y=coords[:, 1],
        tissue_fractions=np.asarray(fractions, np.float32),
    )
    write_json_atomic(places.with_name(f"{found.slide_id}.coordinates.meta.json"), tiling)
    write_json_atomic(embeddings.with_name(f"{found.slide_id}.meta.json"), meta)
    _write_npz(embeddings, features=found.features, tile_index=index)
    return [embeddings, places]


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _write_npz(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes_atomic(path, buffer.getvalue())


def _to_published(found: TileEmbeddings, folder: Path, scale: Scale) -> list[Path]:
    """What the published fine-tuning script reads: coordinates at the tile's level, neighbours CELL apart."""
    assert found.cells is not None
    coords = found.cells.astype(np.float32) * CELL
    return [_write_h5(folder / f"{found.slide_id}.h5", found.features.astype(np.float32), coords)]


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


FORMATS: dict[str, Callable[[TileEmbeddings, Path, Scale], list[Path]]] = {
    "gigapath": _to_ours,
    "trident": _to_trident,
    "clam": _to_clam,
    "stamp": _to_stamp,
    "slide2vec": _to_slide2vec,
    "published": _to_published,
}
