"""A linear layer on tile embeddings as a file, and what it says of the tiles of whole slides.

N tiles of a slide, D width, C classes. The folder of a probe, or of fine-tuning on tiles, holds `head.json` and
`head.safetensors`, as that of a head of slides does; the JSON says which of the two it is.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from gigapath.evaluation.results import TERMS, Predicted, predictions_csv
from gigapath.features.data import FeatureFileError, TileEmbeddings
from gigapath.files import check_replaceable, sha256_of, write_bytes_atomic, write_json_atomic, write_text_atomic

HEAD, TENSORS = "head.json", "head.safetensors"
UNIT = "tile"
_MADE = ("encoder", "weights_sha256")

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TileHead:
    """Logits = x @ weight.T + bias of a tile.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
        classes: C names.
        made: encoder and weights_sha256 of the embeddings that trained it; None = not stated.
        sha256: of the file of its tensors; "" of a head that was never in one.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    made: dict[str, Any]
    sha256: str = ""

    def probabilities(self, tiles: TileEmbeddings) -> Float64:
        """(N, C) of the tiles of a slide.

        Raises:
            FeatureFileError: embeddings of another encoder or width than those that trained the head.
        """
        theirs = {"encoder": tiles.encoder, "weights_sha256": tiles.attrs.get("weights_sha256")}
        for name in _MADE:
            mine, other = self.made.get(name), theirs[name]
            if mine is not None and other is not None and mine != other:
                raise FeatureFileError(
                    f"{tiles.slide_id}: its {name} is {other}, that of the tiles that trained the head {mine}. Embed "
                    "the slide with the encoder of the head."
                )
        if tiles.embed_dim != self.weight.shape[1]:
            raise FeatureFileError(
                f"{tiles.slide_id}: expected embeddings of width {self.weight.shape[1]}, got {tiles.embed_dim}. Embed "
                "the slide with the encoder of the head."
            )
        logits = np.asarray(tiles.features, np.float32) @ self.weight.T + self.bias
        shares = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def save_tile_head(folder: Path, head: TileHead) -> None:
    """Write `head.safetensors` and then `head.json`, which names its checksum."""
    tensors = {"weight": np.ascontiguousarray(head.weight), "bias": np.ascontiguousarray(head.bias)}
    write_bytes_atomic(folder / TENSORS, safetensors.numpy.save(tensors))
    write_json_atomic(
        folder / HEAD,
        {
            "format": 1,
            "unit": UNIT,
            "classes": list(head.classes),
            "features": head.made,
            "tensors": TENSORS,
            "sha256": sha256_of(folder / TENSORS),
            "terms": TERMS,
        },
    )


def is_tile_head(path: Path | str) -> bool:
    """Whether a folder, or its JSON, is a head of tiles, not of slides."""
    try:
        held = json.loads(_json_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("unit") == UNIT


def load_tile_head(path: Path | str) -> TileHead:
    """Read a head of tiles from its folder, its JSON or its tensors; ValueError where it is none, or damaged."""
    file = _json_of(path)
    if not is_tile_head(path):
        raise ValueError(
            f"{path}: expected a head of tiles (the folder of gigapath probe, or of finetune --tiles), got none."
        )
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        tensors = file.parent / str(held["tensors"])
        if not tensors.is_file() or sha256_of(tensors) != held["sha256"]:
            raise KeyError(tensors.name)
        found = safetensors.numpy.load_file(tensors)
        classes = tuple(map(str, held["classes"]))
        weight, bias = (np.asarray(found[name], np.float32) for name in ("weight", "bias"))
        if (
            weight.ndim != 2
            or not len(classes) == len(weight) == bias.size
            or not np.isfinite(weight.sum() + bias.sum())
        ):
            raise KeyError("weight")
        return TileHead(weight, bias.ravel(), classes, dict(held["features"]), held["sha256"])
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: expected a head of tiles with its tensors, got a damaged one. Copy both.") from error


def _json_of(path: Path | str) -> Path:
    path = Path(path)
    return (path.parent if path.name in (HEAD, TENSORS) else path) / HEAD


def count_tiles(
    checkpoint: Path | str,
    features: Sequence[Path | str],
    *,
    tile_size_level0: float | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    on_failed: Callable[[str], None] = lambda reason: None,
) -> Predicted:
    """Apply a head of tiles to feature files; a file that can't be read is recorded and the others go on.

    A row holds `slide_id`, `tiles`, `predicted` (the class of most tiles), `n_CLASS` (tiles whose most probable class
    it is) and `p_CLASS` (its mean probability).

    Args:
        out: a CSV to write, or None; other content of that name stays, with a ValueError, without `overwrite`.
    """
    from gigapath.features.folders import SUFFIXES, find_feature_files, slide_name
    from gigapath.features.reading import read_features  # no need of a probe

    head = load_tile_head(checkpoint)
    rows, shares, failed = [], [], {}
    for path in find_feature_files(features):
        try:
            if path.suffix not in SUFFIXES:
                raise FeatureFileError(f"{path.name}: expected a feature file ({', '.join(SUFFIXES)}).")
            tiles = read_features(path, tile_size_level0=tile_size_level0, cells=False)
            if len(tiles) == 0:
                raise FeatureFileError(f"{path.name}: it has no tiles. Leave the slide out.")
            found = head.probabilities(tiles)
        except (FeatureFileError, FileNotFoundError, PermissionError) as error:
            failed[path.name] = str(error)
            on_failed(str(error))
            continue
        counts = np.bincount(found.argmax(axis=1), minlength=len(head.classes))
        shares.append(found.mean(axis=0))
        rows.append(
            {
                "slide_id": slide_name(path),
                "tiles": len(tiles),
                "predicted": head.classes[int(counts.argmax())],
                **{f"n_{name}": int(count) for name, count in zip(head.classes, counts, strict=True)},
            }
        )
    if out is not None:
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ("slide_id", "tiles"))}
        text = predictions_csv(columns, np.stack(shares) if rows else np.zeros((0, 1)), head.classes)
        check_replaceable(out, text, overwrite)
        write_text_atomic(out, text)
    for row, means in zip(rows, shares, strict=True):
        row |= {f"p_{name}": float(share) for name, share in zip(head.classes, means, strict=True)}
    return Predicted(rows, failed)
