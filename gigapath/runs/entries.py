"""A slide of a cohort, opened and tiled as its row of the manifest and the options say together."""

import dataclasses

from gigapath.cohort.manifest import SlideEntry
from gigapath.preprocessing.slide import Slide, open_slide
from gigapath.preprocessing.tiling import TileOptions


def open_entry(entry: SlideEntry, tiling: TileOptions) -> Slide:
    """Open a slide with the scale that the manifest or the options state."""
    source = "manifest" if entry.mpp is not None else "--slide-mpp"
    return open_slide(
        entry.path,
        slide_id=entry.slide_id,
        slide_mpp=entry.mpp if entry.mpp is not None else tiling.slide_mpp,
        mpp_source=source,
        mpp_from_objective=tiling.mpp_from_objective,
    )


def options_for(entry: SlideEntry, tiling: TileOptions) -> TileOptions:
    """The options with the slide's own mask, where the manifest names one."""
    return tiling if entry.mask is None else dataclasses.replace(tiling, tissue=str(entry.mask))
