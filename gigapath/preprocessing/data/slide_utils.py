"""Which level of a slide has a given scale."""

import logging
from pathlib import Path

from gigapath.preprocessing.slide import SlideError, open_slide

NEAR = 0.1  # microns per pixel, as published


def find_level_for_target_mpp(slide_path: str | Path, target_mpp: float) -> int | None:
    """The level whose microns per pixel lie within 0.1 of the target, the closest of them.

    Args:
        slide_path: a slide.
        target_mpp: microns per pixel.

    Returns:
        the level, or None where no level is near or the slide states no plausible scale; the reason is logged.

    Raises:
        FileNotFoundError: nothing lies there.
        SlideError: it is no slide that can be opened.
    """
    with open_slide(slide_path) as slide:
        try:
            mpp = slide.mpp
        except SlideError as error:
            logging.getLogger(__name__).warning("%s", error)
            return None
        distances = [
            max(abs(mpp.x * step - target_mpp), abs(mpp.y * step - target_mpp)) for step in slide.level_downsamples
        ]
    level = min(range(len(distances)), key=distances.__getitem__)
    if distances[level] > NEAR + 1e-9:
        logging.getLogger(__name__).warning(
            "slide %r: no level within %g of %g microns per pixel; level 0 has %g and the levels' downsamples are %s.",
            slide.slide_id,
            NEAR,
            target_mpp,
            mpp.mean,
            ", ".join(f"{step:g}" for step in slide.level_downsamples),
        )
        return None
    return level
