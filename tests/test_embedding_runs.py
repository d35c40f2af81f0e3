"""Runs over cohorts: what is done is kept and skipped, what changes is redone by its stage alone, one bad slide is
recorded and the others go on, numbers depend on neither workers nor neighbours."""

import csv
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import table
from feature_files import make_features, write_gigapath
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import WIDTH, tiny_slide_encoder, tiny_tile_encoder

import gigapath
from gigapath.cli.main import main
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import RunResult
from gigapath.cohort.status import Status, write_status
from gigapath.embedding.forward import EncoderError, probe_devices
from gigapath.embedding.options import EmbedOptions, RunOptions, SlideEmbedOptions
from gigapath.embedding.run import run_embed
from gigapath.embedding.slide_embedding import run_slide_embed
from gigapath.embedding.slide_encoding import load_slide_encoder
from gigapath.embedding.tiling import TileStage, run_tile
from gigapath.features import FeatureFileError, read_features, read_slide, read_slides, read_tiles
from gigapath.features.check import check_file
from gigapath.features.h5 import recorded_sha256
from gigapath.preprocessing.reading import TileReader
from gigapath.preprocessing.tiling import TileOptions
from gigapath.progress import Plan, Progress

TILE = 64  # small tiles: many of them on small slides
TILING = TileOptions(tile_size=TILE)


class Notes(Progress):
    """Writes down what a run says."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.expected: list[int] = []
        self.counted: list[int] = []
        self.rows: list[Mapping[str, Any]] = []

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def expect(self, tiles: int) -> None:
        self.expected.append(tiles)

    def tiles(self, count: int) -> None:
        self.counted.append(count)

    def slide(self, row: Mapping[str, Any], number: int, slides: int) -> None:
        self.rows.append(row)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two slides that hold tissue, and a blank one."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a", "b")):
        write_pyramid(folder / f"{name}.tif", paint_tissue(900, 700, seed=seed), mpp=(0.5, 0.5), steps=(1, 2))
    write_pyramid(folder / "blank.tif", np.full((500, 640, 3), 240, np.uint8), mpp=(0.5, 0.5), steps=(1,))
    return folder


@pytest.fixture
def pictures() -> None:
    """Asked for by the tests that want real previews, which cost more than everything else here."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The tiny encoders under every name; what the test puts into the dict changes the tile encoder."""
    changes: dict[str, Any] = {}
    if "pictures" not in request.fixturenames:
        request.getfixturevalue("no_pictures")

    def load(name: str, **_: Any) -> Any:
        return tiny_tile_encoder(**{"name": "tiny", **changes})

    def load_slide(name: str, **given: Any) -> Any:
        return tiny_slide_encoder(given["in_chans"]) if name == "tinynet" else load_slide_encoder(name, **given)

    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", load)
    monkeypatch.setattr("gigapath.embedding.run.load_slide_encoder", load_slide)
    monkeypatch.setattr("gigapath.embedding.slide_embedding.load_slide_encoder", load_slide)
    return changes


def embed(
    slides: Any, out: Path, *, watch: Progress | None = None, tiling: TileOptions = TILING, **given: Any
) -> RunResult:
    run = {name: given.pop(name) for name in ("workers", "overwrite", "allow_mixed", "hash") if name in given}
    given = {"tile_encoder": "tiny", "slide_encoder": "tinynet", "batch_size": 16, "device": "cpu", **given}
    inputs = slides if isinstance(slides, list) else [slides]
    return run_embed(
        inputs,
        out,
        tiling=tiling,
        embedding=EmbedOptions(**given),
        options=RunOptions(**{"workers": 0, **run}),
        watch=watch,
    )


def files_in(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def touched(out: Path) -> dict[str, int]:
    """When each result was written."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.h5")}


def arrays_of(path: Path) -> dict[str, bytes]:
    with h5py.File(path, "r", locking=False) as file:
        return {name: file[name][()].tobytes() for name in file}


# ---------------------------------------------------------------------------------- what is written


def test_embed_leaves_the_files_of_every_stage(slides: Path, tmp_path: Path, pictures: None) -> None:
    notes = Notes()
    result = embed(slides, tmp_path, watch=notes)
    assert (result.outcome, result.counts["done"], result.counts["no_tissue"]) == ("done", 2, 1)
    both = {f"{name}.{end}" for name in ("a", "b", "blank") for end in ("h5", "json")}
    inside = {
        "tiles": both,
        "features_tiny": both,
        "slides_tinynet__tiny": both - {"blank.h5"},
        "previews": {"a.jpg", "b.jpg", "blank.jpg"},
        "runs": {f"{result.run_id}.json"},
        "private": {f"{result.run_id}.json", "paths.csv"},
    }
    assert files_in(tmp_path) == {"slides.csv", "contact_sheet.jpg"} | {
        f"{folder}/{name}" for folder, names in inside.items() for name in names
    }
    tiles, features = read_tiles(tmp_path / "tiles/a.h5"), read_features(tmp_path / "features_tiny/a.h5")
    assert 20 < len(tiles) < 120 and features.features.shape == (len(tiles), WIDTH)
    np.testing.assert_array_equal(features.coords, tiles.coords_level0)
    expected = {
        "encoder": "tiny", "weights_sha256": "5e" * 32, "precision": "fp32", "device": "cpu", "reader": "openslide",
        "filter": "none", "numerics_version": 1, "tissue_method": "otsu", "batch_shape": (16, TILE, TILE, 3),
    }  # fmt: skip
    assert {name: features.attrs[name] for name in expected} == expected
    assert read_features(tmp_path / "features_tiny/blank.h5").features.shape == (0, WIDTH)
    slide = read_slide(tmp_path / "slides_tinynet__tiny/a.h5")
    np.testing.assert_allclose(slide.tile_mean[0], features.features.mean(0), atol=1e-6)
    assert (slide.attrs["trained"], slide.attrs["encoder"], slide.attrs["slide_encoder"]) == (True, "tiny", "tinynet")
    ids, vectors = gigapath.read_slides(tmp_path)
    assert (ids, vectors.shape) == (["a", "b"], (2, 32)) and np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert sum(notes.counted) == len(tiles) + len(read_tiles(tmp_path / "tiles/b.h5")) == notes.expected[-1]


@pytest.mark.parametrize("name", ["a.geojson", "a_patches.h5", "a.coordinates.npz"])
def test_tiles_are_named_by_the_content_of_their_mask(name: str, slides: Path, tmp_path: Path) -> None:
    entry, by_masks = SlideEntry("a", slides / "a.tif"), TileOptions(tissue=str(tmp_path))
    found = []
    for other, content in ((name, b"one"), (name, b"two"), ("a_b.geojson", b"another slide's")):
        (tmp_path / other).write_bytes(content)
        found.append(TileStage(tmp_path, by_masks, RunOptions()).identity(entry))
    assert found[0] != found[1] == found[2]


def test_manifest_columns_mpp_and_mask_reach_the_slide(slides: Path, tmp_path: Path) -> None:
    half = {
        "type": "Polygon",
        "coordinates": [[[0, 0], [448, 0], [448, 700], [0, 700], [0, 0]]],
    }
    mask = tmp_path / "half.geojson"
    mask.write_text(json.dumps({"type": "Feature", "geometry": half, "properties": {}}))
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(
        f"path,slide_id,patient_id,mpp,mask\n{slides}/a.tif,A1,P1,0.25,\n{slides}/b.tif,B1,P2,,half.geojson\n"
    )
    run_tile([manifest], tmp_path / "out", tiling=TILING)
    rows = table(tmp_path / "out")
    assert {name: row["patient_id"] for name, row in rows.items()} == {"A1": "P1", "B1": "P2"}
    assert (rows["A1"]["mpp_source"], float(rows["A1"]["mpp_x"]), rows["A1"]["read_width"]) == ("manifest", 0.25, "64")
    assert rows["A1"]["level"] == "1"
    cells = read_tiles(tmp_path / "out/tiles/B1.h5").cells
    assert cells.max(0).tolist() == [6, 9], "448 px are 7 tiles"
    assert len(cells) == 70


# ---------------------------------------------------------------------------------- what is kept


def test_second_run_skips_what_is_done_and_reads_no_file_to_its_end(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed(slides, tmp_path)
    before, notes = touched(tmp_path), Notes()
    for module in ("gigapath.features.h5", "gigapath.cohort.run"):
        monkeypatch.setattr(f"{module}.sha256_of", lambda path: pytest.fail(f"{path} was read"))
    second = embed(slides, tmp_path, watch=notes, workers=2)
    assert touched(tmp_path) == before and notes.rows == []
    assert (notes.plans[0].slides, notes.plans[0].reused) == (3, 3)
    assert second.counts == first.counts and len(list((tmp_path / "runs").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        ({"slide_encoder": "mean"}, {"slides_mean__tiny"}),
        ({"overwrite": "features"}, {"features_tiny"}),
        ({"precision": "bf16", "overwrite": "features"}, {"features_tiny", "slides_tinynet__tiny"}),
    ],
    ids=["slide_encoder", "overwrite", "precision"],
)
def test_what_changes_is_made_again_by_its_stage_alone(
    slides: Path, tmp_path: Path, tiny: dict[str, Any], changed: dict[str, str], redone: set[str]
) -> None:
    embed(slides, tmp_path)
    before = touched(tmp_path)
    tiny |= {name: value for name, value in changed.items() if name == "precision"}
    embed(slides, tmp_path, **{name: value for name, value in changed.items() if name != "precision"})
    after = touched(tmp_path)
    assert {name.split("/")[0] for name in after if after[name] != before.get(name)} == redone
    vectors = [read_slide(path).tile_mean for path in sorted(tmp_path.glob("slides_*/a.h5"))]
    assert all(vector.shape == (1, WIDTH) for vector in vectors)
    if "slide_encoder" in changed:
        assert vectors[0].tobytes() == vectors[1].tobytes(), "from the same tile embeddings"


def test_changed_tiling_that_gives_equal_tiles_keeps_the_embeddings(slides: Path, tmp_path: Path) -> None:
    embed(slides, tmp_path)
    before = touched(tmp_path)
    embed(slides, tmp_path, tiling=TileOptions(tile_size=TILE, max_tiles=100_000), overwrite="tiles")
    after = touched(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {f"tiles/{n}.h5" for n in ("a", "b", "blank")}
    embed(slides, tmp_path, tiling=TileOptions(tile_size=TILE, max_tiles=10), overwrite="tiles")
    assert len(read_features(tmp_path / "features_tiny/a.h5")) == 10


def test_tiles_that_were_looked_at_are_not_made_anew_by_embed(slides: Path, tmp_path: Path) -> None:
    run_tile([slides], tmp_path, tiling=TileOptions(tile_size=TILE, max_tiles=7), options=RunOptions(workers=0))
    before = touched(tmp_path)
    for again in (lambda: embed(slides, tmp_path), lambda: run_tile([slides], tmp_path, tiling=TILING)):
        with pytest.raises(ValueError, match=r"others: --max-tiles 7 -> none \(3 slides\).*--overwrite tiles"):
            again()
    assert touched(tmp_path) == before
    embed(slides, tmp_path, tiling=TileOptions(tile_size=TILE, max_tiles=7))
    assert len(read_features(tmp_path / "features_tiny/a.h5")) == 7
    embed([], tmp_path / "other", tiles=str(tmp_path))
    assert len(read_features(tmp_path / "other/features_tiny/a.h5")) == 7, "taken as they are"


@pytest.mark.usefixtures("batch_by_batch")
@pytest.mark.parametrize("how", ["other options", "stopped", "failed", "missing"])
def test_finished_work_stands_whatever_becomes_of_a_run_that_would_make_it_again(
    slides: Path, tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    copies, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(slides, copies)
    embed(copies, out)
    before = touched(out)
    statuses = {path: path.read_text() for path in out.rglob("*/[ab]*.json")}
    with monkeypatch.context() as patch:
        if how == "other options":
            tiny["precision"] = "bf16"
            with pytest.raises(ValueError, match=r"features_tiny: .*--precision fp32 -> bf16 .*--overwrite features"):
                embed(copies, out)
            tiny["precision"] = "fp32"
        elif how == "stopped":
            tiny["precision"] = "bf16"
            assert embed(copies, out, overwrite="features", watch=StopAfter(1)).outcome == "stopped"
            tiny["precision"] = "fp32"
        elif how == "failed":
            patch.setattr("gigapath.embedding.tiling.plan_tiles", lambda *_, **__: 1 / 0)
            result = embed(copies, out, overwrite="tiles")
            assert result.counts["failed"] == 3 and "ZeroDivisionError" in result.rows[0]["error"]
        else:
            for path in copies.iterdir():
                path.rename(path.with_suffix(".away"))
            (copies / "m.csv").write_text("path\na.tif\nb.tif\nblank.tif\n")
            assert embed(copies / "m.csv", out).counts["failed"] == 3
            for path in copies.glob("*.away"):
                path.rename(path.with_suffix(".tif"))
            (copies / "m.csv").unlink()
    assert touched(out) == before
    assert {path: path.read_text() for path in out.rglob("*/[ab]*.json")} == statuses
    notes = Notes()
    assert embed(copies, out, watch=notes).outcome == "done"
    assert notes.plans[0].reused == 3 and touched(out) == before
    assert table(out)["a"]["status"] == "done" and not list(out.rglob("*.partial"))


def test_mixed_numerics_are_refused_unless_allowed(slides: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    embed(slides / "a.tif", tmp_path)
    tiny["precision"] = "bf16"
    with pytest.raises(
        ValueError, match=r"features_tiny: .*--precision fp32 -> bf16.*--overwrite features.*'a'.*--allow-mixed"
    ):
        embed(slides / "b.tif", tmp_path)
    assert not (tmp_path / "features_tiny/b.h5").exists()
    before = touched(tmp_path)
    assert embed(slides, tmp_path, allow_mixed=True).outcome == "done"
    after = touched(tmp_path)
    assert {name: after[name] for name in before} == before, "what is there is kept"
    assert read_features(tmp_path / "features_tiny/b.h5").attrs["precision"] == "bf16"


def test_tiles_of_another_folder_are_taken_and_slides_found_by_them(slides: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,patient_id\n" + "".join(f"{slides}/{name}.tif,p1\n" for name in ("a", "b", "blank")))
    run_tile([manifest], tmp_path / "tiled", tiling=TILING)
    embed([], tmp_path / "out", tiles=str(tmp_path / "tiled"))
    embed(slides, tmp_path / "whole")
    assert not (tmp_path / "out" / "tiles").exists()
    for name in ("a", "b", "blank"):
        one, other = (tmp_path / folder / f"features_tiny/{name}.h5" for folder in ("out", "whole"))
        assert arrays_of(one) == arrays_of(other)
    row = table(tmp_path / "out")["a"]
    assert (row["status"], row["patient_id"], row["tile_encoder"]) == ("done", "p1", "tiny")
    assert table(tmp_path / "out")["blank"]["status"] == "no_tissue"


def test_tiles_that_are_missing_or_of_another_slide_fail_that_slide(slides: Path, tmp_path: Path) -> None:
    tiled = tmp_path / "tiled"
    run_tile([slides / "a.tif", slides / "b.tif"], tiled, tiling=TILING)
    shutil.copy(tiled / "tiles/b.h5", tiled / "tiles/blank.h5")
    (tiled / "tiles/b.h5").unlink()
    result = embed(slides, tmp_path / "out", tiles=str(tiled))
    rows = table(tmp_path / "out")
    assert result.outcome == "some slides failed"
    assert rows["a"]["status"] == "done"
    assert "expected its tiles, got none" in rows["b"]["error"]
    assert "expected 900 x 700 pixels, as when it was tiled, got 640 x 500" in rows["blank"]["error"]
    assert {path.name for path in (tmp_path / "out/features_tiny").glob("*.h5")} == {"a.h5"}


# ---------------------------------------------------------------------------------- the numbers


def test_bytes_depend_on_neither_workers_devices_nor_the_other_slides(slides: Path, tmp_path: Path) -> None:
    embed(slides, tmp_path / "together", workers=0)
    embed(slides, tmp_path / "threads", device="auto", devices="cpu,cpu", workers=2)
    turned = [slides / f"{name}.tif" for name in ("blank", "b", "a")]
    embed(turned, tmp_path / "turned", device="cpu", devices="3")
    for name in ("b", "a"):
        embed(slides / f"{name}.tif", tmp_path / "alone", workers=0)
    features = read_features(tmp_path / "together/features_tiny/a.h5").features
    assert np.abs(features[0] - features[1]).max() > 1e-3, "tiles differ"
    for stage in ("tiles", "features_tiny", "slides_tinynet__tiny"):
        for name in ("a", "b"):
            whole = arrays_of(tmp_path / "together" / stage / f"{name}.h5")
            for other in ("threads", "turned", "alone"):
                assert arrays_of(tmp_path / other / stage / f"{name}.h5") == whole, other


def test_record_tells_options_encoders_and_how_busy_the_stages_were(slides: Path, tmp_path: Path) -> None:
    given = {"slide_encoder": "gigapath-flash", "random_weights": True, "device": "auto", "devices": "cpu,cpu"}
    result = embed(slides, tmp_path, **given)
    text = (tmp_path / "runs" / f"{result.run_id}.json").read_text()
    record = json.loads(text)
    facts = record["facts"]
    assert (record["verb"], record["outcome"], record["counts"]["done"]) == ("embed", "done", 2)
    assert (record["options"]["tile_size"], record["options"]["batch_size"], record["options"]["seed"]) == (64, 16, 0)
    assert facts["tile_encoder"]["weights_sha256"] == "5e" * 32 and facts["plan"]["todo"] == 3
    assert str(slides) not in text
    assert set(facts["stages"]["busy"]) == {"plan", "read", "encode", "write", "slides"}
    assert all(0 <= share <= 1 for share in facts["stages"]["busy"].values())
    assert facts["stages"]["waited_for"] in facts["stages"]["busy"]
    equal_anywhere = probe_devices([tiny_tile_encoder()], 16, several=True).across  # not on every CPU
    assert facts["stages"]["batches_across_slides"] is equal_anywhere
    assert (facts["device"], facts["batches"]) == ("2 x cpu", "plain")
    # An untrained encoder is called so in every output.
    assert facts["slide_encoder"]["trained"] is False
    assert read_slide(tmp_path / "slides_gigapath-flash-random__tiny/a.h5").attrs["trained"] is False
    row = table(tmp_path)["a"]
    assert (row["trained"], row["slide_encoder"]) == ("False", "gigapath-flash-random")


def test_batch_that_the_memory_does_not_hold_is_halved_and_recorded(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: Any, inputs: Any) -> None:
        if len(inputs[0]) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    slide, out = slides / "a.tif", tmp_path / "out"
    embed(slide, tmp_path / "small", batch_size=8)
    encoder = tiny_tile_encoder()
    encoder.model.register_forward_pre_hook(check)
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: encoder)
    monkeypatch.setattr("gigapath.embedding.forward._OUT_OF_MEMORY", ("cpu",))
    result = embed(slide, out, batch_size=None)
    record = json.loads((out / "runs" / f"{result.run_id}.json").read_text())
    assert record["facts"]["tile_encoder"]["batch_size"] == 8
    assert json.loads((out / "features_tiny/a.json").read_text())["identity"]["batch_size"] == 8
    assert read_features(out / "features_tiny/a.h5").attrs["batch_shape"] == (8, TILE, TILE, 3)
    assert arrays_of(out / "features_tiny/a.h5") == arrays_of(tmp_path / "small/features_tiny/a.h5")
    with pytest.raises(EncoderError, match="too little memory for batches of 16 tiles"):
        embed(slide, tmp_path / "asked", batch_size=16)
    before = touched(out)
    embed(slide, out, batch_size=None)
    assert touched(out) == before, "the next run comes to the same size, and has nothing to do"


def test_batch_sizes_agree_within_1e_5(slides: Path, tmp_path: Path) -> None:
    found = []
    for size in (16, 5, 64):
        embed(slides / "a.tif", tmp_path / str(size), batch_size=size)
        found.append(read_features(tmp_path / str(size) / "features_tiny/a.h5"))
    for other in found[1:]:
        np.testing.assert_allclose(other.features, found[0].features, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(other.coords, found[0].coords)


def test_slide_embedding_is_computed_from_values_as_stored(slides: Path, tmp_path: Path) -> None:
    embed(slides / "a.tif", tmp_path / "half", store="float16")
    stored = read_features(tmp_path / "half/features_tiny/a.h5")
    assert stored.features.dtype == np.float16
    expected = tiny_slide_encoder().embed(stored)
    slide = read_slide(tmp_path / "half/slides_tinynet__tiny/a.h5")
    for name, value in expected.items():
        assert getattr(slide, name).tobytes() == value.tobytes()
    embed(slides / "a.tif", tmp_path / "full")
    full = read_slide(tmp_path / "full/slides_tinynet__tiny/a.h5")
    assert full.default_mean is not None
    assert full.default_mean.tobytes() != expected["default_mean"].tobytes()


# ---------------------------------------------------------------------------------- slide-embed


def slide_embed(features: Path, out: Path | None = None, **given: Any) -> RunResult:
    given = {"slide_encoder": "tinynet", "device": "cpu", **given}
    return run_slide_embed([features], out, embedding=SlideEmbedOptions(**given))


def test_slide_embed_gives_what_embed_gives_and_then_skips(slides: Path, tmp_path: Path) -> None:
    for given, error, words in (
        ([tmp_path / "none"], FileNotFoundError, "expected a file or folder"),
        ([tmp_path], ValueError, "expected files of tile embeddings"),
    ):
        with pytest.raises(error, match=words):
            slide_embed(*given)
    embed(slides, tmp_path)
    whole = arrays_of(tmp_path / "slides_tinynet__tiny/a.h5")
    assert slide_embed(tmp_path / "features_tiny").rows[0]["status"] == "done"
    shutil.rmtree(tmp_path / "slides_tinynet__tiny")
    result = slide_embed(tmp_path)
    assert arrays_of(tmp_path / "slides_tinynet__tiny/a.h5") == whole
    assert {row["slide_id"]: row["status"] for row in result.rows} == {"a": "done", "b": "done", "blank": "no_tissue"}
    assert not (tmp_path / "slides_tinynet__tiny/blank.h5").exists()
    before = touched(tmp_path)
    slide_embed(tmp_path)
    assert touched(tmp_path) == before
    assert "features_tiny" not in (tmp_path / "private/paths.csv").read_text(), "it says where the slides lie"
    broken = tmp_path / "x.h5"
    broken.write_text("text")
    with pytest.raises(ValueError, match="none of 1 slide has readable tile embeddings"):
        slide_embed(broken, tmp_path / "out")


# ---------------------------------------------------------------------------------- how runs end


@pytest.fixture
def batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch's vectors are written, and told of, by themselves."""
    monkeypatch.setattr("gigapath.embedding.stream._BLOCK", 1)


class StopAfter(Progress):
    """Sends this process a signal once so many batches are embedded."""

    def __init__(self, batches: int, name: str = "SIGTERM") -> None:
        self._left = batches
        self._name = name

    def tiles(self, count: int) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), getattr(signal, self._name))


@pytest.mark.usefixtures("batch_by_batch")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_stops_the_run_and_a_restart_ends_as_if_unbroken(slides: Path, tmp_path: Path, name: str) -> None:
    embed(slides, tmp_path / "unbroken")
    out = tmp_path / "out"
    result = embed(slides, out, watch=StopAfter(2, name))
    assert result.outcome == "stopped"
    rows = table(out)
    assert (rows["a"]["status"], rows["b"]["status"], rows["blank"]["status"]) == ("stopped", "todo", "todo")
    assert rows["a"]["error"] == f"stopped by {name}"
    assert not any("partial" in file for file in files_in(out))
    assert not (out / "features_tiny/a.h5").exists()
    assert embed(slides, out).outcome == "done"
    for path in (tmp_path / "unbroken").rglob("*.h5"):
        assert arrays_of(path) == arrays_of(out / path.relative_to(tmp_path / "unbroken"))


@pytest.mark.usefixtures("batch_by_batch")
def test_stopped_slide_goes_on_behind_its_rows_that_are_safe(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = "float16"
    monkeypatch.setattr("gigapath.features.gigapath_file.WORTH_SECONDS", -1.0)
    slide, out = slides / "a.tif", tmp_path / "out"
    embed(slide, tmp_path / "unbroken", store=store)
    assert embed(slide, out, watch=StopAfter(2), store=store).outcome == "stopped"
    assert any(name.endswith("a.h5.rows.partial") for name in files_in(out))
    notes = Notes()
    assert embed(slide, out, watch=notes, store=store).outcome == "done"
    whole = len(read_tiles(out / "tiles/a.h5"))
    assert sum(notes.counted) == whole - 32, "two batches of 16 were safe"
    for path in (tmp_path / "unbroken").rglob("*.h5"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "unbroken")).read_bytes()
    assert not any("partial" in name for name in files_in(out))
    before = touched(out)
    assert embed(slide, out, watch=StopAfter(2), store=store, overwrite="features").outcome == "stopped"
    notes = Notes()
    embed(slide, out, watch=notes, store=store, overwrite="features")
    assert sum(notes.counted) == whole, "all of them are made again"
    assert touched(out) != before


@pytest.mark.usefixtures("batch_by_batch")
@pytest.mark.parametrize("times", [1, 2])
def test_slide_that_fails_is_retried_behind_its_rows_and_leaves_none_when_it_fails_again(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr("gigapath.features.gigapath_file.KEEP_SECONDS", -1.0)
    monkeypatch.setattr("gigapath.features.gigapath_file.WORTH_SECONDS", -1.0)
    slide, out = slides / "a.tif", tmp_path / "out"
    embed(slide, tmp_path / "unbroken")
    last = len(read_tiles(tmp_path / "unbroken/tiles/a.h5")) - 1
    rows = out / "features_tiny/a.h5.rows.partial"
    real, passes = TileReader.fill, [[]]

    def fill(self: TileReader, index: int, place: Any) -> None:
        passes[-1].append(index)
        if index == last and len(passes) <= times:
            until = time.monotonic() + 20
            while not rows.exists() and time.monotonic() < until:
                time.sleep(0.01)
            passes.append([])
            raise OSError("the file server is away")
        real(self, index, place)

    with monkeypatch.context() as patch:
        patch.setattr(TileReader, "fill", fill)
        result = embed(slide, out)
    assert (min(passes[0]), result.counts["failed"]) == (0, times - 1)
    assert min(passes[1]) >= 16, "the second attempt begins behind whole batches"
    assert not any("partial" in name for name in files_in(out)), "nothing of a slide that failed for good is left"
    assert embed(slide, out).outcome == "done"
    for path in (tmp_path / "unbroken").rglob("*.h5"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "unbroken")).read_bytes()


@pytest.mark.usefixtures("batch_by_batch")
def test_signal_after_the_last_batch_lets_the_tile_embeddings_be_finished(slides: Path, tmp_path: Path) -> None:
    batches = -(-len_of_tiles(slides / "a.tif", tmp_path / "tiled") // 16)
    out = tmp_path / "out"
    embed(slides, out, watch=StopAfter(batches))
    assert json.loads((out / "features_tiny/a.json").read_text())["status"] == "done"
    assert json.loads((out / "slides_tinynet__tiny/a.json").read_text())["status"] == "stopped"
    assert (table(out)["a"]["status"], table(out)["b"]["status"]) == ("stopped", "todo")
    before = touched(out)
    assert embed(slides, out).outcome == "done"
    assert {name: time for name, time in touched(out).items() if name in before} == before


def len_of_tiles(slide: Path, out: Path) -> int:
    return int(run_tile([slide], out, tiling=TILING).rows[0]["tiles"])


def test_encoder_that_fails_ends_the_run_and_leaves_no_half_file(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, calls = tiny_tile_encoder(), iter(range(3))
    encoder.model.register_forward_pre_hook(lambda *_: None if next(calls, None) is not None else lost_device())
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: encoder)
    with pytest.raises(EncoderError, match="tiny failed on cpu: device lost"):
        embed(slides, tmp_path)
    assert list(tmp_path.glob("features_tiny/*")) == []
    assert json.loads(next((tmp_path / "runs").glob("*.json")).read_text())["outcome"] == "error"


def lost_device() -> None:
    raise RuntimeError("device lost")


def test_hash_full_checks_the_manifests_md5(slides: Path, tmp_path: Path) -> None:
    right = hashlib.md5((slides / "a.tif").read_bytes(), usedforsecurity=False).hexdigest()
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"path,md5\n{slides}/a.tif,{right}\n{slides}/b.tif,{'0' * 32}\n")
    run_tile([manifest], tmp_path / "out", tiling=TILING, options=RunOptions(hash="full"))
    rows = table(tmp_path / "out")
    assert rows["a"]["file_sha256"] == hashlib.sha256((slides / "a.tif").read_bytes()).hexdigest()
    assert "expected MD5 000" in rows["b"]["error"]


# ---------------------------------------------------------------------------------- sections, vectors of tiles, tables


def test_slides_older_than_their_tile_embeddings_are_refused(
    slides: Path, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    embed(slides, tmp_path)
    before, _ = read_slides(tmp_path)
    tiny["precision"] = "bf16"
    (status,) = tmp_path.glob("features_*/a.json")
    earlier = status.read_bytes(), status.stat().st_mtime_ns
    embed(slides, tmp_path, slide_encoder="none", overwrite="features")
    whole = status.read_bytes()
    status.write_bytes(earlier[0])  # as after a kill between a slide's file and its status
    os.utime(status, ns=(earlier[1], earlier[1]))
    with pytest.raises(ValueError, match=r"2 of its slides \(a\) are older than their tile embeddings.*slide-embed"):
        read_slides(tmp_path)
    with pytest.warns(UserWarning, match="older than their tile embeddings"):
        assert read_slides(tmp_path, allow_mixed=True)[0] == before
    status.write_bytes(whole)
    slide_embed(tmp_path, slide_encoder="tinynet")
    assert read_slides(tmp_path)[0] == before


def test_slide_embed_per_section_embeds_the_pieces_and_skips_what_is_done(slides: Path, tmp_path: Path) -> None:
    embed(slides, tmp_path)
    result = slide_embed(tmp_path, per="section")
    folder = tmp_path / "slides_tinynet__tiny__sections"
    assert result.results == folder
    tiles = read_features(tmp_path / "features_tiny/a.h5")
    pieces = sorted(set(tiles.section[tiles.section > 0].tolist()))  # type: ignore[index]
    assert len(pieces) == 2
    for piece in pieces:
        slide = read_slide(folder / f"a.section-{piece}.h5")
        expected = tiny_slide_encoder().embed(tiles.take(tiles.section == piece))
        assert slide.default_mean is not None
        np.testing.assert_array_equal(slide.default_mean, expected["default_mean"])
        assert (slide.slide_id, slide.attrs["of_slide"], slide.attrs["section"]) == (f"a.section-{piece}", "a", piece)
    whole = read_slide(tmp_path / "slides_tinynet__tiny/a.h5").default_mean
    assert np.abs(whole - expected["default_mean"]).max() > 1e-3
    before = touched(tmp_path)
    slide_embed(tmp_path, per="section")
    assert touched(tmp_path) == before
    (folder / "a.section-1.h5").unlink()
    slide_embed(tmp_path, per="section")
    assert (folder / "a.section-1.h5").exists()


def test_slide_embed_gives_one_vector_a_tile(slides: Path, tmp_path: Path) -> None:
    embed(slides / "a.tif", tmp_path)
    slide_embed(tmp_path, embedding="state:1:tiles")
    tiles = read_features(tmp_path / "features_tiny/a.h5")
    held = read_features(tmp_path / "contextual_tinynet__tiny__state-1/a.h5")
    encoder = tiny_slide_encoder()
    np.testing.assert_array_equal(held.features, encoder.embed_tiles(tiles, "state:1:tiles"))
    np.testing.assert_array_equal(held.coords, tiles.coords)
    np.testing.assert_array_equal(held.section, tiles.section)
    assert held.encoder == "tinynet's state:1:tiles of tiny"
    assert encoder.model is not None
    mean = encoder.model.norm(torch.from_numpy(held.features).mean(0)).numpy()
    np.testing.assert_allclose(mean, encoder.embed(tiles)["states_mean"][1], atol=1e-5)
    with pytest.raises(ValueError, match="--embedding"):
        slide_embed(tmp_path, slide_encoder="mean", embedding="default:tiles")
    with pytest.raises(ValueError, match="a: expected one vector a slide, got default:tiles"):
        read_slide(tmp_path / "slides_tinynet__tiny/a.h5").select("default:tiles")
    with pytest.raises(ValueError, match="--per"):
        SlideEmbedOptions(per="section", embedding="default:tiles")


def test_vectors_of_tiles_of_another_tools_file_keep_its_unit(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s1.h5", "w") as file:
        file["feats"] = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float16)
        file["coords"] = np.float32([[0, 0], [256, 0], [0, 256], [256, 256]])
        for name, value in {"unit": "um", "tile_size_um": 256.0, "feat_type": "tile", "extractor": "x"}.items():
            file.attrs[name] = value
    slide_embed(tmp_path / "s1.h5", tmp_path / "out", embedding="default:tiles")
    held = read_features(tmp_path / "out/contextual_tinynet__x__default/s1.h5")
    assert (held.frame, held.tile_size_level0, held.section, held.embed_dim) == ("um", 256.0, None, 32)
    result = slide_embed(tmp_path / "s1.h5", tmp_path / "out", per="section")
    assert result.rows[0]["error"].startswith("--per section: expected a file that says which piece of tissue")


@pytest.mark.parametrize("words", [[], ["--slide-encoder", "mean"]])
def test_another_tools_embeddings_of_a_released_width_ask_for_the_slide_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    folder = tmp_path / "20x_256px/features_somewhere"
    folder.mkdir(parents=True)
    (tmp_path / "20x_256px/_config_feats.json").write_text('{"run": {"patch_encoder": "maybe_giga"}}')
    with h5py.File(folder / "s1.h5", "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(2, 1536)).astype(np.float32)
        file["coords"] = np.int64([[0, 0], [256, 0]])
        file["coords"].attrs["patch_size_level0"] = 256
        file["features"].attrs["encoder"] = "giga\nx"
    code = main(["slide-embed", str(folder), "--out", str(tmp_path / "out"), *words])
    said = capsys.readouterr().err
    if words:
        assert code == 0
        return
    assert code == 1 and "--slide-encoder: expected a name" in said and not (tmp_path / "out").exists()
    for hint in ("encoder 'giga\\nx'", "patch_encoder 'maybe_giga'", "folder 20x_256px/features_somewhere"):
        assert hint in said


def test_slide_embed_fails_files_that_are_none_alone(tmp_path: Path) -> None:
    folder = tmp_path / "features_tiny"
    write_gigapath(folder / "good.h5", make_features())
    (folder / "gone.h5").symlink_to(tmp_path / "nowhere.h5")
    os.mkfifo(folder / "pipe.h5")  # opening it would wait for ever
    assert main(["slide-embed", str(folder), "--slide-encoder", "mean", "--out", str(tmp_path / "out")]) == 3
    status = {row["slide_id"]: row["status"] for row in csv.DictReader((tmp_path / "out/slides.csv").open())}
    assert status == {"good": "done", "gone": "failed", "pipe": "failed"}


def test_slide_embed_writes_the_table_that_export_writes(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tinynet").touch()  # a checkpoint by its name
    embed(slides / "a.tif", tmp_path)
    words = [str(tmp_path), "--slide-encoder", "tinynet", "--device", "cpu"]
    for name in ("default", "state:1:class", "published-demo"):
        table = tmp_path / f"{name.replace(':', '-')}.csv"
        assert main(["slide-embed", *words, "--embedding", name, "--to", str(table)]) == 0
        ids, vectors = read_slides(tmp_path, name)
        row = table.read_text().splitlines()[1].split(",")
        assert (ids, row[0]) == (["a"], "a")
        np.testing.assert_array_equal(np.float32(row[3:]), vectors[0])
    assert main(["slide-embed", *words, "--embedding", "default:tiles", "--to", str(table)]) == 1
    assert main(["slide-embed", *words, "--embedding", "class"]) == 2
    assert "embedding: expected default, state:I" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- bytes that changed

KINDS = ("tiles", "features_tiny", "slides_tinynet__tiny")


def checked(path: Path) -> set[str]:
    return {finding.name for finding in check_file(path).findings if finding.wrong}


def test_each_of_60_flipped_bits_is_found_in_every_kind_of_file(slides: Path, tmp_path: Path) -> None:
    embed(slides / "a.tif", tmp_path)
    readers = {"tiles": read_tiles, "features_tiny": read_features, "slides_tinynet__tiny": read_slide}
    random = np.random.default_rng(0)
    for kind in KINDS:
        path = tmp_path / kind / "a.h5"
        whole = path.read_bytes()
        found = 0
        for bit in random.integers(0, 8 * len(whole), 60).tolist():
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found += "checksum" in checked(path)
        assert found == 60, kind
        with pytest.raises(FeatureFileError, match=r"^a\.h5: its bytes have changed"):
            readers[kind](path)
        path.write_bytes(whole)
        assert "checksum" not in checked(path)
        readers[kind](path)


def test_rotten_tile_embeddings_reach_no_result(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed([slides / "a.tif", slides / "b.tif"], tmp_path, slide_encoder="mean")
    path = tmp_path / "features_tiny/a.h5"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    for name in ("mean", "tinynet"):
        result = run_slide_embed(
            [tmp_path / "features_tiny"], tmp_path / name, embedding=SlideEmbedOptions(slide_encoder=name, device="cpu")
        )
        assert (result.counts["failed"], result.counts["done"]) == (1, 1)
        assert "SHA-256" in table(tmp_path / name)["a"]["error"]
    assert main(["check", str(tmp_path / "features_tiny")]) == 3
    assert main(["convert", str(path), "--to", "trident", "--out", str(tmp_path / "trident")]) != 0
    assert main(["inspect", str(path)]) != 0
    assert "SHA-256" in capsys.readouterr().err
    path.unlink()
    embed([slides / "a.tif", slides / "b.tif"], tmp_path, slide_encoder="mean")
    assert main(["check", str(path.parent)]) == 0


def test_results_without_a_checksum_are_whole_and_reused(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(slides / "a.tif", tmp_path)
    for kind in KINDS:
        status = tmp_path / kind / "a.json"
        held = json.loads(status.read_text())
        del held["sha256"]
        status.write_text(json.dumps(held))
    before = touched(tmp_path)
    assert embed(slides / "a.tif", tmp_path).outcome == "done"
    assert touched(tmp_path) == before
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("no-checksum") == 3


@pytest.mark.parametrize("stage", ["features", "slides"])
def test_kill_between_a_file_and_its_record_leaves_nothing_that_looks_damaged(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    embed(slides / "a.tif", tmp_path)

    def killed(folder: Path, status: Status) -> None:
        if status.stage == stage:
            raise KeyboardInterrupt
        write_status(folder, status)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gigapath.cohort.run.write_status", killed)
        embed(slides / "a.tif", tmp_path, store="float16", overwrite="features")
    path = tmp_path / KINDS[1 if stage == "features" else 2] / "a.h5"
    assert "checksum" not in checked(path)
    assert embed(slides / "a.tif", tmp_path, store="float16", overwrite="features").outcome == "done"
    assert recorded_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_file_that_another_run_makes_meanwhile_gets_no_wrong_checksum(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(folder: Path, status: Status) -> None:
        write_status(folder, status)
        path = folder / "a.h5"
        if status.stage == "features" and status.sha256:
            path.with_name("other").write_bytes(path.read_bytes() + b"\0")
            path.with_name("other").replace(path)

    monkeypatch.setattr("gigapath.cohort.run.write_status", late)
    embed(slides / "a.tif", tmp_path)
    assert recorded_sha256(tmp_path / "features_tiny/a.h5") is None
    assert recorded_sha256(tmp_path / "tiles/a.h5") is not None


def test_a_mask_that_is_a_pipe_fails_its_slide_and_is_not_waited_for(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tif", paint_tissue(700, 600), mpp=(0.5, 0.5))
    os.mkfifo(tmp_path / "p.geojson")
    result = run_tile([tmp_path / "s.tif"], tmp_path / "out", tiling=TileOptions(tissue=str(tmp_path / "p.geojson")))
    assert "--tissue" in result.failed["s"]
