"""A slide of a cohort, opened and tiled as its row of the manifest and the options say together."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from gigapath.cohort.manifest import SlideEntry
from gigapath.preprocessing.masks import METHODS
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


def check_tissue(entries: Iterable[SlideEntry], tiling: TileOptions) -> None:
    """Refuse a `--tissue` that can serve no slide, before work starts: a slip there is no fault of the slides.

    Raises:
        FileNotFoundError: `--tissue` is neither a method nor a file or folder that exists.
        ValueError: classes are asked for where no file could hold them.
    """
    if all(entry.mask is not None for entry in entries):
        return
    if tiling.tissue not in METHODS and not Path(tiling.tissue).exists():
        raise FileNotFoundError(
            f"--tissue: expected {', '.join(METHODS)} or a file or folder that exists, got {tiling.tissue!r}."
        )
    if tiling.tissue in METHODS and (tiling.include or tiling.exclude):
        raise ValueError(
            f"--include, --exclude: expected --tissue FILE beside them, got --tissue {tiling.tissue}. Give one."
        )
