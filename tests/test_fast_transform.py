"""`--fast-transform`: the same places in quicker pixels, never unasked, and recorded wherever numbers are compared."""

import csv
import dataclasses
from collections import Counter
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from made_slides import paint_tissue, write_pyramid
from test_fast_reading import aperio, jp2k, jpeg, read_all, read_plainly, write_blocks
from test_reading import all_tiles
from tiny_encoders import tiny_tile_encoder

from gigapath.check import CheckOptions
from gigapath.check.run import check_file
from gigapath.check.slides import SlideCheck
from gigapath.cli.main import main
from gigapath.cohort.run import Plan, Watcher
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.embedding.run import run_embed
from gigapath.features import Tiles, read_features
from gigapath.methods import methods
from gigapath.preprocessing.reading import filter_name, filter_of
from gigapath.preprocessing.slide import SlideError, open_slide
from gigapath.preprocessing.tiff import TiffLevel
from gigapath.preprocessing.tiling import TileOptions

Image = npt.NDArray[np.uint8]

DRIFT = 0.05  # pixels of a tile; half a pixel of a level that is halved would be 0.25
DIFFERENCE = 1.2  # of 0 to 255, the mean over all tiles; the painted texture goes down to single pixels
DIFFERENCE_OF_ONE = 4.0  # the mean over a tile


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One painted field of odd sides at 0.25 microns a pixel, in blocks of several sizes and colour forms."""
    folder = tmp_path_factory.mktemp("slides")
    image = paint_tissue(1601, 1347, mpp=0.25)

    def written(name: str, subsampling: str, tile: int) -> Path:
        return write_blocks(
            folder / f"{name}.tif", image, lambda block: jpeg(block, subsampling=subsampling),
            compression=7, photometric="ycbcr", tile=tile,
        )  # fmt: skip

    return {
        "blocks of 240, 4:2:0": written("a", "420", 240),
        "blocks of 240, 4:4:4": written("b", "444", 240),
        "blocks of 112, 4:2:2": written("c", "422", 112),
        "blocks of 256, RGB": write_pyramid(folder / "d.tif", image, mpp=(0.25, 0.25), tile=256, steps=(1,)),
    }


def tiles_of(path: Path, pixels: int, *, where: str | tuple[int, int] = (0, 0), tile_size: int = 64) -> Tiles:
    """Every whole tile of so many level-0 pixels a side, on a grid that begins at `where` or ends with the level."""
    with open_slide(path, slide_mpp=0.25) as slide:
        found = all_tiles(slide, mpp=0.25 * pixels / tile_size, tile_size=tile_size)
        ends = found.coords_level0 + pixels
        shift = np.array(slide.dimensions) - ends.max(axis=0) if where == "end" else np.array(where)
        inside = (ends + shift <= slide.dimensions).all(axis=1)
    assert found.read_size == (pixels, pixels)
    return dataclasses.replace(found, coords_level0=found.coords_level0 + shift).take(inside)


def read_both(path: Path, tiles: Tiles, *, workers: int = 0) -> tuple[Image, Image, str]:
    """The tiles by the fast transform and in the ordinary way, and the name of the fast one's filter."""
    with open_slide(path, slide_mpp=0.25) as slide:
        ordinary = read_all(slide, tiles)
        assert filter_of(slide, tiles) == filter_name(tiles.read_size, tiles.tile_size)
    with open_slide(path, slide_mpp=0.25, fast_transform=True) as slide:
        return read_all(slide, tiles, workers=workers), ordinary, filter_of(slide, tiles)


def drift(ours: Image, theirs: Image) -> npt.NDArray[np.float64]:
    """(x, y) by which `ours` lies beside `theirs`, both (N, T, T, 3): what fits best to first order in the shift."""
    a, b = (pixels.astype(np.float64).mean(axis=-1) for pixels in (ours, theirs))
    down, right = np.gradient((a + b) / 2, axis=(1, 2))
    inner = np.s_[:, 2:-2, 2:-2]
    slopes = np.stack([right[inner].ravel(), down[inner].ravel()], axis=1)
    shift: npt.NDArray[np.float64] = np.linalg.lstsq(slopes, (b - a)[inner].ravel(), rcond=None)[0]
    return shift


CASES = [
    (128, (0, 0), "jpeg-scaled-2"),
    (128, "end", "jpeg-scaled-2+cv2-linear"),  # from odd pixels, so from between those of the half
    (131, (0, 0), "jpeg-scaled-2+cv2-linear"),
    (150, (5, 2), "jpeg-scaled-2+cv2-linear"),
    (100, (0, 0), "cv2-linear"),
    (256, (4, 8), "jpeg-scaled-4"),
    (263, "end", "jpeg-scaled-4+cv2-linear"),
    (513, (7, 2), "jpeg-scaled-8+cv2-linear"),
]
FORMS = ("blocks of 240, 4:4:4", "blocks of 112, 4:2:2", "blocks of 256, RGB")
SHAPES = [("blocks of 240, 4:2:0", case) for case in CASES] + [(form, CASES[i]) for form in FORMS for i in (1, 2, 6)]


@pytest.mark.parametrize(("form", "case"), SHAPES)
def test_tiles_lie_where_they_lie(
    slides: dict[str, Path], form: str, case: tuple[int, str | tuple[int, int], str]
) -> None:
    pixels, where, name = case
    tiles = tiles_of(slides[form], pixels, where=where)
    fast, ordinary, used = read_both(slides[form], tiles, workers=2)
    assert used == name
    for odd in np.ndindex(2, 2):  # what begins between pixels of a shrunk level could drift against what doesn't
        alike = (tiles.cells % 2 == odd).all(axis=1)
        assert np.abs(drift(fast[alike], ordinary[alike])).max() < DRIFT, odd
    apart = np.abs(fast.astype(int) - ordinary)
    assert 0 < apart.mean() < DIFFERENCE
    assert apart.mean(axis=(1, 2, 3)).max() < DIFFERENCE_OF_ONE
    outermost = (tiles.cells == tiles.cells.max(axis=0)).T  # the last columns and rows of tiles
    for border in (apart[:, 0], apart[:, :, 0], apart[outermost[1], -1], apart[outermost[0], :, -1]):
        assert border.mean() < DIFFERENCE


def test_the_measure_sees_half_a_pixel(slides: dict[str, Path]) -> None:
    """One pixel of the level is half a pixel of a tile."""
    path = slides["blocks of 240, 4:2:0"]
    here, beside = tiles_of(path, 128, where=(20, 20)), tiles_of(path, 128, where=(21, 20))
    with open_slide(path, slide_mpp=0.25) as slide:
        x, y = drift(read_all(slide, here), read_all(slide, beside))
    assert 0.3 < abs(x) < 0.7
    assert abs(y) < DRIFT


def test_each_block_is_decoded_once_and_smaller(slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = slides["blocks of 112, 4:2:2"]
    tiles = tiles_of(path, 131)
    counts: Counter[tuple[int, int, int]] = Counter()
    read = TiffLevel.read

    def counting(self: TiffLevel, file: int, row: int, column: int, out: Image | None = None) -> Image:
        counts[self.block[0], row, column] += 1
        return read(self, file, row, column, out)

    with open_slide(path, slide_mpp=0.25, fast_transform=True) as slide:
        assert slide.fast.used(0) == "fast-equal"  # the whole blocks that are compared with OpenSlide's
        monkeypatch.setattr(TiffLevel, "read", counting)
        here = read_all(slide, tiles)
        assert {block for block, *_ in counts} == {56}
        assert set(counts.values()) == {1}
        assert np.array_equal(read_all(slide, tiles, workers=3, batch_size=5), here)
        assert np.array_equal(read_all(slide, tiles, start=41), here[41:])


def test_what_it_does_not_serve_is_read_in_the_ordinary_way(tmp_path: Path, slides: dict[str, Path]) -> None:
    image = paint_tissue(1101, 907, mpp=0.25)

    def lossless(block: Image) -> bytes:
        return block.tobytes()

    write_blocks(tmp_path / "plain.tif", image, lossless, compression=1)
    write_blocks(tmp_path / "jp2k.svs", image, jp2k, compression=33005, description=aperio(image, "J2K"))
    write_pyramid(tmp_path / "few.tif", image[:400, :600], mpp=(0.25, 0.25), tile=256, steps=(1,))
    jpegs = slides["blocks of 240, 4:2:0"]
    ways = [
        (tmp_path / "plain.tif", 150, "auto", "cv2-area"),
        (tmp_path / "jp2k.svs", 150, "auto", "cv2-area"),
        (tmp_path / "few.tif", 150, "auto", "cv2-area"),  # too few blocks to be compared
        (jpegs, 150, "openslide", "cv2-area"),
        (jpegs, 64, "auto", "none"),
        (jpegs, 50, "auto", "cv2-cubic"),
    ]
    for path, pixels, reader, name in ways:
        tiles = tiles_of(path, pixels)
        with open_slide(path, slide_mpp=0.25, reader=reader, fast_transform=True) as slide:
            assert filter_of(slide, tiles) == name, path.name
            assert np.array_equal(read_all(slide, tiles), read_plainly(path, tiles)), path.name


def test_tiles_on_absent_blocks_are_openslides(tmp_path: Path) -> None:
    image = paint_tissue(1101, 907, mpp=0.25)
    encoding: dict[str, Any] = {"compression": 7, "photometric": "ycbcr"}
    path = write_blocks(tmp_path / "a.tif", image, jpeg, missing=(20,), **encoding)  # (256, 256) to (384, 384)
    tiles = tiles_of(path, 131)
    fast, ordinary, used = read_both(path, tiles)
    assert used == "jpeg-scaled-2+cv2-linear"
    start, end = tiles.coords_level0, tiles.coords_level0 + 131
    touching = ((start < 384) & (end > 256)).all(axis=1)
    assert 0 < touching.sum() < len(tiles)
    same = (fast == ordinary).all(axis=(1, 2, 3))
    assert same[touching].all()
    assert not same[~touching].all()


def test_corrupt_jpeg_is_the_same_error(tmp_path: Path) -> None:
    path = write_blocks(tmp_path / "a.tif", paint_tissue(1101, 907), jpeg, compression=7, photometric="ycbcr")
    with tifffile.TiffFile(path) as file:
        offset, length = file.pages[0].dataoffsets[20], file.pages[0].databytecounts[20]
    with path.open("r+b") as raw:
        raw.seek(offset + length // 2)
        raw.write(b"\xff\xd9\x12\x13")
    tiles = tiles_of(path, 131)
    with (
        open_slide(path, slide_mpp=0.25, fast_transform=True) as slide,
        pytest.raises(SlideError, match=r"slide 'a': tile \d+ of \d+ \(x \d+, y \d+, level 0\) can't be decoded"),
    ):
        read_all(slide, tiles)


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny encoder under every name, and no pictures."""
    monkeypatch.setattr("gigapath.embedding.tiling.preview_picture", lambda _, overview: overview)
    monkeypatch.setattr("gigapath.embedding.tiling.write_preview", lambda *_, **__: None)
    monkeypatch.setattr("gigapath.cohort.sheet.contact_sheet", lambda *_, **__: None)
    for where in ("gigapath.embedding.run", "gigapath.check.slides"):
        monkeypatch.setattr(f"{where}.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())


class Plans(Watcher):
    """Writes down what runs say before they begin."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def plan(self, plan: Plan) -> None:
        self.lines = list(plan.lines)


def embed(slides: Path, out: Path, *, fast: bool) -> list[str]:
    """Embed; returns the lines of the plan."""
    embedding = EmbedOptions(tile_encoder="tiny", slide_encoder="none", device="cpu", fast_transform=fast)
    watch, tiling = Plans(), TileOptions(tile_size=64)
    assert run_embed([slides], out, tiling=tiling, embedding=embedding, options=RunOptions(workers=0), watch=watch)
    return watch.lines


@pytest.mark.usefixtures("tiny")
def test_a_run_records_it_wherever_numbers_are_compared(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    write_pyramid(slides / "fine.tif", paint_tissue(1800, 1400, mpp=0.25), mpp=(0.25, 0.25), steps=(1,))
    write_pyramid(slides / "same.tif", paint_tissue(900, 700), mpp=(0.5, 0.5), steps=(1,), tile=112)
    assert "fast transform: tiles that must shrink are approximated where their blocks are JPEG." in embed(
        slides, out, fast=True
    )
    file = out / "features_tiny" / "fine.h5"
    fast = read_features(file)
    assert (fast.attrs["filter"], fast.attrs["fast_transform"]) == ("jpeg-scaled-2", True)
    same = read_features(out / "features_tiny" / "same.h5").attrs
    assert (same["filter"], same["fast_transform"]) == ("none", True)
    with (out / "slides.csv").open(newline="") as table:
        rows = {row["slide_id"]: (row["reader"], row["filter"]) for row in csv.DictReader(table)}
    assert rows == {"fine": ("fast-equal", "jpeg-scaled-2"), "same": ("fast-equal", "none")}
    written = methods(out)
    assert "tiles of 1 slide were shrunk by decoding JPEG at 1/2 of its size instead of" in " ".join(written.paragraphs)
    assert any("--fast-transform" in caution for caution in written.cautions)
    check = CheckOptions(slides=str(slides), sample=5)
    assert not [
        found for found in check_file(file, options=check, check_slide=SlideCheck(check)).findings if found.wrong
    ]

    # Nothing is left to do in equal numbers; other slides of other numbers don't come beside these.
    made = file.stat().st_mtime_ns
    embed(slides, out, fast=True)
    assert file.stat().st_mtime_ns == made
    other = tmp_path / "other"
    other.mkdir()
    (slides / "same.tif").rename(other / "same.tif")
    with pytest.raises(ValueError, match=r"those of 'fine' differ .*fast_transform True -> none.*--allow-mixed"):
        embed(other, out, fast=False)

    # The same slides in the ordinary way are made again.
    (other / "same.tif").rename(slides / "same.tif")
    said = embed(slides, out, fast=False)
    assert "features_tiny: 2 made before in other numbers, now again: fast_transform True -> none." in said
    plain = read_features(file)
    assert plain.attrs["filter"] == "cv2-area"
    assert "fast_transform" not in plain.attrs
    change = np.abs(plain.features - fast.features).max()
    assert 0 < change < 0.1 * np.abs(plain.features - plain.features[::-1]).max()
    assert methods(out).cautions == []


def test_the_demo_sets_it_beside_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pyramid(tmp_path / "a.tif", paint_tissue(2300, 1800, mpp=0.25), mpp=(0.25, 0.25), steps=(1,))
    monkeypatch.setattr(
        "gigapath.tile_encoder.load_tile_encoder", lambda _, *, precision, **__: tiny_tile_encoder(precision=precision)
    )
    demo = run_path(str(Path(__file__).parent.parent / "demo" / "what_moves_an_embedding.py"))
    lines = demo["main"](["--slide", str(path), "--tiles", "4"])
    assert lines[0] == "standin, trained weights, 4 tiles of 512 pixels"
    assert lines[1] == "ordinary transform: cv2-area; fast transform: jpeg-scaled-2"
    moved = {row.split(" | ")[0][2:]: float(row.split(" | ")[2].split(" ")[0]) for row in lines[5:]}
    another = moved.pop("another tile of the slide")
    assert all(0 < change < another for change in moved.values())
    assert moved["precision: fp16 autocast"] < moved["precision: bf16 autocast"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.usefixtures("tiny")
def test_openslide_alone_can_not_do_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embed", str(tmp_path), "--out", str(tmp_path / "out"), "--fast-transform", "--reader", "openslide"]
    assert main(words) == 1
    assert "--fast-transform: expected --reader auto or fast beside it, got openslide" in capsys.readouterr().err
