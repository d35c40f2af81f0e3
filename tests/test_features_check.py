"""`gigapath check`: every planted fault is found by its name, and files as they should be pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from feature_files import (
    CELLS as FEW,
)
from feature_files import (
    CLAM_COORDS,
    make_features,
    make_tiles,
    shuffled,
    write_clam,
    write_gigapath,
    write_h5,
    write_mussel,
    write_published,
    write_slide2vec,
    write_stamp,
    write_trident,
)
from made_slides import paint_tissue, write_pyramid

from gigapath.cli.main import main
from gigapath.cohort.status import Status, write_status
from gigapath.features import (
    SlideEmbeddings,
    TileEmbeddingsWriter,
    read_features,
    write_slide,
    write_tiles,
)
from gigapath.features.check import FileReport, check_file, check_folder, describe, description_in_words, files_to_check
from gigapath.features.other_tools import FORMATS, Scale, convert

# 30 tiles: two pieces of tissue, with a gap, in row-major order, neither square nor symmetric.
CELLS = np.array(
    sorted(
        [(x, y) for x in (2, 3, 4, 5) for y in range(1, 6)] + [(x, y) for x in (8, 9) for y in range(2, 7)],
        key=lambda cell: (cell[1], cell[0]),
    ),
    dtype=np.int32,
)
FEATURES = make_features(len(CELLS), 1536)
SCALE = Scale(slide_mpp=0.25, coords_mpp=0.5)
ROOT = {"encoder": "gigapath", "mpp_level0": (0.25, 0.25), "precision": "fp32", "batch_size": 8, "trained": True}


def write_ours(
    folder: Path, slide_id: str = "slide-1", features: np.ndarray = FEATURES, *, attrs: Any = None, **changes: Any
) -> Path:
    path = folder / "features_gigapath" / f"{slide_id}.h5"
    return write_gigapath(path, features, make_tiles(slide_id, CELLS, **changes), attrs={**ROOT, **(attrs or {})})


def look(path: Path, **options: Any) -> FileReport:
    return check_file(path, **options)


def names(report: FileReport, *, wrong: bool | None = None) -> set[str]:
    return {finding.name for finding in report.findings if wrong is None or finding.wrong == wrong}


def change(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def put(name: str, values: Any) -> Callable[[h5py.File], None]:
    """Replace a dataset, its attributes kept."""

    def edit(file: h5py.File) -> None:
        attrs = dict(file[name].attrs) if name in file else {}
        if name in file:
            del file[name]
        file.create_dataset(name, data=values).attrs.update(attrs)

    return edit


def set_attrs(item: str, **values: Any) -> Callable[[h5py.File], None]:
    return lambda file: (file[item] if item else file).attrs.update(values)


def both(*edits: Callable[[h5py.File], None]) -> Callable[[h5py.File], None]:
    return lambda file: [edit(file) for edit in edits] and None


COORDS = CELLS.astype(np.int64) * 512
RIGHT = np.array([1000, 0])
BY_COLUMN = np.lexsort((CELLS[:, 1], CELLS[:, 0]))


def with_rows(rows: np.ndarray, values: Any) -> np.ndarray:
    changed = FEATURES.copy()
    changed[rows] = values
    return changed


# Faults planted in one of our files: the finding that must name it -> what is done to the file.
OURS: list[tuple[str, str, Callable[[h5py.File], None]]] = [
    ("incomplete", "no mark", lambda file: file.attrs.__delitem__("complete")),
    ("unreadable", "no embeddings", lambda file: file.__delitem__("features")),
    ("unreadable", "no coordinates", lambda file: file.__delitem__("coords")),
    ("unreadable", "no cells", lambda file: file.__delitem__("cells")),
    ("unreadable", "an unknown stage", set_attrs("", stage="levels")),
    ("shapes", "embeddings of whole numbers", put("features", FEATURES.astype(np.int32))),
    ("shapes", "embeddings of three axes", put("features", FEATURES.reshape(10, 3, -1))),
    ("shapes", "a row of coordinates missing", put("coords", COORDS[:-1])),
    ("shapes", "coordinates of three numbers", put("coords", np.repeat(COORDS[:, :1], 3, axis=1))),
    ("shapes", "coordinates as text", put("coords", COORDS.astype("S8"))),
    ("shapes", "cells of fractions", put("cells", CELLS + 0.5)),
    ("not-finite", "one NaN", put("features", with_rows([7], np.nan))),
    ("not-finite", "one infinity", put("features", with_rows([0], np.inf))),
    ("zero-rows", "the last rows never written", put("features", with_rows(np.arange(27, 30), 0.0))),
    ("constant", "one vector for all tiles", put("features", np.repeat(FEATURES[:1], 30, axis=0))),
    ("duplicated-rows", "a batch written twice", put("features", FEATURES[np.r_[0:8, 0:8, 16:30]])),
    ("coords-type", "coordinates in half precision", put("coords", COORDS.astype(np.float16))),
    ("coords-not-finite", "a NaN among the coordinates", put("coords", np.where(COORDS == 512, np.nan, COORDS))),
    ("outside-slide", "beyond the slide", set_attrs("", slide_size=(4000, 4000))),
    ("outside-slide", "a negative corner", put("coords", COORDS - 1024)),
    ("outside-slide", "x and y exchanged", put("coords", COORDS[:, ::-1].copy())),
    ("cells", "x and y exchanged", put("coords", COORDS[:, ::-1].copy())),
    ("cells", "one tile moved by a cell", put("coords", COORDS + 512 * (np.arange(30) == 4)[:, None])),
    ("off-grid", "one tile moved by half a cell", put("coords", COORDS + 256 * (np.arange(30) == 4)[:, None])),
    ("cells-shared", "two tiles on one cell", both(put("cells", np.r_[CELLS[:1], CELLS[:-1]]))),
    ("order", "column by column", both(put("coords", COORDS[BY_COLUMN]), put("cells", CELLS[BY_COLUMN]))),
    ("order", "shuffled", both(put("coords", COORDS[::-1].copy()), put("cells", CELLS[::-1].copy()))),
    ("beyond-grid", "far to the right", both(put("coords", COORDS + RIGHT * 512), put("cells", CELLS + RIGHT))),
    ("neighbours", "two cells apart", both(put("coords", COORDS * 2), put("cells", CELLS * 2))),
    ("pitch", "tiles that overlap by an eighth", put("coords", CELLS.astype(np.int64) * 448)),
    ("distance", "a scale that the pitch contradicts", set_attrs("", mpp_level0=(0.5, 0.5))),
    ("tile-size", "tiles of 224 pixels", set_attrs("", tile_size=224)),
    ("mpp", "tiles at twice the scale", set_attrs("", mpp=1.0)),
    ("width", "another width than the encoder's", put("features", FEATURES[:, :384])),
    ("name", "another slide's file", set_attrs("", slide_id="slide-9")),
    ("tissue-fraction", "fractions above one", put("tissue_fraction", np.full(30, 7, np.float32))),
]


@pytest.mark.parametrize(("name", "what", "edit"), OURS, ids=[f"{n}: {what}" for n, what, _ in OURS])
def test_a_fault_planted_in_our_file_is_found_by_name(
    name: str, what: str, edit: Callable[[h5py.File], None], tmp_path: Path
) -> None:
    path = write_ours(tmp_path)
    assert look(path).findings == []
    report = look(change(path, edit))
    assert name in names(report, wrong=True), report.findings
    assert all(finding.text.endswith(".") and "\n" not in finding.text for finding in report.findings)


BYTES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("empty", lambda content: b""),
    ("text", lambda content: b"slide,label\n"),
    ("cut at the half", lambda content: content[: len(content) // 2]),
    ("last kB gone", lambda content: content[:-1024]),
    ("header overwritten", lambda content: b"\0" * 64 + content[64:]),
]


@pytest.mark.parametrize(("what", "edit"), BYTES, ids=[what for what, _ in BYTES])
def test_damaged_bytes_are_found(what: str, edit: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write_ours(tmp_path)
    path.write_bytes(edit(path.read_bytes()))
    assert names(look(path)) == {"unreadable"}


def test_a_damaged_chunk_far_into_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "slide-1.h5"
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", data=FEATURES, chunks=(4, 1536), compression="gzip")
        file.create_dataset("coords", data=COORDS).attrs.update({"patch_size_level0": 512, "patch_size": 256})
        place = features.id.get_chunk_info(6).byte_offset
    assert names(look(path), wrong=True) == set()
    content = bytearray(path.read_bytes())
    content[place + 40 : place + 80] = b"\xff" * 40
    path.write_bytes(content)
    assert names(look(path)) == {"unreadable"}


def trident(folder: Path, features: np.ndarray = FEATURES, **attrs: Any) -> Path:
    return write_trident(folder, features, CELLS, **attrs)


# Faults planted in other tools' files.
FOREIGN: list[tuple[str, str, Callable[[Path], Path]]] = [
    ("neighbours", "level 0 where the published code divides by 256", lambda p: change(
        write_published(p, FEATURES, CELLS), put("coords", COORDS.astype(np.float32)))),
    ("neighbours", "level 0 of a slide of 0.2525 microns", lambda p: change(
        write_published(p, FEATURES, CELLS), put("coords", (CELLS * 507).astype(np.float32)))),
    ("pitch", "224 apart where the published code divides by 256", lambda p: change(
        write_published(p, FEATURES, CELLS), put("coords", (CELLS * 224).astype(np.float32)))),
    ("coords-type", "half precision", lambda p: change(
        write_published(p, FEATURES, CELLS), put("coords", (CELLS * 256).astype(np.float16)))),
    ("distance", "level 0 of a 40x slide with the step of a 20x slide", lambda p: trident(p, patch_size_level0=256)),
    ("neighbours", "level 0 of a 40x slide with the step of a 20x slide", lambda p: trident(p, patch_size_level0=256)),
    ("mpp", "tiles at 10x", lambda p: trident(p, target_magnification=10, patch_size_level0=1024)),
    ("tile-size", "tiles of 512 pixels", lambda p: trident(p, patch_size=512)),
    ("name", "renamed", lambda p: trident(p, name="slide-7")),
    ("outside-slide", "beyond the slide", lambda p: trident(p, level0_width=4000)),
    ("not-finite", "NaN", lambda p: trident(p, with_rows([3], np.nan))),
    ("mpp", "STAMP's 256 microns in 224 pixels", lambda p: write_stamp(p, FEATURES, CELLS)),
    ("tile-size", "STAMP's 224 pixels", lambda p: write_stamp(p, FEATURES, CELLS)),
    ("cells-shared", "a step twice too large", lambda p: write_stamp(p, FEATURES, CELLS, tile_size_um=512.0)),
    ("unreadable", "CLAM's coordinates of another slide", lambda p: change(
        write_clam(p, FEATURES, CELLS), put("coords", COORDS.astype(np.int32) + 512))),
    ("unreadable", "slide2vec without coordinates", lambda p: _without_coordinates(
        write_slide2vec(p, FEATURES, CELLS))),
    ("unreadable", "an npz that is none", lambda p: _broken(write_slide2vec(p, FEATURES, CELLS))),
    ("width", "a width that is not the encoder's", lambda p: trident(p, FEATURES[:, :768])),
]  # fmt: skip


def _without_coordinates(path: Path) -> Path:
    (path.parent.parent / "tiles" / "slide-1.coordinates.npz").unlink()
    return path


def _broken(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:5000])
    return path


@pytest.mark.parametrize(("name", "what", "make"), FOREIGN, ids=[f"{n}: {what}" for n, what, _ in FOREIGN])
def test_a_fault_planted_in_another_tools_file_is_found_by_name(
    name: str, what: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert name in names(look(make(tmp_path)), wrong=True)


def test_notes_are_no_faults(tmp_path: Path) -> None:
    by_column = change(trident(tmp_path / "t"), put("coords", COORDS[BY_COLUMN]))
    dead = FEATURES.copy()
    dead[:, :200] = 0.5
    for path, notes in (
        (by_column, {"order"}),
        (write_published(tmp_path / "p", FEATURES, CELLS), {"no-encoder"}),
        (write_clam(tmp_path / "c", FEATURES, CELLS, patches=False), {"no-encoder", "no-step"}),
        (write_ours(tmp_path, "random", attrs={"trained": False}), {"untrained"}),
        (write_mussel(tmp_path / "m", FEATURES, CELLS), {"no-encoder"}),
        (trident(tmp_path / "e", dead), {"dead-columns"}),
    ):
        assert (names(look(path), wrong=True), names(look(path))) == (set(), notes)
    path = change(write_published(tmp_path / "n", FEATURES, CELLS), put("coords", COORDS.astype(np.float32)))
    assert "neighbours" in names(look(path)) and "neighbours" not in names(look(path, tile_size_level0=512))


@pytest.mark.parametrize("tool", FORMATS)
def test_files_that_convert_makes_pass(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = trident(tmp_path, FEATURES) if tool == "gigapath" else write_ours(tmp_path)
    convert(read_features(source), tool, tmp_path / "out", scale=SCALE)
    assert main(["check", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "nothing wrong" in said and "WRONG" not in said


def test_tiles_and_slide_files_are_checked_too(tmp_path: Path) -> None:
    tiles = tmp_path / "tiles" / "slide-1.h5"
    write_tiles(tiles, make_tiles("slide-1", CELLS))
    assert look(tiles).findings == [] and look(tiles).kind == "tiles"
    assert "outside-slide" in names(look(change(tiles, set_attrs("", slide_size=(3000, 3000)))))
    slide = tmp_path / "slides_x" / "slide-1.h5"
    vectors = {"tile_mean": FEATURES[:1], "states_mean": FEATURES[:3, :8], "default_mean": FEATURES[:1, :8]}
    write_slide(slide, SlideEmbeddings(slide_id="slide-1", **vectors))
    assert look(slide).findings == [] and look(slide).kind == "slide embeddings"
    broken = FEATURES[:3, :8].copy()
    broken[1, 1] = np.nan
    assert names(look(change(slide, put("states_mean", broken)))) == {"not-finite"}
    assert names(look(change(slide, put("states_mean", FEATURES[:3, :4])))) == {"shapes"}


def folder_names(folder: Path) -> set[str]:
    (inside,) = {path.parent for path in files_to_check([folder])}
    findings = check_folder(inside, [check_file(path) for path in files_to_check([folder])])
    return {finding.name for finding in findings if finding.wrong}


def test_maps_and_exported_tables_in_the_folder_are_no_feature_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ours(tmp_path)
    (tmp_path / "maps/slide-1").mkdir(parents=True)
    np.savez(tmp_path / "maps/slide-1/pca.npz", values=np.zeros(2), cells=np.zeros((2, 2)), coords_level0=CELLS[:2])
    np.savez(tmp_path / "slides.npz", slide_ids=np.array(["slide-1"]), vectors=np.zeros((1, 4)), attrs="{}")
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("1 file checked: nothing wrong")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "slides.npz").read_bytes()[:100])
    assert main(["check", str(tmp_path)]) == 3
    assert "cut.npz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "attrs", "changes"),
    [
        ("mixed-encoder", {"encoder": "uni"}, {}),
        ("mixed-precision", {"precision": "fp16"}, {}),
        ("mixed-device", {"device": "cuda"}, {}),
        ("mixed-numerics-version", {"numerics_version": 7}, {}),
        ("mixed-weights-sha256", {"weights_sha256": "ab" * 32}, {}),
        ("mixed-scale", {}, {"mpp": 0.75}),
        ("mixed-scale", {}, {"mpp": -1.0}),
        ("mixed-tile-size", {}, {"tile_size": 512}),
    ],
)
def test_a_file_unlike_the_others_of_its_folder_is_found(
    name: str, attrs: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    for number in range(3):
        write_ours(tmp_path, f"slide-{number}", make_features(30, 1536, seed=number))
    write_ours(tmp_path, "slide-9", make_features(30, 1536, seed=9), attrs=attrs, **changes)
    assert name in folder_names(tmp_path)


def test_the_same_embeddings_under_two_ids_are_found_whatever_their_order(tmp_path: Path) -> None:
    write_ours(tmp_path, "slide-1")
    path = write_ours(tmp_path, "slide-2", FEATURES[::-1].copy())
    assert "equal-features" in folder_names(tmp_path)
    copy = path.with_name("slide-3.h5")
    shutil.copy(path, copy)
    assert "two-files" in folder_names(tmp_path)


def test_what_status_files_promise_and_is_not_there_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_ours(tmp_path, "slide-1")
    for slide_id, status in (("slide-2", "done"), ("slide-3", "failed")):
        content = {"slide_id": slide_id, "stage": "features", "status": status}
        path.with_name(f"{slide_id}.json").write_text(json.dumps(content))
    path.with_name("slide-4.h5.00000000-1-aaaaaa.partial").write_bytes(b"x")
    assert main(["check", "--json", str(tmp_path)]) == 3
    (folder,) = json.loads(capsys.readouterr().out)["folders"]
    found = {finding["name"]: finding["wrong"] for finding in folder["findings"]}
    assert found == {"missing-file": True, "unfinished": True, "left-over": False}


def test_slides_that_were_refused_on_purpose_are_not_called_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tissue = paint_tissue(900, 700)
    (tmp_path / "slides").mkdir()
    for name, image in (("good", tissue), ("dark", 255 - tissue)):
        write_pyramid(tmp_path / "slides" / f"{name}.tif", image, mpp=(0.5, 0.5))
    out = tmp_path / "out"
    assert main(["tile", str(tmp_path / "slides"), "--out", str(out), "--workers", "0"]) == 3
    capsys.readouterr()
    assert main(["check", "--json", str(out)]) == 0
    folders = json.loads(capsys.readouterr().out)["folders"]
    (found,) = [finding for folder in folders for finding in folder["findings"]]
    assert found["name"] == "refused" and not found["wrong"]
    assert "dark" in found["text"] and "good" not in found["text"]


def test_command_says_what_is_wrong_and_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiles(tmp_path / "tiles" / "good.h5", make_tiles("good", CELLS))
    write_ours(tmp_path / "one", "good", make_features(30, 1536, seed=2))
    write_ours(tmp_path / "two", "good")
    assert main(["check", str(tmp_path)]) == 0, "a whole run, of several encoders"
    assert capsys.readouterr().out == "3 files checked: nothing wrong.\n"
    change(write_ours(tmp_path / "one", "bad"), put("features", with_rows([7], np.nan)))
    assert main(["check", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    assert "bad.h5:" in said and "WRONG not-finite: 1 of 30 tiles have NaN or infinity" in said
    assert "4 files checked: 1 with something wrong" in said
    assert main(["check", "--json", str(tmp_path / "one")]) == 3
    document = json.loads(capsys.readouterr().out)
    assert [file["wrong"] for file in document["files"]] == [True, False] and document["files_wrong"] == 1
    (tmp_path / "empty").mkdir()
    for words in ([tmp_path / "nothing"], [tmp_path / "empty"], [tmp_path, "--slides", tmp_path / "nothing"]):
        assert main(["check", *map(str, words)]) == 1


# ------------------------------------------------------------------------------------------- against the slides


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A slide, and its tiles embedded by the tiny encoder; `load_tile_encoder` gives that encoder."""
    pytest.importorskip("torch")
    from tiny_encoders import tiny_tile_encoder

    from gigapath.embedding import referee
    from gigapath.preprocessing.reading import read_tile
    from gigapath.preprocessing.slide import open_slide
    from gigapath.preprocessing.tiling import TileOptions, plan_tiles

    encoder = tiny_tile_encoder()

    def load(name: str, **options: Any) -> Any:
        if name != "tiny":
            raise ValueError(f"--tile-encoder: no {name}.")
        return encoder

    monkeypatch.setattr(referee, "load_tile_encoder", load)
    (tmp_path / "slides.d").mkdir()
    path = write_pyramid(tmp_path / "slides.d" / "s.tif", paint_tissue(1500, 1100), mpp=(0.5, 0.5))
    with open_slide(path) as slide:
        tiles = plan_tiles(slide, TileOptions()).tiles
        vectors = encoder.encode(np.stack([read_tile(slide, tiles, index) for index in range(len(tiles))]))
    assert len(tiles) >= 6
    out = tmp_path / "features_tiny" / "s.h5"
    attrs = {"encoder": "tiny", "weights_sha256": encoder.weights_sha256}
    with TileEmbeddingsWriter(out, tiles, embed_dim=encoder.embed_dim, attrs=attrs) as writer:
        writer.write(0, vectors)
    cosines = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert np.sort(cosines, axis=1)[:, -2].max() < 1 - 1e-3  # the tiles can be told apart
    return path, out


def look_again(slide: Path, **more: str) -> Callable[[Path], FileReport]:
    from gigapath.embedding.options import CheckOptions
    from gigapath.embedding.referee import SlideCheck

    checker = SlideCheck(CheckOptions(slides=str(slide), sample=4, **more))

    def again(path: Path) -> FileReport:
        report = check_file(path)
        report.findings += checker.check(report)
        return report

    return again


def test_tiles_read_again_agree_or_say_what_happened(embedded: tuple[Path, Path]) -> None:
    slide, path = embedded
    again = look_again(slide.parent)
    assert again(path).findings == []
    vectors = read_features(path).features.copy()
    change(path, put("features", np.roll(vectors, 1, axis=0)))
    assert names(again(path)) == {"shuffled"}
    change(path, put("features", vectors + np.random.default_rng(0).standard_normal(vectors.shape).astype(np.float32)))
    assert names(again(path)) == {"other-embeddings"}
    change(path, set_attrs("", weights_sha256="ff" * 32))
    assert "other-weights" in names(again(path), wrong=True)
    change(path, set_attrs("", slide_size=(1501, 1100)))
    assert names(again(path)) == {"other-slide"}


def test_what_cannot_be_compared_is_a_note(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    slide, path = embedded
    assert names(look_again(slide, tile_encoder="none")(path), wrong=False) == {"not-compared"}
    (converted,) = convert(read_features(path), "trident", tmp_path / "trident")[0]
    assert not {"other-embeddings", "not-compared"} & names(look_again(slide, tile_encoder="tiny")(converted))
    other = tmp_path / "features_tiny" / "other.h5"
    shutil.copy(path, other)
    assert names(look_again(slide)(change(other, set_attrs("", slide_id="other")))) == {"not-compared"}
    slide.write_bytes(slide.read_bytes()[: slide.stat().st_size // 3])
    assert names(look_again(slide)(path), wrong=True) == {"slide-unreadable"}


# What a file is, in words and as JSON


NARROW = make_features()


def write_described(path: Path, **options: Any) -> Path:
    attrs = {"encoder": "standin", "weights_sha256": "ab" * 32, "precision": "fp32"}
    return write_gigapath(path, NARROW, attrs=attrs, **options)


def test_describe_says_what_our_file_is(tmp_path: Path) -> None:
    found = describe(write_described(tmp_path / "a.h5", dtype="float16"))
    assert json.loads(json.dumps(found)) == found  # plain JSON values, attributes too
    expected = {
        "file": "a.h5", "kind": "tile embeddings", "tool": "gigapath", "slide_id": "slide-1", "tiles": 8, "width": 6,
        "dtype": "float16", "encoder": "standin", "precision": "fp32", "numerics_version": 1, "mpp": 0.5,
        "frame": "level0", "step": 512.0, "closest": 512.0, "columns": [3, 7], "rows": [1, 4], "order": "row-major",
        "complete": True, "warnings": [],
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("write", "facts"),
    [
        (write_trident, {"tool": "trident", "step": 512.0, "encoder": "gigapath", "mpp": None, "complete": None}),
        (write_clam, {"tool": "clam", "step": 512.0, "encoder": None}),
        (write_stamp, {"tool": "stamp", "frame": "um", "step": 256.0, "mpp": 256 / 224, "dtype": "float16"}),
        (write_mussel, {"tool": "mussel", "step": 509.0, "mpp": 0.5, "slide_id": "slide-1"}),
        (
            lambda *a: write_slide2vec(*a, order=shuffled(8)),
            {"tool": "slide2vec", "mpp": 0.5, "encoder": "prov-gigapath"},
        ),
    ],
)
def test_describe_knows_other_tools(write: Any, facts: dict[str, Any], tmp_path: Path) -> None:
    found = describe(write(tmp_path, NARROW))
    assert {name: found[name] for name in facts} == facts
    assert found["kind"] == "tile embeddings" and found["tiles"] == 8 and found["columns"] is not None
    assert all(line.endswith(".") for line in description_in_words(found))


def test_describe_tells_the_order_of_the_file(tmp_path: Path) -> None:
    by_column = np.lexsort((FEW[:, 1], FEW[:, 0]))
    for order, words in ((by_column, "column-major"), (shuffled(8), "neither by row nor by column")):
        assert describe(write_trident(tmp_path, NARROW, FEW[order]))["order"] == words
    path = write_trident(tmp_path, NARROW, patch_size_level0=256)  # level 0 of a 40x slide divided by 256
    assert any("neighbours are two cells apart" in warning for warning in describe(path)["warnings"])


def test_describe_tiles_coordinates_and_slides(tmp_path: Path) -> None:
    write_tiles(tmp_path / "t.h5", make_tiles())
    assert describe(tmp_path / "t.h5")["kind"] == "tiles"
    coords = write_h5(tmp_path / "c.h5", {"coords": FEW * 512}, {"coords": CLAM_COORDS})
    found = describe(coords)
    assert (found["kind"], found["tool"], found["step"], found["tiles"]) == ("tile coordinates", "clam", 512.0, 8)
    vectors = {"tile_mean": np.ones((1, 4)), "states_mean": np.ones((13, 5)), "default_mean": np.ones((1, 5))}
    attrs = {"trained": False, "slide_encoder": "gigapath", "encoder": "standin"}
    write_slide(tmp_path / "s.h5", SlideEmbeddings(slide_id="s", attrs=attrs, **vectors))
    found = describe(tmp_path / "s.h5")
    assert found["width"] == 5 and found["trained"] is False
    assert found["embeddings"] == ["tile-mean", "default:mean", "state:0:mean to state:12:mean"]
    text = "\n".join(description_in_words(found))
    assert "slide encoder: gigapath, untrained" in text and "Warning: the slide encoder's weights are random" in text
    published = write_published(tmp_path, NARROW)
    found = describe(published)
    assert found["step"] is None and found["columns"] is None and found["closest"] == 256
    assert any("--tile-size-level0" in warning for warning in found["warnings"])
    assert describe(published, tile_size_level0=256)["columns"] == [3, 7]


def test_inspect_prints_words_or_json_and_goes_on_past_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_described(tmp_path / folder / "a.h5") for folder in ("one", "two"))
    assert main(["inspect", str(one)]) == 0
    assert capsys.readouterr().out.startswith("a.h5: tile embeddings of slide slide-1")
    assert main(["inspect", str(one), str(two)]) == 0
    said = capsys.readouterr().out
    assert f"{one}: " in said and f"{two}: " in said, "several are told by their paths"
    assert main(["inspect", str(one), str(one), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["attrs"]["tissue_method"] == "otsu"
    (tmp_path / "text.h5").write_text("slide_id,label\n")
    assert main(["inspect", str(tmp_path / "text.h5"), str(tmp_path / "none.h5"), str(one.parent), str(one)]) == 1
    captured = capsys.readouterr()
    assert "a.h5: tile embeddings" in captured.out
    assert [name in line for name, line in zip(("text.h5", "none.h5", "one"), captured.err.splitlines(), strict=True)]


def test_convert_writes_the_table_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for slide_id in ("a", "b"):
        slide = SlideEmbeddings(slide_id=slide_id, tile_mean=np.ones((1, 4)))
        write_slide(tmp_path / "run" / "slides_mean__standin" / f"{slide_id}.h5", slide)
    to = tmp_path / "table.csv"
    assert main(["convert", str(tmp_path / "run"), "--embedding", "tile-mean", "--to", str(to)]) == 0
    assert "2 slides, 4 values each (tile-mean)" in capsys.readouterr().out
    assert to.read_text().splitlines()[0] == "slide_id,embedding,trained,e0,e1,e2,e3"
    assert main(["export", str(tmp_path / "run"), "--to", str(to)]) == 1, "its former name"
    assert "tile-mean" in capsys.readouterr().err
    table, run = to.read_bytes(), str(tmp_path / "run")
    for more in (["--to", str(to), "--out", str(tmp_path)], ["--to", "clam"], ["--to", "t.xls"], ["--to", "CLAM"]):
        assert main(["convert", run, "--embedding", "tile-mean", *more]) in (1, 2)
        assert "--to" in capsys.readouterr().err
    assert to.read_bytes() == table


def test_export_counts_the_slides_that_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "slides_mean__standin"
    for number, state in enumerate(("done", "failed", "stopped", "no_tissue")):
        write_status(folder, Status(f"s{number}", "slides", state))
    write_status(tmp_path / "run" / "tiles", Status("s4", "tiles", "done", tiles=3))
    write_slide(folder / "s0.h5", SlideEmbeddings(slide_id="s0", tile_mean=np.ones((1, 4))))
    for given in (tmp_path / "run", folder):
        assert main(["export", str(given), "--embedding", "tile-mean", "--to", str(tmp_path / "t.csv")]) == 0
        assert "3 slides" in capsys.readouterr().out
