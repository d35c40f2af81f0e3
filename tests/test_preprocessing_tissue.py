"""Tissue on an overview: what is kept, what is dropped, and the shares of the tiles."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_slides import paint_tissue, write_pyramid

from gigapath.preprocessing import tissue
from gigapath.preprocessing.slide import Overview, open_slide
from gigapath.preprocessing.tiling import Grid, area_shares, plan_grid, published_shares, tile_sections, tissue_of
from gigapath.preprocessing.tissue import (
    TissueMask,
    find_tissue,
    has_dark_background,
    make_mask,
    otsu_cuts,
    share_below,
)

Image = npt.NDArray[np.uint8]

GLASS = (243, 241, 244)
PINK = (205, 140, 180)
PALE = (232, 216, 228)
PENS = {"blue": (40, 70, 150), "green": (50, 140, 90), "red": (215, 40, 45), "black": (25, 24, 27)}


def overview(image: Image, *, mpp: float = 8.0, scale: float = 16.0, origin: tuple[int, int] = (0, 0)) -> Overview:
    return Overview(image, np.ones(image.shape[:2], bool), origin, (scale, scale), mpp)


def field(
    colour: tuple[int, int, int] = GLASS, *, height: int = 260, width: int = 380, noise: float = 1.5, seed: int = 0
) -> Image:
    image = np.full((height, width, 3), colour, np.float32)
    image += np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def textured(shape: tuple[int, int], colour: tuple[int, int, int], *, seed: int = 0, depth: float = 25) -> Image:
    """Tissue of one colour with nuclei: darkened by up to `depth` grey levels."""
    rng = np.random.default_rng(seed)
    nuclei = cv2.GaussianBlur(rng.random(shape, np.float32), (0, 0), 1.2)
    nuclei = np.clip((nuclei - nuclei.mean()) / (4 * nuclei.std()) + 0.5, 0, 1)[..., None] * depth
    return np.clip(np.asarray(colour, np.float32) - nuclei * (1.0, 1.4, 0.7), 0, 255).astype(np.uint8)


def ellipse(shape: tuple[int, int], grow: int = 0) -> npt.NDArray[np.bool_]:
    mask = np.zeros(shape, np.uint8)
    cv2.ellipse(mask, (150, 120), (110 + grow, 70 + grow), 12, 0, 360, 1, -1)
    return mask.astype(bool)


def section(colour: tuple[int, int, int] = PINK, *, depth: float = 25) -> tuple[Image, npt.NDArray[np.bool_]]:
    """A field with one section off the diagonal, and where it lies."""
    image = field()
    inside = ellipse(image.shape[:2])
    image[inside] = textured(image.shape[:2], colour, depth=depth)[inside]
    return image, inside


def tiles_kept(mask: TissueMask, tile: int = 16) -> set[tuple[int, int]]:
    rows, columns = (side // tile for side in mask.mask.shape)
    grid = Grid((0, 0), (256, 256), 0, (256, 256), 256, (0.5, 0.5), columns, rows)
    return {(int(i), int(j)) for j, i in np.argwhere(area_shares(mask.mask, mask, grid) > 0.1)}


@pytest.mark.parametrize("noise", [0.0, 4.0, 20.0])
@pytest.mark.parametrize("level", [(255, 255, 255), GLASS, (222, 218, 224), (240, 238, 228)])
def test_blank_slide_has_no_tissue_whatever_the_noise(level: tuple[int, int, int], noise: float) -> None:
    found = find_tissue(overview(field(level, noise=noise)))
    assert found.state == "blank"
    assert not found.mask.any()
    assert found.pieces == 0


def test_shaded_stitched_and_dusty_glass_is_blank() -> None:
    image = field().astype(np.float32)
    image *= np.linspace(0.93, 1.03, image.shape[1])[None, :, None]
    image[100:180, 200:] *= 0.97
    image = np.clip(image, 0, 255).astype(np.uint8)
    image[:60, :90] = 255
    cv2.circle(image, (50, 200), 3, (120, 118, 121), -1)
    assert find_tissue(overview(image)).state == "blank"
    _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])
    assert find_tissue(overview(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))).state == "blank"


@pytest.mark.parametrize("colour", [PINK, (150, 90, 160), (170, 130, 100), (222, 200, 216)])
@pytest.mark.parametrize("depth", [3, 25, 90])
def test_core_that_fills_the_image_is_kept(colour: tuple[int, int, int], depth: float) -> None:
    image = textured((200, 280), colour, depth=depth)
    assert find_tissue(overview(image)).mask.mean() > 0.95
    corner = image.copy()
    corner[:20, :30] = GLASS  # 1 % of glass
    cv2.circle(corner, (150, 90), 6, GLASS, -1)
    found = find_tissue(overview(corner))
    assert found.mask[20:, 30:].mean() > 0.95
    assert not found.mask[:18, :28].any()


@pytest.mark.parametrize("gaps", [False, True], ids=["scanned", "gaps"])
@pytest.mark.parametrize("tissue", [(225, 205, 220), (226, 214, 222), (205, 198, 204)], ids=["pale", "paler", "grey"])
@pytest.mark.parametrize("glass", [(255, 255, 255), (246, 245, 247), (240, 238, 233), (232, 228, 234)])
def test_pale_tissue_is_found_on_any_glass(
    glass: tuple[int, int, int], tissue: tuple[int, int, int], gaps: bool
) -> None:
    for noise in (0.5, 2):
        image = field(glass, noise=noise)
        inside = ellipse(image.shape[:2])
        colour = np.asarray(tissue) * max(glass) / 245
        image[inside] = textured(image.shape[:2], tuple(colour.tolist()), depth=6)[inside]
        if gaps:
            image[:, 290:] = 255
        mask = find_tissue(overview(image)).mask
        assert mask[inside].mean() > 0.95
        assert not (mask & ~ellipse(image.shape[:2], grow=3)).any()


@pytest.mark.parametrize("pen", PENS.values(), ids=PENS)
@pytest.mark.parametrize("place", ["beside", "across"])
def test_pale_tissue_survives_a_pen_stroke(pen: tuple[int, int, int], place: str) -> None:
    image, _ = section(PALE, depth=6)
    without = find_tissue(overview(image))
    ends = ((320, 15), (300, 240)) if place == "beside" else ((20, 230), (260, 15))
    cv2.line(image, *ends, pen, 14, cv2.LINE_AA)
    with_pen = find_tissue(overview(image))
    assert len(tiles_kept(without)) > 80
    kept = tiles_kept(without) & tiles_kept(with_pen)
    assert len(kept) >= 0.95 * len(tiles_kept(without))


@pytest.mark.parametrize("name", ["blue", "green", "red"])
def test_pen_on_glass_is_dropped_and_recorded(name: str) -> None:
    image, inside = section()
    stroke = np.zeros(image.shape[:2], np.uint8)
    cv2.line(stroke, (330, 20), (310, 235), 1, 14)
    image[stroke > 0] = PENS[name]
    image = cv2.GaussianBlur(image, (0, 0), 0.7)
    found = find_tissue(overview(image))
    assert not found.mask[stroke > 0].any()
    assert found.dropped["pen"][stroke > 0].mean() > 0.95
    assert (found.mask & inside).sum() > 0.97 * inside.sum()
    assert (found.mask & ~ellipse(image.shape[:2], grow=3)).sum() == 0


@pytest.mark.parametrize("colour", [(20, 60, 130), (30, 110, 70), (25, 25, 28), (230, 200, 60), (200, 40, 40)])
@pytest.mark.parametrize("thickness", [2, 5, 12])
def test_inked_margin_loses_no_tile(colour: tuple[int, int, int], thickness: int) -> None:
    image, inside = section()
    without = tiles_kept(find_tissue(overview(image)))
    margin = inside & ~cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=thickness).astype(bool)
    image[margin] = colour
    assert without <= tiles_kept(find_tissue(overview(image)))


def test_dark_pigment_loses_no_tile() -> None:
    image, inside = section(PALE, depth=6)
    without = tiles_kept(find_tissue(overview(image)))
    for centre, radius, colour in (((120, 110), 40, (52, 36, 28)), ((215, 140), 14, (14, 12, 12))):
        spot = cv2.circle(np.zeros(inside.shape, np.uint8), centre, radius, 1, -1).astype(bool)
        image[spot & inside] = colour
    assert without <= tiles_kept(find_tissue(overview(image)))


def test_dab_does_not_hide_the_counterstain() -> None:
    image, inside = section((206, 208, 224), depth=14)
    without = tiles_kept(find_tissue(overview(image)))
    brown = (np.arange(image.shape[1]) > 190)[None, :] & inside
    image[brown] = textured(image.shape[:2], (110, 66, 38))[brown]
    assert without <= tiles_kept(find_tissue(overview(image)))


def test_needle_biopsy_is_not_outvoted_by_glass() -> None:
    image = field(height=900, width=1200, noise=3)
    image[430:436, 300:500] = textured((6, 200), PINK)
    found = find_tissue(overview(image))
    assert found.mask[430:436, 300:500].mean() > 0.95
    assert found.mask.sum() < 1.5 * 6 * 200


def test_specks_frames_and_fill_are_dropped_by_reason() -> None:
    image, inside = section()
    image[:4] = image[:, :5] = (70, 70, 72)
    image[200:204, 320:324] = PINK
    image[230:, 300:] = 0
    found = find_tissue(overview(image))
    assert set(found.dropped) == {"frame", "speck", "black"}
    assert found.dropped["frame"][:4].all()
    assert found.dropped["frame"][:, :5].mean() > 0.9
    assert found.dropped["speck"][200:204, 320:324].all()
    assert found.dropped["black"][230:, 300:].all()
    assert found.mask[inside].mean() > 0.97
    assert found.mask[~ellipse(inside.shape, grow=3)].sum() == 0


def test_blocks_that_the_scanner_missed_are_no_tissue_and_pigment_is() -> None:
    image, inside = section()
    blocks = np.zeros(inside.shape, bool)
    blocks[96:128, 128:160] = blocks[180:212, 290:330] = True  # amid tissue, four tiles of 16; amid glass
    image[blocks] = (2, 1, 1)
    pigmented = find_tissue(overview(image))
    assert pigmented.mask[96:128, 128:160].all()
    image[blocks] = 0
    found = find_tissue(overview(image))
    assert not found.mask[blocks].any()
    assert found.dropped["black"][blocks].all()
    assert not (found.mask & ~ellipse(inside.shape, grow=3)).any()  # nor are the grey edges that it has in a JPEG
    assert tiles_kept(pigmented) - tiles_kept(found) >= {(i, j) for i in (8, 9) for j in (6, 7)}


def test_dark_tissue_that_reaches_the_border_is_no_frame() -> None:
    image = field()
    image[:150, :300] = textured((150, 300), (60, 45, 50), depth=10)
    assert find_tissue(overview(image)).mask[:148, :298].all()


def test_transparent_fields_and_white_gaps_are_not_tissue() -> None:
    image, inside = section(PALE, depth=6)
    image[:, 280:] = 255
    seen = overview(image)
    seen.opaque[180:] = False
    found = find_tissue(seen)
    assert not found.mask[180:].any()
    assert not found.mask[:, 275:].any()
    assert found.mask[:180][inside[:180]].mean() > 0.97


def test_none_keeps_all_that_was_scanned() -> None:
    seen = overview(field())
    seen.opaque[:, 300:] = False
    found = find_tissue(seen, "none")
    np.testing.assert_array_equal(found.mask, seen.opaque)
    with pytest.raises(ValueError, match="otsu or none"):
        find_tissue(seen, "grey")


def test_pieces_and_area() -> None:
    image = field()
    image[20:60, 30:90] = PINK
    image[150:230, 200:330] = PINK
    found = find_tissue(overview(image))
    assert found.pieces == 2
    assert found.sections[40, 60] == 1
    assert found.sections[200, 250] == 2
    assert found.area_mm2 == pytest.approx((40 * 60 + 80 * 130) * 64e-6, rel=0.08)  # one blurred pixel around
    grid = Grid((0, 0), (256, 256), 0, (256, 256), 256, (0.5, 0.5), 23, 16)
    sections = tile_sections(found, grid)
    assert sections[2, 3] == 1
    assert sections[12, 15] == 2
    assert sections[7, 10] == 0
    np.testing.assert_array_equal(sections > 0, area_shares(found.mask, found, grid) > 0)


def test_piece_of_a_tile_is_the_one_with_most_area() -> None:
    mask = np.zeros((8, 12), bool)
    mask[0:4, 0:3] = mask[0:4, 4:9] = True  # piece 1: 12 pixels, piece 2: 20
    found = make_mask(overview(np.zeros((8, 12, 3), np.uint8), scale=1), mask, method="made")
    sections = tile_sections(found, Grid((0, 0), (8, 4), 0, (8, 4), 8, (1, 1), 1, 2))
    np.testing.assert_array_equal(sections, [[2], [0]])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    scale=st.tuples(st.floats(0.7, 40), st.floats(0.7, 40)),
    anchor=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    pitch=st.tuples(st.integers(3, 200), st.integers(3, 200)),
)
def test_tile_fractions_are_exact_areas(
    scale: tuple[float, float], anchor: tuple[int, int], pitch: tuple[int, int]
) -> None:
    values = np.random.default_rng(3).random((9, 14)) < 0.4
    seen = Overview(np.zeros((9, 14, 3), np.uint8), np.ones((9, 14), bool), (50, 20), scale, 8.0)
    mask = make_mask(seen, values, method="made")
    grid = Grid(anchor, pitch, 0, pitch, 256, (0.5, 0.5), 4, 3)
    expected = np.zeros((3, 4))
    for j in range(3):
        for i in range(4):
            left, top = anchor[0] + i * pitch[0] - 50, anchor[1] + j * pitch[1] - 20
            wide = [max(0, min(left + pitch[0], (x + 1) * scale[0]) - max(left, x * scale[0])) for x in range(14)]
            high = [max(0, min(top + pitch[1], (y + 1) * scale[1]) - max(top, y * scale[1])) for y in range(9)]
            expected[j, i] = np.outer(high, wide)[values].sum() / (pitch[0] * pitch[1])
    np.testing.assert_allclose(area_shares(mask.mask, mask, grid), expected, atol=1e-6)
    np.testing.assert_allclose(area_shares(3.0 * values, mask, grid), 3 * expected, atol=3e-6)


def test_otsu_finds_the_gap() -> None:
    histogram = np.bincount(np.r_[np.full(900, 20), np.full(100, 80)], minlength=256)
    assert otsu_cuts(histogram).tolist() == list(range(20, 80))  # equally good all along the gap


def test_dark_background_is_told_from_brightfield() -> None:
    dark = np.zeros((200, 300, 3), np.uint8)
    dark[50:120, 60:200, 2] = np.random.default_rng(0).integers(0, 255, (70, 140))
    assert has_dark_background(overview(dark))
    allowed = find_tissue(overview(dark))
    assert allowed.mask[55:115, 65:195].mean() > 0.95
    assert allowed.mask[:45].sum() == 0
    image, _ = section()
    unscanned = np.zeros((900, 900, 3), np.uint8)
    unscanned[:260, :380] = image
    for brightfield in (image, unscanned, textured((200, 300), (60, 45, 40)), field((20, 18, 16))[:0]):
        assert not has_dark_background(overview(brightfield))


def plain_otsu(luminance: npt.NDArray[np.float64]) -> float:
    """Every threshold between 256 bins is tried; the centre of the last bin of the darker class is returned."""
    counts, edges = np.histogram(luminance, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    best, threshold = -1.0, 0.0
    for last in range(255):
        dark, bright = counts[: last + 1], counts[last + 1 :]
        if not dark.sum() or not bright.sum():
            continue
        means = [
            (part * where).sum() / part.sum()
            for part, where in ((dark, centres[: last + 1]), (bright, centres[last + 1 :]))
        ]
        variance = float(dark.sum()) * float(bright.sum()) * (means[0] - means[1]) ** 2
        if variance > best * (1 + 1e-12):
            best, threshold = variance, float(centres[last])
    return threshold


@pytest.mark.parametrize("mpp", [0.5, 0.252, 0.3])
def test_published_keeps_what_the_plain_rule_keeps(tmp_path: Path, mpp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue, "LEVEL_PIXELS", 50_000)
    image = paint_tissue(3096, 2304, mpp=mpp)  # whole levels: no reader then shifts a band by parts of a pixel
    image[2000:2200, 100:900] = 120  # grey: darker than the threshold, whatever it is
    path = write_pyramid(tmp_path / "made.tif", image, mpp=(mpp, mpp), steps=(1, 3))
    with open_slide(path) as slide:
        grid = plan_grid(slide)
        found = tissue_of(slide, slide.overview(), "published")
        shares = published_shares(slide, found, grid, workers=2)
        lowest = slide.read(0, 0, 1, *slide.level_dimensions[1])
        threshold = plain_otsu(lowest.mean(axis=-1).ravel())
        assert found.threshold == pytest.approx(threshold, abs=1e-9)
        expected = np.zeros_like(shares)
        for j in range(grid.rows):
            for i in range(grid.columns):
                x, y = i * grid.pitch[0], j * grid.pitch[1]
                pixels = slide.read(x, y, grid.level, *grid.read_size)
                if grid.read_size != (grid.tile_size, grid.tile_size):
                    pixels = published_resampled(pixels, grid.tile_size)
                expected[j, i] = (pixels.mean(axis=-1) < threshold).mean()
    np.testing.assert_array_equal(shares > 0.1, expected > 0.1)
    assert 10 < (shares > 0.1).sum() < 0.8 * shares.size
    dark = np.argwhere(lowest.mean(axis=-1) < threshold)
    left, top, width, height = found.box_level0 or (0, 0, 0, 0)
    assert (left, top) == tuple(np.floor(dark.min(axis=0) * slide.level_downsamples[1]).astype(int)[::-1])
    assert (left + width, top + height) == tuple(
        np.ceil((dark.max(axis=0) + 1) * slide.level_downsamples[1]).astype(int)[::-1]
    )


def published_resampled(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA))


def test_threshold_is_strict_and_exact() -> None:
    tiles = np.zeros((1, 2, 2, 3), np.uint8)
    tiles[0, 0, 0] = (100, 100, 101)
    tiles[0, 0, 1] = (100, 100, 100)
    tiles[0, 1] = 250
    assert share_below(tiles, 100.0)[0] == 0
    assert share_below(tiles, 100.1)[0] == 0.25
    assert share_below(tiles, 101 - 2 / 3 + 1e-9)[0] == 0.5
    assert share_below(tiles, 256.0)[0] == 1


def test_flat_level_has_no_foreground(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "flat.tif", np.full((720, 960, 3), 240, np.uint8), mpp=(0.5, 0.5), steps=(1,))
    with open_slide(path) as slide:
        found = tissue_of(slide, slide.overview(), "published")
        assert found.state == "blank"
        assert found.box_level0 is None
        assert not published_shares(slide, found, plan_grid(slide)).any()
