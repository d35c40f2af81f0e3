"""Maps on slides: a planted region is found, GeoJSON lies on the tiles, and what can't be drawn says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Lines
from feature_files import make_tiles, write_gigapath, write_stamp, write_trident
from made_cohort import NARROW, write_slide
from PIL import Image
from planted_slide import ID, OFFSET, REGION, SIZE, covered, fit_head, overlap, write_planted_run

from gigapath.cli.main import main
from gigapath.cohort.status import Status, write_status
from gigapath.features import Tiles, read_features
from gigapath.files import sha256_of
from gigapath.maps import (
    Colors,
    MapOptions,
    cosine_similarity,
    drawing,
    fit_clusters,
    fit_components,
    make_maps,
    sample_tiles,
)
from gigapath.maps.attribution import occluded_squares
from gigapath.preprocessing import preview


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Pictures of few pixels: quick to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 40)
        patch.setattr(preview, "SIDE", 400)
        yield


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn and seen by other tests: this one is about what stands beside them."""
    monkeypatch.setattr("gigapath.maps.run.draw_map", lambda *_, **__: None)
    monkeypatch.setattr("gigapath.maps.run.draw_curve", lambda *_: None)
    monkeypatch.setattr("gigapath.maps.run.png", lambda figure: b"")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Tiles]:
    """A folder with the planted run, a head fitted to find its region, and their maps."""
    folder = tmp_path_factory.mktemp("planted")
    tiles = write_planted_run(folder)
    head = fit_head(folder)
    words = ["--clusters", "4", "--tile", "20", "--checkpoint", str(head), "--device", "cpu"]
    drawn, beside = ("clusters", "head-attention"), ("pca", "similarity", "gradient", "occlusion")
    assert main(["map", str(folder / "run"), "--out", str(folder / "maps"), "--kind", *drawn, *words]) == 0
    with pytest.MonkeyPatch.context() as patch:  # figures of each palette are made, but not all of them rendered
        patch.setattr("gigapath.maps.run.png", lambda figure: b"")
        assert main(["map", str(folder / "run"), "--out", str(folder / "maps"), "--kind", *beside, *words]) == 0
    return folder, tiles


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "maps" / ID / f"{name}.npz"))


def test_the_planted_region_is_a_cluster(planted) -> None:
    folder, tiles = planted
    true = covered(tiles.coords_level0 - OFFSET) >= 0.5
    assert 4 <= true.sum() <= len(tiles) / 5
    labels = arrays(folder, "clusters")["values"]
    overlaps = [overlap(labels == cluster, true) for cluster in range(4)]
    assert max(overlaps) >= 0.5
    assert sorted(overlaps)[-2] == 0  # in no other


@pytest.mark.parametrize("name", ["gradient_1", "occlusion_1", "head-attention"])
def test_the_planted_region_is_in_the_maps_of_a_head_fitted_on_it(planted, name: str) -> None:
    folder, tiles = planted
    true = covered(tiles.coords_level0 - OFFSET) >= 0.5
    values = arrays(folder, name)["values"]
    assert overlap(values >= values.max() / 2, true) >= 0.5
    said = json.loads((folder / "maps" / ID / f"{name}.json").read_text())
    assert said["target"] == "1" and said["curve"]["deletion_minus_random"] < -1  # its tiles carry the score


def test_occlusion_is_the_score_with_less_the_score_without(planted) -> None:
    import torch

    from gigapath.finetune import load_head
    from gigapath.finetune.data import Bag
    from gigapath.maps.attribution import class_scores, gradient_times_input, head_attention, occlusion

    head = load_head(planted[0] / "tuned" / "fold_0")
    random = np.random.default_rng(0)
    bag = Bag(random.standard_normal((9, 3)).astype(np.float32), np.stack([np.arange(9), np.arange(9)], 1) * 256)

    def score(features: np.ndarray) -> float:
        with torch.no_grad():
            logits = head.model.forward_packed(torch.from_numpy(features), None, [len(features)])
        return float(class_scores(logits, 1, head.task)[0])

    values, side = occlusion(head, bag, 1, torch.device("cpu"))
    assert side == 1
    for row in range(9):
        expected = score(bag.features) - score(np.delete(bag.features, row, axis=0))
        assert values[row] == pytest.approx(expected, abs=1e-5)
    steps = gradient_times_input(head, bag, 1, torch.device("cpu"))
    small = 1e-3  # along the input itself, the sum of gradient x input is the slope
    slope = (score(bag.features * (1 + small)) - score(bag.features * (1 - small))) / (2 * small)
    assert steps.sum() == pytest.approx(slope, rel=1e-2)
    weights = head_attention(head, bag, torch.device("cpu"))
    assert weights.sum() == pytest.approx(1, abs=1e-6)


def test_geojson_rectangles_lie_on_the_tiles_relative_to_the_bounds(planted) -> None:
    folder, tiles = planted
    labels = arrays(folder, "clusters")["values"]
    read = json.loads((folder / "maps" / ID / "clusters.geojson").read_text())
    assert set(read) == {"type", "features"} and read["type"] == "FeatureCollection"
    assert len(read["features"]) == len(tiles)
    in_region = 0
    for row, feature in enumerate(read["features"]):
        assert set(feature) == {"type", "geometry", "properties"} and feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5 and ring[0] == ring[-1]
        left, top = tiles.coords_level0[row] - OFFSET  # what QuPath shows begins at the bounds
        assert ring[:4] == [[left, top], [left + 256, top], [left + 256, top + 256], [left, top + 256]]
        assert left >= 0 and left + 256 <= SIZE[0] and top >= 0 and top + 256 <= SIZE[1]
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        assert properties["measurements"] == {"cluster": labels[row] + 1}
        assert properties["classification"]["name"] == f"cluster {labels[row] + 1}"
        assert all(isinstance(part, int) and 0 <= part <= 255 for part in properties["classification"]["color"])
        in_region += REGION[0] <= left and left + 256 <= REGION[2] and REGION[1] <= top and top + 256 <= REGION[3]
    assert in_region == 4  # whole tiles of the region, by its own coordinates
    pca = json.loads((folder / "maps" / ID / "pca.geojson").read_text())["features"][0]["properties"]
    assert len(pca["measurements"]) == 3 and len(pca["color"]) == 3


def test_every_map_states_what_it_is(planted) -> None:
    folder, tiles = planted
    files = sorted((folder / "maps" / ID).glob("*.json"))
    assert len(files) == 6
    for path in files:
        said = json.loads(path.read_text())
        assert said["slide_id"] == ID and said["model"] and said["normalisation"] and said["trained"] is True
        assert said["colour"]["label"] and said["colour"]["scope"]
        assert said["tile"] == {"pitch_level0": [256, 256], "pitch_mm": [0.128, 0.128]}
        assert said["slide"]["bounds"] == [*OFFSET, *SIZE] and said["slide"]["at_hand"] is True
        assert str(folder) not in path.read_text()
        assert all((path.parent / name).is_file() for name in said["files"].values())
        overlay = np.asarray(Image.open(path.parent / said["files"]["overlay"]))
        assert list(overlay.shape) == [*said["overlay"]["shape"], 4]
        x, y, width, height = said["overlay"]["level0"]
        assert (width, height) == (overlay.shape[1] * 256, overlay.shape[0] * 256)
        column, row = ((tiles.coords_level0 - (x, y)) // 256).astype(int).T
        assert (overlay[row, column, 3] == 255).all() and (overlay[..., 3] > 0).sum() == len(tiles)
        held = np.load(path.parent / said["files"]["npz"])
        assert np.array_equal(held["coords_level0"], tiles.coords_level0)
        assert len(held["values"]) == said["tiles"] == len(tiles)
    assert not list((folder / "maps").rglob("*.partial"))


@pytest.mark.usefixtures("no_figures")
def test_maps_of_the_slide_encoder_and_of_a_head_on_it(planted, tmp_path: Path) -> None:
    folder, tiles = planted
    kind = {"head": "linear", "model_arch": NARROW, "feat_layer": "2", "global_pool": True}
    head = fit_head(folder / "longnet", slides=12, epochs=4, base_lr=0.05, **kind)
    kinds = ("attention", "rollout", "gradient")
    options = MapOptions(kind=kinds, layer=(1, 3), attention_head=2, query="class", checkpoint=str(head), device="cpu")
    result = make_maps([folder / "run"], tmp_path, options)
    assert result.written[ID] == [
        "attention_class_layer-1_head-2", "attention_class_layer-3_head-2", "rollout_class", "gradient_1",
    ]  # fmt: skip
    held = np.load(tmp_path / ID / "attention_class_layer-3_head-2.npz")
    sums = held["weights"].sum(axis=1) + held["class_token"] + held["zero_keys"]
    assert np.abs(sums - 1).max() <= 1e-6
    assert np.allclose(held["values"], held["weights"][2] * (len(tiles) + 1))
    said = json.loads((tmp_path / ID / "attention_class_layer-3_head-2.json").read_text())
    assert (said["layer"], said["head"], said["query"]) == (3, 2, "from the class token")
    assert "layer 3 of 3" in said["title"] and len(said["details"]["branches"]) == 5
    assert said["weight"].endswith("on zero keys of padding")
    rolled = json.loads((tmp_path / ID / "rollout_class.json").read_text())
    assert rolled["heuristic"] is True and "heuristic" in rolled["title"]
    held = np.load(tmp_path / ID / "gradient_1.npz")["values"]
    true = covered(tiles.coords_level0 - OFFSET) >= 0.5
    assert overlap(held >= held.max() / 2, true) >= 0.5  # through the slide encoder, whose region this head was shown
    drawn = json.loads((tmp_path / ID / "gradient_1.json").read_text())
    assert drawn["curve"]["deletion_minus_random"] < 0 < drawn["curve"]["insertion_minus_random"]
    assert drawn["check"].endswith("the ranking holds") and "state 2 of" in drawn["model"]
    tensors = sha256_of(Path(head) / "head.safetensors")
    assert {one["made_from"]["head_sha256"] for one in (said, rolled, drawn)} == {tensors}


@pytest.mark.usefixtures("no_figures")
def test_attention_is_checked_on_the_class_that_the_head_answers(planted, tmp_path: Path) -> None:
    """It is of no class itself: on a slide of the first class the second one's score says nothing of its ranking."""
    folder, tiles = planted
    held = read_features(folder / "run" / "features_colour" / f"{ID}.h5")
    away = covered(tiles.coords_level0 - OFFSET) == 0
    write_slide(tmp_path / "pale.h5", held.features[away], tiles.cells[away], encoder="colour")
    head = str(folder / "tuned" / "fold_0")
    options = MapOptions(kind=("head-attention", "gradient"), checkpoint=head, device="cpu")
    assert make_maps([tmp_path / "pale.h5"], tmp_path, options).written == {"pale": ["head-attention", "gradient_1"]}
    said = json.loads((tmp_path / "pale" / "head-attention.json").read_text())
    assert said["target"] == "0" and "class 0 against" in said["check"]


@pytest.mark.usefixtures("no_figures")
def test_a_map_says_what_it_was_made_from(tmp_path: Path) -> None:
    a, b = write_ours(tmp_path / "f" / "a.h5"), write_ours(tmp_path / "f" / "b.h5")
    options = MapOptions(kind=("pca",), device="cpu")

    def made() -> list[dict[str, str]]:
        make_maps([tmp_path / "f"], tmp_path / "out", options)
        return [json.loads((tmp_path / "out" / name / "pca.json").read_text())["made_from"] for name in "ab"]

    first, again = made(), made()
    assert first == again and first[0]["features_folder"] is None and first[0]["head_sha256"] is None
    write_ours(b, seed=2)  # other embeddings of the same tiles
    now = made()
    assert (
        now[0]["features_sha256"] == first[0]["features_sha256"] and now[1]["tiles_sha256"] == first[1]["tiles_sha256"]
    )
    assert now[1]["features_sha256"] != first[1]["features_sha256"]
    assert now[0]["cohort_sha256"] == now[1]["cohort_sha256"] != first[0]["cohort_sha256"]
    write_ours(a, count=5)
    write_status(tmp_path / "f", Status("a", "features", "done", digest="abc"))
    fewer = made()[0]
    assert fewer["tiles_sha256"] != first[0]["tiles_sha256"]
    assert (fewer["features_folder"], fewer["features_digest"]) == ("f", "abc")


@pytest.mark.usefixtures("no_figures")
def test_maps_of_other_options_are_not_drawn_over_unasked(tmp_path: Path) -> None:
    write_ours(tmp_path / "f" / "a.h5")
    out = tmp_path / "out"
    make_maps([tmp_path / "f"], out, MapOptions(kind=("pca",), device="cpu"))
    before = (out / "a" / "pca.json").read_bytes()
    make_maps([tmp_path / "f"], out, MapOptions(kind=("pca",), clusters=3, device="cpu"))  # none of this kind's
    with pytest.raises(ValueError, match=r"--range all -> slide \(1 maps\).*--overwrite"):
        make_maps([tmp_path / "f"], out, MapOptions(kind=("pca",), range="slide", device="cpu"))
    assert (out / "a" / "pca.json").read_bytes() == before
    make_maps([tmp_path / "f"], out, MapOptions(kind=("pca",), range="slide", overwrite=True, device="cpu"))
    assert (out / "a" / "pca.json").read_bytes() != before
    assert sorted(path.name for path in out.iterdir()) == ["a"]


@pytest.mark.usefixtures("no_figures")
def test_a_stopped_run_leaves_the_maps_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ours(tmp_path / "f" / "a.h5")
    options = MapOptions(kind=("pca",), device="cpu")
    make_maps([tmp_path / "f"], tmp_path / "out", options)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "f" / "a.h5").unlink()
    write_ours(tmp_path / "f" / "a.h5", count=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gigapath.maps.run.describe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        make_maps([tmp_path / "f"], tmp_path / "out", options)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gigapath.maps.run.publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        make_maps([tmp_path / "f"], tmp_path / "out", options)
    assert not (tmp_path / "out" / "a" / "pca.json").exists(), "none that passes for whole"


@pytest.mark.usefixtures("no_figures")
def test_colours_are_common_to_all_slides_unless_asked_otherwise(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cells = np.stack([np.arange(30) % 6 + 3, np.arange(30) // 6 + 1], axis=1)
    for name, shift in (("a", 0.0), ("b", 3.0)):
        write_slide(tmp_path / "f" / f"{name}.h5", random.standard_normal((30, 4)).astype(np.float32) + shift, cells)
    ranges = {}
    for scope in ("all", "slide"):
        options = MapOptions(kind=("similarity",), tile=0, range=scope, device="cpu")
        make_maps([tmp_path / "f"], tmp_path / scope, options)
        said = [json.loads((tmp_path / scope / name / "similarity_a_0.json").read_text()) for name in "ab"]
        ranges[scope] = [(one["colour"]["low"], one["colour"]["high"]) for one in said]
    assert ranges["all"][0] == ranges["all"][1]
    assert ranges["slide"][0] != ranges["slide"][1]
    low = min(low for low, _ in ranges["slide"])
    assert ranges["all"][0][0] == pytest.approx(low, abs=0.3)


def write_ours(path: Path, *, count: int | None = None, seed: int = 1, **attrs: object) -> Path:
    """One of our own files of random embeddings; `count` 0 for a slide without tissue."""
    tiles = make_tiles(path.stem) if count is None else make_tiles(path.stem).take(np.arange(count))
    features = np.random.default_rng(seed).standard_normal((len(tiles), 6)).astype(np.float32)
    return write_gigapath(path, features, tiles, attrs={"encoder": "made", **attrs})


@pytest.mark.usefixtures("no_figures")
def test_slides_that_fail_or_are_empty_are_named_and_the_others_go_on(tmp_path: Path, capsys) -> None:
    write_ours(tmp_path / "f" / "good.h5", trained=False)
    write_ours(tmp_path / "f" / "bare.h5", count=0)
    (tmp_path / "f" / "torn.h5").write_bytes(b"not a feature file")
    words = ["map", str(tmp_path / "f"), "--kind", "pca", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 3
    printed = capsys.readouterr().out
    assert "bare: no tiles, no map" in printed
    assert "torn: failed: torn.h5" in printed
    assert "good: pca (slide not at hand: tiles drawn on the grid)" in printed
    said = json.loads((tmp_path / "out" / "good" / "pca.json").read_text())
    assert said["trained"] is False and "UNTRAINED" in said["model"]
    assert said["slide"]["at_hand"] is False and "not at hand" in said["note"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good"]
    write_ours(tmp_path / "standin.h5", encoder="standin")
    assert main(["map", str(tmp_path / "standin.h5"), *words[2:-3], str(tmp_path / "standin"), *words[-2:]]) == 0
    said = json.loads((tmp_path / "standin" / "standin" / "pca.json").read_text())
    assert said["trained"] is True and "not pathology" in said["model"]


@pytest.mark.usefixtures("no_figures")
def test_other_tools_files_are_drawn_and_ones_without_a_step_say_which_option_helps(tmp_path: Path, capsys) -> None:
    features = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    trident = write_trident(tmp_path / "trident", features)
    stamp = write_stamp(tmp_path / "stamp", features)
    for path in (trident, stamp):
        out = tmp_path / path.parts[-3]
        assert main(["map", str(path), "--kind", "pca", "--out", str(out / "maps"), "--device", "cpu"]) == 0
    assert "no GeoJSON" in capsys.readouterr().out  # STAMP's are micrometres
    assert (tmp_path / "trident" / "maps" / "slide-1" / "pca.geojson").is_file()
    assert not (tmp_path / "stamp" / "maps" / "slide-1" / "pca.geojson").exists()
    bare = write_slide(tmp_path / "bare" / "s.h5", features, np.zeros((8, 2)) + np.arange(8)[:, None], published=True)
    assert main(["map", str(bare), "--kind", "pca", "--out", str(tmp_path / "out")]) == 3
    assert "--tile-size-level0" in capsys.readouterr().out
    words = ["--kind", "pca", "--out", str(tmp_path / "out"), "--tile-size-level0", "256"]
    assert main(["map", str(bare), *words]) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--kind", "attention"], "expected a slide encoder with layers, got the mean"),
        (["--kind", "attention", "--random-weights", "--slide-encoder", "mean"], "got the mean"),
        (["--kind", "similarity"], "Choose one with --tile"),
        (["--kind", "similarity", "--tile", "8"], "a tile of good from 0 to 7, got 8"),
        (["--kind", "similarity", "--tile", "0", "--of-slide", "other"], "--of-slide: expected a slide of those given"),
        (["--kind", "attention", "--query", "tile"], "Choose one with --tile"),
        (["--kind", "gradient"], "expected a fitted head, got none"),
        (["--kind", "gradient", "--checkpoint", "nowhere"], "expected a fitted head"),
        (["--kind", "clusters", "--clusters", "12"], "--clusters: expected at most"),
        (["--kind", "clusters", "--clusters", "13"], "--clusters: expected at most 12"),
        (["--kind", "pca", "--layer", "0"], "--layer: expected at least 1, got 0"),
        (["--kind", "pca", "--opacity", "0"], "--opacity"),
        (["--kind", "pca", "--slides", "nowhere"], "nowhere"),
    ],
)
def test_what_no_slide_could_satisfy_is_one_sentence(tmp_path: Path, capsys, words: list[str], sentence: str) -> None:
    write_ours(tmp_path / "f" / "good.h5")
    assert main(["map", str(tmp_path / "f"), "--out", str(tmp_path / "out"), "--device", "cpu", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_head_of_another_encoder_or_class_is_refused(planted, tmp_path: Path, capsys) -> None:
    folder, _ = planted
    head = str(folder / "tuned" / "fold_0")
    random = np.random.default_rng(0)
    cells = np.stack([np.arange(8) + 2, np.arange(8) // 4 + 1], axis=1)
    write_slide(tmp_path / "other.h5", random.standard_normal((8, 3)).astype(np.float32), cells, encoder="other")
    words = ["--kind", "gradient", "--checkpoint", head, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["map", str(tmp_path / "other.h5"), *words]) == 3
    assert "its encoder is other, that of the features that trained the head colour" in capsys.readouterr().out
    wide = write_ours(tmp_path / "wide.h5")
    assert main(["map", str(wide), *words]) == 3
    assert "expected embeddings of width 3, got 6" in capsys.readouterr().out
    assert main(["map", str(folder / "run"), *words, "--target", "9"]) == 1
    assert "expected a class of the head (0, 1), got '9'" in capsys.readouterr().err
    words[1] = "attention"
    assert main(["map", str(folder / "run"), *words]) == 1
    assert "which has none" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_slides_of_another_encoder_than_the_first_are_named(tmp_path: Path, capsys) -> None:
    write_ours(tmp_path / "f" / "a.h5")
    write_ours(tmp_path / "f" / "b.h5", encoder="other")
    words = ["--kind", "clusters", "--clusters", "2", "--out", str(tmp_path / "out")]
    assert main(["map", str(tmp_path / "f"), *words]) == 3
    assert "b: failed: b: expected embeddings of made, width 6, as of the first slide, got those of other" in (
        capsys.readouterr().out
    )


def test_a_slide_of_one_tile_has_maps_too(planted, tmp_path: Path) -> None:
    write_slide(tmp_path / "one.h5", np.ones((1, 3), np.float32), np.array([[4, 2]]), encoder="colour")
    kinds = ("pca", "gradient", "occlusion")
    options = MapOptions(kind=kinds, checkpoint=str(planted[0] / "tuned" / "fold_0"), device="cpu")
    result = make_maps([tmp_path / "one.h5"], tmp_path / "out", options)
    assert result.written == {"one": ["pca", "gradient_1", "occlusion_1"]} and not result.failed
    assert np.isnan(np.load(tmp_path / "out" / "one" / "occlusion_1.npz")["values"]).all()  # nothing is left to score
    said = json.loads((tmp_path / "out" / "one" / "occlusion_1.json").read_text())
    assert said["curve"] is None and "curve" not in said["files"]
    feature = json.loads((tmp_path / "out" / "one" / "occlusion_1.geojson").read_text())["features"][0]
    assert feature["properties"]["measurements"] == {}


def test_another_slide_of_the_same_name_is_not_drawn_under_the_tiles(planted, tmp_path: Path) -> None:
    from made_slides import paint_tissue, write_pyramid

    folder, _ = planted
    write_pyramid(tmp_path / "slides.tif", paint_tissue(800, 600), mpp=(0.5, 0.5), steps=(1, 2))
    (tmp_path / "slides.tif").rename(tmp_path / f"{ID}.tif")
    watch = Lines()
    options = MapOptions(kind=("pca",), slides=(str(tmp_path / f"{ID}.tif"),), device="cpu")
    make_maps([folder / "run"], tmp_path / "out", options, watch=watch)
    assert "the slide has 800 x 600 pixels" in watch.lines[0]
    assert json.loads((tmp_path / "out" / ID / "pca.json").read_text())["slide"]["at_hand"] is False


def test_many_tiles_are_occluded_in_squares() -> None:
    coords = np.stack(np.meshgrid(np.arange(40), np.arange(30)), axis=-1).reshape(-1, 2) * 256 + 5120
    squares, side = occluded_squares(coords)
    assert side == 3 and squares.max() + 1 == 14 * 10
    assert np.bincount(squares).max() == 9
    assert occluded_squares(coords[:16])[1] == 1


def test_components_colour_what_differs_and_clusters_come_by_size() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(5, dtype=np.float32)[:3] * 10
    kinds = np.repeat([0, 1, 2], [20, 70, 40])
    tiles = centres[kinds] + random.standard_normal((130, 5)).astype(np.float32) * 0.1
    sample = sample_tiles([tiles[:60], tiles[60:]], 2)
    assert sample.shape == (130, 5)
    found = fit_components(sample)
    assert found.shares.sum() == pytest.approx(1, abs=0.01) and found.shares[2] < 0.01
    colours = found.colors(tiles)
    assert colours.min() >= 0 and colours.max() <= 1
    assert np.linalg.norm(colours[0] - colours[50]) > 0.5
    labels = fit_clusters(sample, 3).labels(tiles)
    assert np.bincount(labels).tolist() == [70, 40, 20]
    assert np.array_equal(labels, fit_clusters(sample, 3).labels(tiles))  # seeded
    few = [len(fit_clusters(tiles[:count]).centers) for count in (15, 50, 130)]
    assert few == [1, 2, 6]  # where no number is given, as many as suit the tiles
    assert cosine_similarity(tiles, tiles[0])[:20] == pytest.approx(1, abs=0.01)
    assert fit_components(tiles[:, :2]).colors(tiles[:, :2]).shape == (130, 3)


def test_ranges_leave_out_extremes_and_stay_symmetric_where_they_diverge() -> None:
    values = np.array([*np.linspace(0, 1, 1000), 50.0])
    spanned = Colors("sequential", "x").spanning(values, "here")
    assert spanned.low == pytest.approx(0.01, abs=0.01) and spanned.high == pytest.approx(0.99, abs=0.01)
    diverging = Colors("diverging", "x").spanning(np.array([-3.0, 1.0, np.nan]), "here")
    assert diverging.low == -diverging.high and diverging.high == pytest.approx(2.96)
    even = Colors("sequential", "x").spanning(np.ones(5), "here")
    assert even.high > even.low and even.rgb(np.ones(5)).shape == (5, 3)
