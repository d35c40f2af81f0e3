"""What a header claims of a slide's scale and place, and where it contradicts itself."""

from collections.abc import Mapping, Sequence

from gigapath.preprocessing.handle import SlideError
from gigapath.preprocessing.header import Mpp, number

PLAUSIBLE_MPP = (0.08, 4.0)
OBJECTIVE_MARGIN = 0.35  # share by which mpp may differ from 10 / objective power


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
