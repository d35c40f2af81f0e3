"""A slide's preview, and all previews of a run on a few pages, the slides that want a look first.

A slide is a suspect where its figures are out of the ordinary; nothing is changed for it, a person looks.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gigapath.features import FeatureFileError, Tiles, read_tiles
from gigapath.files import write_bytes_atomic
from gigapath.preprocessing.slide import Overview, Slide
from gigapath.preprocessing.tissue import BoolImage, TissueMask
from gigapath.text import slides_in_words, tiles_in_words

RGBImage = NDArray[np.uint8]
Colour = tuple[int, int, int]

SIDE = 1600  # the picture's longer side, in pixels
LEAST_WIDTH = 1000  # of the page, for the caption
PANEL = 150  # height of the caption; the contact sheet cuts it off
GRID_SPACE = 7  # grid lines are no closer than this
GRID_STEPS = (1, 2, 5, 10, 20, 50, 100)
READ_PIXELS = 50_000_000  # a level larger than this is not read for the picture alone
QUALITY = 88

INK: Colour = (25, 25, 30)
GREY: Colour = (95, 95, 105)
TISSUE: Colour = (0, 145, 60)
TILES: Colour = (25, 70, 215)
DROPPED: Colour = (245, 120, 0)

REASONS = {"pen": "pen on glass", "black": "black fill", "frame": "dark frame", "speck": "specks"}


def preview_picture(slide: Slide, overview: Overview) -> Overview:
    """An overview fine enough to look at: of a small slide a finer one than tissue is found on, where it is cheap."""
    height, width = overview.image.shape[:2]
    if max(height, width) >= 0.75 * SIDE:
        return overview
    mpp = overview.mpp * max(height, width) / SIDE
    fine = [index for index, step in enumerate(slide.level_downsamples) if slide.mpp.mean * step <= mpp]
    if math.prod(slide.level_dimensions[fine[-1] if fine else 0]) > READ_PIXELS:
        return overview
    return slide.overview(mpp)


def write_preview(
    path: Path, overview: Overview, mask: TissueMask, tiles: Tiles, *, picture: Overview | None = None
) -> None:
    """Draw a slide's preview and write it as JPEG, whole or not at all; see `draw_preview`."""
    write_jpeg(path, draw_preview(overview, mask, tiles, picture=picture))


def write_jpeg(path: Path, image: RGBImage) -> None:
    """Write (H, W, 3) RGB as JPEG, whole or not at all."""
    done, content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise ValueError(f"{path.name}: expected an image that JPEG can hold, got {image.shape}.")
    write_bytes_atomic(path, content.tobytes())


def draw_preview(overview: Overview, mask: TissueMask, tiles: Tiles, *, picture: Overview | None = None) -> RGBImage:
    """Draw the slide within its bounds: outline of the tissue, what was left out, the tiles; below, a caption.

    Args:
        overview: the slide as tissue was found on it.
        mask: its tissue, in the frame of `overview`.
        tiles: the tiles that were planned.
        picture: a finer overview to draw on (`preview_picture`); `overview` when None.

    Returns:
        (H, W, 3) RGB, its longer side about SIDE.
    """
    seen = overview if picture is None else picture
    frame = _sized(seen)
    image, step = _draw_tiles(frame, tiles)
    dropped = [(reason, area) for reason, area in mask.dropped.items() if area.any()]
    for _, area in dropped:
        within = _laid_on(frame, mask, area)
        image[within] = _mixed(image[within], DROPPED, 0.45)
        _outline(image, within, DROPPED)
    if mask.state != "full" and mask.method != "none":
        _outline(image, _laid_on(frame, mask, mask.mask), TISSUE)
    legend = [(TISSUE, "tissue", False)] if mask.mask.any() and mask.state != "full" else []
    if len(tiles):
        grid = "" if step == 1 else f", a line every {step}"
        legend.append((TILES, f"tiles{grid} (faded: no tile)", False))
    if dropped:
        legend.append((DROPPED, "left out: " + ", ".join(REASONS.get(name, name) for name, _ in dropped), True))
    return _page(
        image, tiles.slide_id, _caption(mask, tiles), legend, overview.mpp / overview.scale[0] * frame.scale[0]
    )


def _sized(seen: Overview) -> Overview:
    """The picture at SIDE."""
    height, width = seen.image.shape[:2]
    factor = SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    image = np.asarray(cv2.resize(seen.image, size, interpolation=how), np.uint8)
    scale = seen.scale[0] * width / size[0], seen.scale[1] * height / size[1]
    return replace(seen, image=image, scale=scale)


def _draw_tiles(frame: Overview, tiles: Tiles) -> tuple[RGBImage, int]:
    """Veil what lies outside the tiles and draw their grid; of many small tiles the lines of every `step`-th.

    Returns:
        the image, and `step`.
    """
    image, pitch = frame.image, np.asarray(tiles.tile_size_level0) / frame.scale
    step = next((step for step in GRID_STEPS if min(pitch) * step >= GRID_SPACE), GRID_STEPS[-1])
    corners = np.rint((tiles.coords_level0 - frame.origin_level0) / frame.scale).astype(int)
    ends = np.rint((tiles.coords_level0 + tiles.tile_size_level0 - frame.origin_level0) / frame.scale).astype(int)
    kept, lines = np.zeros(image.shape[:2], bool), np.zeros(image.shape[:2], bool)
    starts_line = tiles.cells % step == 0
    for (left, top), (right, bottom), (upright, level) in zip(corners, ends, starts_line, strict=True):
        kept[top:bottom, left:right] = True
        if upright:
            lines[top:bottom, left] = True
        if level:
            lines[top, left:right] = True
    image = np.where(kept[..., None], image, _mixed(image, (255, 255, 255), 0.4))
    image[lines] = _mixed(image[lines], TILES, 0.5)
    _outline(image, kept, TILES)
    return image, step


def _laid_on(picture: Overview, mask: TissueMask, area: BoolImage) -> BoolImage:
    """(h, w) of the picture: where `area`, in the frame of `mask`, lies on it, its outline smoothed."""
    scale = np.asarray(picture.scale) / mask.scale
    start = np.subtract(picture.origin_level0, mask.origin_level0) / mask.scale
    grey = cv2.warpAffine(
        area.astype(np.uint8) * 255,
        # From the centre of a pixel of the picture to a point of the mask.
        np.column_stack([np.diag(scale), start + scale / 2 - 0.5]),
        picture.image.shape[1::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    laid: BoolImage = np.asarray(grey) >= 128
    return laid


def _outline(image: RGBImage, mask: BoolImage, colour: Colour) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, colour, 2, cv2.LINE_AA)


def _mixed(pixels: RGBImage, colour: Colour, share: float) -> RGBImage:
    """Pixels (..., 3) with `share` of a colour."""
    return np.rint(pixels * (1 - share) + np.asarray(colour) * share).astype(np.uint8)


def _caption(mask: TissueMask, tiles: Tiles) -> list[str]:
    """Two lines: what there is, and how it was found."""
    count = tiles_in_words(len(tiles)) if len(tiles) else "no tiles"
    pieces = "1 piece" if mask.pieces == 1 else f"{mask.pieces:,} pieces"
    area = f"tissue {mask.area_mm2:,.3g} mm² in {pieces}" if mask.mask.any() else "no tissue"
    sized = f"{count} of {tiles.tile_size} px at {tiles.mpp:.4g} microns a pixel"
    rule = f"tissue by {mask.method}" + ("" if mask.threshold is None else f", threshold {mask.threshold:.4g}")
    if mask.state == "full":
        rule += ", no background seen"
    level = f"level {tiles.level}" + ("" if tiles.read_size == (tiles.tile_size,) * 2 else ", resampled")
    return [f"{sized};  {area}", f"{rule};  {level}"]


def _page(
    image: RGBImage, title: str, caption: Sequence[str], legend: Sequence[tuple[Colour, str, bool]], mpp: float
) -> RGBImage:
    """The picture (h, w, 3) of `mpp` microns a pixel on white; below it title, caption lines, legend (colour, words,
    whether the sample is filled) and scale bar."""
    height, width = image.shape[:2]
    page = Image.new("RGB", (max(width, LEAST_WIDTH), height + PANEL), (255, 255, 255))
    page.paste(Image.fromarray(image), ((page.width - width) // 2, 0))
    draw = ImageDraw.Draw(page)
    draw.line([(0, height), (page.width, height)], fill=GREY, width=1)
    draw.text((16, height + 10), fitted(title, 28, page.width - 32), fill=INK, font=font(28))
    for row, line in enumerate(caption):
        _write(draw, (16, height + 48 + 28 * row), line, 20)
    x = 16
    for colour, words, filled in legend:
        box = (x, height + 118, x + 22, height + 136)
        draw.rectangle(box, outline=colour, fill=colour if filled else None, width=3)
        draw.text((x + 30, height + 114), words, fill=INK, font=font(20))
        x += 60 + round(font(20).getlength(words))
    _scale_bar(draw, page.width - 16, height + 130, min(width // 3, page.width - 32 - x), mpp)
    return np.array(page)


def _scale_bar(draw: ImageDraw.ImageDraw, right: int, y: int, room: int, mpp: float) -> None:
    """A bar of a round length that ends at `right`, and its length in words above it."""
    lengths = [digit * 10**power for power in range(0, 6) for digit in (1, 2, 5)]
    length = max((value for value in lengths if value / mpp <= room), default=0)
    if not length:
        return
    words = f"{length / 1000:g} mm" if length >= 1000 else f"{length} microns"
    left = right - round(length / mpp)
    draw.line([(left, y), (right, y)], fill=INK, width=4)
    for x in (left, right):
        draw.line([(x, y - 6), (x, y + 6)], fill=INK, width=3)
    draw.text((left, y - 30), words, fill=INK, font=font(18))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: nothing is looked for on the machine."""
    return ImageFont.load_default(size)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int) -> None:
    """Draw gray text; Pillow's own font has no superscript two, so it is a small, raised 2."""
    x = float(at[0])
    for number, part in enumerate(text.split("²")):
        if number:
            draw.text((x, at[1]), "2", fill=GREY, font=font(round(0.65 * size)))
            x += font(round(0.65 * size)).getlength("2")
        draw.text((x, at[1]), part, fill=GREY, font=font(size))
        x += font(size).getlength(part)


def fitted(text: str, size: int, width: int) -> str:
    """The text, its middle cut out where it is wider than `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font(size).getlength(f"{text[: keep // 2]}\u2026{text[-(keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}\u2026{text[-(keep // 2) :]}"


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


def suspicions(tiles: Tiles) -> tuple[str, ...]:
    """Why a person should look at this slide, in words."""
    attrs = tiles.attrs
    found = []
    area, bounds, mpp = (attrs.get(name) for name in ("tissue_area_mm2", "bounds", "mpp_level0"))
    scanned = 0.0 if bounds is None or mpp is None else float(bounds[2] * mpp[0]) * float(bounds[3] * mpp[1]) / 1e6
    share = float(area) / scanned if area is not None and scanned else None  # of what was scanned, where that is known
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


def contact_sheet(out: Path, slide_ids: Sequence[str], *, failed: int = 0) -> list[Path]:
    """Write `contact_sheet.jpg` (and `contact_sheet_2.jpg`, ...) of the slides tiled in an output folder; its pages.

    Suspects come first, those with more suspicions before the others; then by id. Slides without a tiles file are left
    out: they are among the `failed`, which the title counts, and the table of slides says why. Pages of an earlier,
    longer run go.
    """
    found = []
    for slide_id in slide_ids:
        with contextlib.suppress(FileNotFoundError, FeatureFileError):
            read = read_tiles(out / "tiles" / f"{slide_id}.h5")
            found.append((suspicions(read), slide_id, len(read), float(read.attrs.get("tissue_area_mm2") or 0)))
    found.sort(key=lambda slide: (-len(slide[0]), slide[1]))
    others = f", {failed:,} more failed (see slides.csv)" * (failed > 0)
    head = f"{slides_in_words(len(found))}, {sum(bool(why) for why, *_ in found):,} to look at first{others}"
    parts = [found[first : first + COLUMNS * ROWS] for first in range(0, len(found), COLUMNS * ROWS)]
    pages = [out / f"contact_sheet{f'_{number}' * (number > 1)}.jpg" for number in range(1, len(parts) + 1)]
    for number, (page, part) in enumerate(zip(pages, parts, strict=True), start=1):
        cells = [_cell(out / "previews" / f"{name}.jpg", name, tiles, area, why) for why, name, tiles, area in part]
        write_jpeg(page, _sheet(cells, head + f"; page {number} of {len(pages)}" * (len(pages) > 1)))
    for old in out.glob("contact_sheet_*.jpg"):
        if old not in pages and old.stem.removeprefix("contact_sheet_").isdigit():
            old.unlink()
    return pages


def _sheet(cells: Sequence[Image.Image], head: str) -> RGBImage:
    """One page of slides, (H, W, 3) RGB, with a title."""
    columns = min(COLUMNS, max(2, len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = (CELL[0] + MARGIN) * columns + MARGIN, HEAD + (CELL[1] + MARGIN) * rows
    page = Image.new("RGB", (width, height), (255, 255, 255))
    ImageDraw.Draw(page).text((MARGIN, 10), head, fill=INK, font=font(24))
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        page.paste(cell, (MARGIN + column * (CELL[0] + MARGIN), HEAD + row * (CELL[1] + MARGIN)))
    return np.array(page)


def _cell(path: Path, slide_id: str, tiles: int, area_mm2: float, why: Sequence[str]) -> Image.Image:
    """One slide: its preview without the caption (a grey field where it can't be read), its figures, why to look."""
    room = CELL[0] - 12, CELL[1] - TEXT - 12
    try:
        pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        pixels = None
    picture = np.full((room[1], room[0], 3), 225, np.uint8)
    if pixels is not None and pixels.shape[0] > PANEL:
        height, width = pixels.shape[0] - PANEL, pixels.shape[1]
        factor = min(room[0] / width, room[1] / height)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        picture = np.asarray(cv2.resize(pixels[:-PANEL, :, ::-1], size, interpolation=cv2.INTER_AREA), np.uint8)
    cell = Image.new("RGB", CELL, (255, 255, 255))
    draw, text = ImageDraw.Draw(cell), CELL[1] - TEXT
    cell.paste(Image.fromarray(picture), ((CELL[0] - picture.shape[1]) // 2, (text - picture.shape[0]) // 2))
    draw.text((6, text + 2), fitted(slide_id, 18, CELL[0] - 12), fill=INK, font=font(18))
    _write(draw, (6, text + 26), f"{tiles_in_words(tiles)}, {area_mm2:,.3g} mm²", 16)
    draw.text((6, text + 48), fitted(", ".join(why), 16, CELL[0] - 12), fill=ALARM, font=font(16))
    border, width = (ALARM, 3) if why else ((205, 205, 210), 1)
    draw.rectangle((0, 0, CELL[0] - 1, CELL[1] - 1), outline=border, width=width)
    return cell
