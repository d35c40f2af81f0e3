"""What a feature file is, for people and for machines: behind `gigapath check --describe`."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.cells import as_number, cells_of, observed_step, row_major, tile_mpp
from gigapath.features.check import check_contents
from gigapath.features.data import FRAMES, STEP_OPTION, Contents, FeatureFileError
from gigapath.features.h5 import check_undamaged
from gigapath.features.reading import read_contents

_TOOLS = {
    "gigapath": "gigapath",
    "trident": "TRIDENT",
    "clam": "CLAM",
    "mussel": "Mussel",
    "stamp": "STAMP",
    "slide2vec": "slide2vec",
    "slideflow": "slideflow",
    "published": "the published fine-tuning code (or another tool that writes no attributes)",
    "unknown": "an unknown tool",
}

# Findings that leave nothing to describe.
_UNUSABLE = ("shapes", "coords-not-finite", "not-finite", "incomplete")
# Findings that bear on what the file is; whether its numbers are right is asked of `gigapath check`.
_WARNINGS = (
    *("no-encoder", "untrained", "no-tiles", "no-step", "off-grid", "pitch", "neighbours", "cells-shared"),
    *("cells", "outside-slide", "beyond-grid"),
)


def describe(path: Path | str, *, tile_size_level0: float | None = None) -> dict[str, Any]:
    """Say what a feature file, ours or another tool's, is, as plain JSON values.

    `file`, `kind` (as `Contents.kind`), `tool`, `slide_id`, `complete` (None where the tool has no such mark),
    `warnings`, `attrs`; for tiles `tiles`, `frame`, `step`, `columns`, `rows`, `order`, `mpp`; for embeddings `width`,
    `dtype`, `encoder`, `precision`, `numerics_version`, `weights_sha256`, and for slides `embeddings` and `trained`.

    Raises:
        FileNotFoundError: no such file.
        FeatureFileError: a file that can't be read, or one that holds none of these.
    """
    path = Path(path)
    check_undamaged(path)
    held = read_contents(path, tile_size_level0=tile_size_level0)
    findings = check_contents(held).findings
    for finding in findings:
        if finding.name in _UNUSABLE:
            raise FeatureFileError(f"{path.name}: {finding.text}")
    attrs = held.attrs
    version = attrs.get("package_version") or attrs.get("stamp_version")
    found: dict[str, Any] = {
        "file": path.name,
        "kind": held.kind,
        "tool": held.tool,
        "tool_version": None if version is None else str(version),
        "slide_id": held.slide_id,
        "numerics_version": attrs.get("numerics_version"),
    }
    if held.coords is not None:
        found |= {"tiles": len(held.coords), "mpp": tile_mpp(attrs), **_places(held)}
    vectors = held.features
    if held.vectors:
        found |= {"mpp": as_number(attrs.get("mpp")), "slide_encoder": held.slide_encoder}
        found |= {"embeddings": _names(held), "trained": attrs.get("trained")}
        vectors = held.vectors.get("default_mean", held.vectors.get("default_class", next(iter(held.vectors.values()))))
    if vectors is not None:
        found |= {"tiles": len(vectors)} if held.kind == "vectors" else {}
        found |= {"width": int(vectors.shape[1]), "dtype": str(vectors.dtype), "encoder": held.encoder}
        found |= {name: attrs.get(name) for name in ("weights_sha256", "precision")}
    warnings = [finding.text for finding in findings if finding.name in _WARNINGS]
    if held.tool == "published" and held.step is None:  # whose readers take 256 for granted
        warnings.append(f"it does not say how far apart its tiles lie. State it with {STEP_OPTION}.")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(attrs.items())}
    return {**found, "complete": held.complete, "warnings": warnings, "attrs": plain}


def _names(held: Contents) -> list[str]:
    """The slide embeddings of a file, by the names that `read_slides` takes; another tool's by its dataset's."""
    names = ["tile-mean"] if "tile_mean" in held.vectors else []
    for pooling in ("mean", "class"):
        states = held.vectors.get(f"states_{pooling}")
        names += [f"default:{pooling}"] if f"default_{pooling}" in held.vectors else []
        names += [] if states is None else [f"state:0:{pooling} to state:{len(states) - 1}:{pooling}"]
    return names or list(held.vectors)


def _places(held: Contents) -> dict[str, Any]:
    coords, cells = held.coords, held.cells
    assert coords is not None
    if cells is None and held.step is not None:
        with contextlib.suppress(FeatureFileError):  # which the warnings say
            cells = cells_of(coords, held.step, who=held.path.name)
    spans: dict[str, Any] = {"columns": None, "rows": None, "order": None}
    if cells is not None and len(cells):
        low, high = cells.min(axis=0).tolist(), cells.max(axis=0).tolist()
        by_row, by_column = row_major(cells) is None, row_major(cells[:, ::-1]) is None
        order = "row-major" if by_row else "column-major" if by_column else "neither by row nor by column"
        spans = {"columns": [low[0], high[0]], "rows": [low[1], high[1]], "order": order}
    step = None if held.step is None else float(np.mean(held.step))
    return {"frame": held.frame, "unit": FRAMES[held.frame], "step": step, "closest": observed_step(coords), **spans}


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
        name = "none, the mean of the tiles" if plain else f"{known['slide_encoder']}, {trained}"
        parts.append(f"slide encoder: {name}")
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
