"""Opening slides: scale and its source, bounds, overview, and one sentence for everything that is no slide."""

import gzip
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import PIL.Image
import pytest
import tifffile
from made_slides import paint_tissue, write_pyramid, write_scn

from gigapath.preprocessing import header
from gigapath.preprocessing import slide as slide_module
from gigapath.preprocessing.header import allowed, leading_levels, scanned_area, stated_mpp
from gigapath.preprocessing.reading import read_tile
from gigapath.preprocessing.slide import Slide, SlideError, open_slide, slide_id_of
from gigapath.preprocessing.tiling import TileOptions, plan_tiles


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("a/TCGA-05-4244-01Z-00-DX1.d4ff32cd.svs", "TCGA-05-4244-01Z-00-DX1.d4ff32cd"),
        ("CMU-1.NDPI", "CMU-1"),
        ("x.ome.tiff", "x"),
        ("x.tar", "x.tar"),
        (".svs", ".svs"),
    ],
)
def test_slide_id_is_the_name_without_its_recognised_suffix(name: str, slide_id: str) -> None:
    assert slide_id_of(name) == slide_id


def test_mpp_falls_back_on_tags_where_openslide_gives_none() -> None:
    header = {"tiff.XResolution": "101600", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"}
    stated = stated_mpp(header)
    assert stated is not None
    assert (stated.x, stated.y, stated.source) == (0.25, 0.5, "TIFF resolution tags")
    assert stated_mpp({**header, "tiff.ResolutionUnit": "none"}) is None
    assert stated_mpp({**header, "openslide.mpp-x": "nan", "openslide.mpp-y": "0"}) == stated


def test_missing_mpp_names_the_ways_on(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "none.svs", paint_tissue(500, 400), mpp=None, aperio=True, objective=20)
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"'none'.*--slide-mpp.*--mpp-from-objective"):
        _ = slide.mpp
    with open_slide(path, mpp_from_objective=True) as slide:
        assert (slide.mpp.x, slide.mpp.source) == (0.5, "objective power")
    with open_slide(path, slide_mpp=0.3, mpp_source="manifest", mpp_from_objective=True) as slide:
        assert (slide.mpp.x, slide.mpp.y, slide.mpp.source) == (0.3, 0.3, "manifest")


@pytest.mark.parametrize(
    ("mpp", "objective", "words"),
    [
        (0.07, None, "0.08 to 4"),
        (4.1, None, "0.08 to 4"),
        (0.34, 40, "objective power of 40"),
        (0.16, 40, "objective power of 40"),
        *((mpp, objective, "") for mpp, objective in ((0.33, 40), (0.17, 40), (0.08, None), (4.0, None))),
    ],
)
def test_implausible_mpp_is_refused_and_overridden(
    tmp_path: Path, mpp: float, objective: float | None, words: str
) -> None:
    path = write_pyramid(tmp_path / "odd.svs", paint_tissue(500, 400), mpp=(mpp, mpp), aperio=True, objective=objective)
    with open_slide(path) as slide:
        if words:
            with pytest.raises(SlideError, match=f"'odd'.*{words}.*{mpp}.*--slide-mpp"):
                _ = slide.mpp
        else:
            assert slide.mpp.x == pytest.approx(mpp)
    with open_slide(path, slide_mpp=mpp) as slide:
        assert slide.mpp.source == "--slide-mpp"


def test_x_and_y_are_averaged_only_where_they_agree(tmp_path: Path) -> None:
    image = paint_tissue(500, 400)
    with open_slide(write_pyramid(tmp_path / "near.tif", image, mpp=(0.25, 0.254))) as slide:
        assert slide.mpp.x == slide.mpp.y == pytest.approx(0.252)
    with open_slide(write_pyramid(tmp_path / "apart.tif", image, mpp=(0.25, 0.27))) as slide:
        assert (slide.mpp.x, slide.mpp.y) == pytest.approx((0.25, 0.27), rel=1e-5)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_an_override_must_be_a_scale(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="--slide-mpp"):
        open_slide(tmp_path / "a.svs", slide_mpp=value)


def test_bounds_are_where_the_slide_was_scanned(tmp_path: Path) -> None:
    image = paint_tissue(2400, 1600)
    path = write_scn(tmp_path / "b.scn", image, canvas=(5000, 4000), offset=(1000, 700), mpp=0.5)
    with open_slide(path) as slide:
        assert (slide.dimensions, slide.bounds) == ((5000, 4000), (1000, 700, 2400, 1600))
        assert slide.scanner == "Leica SCN400"
        overview = slide.overview()
        outside = slide.read(100, 100, 0, 30, 20)
        corner = slide.read(1000, 700, 0, 40, 30)
    assert outside.shape == (20, 30, 3)
    assert (outside == 255).all()  # transparent is laid on white
    assert np.abs(corner.astype(int) - image[:30, :40]).max() < 12  # JPEG
    assert overview.origin_level0 == (1000, 700)
    assert overview.image.shape == (100, 150, 3)
    assert overview.opaque.all()


@pytest.mark.parametrize(
    ("steps", "mpp"), [((1,), (0.25, 0.25)), ((1, 2, 4), (0.2265, 0.2265)), ((1, 4, 16), (0.26, 0.28))]
)
def test_overview_is_the_mean_over_the_area_of_each_pixel(
    tmp_path: Path, steps: tuple[int, ...], mpp: tuple[float, float]
) -> None:
    image = paint_tissue(2311, 1507, mpp=0.25)
    with open_slide(write_pyramid(tmp_path / "a.tif", image, mpp=mpp, steps=steps, compression="deflate")) as slide:
        overview = slide.overview()
    h, w = overview.image.shape[:2]
    assert (overview.mpp, overview.scale[0] * mpp[0], overview.scale[1] * mpp[1]) == pytest.approx((8, 8, 8), rel=0.012)
    for n, scale, extent in ((w, overview.scale[0], 2311), (h, overview.scale[1], 1507)):
        assert extent - steps[-1] < n * scale < extent + scale
    sums = np.zeros((1508, 2312, 3))
    sums[1:, 1:] = image.astype(float).cumsum(0).cumsum(1)
    columns, rows = (np.arange(w) * overview.scale[0]).astype(int), (np.arange(h) * overview.scale[1]).astype(int)
    x0, y0, x1, y1 = columns[:-1], rows[:-1, None], columns[1:], rows[1:, None]
    total = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    expected = total / ((x1 - x0) * (y1 - y0))[..., None]
    # whole pixels only in this sum, and two roundings in the overview
    assert np.abs(overview.image[:-1, :-1] - expected).mean() < 1.5
    assert expected.std() > 20


@pytest.mark.parametrize("steps", [(1,), (1, 4)])
def test_overview_is_the_same_in_any_blocks_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    path = write_pyramid(tmp_path / "a.tif", paint_tissue(1412, 908), mpp=(0.5, 0.5), steps=steps)
    results = []
    for side, workers in ((100_000, 0), (100, 0), (100, 3)):
        monkeypatch.setattr(slide_module, "BLOCK_SIDE", side)
        with open_slide(path) as slide:
            results.append(slide.overview(workers=workers))
    for result in results[1:]:
        assert np.array_equal(result.image, results[0].image)
        assert result.scale == results[0].scale


def test_overview_reads_each_pixel_of_a_coarse_level_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = Slide._read_rgba

    def counting(self: Slide, x: int, y: int, level: int, width: int, height: int) -> object:
        reads.append((level, width * height))
        return read(self, x, y, level, width, height)

    monkeypatch.setattr(Slide, "_read_rgba", counting)
    path = write_pyramid(tmp_path / "a.tif", paint_tissue(3000, 2000), mpp=(0.5, 0.5), steps=(1, 4))
    with open_slide(path, reader="openslide") as slide:
        slide.overview()
        assert sum(pixels for level, pixels in reads if level == 0) <= 4 * 257**2  # a few places, to compare the levels
        reads.clear()
        slide.overview()
    assert {level for level, _ in reads} == {1}
    assert sum(pixels for _, pixels in reads) == 750 * 500


def test_overview_refuses_absurdly_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_module, "OVERVIEW_READ_PIXELS", 1000 * 600)
    path = write_pyramid(tmp_path / "a.tif", paint_tissue(2001, 1200), mpp=(0.5, 0.5), steps=(1, 2))
    with open_slide(path) as slide:
        slide.overview()
    path = write_pyramid(tmp_path / "b.tif", paint_tissue(1001, 600), mpp=(0.5, 0.5), steps=(1,))
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"1001 x 600 pixels\. Give the slide a pyramid"):
        slide.overview()


def test_bounds_outside_the_slide_are_refused() -> None:
    bounds = {"x": 9000, "y": 0, "width": 100, "height": 100}
    with pytest.raises(SlideError, match=r"bounds inside 900 x 600 pixels, got x 9000"):
        scanned_area("a", (900, 600), {f"openslide.bounds-{name}": value for name, value in bounds.items()})


def test_plain_images_open_as_slides_of_one_level(tmp_path: Path) -> None:
    image = paint_tissue(700, 500)
    PIL.Image.fromarray(image).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", slide_mpp=0.5) as slide:
        assert (slide.vendor, slide.level_dimensions) == ("plain-image", ((700, 500),))
        assert np.array_equal(slide.read(100, 50, 0, 60, 40), image[50:90, 100:160])
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(SlideError, match="--slide-mpp"):
        slide.overview()


def test_large_or_deep_plain_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.fromarray(np.zeros((30, 40), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="8-bit"):
        open_slide(tmp_path / "deep.png")
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(header, "PLAIN_IMAGE_PIXELS", 1000)
    with pytest.raises(SlideError, match="tiled pyramid"):
        open_slide(tmp_path / "large.png")


def test_what_is_no_slide_gets_one_sentence_without_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "canary"
    folder.mkdir()
    whole = write_pyramid(folder / "whole.svs", paint_tissue(900, 600), mpp=(0.5, 0.5), aperio=True).read_bytes()
    PIL.Image.fromarray(paint_tissue(60, 50)).save(folder / "page.tiff")  # not tiled: Pillow could, OpenSlide can't
    bad = {
        "text.svs": b"this is no slide",
        "empty.svs": b"",
        "packed.svs.gz": gzip.compress(whole),
        "cut.svs": whole[: len(whole) // 2],
        "page.tiff": (folder / "page.tiff").read_bytes(),
        "mirax.mrxs": (folder / "page.tiff").read_bytes(),
        "half.jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
        "new\nline.svs": b"x",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "folder.svs").mkdir()
    os.mkfifo(folder / "pipe.svs")
    (folder / "loop.svs").symlink_to(folder / "loop.svs")
    for name in [*bad, "folder.svs", "pipe.svs", "loop.svs"]:
        with pytest.raises(SlideError, match="expected") as caught:
            open_slide(folder / name)
        assert str(caught.value).startswith(f"slide {slide_id_of(name)!r}: "), name
        assert "canary" not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.svs"):
        open_slide(folder / "none.svs")


def test_tiff_compression_that_openslide_lacks_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, paint_tissue(300, 260), tile=(128, 128), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(50001)  # WebP
    with pytest.raises(SlideError, match=r"^slide 'a': .*got TIFF compression 50001\. Convert it to tiles in JPEG"):
        open_slide(path)


def test_only_allow_listed_properties_leave_the_header(tmp_path: Path) -> None:
    canary = "CANARY-7f3a"
    label = np.full((60, 80, 3), 7, np.uint8)
    path = write_pyramid(
        tmp_path / "a.svs", paint_tissue(500, 400), mpp=(0.5, 0.5), aperio=True, description=canary, label=label
    )
    with open_slide(path) as slide:
        assert canary in slide._handle.properties["tiff.ImageDescription"]  # the test plants what it looks for
        assert "label" in slide._handle.associated_images
        assert canary not in repr(slide.properties)
        assert set(slide.properties) == {"openslide.mpp-x", "openslide.mpp-y"}
    header = {"tiff.Model": canary, "hamamatsu.Product": "C13220-01", "openslide.objective-power": canary}
    assert allowed(header) == {"hamamatsu.Product": "C13220-01"}


def test_label_and_macro_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: openslide.AbstractSlide) -> None:
        raise AssertionError("associated images were asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    label = np.full((60, 80, 3), 7, np.uint8)
    path = write_pyramid(tmp_path / "a.svs", paint_tissue(900, 600), mpp=(0.5, 0.5), aperio=True, label=label)
    with open_slide(path) as slide:
        assert slide.overview().image.min() > 40  # the label is nearly black
        slide.read(0, 0, 2, 100, 100)


PICTURE = paint_tissue(1300, 900)


def write_levels(path: Path, sizes: list[tuple[int, int]], *, fill: bool = True, **how: Any) -> Path:
    """PICTURE, and levels of it made exactly 2, 4, ... times smaller and then padded or cropped to `sizes` (w, h)."""
    with tifffile.TiffWriter(path) as file:
        for level, (width, height) in enumerate([(1300, 900), *sizes]):
            step = 2**level
            small = PICTURE[: 900 // step * step, : 1300 // step * step]
            small = small.reshape(900 // step, step, 1300 // step, step, 3).mean(axis=(1, 3)).astype(np.uint8)
            out = np.full((height, width, 3), 245, np.uint8)
            out[: small.shape[0], : small.shape[1]] = small[:height, :width]
            file.write(
                out, tile=(128, 128), subfiletype=int(level > 0), photometric="rgb", compression="deflate",
                resolution=(4e4, 4e4), resolutionunit="CENTIMETER", metadata=None, **how,
            )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("sizes", "used"),
    [
        ([(650, 450), (325, 225)], 3),
        ([(650, 450), (325, 225), (162, 112)], 4),
        ([(768, 512), (384, 256)], 1),  # padded to blocks
        ([(640, 384), (256, 128)], 1),  # cropped to blocks
        ([(656, 464)], 1),  # padded to what JPEG codes at once
        ([(650, 450), (384, 256)], 2),
        ([(650, 450), (300, 300), (162, 112)], 2),  # a picture of the label, say
    ],
)
def test_levels_that_are_not_the_whole_slide_made_smaller_are_not_read(
    tmp_path: Path, sizes: list[tuple[int, int]], used: int
) -> None:
    with open_slide(write_levels(tmp_path / "a.tif", sizes)) as slide:
        assert slide.level_dimensions == ((1300, 900), *sizes)[:used]
        assert slide.misfits == tuple(sizes[used - 1 :])
        plan = plan_tiles(slide, TileOptions(tile_size=64, tissue="none"))
        assert any("are not read" in warning for warning in plan.warnings) == (used <= len(sizes))
        for x, y in plan.tiles.coords_level0[[0, -1]].tolist():
            index = int(np.flatnonzero((plan.tiles.coords_level0 == (x, y)).all(axis=1))[0])
            there = PICTURE[y : y + plan.tiles.tile_size_level0[1], x : x + plan.tiles.tile_size_level0[0]]
            wanted = cv2.resize(there, (64, 64), interpolation=cv2.INTER_AREA)
            assert np.abs(read_tile(slide, plan.tiles, index).astype(int) - wanted).max() <= 2


def altered(level: Any, how: str) -> Any:
    """A level (H, W, 3) of a pyramid as it is met: of the same size, and the same picture or another."""
    height, width = level.shape[:2]
    soft = cv2.GaussianBlur(level, (0, 0), 1.5)
    part = cv2.resize(level, (width * 15 // 16, height * 15 // 16), interpolation=cv2.INTER_AREA)
    framed = np.full_like(level, 245)
    framed[: part.shape[0], : part.shape[1]] = part
    return {
        "blurred": soft,
        "sharpened": cv2.addWeighted(level, 2.5, soft, -1.5, 0),
        "dim": (0.6 * level).astype(np.uint8),
        "half a pixel off": cv2.blur(level, (2, 2)),
        "padded": framed,
        "cropped": cv2.resize(level[: part.shape[0], : part.shape[1]], (width, height)),
        "mirrored": level[:, ::-1],
        "a tile off": np.roll(level, 128, axis=1),
        "eight pixels off": np.roll(level, 8, axis=0),
        "blank": np.full_like(level, 245),
    }[how]


@pytest.mark.parametrize(("changed", "rule"), [(1, "otsu"), (2, "published")])
@pytest.mark.parametrize(
    ("how", "same"),
    [
        *((how, True) for how in ("blurred", "sharpened", "dim", "half a pixel off")),
        *((how, False) for how in ("padded", "cropped", "mirrored", "a tile off", "eight pixels off", "blank")),
    ],
)
def test_a_level_that_shows_another_picture_is_not_read(
    tmp_path: Path, changed: int, how: str, same: bool, rule: str
) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for index in range(3):
            level = cv2.resize(PICTURE, (1300 >> index, 900 >> index), interpolation=cv2.INTER_AREA)
            file.write(
                altered(level, how) if index == changed else level,
                tile=(128, 128), subfiletype=int(index > 0), photometric="rgb", compression="jpeg",
                resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip
    with open_slide(tmp_path / "a.tif") as slide:
        assert len(slide.level_dimensions) == 3  # headers give nothing away
        plan = plan_tiles(slide, TileOptions(mpp=1.0, tile_size=64, tissue=rule))
        assert len(slide.level_dimensions) == (3 if same else changed)
        assert any("are not read" in warning for warning in plan.warnings) == (not same)
        if same:
            return
        middle = len(plan.tiles) // 2
        x, y = plan.tiles.coords_level0[middle].tolist()
        wanted = cv2.resize(PICTURE[y : y + 128, x : x + 128], (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(read_tile(slide, plan.tiles, middle).astype(int) - wanted).mean() < 4


@pytest.mark.parametrize(
    ("whole", "size", "used"),
    [
        ((3000, 3000), (1500, 1500), 2),
        ((3000, 3000), (1536, 1536), 1),  # 1500 in blocks of 256, though both sides agree
        ((3000, 3000), (1280, 1280), 1),  # cropped
        ((3000, 3000), (1200, 1200), 2),  # 2.5 times smaller
        ((46000, 32914), (11500, 8228), 2),
        ((46000, 32914), (2875, 2057), 2),
        ((4443, 3567), (2222, 1784), 2),  # rounded up
    ],
)
def test_a_square_slide_gives_padding_away_by_its_blocks(
    whole: tuple[int, int], size: tuple[int, int], used: int
) -> None:
    header = {f"openslide.level[{level}].tile-{side}": "256" for level in (0, 1) for side in ("width", "height")}
    assert leading_levels([whole, size], header) == used


@pytest.mark.parametrize(("orientation", "page"), [(2, 0), (6, 1)])
def test_a_turned_tiff_is_refused(tmp_path: Path, orientation: int, page: int) -> None:
    path = write_levels(tmp_path / "a.tif", [(650, 450)], extratags=[(274, "H", 1, 1, True)])
    open_slide(path).close()
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[page].tags["Orientation"].overwrite(orientation)
    with pytest.raises(SlideError, match=f"orientation 1, got {orientation}"):
        open_slide(path)


def test_a_tiff_that_begins_with_its_overview_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for picture in (PICTURE[::4, ::4], PICTURE):
            file.write(picture, tile=(128, 128), photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match="325 x 225 before 1300 x 900"):
        open_slide(tmp_path / "a.tif")


def test_a_tiff_whose_largest_level_stands_last_is_read(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for kind, picture in ((0, PICTURE[::2, ::2]), (1, PICTURE)):
            file.write(picture, tile=(128, 128), photometric="rgb", metadata=None, subfiletype=kind)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.dimensions == PICTURE.shape[1::-1]


@pytest.mark.parametrize("form", ["channels", "one channel", "white is zero", "png", "rgb", "pale"])
def test_grey_slides_are_refused(tmp_path: Path, form: str) -> None:
    grey = PICTURE[..., 1]
    path = tmp_path / ("a.png" if form == "png" else "a.tif")
    if form == "png":
        PIL.Image.fromarray(grey).save(path)
    else:
        pixels = {
            "channels": np.moveaxis(PICTURE, -1, 0),
            "rgb": np.dstack([grey] * 3),
            "white is zero": 255 - grey,
            "pale": np.full_like(grey, 240),
        }.get(form, grey)
        photometric = {"rgb": "rgb", "white is zero": "miniswhite"}.get(form, "minisblack")
        tifffile.imwrite(path, pixels, tile=(128, 128), photometric=photometric, metadata=None)
    with open_slide(path, slide_mpp=0.5) as slide, pytest.raises(SlideError, match="got grey pixels"):
        plan_tiles(slide, TileOptions(tile_size=64))


@pytest.mark.parametrize(
    ("unit", "size"), [("µm", 0.25), ("\u03bcm", 0.25), ("nm", 250.0), ("mm", 0.00025), ("", 0.25), ("&#181;m", 0.25)]
)
def test_mpp_from_ome_xml_with_its_unit(unit: str, size: float) -> None:
    units = [f' PhysicalSize{axis}Unit="{unit}"' if unit else "" for axis in "XY"]
    text = (
        f'<OME><Image><Pixels ID="Pixels:0" PhysicalSizeX="{size}"{units[0]} PhysicalSizeY="{size * 1.2}"{units[1]}/>'
    )
    stated = stated_mpp({"tiff.ImageDescription": text})
    assert stated is not None
    assert (stated.x, stated.y, stated.source) == (pytest.approx(0.25), pytest.approx(0.3), "OME-XML")
    if unit:
        assert stated_mpp({"tiff.ImageDescription": text.replace(unit, "pixel")}) is None
    assert stated_mpp({"tiff.ImageDescription": text.replace("PhysicalSizeY=", "Y=")}) is None


def test_tags_that_contradict_ome_xml_are_refused_and_overridden(tmp_path: Path) -> None:
    path, quarter = tmp_path / "a.ome.tif", {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    how: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "ome": True, "metadata": quarter}
    tifffile.imwrite(path, PICTURE, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **how)
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"0\.5 .*0\.25 .*--slide-mpp"):
        slide.mpp  # noqa: B018
    with open_slide(path, slide_mpp=0.25) as slide:
        assert slide.mpp.mean == 0.25
    tifffile.imwrite(path, PICTURE, resolution=(40_000, 40_000), resolutionunit="CENTIMETER", **how)
    with open_slide(path) as slide:
        assert slide.mpp.mean == 0.25


def test_what_openslide_cannot_decode_says_so_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "real.tif"
    tifffile.imwrite(path, paint_tissue(700, 600).astype(np.float32) / 255, tile=(256, 256), photometric="rgb")
    with open_slide(path, slide_mpp=0.5) as slide, pytest.raises(SlideError, match="32-bit"):
        plan_tiles(slide, TileOptions())
