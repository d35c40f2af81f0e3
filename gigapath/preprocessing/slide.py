"""Open a whole-slide image: its size, its scale and its provenance, read where it lies.

Frames: `level0` coordinates are OpenSlide's absolute level-0 pixels, (x, y) from the slide's top-left corner. Sizes are
(width, height); arrays are (H, W, 3) uint8 RGB. Label and macro images are never opened.
"""

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from gigapath.preprocessing.fast import READERS, FastReader, tiff_facts
from gigapath.preprocessing.header import (
    SCANNERS,
    Mpp,
    SlideError,
    allowed,
    check_scale,
    leading_levels,
    number,
    ome_mpp,
    open_handle,
    scanned_area,
    stated_mpp,
)
from gigapath.read_ahead import read_ahead
from gigapath.tables import composed

__all__ = ["SLIDE_SUFFIXES", "Mpp", "Overview", "Slide", "SlideError", "open_slide", "slide_id_of"]

UInt8Array = npt.NDArray[np.uint8]

# A file name loses the first of these that it ends in; the rest is the slide's id.
SLIDE_SUFFIXES = (
    *(".ome.tiff", ".ome.tif", ".svs", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu"),
    *(".dcm", ".czi", ".jpeg", ".jpg", ".png"),
)

SAME_SCALE = 0.02  # x and y this close are one scale, averaged
OVERVIEW_MPP = 8.0
OVERVIEW_SIDE = 8192  # no overview grows beyond this many pixels a side
OVERVIEW_READ_PIXELS = 50 * 10**9  # half an hour of decoding; above that a header is broken
BLOCK_SIDE = 1024  # pixels of a level read at once for the overview, a side

# Levels are compared with the next finer one at a few places. Correlation is blind to brightness and contrast; blur of
# three pixels and sharpening leave 0.85 of it, another place or another picture less than 0.6 at one of the places.
COMPARED_SIDE = 64  # pixels of the coarser level
COMPARED_PIXELS = 1024  # of the finer level, a side, at most
ALIKE = 0.5**0.5  # half of what varies in one is found in the other
BETTER_ELSEWHERE = 0.1  # by which it may correlate better some pixels further: levels are rounded by less than two
TEXTURE = 6.0  # grey levels (standard deviation); what varies less shows nothing to compare


@dataclass(frozen=True)
class Overview:
    """The slide within its bounds at low power.

    Attributes:
        image: (h, w, 3) RGB, white where the slide holds nothing.
        opaque: (h, w), True where the slide holds pixels.
        origin_level0: (x, y) of the top-left corner.
        scale: (sx, sy) level-0 pixels per overview pixel, fractional; pixel (i, j) covers the level-0 area from
            origin_level0 + (i, j) * scale to origin_level0 + (i + 1, j + 1) * scale.
        mpp: microns per overview pixel, mean of x and y.
    """

    image: UInt8Array
    opaque: npt.NDArray[np.bool_]
    origin_level0: tuple[int, int]
    scale: tuple[float, float]
    mpp: float


def slide_id_of(path: str | Path) -> str:
    """The file name without its recognised suffix, whatever the case of the suffix, in Unicode's composed form."""
    name = composed(Path(path).name)
    suffix = next((end for end in SLIDE_SUFFIXES if name.lower().endswith(end) and len(name) > len(end)), "")
    return name[: len(name) - len(suffix)]


def open_slide(
    path: str | Path,
    *,
    slide_id: str | None = None,
    slide_mpp: float | None = None,
    mpp_source: str = "--slide-mpp",
    mpp_from_objective: bool = False,
    reader: str = "auto",
) -> "Slide":
    """Open a slide in place with OpenSlide, or a plain JPEG or PNG as a slide of one level.

    Args:
        path: a slide file.
        slide_id: the slide's name in every output; the file name without its suffix when None.
        slide_mpp: microns per level-0 pixel that override what the file says, unchecked but for being positive.
        mpp_source: where `slide_mpp` comes from, for the record ("manifest" or the option's name).
        mpp_from_objective: take 10 / objective power where the file gives no scale.
        reader: "auto" decodes tiled TIFFs directly where that gives OpenSlide's pixels to the bit, "openslide" never.

    Raises:
        FileNotFoundError: nothing lies there.
        SlideError: it is no slide, or a broken one.
    """
    path = Path(path)
    slide_id = slide_id_of(path) if slide_id is None else slide_id
    if slide_mpp is not None and not (math.isfinite(slide_mpp) and slide_mpp > 0):
        raise ValueError(f"{mpp_source}: expected microns per pixel above 0, got {slide_mpp!r}.")
    if reader not in READERS:
        raise ValueError(f"open_slide: expected a reader of {', '.join(READERS)}, got {reader!r}.")
    override = None if slide_mpp is None else Mpp(slide_mpp, slide_mpp, mpp_source)
    handle = open_handle(path, slide_id)
    try:
        return Slide(path, handle, slide_id, override, mpp_from_objective, reader)
    except SlideError:
        handle.close()
        raise


class Slide:
    """An open slide; use it as a context manager. Reads from several threads at once are safe.

    Attributes:
        path: where it lies; never written to an output.
        slide_id: its name in every output.
        vendor: OpenSlide's word for the format, "plain-image" for JPEG and PNG.
        dimensions: (W, H) of level 0.
        level_dimensions, level_downsamples: (w, h) and OpenSlide's downsample of each level, finest first, up to the
            first that doesn't show the whole slide.
        misfits: (w, h) of the levels that are never read: padded, cropped or another picture, and those after it.
        bounds: (x, y, w, h) in level-0 pixels of what was scanned; the whole slide where the file names no bounds.
        properties: the allow-listed header entries; nothing else of the header leaves this class.
        objective_power: the magnification that the file states, or None.
        one_channel: whether the file holds one channel a page, not colours.
        fast: what reads its levels without OpenSlide, where it can.
    """

    def __init__(
        self,
        path: Path,
        handle: openslide.AbstractSlide,
        slide_id: str,
        override: Mpp | None,
        mpp_from_objective: bool,
        reader: str,
    ) -> None:
        self._handle = handle
        self._plain = isinstance(handle, openslide.ImageSlide)
        self._plain_lock = threading.Lock()  # Pillow decodes on first use, which is not safe from two threads
        self._spent: list[openslide.AbstractSlide] = []
        self._override = override
        self._mpp_from_objective = mpp_from_objective
        self.path = path
        self.slide_id = slide_id
        header: Mapping[str, str] = handle.properties
        self.vendor = "plain-image" if self._plain else str(header.get("openslide.vendor", "unknown"))
        self.dimensions: tuple[int, int] = handle.dimensions
        used = leading_levels(handle.level_dimensions, header)
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(handle.level_dimensions[:used])
        self.level_downsamples: tuple[float, ...] = tuple(handle.level_downsamples[:used])
        self.misfits: tuple[tuple[int, int], ...] = tuple(handle.level_dimensions[used:])
        self._compared = 0  # levels up to this one show what level 0 does
        self.properties = allowed(header)
        self.objective_power = number(header, "openslide.objective-power")
        self.stated_mpp, self._ome_mpp = stated_mpp(header), ome_mpp(header)
        orientation, channels, larger = tiff_facts(path, self.vendor)
        if orientation != 1:
            raise SlideError(
                f"slide {slide_id!r}: expected a TIFF of orientation 1, got {orientation}: OpenSlide turns each "
                "block by itself. Convert it to a tiled TIFF that starts at its top left (orientation 1)."
            )
        if larger not in (None, self.dimensions):  # else OpenSlide took the largest for level 0, wherever it stands
            raise SlideError(
                f"slide {slide_id!r}: expected a TIFF whose first picture is the slide, got {self.dimensions[0]} x "
                f"{self.dimensions[1]} before {larger[0]} x {larger[1]}: a label or an overview, which "
                "OpenSlide takes for the slide. Write the slide first."
            )
        self.one_channel = channels == 1
        self.bounds = scanned_area(slide_id, self.dimensions, self.properties)
        self.fast = FastReader(self, reader)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self.fast.close()
        for handle in (self._handle, *self._spent):
            handle.close()

    @property
    def scanner(self) -> str | None:
        """The scanner's model where the file gives it in a known form."""
        return next((str(self.properties[name]) for name in SCANNERS if name in self.properties), None)

    @cached_property
    def mpp(self) -> Mpp:
        """Microns per level-0 pixel: the override, else what the file states, else from the objective if allowed; x and
        y within 2 % are averaged. SlideError where there is no figure, or it is implausible for brightfield."""
        if self._override is not None:
            return self._override
        if self.stated_mpp is not None:
            mpp, ome = self.stated_mpp, self._ome_mpp
            if ome is not None and abs(ome.mean / mpp.mean - 1) > SAME_SCALE:
                raise SlideError(
                    f"slide {self.slide_id!r}: expected one figure of microns per pixel, got {mpp.mean:.4g} from "
                    f"{mpp.source} and {ome.mean:.4g} from {ome.source}. State the right one with --slide-mpp, or in a "
                    "manifest's column `mpp`."
                )
            check_scale(self.slide_id, mpp, self.objective_power)
        elif self._mpp_from_objective and self.objective_power is not None:
            mpp = Mpp(10 / self.objective_power, 10 / self.objective_power, "objective power")
            check_scale(self.slide_id, mpp, self.objective_power)
        else:
            power = self.objective_power
            way = "" if power is None else f" or take 10 / objective power ({power:g}) with --mpp-from-objective"
            raise SlideError(
                f"slide {self.slide_id!r}: expected microns per pixel in the file, got none. "
                f"State them with --slide-mpp (for all slides of the run) or in a manifest's column `mpp`{way}."
            )
        if abs(mpp.x - mpp.y) <= SAME_SCALE * mpp.mean:
            return Mpp(mpp.mean, mpp.mean, mpp.source)
        return mpp

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8Array:
        """Pixels (height, width, 3) RGB of one level, on white where the slide holds nothing; x and y of the top left
        in level-0 pixels, width and height in the level's.

        These are OpenSlide's pixels, to the bit: where x or y over the level's downsample is no whole number, as on
        levels that were rounded to 2.0005, OpenSlide shifts the picture by the rest, which blurs it a little.

        Raises:
            SlideError: these pixels can't be decoded. OpenSlide then refuses every later read of this slide.
        """
        return _on_white(self._read_rgba(x, y, level, width, height))

    def read_apart(self, x: int, y: int, level: int, width: int, height: int) -> UInt8Array:
        """Like `read`, but an error leaves the slide readable: OpenSlide would refuse every read after it."""
        try:
            return self.read(x, y, level, width, height)
        except SlideError:
            self._spent.append(self._handle)
            self._handle = open_handle(self.path, self.slide_id)
            raise

    def reads(self, level: int, places: npt.NDArray[np.int64]) -> Callable[[int, UInt8Array | None], UInt8Array]:
        """What `read` gives at many places of a level, each compressed block decoded once where that can be.

        `places` (N, 4) int64 are x and y in level-0 pixels, width and height in pixels of the level, each to be read
        once; their order is the cheapest. The function that is returned takes the index of a place, and an array
        (height, width, 3) to fill or None; it raises SlideError, and may be called from any thread while the slide is
        open.
        """
        regions = self.fast.regions(level, places)

        def read(index: int, out: UInt8Array | None) -> UInt8Array:
            pixels = None if regions is None else regions.read(index, out)
            if pixels is None:
                x, y, width, height = places[index].tolist()
                pixels = self.read(x, y, level, width, height)
            return pixels

        return read

    def overview(self, mpp: float = OVERVIEW_MPP, *, workers: int = 0) -> Overview:
        """The bounds at `mpp` microns a pixel, or at the slide's own scale where that is coarser.

        The coarsest level that is fine enough is read in blocks, each pixel once, and averaged over area: memory does
        not depend on the level read, nor the result on `workers`. The last column and row may hang over the bounds by
        less than their own width.

        Raises:
            SlideError: the pixels can't be decoded, or there are absurdly many of them and no coarse level.
        """
        overview = self._overview(mpp, workers)
        if self.compare_levels(overview, self.overview_source(mpp)[0]):
            return overview
        return self.overview(mpp, workers=workers)  # from the levels that are left

    def compare_levels(self, overview: Overview, last: int) -> bool:
        """Whether the levels up to `last` show what level 0 does, where the overview has most to show.

        Each is compared with the next finer one, which costs the same whatever its downsample. From the first that
        shows something else on they are left out, as if the file had no such levels.
        """
        levels = range(self._compared + 1, min(last + 1, len(self.level_dimensions)))
        places = _where_to_compare(overview) if levels else []
        for level in levels:
            if not all(self._shows_the_finer(level, *place) for place in places):
                self.misfits = (*self.level_dimensions[level:], *self.misfits)
                self.level_dimensions = self.level_dimensions[:level]
                self.level_downsamples = self.level_downsamples[:level]
                return False
            self._compared = level
        return True

    def _shows_the_finer(self, level: int, x: float, y: float) -> bool:
        """Whether a level shows what the next finer one does about (x, y), in level-0 pixels, but for two pixels'
        shift; True where too little varies there."""
        downsample = self.level_downsamples[level]
        ratio = downsample / self.level_downsamples[level - 1]
        width, height = self.level_dimensions[level]
        side = min(COMPARED_SIDE, int(COMPARED_PIXELS / ratio), width, height)
        reach = side // 8
        if reach == 0:  # too few pixels to tell pictures apart
            return True
        left = min(max(round(x / downsample - side / 2), 0), width - side)
        top = min(max(round(y / downsample - side / 2), 0), height - side)
        corner = round(left * downsample), round(top * downsample)
        try:
            coarse = self.read_apart(*corner, level, side, side)
            fine = self.read_apart(*corner, level - 1, round(side * ratio), round(side * ratio))
        except SlideError:  # where its pixels are wanted, the reader says so
            return True
        a, b = (cv2.blur(pixels, (3, 3)) for pixels in (coarse, _area_mean(fine, (side, side))))
        inner = slice(reach, side - reach)
        low, high = sorted(float(pixels[inner, inner].std(axis=(0, 1)).mean()) for pixels in (a, b))
        if high < TEXTURE:
            return True
        fit = cv2.matchTemplate(b, a[inner, inner], cv2.TM_CCOEFF_NORMED)  # by the shift along y and x
        here = slice(reach - min(2, reach // 2), reach + min(2, reach // 2) + 1)
        return low > high / 10 and float(fit[here, here].max()) > max(ALIKE, float(fit.max()) - BETTER_ELSEWHERE)

    def _overview(self, mpp: float, workers: int) -> Overview:
        own = self.mpp
        left, top = self.bounds[:2]
        wanted = self._overview_mpp(mpp)
        level, columns, rows = self.overview_source(mpp)
        downsample = self.level_downsamples[level]
        if columns * rows > OVERVIEW_READ_PIXELS:
            raise SlideError(
                f"slide {self.slide_id!r}: expected a level of at most {OVERVIEW_READ_PIXELS // 10**9} gigapixels near "
                f"{wanted:g} microns per pixel, got {columns} x {rows} pixels. Give the slide a pyramid."
            )
        step = max(1, int(wanted / (own.x * downsample))), max(1, int(wanted / (own.y * downsample)))
        averaged = self._averaged(level, (max(1, columns), max(1, rows)), step, workers)
        covered = averaged.shape[1] * step[0] * downsample, averaged.shape[0] * step[1] * downsample
        size = max(1, round(covered[0] * own.x / wanted)), max(1, round(covered[1] * own.y / wanted))
        rgba = _area_mean(averaged, size)
        scale = covered[0] / size[0], covered[1] / size[1]
        return Overview(
            image=np.ascontiguousarray(rgba[..., :3]),
            opaque=rgba[..., 3] >= 128,
            origin_level0=(left, top),
            scale=scale,
            mpp=(scale[0] * own.x + scale[1] * own.y) / 2,
        )

    def overview_source(self, mpp: float = OVERVIEW_MPP) -> tuple[int, int, int]:
        """(level, columns, rows): what `overview` reads, in pixels of that level."""
        own, wanted = self.mpp, self._overview_mpp(mpp)
        left, top, width, height = self.bounds
        fine = [i for i, d in enumerate(self.level_downsamples) if max(own.x, own.y) * d <= wanted * (1 + SAME_SCALE)]
        level = fine[-1] if fine else 0
        downsample = self.level_downsamples[level]
        # What a level lacks of the slide's last pixels, its size being rounded down, is not read.
        columns = min(round(width / downsample), self.level_dimensions[level][0] - int(left / downsample))
        rows = min(round(height / downsample), self.level_dimensions[level][1] - int(top / downsample))
        return level, columns, rows

    def _overview_mpp(self, mpp: float) -> float:
        """The scale of an overview asked for at `mpp`: never finer than the slide's own, never too large a picture."""
        own = self.mpp
        _, _, width, height = self.bounds
        return max(mpp, own.x, own.y, max(width * own.x, height * own.y) / OVERVIEW_SIDE)

    def _averaged(self, level: int, size: tuple[int, int], step: tuple[int, int], workers: int) -> UInt8Array:
        """The first `size` (w, h) pixels of the bounds at `level`, averaged over (x, y) steps of whole pixels: (ceil(h
        / step y), ceil(w / step x), 4), RGB on white, and alpha."""
        left, top = self.bounds[:2]
        downsample = self.level_downsamples[level]
        out = np.empty((-(-size[1] // step[1]), -(-size[0] // step[0]), 4), np.uint8)
        block = max(1, BLOCK_SIDE // step[0]) * step[0], max(1, BLOCK_SIDE // step[1]) * step[1]

        corners = [(x, y) for y in range(0, size[1], block[1]) for x in range(0, size[0], block[0])]
        places = [
            (round(x * downsample), round(y * downsample), min(block[0], size[0] - x), min(block[1], size[1] - y))
            for x, y in corners
        ]
        regions = self.fast.regions(level, np.array(places, np.int64) + np.array([left, top, 0, 0]))

        def fill(index: int) -> None:
            (x, y), (right, down, w, h) = corners[index], places[index]
            rgb = None if regions is None else regions.read(index)
            if rgb is None:
                pixels = self._read_rgba(left + right, top + down, level, w, h)
            else:
                pixels = np.dstack([rgb, np.full((h, w, 1), 255, np.uint8)])
            if pixels[..., 3].min() < 255:
                pixels = np.dstack([_on_white(pixels), pixels[..., 3]])
            # A last block of fewer pixels is filled up with its own edge.
            if h % step[1] or w % step[0]:
                border = 0, -h % step[1], 0, -w % step[0]
                pixels = cv2.copyMakeBorder(pixels, *border, cv2.BORDER_REPLICATE).astype(np.uint8, copy=False)
            mean = _area_mean(pixels, (pixels.shape[1] // step[0], pixels.shape[0] // step[1]))
            i, j = x // step[0], y // step[1]
            out[j : j + len(mean), i : i + mean.shape[1]] = mean

        blocks, several = range(len(corners)), workers and len(corners) > 1
        for _ in read_ahead(fill, blocks, threads=workers, ahead=4 * workers) if several else map(fill, blocks):
            pass
        return out

    def _read_rgba(self, x: int, y: int, level: int, width: int, height: int) -> UInt8Array:
        """(height, width, 4) RGBA as OpenSlide gives it."""
        try:
            with self._plain_lock if self._plain else contextlib.nullcontext():
                return np.asarray(self._handle.read_region((x, y), level, (width, height)))
        except (openslide.OpenSlideError, OSError, SyntaxError) as error:  # Pillow: SyntaxError for a broken PNG
            raise SlideError(
                f"slide {self.slide_id!r}: expected {width} x {height} readable pixels at x {x}, y {y} of level "
                f"{level}, got an error from the decoder ({' '.join(str(error).split())[:160].rstrip('.')}). Where the "
                "file is damaged or cut short, copy it again; else convert it (vips tiffsave --tile --pyramid)."
            ) from error


def _on_white(rgba: UInt8Array) -> UInt8Array:
    """(h, w, 4) RGBA, not premultiplied, laid on white: (h, w, 3)."""
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha[..., None].astype(np.uint16)
    return ((rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _where_to_compare(overview: Overview) -> list[tuple[float, float]]:
    """Level-0 (x, y) of the strongest contrast in each quarter of the overview; where it shows nothing, the middles of
    a finer grid: a blank picture may hide a slide."""
    step = 1 + max(overview.image.shape) // 1024  # enough to choose by, whatever the slide's size
    grey = overview.image[::step, ::step].mean(axis=-1, dtype=np.float32)
    contrast = cv2.blur((cv2.blur(grey, (3, 3)) - cv2.blur(grey, (9, 9))) ** 2, (9, 9))
    blank = contrast.max() < 1
    rows, columns = (np.linspace(0, side, 5 if blank else 3).astype(int).tolist() for side in contrast.shape)
    found = []
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
        cell = contrast[top:bottom, left:right]
        y, x = divmod(int(cell.argmax()), cell.shape[1]) if cell.size and not blank else np.array(cell.shape) // 2
        at = (left + x + 0.5) * step, (top + y + 0.5) * step
        left_level0, top_level0 = overview.origin_level0
        found.append((left_level0 + float(at[0]) * overview.scale[0], top_level0 + float(at[1]) * overview.scale[1]))
    return found


def _area_mean(pixels: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Pixels at a smaller or equal size (w, h), each the mean of the area it covers."""
    if pixels.shape[1::-1] == size:
        return pixels
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
