"""Tiles as pixels: what OpenSlide gives at the recorded corner, in order, whatever reads them, also straight into
places that somebody else owns; and clean ends."""

import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from made_slides import all_tiles, paint_tissue, write_pyramid

from gigapath.preprocessing.fast import READERS
from gigapath.preprocessing.reading import fill_places, filter_name, iter_tiles, read_into, read_tile, resample
from gigapath.preprocessing.slide import Slide, SlideError, open_slide

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


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


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 7), (1, 16), (2, 7), (3, 16), (3, 1000)])
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


def test_resample_grows_one_axis_and_shrinks_the_other() -> None:
    ramp = np.repeat(np.arange(0, 240, 3, dtype=np.uint8)[:, None, None], 30, 1).repeat(3, 2)  # (80, 30, 3)
    out = resample(ramp, (60, 40))
    assert out.shape == (40, 60, 3)
    assert np.abs(out[:, :, 0] - np.arange(1.5, 240, 6)[:, None]).max() <= 1
    assert filter_name((30, 80), 60) == "cv2-area+cv2-cubic"
    assert (filter_name((30, 40), 60), filter_name((70, 60), 60)) == ("cv2-cubic", "cv2-area")


class Row:
    """Rows of a table as a place; remembers how it ended."""

    def __init__(self, first: int, pixels: Pixels) -> None:
        self.first, self.pixels = first, pixels
        self.ends: list[BaseException | None] = []

    def done(self, problem: BaseException | None = None) -> None:
        self.ends.append(problem)


class Table:
    """Gives the rows of one array as places of at most `most` rows, and none once `stop` rows are given."""

    def __init__(self, total: int, side: int, most: int = 5, stop: int = 10**9) -> None:
        self.pixels = np.zeros((total, side, side, 3), np.uint8)
        self.most, self.stop = most, stop
        self.places: list[Row] = []
        self._taking = threading.Lock()

    def take(self, first: int, left: int) -> Row | None:
        assert self._taking.acquire(blocking=False), "one thread at a time"
        try:
            assert first + left == len(self.pixels)
            if first >= self.stop:
                return None
            self.places.append(Row(first, self.pixels[first : first + min(left, self.most)]))
            return self.places[-1]
        finally:
            self._taking.release()


def cut(tiles: Pixels, rows: Pixels) -> None:
    rows[...] = tiles[:, 4:-4, 4:-4]


@pytest.mark.parametrize("mpp", [0.25, 0.41])  # pixel for pixel, and resampled
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_places_hold_the_bytes_of_the_tiles(slide_path: Path, workers: int, mpp: float) -> None:
    with open_slide(slide_path) as slide:
        tiles = all_tiles(slide, mpp=mpp)
        expected = np.stack([read_tile(slide, tiles, index) for index in range(len(tiles))])
        assert len(np.unique(expected.reshape(len(expected), -1), axis=0)) == len(expected)  # no two alike
        whole, inner = Table(len(tiles), 64), Table(len(tiles), 56)
        read_into(slide, tiles, whole.take, workers=workers)
        read_into(slide, tiles, inner.take, workers=workers, fit=cut, start=7)
    assert whole.pixels.tobytes() == expected.tobytes()
    assert inner.pixels[7:].tobytes() == expected[7:, 4:-4, 4:-4].tobytes() and not inner.pixels[:7].any()
    for table, first in ((whole, 0), (inner, 7)):
        assert [place.first for place in table.places] == list(range(first, len(tiles), 5))
        assert all(place.ends == [None] for place in table.places)


@pytest.mark.parametrize("workers", [0, 3])
def test_no_more_is_read_than_is_wanted(slide_path: Path, workers: int) -> None:
    with open_slide(slide_path) as slide:
        tiles = all_tiles(slide)
        table = Table(len(tiles), 64, stop=20)
        read_into(slide, tiles, table.take, workers=workers)
        assert [place.first for place in table.places] == [0, 5, 10, 15]
        assert table.pixels[:20].any((1, 2, 3)).all() and not table.pixels[20:].any()
        nothing = Table(0, 64)
        read_into(slide, tiles.take(np.arange(0)), nothing.take, workers=workers)
        assert not nothing.places


@pytest.mark.parametrize("workers", [0, 3])
def test_a_tile_that_fails_is_the_end_and_every_place_hears_of_it(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    read = Slide.read

    def failing(self: Slide, x: int, y: int, *rest: int) -> Pixels:
        if y > 300:
            raise SlideError("injected")
        return read(self, x, y, *rest)

    monkeypatch.setattr(Slide, "read", failing)
    with open_slide(slide_path, reader="openslide") as slide:
        tiles = all_tiles(slide)
        table = Table(len(tiles), 64)
        with pytest.raises(SlideError, match=r"tile \d+ of \d+") as raised:
            read_into(slide, tiles, table.take, workers=workers)
    assert len(table.places) < len(tiles) / 5, "the rest is not asked for"
    ends = [place.ends for place in table.places]
    assert all(len(each) == 1 for each in ends)
    assert [raised.value] in ends and set(ends[0]) <= {None, raised.value}


def test_an_error_of_whoever_gives_places_is_raised_too() -> None:
    given: list[Row] = []

    def take(first: int, left: int) -> Row:
        if first == 6:
            raise MemoryError("no room")
        given.append(Row(first, np.zeros((2, 1, 1, 3), np.uint8)))
        return given[-1]

    with pytest.raises(MemoryError, match="no room"):
        fill_places(lambda index, row: None, take, 10, workers=3)
    assert [place.first for place in given] == [0, 2, 4] and all(len(place.ends) == 1 for place in given)
