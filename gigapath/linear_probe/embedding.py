"""Tile images through a tile encoder into one table of embeddings; a run that was cut off goes on where it was.

Legend: M tiles, D width, B tiles of a batch, T pixels of a tile's side.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.cohort.owner import Ownership
from gigapath.cohort.reuse import differences, digest
from gigapath.devices import device_identity
from gigapath.features import NUMERICS_VERSION, FeatureFileError
from gigapath.features.gigapath_file import KeptRows
from gigapath.features.h5 import is_complete, open_h5, read_attrs
from gigapath.linear_probe.table import EmbeddingTable, worker_count, write_table
from gigapath.linear_probe.tile_sets import TileSet
from gigapath.read_ahead import read_ahead
from gigapath.tile_encoder import TileEncoder

COLOURS = 6
FLUSH_EVERY = 16  # batches

Float32Array = npt.NDArray[np.float32]


def embed_tiles(
    tiles: TileSet,
    encoder: TileEncoder,
    out: Path | str,
    *,
    batch_size: int = 64,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    check_stop: Callable[[], None] = lambda: None,
) -> int:
    """Embed every tile of a set and write one table with names, splits, labels and colour statistics.

    The encoder sees full batches of one shape (the last is padded and cut), in one order, so that a run in pieces
    gives the bytes of a run in one piece.

    Args:
        tiles: what `open_tile_set` found.
        encoder: the tile encoder.
        out: the table's file, ending in `.h5`. Beside it lies `<out>.rows.partial` until the table is whole.
        batch_size: B.
        overwrite: embed again where the table is there already; it stays until the new one is whole.
        report: called after each batch with the number of tiles done and in all.
        check_stop: called before each batch; what it raises ends the run, which can be continued.

    Returns:
        the number of tiles that were taken over from a run before.

    Raises:
        FolderTaken: another run makes this table with other options.
        ValueError: the table is there, of other tiles or options; tiles of different sizes, unreadable ones, vectors
            that are not finite.
    """
    out = Path(out)
    attrs = {
        "tiles": tiles.identity,
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256 or "none",
        "trained": encoder.trained,
        "transform": encoder.transform_name,
        "precision": encoder.precision,
        "device": device_identity(encoder.device),
        "batch_size": batch_size,
        "numerics_version": NUMERICS_VERSION,
    }
    with Ownership({out.with_name(f".{out.name}.runs"): attrs}):
        if not overwrite and made_before(out, attrs):
            return len(tiles)
        return _embed(tiles, encoder, out, attrs, batch_size, report, check_stop)


def made_before(out: Path, attrs: Mapping[str, Any]) -> bool:
    """Whether the table is there, whole and made in this way.

    Raises:
        ValueError: it was made of other tiles or with other options.
    """
    try:
        with open_h5(out) as file:
            found = read_attrs(file) if is_complete(file) else {}
    except (FeatureFileError, OSError):  # none, or a damaged one
        return False
    changed = differences({name: found.get(name) for name in attrs}, attrs) if found else []
    if changed:
        raise ValueError(
            f"{out.name}: expected the options with which it was made, got others: {'; '.join(changed)}. Give those of "
            "before, or use another --out; --overwrite makes it again."
        )
    return bool(found)


def _embed(
    tiles: TileSet,
    encoder: TileEncoder,
    out: Path,
    attrs: dict[str, Any],
    batch_size: int,
    report: Callable[[int, int], None],
    check_stop: Callable[[], None],
) -> int:
    width = encoder.embed_dim
    features, colours = np.empty((len(tiles), width), np.float32), np.empty((len(tiles), COLOURS), np.float32)
    identity = digest({**attrs, "rows": len(tiles)})
    kept = KeptRows(out, identity, (len(tiles), width + COLOURS), np.dtype(np.float32), step=batch_size)
    for first, rows in kept.blocks():
        features[first : first + len(rows)], colours[first : first + len(rows)] = rows[:, :width], rows[:, width:]
    resumed = kept.count
    with contextlib.closing(_batches(tiles, resumed, batch_size)) as batches:
        try:
            for number, (first, pixels) in enumerate(batches, start=1):
                check_stop()
                count = len(pixels)
                padded = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - count, axis=0)])
                rows = np.hstack([encoder.encode(padded)[:count], colour_statistics(pixels)])
                features[first : first + count], colours[first : first + count] = rows[:, :width], rows[:, width:]
                kept.keep(rows)
                if number % FLUSH_EVERY == 0:
                    kept.commit()
                report(first + count, len(tiles))
        finally:
            kept.commit()
            kept.close()
    write_table(
        out,
        EmbeddingTable(
            names=tiles.names,
            features=features,
            splits=tiles.splits,
            labels=tiles.labels,
            groups=tiles.groups,
            colours=colours,
            attrs={**attrs, **({"group_column": tiles.group_column} if tiles.group_column else {})},
        ),
    )
    kept.discard()
    return resumed


def colour_statistics(pixels: npt.NDArray[np.uint8]) -> Float32Array:
    """Mean of R, G, B and standard deviation of R, G, B in [0, 255] of each tile (n, T, T, 3): (n, 6)."""
    flat = pixels.reshape(len(pixels), -1, 3).astype(np.float32)
    return np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1)


def _batches(tiles: TileSet, start: int, batch_size: int) -> Generator[tuple[int, npt.NDArray[np.uint8]], None, None]:
    """(position of the first tile, pixels (n, T, T, 3)) from `start` on; threads read ahead."""
    size: list[tuple[int, ...]] = []

    def load(first: int) -> tuple[int, npt.NDArray[np.uint8]]:
        pixels = tiles.read(range(first, min(first + batch_size, len(tiles))))
        for offset, tile in enumerate(pixels):
            if not size:
                size.append(tile.shape)
            if tile.shape != size[0]:
                raise ValueError(
                    f"{tiles.names[first + offset]}: expected a tile of {size[0][1]} x {size[0][0]} like the others, "
                    f"got {tile.shape[1]} x {tile.shape[0]}. Bring the tiles to one size."
                )
        return first, np.stack(pixels)

    return read_ahead(load, range(start, len(tiles), batch_size), threads=worker_count())
