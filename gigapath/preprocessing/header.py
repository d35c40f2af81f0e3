"""What a slide's header says, and what of it may leave: scale, bounds, objective, scanner; never free text."""

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

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

_ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*["']([^"']*)["']""")
# Microns; both signs that are read as micro.
_OME_UNITS = {
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0},
    **{"mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "in": 25_400.0},
}


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


def number(header: Mapping[str, str], name: str) -> float | None:
    """A header entry as a positive finite number, or None."""
    try:
        value = float(header[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def stated_mpp(header: Mapping[str, str]) -> Mpp | None:
    """What the file says of its scale: OpenSlide's figures, the TIFF tags per centimetre or inch, or OME-XML's."""
    x, y = number(header, "openslide.mpp-x"), number(header, "openslide.mpp-y")
    if x is not None and y is not None:
        return Mpp(x, y, "openslide.mpp")
    x, y = number(header, "tiff.XResolution"), number(header, "tiff.YResolution")
    microns = {"centimeter": 10_000, "inch": 25_400}.get(header.get("tiff.ResolutionUnit", ""))
    if x is not None and y is not None and microns is not None:
        return Mpp(microns / x, microns / y, "TIFF resolution tags")
    pixels = re.search(r"<(?:\w+:)?Pixels\s([^<>]*)>", header.get("tiff.ImageDescription", ""))
    if pixels is None:
        return None
    sides = [_ome_microns(dict(_ATTRIBUTE.findall(pixels[1])), f"PhysicalSize{axis}") for axis in "XY"]
    x, y = sides
    return None if x is None or y is None else Mpp(x, y, "OME-XML")


def _ome_microns(attributes: Mapping[str, str], name: str) -> float | None:
    value = number(attributes, name)
    unit = _OME_UNITS.get(html.unescape(attributes.get(f"{name}Unit", "um")))
    return None if value is None or unit is None else value * unit


def largest_tile(header: Mapping[str, str]) -> float:
    """Pixels of the largest of the file's own tiles on any level, 0 where it states none."""
    sides = (
        [number(header, f"openslide.level[{level}].tile-{side}") or 0 for side in ("width", "height")]
        for level in range(int(number(header, "openslide.level-count") or 0))
    )
    return max((width * height for width, height in sides), default=0.0)


def allowed(header: Mapping[str, str]) -> dict[str, str | float]:
    """The entries that may reach outputs."""
    kept: dict[str, str | float] = {}
    for name in _NUMBERS:
        try:
            value = float(header[name])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            kept[name] = value
    for name, form in SCANNERS.items():
        model = header.get(name, "").strip()
        if re.fullmatch(form, model):
            kept[name] = model
    return kept
