"""Tiles read straight into places that somebody else owns: the same bytes, no array between, and clean ends."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from made_slides import all_tiles, paint_tissue, write_pyramid

from gigapath.preprocessing.reading import fill_places, read_into, read_tile
from gigapath.preprocessing.slide import Slide, SlideError, open_slide

Pixels = npt.NDArray[np.uint8]


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


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = paint_tissue(1400, 900, mpp=0.25)
    return write_pyramid(tmp_path_factory.mktemp("slides") / "made.tif", image, mpp=(0.25, 0.25))


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
