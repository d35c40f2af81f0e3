"""What a map was made from, so that one that is out of date can be told: digests of tiles, embeddings, head, cohort."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.cohort.status import read_status
from gigapath.features import TileEmbeddings

_ROWS = 4096  # embeddings that are hashed at once


def made_from(path: Path, tiles: TileEmbeddings) -> dict[str, str | None]:
    """The identity of one slide's tile embeddings.

    Args:
        path: their file; where a status file lies beside it, its folder and digest are taken down.
        tiles: what was read from it.
    """
    places = hashlib.sha256()
    for part in (tiles.coords, tiles.cells):
        if part is not None:
            places.update(_bytes(np.asarray(part, np.float64)))
    content = places.copy()
    for start in range(0, len(tiles), _ROWS):
        content.update(_bytes(tiles.features[start : start + _ROWS]))
    status = read_status(path.parent, tiles.slide_id)
    named = status.digest if status is not None and status.finished else ""
    return {
        "features_folder": path.parent.name if named else None,
        "features_digest": named or None,
        "features_sha256": content.hexdigest(),
        "tiles_sha256": places.hexdigest(),
    }


def cohort_sha256(slides: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for the slides that a run of maps was given, by what each was made from."""
    lines = (f"{slide_id} {slides[slide_id]['features_sha256']}\n" for slide_id in sorted(slides))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values).tobytes()
