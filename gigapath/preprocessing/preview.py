"""One picture per slide to judge its tiles by before anything is embedded: what is tissue, what was left out, where
tiles lie. Drawn from the slide's own levels; label and macro images are never used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gigapath.features import Tiles
from gigapath.files import write_bytes_atomic
from gigapath.preprocessing.slide import Overview, Slide
from gigapath.preprocessing.tissue import BoolImage, TissueMask

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


@dataclass(frozen=True)
class Frame:
    """Where a picture of (h, w) pixels lies on the slide, as in Overview."""

    shape: tuple[int, int]
    origin_level0: tuple[int, int]
    scale: tuple[float, float]


@dataclass(frozen=True)
class Item:
    """One entry of the legend."""

    colour: Colour
    words: str
    filled: bool


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
    image, frame = _sized(seen)
    image, step = _draw_tiles(image, tiles, frame)
    dropped = [(reason, area) for reason, area in mask.dropped.items() if area.any()]
    for _, area in dropped:
        within = _laid_on(frame, mask, area)
        image[within] = _mixed(image[within], DROPPED, 0.45)
        _outline(image, within, DROPPED)
    if mask.state != "full" and mask.method != "none":
        _outline(image, _laid_on(frame, mask, mask.mask), TISSUE)
    items = [Item(TISSUE, "tissue", False)] if mask.mask.any() and mask.state != "full" else []
    if len(tiles):
        items.append(
            Item(
                TILES, "tiles (faded: no tile)" if step == 1 else f"tiles, a line every {step} (faded: no tile)", False
            )
        )
    if dropped:
        items.append(Item(DROPPED, "left out: " + ", ".join(REASONS.get(name, name) for name, _ in dropped), True))
    return _page(image, tiles.slide_id, _caption(mask, tiles), items, overview.mpp / overview.scale[0] * frame.scale[0])


def _sized(seen: Overview) -> tuple[RGBImage, Frame]:
    """The picture at SIDE, and where it lies."""
    height, width = seen.image.shape[:2]
    factor = SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    image = np.asarray(cv2.resize(seen.image, size, interpolation=how), np.uint8)
    scale = seen.scale[0] * width / size[0], seen.scale[1] * height / size[1]
    return image, Frame((size[1], size[0]), seen.origin_level0, scale)


def _draw_tiles(image: RGBImage, tiles: Tiles, frame: Frame) -> tuple[RGBImage, int]:
    """Veil what lies outside the tiles and draw their grid; of many small tiles the lines of every `step`-th.

    Returns:
        the image, and `step`.
    """
    pitch = np.asarray(tiles.tile_size_level0) / frame.scale
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


def _laid_on(picture: Frame, mask: TissueMask, area: BoolImage) -> BoolImage:
    """(h, w) of the picture: where `area`, in the frame of `mask`, lies on it, its outline smoothed."""
    scale = [to / of for to, of in zip(picture.scale, mask.scale, strict=True)]
    start = [
        (to - of) / step for to, of, step in zip(picture.origin_level0, mask.origin_level0, mask.scale, strict=True)
    ]
    pixels = np.array(  # from the centre of a pixel of the picture to a point of the mask
        [[scale[0], 0, start[0] + scale[0] / 2 - 0.5], [0, scale[1], start[1] + scale[1] / 2 - 0.5]]
    )
    grey = cv2.warpAffine(
        area.astype(np.uint8) * 255,
        pixels,
        picture.shape[::-1],
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
    count = "no tiles" if not len(tiles) else "1 tile" if len(tiles) == 1 else f"{len(tiles):,} tiles"
    pieces = "1 piece" if mask.pieces == 1 else f"{mask.pieces:,} pieces"
    area = f"tissue {mask.area_mm2:,.3g} sq mm in {pieces}" if mask.mask.any() else "no tissue"
    sized = f"{count} of {tiles.tile_size} px at {tiles.mpp:.4g} microns a pixel"
    rule = f"tissue by {mask.method}" + ("" if mask.threshold is None else f", threshold {mask.threshold:.4g}")
    if mask.state == "full":
        rule += ", no background seen"
    level = f"level {tiles.level}" + ("" if tiles.read_size == (tiles.tile_size,) * 2 else ", resampled")
    return [f"{sized};  {area}", f"{rule};  {level}"]


def _page(image: RGBImage, title: str, caption: Sequence[str], items: Sequence[Item], mpp: float) -> RGBImage:
    """The picture on white, and below it title, caption, legend and scale bar.

    Args:
        image: (h, w, 3).
        title: the slide's id.
        caption: lines below it.
        items: the legend.
        mpp: microns per pixel of the picture.
    """
    height, width = image.shape[:2]
    page = Image.new("RGB", (max(width, LEAST_WIDTH), height + PANEL), (255, 255, 255))
    page.paste(Image.fromarray(image), ((page.width - width) // 2, 0))
    draw = ImageDraw.Draw(page)
    draw.line([(0, height), (page.width, height)], fill=GREY, width=1)
    draw.text((16, height + 10), fitted(title, 28, page.width - 32), fill=INK, font=font(28))
    for row, line in enumerate(caption):
        draw.text((16, height + 48 + 28 * row), line, fill=GREY, font=font(20))
    x = 16
    for item in items:
        box = (x, height + 118, x + 22, height + 136)
        draw.rectangle(box, outline=item.colour, fill=item.colour if item.filled else None, width=3)
        draw.text((x + 30, height + 114), item.words, fill=INK, font=font(20))
        x += 60 + round(font(20).getlength(item.words))
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
    try:
        return ImageFont.load_default(size)
    except TypeError:  # before Pillow 10.1 it has one size
        return ImageFont.load_default()


def fitted(text: str, size: int, width: int) -> str:
    """The text, its middle cut out where it is wider than `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font(size).getlength(f"{text[: keep // 2]}\u2026{text[-(keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}\u2026{text[-(keep // 2) :]}"
