"""All previews of a run on a few pages, the slides that want a look first.

A slide is a suspect where its figures are out of the ordinary; nothing is changed for it, a person looks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gigapath.features import FeatureFileError, Tiles, read_tiles
from gigapath.preprocessing.preview import GREY, INK, PANEL, fitted, font, write_jpeg

COLUMNS, ROWS = 6, 8  # of a page
CELL = 300, 300  # width and height of one slide, text included
TEXT = 76  # height of the text
MARGIN = 12
HEAD = 48
ALARM = (200, 30, 30)

FEW_TILES = 10
LITTLE_TISSUE = 0.01  # of the scanned area
MUCH_TISSUE = 0.95
MUCH_PEN = 0.02  # of the tiles' area, or of the places on the grid
MANY_PIECES = 50
LOW_FOCUS = 60.0  # cycles per millimetre, the median; sharp sections lie at 90 to 140


@dataclass(frozen=True)
class Entry:
    """One slide on the sheet.

    Attributes:
        slide_id: its name.
        picture: the preview's file; a grey field where there is none.
        tiles: how many.
        area_mm2: of the tissue.
        suspicions: why to look at it, worst first.
    """

    slide_id: str
    picture: Path
    tiles: int
    area_mm2: float
    suspicions: tuple[str, ...]


def suspicions(tiles: Tiles) -> tuple[str, ...]:
    """Why a person should look at this slide, in words."""
    attrs = tiles.attrs
    found = []
    share = _tissue_share(tiles)
    if not len(tiles):
        found.append("no tissue")
    elif len(tiles) < FEW_TILES or (share is not None and share < LITTLE_TISSUE):
        found.append("little tissue")
    if attrs.get("tissue_state") == "full" or (share is not None and share > MUCH_TISSUE):
        found.append("tissue everywhere")
    pen = float(np.mean(_column(tiles, "pen"))) if len(tiles) else 0.0
    dropped, places = attrs.get("dropped"), np.prod(np.asarray(attrs.get("grid_size", (0, 0)), np.float64))
    if isinstance(dropped, dict) and places:
        pen = max(pen, float(dropped.get("pen", 0)) / float(places))
    if pen > MUCH_PEN:
        found.append("pen")
    if int(attrs.get("tissue_pieces") or 0) > MANY_PIECES:
        found.append(f"{attrs['tissue_pieces']} pieces")
    if attrs.get("warnings"):
        found.append("a warning, see slides.csv")
    focus = _column(tiles, "focus")
    if np.isfinite(focus).any() and np.nanmedian(focus) < LOW_FOCUS:
        found.append("low focus")
    return tuple(found)


def _column(tiles: Tiles, name: str) -> NDArray[np.float32]:
    """(N,) one flag, or zeros where it was not measured."""
    if name not in tiles.qc_names:
        return np.full(len(tiles), np.nan if name == "focus" else 0, np.float32)
    return np.asarray(tiles.qc[:, tiles.qc_names.index(name)])


def _tissue_share(tiles: Tiles) -> float | None:
    """Tissue's share of the scanned area, where the file says enough."""
    area, bounds, mpp = (tiles.attrs.get(name) for name in ("tissue_area_mm2", "bounds", "mpp_level0"))
    if area is None or bounds is None or mpp is None:
        return None
    scanned = float(bounds[2] * mpp[0]) * float(bounds[3] * mpp[1]) / 1e6
    return float(area) / scanned if scanned else None


def contact_sheet(out: Path, slide_ids: Sequence[str], *, failed: int = 0) -> list[Path]:
    """Write `contact_sheet.jpg` (and `contact_sheet_2.jpg`, ...) of the slides tiled in an output folder.

    Suspects come first, those with more suspicions before the others; then by id. Slides without a tiles file are
    left out: they failed, and the table of slides says why.

    Args:
        out: the run's folder, with `tiles/<id>.h5` and `previews/<id>.jpg`.
        slide_ids: the slides.
        failed: how many others failed, for the title.

    Returns:
        the pages.
    """
    entries = []
    for slide_id in slide_ids:
        try:
            tiles = read_tiles(out / "tiles" / f"{slide_id}.h5")
        except (FileNotFoundError, FeatureFileError):
            continue
        area = float(tiles.attrs.get("tissue_area_mm2") or 0)
        picture = out / "previews" / f"{slide_id}.jpg"
        entries.append(Entry(slide_id, picture, len(tiles), area, suspicions(tiles)))
    return write_pages(out / "contact_sheet.jpg", entries, failed)


def write_pages(path: Path, entries: Sequence[Entry], failed: int = 0) -> list[Path]:
    """Write the entries on as many pages as they need; pages of an earlier, longer run go."""
    order = sorted(entries, key=lambda entry: (-len(entry.suspicions), entry.slide_id))
    count = math.ceil(len(order) / (COLUMNS * ROWS))
    pages = [path.with_stem(path.stem if page == 0 else f"{path.stem}_{page + 1}") for page in range(count)]
    for page, file in enumerate(pages):
        part = order[page * COLUMNS * ROWS : (page + 1) * COLUMNS * ROWS]
        suspects = sum(bool(entry.suspicions) for entry in order)
        slides = "1 slide" if len(order) == 1 else f"{len(order):,} slides"
        others = f", {failed:,} more failed (see slides.csv)" * (failed > 0)
        head = f"{slides}, {suspects:,} to look at first{others}" + (f"; page {page + 1} of {count}" * (count > 1))
        write_jpeg(file, draw_page(part, head))
    for old in path.parent.glob(f"{path.stem}_*{path.suffix}"):
        if old not in pages and old.stem.removeprefix(f"{path.stem}_").isdigit():
            old.unlink()
    return pages


def draw_page(entries: Sequence[Entry], head: str) -> NDArray[np.uint8]:
    """One page, (H, W, 3) RGB.

    Args:
        entries: in the order of the page.
        head: its title.
    """
    columns = min(COLUMNS, max(2, len(entries)))
    rows = math.ceil(len(entries) / columns)
    width, height = (CELL[0] + MARGIN) * columns + MARGIN, HEAD + (CELL[1] + MARGIN) * rows
    page = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 10), head, fill=INK, font=font(24))
    for index, entry in enumerate(entries):
        left = MARGIN + (index % columns) * (CELL[0] + MARGIN)
        top = HEAD + (index // columns) * (CELL[1] + MARGIN)
        picture = _thumbnail(entry.picture)
        page.paste(
            Image.fromarray(picture),
            (left + (CELL[0] - picture.shape[1]) // 2, top + (CELL[1] - TEXT - picture.shape[0]) // 2),
        )
        text = top + CELL[1] - TEXT
        tiles = "1 tile" if entry.tiles == 1 else f"{entry.tiles:,} tiles"
        draw.text((left + 6, text + 2), fitted(entry.slide_id, 18, CELL[0] - 12), fill=INK, font=font(18))
        draw.text((left + 6, text + 26), f"{tiles}, {entry.area_mm2:,.3g} sq mm", fill=GREY, font=font(16))
        words = fitted(", ".join(entry.suspicions), 16, CELL[0] - 12)
        draw.text((left + 6, text + 48), words, fill=ALARM, font=font(16))
        border = ALARM if entry.suspicions else (205, 205, 210)
        draw.rectangle(
            (left, top, left + CELL[0] - 1, top + CELL[1] - 1), outline=border, width=3 if entry.suspicions else 1
        )
    return np.array(page)


def _thumbnail(path: Path) -> NDArray[np.uint8]:
    """A preview without its caption, fitted into a cell; a grey field where it can't be read."""
    room = CELL[0] - 12, CELL[1] - TEXT - 12
    try:
        pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        pixels = None
    if pixels is None or pixels.shape[0] <= PANEL:
        return np.full((room[1], room[0], 3), 225, np.uint8)
    picture = pixels[:-PANEL, :, ::-1]
    factor = min(room[0] / picture.shape[1], room[1] / picture.shape[0])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
