"""Tiles as pixels: what OpenSlide gives at the recorded corner, in order, whatever reads them; and clean ends."""

import threading
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from made_slides import all_tiles, paint_tissue, write_pyramid

from gigapath.preprocessing.fast import READERS
from gigapath.preprocessing.reading import filter_name, iter_tiles, read_tile, resample
from gigapath.preprocessing.slide import Slide, SlideError, open_slide


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = paint_tissue(1400, 900, mpp=0.25)
    return write_pyramid(tmp_path_factory.mktemp("slides") / "made.tif", image, mpp=(0.25, 0.25))


@pytest.mark.parametrize(("mpp", "level", "how"), [(0.25, 0, "none"), (0.5, 1, "none"), (0.41, 0, "cv2-area")])
def test_tile_equals_read_region_at_its_corner(slide_path: Path, mpp: float, level: int, how: str) -> None:
    with open_slide(slide_path) as slide, openslide.OpenSlide(slide_path) as plain:
        tiles = all_tiles(slide, mpp=mpp)
        assert tiles.level == level
        assert filter_name(tiles.read_size, tiles.tile_size) == how
        assert len(tiles) > 40
        for index, (x, y) in enumerate(tiles.coords_level0.tolist()):
            expected = np.asarray(plain.read_region((x, y), level, tiles.read_size).convert("RGB"))
            if how != "none":
                expected = cv2.resize(expected, (64, 64), interpolation=cv2.INTER_AREA)
            assert np.array_equal(read_tile(slide, tiles, index), expected)


def test_tile_holds_the_picture_that_was_written(tmp_path: Path) -> None:
    image = paint_tissue(900, 640, mpp=0.5)
    with open_slide(write_pyramid(tmp_path / "a.tif", image, mpp=(0.5, 0.5), compression="deflate")) as slide:
        tiles = all_tiles(slide)
        for first, batch in iter_tiles(slide, tiles, batch_size=32):
            for tile, (x, y) in zip(batch, tiles.coords_level0[first : first + 32], strict=True):
                assert np.array_equal(tile, image[y : y + 64, x : x + 64])


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 16, 1000])
def test_tiles_are_the_same_bytes_in_the_same_order(slide_path: Path, workers: int, batch_size: int) -> None:
    with open_slide(slide_path) as slide:
        tiles = all_tiles(slide, mpp=0.41)
        expected = np.stack([read_tile(slide, tiles, index) for index in range(len(tiles))])
        assert len(np.unique(expected.reshape(len(expected), -1), axis=0)) == len(expected)  # no two alike
        firsts, batches = [], []
        for first, batch in iter_tiles(slide, tiles, batch_size=batch_size, workers=workers):
            assert batch.dtype == np.uint8
            firsts.append(first)
            batches.append(batch)
    assert firsts == list(range(0, len(tiles), batch_size))
    assert np.array_equal(np.concatenate(batches), expected)


def test_reading_goes_on_from_a_tile_and_none_is_no_error(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        tiles = all_tiles(slide)
        parts = list(iter_tiles(slide, tiles, batch_size=5, workers=2, start=15))
        assert parts[0][0] == 15
        assert sum(len(batch) for _, batch in parts) == len(tiles) - 15
        assert np.array_equal(parts[0][1][0], read_tile(slide, tiles, 15))
        assert list(iter_tiles(slide, tiles.take(np.arange(0)), batch_size=5, workers=2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_is_bounded(slide_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    reads: list[int] = []
    read = Slide.read

    def counting(self: Slide, *place: int) -> object:
        reads.append(1)
        return read(self, *place)

    monkeypatch.setattr(Slide, "read", counting)
    with open_slide(slide_path, reader="openslide") as slide:
        tiles = all_tiles(slide)
        batches = iter_tiles(slide, tiles, batch_size=4, workers=workers)
        for number, _ in enumerate(batches, start=1):
            assert len(reads) <= 4 * (number + 2 if workers else number)
        assert len(reads) == len(tiles)


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "tile-reader"))]


def break_block(path: Path, column: int, row: int) -> None:
    """Overwrite one of level 0's compressed blocks with zeros."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        index = row * -(-page.imagewidth // page.tilewidth) + column
        offset, size = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\0" * size)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_block_names_slide_and_tile(tmp_path: Path, workers: int, reader: str) -> None:
    path = write_pyramid(tmp_path / "broken.tif", paint_tissue(1400, 900), mpp=(0.5, 0.5))
    break_block(path, 2, 1)  # x 480 to 720, y 240 to 480
    with open_slide(path, reader=reader) as slide:
        tiles = all_tiles(slide)
        assert (slide.fast.used(0) == "openslide") == (reader == "openslide")
        with pytest.raises(SlideError, match=r"'broken': tile \d+ of 294 \(x \d+, y \d+, level 0\).*copy it again"):
            list(iter_tiles(slide, tiles, batch_size=16, workers=workers))
        assert not reader_threads()
        if workers == 0 and reader == "openslide":
            with pytest.raises(SlideError):  # OpenSlide refuses every read after its first error
                read_tile(slide, tiles, 0)


@pytest.mark.parametrize("name", ["cut.tif", "cut.jpeg"])
def test_a_cut_file_that_opens_fails_at_its_first_missing_tile(tmp_path: Path, name: str) -> None:
    if name == "cut.tif":
        noise = np.random.default_rng(0).integers(0, 256, (1300, 1700, 3), np.uint8)
        # above 5 MB OpenSlide does not read the level when it opens the file
        path = write_pyramid(tmp_path / name, noise, mpp=(0.5, 0.5), steps=(1,), compression="deflate")
    else:
        path = tmp_path / name
        path.write_bytes(cv2.imencode(".jpg", paint_tissue(700, 500))[1].tobytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    with open_slide(path, slide_mpp=0.5) as slide:
        with pytest.raises(SlideError, match=r"slide 'cut': tile \d+ of \d+ \(x \d+, y \d+, level 0\)"):
            list(iter_tiles(slide, all_tiles(slide), batch_size=16, workers=2))
        assert not reader_threads()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 4, "workers": -1}, "workers"),
    ],
)
def test_reading_refuses_numbers_that_mean_nothing(slide_path: Path, arguments: dict[str, int], words: str) -> None:
    with open_slide(slide_path) as slide, pytest.raises(ValueError, match=words):
        next(iter_tiles(slide, all_tiles(slide), **arguments))


def naive_area(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mean over the area that each output pixel covers, in float64."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        step = n_in / n_out
        share = np.zeros((n_out, n_in))
        for i in range(n_out):
            for j in range(n_in):
                share[i, j] = max(0.0, min((i + 1) * step, j + 1) - max(i * step, j)) / step
        return share

    columns, rows = weights(pixels.shape[1], size[0]), weights(pixels.shape[0], size[1])
    return np.einsum("ab,bcd,ec->aed", rows, pixels.astype(float), columns)


@pytest.mark.parametrize("shape", [(64, 96), (50, 71), (32, 48), (33, 40)])
def test_resample_is_the_mean_over_area(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    out = resample(pixels, (40, 32))
    assert np.abs(out - naive_area(pixels, (40, 32))).max() <= 0.51


def test_resample_grows_one_axis_and_shrinks_the_other() -> None:
    ramp = np.repeat(np.arange(0, 240, 3, dtype=np.uint8)[:, None, None], 30, 1).repeat(3, 2)  # (80, 30, 3)
    out = resample(ramp, (60, 40))
    assert out.shape == (40, 60, 3)
    assert np.abs(out[:, :, 0] - np.arange(1.5, 240, 6)[:, None]).max() <= 1
    assert filter_name((30, 80), 60) == "cv2-area+cv2-cubic"
    assert (filter_name((30, 40), 60), filter_name((70, 60), 60)) == ("cv2-cubic", "cv2-area")
