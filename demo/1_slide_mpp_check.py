"""What scale a slide has, and from which of its levels tiles of 0.5 microns a pixel are read.

    python demo/1_slide_mpp_check.py [SLIDE ...]
    python demo/1_slide_mpp_check.py SLIDE --slide-mpp 0.25

Run it on a few slides of a new cohort before anything else: a wrong scale makes embeddings that look like any others.
"""

import argparse

from at_hand import slide_at_hand

from gigapath.preprocessing.data.slide_utils import find_level_for_target_mpp
from gigapath.preprocessing.reading import filter_name
from gigapath.preprocessing.slide import SlideError, open_slide
from gigapath.preprocessing.tiling import plan_grid


def check(path, mpp):
    """Print the levels of one slide with their scales, and how tiles are read."""
    with open_slide(path, slide_mpp=mpp) as slide:
        width, height = slide.dimensions
        print(f"{slide.slide_id}: {slide.vendor}, {width:,} x {height:,} pixels, objective {slide.objective_power}")
        print(f"  microns per pixel of level 0: {slide.mpp.mean:.4f}, from {slide.mpp.source}")
        for level, (size, step) in enumerate(zip(slide.level_dimensions, slide.level_downsamples, strict=True)):
            print(f"  level {level}: {size[0]:,} x {size[1]:,}, {slide.mpp.mean * step:.4f} microns per pixel")
        grid = plan_grid(slide)
        how = filter_name(grid.read_size, grid.tile_size)
        print(f"  a tile: {grid.read_size[0]} pixels of level {grid.level}, resampling {how}, so {grid.mpp[0]:.4f} um")
        print(f"  the grid: {grid.columns} x {grid.rows} tiles, {grid.pitch[0]} level-0 pixels apart")
    if mpp is None:
        print(f"  the level within 0.1 of the target, as published: {find_level_for_target_mpp(path, 0.5)}")


def main(argv=None):
    """Read the command line; returns the number of slides whose scale is not usable."""
    parser = argparse.ArgumentParser(description="The scale of slides, and the level that tiles are read from.")
    parser.add_argument("slides", nargs="*", help="slide files (default: the demo slide)")
    parser.add_argument("--slide-mpp", type=float, help="microns per level-0 pixel, instead of what the slides say")
    words = parser.parse_args(argv)
    failed = 0
    for given in words.slides or [None]:
        path, mpp = slide_at_hand(given, words.slide_mpp)
        try:
            check(path, mpp if words.slide_mpp is None else words.slide_mpp)
        except SlideError as error:
            print(f"  not usable: {error}")
            failed += 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
