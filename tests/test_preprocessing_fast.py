"""The fast reader: OpenSlide's pixels to the bit or none of it, each compressed block decoded once, clean ends."""

import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from made_slides import all_tiles, paint_tissue, write_pyramid, write_scn
from test_preprocessing_reading import reader_threads
from test_preprocessing_vendors import write_philips

from gigapath.features import Tiles
from gigapath.preprocessing import fast
from gigapath.preprocessing.fast import TiffLevel
from gigapath.preprocessing.reading import iter_tiles, resample
from gigapath.preprocessing.slide import Slide, SlideError, open_slide

Image = npt.NDArray[np.uint8]
Encode = Callable[[Image], bytes]


def jpeg(pixels: Image, *, ycbcr: bool = True, subsampling: str = "420") -> bytes:
    space = "YCBCR" if ycbcr else "RGB"
    encoded: bytes = imagecodecs.jpeg8_encode(
        pixels, level=85, colorspace="RGB", outcolorspace=space, subsampling=subsampling if ycbcr else "444"
    )
    return encoded


def jp2k(pixels: Image) -> bytes:
    encoded: bytes = imagecodecs.jpeg2k_encode(pixels, level=40, codecformat="j2k", mct=False)
    return encoded


def write_blocks(
    path: Path, image: Image, encode: Encode, *, compression: int, photometric: str = "rgb", bigtiff: bool = False,
    steps: tuple[int, ...] = (1,), tile: int = 128, description: str = "", software: str | bool = False,
    missing: tuple[int, ...] = (), pad: int = 0,
) -> Path:  # fmt: skip
    """A tiled TIFF whose blocks `encode` makes; those named in `missing` are not in the file. `pad` adds so many pixels
    to the right and the bottom of the pages."""
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as file:
        for level, step in enumerate(steps):
            picture = image[::step, ::step][: image.shape[0] // step, : image.shape[1] // step]
            height, width = picture.shape[0] + pad, picture.shape[1] + pad

            def stream(picture: Image = picture, height: int = height, width: int = width) -> Iterator[bytes]:
                count = 0
                for y in range(0, height, tile):
                    for x in range(0, width, tile):
                        part = picture[y : y + tile, x : x + tile]
                        block = np.zeros((tile, tile, 3), np.uint8)
                        block[: part.shape[0], : part.shape[1]] = part
                        yield b"" if count in missing else encode(block)
                        count += 1

            file.write(
                stream(),
                shape=(height, width, 3),
                dtype=np.uint8,
                photometric=photometric,
                subsampling=(2, 2) if photometric == "ycbcr" else None,
                tile=(tile, tile),
                compression=compression,
                resolution=(2e4 / step, 2e4 / step),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0 and not description.startswith("Aperio")),
                description=description or None,
                metadata=None,
                software=software,
                compressionargs={"outcolorspace": photometric},  # or the page would say YCbCr
            )
    return path


def aperio(image: Image, kind: str) -> str:
    return f"Aperio Image Library v12.0\r\n{image.shape[1]}x{image.shape[0]} (128x128) {kind} Q=70|MPP = 0.5"


def read_plainly(path: Path, tiles: Tiles) -> Image:
    """The tiles by OpenSlide alone, one by one."""
    with openslide.OpenSlide(path) as slide:
        found = []
        for x, y in tiles.coords_level0.tolist():
            pixels = np.asarray(slide.read_region((x, y), tiles.level, tiles.read_size).convert("RGBA"))
            assert pixels[..., 3].min() == 255
            found.append(resample(np.ascontiguousarray(pixels[..., :3]), (tiles.tile_size, tiles.tile_size)))
    return np.stack(found)


def read_all(slide: Slide, tiles: Tiles, *, batch_size: int = 7, workers: int = 0, start: int = 0) -> Image:
    batches = iter_tiles(slide, tiles, batch_size=batch_size, workers=workers, start=start)
    return np.concatenate([pixels for _, pixels in batches])


def check(path: Path, *, mpp: float = 0.5, tile_size: int = 96, used: str = "fast-equal") -> None:
    """Both readers give what OpenSlide gives, with and without threads."""
    with open_slide(path, slide_mpp=0.5) as slide:
        tiles = all_tiles(slide, mpp=mpp, tile_size=tile_size)
        assert slide.fast.used(tiles.level) == used
        expected = read_plainly(path, tiles)
        for workers in (0, 3):
            assert np.array_equal(read_all(slide, tiles, workers=workers), expected)
        # The last column and row of the level, which no tile may reach.
        w, h = slide.level_dimensions[tiles.level]
        step = int(slide.level_downsamples[tiles.level])
        place = np.array([[(w - 50) * step, (h - 40) * step, 50, 40]])
        assert np.array_equal(slide.reads(tiles.level, place)(0, None), slide.read(*place[0, :2], tiles.level, 50, 40))


PICTURE = paint_tissue(1101, 907)  # odd, so that blocks hang over


@pytest.mark.parametrize(
    ("compression", "tile", "steps", "mpp"),
    [("jpeg", 240, (1, 2), 0.5), ("deflate", 256, (1, 2, 4), 1.0), ("lzw", 112, (1, 4), 0.83)],
)
def test_made_pyramids_equal_openslide(
    tmp_path: Path, compression: str, tile: int, steps: tuple[int, ...], mpp: float
) -> None:
    image = paint_tissue(1368, 1144)[:1137] if mpp == 0.5 else paint_tissue(2368, 1904)
    path = write_pyramid(tmp_path / "a.tif", image, mpp=(0.5, 0.5), tile=tile, steps=steps, compression=compression)
    check(path, mpp=mpp)


@pytest.mark.parametrize(
    "form", ["420", "444", "rgb", "rgb in svs", "bigtiff", "jp2k rgb", "jp2k ycbcr", "differences", "plain", "philips"]
)
def test_colours_and_containers_equal_openslide(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.svs"
    if form in ("420", "444", "bigtiff"):
        write_blocks(
            path, PICTURE, lambda block: jpeg(block, subsampling="444" if form == "444" else "420"),
            compression=7, photometric="ycbcr", bigtiff=form == "bigtiff",
        )  # fmt: skip
    elif form.startswith("rgb"):
        text = aperio(PICTURE, "JPEG/RGB") if form == "rgb in svs" else ""
        write_blocks(path, PICTURE, lambda block: jpeg(block, ycbcr=False), compression=7, description=text)
    elif form.startswith("jp2k"):
        kind = 33003 if form == "jp2k ycbcr" else 33005
        write_blocks(path, PICTURE, jp2k, compression=kind, description=aperio(PICTURE, "J2K"))
    elif form == "plain":
        write_blocks(path, PICTURE, lambda block: block.tobytes(), compression=1)
    elif form == "differences":
        tifffile.imwrite(path, PICTURE, tile=(128, 128), compression="deflate", predictor=True, metadata=None)
    else:
        path = write_philips(tmp_path)
    with open_slide(path, slide_mpp=0.5) as slide:
        assert slide.vendor == {"philips": "philips", "rgb in svs": "aperio", "jp2k": "aperio"}.get(
            form.removesuffix(" rgb").removesuffix(" ycbcr"), "generic-tiff"
        )
    check(path)


@pytest.mark.parametrize(
    ("name", "mpp", "used"),
    [
        ("CMU-1-Small-Region.svs", 0.5, "fast-equal"),
        ("TCGA-CR-7395-no-mpp.svs", 0.5, "fast-equal"),
        ("TCGA-CR-7395-no-mpp.svs", 0.8, "fast-equal"),
        ("TCGA-CR-7395-no-mpp.svs", 1.0, "openslide"),  # its second level is 2.0005 times smaller: between pixels
    ],
)
def test_real_slides_equal_openslide(shared: Path, name: str, mpp: float, used: str) -> None:
    path = shared / "data" / "slides" / name
    with open_slide(path, slide_mpp=0.5) as slide:
        tiles = all_tiles(slide, mpp=mpp, tile_size=256)
        assert slide.fast.used(tiles.level) == used
        tiles = tiles.take(np.arange(0, len(tiles), 3))
        assert np.array_equal(read_all(slide, tiles, workers=2), read_plainly(path, tiles))


def test_formats_that_it_does_not_know_are_openslides(shared: Path, tmp_path: Path) -> None:
    scanned = write_scn(tmp_path / "b.scn", paint_tissue(960, 640), canvas=(3000, 2500), offset=(1003, 707), mpp=0.5)
    for path in (scanned, shared / "data/slides/fluorescence-dapi.ndpi", shared / "data/slides/plain.jpeg"):
        with open_slide(path, slide_mpp=0.5) as slide:
            assert {slide.fast.used(level) for level in range(len(slide.level_dimensions))} == {"openslide"}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int, int]]:
    """How often each (level width, row, column) was decoded, the comparison at opening left out."""
    counts: Counter[tuple[int, int, int]] = Counter()
    lock = threading.Lock()
    read, compare = TiffLevel.read, fast.FastReader._equals_openslide

    def counting(self: TiffLevel, file: int, row: int, column: int, out: Image | None = None) -> Image:
        with lock:
            counts[self.size[0], row, column] += 1
        return read(self, file, row, column, out)

    def uncounted(self: fast.FastReader, index: int, level: TiffLevel) -> bool:
        equal = compare(self, index, level)
        with lock:
            counts.clear()
        return equal

    monkeypatch.setattr(TiffLevel, "read", counting)
    monkeypatch.setattr(fast.FastReader, "_equals_openslide", uncounted)
    return counts


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("mpp", [0.5, 0.9])
def test_each_block_is_decoded_once(
    tmp_path: Path, decoded: Counter[tuple[int, int, int]], workers: int, mpp: float
) -> None:
    path = write_pyramid(tmp_path / "a.tif", PICTURE, mpp=(0.5, 0.5), tile=112, steps=(1,))
    with open_slide(path) as slide:
        tiles = all_tiles(slide, mpp=mpp, tile_size=96)
        for _ in iter_tiles(slide, tiles, batch_size=7, workers=workers):  # batches end within rows
            pass
        reach = (tiles.coords_level0.max(0) + tiles.read_size - 1) // 112
        assert set(decoded.values()) == {1}
        assert len(decoded) == (reach[0] + 1) * (reach[1] + 1) > 60


def test_blocks_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fast.Regions] = []
    make = fast.Regions.__init__

    def kept(self: fast.Regions, *arguments: object) -> None:
        make(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(fast.Regions, "__init__", kept)
    path = write_pyramid(tmp_path / "a.tif", PICTURE, mpp=(0.5, 0.5), tile=112, steps=(1,))
    with open_slide(path) as slide:
        tiles = all_tiles(slide, tile_size=64)
        most = 0
        for _ in iter_tiles(slide, tiles, batch_size=3, workers=2):
            most = max(most, len(made[-1]._held))
        assert 5 < most <= 10 + 4  # a row of blocks, and those of the batches read ahead
        assert made[-1]._held == {}
        # In any order, and with room for a single block, the pixels are the same.
        expected = read_plainly(path, tiles)
        monkeypatch.setattr(fast, "HELD_BYTES", 1)
        order = np.random.default_rng(0).permutation(len(tiles))
        places = np.concatenate([tiles.coords_level0, np.full_like(tiles.coords_level0, 64)], axis=1)[order]
        read = slide.reads(0, places)
        assert all(np.array_equal(read(i, None), expected[at]) for i, at in enumerate(order))
        assert np.array_equal(read(0, None), expected[order[0]])  # once more than was asked for


@pytest.mark.parametrize("spoilt", ["every block", "the last block", "the largest block"])
def test_a_reader_that_differs_in_one_pixel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    path = write_pyramid(tmp_path / "a.tif", PICTURE, mpp=(0.5, 0.5), tile=112, steps=(1,))
    read = TiffLevel.read

    def differing(self: TiffLevel, file: int, row: int, column: int, out: Image | None = None) -> Image:
        pixels = read(self, file, row, column, out).copy()
        last = (row + 1, column + 1) == self.lengths.shape
        largest = self.lengths[row, column] == self.lengths.max()
        if spoilt == "every block" or (spoilt == "the last block" and last) or (spoilt[4:7] == "lar" and largest):
            pixels[3, 5, 1] ^= 1
        return pixels

    monkeypatch.setattr(TiffLevel, "read", differing)
    with open_slide(path) as slide:
        tiles = all_tiles(slide)
        assert slide.fast.used(0) == "openslide"
        assert np.array_equal(read_all(slide, tiles, workers=2), read_plainly(path, tiles))


@pytest.mark.parametrize("software", ["", "aperio"])
def test_tiles_on_blocks_that_the_file_lacks_are_openslides(tmp_path: Path, software: str) -> None:
    text = aperio(PICTURE, "JPEG/RGB") if software else ""
    path = write_blocks(
        tmp_path / "a.svs", PICTURE, lambda block: jpeg(block, ycbcr=False), compression=7, description=text,
        missing=(11, 30),
    )  # fmt: skip
    with open_slide(path, slide_mpp=0.5) as slide, open_slide(path, slide_mpp=0.5, reader="openslide") as plain:
        tiles = all_tiles(slide, tile_size=64)
        assert slide.fast.used(0) == "fast-equal"
        tried = np.array([i for i in range(len(tiles)) if readable(path, tiles, i)])
        assert len(tried) > 100
        tiles = tiles.take(tried)
        assert np.array_equal(read_all(slide, tiles), read_all(plain, tiles))


def readable(path: Path, tiles: Tiles, index: int) -> bool:
    with open_slide(path, slide_mpp=0.5, reader="openslide") as slide:
        try:
            slide.read(*tiles.coords_level0[index].tolist(), 0, *tiles.read_size)
        except SlideError:
            return False
    return True


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_corrupt_jpeg_is_an_error_not_a_smear(tmp_path: Path, where: float) -> None:
    path = write_blocks(tmp_path / "a.tif", PICTURE, jpeg, compression=7, photometric="ycbcr")
    with tifffile.TiffFile(path) as file:
        offset, length = file.pages[0].dataoffsets[20], file.pages[0].databytecounts[20]
    with path.open("r+b") as raw:
        raw.seek(offset + int(where * length))
        raw.write(b"\xff\xd9\x12\x13")
    words = r"slide 'a': tile \d+ of 238 \(x \d+, y \d+, level 0\) can't be decoded"
    sentences = []
    for reader in ("auto", "openslide"):
        with open_slide(path, slide_mpp=0.5, reader=reader) as slide:
            assert slide.fast.used(0) == ("openslide" if reader == "openslide" else "fast-equal")
            with pytest.raises(SlideError, match=words) as caught:
                read_all(slide, all_tiles(slide))
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


@pytest.mark.parametrize("absent", ["tifffile", "simplejpeg", "imagecodecs"])
def test_without_its_libraries_openslide_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    path = write_pyramid(tmp_path / "a.tif", PICTURE, mpp=(0.5, 0.5), tile=112, steps=(1,))
    assert importlib.util.find_spec(absent)
    monkeypatch.setitem(__import__("sys").modules, absent, None)
    check_used(path, "openslide")


def check_used(path: Path, used: str) -> None:
    with open_slide(path) as slide:
        assert slide.fast.used(0) == used


@pytest.mark.parametrize("change", ["two pages of a size", "few blocks", "16 bits", "strips", "grey"])
def test_what_is_not_sure_is_openslides(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.tif"
    picture = PICTURE[:200, :200] if change == "few blocks" else PICTURE
    if change == "16 bits":
        picture = picture.astype(np.uint16) * 257
    if change == "grey":
        picture = picture[..., 0]
    with tifffile.TiffWriter(path) as file:
        for _ in range(1 + (change == "two pages of a size")):
            tile = None if change == "strips" else (112, 112)
            file.write(np.ascontiguousarray(picture), tile=tile, compression="deflate", metadata=None)
    try:
        slide = open_slide(path, slide_mpp=0.5)
    except SlideError:
        assert change in ("strips", "16 bits")
        assert fast.tiff_levels(path, "generic-tiff", [(1101, 907)]) == {}
        return
    with slide:
        assert slide.fast.used(0) == "openslide"


def test_no_label_is_ever_taken_for_a_level(tmp_path: Path) -> None:
    """Pages are found by their size, and in an Aperio file those marked 1 or 9 are none at all."""
    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as file:
        for subfiletype in (0, 1, 9):
            file.write(
                PICTURE, tile=(112, 112), compression="jpeg", subfiletype=subfiletype, metadata=None,
                description=aperio(PICTURE, "JPEG/RGB"), software=False,
            )  # fmt: skip
    levels = fast.tiff_levels(path, "aperio", [(1101, 907)])
    with tifffile.TiffFile(path) as tags:
        assert levels[0].offsets[0, 0] == tags.pages[0].dataoffsets[0]
    assert fast.tiff_levels(path, "generic-tiff", [(1101, 907)]) == {}  # two candidates
    assert fast.tiff_levels(path, "aperio", [(1100, 907)]) == {}


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
@pytest.mark.parametrize("workers", [0, 3])
def test_closing_early_leaves_no_thread_and_no_file(tmp_path: Path, workers: int) -> None:
    path = write_pyramid(tmp_path / "a.tif", PICTURE, mpp=(0.5, 0.5), tile=112, steps=(1,))
    before = open_files()
    with open_slide(path) as slide:
        batches = iter_tiles(slide, all_tiles(slide), batch_size=4, workers=workers)
        next(batches)
        assert slide.fast.used(0) == "fast-equal"
        batches.close()  # type: ignore[attr-defined]
        assert not reader_threads()
    assert open_files() == before


def test_an_error_in_a_thread_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "a.tif", PICTURE, mpp=(0.5, 0.5), tile=112, steps=(1,))
    with open_slide(path) as slide:
        assert slide.fast.used(0) == "fast-equal"
        read = TiffLevel.read

        def failing(self: TiffLevel, file: int, row: int, column: int, out: Image | None = None) -> Image:
            if row == 3:
                raise MemoryError("injected")
            return read(self, file, row, column, out)

        monkeypatch.setattr(TiffLevel, "read", failing)
        with pytest.raises((MemoryError, SlideError)):
            read_all(slide, all_tiles(slide), workers=4)
        assert not reader_threads()


def test_a_level_between_pixels_is_openslides(tmp_path: Path) -> None:
    image = paint_tissue(1401, 1103)
    path = write_pyramid(tmp_path / "a.tif", image, mpp=(0.5, 0.5), steps=(1, 2), tile=112, compression="deflate")
    check_used(path, "fast-equal")
    with open_slide(path) as slide:
        assert slide.level_downsamples[1] != 2
        assert slide.fast.used(1) == "openslide"
        tiles = all_tiles(slide, mpp=1.0)
        assert tiles.level == 1
        assert np.array_equal(read_all(slide, tiles), read_plainly(path, tiles))
    with pytest.raises(ValueError, match="expected a reader of auto, openslide"):
        open_slide(path, reader="quick")
