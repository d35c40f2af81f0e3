"""Planning tiles: the same cells from any pyramid of one picture, whole tiles only, and what is recorded of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from made_slides import paint_tissue, write_pyramid, write_scn

from gigapath.preprocessing import reading, tiling
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.slide import Mpp, Slide, SlideError, open_slide
from gigapath.preprocessing.tiling import (
    QC_NAMES,
    TileOptions,
    TilePlan,
    area_shares,
    hilbert_index,
    plan_grid,
    plan_tiles,
    spread_evenly,
    tile_qc,
)

UInt8Array = npt.NDArray[np.uint8]

FIELD_UM = (1010.0, 760.0)


@pytest.fixture(scope="module")
def field() -> UInt8Array:
    """One picture of FIELD_UM at 0.2265 microns a pixel."""
    return paint_tissue(round(FIELD_UM[0] / 0.2265), round(FIELD_UM[1] / 0.2265), mpp=0.2265, seed=3)


def at_scale(field: UInt8Array, mpp: tuple[float, float]) -> UInt8Array:
    size = round(FIELD_UM[0] / mpp[0]), round(FIELD_UM[1] / mpp[1])
    return np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_AREA))


def fraction_by_cell(plan: TilePlan) -> dict[tuple[int, int], float]:
    cells = map(tuple, plan.tiles.cells.tolist())
    return dict(zip(cells, plan.tiles.tissue_fraction.tolist(), strict=True))


@pytest.fixture(scope="module")
def reference(field: UInt8Array, tmp_path_factory: pytest.TempPathFactory) -> TilePlan:
    """Every cell of the picture at 0.5 microns a pixel, with its tissue fraction."""
    path = tmp_path_factory.mktemp("reference") / "reference.tif"
    with open_slide(write_pyramid(path, at_scale(field, (0.5, 0.5)), mpp=(0.5, 0.5))) as slide:
        return plan_tiles(slide, TileOptions(min_tissue=0))


@pytest.mark.parametrize(
    ("mpp", "steps"),
    [
        *((0.2265, (1,)), (0.2431, (1, 2, 4)), (0.25, (1, 4, 16)), (0.252, (1, 2, 4)), (0.2628, (1, 4, 16))),
        *((0.499, (1,)), (0.5029, (1, 2, 4)), ((0.25, 0.262), (1, 4, 16)), ((0.4, 0.27), (1, 2, 4))),
    ],
    ids=str,
)
def test_pyramids_of_one_picture_keep_the_same_cells(
    field: UInt8Array, reference: TilePlan, tmp_path: Path, mpp: float | tuple[float, float], steps: tuple[int, ...]
) -> None:
    scale = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    path = write_pyramid(tmp_path / "made.tif", at_scale(field, scale), mpp=scale, steps=steps)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TileOptions())
    fractions = area_shares(plan.mask.mask, plan.mask, plan.grid)
    every = {(i, j): float(value) for (j, i), value in np.ndenumerate(fractions)}
    expected = fraction_by_cell(reference)
    kept = fraction_by_cell(plan)
    last = (
        min(cell[0] for cell in (max(every), max(expected))),
        min(max(j for _, j in every), max(j for _, j in expected)),
    )
    inner = [cell for cell in expected if cell[0] < last[0] and cell[1] < last[1]]
    clear = [c for c in inner if abs(expected[c] - 0.1) > 0.02 and abs(every[c] - 0.1) > 0.02]
    assert len(clear) >= 0.8 * len(inner)
    assert 10 < len(set(kept) & set(clear)) < len(clear)
    assert [cell for cell in clear if cell in kept] == [cell for cell in clear if expected[cell] >= 0.1]
    pitch = np.array(plan.tiles.tile_size_level0)
    assert np.array_equal(plan.tiles.coords_level0, plan.tiles.cells * pitch)
    assert plan.tiles.mpp == pytest.approx(0.5, rel=0.02)


def test_a_coarse_slide_is_refused_with_the_option_named(field: UInt8Array, tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", at_scale(field, (0.7, 0.7)), mpp=(0.7, 0.7))) as slide:
        with pytest.raises(SlideError, match=r"'a'.*got 0\.7[0-9]* \(upsampled 1\.40 times\).*--allow-upsampling"):
            plan_tiles(slide, TileOptions())
        plan = plan_tiles(slide, TileOptions(allow_upsampling=True))
    assert plan.tiles.attrs["upsampled"] == pytest.approx(1.4)
    assert plan.tiles.attrs["filter"] == "cv2-cubic"
    assert any("upsampled 1.40 times" in warning for warning in plan.warnings)


def test_bounds_give_absolute_coordinates_and_their_own_overview(tmp_path: Path) -> None:
    image = paint_tissue(3600, 2400)
    offset = (1003, 707)
    path = write_scn(tmp_path / "b.scn", image, canvas=(5000, 4000), offset=offset, mpp=0.5)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TileOptions())
        tile = reading.read_tile(slide, plan.tiles, 7)
    with open_slide(write_pyramid(tmp_path / "plain.tif", image, mpp=(0.5, 0.5))) as slide:
        plain = plan_tiles(slide, TileOptions())
    assert plan.overview.image.shape == plain.overview.image.shape
    assert plan.overview.origin_level0 == offset
    assert np.array_equal(plan.tiles.cells, plain.tiles.cells)
    assert np.array_equal(plan.tiles.coords_level0, plain.tiles.coords_level0 + offset)
    assert plan.tiles.attrs["anchor"] == offset
    x, y = plan.tiles.coords_level0[7] - offset
    assert np.abs(tile.astype(int) - image[y : y + 256, x : x + 256]).mean() < 4


@pytest.fixture(scope="module")
def small_slide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    path = tmp_path_factory.mktemp("small") / "small.tif"
    with open_slide(write_pyramid(path, paint_tissue(2900, 2100), mpp=(0.5, 0.5))) as slide:
        yield slide


def test_planning_reads_a_coarse_level_and_no_tile(small_slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = Slide._read_rgba

    def counting(self: Slide, x: int, y: int, level: int, width: int, height: int) -> object:
        reads.append((level, width * height))
        return read(self, x, y, level, width, height)

    small_slide.overview()  # its levels are compared once
    monkeypatch.setattr(Slide, "_read_rgba", counting)
    plan = plan_tiles(small_slide, TileOptions())
    assert {level for level, _ in reads} == {2}
    assert sum(pixels for _, pixels in reads) <= 2 * 725 * 525  # once for the tissue, once for the focus
    assert len(reads) < len(plan.tiles)


def test_every_place_of_the_grid_is_a_tile_or_counted(small_slide: Slide) -> None:
    plan = plan_tiles(small_slide, TileOptions())
    assert plan.grid.columns * plan.grid.rows == 11 * 8 == len(plan.tiles) + sum(plan.dropped.values())
    assert {"background", "little tissue"} <= set(plan.dropped)
    everything = plan_tiles(small_slide, TileOptions(min_tissue=0))
    assert len(everything.tiles) == 88
    assert everything.dropped == {}
    full = everything.tiles.tissue_fraction >= 1
    assert 5 < full.sum() < len(plan.tiles)
    assert len(plan_tiles(small_slide, TileOptions(min_tissue=1)).tiles) == full.sum()


def test_pen_beside_tissue_is_counted_as_pen(tmp_path: Path) -> None:
    image = paint_tissue(2900, 2100)
    plain = write_pyramid(tmp_path / "plain.tif", image, mpp=(0.5, 0.5))
    marked = image.copy()
    cv2.line(marked, (2500, 150), (2800, 700), (20, 60, 200), 90)
    with open_slide(plain) as slide:
        without = plan_tiles(slide, TileOptions())
    with open_slide(write_pyramid(tmp_path / "pen.tif", marked, mpp=(0.5, 0.5))) as slide:
        plan = plan_tiles(slide, TileOptions())
    assert np.array_equal(plan.tiles.cells, without.tiles.cells)
    assert plan.dropped["pen"] >= 2
    assert sum(plan.dropped.values()) == sum(without.dropped.values())


def test_a_mask_file_decides_and_leaves_no_path(small_slide: Slide, tmp_path: Path) -> None:
    half = [[0, 0], [1536, 0], [1536, 2100], [0, 2100], [0, 0]]
    outline = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [half]}}
    path = tmp_path / "canary.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [outline]}))
    tiles = plan_tiles(small_slide, TileOptions(tissue=str(path))).tiles
    assert tiles.cells.tolist() == [[i, j] for j in range(8) for i in range(6)]
    assert "canary" not in repr(tiles.attrs)
    with pytest.raises(FileNotFoundError, match="--tissue"):
        plan_tiles(small_slide, TileOptions(tissue=str(tmp_path / "none.geojson")))


def fluorescence(width: int, height: int) -> UInt8Array:
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 2] = rng.integers(2, 8, (height, width))
    for x, y in rng.integers(300, 1500, (400, 2)).tolist():
        cv2.circle(image, (x, min(y, height)), 12, (30, 60, 210), -1)
    return image


def test_a_dark_background_is_refused_with_the_way_on(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "dapi.tif", fluorescence(1900, 1300), mpp=(0.5, 0.5))
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match="--allow-dark-background"):
            plan_tiles(slide, TileOptions())
        plan = plan_tiles(slide, TileOptions(allow_dark_background=True))
    assert 0 < len(plan.tiles) < 35
    assert plan.tiles.attrs["dark_background"] is True
    assert any("dark background" in warning for warning in plan.warnings)


def test_no_tissue_and_no_room_are_plans_without_tiles(tmp_path: Path) -> None:
    blank = np.full((1100, 1500, 3), 240, np.uint8)
    with open_slide(write_pyramid(tmp_path / "blank.tif", blank, mpp=(0.5, 0.5))) as slide:
        plan = plan_tiles(slide, TileOptions())
    assert (len(plan.tiles), plan.mask.state, plan.dropped) == (0, "blank", {"background": 20})
    assert len(plan.warnings) == 1 and "--tissue published or none, or a mask's PATH" in plan.warnings[0]
    blank[445:579, 445:579] = (190, 110, 170)  # a corner of four tiles
    with open_slide(write_pyramid(tmp_path / "little.tif", blank, mpp=(0.5, 0.5))) as slide:
        plan = plan_tiles(slide, TileOptions())
    assert (len(plan.tiles), plan.mask.pieces) == (0, 1)
    assert len(plan.warnings) == 1 and "Lower --min-tissue" in plan.warnings[0]
    with open_slide(write_pyramid(tmp_path / "tiny.tif", paint_tissue(500, 200), mpp=(0.5, 0.5))) as slide:
        plan = plan_tiles(slide, TileOptions())
    assert len(plan.tiles) == 0
    assert len(plan.warnings) == 1 and "no whole tile of 256 x 256" in plan.warnings[0]


@pytest.mark.parametrize(("rule", "alpha", "said"), [("published", 255, "otsu or none"), ("none", 0, "transparent")])
def test_a_slide_without_tissue_says_why_by_every_rule(tmp_path: Path, rule: str, alpha: int, said: str) -> None:
    rgba = np.full((600, 700, 4), (244, 244, 244, alpha), np.uint8)
    tifffile.imwrite(tmp_path / "slide.tif", rgba, tile=(256, 256), photometric="rgb", extrasamples=["unassalpha"])
    with open_slide(tmp_path / "slide.tif", slide_mpp=0.5) as slide:
        plan = plan_tiles(slide, TileOptions(tissue=rule))
    assert len(plan.tiles) == 0 and len(plan.warnings) == 1 and said in plan.warnings[0]


def test_an_override_that_contradicts_the_slide_is_warned_of(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", paint_tissue(2900, 2100), mpp=(0.5, 0.5))
    with open_slide(path, slide_mpp=0.25) as slide:
        plan = plan_tiles(slide, TileOptions(slide_mpp=0.25))
    assert plan.tiles.attrs["mpp_source"] == "--slide-mpp"
    assert any("0.25" in warning and "0.5" in warning for warning in plan.warnings)
    with open_slide(path, slide_mpp=0.5) as slide:
        assert plan_tiles(slide, TileOptions()).warnings == ()


def test_a_plan_is_the_same_with_and_without_workers(small_slide: Slide) -> None:
    for tissue in ("otsu", "published"):
        one, two = (plan_tiles(small_slide, TileOptions(tissue=tissue), workers=workers) for workers in (0, 2))
        assert np.array_equal(one.tiles.cells, two.tiles.cells)
        assert np.array_equal(one.tiles.tissue_fraction, two.tiles.tissue_fraction)


def test_max_tiles_is_an_even_seeded_choice(small_slide: Slide) -> None:
    every = plan_tiles(small_slide, TileOptions()).tiles
    plan = plan_tiles(small_slide, TileOptions(max_tiles=15, seed=1))
    assert len(plan.tiles) == 15
    assert plan.dropped["max tiles"] == len(every) - 15
    index = {tuple(cell): i for i, cell in enumerate(every.cells.tolist())}
    chosen = [index[tuple(cell)] for cell in plan.tiles.cells.tolist()]
    assert chosen == sorted(chosen)
    assert np.array_equal(plan.tiles.tissue_fraction, every.tissue_fraction[chosen])
    again = plan_tiles(small_slide, TileOptions(max_tiles=15, seed=1)).tiles
    other = plan_tiles(small_slide, TileOptions(max_tiles=15, seed=2)).tiles
    assert np.array_equal(again.cells, plan.tiles.cells)
    assert not np.array_equal(other.cells, plan.tiles.cells)
    assert len(plan_tiles(small_slide, TileOptions(max_tiles=1000)).tiles) == len(every)


def test_spread_is_even_over_the_field() -> None:
    cells = np.stack(np.meshgrid(np.arange(60), np.arange(44)), axis=-1).reshape(-1, 2)
    for seed in range(5):
        chosen = cells[spread_evenly(cells, 165, seed)]  # one in sixteen
        counts = np.histogram2d(chosen[:, 0], chosen[:, 1], bins=(5, 4), range=((0, 60), (0, 44)))[0]
        assert counts.sum() == 165
        assert 4 <= counts.min() <= counts.max() <= 13  # 8.25 on average; a random draw strays to 2 and 17


@pytest.mark.parametrize("side", [2, 8, 32])
def test_hilbert_curve_passes_each_cell_once_and_never_jumps(side: int) -> None:
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    index = hilbert_index(cells)
    assert sorted(index.tolist()) == list(range(side * side))
    steps = np.abs(np.diff(cells[np.argsort(index)], axis=0)).sum(axis=1)
    assert (steps == 1).all()


def check_every_tile(path: Path, slide: Slide, plan: TilePlan) -> None:
    """Each kept tile is what OpenSlide gives at its recorded corner, resampled by the named filter."""
    tiles = plan.tiles
    plain: openslide.AbstractSlide = openslide.open_slide(path)
    for first, batch in iter_tiles(slide, tiles, batch_size=16, workers=2):
        for tile, (x, y) in zip(batch, tiles.coords_level0[first : first + 16].tolist(), strict=True):
            expected = np.asarray(plain.read_region((x, y), tiles.level, tiles.read_size).convert("RGB"))
            if tiles.attrs["filter"] == "cv2-area":
                expected = cv2.resize(expected, (256, 256), interpolation=cv2.INTER_AREA)
            else:
                assert tiles.attrs["filter"] == "none"
            assert np.array_equal(tile, expected)
            assert x + tiles.tile_size_level0[0] <= slide.dimensions[0]
            assert y + tiles.tile_size_level0[1] <= slide.dimensions[1]


@pytest.mark.parametrize(
    ("name", "slide_mpp", "mpp", "tiles", "level", "pitch"),
    [
        ("CMU-1-Small-Region.svs", None, 0.5, (45, 55), 0, 256),
        ("TCGA-CR-7395-no-mpp.svs", 0.25, 0.5, (36, 42), 1, 512),
        ("low-power.dcm", 28.969, 29, (6, 8), 0, 256),
        ("ink.jpeg", 0.5, 0.5, (40, 46), 0, 256),
        ("plain.jpeg", 0.5, 0.5, (77, 81), 0, 256),
        ("plain.jpeg", 0.3, 0.5, (23, 25), 0, 427),
    ],
)
def test_real_slides_end_as_they_should(
    shared: Path, name: str, slide_mpp: float | None, mpp: float, tiles: tuple[int, int], level: int, pitch: int
) -> None:
    path = shared / "data" / "slides" / name
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        plan = plan_tiles(slide, TileOptions(mpp=mpp, slide_mpp=slide_mpp))
        assert tiles[0] <= len(plan.tiles) <= tiles[1]
        assert (plan.tiles.level, plan.tiles.tile_size_level0) == (level, (pitch, pitch))
        check_every_tile(path, slide, plan)
    assert str(shared) not in repr(plan.tiles.attrs)


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


Flags = dict[str, npt.NDArray[np.float32]]
Measure = Callable[..., Flags]


def tile_flags(slide: Slide) -> Flags:
    """Each flag as (rows, columns)."""
    grid = plan_grid(slide)
    rows, columns = np.indices((grid.rows, grid.columns))
    cells = np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.int32)
    values = tile_qc(slide, slide.overview(), grid, cells)
    assert values.dtype == np.float32
    return {name: values[:, k].reshape(grid.rows, grid.columns) for k, name in enumerate(QC_NAMES)}


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Measures the tiles of a picture, of which a slide with two levels is made."""

    def measured(image: npt.NDArray[np.uint8], mpp: float = 0.5) -> Flags:
        path = write_pyramid(tmp_path / "made.tif", image, mpp=(mpp, mpp), steps=(1, 4), compression="deflate")
        with open_slide(path) as slide:
            return tile_flags(slide)

    return measured


@pytest.fixture(scope="module")
def picture() -> npt.NDArray[np.uint8]:
    """5 x 4 tiles of 256 pixels, all textured tissue."""
    image = paint_tissue(5 * 256 * 2, 4 * 256 * 2, mpp=0.5)
    return np.ascontiguousarray(image[340 : 340 + 4 * 256, 330 : 330 + 5 * 256])


def test_shares_of_white_black_and_pen(picture: npt.NDArray[np.uint8], measure: Measure) -> None:
    image = picture.copy()
    image[256:512, 0:128] = (244, 243, 245)
    image[256:512, 256:320] = (20, 20, 22)
    image[512:768, 512:768] = (40, 70, 150)
    image[768:, 1024:] = (120, 120, 120)
    flags = measure(image)
    assert flags["white"][1, 0] - measure(picture)["white"][1, 0] == pytest.approx(0.5, abs=0.1)
    assert flags["black"][1, 1] == pytest.approx(0.25, abs=0.02)
    assert flags["pen"][2, 2] == pytest.approx(1, abs=0.01)
    assert flags["pen"][0].max() == 0
    assert flags["saturation"][3, 4] == pytest.approx(0, abs=0.02)
    assert flags["saturation"][2, 2] == pytest.approx(110 / 150, abs=0.02)


def test_focus_falls_with_blur_and_not_with_contrast_or_level(measure: Measure) -> None:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.normal(0, 1, (1024, 1280)).astype(np.float32), (0, 0), 3)
    image = np.clip(170 + 60 * texture / texture.std(), 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    medians = []
    for sigma in (0, 4, 8, 16):  # pixels of 0.5 microns
        blurred = cv2.GaussianBlur(image, (0, 0), sigma) if sigma else image
        medians.append(float(np.median(measure(np.asarray(blurred, np.uint8))["focus"])))
    assert medians[0] > 1.2 * medians[1] > 1.5 * medians[2]
    assert medians[1] > 50 > medians[3] or np.isnan(medians[3])
    pale = (170 + (image.astype(np.float32) - 170) * 0.4).astype(np.uint8)
    assert np.median(measure(pale)["focus"]) == pytest.approx(medians[0], rel=0.05)
    finer = np.asarray(cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC), np.uint8)
    assert np.median(measure(finer, mpp=0.25)["focus"]) == pytest.approx(medians[0], rel=0.05)


def test_focus_does_not_depend_on_strips(
    picture: npt.NDArray[np.uint8], measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(picture)["focus"]
    monkeypatch.setattr(tiling, "STRIP_PIXELS", 10_000)
    np.testing.assert_allclose(measure(picture)["focus"], whole, rtol=0.05)


def test_focus_is_not_judged_where_it_can_not_be(
    picture: npt.NDArray[np.uint8], measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture.copy()
    image[:512, :512] = 243
    focus = measure(image)["focus"]
    assert np.isnan(focus[0, 0])
    assert np.isfinite(focus[2:, :3]).all()
    monkeypatch.setattr(tiling, "FOCUS_PIXELS", 1000)
    assert np.isnan(measure(picture)["focus"]).all()
