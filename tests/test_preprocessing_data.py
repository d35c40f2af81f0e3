"""The published names of `gigapath.preprocessing.data`, against plain versions of what they promise."""

import csv
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_slides import paint_tissue, write_pyramid

from gigapath.files import OutputError
from gigapath.preprocessing.data import create_tiles_dataset
from gigapath.preprocessing.data.create_tiles_dataset import COLUMNS, generate_tiles, process_slide, save_image
from gigapath.preprocessing.data.foreground_segmentation import segment_foreground
from gigapath.preprocessing.data.slide_utils import find_level_for_target_mpp
from gigapath.preprocessing.data.tiling import tile_array_2d
from gigapath.preprocessing.slide import Slide, SlideError, open_slide


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "made.tif"
    return write_pyramid(path, paint_tissue(2610, 1930), mpp=(0.5, 0.5), steps=(1, 2, 4))


def process(path: Path, out: Path, **changed: Any) -> Path:
    sample = {"image": path, "slide_id": path.name, "metadata": {"site": "A, north", "age": 61}}
    given = {"level": 1, "margin": 0, "tile_size": 256, "foreground_threshold": None, "occupancy_threshold": 0.1}
    given |= {"output_dir": out / "output", "thumbnail_dir": out / "thumbnails"}
    return process_slide(**({"sample": sample} | given | changed))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "dataset.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 13), st.booleans())
def test_tile_array_2d_cuts_what_its_coordinates_say(height: int, width: int, size: int, first: bool) -> None:
    image = np.arange(1, 1 + 2 * height * width).reshape(2, height, width)
    given = image if first else np.moveaxis(image, 0, -1)
    tiles, coords = tile_array_2d(given, size, channels_first=first, constant_values=-7)
    assert tiles.shape[1:] == ((2, size, size) if first else (size, size, 2))
    assert len(tiles) == len(coords) == -(-height // size) * -(-width // size)
    for tile, (x, y) in zip(tiles, coords, strict=True):
        expected = np.full((2, size, size), -7)
        for j in range(size):
            for i in range(size):
                if 0 <= y + j < height and 0 <= x + i < width:
                    expected[:, j, i] = image[:, y + j, x + i]
        np.testing.assert_array_equal(tile if first else np.moveaxis(tile, -1, 0), expected)
    for length, axis in ((width, 0), (height, 1)):  # the same on opposite sides, at most one pixel apart
        before, after = -coords[:, axis].min(), coords[:, axis].max() + size - length
        assert 0 <= after - before <= 1
    np.testing.assert_array_equal(coords, coords[np.lexsort((coords[:, 0], coords[:, 1]))])


def test_tile_array_2d_passes_on_how_to_pad() -> None:
    tiles, coords = tile_array_2d(np.ones((3, 4, 6), np.uint8), 4, mode="edge")
    assert (tiles == 1).all()
    assert coords.tolist() == [[-1, 0], [3, 0]]
    with pytest.raises(ValueError, match="three axes"):
        tile_array_2d(np.ones((4, 4)), 2)


def test_segment_foreground_is_strictly_below_in_float32() -> None:
    slide = np.zeros((2, 3, 4, 5), np.uint8)
    slide[0, :, 1:] = 240
    slide[1, 0] = 250  # luminance 83.33
    mask, threshold = segment_foreground(slide, 250 / 3)
    assert threshold == 250 / 3
    assert mask.shape == (2, 4, 5)
    assert mask[0, 0].all() and not mask[0, 1:].any() and not mask[1].any()
    assert segment_foreground(slide, 83.4)[0][1].all()


def test_generate_tiles_keeps_what_exceeds_the_threshold() -> None:
    image = np.full((3, 20, 21), 255, np.uint8)
    image[:, 6:14, 5:13] = 50
    tiles, locations, occupancies, discarded = generate_tiles(image, 8, 128.0, 0.25)
    padded = np.pad(image, ((0, 0), (2, 2), (1, 2)), constant_values=255)
    expected = [
        (x - 1, y - 2, float((padded[:, y : y + 8, x : x + 8].mean(axis=0) < 128).mean()))
        for y in range(0, 24, 8)
        for x in range(0, 24, 8)
    ]
    kept = [entry for entry in expected if entry[2] > 0.25]
    assert 0 < len(kept) < 9
    assert discarded == 9 - len(kept)
    assert [(x, y, o) for (x, y), o in zip(locations.tolist(), occupancies.tolist(), strict=True)] == kept
    assert occupancies.dtype == np.float32
    for tile, (x, y, _) in zip(tiles, kept, strict=True):
        np.testing.assert_array_equal(tile, padded[:, y + 2 : y + 10, x + 1 : x + 9])


def test_save_image_writes_and_returns(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    image = save_image(pixels, tmp_path / "a.png")
    assert image.size == (7, 5)
    with PIL.Image.open(tmp_path / "a.png") as read:
        np.testing.assert_array_equal(np.moveaxis(np.asarray(read), -1, 0), pixels)
    assert save_image(pixels[:1].astype(np.float64), tmp_path / "b.png").mode == "L"
    with pytest.raises(ValueError, match="suffix"):
        save_image(pixels, tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="channels"):
        save_image(pixels[:2], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("mpp", "target", "level"), [(0.25, 0.5, 1), (0.5, 0.5, 0), (0.43, 0.5, 0), (0.39, 0.5, None), (0.25, 1.0, 2)]
)
def test_find_level_for_target_mpp(
    tmp_path: Path, mpp: float, target: float, level: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_pyramid(tmp_path / "made.tif", paint_tissue(960, 720), mpp=(mpp, mpp), steps=(1, 2, 4))
    assert find_level_for_target_mpp(str(path), target) == level
    assert bool(caplog.records) == (level is None)


def test_find_level_without_mpp_logs_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_pyramid(tmp_path / "made.tif", paint_tissue(960, 720), mpp=None)
    assert find_level_for_target_mpp(path, 0.5) is None
    assert "expected microns per pixel" in caplog.text
    with pytest.raises(FileNotFoundError):
        find_level_for_target_mpp(tmp_path / "none.svs", 0.5)


@pytest.mark.parametrize("level", [0, 1])
def test_process_slide_writes_tiles_at_their_coordinates(tmp_path: Path, slide_path: Path, level: int) -> None:
    folder = process(slide_path, tmp_path, level=level)
    assert folder == tmp_path / "output" / "made.tif"
    rows = table(folder)
    assert tuple(rows[0]) == (*COLUMNS, "slide_site", "slide_age")
    assert (folder / "failed_tiles.csv").read_text() == "tile_id\n"
    assert {file.name for file in folder.glob("*.png")} == {Path(row["image"]).name for row in rows}
    pitch = 256 * 2**level
    expected = {}
    with open_slide(slide_path) as slide:
        lowest = slide.read(0, 0, 2, *slide.level_dimensions[2])
        _, threshold = segment_foreground(np.moveaxis(lowest, -1, 0))
        for y in range(0, 1930 - pitch + 1, pitch):
            for x in range(0, 2610 - pitch + 1, pitch):
                pixels = slide.read(x, y, level, 256, 256)
                share = float((pixels.mean(axis=-1) < threshold).mean())
                if share > 0.1:
                    expected[x, y] = share, pixels
    assert [(int(row["tile_x"]), int(row["tile_y"])) for row in rows] == list(expected)
    assert 5 < len(rows) < 0.8 * (1930 // pitch) * (2610 // pitch)
    for row, ((x, y), (share, pixels)) in zip(rows, expected.items(), strict=True):
        assert row["tile_id"] == f"made.tif.{x:05d}x_{y:05d}y"
        assert row["image"] == f"made.tif/{x:05d}x_{y:05d}y.png"
        assert float(row["occupancy"]) == pytest.approx(share, abs=1e-6)
        assert (row["slide_id"], row["label"], row["slide_site"], row["slide_age"]) == (
            "made.tif",
            "",
            "A, north",
            "61",
        )
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "output" / row["image"])), pixels)


def test_process_slide_draws_three_thumbnails(tmp_path: Path, slide_path: Path) -> None:
    process(slide_path, tmp_path)
    pictures = {}
    for name in ("original", "roi", "roi_tiles"):
        with PIL.Image.open(tmp_path / "thumbnails" / f"made.tif_{name}.png") as image:
            pictures[name] = np.asarray(image.convert("RGB"))
    assert max(pictures["original"].shape) == 1024
    assert pictures["original"].shape[1] / pictures["original"].shape[0] == pytest.approx(2610 / 1930, rel=0.01)
    whole = cv2.resize(paint_tissue(2610, 1930), pictures["original"].shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(whole.astype(int) - pictures["original"]).mean() < 4
    assert pictures["roi"].shape == pictures["roi_tiles"].shape
    drawn = (pictures["roi"] != pictures["roi_tiles"]).any(axis=-1)
    assert 0.01 < drawn.mean() < 0.2


def test_other_values_are_cut_again_and_nothing_old_stays(tmp_path: Path, slide_path: Path) -> None:
    many = len(table(process(slide_path, tmp_path, level=0)))
    folder = process(slide_path, tmp_path, level=1)
    rows = table(folder)
    assert len(rows) < many
    assert {file.name for file in folder.glob("*.png")} == {Path(row["image"]).name for row in rows}
    assert len(table(process(slide_path, tmp_path, occupancy_threshold=0.9))) < len(rows)
    sample = {"image": slide_path, "slide_id": slide_path.name, "label": 3, "metadata": {}}
    assert {row["label"] for row in table(process(slide_path, tmp_path, sample=sample))} == {"3"}


def test_blank_slide_gives_an_empty_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_pyramid(tmp_path / "blank.tif", np.full((960, 1200, 3), 241, np.uint8), mpp=(0.5, 0.5), steps=(1, 2))
    folder = process(path, tmp_path)
    assert table(folder) == []
    assert (folder / "dataset.csv").read_text().startswith("slide_id,tile_id,image,label,tile_x,tile_y,occupancy")
    assert (folder / "failed_tiles.csv").read_text() == "tile_id\n"
    assert "no tissue found" in caplog.text
    assert len(list((tmp_path / "thumbnails").iterdir())) == 3


def test_unreadable_tiles_are_listed_and_the_others_kept(
    tmp_path: Path, slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = table(process(slide_path, tmp_path / "good"))
    broken = [(int(row["tile_x"]), int(row["tile_y"])) for row in (good[1], good[4])]
    read, refusing = Slide.read, []

    def damaged(self: Slide, x: int, y: int, level: int, width: int, height: int) -> npt.NDArray[np.uint8]:
        if self._handle in refusing or (level == 1 and (width, height) == (256, 256) and (x, y) in broken):
            refusing.append(self._handle)  # as OpenSlide: every later read fails too
            raise SlideError("broken")
        return read(self, x, y, level, width, height)

    monkeypatch.setattr(Slide, "read", damaged)
    folder = process(slide_path, tmp_path / "bad")
    assert table(folder) == [row for index, row in enumerate(good) if index not in (1, 4)]
    failed = (folder / "failed_tiles.csv").read_text().splitlines()
    assert failed == ["tile_id", good[1]["tile_id"], good[4]["tile_id"]]
    monkeypatch.undo()
    assert table(process(slide_path, tmp_path / "bad")) == good  # what failed is tried again


def test_full_disk_leaves_no_table(tmp_path: Path, slide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = create_tiles_dataset.write_bytes_atomic, []

    def fills_up(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise OutputError("the disk is full", 28)
        write(path, content)

    monkeypatch.setattr(create_tiles_dataset, "write_bytes_atomic", fills_up)
    with pytest.raises(OutputError, match="disk is full"):
        process(slide_path, tmp_path)
    assert not (tmp_path / "output" / "made.tif" / "dataset.csv").exists()
    monkeypatch.undo()
    assert table(process(slide_path, tmp_path))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"level": 7}, ValueError, "expected a level from 0 to 2"),
        ({"tile_size": 0}, ValueError, "tile size of at least 1"),
        ({"sample": {"image": "x", "slide_id": "y"}}, ValueError, "got no metadata"),
        ({"sample": {"image": "x.svs", "slide_id": "y", "metadata": {}}}, FileNotFoundError, "x.svs"),
        ({"sample": {"image": "x.svs", "slide_id": "../y", "metadata": {}}}, ValueError, "slide id"),
    ],
)
def test_bad_arguments_are_one_sentence(
    tmp_path: Path, slide_path: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        process(slide_path, tmp_path, **changed)
    assert not (tmp_path / "output").exists()


def test_memory_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    peaks = []
    for factor in (1, 2):
        image = np.tile(paint_tissue(1300, 1000), (factor, factor, 1))
        path = write_pyramid(tmp_path / f"made{factor}.tif", image, mpp=(0.5, 0.5), steps=(1, 8))
        del image
        tracemalloc.start()
        process(path, tmp_path, level=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 8e6  # the larger slide's level 0 alone is 15.6 MB
