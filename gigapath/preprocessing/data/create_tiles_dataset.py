"""A slide to a folder of PNG tiles with their table, under the published names.

What differs from the published code: coordinates are right, in level-0 pixels; the grid starts at the slide's corner
(or its bounds) and holds only whole tiles inside the slide; tiles are read one by one, so memory does not depend on
the slide, which is never copied; a slide without tissue gives an empty table.
"""

import io
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from gigapath.file_names import safe_name
from gigapath.files import write_bytes_atomic, write_text_atomic
from gigapath.preprocessing.data.foreground_segmentation import segment_foreground
from gigapath.preprocessing.data.tiling import tile_array_2d
from gigapath.preprocessing.slide import Overview, Slide, SlideError, open_slide
from gigapath.preprocessing.tiling import Grid, cells_in_box, whole_tiles
from gigapath.preprocessing.tissue import find_foreground, share_below
from gigapath.read_ahead import read_ahead
from gigapath.tables import csv_text

LOG = logging.getLogger(__name__)

COLUMNS = ("slide_id", "tile_id", "image", "label", "tile_x", "tile_y", "occupancy")
TILE_NAME = re.compile(r"\d{5,}x_\d{5,}y\.png")
THREADS = 4
AHEAD = 64  # tiles in work at once; bounds memory
THUMBNAIL_SIDE = 1024  # of the longer side, in pixels
LINE = (25, 70, 215)

Box = tuple[int, int, int, int]  # level-0 x, y, width, height


def save_image(array_chw: NDArray[Any], path: Path | str) -> Image.Image:
    """Save an image (C, H, W) with one, three or four channels, values 0 to 255, and return it; the suffix of the path
    says the format."""
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
    """Cut an image (C, H, W), padded white to whole tiles of T pixels, and keep those whose share of foreground
    (luminance strictly below a threshold, Otsu's when None) exceeds `occupancy_threshold`.

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
    `failed_tiles.csv`; and three thumbnails that begin with the slide's file name. An earlier run's tiles go.

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
    missing = [key for key in ("image", "slide_id", "metadata") if key not in sample]
    if missing:
        raise ValueError(f"process_slide: expected a sample with image, slide_id and metadata, got no {missing[0]}.")
    if tile_size < 1 or margin < 0:
        raise ValueError(
            f"process_slide: expected a tile size of at least 1 and no negative margin, got {tile_size}, {margin}."
        )
    path, slide_id, metadata = Path(sample["image"]), safe_name(str(sample["slide_id"])), dict(sample["metadata"])
    if not path.is_file():
        raise FileNotFoundError(f"process_slide: expected a slide, got no file of the name {path.name!r}.")
    folder = Path(output_dir) / slide_id

    def cut(corner: tuple[int, int], read: Callable[..., NDArray[np.uint8]]) -> float | None:
        """Read one tile, write it if it has enough foreground, and return the share; None where it can't be read."""
        try:
            pixels = read(*corner, grid.level, *grid.read_size)
        except SlideError:
            return None
        share = float(share_below(pixels[None], threshold)[0])
        if share > occupancy_threshold:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3)
            write_bytes_atomic(folder / f"{_descriptor(corner)}.png", buffer.getvalue())
        return share

    with open_slide(path, slide_id=slide_id) as slide:
        grid = _level_grid(slide, level, tile_size)
        threshold, box = find_foreground(slide, foreground_threshold)
        # An earlier run's tables and tiles go, the table that says done first: notebooks take every PNG they find.
        old = [file for file in folder.glob("*.png") if TILE_NAME.fullmatch(file.name)]
        for file in (folder / "dataset.csv", folder / "failed_tiles.csv", *old):
            file.unlink(missing_ok=True)
        cells = np.zeros((0, 2), np.int64) if box is None else cells_in_box(grid, box, margin)
        corners = [(int(x), int(y)) for x, y in grid.corners(cells)]
        cutting = read_ahead(lambda corner: cut(corner, slide.read), corners, threads=THREADS, ahead=AHEAD)
        with closing(cutting), tqdm(cutting, slide_id, len(corners), unit="tile", disable=not tile_progress) as shares:
            found = dict(zip(corners, shares, strict=True))
    # A scale of its own: thumbnails are measured in level-0 pixels.
    with open_slide(path, slide_id=slide_id, slide_mpp=1.0) as slide:
        # After one broken tile OpenSlide refused all others: once more, one by one.
        found |= {corner: cut(corner, slide.read_apart) for corner, share in found.items() if share is None}
        kept = [corner for corner, share in found.items() if share is not None and share > occupancy_threshold]
        try:
            _save_thumbnails(Path(thumbnail_dir), path.name, slide, _grown(box, margin, slide.dimensions), grid, kept)
        except SlideError as error:  # tiles matter more than their pictures
            LOG.warning("%s", error)
    failed = [corner for corner, share in found.items() if share is None]
    if failed:
        LOG.warning("slide %r: %d tiles can't be read, see failed_tiles.csv.", slide_id, len(failed))
    if not kept:
        LOG.warning("slide %r: no tissue found, no tiles.", slide_id)
    names = [["tile_id"], *([f"{slide_id}.{_descriptor(corner)}"] for corner in failed)]
    write_text_atomic(folder / "failed_tiles.csv", csv_text(names))
    rows: list[list[Any]] = [[*COLUMNS, *(f"slide_{key}" for key in metadata)]]
    for corner in kept:
        name = _descriptor(corner)
        label, share = sample.get("label", ""), found[corner]
        ids = slide_id, f"{slide_id}.{name}", f"{slide_id}/{name}.png"
        rows.append([*ids, label, *corner, share, *metadata.values()])
    write_text_atomic(folder / "dataset.csv", csv_text(rows))  # last: its being there means done
    return folder


def _level_grid(slide: Slide, level: int, tile_size: int) -> Grid:
    """The whole tiles of one level, from the corner of the slide's bounds; no mpp is needed for it."""
    if not 0 <= level < len(slide.level_dimensions):
        raise ValueError(
            f"process_slide: expected a level from 0 to {len(slide.level_dimensions) - 1} of slide "
            f"{slide.slide_id!r}, got {level!r}. Choose one of its levels."
        )
    pitch = max(1, round(tile_size * slide.level_downsamples[level]))
    return Grid(
        anchor=slide.bounds[:2],
        pitch=(pitch, pitch),
        level=level,
        read_size=(tile_size, tile_size),
        tile_size=tile_size,
        mpp=(float("nan"), float("nan")),
        columns=whole_tiles(slide, 0, pitch, tile_size, level),
        rows=whole_tiles(slide, 1, pitch, tile_size, level),
    )


def _save_thumbnails(
    folder: Path, name: str, slide: Slide, box: Box, grid: Grid, corners: list[tuple[int, int]]
) -> None:
    """Write `<name>_original.png`, the slide; `_roi.png`, the box; `_roi_tiles.png`, the box with the tiles."""
    whole = slide.overview(max(slide.bounds[2:]) / THUMBNAIL_SIDE)
    fine = slide.overview(max(box[2:]) / THUMBNAIL_SIDE)
    (left, top), (right, bottom) = _on(fine, box[:2]), _on(fine, (box[0] + box[2], box[1] + box[3]))
    roi = fine.image[max(0, top) : bottom, max(0, left) : right].copy()
    drawn = fine.image.copy()
    for x, y in corners:
        cv2.rectangle(drawn, _on(fine, (x, y)), _on(fine, (x + grid.pitch[0], y + grid.pitch[1])), LINE, 2)
    pictures = {"original": whole.image, "roi": roi, "roi_tiles": drawn[max(0, top) : bottom, max(0, left) : right]}
    for kind, picture in pictures.items():
        _, content = cv2.imencode(".png", picture[..., ::-1])
        write_bytes_atomic(folder / f"{name}_{kind}.png", content.tobytes())


def _on(overview: Overview, point: tuple[int, int]) -> tuple[int, int]:
    """The pixel of an overview at a level-0 point."""
    x, y = (
        round((at - start) / step)
        for at, start, step in zip(point, overview.origin_level0, overview.scale, strict=True)
    )
    return x, y


def _descriptor(corner: tuple[int, int]) -> str:
    return f"{corner[0]:05d}x_{corner[1]:05d}y"


def _grown(box: Box | None, margin: int, size: tuple[int, int]) -> Box:
    """The box with its margin, cut to the slide; the slide itself where there is no box."""
    if box is None:
        return (0, 0, *size)
    left, top = max(0, box[0] - margin), max(0, box[1] - margin)
    right, bottom = min(size[0], box[0] + box[2] + margin), min(size[1], box[1] + box[3] + margin)
    return left, top, right - left, bottom - top
