"""The published tissue rule against a plain version of it."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from made_slides import paint_tissue, write_pyramid

from gigapath.preprocessing import published
from gigapath.preprocessing.published import luminance_threshold, published_shares, share_below
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import plan_grid, tissue_of


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
    monkeypatch.setattr(published, "BAND_PIXELS", 50_000)
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
    assert luminance_threshold(np.zeros(766, np.int64)) == 0
