"""Previews and contact sheets: what is drawn where, what is written, who comes first."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from feature_files import make_tiles
from made_slides import paint_tissue, write_pyramid

from gigapath.features import Tiles, write_tiles
from gigapath.files import OutputError
from gigapath.preprocessing import preview
from gigapath.preprocessing.preview import (
    CELL,
    DROPPED,
    HEAD,
    MARGIN,
    PANEL,
    SIDE,
    TILES,
    TISSUE,
    contact_sheet,
    draw_preview,
    preview_picture,
    suspicions,
    write_preview,
)
from gigapath.preprocessing.slide import Overview, open_slide
from gigapath.preprocessing.tiling import Grid, area_shares
from gigapath.preprocessing.tissue import TissueMask, find_tissue, make_mask

Image = npt.NDArray[np.uint8]
WHITE = (255, 255, 255)


def made_tiles(cells: npt.NDArray[np.integer], *, pitch: int = 256, slide_id: str = "made", **attrs: object) -> Tiles:
    count = len(cells)
    made = {
        "bounds": (0, 0, 6400, 3200), "mpp_level0": (0.5, 0.5), "grid_size": (25, 12), "tissue_area_mm2": 1.5,
        "tissue_state": "tissue", "tissue_pieces": 2, "dropped": {"background": 100},
    }  # fmt: skip
    qc = np.tile(np.array([[100.0, 0.2, 0, 0, 0.3]], np.float32), (count, 1))
    names = ("focus", "white", "black", "pen", "saturation")
    size = {"level": 0, "read_size": (pitch, pitch), "section": np.ones(count), "tissue_fraction": np.ones(count)}
    return make_tiles(slide_id, cells, pitch, qc=qc, qc_names=names, attrs={**made, **attrs}, **size)


def share(image: Image, colour: tuple[int, int, int], near: int = 40) -> float:
    return float((np.abs(image.astype(int) - colour).max(axis=-1) < near).mean())


@pytest.fixture(scope="module")
def scene() -> tuple[Overview, TissueMask]:
    """Grey overview of 400 x 200 pixels at 16 level-0 pixels each; tissue at the left, pen at the right."""
    image = np.full((200, 400, 3), 200, np.uint8)
    overview = Overview(image, np.ones((200, 400), bool), (0, 0), (16.0, 16.0), 8.0)
    mask, pen = np.zeros((2, 200, 400), bool)
    mask[40:160, 20:180] = True
    pen[60:100, 300:360] = True
    return overview, make_mask(overview, mask, method="otsu", threshold=20.0, dropped={"pen": pen})


def test_each_thing_is_drawn_where_it_is(scene: tuple[Overview, TissueMask]) -> None:
    overview, mask = scene
    tiles = made_tiles(np.array([(i, j) for j in range(2, 10) for i in range(2, 11)]))
    image = draw_preview(overview, mask, tiles)
    assert image.shape == (SIDE // 2 + PANEL, SIDE, 3)
    factor = SIDE / 400  # pixels per overview pixel
    left, top, right, bottom = (round(value * factor) for value in (20, 40, 180, 160))
    for strip in (image[top - 2 : top + 3, left:right], image[top:bottom, left - 2 : left + 3]):
        assert share(strip, TISSUE) > 0.2
    pen = image[round(60 * factor) : round(100 * factor), round(300 * factor) : round(360 * factor)]
    assert share(pen, DROPPED, near=125) > 0.95
    assert share(image[: SIDE // 2], DROPPED) < 0.05
    inside = image[round(2.5 * 64) + 5, round(2.5 * 64) + 5]
    assert tuple(inside) == (200, 200, 200)
    assert tuple(image[20, 20]) == (222, 222, 222)  # faded: no tile
    line = image[5 * 64 + 20, 3 * 64 : 10 * 64]  # a row of tiles: an upright line at each of them
    assert np.isclose(line[::64].astype(int), (np.array([200] * 3) + TILES) / 2, atol=3).all()


def test_outline_fits_the_picture_of_another_frame(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "made.tif", paint_tissue(1130, 890), mpp=(0.5, 0.5), steps=(1,))
    with open_slide(path) as slide:
        overview = slide.overview()
        picture = preview_picture(slide, overview)
        assert max(picture.image.shape) > 4 * max(overview.image.shape)
        mask = find_tissue(overview)
        image = draw_preview(overview, mask, made_tiles(np.zeros((0, 2), int)), picture=picture)[:-PANEL]
    frame = preview._sized(picture)
    laid = preview._laid_on(frame, mask, mask.mask)
    plain = cv2.resize(picture.image, laid.shape[::-1], interpolation=cv2.INTER_AREA)
    coloured = plain.max(axis=-1).astype(int) - plain.min(axis=-1) > 25
    assert (laid & coloured).sum() > 0.97 * coloured.sum()
    half = 8 / 0.5 / frame.scale[0] / 2  # half an overview pixel
    for axis in (0, 1):
        centres = [np.argwhere(part)[:, axis].mean() for part in (laid, coloured)]
        assert abs(centres[0] - centres[1]) < half / 2
    assert share(image, TISSUE) > 0.001


@pytest.mark.parametrize("pitch", [256, 11])
def test_many_tiles_are_still_told_apart(scene: tuple[Overview, TissueMask], pitch: int) -> None:
    overview, mask = scene
    grid = Grid((0, 0), (pitch, pitch), 0, (pitch, pitch), 256, (0.5, 0.5), 6400 // pitch, 3200 // pitch)
    cells = np.argwhere(area_shares(mask.mask, mask, grid) > 0.1)[:, ::-1]
    image = draw_preview(overview, mask, made_tiles(cells, pitch=pitch))
    tissue = image[180:620, 100:700]
    mixed = tuple((np.array([200] * 3) + TILES) // 2)
    assert 0.01 < share(tissue, mixed, near=6) < 0.3  # lines, never a solid field
    if pitch == 11:
        assert len(cells) > 40_000


def test_preview_is_whole_or_absent(
    tmp_path: Path, scene: tuple[Overview, TissueMask], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "previews" / "made.jpg"
    write_preview(path, *scene, made_tiles(np.array([[2, 3]])))
    before = path.read_bytes()
    assert cv2.imdecode(np.frombuffer(before, np.uint8), 1).shape == (SIDE // 2 + PANEL, SIDE, 3)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(OutputError, match="disk is full"):
        write_preview(path, *scene, made_tiles(np.array([[2, 3]])))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["made.jpg"]


def test_large_level_is_not_read_for_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "made.tif", paint_tissue(900, 700), mpp=(0.5, 0.5), steps=(1,))
    with open_slide(path) as slide:
        overview = slide.overview()
        monkeypatch.setattr(preview, "READ_PIXELS", 1000)
        assert preview_picture(slide, overview) is overview


def test_suspicions_name_what_is_odd() -> None:
    many = np.array([(i, j) for j in range(8) for i in range(8)])
    assert suspicions(made_tiles(many)) == ()
    assert suspicions(made_tiles(many[:0], tissue_area_mm2=0.0)) == ("no tissue",)
    assert suspicions(made_tiles(many[:3])) == ("little tissue",)
    assert suspicions(made_tiles(many, tissue_area_mm2=0.02)) == ("little tissue",)
    assert suspicions(made_tiles(many, tissue_area_mm2=5.1)) == ("tissue everywhere",)
    assert suspicions(made_tiles(many, tissue_state="full")) == ("tissue everywhere",)
    assert suspicions(made_tiles(many, tissue_pieces=61)) == ("61 pieces",)
    assert suspicions(made_tiles(many, dropped={"pen": 9})) == ("pen",)
    inked = made_tiles(many)
    inked.qc[:, 3] = 0.04
    inked.qc[:, 0] = 41
    assert suspicions(inked) == ("pen", "low focus")
    inked.qc[:, 0] = np.nan
    assert suspicions(inked) == ("pen",)


def test_contact_sheet_has_suspects_first_and_all_pages(
    tmp_path: Path, scene: tuple[Overview, TissueMask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigapath.preprocessing.preview.ROWS", 1)
    many = np.array([(i, j) for j in range(8) for i in range(8)])
    names = [f"slide {number}" for number in range(7)]
    for name in names:
        odd = {"tissue_pieces": 80, "tissue_state": "full"} if name == "slide 5" else {}
        tiles = made_tiles(many[:3] if name == "slide 3" else many, slide_id=name, **odd)
        write_tiles(tmp_path / "tiles" / f"{name}.h5", tiles)
        write_preview(tmp_path / "previews" / f"{name}.jpg", *scene, tiles)
    (tmp_path / "previews" / "slide 0.jpg").write_bytes(b"")
    pages = contact_sheet(tmp_path, [*names, "failed"])
    assert [page.name for page in pages] == ["contact_sheet.jpg", "contact_sheet_2.jpg"]
    first, second = (cv2.imdecode(np.frombuffer(page.read_bytes(), np.uint8), 1)[..., ::-1] for page in pages)
    assert first.shape[1] == 6 * (CELL[0] + MARGIN) + MARGIN
    red = [
        share(first[HEAD : HEAD + 3, MARGIN + i * (CELL[0] + MARGIN) :][:, : CELL[0]], (200, 30, 30), near=60) > 0.5
        for i in range(6)
    ]
    assert red == [True, True, False, False, False, False]
    assert share(second[HEAD + 30 :], WHITE) < 1
    assert suspicions(made_tiles(many, warnings=("upsampled 1.20 times",)))
    monkeypatch.undo()
    pages = contact_sheet(tmp_path, names[:3])
    assert sorted(file.name for file in tmp_path.glob("*.jpg")) == ["contact_sheet.jpg"]
    assert contact_sheet(tmp_path, []) == []
