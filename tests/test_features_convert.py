"""Converting tile embeddings between tools: each direction keeps embeddings, cells and places."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from feature_files import (
    CELLS,
    make_features,
    make_tiles,
    shuffled,
    write_foreign,
    write_gigapath,
    write_h5,
    write_published,
    write_stamp,
    write_trident,
)

from gigapath.cli.main import main
from gigapath.features import SlideEmbeddings, TileEmbeddings, TileEmbeddingsWriter, read_features, write_slide
from gigapath.features.check import describe
from gigapath.features.other_tools import FORMATS, Scale, convert
from gigapath.files import sha256_of, writer_name

FEATURES = make_features()
ORDER = shuffled(len(CELLS))
SCALE = Scale(slide_mpp=0.25, coords_mpp=0.5)
OTHERS = [name for name in FORMATS if name != "gigapath"]


def write_ours(folder: Path, **changes: Any) -> Path:
    tiles, attrs = make_tiles(**changes), {"encoder": "gigapath", "mpp_level0": (0.25, 0.25)}
    return write_gigapath(folder / "ours" / f"{tiles.slide_id}.h5", FEATURES, tiles, attrs=attrs)


def read_back(path: Path, tool: str) -> TileEmbeddings:
    return read_features(path, tile_size_level0=256 if tool == "published" else None)


@pytest.mark.parametrize("tool", OTHERS)
def test_files_of_other_content_are_written_over_only_when_told_to(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, out = write_ours(tmp_path), tmp_path / tool
    words = ["convert", str(ours), "--to", tool, "--out", str(out), "--slide-mpp", "0.25"]
    assert main(words) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.*")}
    assert main(words) == 0, "the same again is no matter"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.*")} == before
    write_gigapath(ours, FEATURES[::-1], make_tiles(), attrs={"encoder": "gigapath", "mpp_level0": (0.25, 0.25)})
    capsys.readouterr()
    assert main(words) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.*")} == before
    left = out / f".converting-{'0' * 8}-1-abcdef"  # of a process of another machine, which may be at work
    gone = out / f".converting-{writer_name().rpartition('-')[0]}-{2**22 + 1}-abcdef"
    for folder in (left, gone):
        folder.mkdir()
    assert main([*words, "--overwrite"]) == 0
    assert left.is_dir() and not gone.exists()
    left.rmdir()
    after = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert after.keys() == before.keys() and any(after[path] != before[path][0] for path in after)


def test_a_recorded_checksum_goes_with_the_file_that_it_was_of(tmp_path: Path) -> None:
    (path,) = convert(read_features(write_ours(tmp_path)), "trident", tmp_path / "out")[0]
    recorded = {"sha256": {path.name: sha256_of(path)}}
    path.with_suffix(".json").write_text(json.dumps({"slide_id": path.stem, "status": "done", **recorded}))
    ours = write_gigapath(tmp_path / "b" / path.name, FEATURES[::-1], make_tiles(), attrs={"mpp_level0": (0.25, 0.25)})
    other = read_features(ours)
    convert(dataclasses.replace(other, encoder="gigapath"), "trident", tmp_path / "out", overwrite=True)
    assert np.array_equal(read_features(path).features, other.features), "not told to be damaged"


KEPT = (
    *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "level0_width"),
    *("tile_size_um", "tile_size_px", "unit", "tile_size_lv0", "requested_spacing_um"),
)


@pytest.mark.parametrize("tool", OTHERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_tools_file_becomes_ours_and_goes_back(tool: str, shuffle: bool, tmp_path: Path) -> None:
    order = ORDER if shuffle else np.arange(len(CELLS))
    found = read_back(write_foreign(tool, tmp_path, FEATURES, order), tool)
    (ours,) = convert(found, "gigapath", tmp_path / "ours", scale=SCALE)[0]
    middle = read_features(ours)
    assert middle.source == "gigapath" and middle.attrs["converted_from"] == tool
    assert np.array_equal(middle.cells, CELLS) and np.array_equal(middle.features, found.features)
    scale = {"stamp": 4, "published": 2}.get(tool, 1)  # 256 um at 0.25 mpp; a level of 0.5 mpp
    assert np.array_equal(middle.coords_level0, np.rint(found.coords * scale))
    assert middle.encoder is None or describe(ours)["warnings"] == []
    back = read_back(convert(middle, tool, tmp_path / "back", scale=SCALE)[0][0], tool)
    assert back.source == tool and back.encoder == found.encoder
    assert np.array_equal(back.features, found.features) and back.features.dtype == found.features.dtype
    assert np.array_equal(back.coords, found.coords) and np.array_equal(back.cells, CELLS)
    for name in KEPT:
        if name in found.attrs and tool != "clam":  # its patch is stated at level 0 instead
            assert back.attrs[name] == found.attrs[name], name


def test_clam_gets_its_three_files_and_the_published_ones_cells(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = read_features(write_ours(tmp_path))
    features, tensor, patches = convert(found, "clam", tmp_path / "out")[0]
    assert [path.parent.name for path in (features, tensor, patches)] == ["h5_files", "pt_files", "patches"]
    assert torch.equal(torch.load(tensor, weights_only=True), torch.from_numpy(FEATURES))
    with h5py.File(patches, "r") as file:
        attrs = dict(file["coords"].attrs)
    assert (attrs["patch_size"], attrs["patch_level"], list(attrs["downsample"])) == (512, 0, [1.0, 1.0])
    (path,) = convert(found, "published", tmp_path / "out" / "published")[0]
    with h5py.File(path, "r") as file:
        assets = {name: file[name][:] for name in file}
    assert set(assets) == {"features", "coords"} and assets["coords"].dtype == np.float32
    assert np.array_equal(np.floor(assets["coords"] / 256), CELLS)  # what the published encoder divides by


def test_stamp_counts_micrometres(tmp_path: Path) -> None:
    (path,) = convert(read_features(write_ours(tmp_path)), "stamp", tmp_path / "out")[0]
    with h5py.File(path, "r") as file:
        assert file.attrs["unit"] == "um" and file.attrs["tile_size_um"] == 128.0 and file.attrs["tile_size_px"] == 256
        assert file["feats"].dtype == np.float16
        assert np.array_equal(file["coords"][:], (CELLS * 128.0).astype(np.float32))
    with pytest.raises(ValueError, match="do not fit in STAMP's float16"):
        big = read_features(write_trident(tmp_path, FEATURES * 1e6))
        convert(big, "stamp", tmp_path / "out", scale=SCALE)


# What hs2p 4 and 6 ask of the JSON beside the coordinates: these groups with these keys, neither fewer nor more.
HS2P_KEYS = {
    "provenance": "sample_id image_path mask_path backend requested_backend spacing_at_level_0 mask_backend "
    "requested_mask_backend",
    "slide": "dimensions base_spacing_um level_downsamples",
    "tiling": "requested_tile_size_px requested_spacing_um read_level read_tile_size_px read_spacing_um tile_size_lv0 "
    "tolerance step_px_lv0 overlap min_tissue_fraction is_within_tolerance n_tiles",
    "segmentation": "tissue_method requested_seg_downsample seg_downsample seg_level seg_spacing_um sthresh sthresh_up "
    "mthresh close sam2_checkpoint_path sam2_config_path mask_path ref_tile_size_px tissue_mask_tissue_value "
    "mask_level mask_spacing_um",
    "filtering": "a_t a_h filter_white filter_black white_threshold black_threshold fraction_threshold "
    "filter_grayspace grayspace_saturation_threshold grayspace_fraction_threshold filter_blur blur_threshold "
    "qc_spacing_um",
    "artifact": "coordinate_space tile_order annotation selection_strategy output_mode",
}


def test_slide2vec_gets_the_tiling_that_hs2p_asks_for(tmp_path: Path) -> None:
    embeddings, places, *_ = convert(read_features(write_ours(tmp_path)), "slide2vec", tmp_path / "out")[0]
    meta = json.loads(places.with_name("slide-1.coordinates.meta.json").read_text())
    assert {group: set(values) for group, values in meta.items()} == {
        group: set(keys.split()) for group, keys in HS2P_KEYS.items()
    }
    whole = ("requested_tile_size_px", "read_level", "read_tile_size_px", "tile_size_lv0", "step_px_lv0", "n_tiles")
    assert [meta["tiling"][name] for name in whole] == [256, 0, 512, 512, 512, 8]
    assert (meta["tiling"]["requested_spacing_um"], meta["slide"]["base_spacing_um"]) == (0.5, 0.25)
    assert meta["slide"]["dimensions"] == [6000, 4000] and isinstance(meta["provenance"]["image_path"], str)
    assert meta["artifact"]["coordinate_space"] == "level0_px" and meta["artifact"]["tile_order"] == "x_then_y"
    with np.load(places) as arrays, np.load(embeddings) as vectors:
        assert np.array_equal(arrays["tile_index"], np.arange(8)) and arrays["tissue_fractions"].dtype == np.float32
        order = np.lexsort((arrays["y"], arrays["x"]))
        assert np.array_equal(order, np.arange(8)) and np.array_equal(vectors["tile_index"], arrays["tile_index"])
        places_of = {tuple(cell): row for row, cell in enumerate((CELLS * 512).tolist())}
        rows = [places_of[place] for place in zip(arrays["x"].tolist(), arrays["y"].tolist(), strict=True)]
        assert np.array_equal(vectors["features"], FEATURES[rows])


@pytest.mark.slow
@pytest.mark.skipif("HS2P_PYTHON" not in os.environ, reason="HS2P_PYTHON names no Python with hs2p")
@pytest.mark.parametrize("count", [8, 0])
def test_hs2p_loads_what_we_write(count: int, tmp_path: Path) -> None:
    """hs2p brings an OpenCV and wandb of its own: it stands in its own environment, whose Python HS2P_PYTHON names."""
    tiles = make_tiles(cells=CELLS[:count])
    path = write_gigapath(tmp_path / "slide-1.h5", FEATURES[:count], tiles, attrs={"mpp_level0": (0.25, 0.25)})
    _, places, *_ = convert(read_features(path), "slide2vec", tmp_path / "out")[0]
    code = """
import sys
from hs2p import load_tiling_result
found = load_tiling_result(sys.argv[1], sys.argv[2])
print(found.x.tolist(), found.y.tolist(), found.tile_size_lv0, found.requested_spacing_um, found.sample_id)
"""
    run = subprocess.run(
        [os.environ["HS2P_PYTHON"], "-c", code, places, places.with_name("slide-1.coordinates.meta.json")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    x, y = (CELLS[:count][np.lexsort((CELLS[:count, 1], CELLS[:count, 0]))] * 512).T.tolist()
    assert run.stdout.splitlines()[-1] == f"{x} {y} 512 0.5 slide-1"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_convert_in_75_and_leaves_nothing_half_written(
    sent: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_ours(tmp_path), tmp_path / "out"
    words = ["convert", str(source), "--to", "trident", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("gigapath.features.h5.publish", lambda *_: os.kill(os.getpid(), sent))
        assert main(words) == 75
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert main(words) == 0
    slide = SlideEmbeddings(slide_id="a", tile_mean=np.ones((1, 3), np.float32))
    write_slide(tmp_path / "slides_mean__x" / "a.h5", slide)
    words = ["convert", str(tmp_path), "--embedding", "tile-mean", "--to", str(out / "table.csv")]
    with monkeypatch.context() as patch:
        patch.setattr("gigapath.files.publish", lambda *_, **__: os.kill(os.getpid(), sent))
        assert main(words) == 75
    assert not list(out.glob("table*"))
    with monkeypatch.context() as patch:
        patch.setattr("cyclopts.App.parse_args", lambda *_, **__: os.kill(os.getpid(), sent))
        assert main(words) == 75, "while the verb is imported"
    assert main(words) == 0


def test_what_a_file_says_is_no_command_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "\x1b[2J\x9b31m\u202e"
    path = write_ours(tmp_path)
    with h5py.File(path, "a") as file:
        file.attrs["encoder"] = file["features"].attrs["encoder"] = words
    for verb in (["inspect"], ["inspect", "--json"], ["check"], ["convert", "--to", "trident", "--out", str(tmp_path)]):
        main([*verb, str(path)])
        main([*verb, str(tmp_path / f"missing{words}.h5")])
        said = capsys.readouterr()
        assert not set(words) & (set(said.out + said.err) - set("[2J31m"))
        if "--json" in verb:
            assert words in json.dumps(json.loads(said.out), ensure_ascii=False).replace("\\u001b", "\x1b")


def test_what_is_not_stated_is_asked_for(tmp_path: Path) -> None:
    trident = read_features(write_trident(tmp_path / "t", FEATURES))
    stamp = read_features(write_stamp(tmp_path / "s", FEATURES))
    published = read_features(write_published(tmp_path / "p", FEATURES), tile_size_level0=256)
    for found, to, scale, words in (
        (trident, "stamp", None, "--slide-mpp"),
        (trident, "slide2vec", None, "--slide-mpp"),
        (stamp, "trident", None, "--slide-mpp"),
        (published, "gigapath", Scale(slide_mpp=0.25), "--coords-mpp"),
        (read_features(write_ours(tmp_path)), "gigapath", None, "one of our files already"),
        (trident, "TRIDENT", None, "--to"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(found, to, tmp_path / "out", scale=scale)
    assert not (tmp_path / "out").exists()


def test_a_step_that_division_by_whole_pixels_would_misplace_is_refused(tmp_path: Path) -> None:
    cells = np.stack([np.arange(600), np.arange(600) % 2], axis=1)[np.lexsort((np.arange(600), np.arange(600) % 2))]
    pitch = 256 * 0.5 / 0.2431  # 526.53: after 500 columns, division by 527 is half a tile off
    features = make_features(600)
    coords = np.rint(cells * pitch).astype(np.int64)
    path = write_h5(
        tmp_path / "a.h5", {"features": features, "coords": coords}, {"coords": {"patch_size_level0": pitch}}
    )
    found = read_features(path)
    assert np.array_equal(found.cells, cells)
    for tool in ("trident", "clam"):
        with pytest.raises(ValueError, match="some would change their cell"):
            convert(found, tool, tmp_path / "out")
    for tool in ("slide2vec", "published", "gigapath"):
        written = convert(found, tool, tmp_path / "out", scale=Scale(slide_mpp=0.2431))[0]
        assert np.array_equal(read_back(written[0], tool).cells, cells)


@pytest.mark.parametrize("tool", FORMATS)
def test_empty_slides_convert(tool: str, tmp_path: Path) -> None:
    nothing = np.zeros((0, 2), np.int64)
    if tool == "gigapath":
        path = write_trident(tmp_path, FEATURES[:0], nothing)
    else:
        path = tmp_path / "e.h5"
        with TileEmbeddingsWriter(path, make_tiles(cells=nothing), embed_dim=6, attrs={"mpp_level0": (0.25, 0.25)}):
            pass
    written = convert(read_features(path), tool, tmp_path / "out")[0]
    assert read_back(written[0], tool).features.shape == (0, 6)


def test_command_converts_folders_and_names_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_ours(tmp_path).parent, str(tmp_path / "out")
    write_ours(tmp_path, slide_id="slide-2")
    assert main(["convert", str(folder), "--to", "trident", "--out", out]) == 0
    assert "2 of 2 files converted." in capsys.readouterr().out
    write_ours(tmp_path, slide_id="slide-3")
    assert main(["convert", str(folder), "--to", "trident", "--out", out]) == 0
    assert "1 of 3 files converted, 2 were there already." in capsys.readouterr().out
    (folder / "slide-3.h5").unlink()
    (tmp_path / "out" / "features_gigapath" / "slide-3.h5").unlink()
    made = tmp_path / "out" / "features_gigapath"
    assert sorted(path.name for path in made.iterdir()) == ["slide-1.h5", "slide-2.h5"]
    (folder / "text.h5").write_text("no")
    again = tmp_path / "again" / "slide-1.h5"
    again.parent.mkdir()
    shutil.copy(folder / "slide-1.h5", again)
    words = [str(folder), str(folder / "slide-1.h5"), str(again)]
    assert main(["convert", *words, "--to", "published", "--out", out]) == 3
    captured = capsys.readouterr()
    assert "2 of 4 files converted." in captured.out
    assert "text.h5: expected an HDF5 file" in captured.err and "a second file of slide 'slide-1'" in captured.err
