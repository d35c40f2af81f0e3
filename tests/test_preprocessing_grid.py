"""The grid: level, pitch and cells from a slide's header alone."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigapath.preprocessing.slide import Mpp, SlideError
from gigapath.preprocessing.tiling import plan_grid


@dataclass(frozen=True)
class Header:
    """A slide's header without pixels."""

    mpp: Mpp
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    bounds: tuple[int, int, int, int]
    slide_id: str = "made"


def header(
    mpp: float | tuple[float, float],
    steps: tuple[float, ...] = (1,),
    size: tuple[int, int] = (90_000, 70_000),
    bounds: tuple[int, int, int, int] | None = None,
) -> Header:
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    levels = tuple((int(size[0] // step), int(size[1] // step)) for step in steps)
    return Header(Mpp(x, y, "made"), levels, tuple(float(step) for step in steps), bounds or (0, 0, *size))


@pytest.mark.parametrize(
    ("mpp", "steps", "level", "read", "pitch", "effective"),
    [
        (0.5, (1, 2, 4), 0, 256, 256, 0.5),
        (0.499, (1, 4), 0, 256, 256, 0.499),  # 0.2 % off: its own pixels
        (0.5029, (1,), 0, 256, 256, 0.5029),
        (0.25, (1, 2, 4), 1, 256, 512, 0.5),
        (0.25, (1, 4, 16), 0, 512, 512, 0.5),  # Aperio steps of 4 have no 0.5
        (0.25, (1,), 0, 512, 512, 0.5),
        (0.252, (1, 2, 4), 1, 256, 512, 0.504),
        (0.252, (1, 4, 16), 0, 508, 508, 508 * 0.252 / 256),
        (0.2265, (1, 4, 16), 0, 565, 565, 565 * 0.2265 / 256),
        (0.2265, (1, 2, 4), 1, 283, 566, 566 * 0.2265 / 256),  # level 1 at 0.453 is too fine to pass as it is
        (0.2431, (1, 2, 4), 1, 263, 526, 526 * 0.2431 / 256),  # level 1 at 0.4862 is finer: resampled from there
        (0.2628, (1, 2, 4), 0, 487, 487, 487 * 0.2628 / 256),  # level 1 at 0.5256 is too coarse
        (0.11, (1, 4, 16), 1, 291, 1164, 1164 * 0.11 / 256),  # whole pixels of the level used
        (0.25, (1, 2.0005, 4.002), 1, 256, 512, 0.5),  # a rounded-down level counts as its whole step
        (0.6, (1, 2), 0, 213, 213, 213 * 0.6 / 256),  # upsampled
    ],
)
def test_grid_reads_the_level_that_practice_names(
    mpp: float, steps: tuple[float, ...], level: int, read: int, pitch: int, effective: float
) -> None:
    grid = plan_grid(header(mpp, steps))
    assert (grid.level, grid.read_size, grid.pitch) == (level, (read, read), (pitch, pitch))
    assert grid.mpp == pytest.approx((effective, effective), rel=1e-12)


def test_grid_keeps_both_scales_where_they_differ() -> None:
    grid = plan_grid(header((0.25, 0.27), (1, 2)))
    assert grid.level == 0
    assert grid.read_size == grid.pitch == (512, 474)
    assert grid.mpp == pytest.approx((0.5, 474 * 0.27 / 256))
    finer = plan_grid(header((0.25, 0.24), (1, 2)))
    assert (finer.level, finer.read_size, finer.pitch) == (1, (256, 267), (512, 534))


def test_grid_upsamples_a_little_and_refuses_more() -> None:
    assert plan_grid(header(0.65)).upsampled == pytest.approx(1.3)
    assert plan_grid(header(0.505)).upsampled == 1.0
    with pytest.raises(SlideError, match="--allow-upsampling"):
        plan_grid(header(0.7))
    assert plan_grid(header(0.7), allow_upsampling=True).read_size == (183, 183)


def test_grid_refuses_absurdly_many_pixels_and_tiles() -> None:
    with pytest.raises(SlideError, match=r"smaller --mpp"):
        plan_grid(header(0.25), mpp=100)
    with pytest.raises(SlideError, match="--tile-size"):
        plan_grid(header(0.5, size=(5_000_000_000, 5_000_000_000)))


def test_grid_holds_only_whole_tiles_within_bounds() -> None:
    grid = plan_grid(header(0.5, size=(1023, 770)))
    assert (grid.columns, grid.rows) == (3, 3)
    inside = plan_grid(header(0.5, size=(4000, 3000), bounds=(1000, 500, 1300, 600)))
    assert (inside.anchor, inside.columns, inside.rows) == ((1000, 500), 5, 2)
    assert plan_grid(header(0.5, size=(200, 3000))).columns == 0
    # level 1 is rounded down so far that its last tile would miss 8 of its pixels
    short = Header(Mpp(0.25, 0.25, "made"), ((2048, 1024), (1016, 512)), (1.0, 2.0), (0, 0, 2048, 1024))
    assert (plan_grid(short).columns, plan_grid(short).rows) == (3, 2)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    mpp=st.tuples(st.floats(0.08, 0.65), st.floats(0.08, 0.65)),
    steps=st.sampled_from([(1,), (1, 2, 4), (1, 4, 16), (1, 2.0005, 4.002)]),
    size=st.tuples(st.integers(300, 20_000), st.integers(300, 20_000)),
    origin=st.tuples(st.integers(0, 290), st.integers(0, 290)),
    tile_size=st.sampled_from([224, 256, 512]),
)
def test_grid_is_whole_inside_and_invertible(
    mpp: tuple[float, float],
    steps: tuple[float, ...],
    size: tuple[int, int],
    origin: tuple[int, int],
    tile_size: int,
) -> None:
    bounds = (*origin, size[0] - origin[0], size[1] - origin[1])
    slide = header(mpp, steps, size, bounds)
    grid = plan_grid(slide, tile_size=tile_size)
    own = np.array(mpp)
    within_tolerance = np.abs(own * slide.level_downsamples[grid.level] / 0.5 - 1).max() <= 0.02
    assert within_tolerance or np.abs(np.array(grid.mpp) / 0.5 - 1).max() <= 0.5 * 7 / tile_size
    cells = np.stack(np.meshgrid(np.arange(grid.columns), np.arange(grid.rows)), axis=-1).reshape(-1, 2)
    corners = grid.corners(cells)
    assert np.array_equal((corners - origin) // grid.pitch, cells)
    if len(cells):
        assert corners.min(0).tolist() == list(origin)
        assert (corners.max(0) + grid.pitch <= np.array(size)).all()
        held = np.array(slide.level_dimensions[grid.level])
        assert (corners.max(0) / slide.level_downsamples[grid.level] + grid.read_size <= held + 0.5).all()
