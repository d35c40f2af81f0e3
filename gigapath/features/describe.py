"""What a feature file is, for people and for machines: behind `gigapath inspect`."""

from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.cells import observed_step, row_major
from gigapath.features.data import FRAMES, GRID, Array, FeatureFileError
from gigapath.features.foreign import TensorReader, coordinates_file_step
from gigapath.features.h5 import open_h5, read_attrs, read_dataset
from gigapath.features.ours import read_slide, read_tiles, stage_of
from gigapath.features.reading import read_features
from gigapath.features.scale import tile_mpp

_TOOLS = {
    "gigapath": "gigapath",
    "trident": "TRIDENT",
    "clam": "CLAM",
    "mussel": "Mussel",
    "stamp": "STAMP",
    "slide2vec": "slide2vec",
    "published": "the published fine-tuning code (or another tool that writes no attributes)",
    "unknown": "an unknown tool",
}


def describe(
    path: Path | str, *, tile_size_level0: float | None = None, read_tensor: TensorReader | None = None
) -> dict[str, Any]:
    """Say what a feature file is.

    Args:
        path: an `.h5`, `.npz` or `.pt` file, ours or another tool's.
        tile_size_level0: as for `read_features`.
        read_tensor: as for `read_features`.

    Returns:
        plain JSON values: `file`, `kind` ("tile embeddings", "tiles", "slide embeddings", "tile coordinates"), `tool`,
        `slide_id`, `complete` (None where the tool has no such mark), `warnings`, `attrs`; for tiles `tiles`, `frame`,
        `step`, `columns`, `rows`, `order`, `mpp`; for embeddings `width`, `dtype`, `encoder`, `precision`,
        `numerics_version`, `weights_sha256`, and for slides `embeddings` and `trained`.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: a file that can't be read, or one that holds none of these.
    """
    path = Path(path)
    stage, coordinates = None, None
    if path.suffix not in (".npz", ".pt"):
        with open_h5(path) as file:
            stage = stage_of(file)
            coordinates = None if stage else coordinates_file_step(file)
    if stage == "tiles":
        found = _of_tiles(path)
    elif stage == "slide":
        found = _of_slide(path)
    elif coordinates is not None:
        found = _of_coordinates(path, *coordinates)
    else:
        found = _of_embeddings(path, tile_size_level0, read_tensor)
    return {"file": path.name, **found}


def _of_embeddings(path: Path, stated: float | None, read_tensor: TensorReader | None) -> dict[str, Any]:
    warnings: list[str] = []
    try:
        held = read_features(path, tile_size_level0=stated, order="file", read_tensor=read_tensor)
    except FeatureFileError as error:
        # Whatever is wrong beside the cells stands in the way again, and is raised then.
        held = read_features(path, cells=False, read_tensor=read_tensor)
        warnings.append(str(error))
    attrs = held.attrs
    if held.cells is not None:
        warnings += _about_cells(held.cells)
    if held.encoder is None:
        warnings.append(
            "it does not name its tile encoder; the width alone does not tell it (GigaPath, UNI2-h and H-optimus are "
            "all 1536 wide)."
        )
    return {
        "kind": "tile embeddings",
        **_identity(held.source, held.slide_id, attrs),
        "tiles": len(held),
        "width": held.embed_dim,
        "dtype": str(held.features.dtype),
        "encoder": held.encoder,
        "weights_sha256": attrs.get("weights_sha256"),
        "precision": attrs.get("precision"),
        "mpp": tile_mpp(held.attrs),
        **_places(held.frame, held.tile_size_level0, held.cells, held.coords),
        "complete": True if held.source == "gigapath" else None,
        "warnings": warnings,
        "attrs": _plain(attrs),
    }


def _of_tiles(path: Path) -> dict[str, Any]:
    tiles = read_tiles(path)
    return {
        "kind": "tiles",
        **_identity("gigapath", tiles.slide_id, _root_attrs(path)),
        "tiles": len(tiles),
        "mpp": tiles.mpp,
        **_places("level0", float(np.mean(tiles.tile_size_level0)), tiles.cells, tiles.coords_level0),
        "complete": True,
        "warnings": _about_cells(tiles.cells),
        "attrs": _plain(tiles.attrs),
    }


def _of_slide(path: Path) -> dict[str, Any]:
    slide = read_slide(path)
    attrs = slide.attrs
    names = ["tile-mean"]
    for pooling in ("mean", "class"):
        states = getattr(slide, f"states_{pooling}")
        if getattr(slide, f"default_{pooling}") is not None:
            names.append(f"default:{pooling}")
        if states is not None:
            names += [f"state:0:{pooling} to state:{len(states) - 1}:{pooling}"]
    held = next((value for value in (slide.default_mean, slide.default_class) if value is not None), slide.tile_mean)
    untrained = attrs.get("trained") is False
    return {
        "kind": "slide embeddings",
        **_identity("gigapath", slide.slide_id, _root_attrs(path)),
        "width": int(held.shape[1]),
        "dtype": "float32",
        "encoder": attrs.get("encoder"),
        "slide_encoder": attrs.get("slide_encoder"),
        "weights_sha256": attrs.get("weights_sha256"),
        "precision": attrs.get("precision"),
        "mpp": attrs.get("mpp"),
        "embeddings": names,
        "trained": attrs.get("trained"),
        "complete": True,
        "warnings": ["the slide encoder's weights are random: its vectors mean nothing."] if untrained else [],
        "attrs": _plain(attrs),
    }


def _of_coordinates(path: Path, tool: str, step: tuple[float, float] | None) -> dict[str, Any]:
    with open_h5(path) as file:
        coords = read_dataset(file, "coords")
        attrs = {**read_attrs(file), **read_attrs(file["coords"])}
    return {
        "kind": "tile coordinates",
        **_identity(tool, path.stem, attrs),
        "tiles": len(coords),
        "mpp": None,
        **_places("level0", None if step is None else float(np.mean(step)), None, coords),
        "complete": None,
        "warnings": ["it holds coordinates without embeddings."],
        "attrs": _plain(attrs),
    }


def _root_attrs(path: Path) -> dict[str, Any]:
    """All attributes at the root, those too that are the reader's own business."""
    with open_h5(path) as file:
        return read_attrs(file)


def _identity(source: str, slide_id: str, attrs: Any) -> dict[str, Any]:
    version = attrs.get("package_version") or attrs.get("stamp_version")
    return {
        "tool": source,
        "tool_version": None if version is None else str(version),
        "slide_id": slide_id,
        "numerics_version": attrs.get("numerics_version"),
    }


def _places(frame: str, step: float | None, cells: Array | None, coords: Array) -> dict[str, Any]:
    spans: dict[str, Any] = {"columns": None, "rows": None, "order": None}
    if cells is not None and len(cells):
        low, high = cells.min(axis=0).tolist(), cells.max(axis=0).tolist()
        by_row = row_major(cells) is None
        by_column = row_major(cells[:, ::-1]) is None
        order = "row-major" if by_row else "column-major" if by_column else "neither by row nor by column"
        spans = {"columns": [low[0], high[0]], "rows": [low[1], high[1]], "order": order}
    seen = observed_step(coords) if coords.ndim == 2 and coords.shape[1] == 2 else None
    return {"frame": frame, "unit": FRAMES[frame], "step": step, "closest": seen, **spans}


def _about_cells(cells: Array) -> list[str]:
    if len(cells) == 0:
        return ["it has no tiles."]
    found = []
    gap = observed_cell_gap(cells)
    if gap is not None and gap > 1:
        found.append(
            f"its closest tiles lie {gap} cells apart, where neighbours are expected: the stated distance between "
            f"tiles is off by that factor, or every tile between was dropped."
        )
    low, high = int(cells.min()), int(cells.max())
    if low < -1 or high >= GRID:
        found.append(f"its cells run from {low} to {high}, beyond the slide encoder's 0 to {GRID - 1}.")
    return found


def observed_cell_gap(cells: Array) -> int | None:
    """The smallest distance, in cells, between two occupied columns or rows; None where there is one of each."""
    gaps = np.concatenate([np.diff(np.unique(cells[:, axis])) for axis in (0, 1)])
    return int(gaps.min()) if len(gaps) else None


def _plain(attrs: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(attrs.items())}


def in_words(description: dict[str, Any]) -> list[str]:
    """A description as sentences, one a line."""
    known = {name: value for name, value in description.items() if value is not None}
    tool = _TOOLS.get(known["tool"], known["tool"])
    version = f" {known['tool_version']}" if "tool_version" in known else ""
    lines = [f"{known['file']}: {known['kind']} of slide {known['slide_id']}, written by {tool}{version}."]
    size = [f"{known['tiles']:,} tiles"] if "tiles" in known else []
    if "width" in known:
        size.append(f"{known['width']} values each, {known['dtype']}")
    lines.append(f"{'; '.join(size)}.")
    if "dtype" in known:
        lines.append(_of_the_encoder(known))
    if "frame" in known:
        lines += _of_the_places(known)
    if "embeddings" in known:
        lines.append(f"Embeddings: {', '.join(known['embeddings'])}.")
    numerics = [f"numerics version {known['numerics_version']}"] if "numerics_version" in known else []
    lines.append("; ".join([*numerics, "complete" if known.get("complete") else "no mark of completeness"]) + ".")
    lines[-1] = lines[-1][0].upper() + lines[-1][1:]
    return [*lines, *(f"Warning: {warning}" for warning in known["warnings"])]


def _of_the_encoder(known: dict[str, Any]) -> str:
    parts = [f"Tile encoder: {known.get('encoder', 'not stated')}"]
    if "weights_sha256" in known:
        parts.append(f"weights sha256 {str(known['weights_sha256'])[:12]}")
    if "slide_encoder" in known:
        trained = {True: "trained", False: "untrained"}.get(known.get("trained", ""), "not said whether trained")
        plain = known["slide_encoder"] == "mean"
        said = "none, the mean of the tiles" if plain else f"{known['slide_encoder']}, {trained}"
        parts.append(f"slide encoder: {said}")
    parts.append(f"precision {known.get('precision', 'not stated')}")
    return "; ".join(parts) + "."


def _of_the_places(known: dict[str, Any]) -> list[str]:
    step = f"tiles {known['step']:g} apart" if "step" in known else "how far apart the tiles lie is not stated"
    mpp = f"{known['mpp']:g} microns per pixel; " if "mpp" in known else ""
    lines = [f"{mpp}coordinates in {known['unit']}, {step}."]
    lines[0] = lines[0][0].upper() + lines[0][1:]
    if "columns" in known:
        (left, right), (top, bottom) = known["columns"], known["rows"]
        lines.append(f"Columns {left} to {right}, rows {top} to {bottom}; stored in {known['order']} order.")
    return lines
