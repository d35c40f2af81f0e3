"""Microns per pixel of a slide: what its file states, by which of several sources, and whether that can be believed."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gigapath.preprocessing.header import SlideError, number

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
