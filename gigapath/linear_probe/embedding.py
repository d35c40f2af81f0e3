"""Tile images through a tile encoder into one table of embeddings; a run that was cut off goes on where it was.

Legend: M tiles, D width, B tiles of a batch, T pixels of a tile's side.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from gigapath.features import NUMERICS_VERSION
from gigapath.files import output_error, write_json_atomic
from gigapath.linear_probe.table import EmbeddingTable, worker_count, write_table
from gigapath.linear_probe.tile_sets import TileSet
from gigapath.tile_encoder import TileEncoder

PROGRESS_SUFFIX = ".progress"
COLOURS = 6
FLUSH_EVERY = 16  # batches

Float32Array = npt.NDArray[np.float32]


def embed_tiles(
    tiles: TileSet,
    encoder: TileEncoder,
    out: Path | str,
    *,
    batch_size: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
    check_stop: Callable[[], None] = lambda: None,
) -> int:
    """Embed every tile of a set and write one table with names, splits, labels and colour statistics.

    The encoder sees full batches of one shape (the last is padded and cut), in one order, so that a run in pieces
    gives the bytes of a run in one piece.

    Args:
        tiles: what `open_tile_set` found.
        encoder: the tile encoder.
        out: the table's file, ending in `.h5`. Beside it lies `<out>.progress` until the table is whole.
        batch_size: B.
        report: called after each batch with the number of tiles done and in all.
        check_stop: called before each batch; what it raises ends the run, which can be continued.

    Returns:
        the number of tiles that were taken over from a run before.

    Raises:
        ValueError: tiles of different sizes, unreadable ones, vectors that are not finite.
    """
    out = Path(out)
    attrs = {
        "tiles": tiles.identity,
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256 or "none",
        "trained": encoder.trained,
        "transform": encoder.transform_name,
        "precision": encoder.precision,
        "device": encoder.device.type,
        "batch_size": batch_size,
        "numerics_version": NUMERICS_VERSION,
    }
    with _Progress(
        out.with_name(out.name + PROGRESS_SUFFIX), {**attrs, "rows": len(tiles)}, encoder.embed_dim
    ) as progress:
        resumed = progress.done
        for start, pixels in _batches(tiles, resumed, batch_size):
            check_stop()
            count = len(pixels)
            padded = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - count, axis=0)])
            progress.append(encoder.encode(padded)[:count], colour_statistics(pixels))
            report(start + count, len(tiles))
        features, colours = progress.arrays(len(tiles))
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
    progress.remove()
    return resumed


def colour_statistics(pixels: npt.NDArray[np.uint8]) -> Float32Array:
    """Mean of R, G, B and standard deviation of R, G, B in [0, 255] of each tile (n, T, T, 3): (n, 6)."""
    flat = pixels.reshape(len(pixels), -1, 3).astype(np.float32)
    return np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1)


def _batches(tiles: TileSet, start: int, batch_size: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(position of the first tile, pixels (n, T, T, 3)) from `start` on; threads read ahead."""
    ahead: list[tuple[int, Future[npt.NDArray[np.uint8]]]] = []
    size: list[tuple[int, ...]] = []

    def load(first: int) -> npt.NDArray[np.uint8]:
        pixels = tiles.read(range(first, min(first + batch_size, len(tiles))))
        for offset, tile in enumerate(pixels):
            if not size:
                size.append(tile.shape)
            if tile.shape != size[0]:
                raise ValueError(
                    f"{tiles.names[first + offset]}: expected a tile of {size[0][1]} x {size[0][0]} like the others, "
                    f"got {tile.shape[1]} x {tile.shape[0]}. Bring the tiles to one size."
                )
        return np.stack(pixels)

    starts = iter(range(start, len(tiles), batch_size))
    with ThreadPoolExecutor(worker_count()) as pool:
        try:
            for first in starts:
                ahead.append((first, pool.submit(load, first)))
                if len(ahead) > worker_count():
                    position, task = ahead.pop(0)
                    yield position, task.result()
            for position, task in ahead:
                yield position, task.result()
        finally:
            for _, task in ahead:
                task.cancel()


class _Progress:
    """Rows of a run that is not finished, in a folder: plain float32 files, and how many rows of them are safe.

    The count is written after the rows were flushed, so that whatever kills the run, counted rows are whole; rows
    beyond the count are written again, with the same bytes.
    """

    def __init__(self, folder: Path, identity: dict[str, object], width: int) -> None:
        self._folder, self._identity = folder, identity
        self._state = folder / "state.json"
        self._widths = {"features": width, "colours": COLOURS}
        self._since_flush = 0
        self.done = 0

    def __enter__(self) -> "_Progress":
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {}
        if state.get("identity") == self._identity:
            self.done = int(state["done"])
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = {
                name: os.open(self._folder / f"{name}.f32", os.O_RDWR | os.O_CREAT, 0o666) for name in self._widths
            }
        except OSError as error:
            raise output_error(self._folder, error) from error
        sizes = {name: os.fstat(file).st_size // (4 * self._widths[name]) for name, file in self._files.items()}
        self.done = min(self.done, *sizes.values())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if kind is not None:
                self._flush()
        for file in self._files.values():
            os.close(file)

    def append(self, features: Float32Array, colours: Float32Array) -> None:
        """Add the next rows."""
        try:
            for name, rows in (("features", features), ("colours", colours)):
                block = memoryview(np.ascontiguousarray(rows, dtype=np.float32).tobytes())
                offset = self.done * 4 * self._widths[name]
                while block:
                    written = os.pwrite(self._files[name], block, offset)
                    block, offset = block[written:], offset + written
        except OSError as error:
            raise output_error(self._folder, error) from error
        self.done += len(features)
        self._since_flush += 1
        if self._since_flush >= FLUSH_EVERY:
            self._flush()

    def arrays(self, rows: int) -> tuple[Float32Array, Float32Array]:
        """All rows, mapped from the files: features (M, D), colours (M, 6)."""
        self._flush()
        features, colours = (
            np.memmap(self._folder / f"{name}.f32", np.float32, "r", shape=(rows, width))
            for name, width in self._widths.items()
        )
        return features, colours

    def remove(self) -> None:
        """Remove the folder; the table is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> None:
        for file in self._files.values():
            os.fsync(file)
        write_json_atomic(self._state, {"identity": self._identity, "done": self.done})
        self._since_flush = 0
