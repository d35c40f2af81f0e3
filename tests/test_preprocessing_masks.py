"""Masks that come as files: outlines, images, other tools' coordinates."""

import gzip
import json
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from made_slides import paint_tissue, write_pyramid

from gigapath.preprocessing import masks
from gigapath.preprocessing.masks import Outline, fill, read_mask
from gigapath.preprocessing.slide import Overview, Slide, open_slide
from gigapath.preprocessing.tiling import area_shares, plan_grid, tissue_of
from gigapath.preprocessing.tissue import TissueMask

WIDTH, HEIGHT = 2600, 1900


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    path = tmp_path_factory.mktemp("masks") / "made.tif"
    write_pyramid(path, paint_tissue(WIDTH, HEIGHT), mpp=(0.5, 0.5))
    with open_slide(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def overview(slide: Slide) -> Overview:
    return slide.overview()


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(rings: list[Any], name: str | None = None, kind: str = "Polygon") -> dict[str, Any]:
    """A feature as QuPath exports it."""
    properties: dict[str, Any] = {"objectType": "annotation", "isLocked": False}
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": rings}, "properties": properties}


def write_geojson(path: Path, features: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(collection(*features)))
    return path


def kept(mask: TissueMask, slide: Slide) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for j, i in np.argwhere(area_shares(mask.mask, mask, plan_grid(slide)) > 0.1)}


def half(slide: Slide, columns: int) -> set[tuple[int, int]]:
    return {(i, j) for i in range(columns) for j in range(plan_grid(slide).rows)}


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def geometries(*held: Any) -> dict[str, Any]:
    return {"type": "GeometryCollection", "geometries": list(held)}


WHOLE = feature([box(0, 0, 1280, HEIGHT)])
PARTS = feature([box(0, 0, 512, HEIGHT)], "a"), feature([box(512, 0, 1280, HEIGHT)], "b")
DEEP: Any = WHOLE
for _ in range(200):
    DEEP = [collection(DEEP)]
NESTED = geometries(PARTS[0]["geometry"], geometries(PARTS[1]["geometry"]))
DOCUMENTS: dict[str, Any] = {
    "collection": collection(WHOLE),
    "gzip": collection(WHOLE),
    "list": [WHOLE],
    "feature": WHOLE,
    "geometry": WHOLE["geometry"],
    "multi": feature([part["geometry"]["coordinates"] for part in PARTS], kind="MultiPolygon"),
    "list of collections": [collection(part) for part in PARTS],
    "collection of collections": collection(*(collection(part) for part in PARTS)),
    "deep": DEEP,
    "geometries": {"type": "Feature", "geometry": NESTED, "properties": {}},
}


@pytest.mark.parametrize("form", DOCUMENTS)
def test_geojson_over_the_left_half_keeps_exactly_it(
    tmp_path: Path, slide: Slide, overview: Overview, form: str
) -> None:
    raw = json.dumps(DOCUMENTS[form]).encode()
    path = tmp_path / ("made.geojson.gz" if form == "gzip" else "made.geojson")
    path.write_bytes(gzip.compress(raw) if form == "gzip" else raw)
    found = tissue_of(slide, overview, str(path))
    assert kept(found, slide) == half(slide, 5)
    assert found.method == "file:outlines"
    assert kept(tissue_of(slide, overview, str(path.parent)), slide) == half(slide, 5)


def test_holes_are_not_tissue(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    path = write_geojson(tmp_path / "a.geojson", [feature([box(0, 0, WIDTH, HEIGHT), box(256, 256, 1024, 768)])])
    gone = {(i, j) for i in range(1, 4) for j in range(1, 3)}
    assert kept(read_mask(path, slide, overview), slide) == half(slide, 10) - gone


def test_classes_are_included_and_excluded(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    features = [
        feature([box(0, 0, 1280, HEIGHT)], "Tumor"),
        feature([box(1280, 0, WIDTH, HEIGHT)], "Stroma"),
        feature([box(0, 0, WIDTH, 512)], "Fold"),
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [9, 9]}, "properties": {}},
        {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[9, 9], [30, 40]]}},
    ]
    path = write_geojson(tmp_path / "a.geojson", features)
    rows = {(i, j) for i in range(10) for j in (0, 1)}
    assert kept(read_mask(path, slide, overview, include=["tumor"]), slide) == half(slide, 5)
    assert kept(read_mask(path, slide, overview, exclude=["Fold"]), slide) == half(slide, 10) - rows
    both = read_mask(path, slide, overview, include=["Stroma"], exclude=["Fold"])
    assert kept(both, slide) == half(slide, 10) - half(slide, 5) - rows
    with pytest.raises(ValueError, match=r"class Necrosis, got classes: Fold, Stroma, Tumor"):
        read_mask(path, slide, overview, include=["Necrosis"])


def test_names_of_classes_in_other_forms(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    for properties in ({"classification": "Tumor"}, {"classification": {"names": ["Tumor"]}}, {"class": "Tumor"}):
        one = {**feature([box(0, 0, 1280, HEIGHT)]), "properties": properties}
        path = write_geojson(tmp_path / "a.geojson", [one, feature([box(0, 0, WIDTH, HEIGHT)])])
        assert kept(read_mask(path, slide, overview, include=["Tumor"]), slide) == half(slide, 5)


def test_outlines_that_lie_outside_are_refused(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    path = write_geojson(tmp_path / "a.geojson", [feature([box(9000, 1, 9100, 50)])])
    with pytest.raises(ValueError, match=r"a\.geojson") as error:
        read_mask(path, slide, overview)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "Point", "coordinates": [9, 9]},
        {"type": "MultiLineString", "coordinates": [[[0, 0], [900, 0], [900, 900], [0, 0]]]},
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [[]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [900, 0]]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [900, 900], [0, 0]]]},
        {"type": "MultiPolygon", "coordinates": [[[[0, 0], [900, 900], [0, 0]]]]},
        {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [9, 9]}]},
        None,
    ],
)
def test_outlines_that_hold_no_area_are_an_error_alone_and_passed_over_beside_others(
    tmp_path: Path, slide: Slide, overview: Overview, geometry: Any
) -> None:
    flat = {"type": "Feature", "geometry": geometry, "properties": {}}
    path = write_geojson(tmp_path / "a.geojson", [flat])
    with pytest.raises(ValueError, match="holds no area") as error:
        read_mask(path, slide, overview)
    assert (geometry or {"type": "no geometry"})["type"] in str(error.value)
    write_geojson(path, [])
    with pytest.raises(ValueError, match="holds no area"):
        read_mask(path, slide, overview)
    write_geojson(path, [flat, feature([box(0, 0, 1280, HEIGHT), [[0, 0], [900, 900], [0, 0]]])])
    assert kept(read_mask(path, slide, overview), slide) == half(slide, 5)


def test_missing_cores_are_no_tissue(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    cores = [feature([box(0, 0, 1280, HEIGHT)]), feature([box(1280, 0, WIDTH, HEIGHT)])]
    for core, missing in zip(cores, (False, True), strict=True):
        core["properties"] = {"objectType": "tma_core", "isMissing": missing}
    path = write_geojson(tmp_path / "a.geojson", cores)
    assert kept(read_mask(path, slide, overview), slide) == half(slide, 5)
    write_geojson(path, cores[1:])
    with pytest.raises(ValueError, match="holds no area: missing core"):
        read_mask(path, slide, overview)


def zigzag(edges: int, width: float, height: float) -> Outline:
    x = np.linspace(0, width, edges + 1)
    y = np.where(np.arange(edges + 1) % 2, height, 0.0)
    return Outline((np.stack([x, y], axis=1),), "")


def test_drawing_takes_memory_by_the_picture_not_by_the_length_of_edges() -> None:
    shape = (300, 400)
    outline = zigzag(20_000, 400, 300)
    tracemalloc.start()
    fill([outline], shape, (0, 0), (1, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20  # six million crossings would take 300 MB


def test_drawing_in_parts_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    rings = [rng.uniform(-20, 90, (count, 2)) for count in (3, 40, 7, 200)]
    outlines = [Outline((ring, ring * 0.5 + 10), "") for ring in rings]
    whole = [fill([outline], (61, 83), (0, 0), (1, 1)) for outline in outlines]
    monkeypatch.setattr(masks, "CROSSINGS", 7)
    for outline, mask in zip(outlines, whole, strict=True):
        assert np.array_equal(fill([outline], (61, 83), (0, 0), (1, 1)), mask)
    assert np.array_equal(fill(outlines, (61, 83), (0, 0), (1, 1)), np.any(whole, axis=0))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_filled_pixels_are_those_with_their_centre_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radius = rng.uniform(4, 16, 9)
    ring = np.stack([14 + radius * np.cos(angles), 11 + radius * np.sin(angles)], axis=1)
    hole = ring * 0.3 + np.array([14, 11]) * 0.7
    scale, origin = (3.0, 2.0), (50.0, 70.0)
    level0 = tuple(part * scale + origin for part in (ring, hole))
    mask = fill([Outline(level0, "")], (20, 26), origin, scale)
    contours = [part.astype(np.float32).reshape(-1, 1, 2) for part in (ring, hole)]
    for y in range(20):
        for x in range(26):
            outer, inner = (cv2.pointPolygonTest(part, (x + 0.5, y + 0.5), True) for part in contours)
            if min(abs(outer), abs(inner)) > 1e-3:
                assert mask[y, x] == ((outer > 0) != (inner > 0)), (x, y)  # odd: a hole may reach outside


@pytest.mark.parametrize(
    ("form", "shrunk"), [("L", 20), ("1", 40), ("RGB", 1), ("RGBA", 20), ("P", 40), ("tif", 1), ("pyramid", 20)]
)
def test_mask_images_scale_to_the_slide(
    tmp_path: Path, slide: Slide, overview: Overview, form: str, shrunk: int
) -> None:
    values = np.zeros((HEIGHT // shrunk, WIDTH // shrunk), np.uint8)
    values[:, : 1280 // shrunk] = 255
    path = tmp_path / ("mask.png" if form not in ("tif", "pyramid") else "mask.tif")
    if form == "tif":
        tifffile.imwrite(path, values)
    elif form == "pyramid":
        write_pyramid(path, np.dstack([values] * 3), mpp=None, steps=(1, 2), tile=64, compression=None)
    elif form == "RGBA":
        PIL.Image.fromarray(np.dstack([np.full_like(values, 90)] * 3 + [values])).save(path)
    else:
        PIL.Image.fromarray(values).convert(form).save(path)
    assert kept(read_mask(path, slide, overview), slide) == half(slide, 5)


def write_labels(path: Path, form: str, labels: npt.NDArray[np.uint8]) -> None:
    """A mask of small labels as one of the forms in which programs store them."""
    if form == "grey-2-bit.png":
        path.write_bytes(png_of_bits(labels, 2))
    elif form == "grey-16-bit.png":
        PIL.Image.fromarray(labels.astype(np.uint16)).save(path)
    elif form == "palette.png":
        image = PIL.Image.fromarray(labels, "P")
        image.putpalette([255, 255, 255, 255, 0, 0] + [0, 0, 0] * 254)  # what is black is label 2 and above
        image.save(path)
    elif form == "1-bit.tif":
        tifffile.imwrite(path, labels > 0, photometric="minisblack", metadata=None)
    elif form == "planes.tif":
        planes = np.stack([labels] * 3)
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", metadata=None)
    else:
        dtype, photometric, tiled = form.removesuffix(".tif").split("-")
        colours = np.zeros((3, 256), np.uint16)
        colours[:, 0] = 65535
        tifffile.imwrite(
            path,
            labels.astype(dtype),
            photometric=photometric,
            colormap=colours if photometric == "palette" else None,
            tile=(64, 64) if tiled == "tiled" else None,
            compression="zlib",
            metadata=None,
        )


def png_of_bits(labels: npt.NDArray[np.uint8], depth: int) -> bytes:
    """A grey PNG of few bits, which Pillow reads but doesn't write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    each = 8 // depth
    padded = np.pad(labels, ((0, 0), (0, -labels.shape[1] % each))).reshape(len(labels), -1, each)
    packed = (padded << (depth * np.arange(each)[::-1])).sum(axis=-1).astype(np.uint8)
    head = struct.pack(">IIBBBBB", labels.shape[1], len(labels), depth, 0, 0, 0, 0)
    rows = zlib.compress(np.pad(packed, ((0, 0), (1, 0))).tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


FORMS = [
    *("grey-2-bit.png", "grey-16-bit.png", "palette.png", "1-bit.tif", "planes.tif"),
    *(f"{form}-minisblack-plain.tif" for form in ("u1", "u4", "f4")),
    *(f"{form}-minisblack-tiled.tif" for form in ("u2", "i4", "f8")),
    *("u1-palette-plain.tif", "u1-palette-tiled.tif", "u1-miniswhite-plain.tif", "u2-miniswhite-tiled.tif"),
]


@pytest.mark.parametrize("form", FORMS)
def test_values_of_a_mask_are_labels_however_stored(
    tmp_path: Path, slide: Slide, overview: Overview, form: str
) -> None:
    labels = np.zeros((HEIGHT // 10, WIDTH // 10), np.uint8)
    labels[:, :128] = 3
    labels[:52, :128] = 1
    path = tmp_path / f"mask.{form.rpartition('.')[2]}"
    write_labels(path, form, labels)
    assert kept(read_mask(path, slide, overview), slide) == half(slide, 5)
    if form != "1-bit.tif":
        top = {(i, j) for i, j in half(slide, 5) if j < 2}
        assert kept(read_mask(path, slide, overview, include=["1"]), slide) == top
        assert kept(read_mask(path, slide, overview, exclude=["3"]), slide) == top


@pytest.mark.parametrize("value", [0.9, 1e-3, 256, 65536, -1])
def test_no_label_is_rounded_or_cut_off(tmp_path: Path, slide: Slide, overview: Overview, value: float) -> None:
    labels = np.zeros((HEIGHT // 10, WIDTH // 10), np.float32 if value < 1 and value > 0 else np.int32)
    labels[:, :128] = value
    tifffile.imwrite(tmp_path / "mask.tif", labels, metadata=None)
    assert kept(read_mask(tmp_path / "mask.tif", slide, overview), slide) == half(slide, 5)
    if labels.dtype == np.float32:
        labels[:, 128:] = np.nan
        tifffile.imwrite(tmp_path / "mask.tif", labels, metadata=None)
        assert kept(read_mask(tmp_path / "mask.tif", slide, overview), slide) == half(slide, 5)


@pytest.mark.parametrize("subifds", [False, True])
def test_labels_in_a_pyramid(tmp_path: Path, slide: Slide, overview: Overview, subifds: bool) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint16)
    labels[:, :1280] = 700
    path = tmp_path / "mask.tif"
    with tifffile.TiffWriter(path) as file:
        how: dict[str, Any] = {"tile": (64, 64), "compression": "zlib", "photometric": "minisblack", "metadata": None}
        file.write(labels, subifds=2 if subifds else 0, **how)
        file.write(labels[::2, ::2], subfiletype=1, **how)
        file.write(np.zeros((HEIGHT // 2, WIDTH // 2 - 60), np.uint16), subfiletype=1, **how)  # no level: another shape
    assert kept(read_mask(path, slide, overview, include=["700"]), slide) == half(slide, 5)


@pytest.mark.parametrize("what", ["pages", "wide colours", "deep png", "complex", "cut short", "five channels"])
def test_pictures_that_are_no_masks_are_named(tmp_path: Path, slide: Slide, overview: Overview, what: str) -> None:
    labels = np.ones((HEIGHT // 10, WIDTH // 10), np.uint8)
    wide = np.dstack([labels.astype(np.uint16)] * 3)
    path = tmp_path / ("mask.png" if what == "deep png" else "mask.tif")
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        "pages": (np.stack([labels] * 4), {"photometric": "minisblack"}),
        "wide colours": (wide, {"photometric": "rgb"}),
        "complex": (labels.astype(np.complex64), {}),
        "five channels": (np.dstack([labels] * 5), {"photometric": "minisblack", "planarconfig": "contig"}),
        "cut short": (labels, {}),
    }
    if what == "deep png":
        cv2.imwrite(str(path), wide)
    else:
        tifffile.imwrite(path, forms[what][0], **forms[what][1])
    if what == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"^{path.name}: expected a (readable )?mask") as error:
        read_mask(path, slide, overview)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("form", ["png", "tif", "chosen", "excluded", "sliver", "npz"])
def test_a_file_that_holds_no_area_is_an_error(tmp_path: Path, slide: Slide, overview: Overview, form: str) -> None:
    labels = np.zeros((HEIGHT // 10, WIDTH // 10), np.uint8)
    labels[:] = form in ("chosen", "excluded")
    path = tmp_path / "made.png"
    PIL.Image.fromarray(labels).save(path)
    if form == "tif":
        path = tmp_path / "made.tif"
        tifffile.imwrite(path, labels)
    elif form == "sliver":
        path = write_geojson(tmp_path / "made.geojson", [feature([box(30, 30, 30.5, 1000)])])
    elif form == "npz":
        path = tmp_path / "made.npz"
        np.savez(path, x=np.zeros(0), y=np.zeros(0), tile_size_lv0=np.array([128]))
    include, exclude = ["2"] * (form == "chosen"), ["1"] * (form == "excluded")
    with pytest.raises(ValueError, match=r"^made.*got none"):
        read_mask(path, slide, overview, include=include, exclude=exclude)


def test_mask_of_another_shape_is_refused(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    path = tmp_path / "mask.png"
    PIL.Image.fromarray(np.ones((200, 200), np.uint8)).save(path)
    with pytest.raises(ValueError, match="expected the shape of the slide"):
        read_mask(path, slide, overview)


def test_mask_of_the_bounds_is_laid_on_the_bounds(tmp_path: Path) -> None:
    class Offset:
        slide_id, dimensions, bounds = "made", (WIDTH, HEIGHT), (512, 256, 1280, 1536)

    seen = Overview(np.zeros((192, 160, 3), np.uint8), np.ones((192, 160), bool), (512, 256), (8.0, 8.0), 4.0)
    values = np.zeros((96, 80), np.uint8)
    values[:, :40] = 1
    path = tmp_path / "mask.png"
    PIL.Image.fromarray(values).save(path)
    of_bounds = read_mask(path, Offset(), seen)  # type: ignore[arg-type]
    assert of_bounds.mask[:, :80].all() and not of_bounds.mask[:, 80:].any()
    values = np.zeros((190, 260), np.uint8)
    values[:, : 51 + 64] = 1
    PIL.Image.fromarray(values).save(path)
    of_slide = read_mask(path, Offset(), seen)  # type: ignore[arg-type]
    assert of_slide.mask[:, :79].all() and not of_slide.mask[:, 81:].any()


def corners(columns: int, rows: int, step: int) -> npt.NDArray[np.int64]:
    return np.array([(i * step, j * step) for j in range(rows) for i in range(columns)])


@pytest.mark.parametrize("tool", ["trident", "clam", "mussel", "ours", "slide2vec", "hs2p"])
def test_coordinates_of_other_tools_cover_their_area(
    tmp_path: Path, slide: Slide, overview: Overview, tool: str
) -> None:
    coords = corners(10, 15, 128)
    if tool in ("slide2vec", "hs2p"):
        if tool == "slide2vec":
            path = tmp_path / "made.coordinates.npz"
            np.savez(path, x=coords[:, 0], y=coords[:, 1], tile_index=np.arange(len(coords)))
            (tmp_path / "made.coordinates.meta.json").write_text(json.dumps({"tiling": {"tile_size_lv0": 128}}))
        else:
            path = tmp_path / "made.npy"
            rows = np.zeros(len(coords), [("x", int), ("y", int), ("tile_level", int), ("tile_size_lv0", int)])
            rows["x"], rows["y"], rows["tile_size_lv0"] = coords[:, 0], coords[:, 1], 128
            np.save(path, rows)
    else:
        path = tmp_path / "made.h5"
        with h5py.File(path, "w") as file:
            held = file.create_dataset("coords", data=coords)
            if tool == "trident":
                held.attrs.update({"patch_size": 256, "patch_size_level0": 128, "overlap": 0})
            elif tool == "clam":
                held.attrs.update({"patch_size": 64, "patch_level": 1, "downsample": (2.0, 2.0)})
            elif tool == "mussel":
                held.attrs.update({"patch_size": 128, "mpp": 0.5})
            else:
                file.attrs["tile_size_level0"] = [128, 128]
    found = read_mask(path, slide, overview)
    assert kept(found, slide) == half(slide, 5)
    assert found.area_mm2 == pytest.approx(1280 * HEIGHT * 0.25e-6, rel=0.02)
    assert kept(tissue_of(slide, overview, str(tmp_path)), slide) == half(slide, 5)


def test_coordinates_without_a_size_are_refused(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    path = tmp_path / "made.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = corners(2, 2, 128)
    with pytest.raises(ValueError, match="size of their tiles"):
        read_mask(path, slide, overview)
    np.savez(tmp_path / "made.npz", z=np.zeros(3))
    with pytest.raises(ValueError, match="expected arrays x and y"):
        read_mask(tmp_path / "made.npz", slide, overview)


@pytest.mark.parametrize("name", ["nowhere.geojson", "outsu"])
def test_what_does_not_exist_is_named(slide: Slide, overview: Overview, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"otsu, published, none or a file or folder that exists, got '{name}'"):
        tissue_of(slide, overview, name)


def test_folder_without_this_slide_and_unknown_suffix(tmp_path: Path, slide: Slide, overview: Overview) -> None:
    with pytest.raises(FileNotFoundError, match="expected one mask for slide 'made'"):
        tissue_of(slide, overview, str(tmp_path))
    (tmp_path / "mask.txt").write_text("")
    with pytest.raises(ValueError, match="expected a method"):
        tissue_of(slide, overview, str(tmp_path / "mask.txt"))
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(ValueError, match="expected a readable mask image"):
        tissue_of(slide, overview, str(tmp_path / "mask.png"))
    PIL.Image.fromarray(np.ones((HEIGHT // 10, WIDTH // 10), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="grey values"):
        tissue_of(slide, overview, str(tmp_path / "mask.png"), include=["Tumor"])
    with pytest.raises(ValueError, match="--include"):
        tissue_of(slide, overview, "otsu", include=["Tumor"])
