"""A slide to a folder of PNG tiles with their table, under the published names.

What differs from the published code: coordinates are right, in level-0 pixels; the grid starts at the slide's corner
(or its bounds) and holds only whole tiles inside the slide; tiles are read one by one, so memory does not depend on
the slide, which is never copied; a slide without tissue gives an empty table; a table that is there counts as done
only when every tile in it is whole and was cut with the same values.
"""

import csv
import io
import json
import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from gigapath.file_names import safe_name
from gigapath.files import write_bytes_atomic, write_text_atomic
from gigapath.preprocessing.data.foreground_segmentation import segment_foreground
from gigapath.preprocessing.data.thumbnails import save_thumbnails
from gigapath.preprocessing.data.tiling import tile_array_2d
from gigapath.preprocessing.grid import Grid
from gigapath.preprocessing.published import cells_in_box, find_foreground, share_below
from gigapath.preprocessing.slide import Slide, SlideError, open_slide
from gigapath.read_ahead import read_ahead
from gigapath.tables import csv_text

LOG = logging.getLogger(__name__)

COLUMNS = ("slide_id", "tile_id", "image", "label", "tile_x", "tile_y", "occupancy")
TILE_NAME = re.compile(r"\d{5,}x_\d{5,}y\.png")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_ENTRY = "gigapath"  # the text entry of a tile that says how it was cut
THREADS = 4
AHEAD = 64  # tiles in work at once; bounds memory
_NUMERICS_VERSION = 1  # of these tiles, which are found the published way; raised when they change


def save_image(array_chw: NDArray[Any], path: Path | str) -> Image.Image:
    """Save an image and return it.

    Args:
        array_chw: (C, H, W) with one, three or four channels, values 0 to 255.
        path: where it goes; the suffix says the format.
    """
    path = Path(path)
    if array_chw.ndim != 3 or array_chw.shape[0] not in (1, 3, 4):
        raise ValueError(f"save_image: expected (C, H, W) with 1, 3 or 4 channels, got {array_chw.shape}.")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"save_image: expected the suffix of an image format, got {path.name!r}. Use .png.")
    pixels = np.clip(np.rint(np.moveaxis(array_chw, 0, -1)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    write_bytes_atomic(path, buffer.getvalue())
    return image


def generate_tiles(
    slide_image: NDArray[Any], tile_size: int, foreground_threshold: float | None, occupancy_threshold: float
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float32], int]:
    """Cut an image, padded white to whole tiles, and keep the tiles with enough foreground.

    Args:
        slide_image: (C, H, W).
        tile_size: T, side of a tile in pixels.
        foreground_threshold: luminance strictly below which a pixel is foreground; Otsu's when None.
        occupancy_threshold: a tile is kept when its share of foreground exceeds this.

    Returns:
        tiles (N, C, T, T); their corners (N, 2) as (x, y) in the image, negative where one begins in the padding;
        shares of foreground (N,); how many tiles were not kept.
    """
    if foreground_threshold is None:  # of the image itself: the padding is no class of its own
        foreground_threshold = segment_foreground(slide_image)[1]
    tiles, corners = tile_array_2d(slide_image, tile_size, constant_values=255)
    foreground, _ = segment_foreground(tiles, foreground_threshold)
    occupancies = foreground.mean(axis=(-2, -1), dtype=np.float64).astype(np.float32)
    kept = occupancies > occupancy_threshold
    return tiles[kept], corners[kept], occupancies[kept], int(np.count_nonzero(~kept))


@dataclass(frozen=True)
class _Job:
    """One slide to cut: where to, and all that changes the result."""

    folder: Path
    slide_id: str
    label: Any
    metadata: Mapping[str, Any]
    values: Mapping[str, Any]

    def row(self, x: int, y: int, occupancy: float) -> dict[str, Any]:
        """A tile's line of the table."""
        name = _descriptor(x, y)
        facts = (self.slide_id, f"{self.slide_id}.{name}", f"{self.slide_id}/{name}.png", self.label, x, y, occupancy)
        return {**dict(zip(COLUMNS, facts, strict=True)), **self.slide_columns()}

    def slide_columns(self) -> dict[str, Any]:
        """What the sample says of the slide."""
        return {f"slide_{key}": value for key, value in self.metadata.items()}


def process_slide(
    sample: Mapping[str, Any],
    level: int,
    margin: int,
    tile_size: int,
    foreground_threshold: float | None,
    occupancy_threshold: float,
    output_dir: Path | str,
    thumbnail_dir: Path | str,
    tile_progress: bool = False,
) -> Path:
    """Cut the tissue of a slide into PNG tiles.

    Writes `output_dir/<slide_id>/`: the tiles (`00256x_00512y.png`, level-0 corner), `dataset.csv` and
    `failed_tiles.csv`; and three thumbnails that begin with the slide's file name. What is there already, whole and
    cut with the same values, stays as it is.

    Args:
        sample: `image` (the slide's path), `slide_id`, `metadata` (a dict, one `slide_<key>` column each), and
            optionally `label`.
        level: the pyramid level that tiles are cut from.
        margin: level-0 pixels by which the tissue's box is grown.
        tile_size: side of a tile in pixels of `level`.
        foreground_threshold: luminance strictly below which a pixel is foreground; Otsu's of the lowest level when
            None.
        occupancy_threshold: a tile is kept when its share of foreground exceeds this.
        output_dir: where the slide's folder goes.
        thumbnail_dir: where the thumbnails go.
        tile_progress: show a progress bar.

    Returns:
        the slide's folder; its table is empty where no tissue was found.

    Raises:
        FileNotFoundError: no such slide.
        ValueError: the slide can't be opened, or an argument makes no sense.
        OSError: an output can't be written.
    """
    path, job = _job(sample, level, margin, tile_size, foreground_threshold, occupancy_threshold, output_dir)
    if _is_done(job):
        LOG.info("slide %r: done before, skipped.", job.slide_id)
        return job.folder
    with open_slide(path, slide_id=job.slide_id) as slide:
        grid = _level_grid(slide, level, tile_size)
        threshold, box = find_foreground(slide, foreground_threshold)
        _clear(job.folder)
        cells = np.zeros((0, 2), np.int64) if box is None else cells_in_box(grid, box, margin)
        found, failed = _cut(slide, grid, cells, threshold, occupancy_threshold, job, tile_progress)
    if failed:
        retried, failed = _retry(path, grid, failed, threshold, occupancy_threshold, job)
        found = sorted(found + retried, key=lambda tile: (tile[1], tile[0]))
        LOG.warning("slide %r: %d tiles can't be read, see failed_tiles.csv.", job.slide_id, len(failed))
    if not found:
        LOG.warning("slide %r: no tissue found, no tiles.", job.slide_id)
    with open_slide(path, slide_id=job.slide_id) as slide:
        kept = grid.cells(np.array([tile[:2] for tile in found], np.int64).reshape(-1, 2)).astype(np.int64)
        roi = _grown(box, margin, slide.dimensions)
        try:
            save_thumbnails(Path(thumbnail_dir), path.name, slide, roi, grid, kept)
        except SlideError as error:  # tiles matter more than their pictures
            LOG.warning("%s", error)
    names = [{"tile_id": f"{job.slide_id}.{_descriptor(x, y)}"} for x, y in failed]
    _write_table(job.folder / "failed_tiles.csv", ("tile_id",), names)
    rows = [job.row(*tile) for tile in found]
    _write_table(job.folder / "dataset.csv", (*COLUMNS, *job.slide_columns()), rows)  # last: its being there means done
    return job.folder


def _job(
    sample: Mapping[str, Any],
    level: int,
    margin: int,
    tile_size: int,
    foreground_threshold: float | None,
    occupancy_threshold: float,
    output_dir: Path | str,
) -> tuple[Path, _Job]:
    missing = [key for key in ("image", "slide_id", "metadata") if key not in sample]
    if missing:
        raise ValueError(f"process_slide: expected a sample with image, slide_id and metadata, got no {missing[0]}.")
    if tile_size < 1 or margin < 0:
        raise ValueError(
            f"process_slide: expected a tile size of at least 1 and no negative margin, got {tile_size}, {margin}."
        )
    path, slide_id = Path(sample["image"]), safe_name(str(sample["slide_id"]))
    if not path.is_file():
        raise FileNotFoundError(f"process_slide: expected a slide, got no file of the name {path.name!r}.")
    values = {
        "level": int(level),
        "margin": int(margin),
        "tile_size": int(tile_size),
        "foreground_threshold": None if foreground_threshold is None else float(foreground_threshold),
        "occupancy_threshold": float(occupancy_threshold),
        "slide_bytes": path.stat().st_size,
        "numerics_version": _NUMERICS_VERSION,
    }
    job = _Job(Path(output_dir) / slide_id, slide_id, sample.get("label", ""), dict(sample["metadata"]), values)
    return path, job


def _level_grid(slide: Slide, level: int, tile_size: int) -> Grid:
    """The whole tiles of one level, from the corner of the slide's bounds; no mpp is needed for it."""
    if not 0 <= level < len(slide.level_dimensions):
        raise ValueError(
            f"process_slide: expected a level from 0 to {len(slide.level_dimensions) - 1} of slide "
            f"{slide.slide_id!r}, got {level!r}. Choose one of its levels."
        )
    left, top, width, height = slide.bounds
    step = slide.level_downsamples[level]
    pitch = max(1, round(tile_size * step))
    held = [
        int((size - tile_size - start / step + 0.5) * step // pitch) + 1
        for size, start in zip(slide.level_dimensions[level], (left, top), strict=True)
    ]
    return Grid(
        anchor=(left, top),
        pitch=(pitch, pitch),
        level=level,
        read_size=(tile_size, tile_size),
        tile_size=tile_size,
        mpp=(float("nan"), float("nan")),
        columns=max(0, min(width // pitch, held[0])),
        rows=max(0, min(height // pitch, held[1])),
    )


Found = list[tuple[int, int, float]]  # level-0 x and y, occupancy


def _cut(
    slide: Slide,
    grid: Grid,
    cells: NDArray[np.int64],
    threshold: float,
    occupancy_threshold: float,
    job: _Job,
    progress: bool,
) -> tuple[Found, list[tuple[int, int]]]:
    """Read every cell and write the tiles with enough foreground; what can't be read is returned as failed."""

    def one(corner: tuple[int, int]) -> float | None:
        try:
            return _cut_one(slide, grid, corner, threshold, occupancy_threshold, job)
        except SlideError:
            return None

    corners = [(int(x), int(y)) for x, y in grid.corners(cells)]
    found, failed = [], []
    with tqdm(total=len(corners), desc=job.slide_id, unit="tile", disable=not progress) as bar:
        for corner, share in zip(corners, read_ahead(one, corners, threads=THREADS, ahead=AHEAD), strict=True):
            bar.update()
            if share is None:
                failed.append(corner)
            elif share > occupancy_threshold:
                found.append((*corner, share))
    return found, failed


def _retry(
    path: Path, grid: Grid, failed: list[tuple[int, int]], threshold: float, occupancy_threshold: float, job: _Job
) -> tuple[Found, list[tuple[int, int]]]:
    """One by one again: after one broken tile OpenSlide refuses all others, so each failure opens the slide anew."""
    found, broken, rest = [], [], deque(failed)
    while rest:
        with open_slide(path, slide_id=job.slide_id) as slide:
            while rest:
                corner = rest.popleft()
                try:
                    share = _cut_one(slide, grid, corner, threshold, occupancy_threshold, job)
                except SlideError:
                    broken.append(corner)
                    break
                if share > occupancy_threshold:
                    found.append((*corner, share))
    return found, broken


def _cut_one(
    slide: Slide, grid: Grid, corner: tuple[int, int], threshold: float, occupancy_threshold: float, job: _Job
) -> float:
    """Read one tile, write it if it has enough foreground, and return the share."""
    pixels = slide.read(*corner, grid.level, *grid.read_size)
    share = float(share_below(pixels[None], threshold)[0])
    if share > occupancy_threshold:
        info = PngImagePlugin.PngInfo()
        info.add_text(PNG_ENTRY, json.dumps(job.values))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3, pnginfo=info)
        write_bytes_atomic(job.folder / f"{_descriptor(*corner)}.png", buffer.getvalue())
    return share


def _descriptor(x: int, y: int) -> str:
    return f"{x:05d}x_{y:05d}y"


def _grown(box: tuple[int, int, int, int] | None, margin: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box with its margin, cut to the slide; the slide itself where there is no box."""
    if box is None:
        return (0, 0, *size)
    left, top = max(0, box[0] - margin), max(0, box[1] - margin)
    right, bottom = min(size[0], box[0] + box[2] + margin), min(size[1], box[1] + box[3] + margin)
    return left, top, right - left, bottom - top


def _write_table(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    header = list(columns)
    write_text_atomic(path, csv_text([header, *([row.get(name, "") for name in header] for row in rows)]))


def _clear(folder: Path) -> None:
    """Remove an earlier run's tables and tiles, the table that says done first: notebooks take every PNG they find."""
    for name in ("dataset.csv", "failed_tiles.csv"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        for file in folder.iterdir():
            if TILE_NAME.fullmatch(file.name):
                file.unlink()


def _is_done(job: _Job) -> bool:
    """Whether the folder holds all tiles of its table, whole and cut with the same values, and no others.

    Without tiles there is nothing to compare with: such a slide is looked at again.
    """
    try:
        with (job.folder / "dataset.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        failed = (job.folder / "failed_tiles.csv").read_text(encoding="utf-8").split()
    except (OSError, ValueError, csv.Error):
        return False
    facts = {"label": job.label, **job.slide_columns()}
    expected = {name: "" if value is None else str(value) for name, value in facts.items()}
    if not rows or failed != ["tile_id"] or set(rows[0]) != {*COLUMNS, *job.slide_columns()}:
        return False
    if any(row[name] != value for row in rows for name, value in expected.items()):
        return False
    named = {Path(row["image"] or "").name for row in rows}
    held = {file.name for file in job.folder.iterdir() if TILE_NAME.fullmatch(file.name)}
    return named == held and all(_is_whole(job.folder / name, job.values) for name in named)


def _is_whole(path: Path, values: Mapping[str, Any]) -> bool:
    """Whether a tile's PNG has its end and was cut with these values."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), io.SEEK_END)
            if file.read() != PNG_END:
                return False
        with Image.open(path, formats=("PNG",)) as image:
            return bool(image.info.get(PNG_ENTRY) == json.dumps(values))
    except (OSError, SyntaxError):
        return False
