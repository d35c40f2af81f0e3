"""What opens a slide's file; what its header says of scale, bounds, levels and scanner, where it contradicts itself,
and what of it may leave: never free text."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openslide
import PIL.Image


class SlideError(ValueError):
    """What is wrong with one slide, in one sentence that holds no path; a job records it and goes on."""


TILE_PIXELS = 2**28  # of the file's own tiles: OpenSlide ends the process where it can't have the memory for one
PLAIN_IMAGE_PIXELS = 89_000_000  # a plain image is decoded whole; Pillow itself warns from here on
_UNSUPPORTED = "Unsupported TIFF compression: "  # OpenSlide's words
PLAIN_IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr")
_GZIP = b"\x1f\x8b"


def open_handle(path: Path, slide_id: str) -> openslide.AbstractSlide:
    """OpenSlide's handle, or Pillow's behind OpenSlide's plain-image class for JPEG and PNG."""
    who = f"slide {slide_id!r}"
    try:
        if path.is_dir():
            raise SlideError(f"{who}: expected a slide file, got a folder. Name the slides in it, or a list of them.")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise SlideError(f"{who}: expected a slide file, got a pipe or a device. Name a regular file.")
        with path.open("rb") as file:
            start = file.read(2)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{who}: expected a slide file, got none of the name {path.name!r}.") from error
    except OSError as error:
        raise SlideError(f"{who}: expected a readable file, got {error.strerror!r}. Check who may read it.") from error
    if not start:
        raise SlideError(f"{who}: expected a slide file, got an empty one. Copy it again.")
    if start == _GZIP:
        raise SlideError(f"{who}: expected a slide file, got one packed by gzip. Unpack it first (gunzip).")
    try:
        return _with_tiles_that_fit(openslide.OpenSlide(str(path)), who)
    except openslide.OpenSlideUnsupportedFormatError as error:
        unsupported: Exception = error
    except openslide.OpenSlideError as error:
        compression = str(error).partition(_UNSUPPORTED)[2]
        if compression:
            raise SlideError(
                f"{who}: expected a TIFF whose tiles OpenSlide decodes, got TIFF compression {compression}. Convert it "
                "to tiles in JPEG (vips tiffsave --tile --pyramid --compression jpeg)."
            ) from error
        raise SlideError(
            f"{who}: expected a whole slide, got one that OpenSlide knows but can't open. "
            "It is damaged, cut short, or lacks the files that belong to it: copy it again with all its parts."
        ) from error
    try:
        # Only these two: of a TIFF, Pillow would take the first page, whatever it shows.
        with PIL.Image.open(path, formats=("JPEG", "PNG")) as image:
            pixels, mode = image.width * image.height, image.mode
    except PIL.Image.DecompressionBombError:
        pixels, mode = PLAIN_IMAGE_PIXELS + 1, ""
    except MemoryError:
        raise
    except Exception:  # Pillow raises a dozen types for damaged files, ValueError for a text chunk too large among them
        raise SlideError(
            f"{who}: expected a slide that OpenSlide reads, or a JPEG or PNG image, got another format or a file "
            "cut short. Convert it to a tiled TIFF, or copy it again with all its parts."
        ) from unsupported
    if pixels > PLAIN_IMAGE_PIXELS:
        raise SlideError(
            f"{who}: expected a plain image of at most {PLAIN_IMAGE_PIXELS // 1_000_000} megapixels, got a larger one. "
            "Convert it to a tiled pyramid (vips tiffsave --tile --pyramid)."
        )
    if mode not in PLAIN_IMAGE_MODES:
        raise SlideError(f"{who}: expected 8-bit colours or greys, got mode {mode!r}. Convert it to 8-bit RGB.")
    return openslide.ImageSlide(str(path))


def _with_tiles_that_fit(handle: openslide.OpenSlide, who: str) -> openslide.OpenSlide:
    """The handle, closed and refused where one of the file's own tiles is absurdly large on any level."""
    sides = (
        [number(handle.properties, f"openslide.level[{level}].tile-{side}") or 0 for side in ("width", "height")]
        for level in range(handle.level_count)
    )
    pixels = max((width * height for width, height in sides), default=0.0)
    if pixels > TILE_PIXELS:
        handle.close()
        raise SlideError(
            f"{who}: expected tiles of at most {TILE_PIXELS // 2**20} megapixels in the file, got {pixels:.3g} pixels. "
            "Its header is damaged: copy it again."
        )
    return handle


# What leaves a slide's header: numbers as numbers, words only where they have the form of a scanner's model name.
_NUMBERS = (
    *("openslide.mpp-x", "openslide.mpp-y", "openslide.objective-power"),
    *("openslide.bounds-x", "openslide.bounds-y", "openslide.bounds-width", "openslide.bounds-height"),
)
SCANNERS = {
    "aperio.ScannerType": r"GT ?450( ?DX)?|AT2( DX)?|CS2|LV1|VERSA ?\d*",
    "hamamatsu.Product": r"C\d{4,5}(-\d{1,3})?",
    "tiff.Model": r"C\d{4,5}(-\d{1,3})?|NanoZoomer( [A-Z]{1,3}\d{0,3})?",
    "leica.device-model": r"Leica SCN\d{3}( ?F)?|SCN\d{3}( ?F)?|Versa ?\d{0,3}",
    "ventana.ScannerModel": r"iScan (Coreo|HT)|VENTANA DP ?\d{3}",
    "philips.DICOM_MANUFACTURERS_MODEL_NAME": r"UFS Scanner|IntelliSite( Ultra Fast Scanner)?|SG ?\d{2,3}",
    "mirax.NONHIERLAYER_1_SECTION.SCANNER_HARDWARE_VERSION": r"\d{1,3}(\.\d{1,3}){0,3}",
}


def number(header: Mapping[str, str], name: str, *, above: float = 0.0) -> float | None:
    """A header entry as a finite number above 0 (or another bound), or None."""
    try:
        value = float(header[name])
    except (KeyError, ValueError):
        return None
    return value if above < value < math.inf else None


def allowed(header: Mapping[str, str]) -> dict[str, str | float]:
    """The entries that may reach outputs."""
    numbers = {name: number(header, name, above=-math.inf) for name in _NUMBERS}
    kept: dict[str, str | float] = {name: value for name, value in numbers.items() if value is not None}
    for name, form in SCANNERS.items():
        model = header.get(name, "").strip()
        if re.fullmatch(form, model):
            kept[name] = model
    return kept


PLAUSIBLE_MPP = (0.08, 4.0)
OBJECTIVE_MARGIN = 0.35  # share by which mpp may differ from 10 / objective power
# Microns; both signs that are read as micro.
_OME_UNITS = {
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0},
    **{"mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "in": 25_400.0},
}
_ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*["']([^"']*)["']""")


@dataclass(frozen=True)
class Mpp:
    """Microns per pixel of level 0 along x and y, and where the figures come from."""

    x: float
    y: float
    source: str

    @property
    def mean(self) -> float:
        """One figure for sums and estimates; tiles keep each axis' own scale."""
        return (self.x + self.y) / 2


def stated_mpp(header: Mapping[str, str]) -> Mpp | None:
    """What the file says of its scale: OpenSlide's figures, the TIFF tags per centimetre or inch, or OME-XML's."""
    return _of_tags(header) or ome_mpp(header)


def _of_tags(header: Mapping[str, str]) -> Mpp | None:
    x, y = number(header, "openslide.mpp-x"), number(header, "openslide.mpp-y")
    if x is not None and y is not None:
        return Mpp(x, y, "openslide.mpp")
    x, y = number(header, "tiff.XResolution"), number(header, "tiff.YResolution")
    microns = {"centimeter": 10_000, "inch": 25_400}.get(header.get("tiff.ResolutionUnit", ""))
    if x is not None and y is not None and microns is not None:
        return Mpp(microns / x, microns / y, "TIFF resolution tags")
    return None


def ome_mpp(header: Mapping[str, str]) -> Mpp | None:
    """What the OME-XML of a TIFF says, which its tags may contradict."""
    pixels = re.search(r"<(?:\w+:)?Pixels\s([^<>]*)>", header.get("tiff.ImageDescription", ""))
    stated = dict(_ATTRIBUTE.findall(pixels[1])) if pixels else {}
    x, y = (number(stated, f"PhysicalSize{axis}") for axis in "XY")
    units = [_OME_UNITS.get(html.unescape(stated.get(f"PhysicalSize{axis}Unit", "um")), 0.0) for axis in "XY"]
    return None if x is None or y is None or not all(units) else Mpp(x * units[0], y * units[1], "OME-XML")


def check_scale(slide_id: str, mpp: Mpp, objective_power: float | None) -> None:
    """Raise SlideError where brightfield scanners don't work at this scale or the objective contradicts it."""
    low, high = PLAUSIBLE_MPP
    stated = f"{mpp.x:g}" if mpp.x == mpp.y else f"{mpp.x:g} x {mpp.y:g}"
    if not (low <= min(mpp.x, mpp.y) and max(mpp.x, mpp.y) <= high):
        coarse = ", or leave the slide out where this is right: it is too coarse to show cells"
        raise SlideError(
            f"slide {slide_id!r}: expected {low:g} to {high:g} microns per pixel, got {stated} from "
            f"{mpp.source}. State the right value with --slide-mpp{coarse * (max(mpp.x, mpp.y) > high)}."
        )
    if objective_power is None:
        return
    nominal = 10 / objective_power
    if max(abs(value / nominal - 1) for value in (mpp.x, mpp.y)) > OBJECTIVE_MARGIN:
        raise SlideError(
            f"slide {slide_id!r}: expected about {nominal:g} microns per pixel for an objective power of "
            f"{objective_power:g}, got {stated} from {mpp.source}. State the right value with --slide-mpp."
        )


def scanned_area(
    slide_id: str, dimensions: tuple[int, int], properties: Mapping[str, str | float]
) -> tuple[int, int, int, int]:
    """(x, y, w, h) of what was scanned in level-0 pixels, cut to the slide; all of it where no bounds are named.

    Raises:
        SlideError: the bounds lie outside the slide.
    """
    width, height = dimensions
    named = [properties.get(f"openslide.bounds-{part}") for part in ("x", "y", "width", "height")]
    if any(value is None for value in named):
        return 0, 0, width, height
    x, y, w, h = (int(float(value)) for value in named if value is not None)
    left, top, right, bottom = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    if right <= left or bottom <= top:
        raise SlideError(
            f"slide {slide_id!r}: expected bounds inside {width} x {height} pixels, got x {x}, y {y}, "
            f"{w} x {h}. The header contradicts itself: convert the slide again."
        )
    return left, top, right - left, bottom - top


def is_level_of(whole: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a level of this size can show all of level 0: one scale along x and y, but for a pixel's rounding.

    A level that was padded or cropped to whole blocks doesn't fit: nothing says which part of it is the slide.
    """
    finest = max(full / (part + 1) for full, part in zip(whole, size, strict=True))
    coarsest = min(full / max(part - 1, 0.5) for full, part in zip(whole, size, strict=True))
    return finest <= coarsest


def leading_levels(level_dimensions: Sequence[tuple[int, int]], header: Mapping[str, str]) -> int:
    """How many of a slide's levels, from level 0 on, show the whole of it: those before the first that doesn't."""
    whole = level_dimensions[0]
    for level, size in enumerate(level_dimensions):
        block = [int(number(header, f"openslide.level[{level}].tile-{side}") or 1) for side in ("width", "height")]
        if not is_level_of(whole, size) or _filled_or_cropped(whole, size, (block[0], block[1])):
            return level
    return len(level_dimensions)


def _filled_or_cropped(whole: tuple[int, int], size: tuple[int, int], block: tuple[int, int]) -> bool:
    """Whether a level is level 0 halved some times, then filled up or cropped to whole blocks: both sides alike, its
    shape gives nothing away."""
    axes = list(zip(whole, size, block, strict=True))
    steps = [2**power for power in range(1, max(whole).bit_length())]
    if any(all(abs(part * step - full) < step for full, part, _ in axes) for step in (1, *steps)):
        return False
    return any(
        all(-(-full // (step * side)) * side == part for full, part, side in axes)
        or all(full // (step * side) * side == part for full, part, side in axes)
        for step in steps
    )
