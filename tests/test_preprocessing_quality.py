"""Flags per tile: each goes up for what it is named after, and for nothing else."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from made_slides import paint_tissue, write_pyramid

from gigapath.preprocessing import tiling
from gigapath.preprocessing.slide import Slide, open_slide
from gigapath.preprocessing.tiling import QC_NAMES, plan_grid, tile_qc

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
