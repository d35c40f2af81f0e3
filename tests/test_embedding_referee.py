"""The referee: it names the way that vectors of slides were computed, or the change that explains them, or neither."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_files import CELLS, make_features, write_foreign, write_h5
from tiny_encoders import WIDTH, tiny_slide_encoder
from weights_recipe import fill

from gigapath.cli.main import main
from gigapath.embedding import referee as module
from gigapath.embedding import slide_embedding
from gigapath.embedding.options import SlideEmbedOptions
from gigapath.embedding.referee import NAMED, Referee, apart
from gigapath.embedding.slide_encoding import SlideEncoder
from gigapath.features import SlideEmbeddings, TileEmbeddings, read_features, read_slide, read_slides
from gigapath.features.cells import cells_of
from gigapath.features.slide_vectors import DEFAULT, RECIPES, Recipe, read_slide_vectors, tiles_as
from gigapath.slide_encoder import LongNetViT, create_model
from scripts.referee_goldens import ARCH, PITCHES, made_tiles

SLIDES, PITCH = 8, 509  # level-0 pixels of a tile, so that float16 moves some into the next cell


def made_slide(number: int) -> TileEmbeddings:
    """Twenty tiles, column by column, of tissue that differs from slide to slide."""
    random = np.random.default_rng(number)
    at = np.sort(random.choice(60 * 60, 20, replace=False))
    cells = np.stack([at // 60, at % 60], axis=1).astype(np.int32)
    features = random.normal(size=(1, WIDTH)) + random.normal(size=(20, WIDTH))
    return TileEmbeddings(
        slide_id=f"s{number:02}",
        features=features.astype(np.float32),
        coords=cells.astype(np.int64) * PITCH,
        cells=cells,
        tile_size_level0=float(PITCH),
    )


EMBEDDED: dict[Any, SlideEmbeddings] = {}
TILES = {f"s{number:02}": made_slide(number) for number in range(SLIDES)}


def deep_encoder() -> SlideEncoder:
    """Twelve narrow layers, for there is a state 11 to take."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LongNetViT(in_chans=WIDTH, embed_dim=32, depth=12)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return replace(tiny_slide_encoder(), model=model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def encoder() -> SlideEncoder:
    return deep_encoder()


@pytest.fixture(scope="module")
def referee(encoder: SlideEncoder) -> Referee:
    return Referee(TILES, encoder)


def vectors_of(encoder: SlideEncoder, recipe: Recipe) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder.model.train(not recipe.evaluated)
        for slide_id, tiles in TILES.items():
            placed = tiles_as(tiles, recipe)
            key = slide_id, recipe.precision[0], recipe.evaluated, placed.cells.tobytes(), placed.coords.tobytes()
            if key not in EMBEDDED:
                arrays = encoder.at(recipe.precision[0]).embed(placed)
                EMBEDDED[key] = SlideEmbeddings(slide_id=slide_id, **arrays)
            found[slide_id] = EMBEDDED[key].select(recipe.readout)
        encoder.model.eval()
    return found


@pytest.mark.parametrize("name", [name for name, recipe in NAMED.items() if recipe.evaluated])
def test_every_tools_vectors_get_its_name(referee: Referee, encoder: SlideEncoder, name: str) -> None:
    verdict = referee.judge(vectors_of(encoder, NAMED[name]))
    assert [str(way) for way in verdict.fits] == [name]
    assert verdict.fits[0].cosine > 0.999999 and verdict.slides == SLIDES


PLANTED: list[tuple[dict[str, Any], set[str]]] = [
    ({"readout": "default:class"}, {"pooling class"}),
    ({"readout": "last-state:mean"}, {"state 12"}),
    ({"readout": "state:5:mean"}, {"state 5"}),
    ({"order": "column-major"}, {"order file", "order column-major"}),  # of these files the same
    ({"places": "level0"}, {"places level0"}),
    ({"places": "swapped"}, {"places swapped"}),
    ({"places": "none"}, {"places none"}),
    ({"half_places": True}, {"coordinates in float16 yes"}),
    ({"precision": ("bf16", "bf16")}, {"precision bf16"}),
    ({"precision": ("half", "half")}, {"precision half"}),
]


@pytest.mark.parametrize(
    ("changes", "expected"), PLANTED, ids=lambda value: str(value if isinstance(value, dict) else sorted(value))
)
def test_a_planted_change_is_named(
    referee: Referee, encoder: SlideEncoder, changes: dict[str, Any], expected: set[str]
) -> None:
    verdict = referee.judge(vectors_of(encoder, replace(DEFAULT, **changes)))
    assert {str(way) for way in verdict.fits} == {f"default with {text}" for text in expected}


def test_dropout_left_on_is_said(referee: Referee, encoder: SlideEncoder) -> None:
    for recipe, name in (
        (replace(DEFAULT, evaluated=False), "default with eval left out"),
        (RECIPES["slide2vec-5"], "slide2vec-5"),
    ):
        verdict = referee.judge(vectors_of(encoder, recipe))
        assert not verdict.fits and name in [str(way) for way in verdict.dropout]


def test_noise_and_other_slides_are_none_of_these_and_the_mean_needs_no_encoder(
    referee: Referee, encoder: SlideEncoder
) -> None:
    random = np.random.default_rng(1)
    verdict = referee.judge({name: random.normal(size=32) for name in TILES})
    assert not verdict.fits and not verdict.dropout and verdict.named[0].cosine < 0.5
    vectors = vectors_of(encoder, DEFAULT)
    assert not referee.judge(dict(zip(vectors, [*list(vectors.values())[1:], vectors["s00"]], strict=True))).fits
    verdict = referee.judge({name: held.features.mean(axis=0) for name, held in TILES.items()})
    assert [str(way) for way in verdict.fits] == ["tile-mean"]


def test_equal_recipes_are_named_together(encoder: SlideEncoder) -> None:
    """At 256 level-0 pixels a tile, three tools differ in nothing but precision."""
    tiles = {
        name: replace(held, coords=held.cells.astype(np.int64) * 256, tile_size_level0=256.0)
        for name, held in TILES.items()
    }
    tiles = {name: tiles[name] for name in ("s00", "s01")}
    vectors = {}
    for name, held in tiles.items():
        arrays = encoder.embed(tiles_as(held, RECIPES["slide2vec"]))
        vectors[name] = arrays["default_class"][0] * (
            1 + 1e-3 * np.sin(np.arange(32))
        )  # another device's half precision
    verdict = Referee(tiles, encoder).judge(vectors)
    assert [str(way) for way in verdict.fits] == ["slide2vec", "mussel", "lazyslide"]


def test_what_cannot_be_compared_is_refused(referee: Referee) -> None:
    with pytest.raises(ValueError, match="wide"):
        referee.judge({"s00": np.ones(7)})
    with pytest.raises(ValueError, match="same slides"):
        referee.judge({"other": np.ones(32)})
    with pytest.raises(ValueError, match="same slides"):
        apart({"a": np.ones(3)}, {"b": np.ones(3)})


# ------------------------------------------------------------------------------------------ from the command line


@pytest.fixture
def files(tmp_path: Path, encoder: SlideEncoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tile embeddings as TRIDENT writes them, TRIDENT's and STAMP's slide vectors, of three slides."""
    monkeypatch.setattr(module, "load_slide_encoder", lambda *args, **kwargs: encoder)
    trident, stamp = vectors_of(encoder, RECIPES["trident"]), vectors_of(encoder, RECIPES["stamp"])
    attrs = {"coords": {"patch_size": 256, "patch_size_level0": PITCH}, "features": {"encoder": "gigapath"}}
    for name in ("s00", "s01", "s02"):
        held = TILES[name]
        write_h5(
            tmp_path / "features_gigapath" / f"{name}.h5", {"features": held.features, "coords": held.coords}, attrs
        )
        path = tmp_path / "slide_features_gigapath" / f"{name}.h5"
        write_h5(path, {"features": trident[name], "coords": held.coords}, {"features": {"encoder": "gigapath"}})
    chosen = {name: stamp[name].astype(np.float16) for name in ("s00", "s01", "s02")}
    write_h5(
        tmp_path / "gigapath-slide.h5",
        chosen,
        {"": {"version": "2.4.0", "encoder": "gigapath", "precision": "torch.float16"}},
    )
    yield tmp_path


def test_check_names_the_tools_and_how_they_differ(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--slide-embeddings", str(files / "slide_features_gigapath"), str(files / "gigapath-slide.h5")]
    words += ["--features", str(files / "features_gigapath"), "--slide-encoder", "gigapath"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [tool["fits"][0]["way"] for tool in found["tools"]] == ["trident", "stamp"]
    (pair,) = found["pairs"]
    assert pair["slides"] == 3 and pair["cosine"] < 0.99 and {"readout", "places"} <= set(pair["differ_in"])
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "This is trident" in said and "This is stamp" in said and "differ in" in said


def test_check_says_none_of_these_with_its_status(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = {name: np.random.default_rng(0).normal(size=32).astype(np.float32) for name in ("s00", "s01")}
    np.savez(files / "noise.npz", **noise)
    words = ["check", "--slide-embeddings", str(files / "noise.npz"), "--slide-encoder", "gigapath"]
    assert main([*words, "--features", str(files / "features_gigapath")]) == 3
    assert "none of these" in capsys.readouterr().out
    assert main(["check", "--slide-embeddings", str(files / "gigapath-slide.h5")]) == 0, "without weights"
    said = capsys.readouterr().out
    assert "torch.float16" in said and "2.4.0" in said and "Not compared" in said


def test_vectors_are_read_from_every_tools_files(files: Path, tmp_path: Path) -> None:
    folder = read_slide_vectors(files / "slide_features_gigapath")
    assert sorted(folder.vectors) == ["s00", "s01", "s02"] and folder.stated["tool"] == "trident"
    assert read_slide_vectors(files / "gigapath-slide.h5").stated["precision"] == "torch.float16"
    np.savez(tmp_path / "one.npz", features=np.ones(5, np.float32))
    (tmp_path / "one.meta.json").write_text(json.dumps({"encoder_name": "gigapath-slide", "feature_dim": 5}))
    assert read_slide_vectors(tmp_path / "one.npz").stated == {"tool": "slide2vec", "encoder_name": "gigapath-slide"}
    np.save(tmp_path / "two.npy", np.ones((1, 5)))
    torch.save(torch.ones(5), tmp_path / "three.pt")
    for name in ("two.npy", "three.pt"):
        assert read_slide_vectors(tmp_path / name).width == 5
    (tmp_path / "t.csv").write_text(
        "slide_id,embedding,trained,e0,e1\na,default:mean,True,1,2\nb,default:mean,True,3,4\n"
    )
    (tmp_path / "bare.csv").write_text("slide_id,e0,e1\na,1,2\nb,3,4.5\n")
    bare = read_slide_vectors(tmp_path / "bare.csv")
    assert {name: held.tolist() for name, held in bare.vectors.items()} == {"a": [1.0, 2.0], "b": [3.0, 4.5]}
    table = read_slide_vectors(tmp_path / "t.csv")
    assert table.vectors["b"].tolist() == [3, 4] and table.stated["embedding"] == "default:mean"
    np.save(tmp_path / "tiles.npy", np.ones((3, 5)))
    np.save(tmp_path / "nan.npy", np.full(5, np.nan))
    for name in ("tiles.npy", "nan.npy", "absent.npy"):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            read_slide_vectors(tmp_path / name)


# Slide embeddings as other tools compute them: against vectors of their own code, and against restated calls


GOLDENS = Path(__file__).parent / "goldens" / "other_tools.npz"


def embedded(encoder: SlideEncoder, tiles: TileEmbeddings, recipe: Recipe, depth: int) -> np.ndarray[Any, Any]:
    """The vector of a recipe on a CPU, tiles given in their file's order."""
    arrays = encoder.at(recipe.precision[0]).embed(tiles_as(tiles, recipe))
    assert arrays["states_mean"].shape[0] == depth + 1
    return np.asarray(SlideEmbeddings(slide_id="s", **arrays).select(recipe.readout))


def in_file_order(features: np.ndarray[Any, Any], coords: np.ndarray[Any, Any], pitch: int) -> TileEmbeddings:
    cells = cells_of(coords, (pitch, pitch), who="s")
    return TileEmbeddings(slide_id="s", features=features, coords=coords, cells=cells, tile_size_level0=float(pitch))


@cache
def released_size() -> SlideEncoder:
    model = fill(create_model("", ARCH, 1536)).eval().requires_grad_(False)
    return replace(tiny_slide_encoder(), model=model)


@cache
def usual(scale: str) -> np.ndarray[Any, Any]:
    return embedded(released_size(), in_file_order(*made_tiles(PITCHES[scale]), PITCHES[scale]), DEFAULT, 12)


@pytest.mark.parametrize("scale", PITCHES)
@pytest.mark.parametrize("tool", ["slide2vec", "mussel", "lazyslide", "raw2features"])
def test_named_embedding_is_that_of_the_tools_own_code(tool: str, scale: str) -> None:
    theirs = np.load(GOLDENS)[f"{tool}/{scale}"]
    tiles = in_file_order(*made_tiles(PITCHES[scale]), PITCHES[scale])
    ours = embedded(released_size(), tiles, RECIPES[tool], 12)
    # Where the golden was made all are equal to the bit; half precision on another CPU rounds otherwise.
    atol = 1e-5 if RECIPES[tool].precision[0] == "fp32" else 2e-2
    np.testing.assert_allclose(ours, theirs, atol=atol)
    assert np.abs(usual(scale) - theirs).max() > 0.2


def call_of(tool: str, model: LongNetViT, x: torch.Tensor, coords: torch.Tensor, pitch: int) -> torch.Tensor:
    """What a tool does with its file's tile embeddings (N, D) and coordinates (N, 2), in our words."""
    model.global_pool = tool in ("trident", "raw2features")
    if tool in ("trident", "raw2features"):
        model.tile_size = pitch
        return model(x[None], coords[None], all_layer_embed=True)[11 if tool == "trident" else -1][0]
    if tool == "slide2vec":
        return model(x[None], (torch.div(coords, pitch, rounding_mode="floor") * 256)[None])[-1][0]
    if tool == "published-demo":
        return model(x[None], coords.float()[None], all_layer_embed=True)[-1][0]
    if tool == "stamp":
        extent = coords.max(0).values + 256.0
        return model.half()(x.half()[None], (coords.float() / extent * 1000).half()[None])[0][0].float()
    with torch.autocast("cpu", torch.float16, enabled=tool == "mussel"):
        return model(x[None], coords[None])[0][0].float()


@pytest.mark.parametrize(
    ("tool", "writer"),
    [
        ("slide2vec", "slide2vec"), ("mussel", "mussel"), ("lazyslide", "trident"), ("stamp", "stamp"),
        ("raw2features", "trident"), ("trident", "trident"), ("published-demo", "published"),
    ],
)  # fmt: skip
def test_slide_embed_computes_what_the_tool_does_with_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, writer: str
) -> None:
    features = make_features(len(CELLS), WIDTH)
    path = write_foreign(writer, tmp_path / "in", features, np.lexsort((CELLS[:, 1], CELLS[:, 0])))
    step = 256.0 if writer == "published" else None
    held = read_features(path, order="file", tile_size_level0=step)
    with torch.inference_mode():
        x = torch.from_numpy(held.features.astype(np.float32))
        theirs = call_of(tool, deep_encoder().model, x, torch.from_numpy(held.coords), 512)
    monkeypatch.setattr(slide_embedding, "load_slide_encoder", lambda *args, **kwargs: deep_encoder())
    out, table = tmp_path / "out", tmp_path / "table.npz"
    words = ["slide-embed", str(path), "--out", str(out), "--slide-encoder", "gigapath", "--to", str(table)]
    words += ["--tile-size-level0", "256"] if step else []
    assert main([*words, "--embedding", tool]) == 0
    np.testing.assert_allclose(np.load(table)["vectors"][0], theirs.numpy(), atol=1e-5)
    (folder,) = out.glob(f"as-{tool}_*")
    assert read_slide(folder / f"{held.slide_id}.h5").attrs["recipe"] == tool
    with pytest.raises(ValueError, match="--embedding default"):
        read_slides(folder, "default")
    # Every tool differs from the usual embedding.
    assert main([*words, "--overwrite", "slides", "--embedding", "default", "--to", str(tmp_path / "usual.npz")]) == 0
    usual = np.load(tmp_path / "usual.npz")["vectors"][0]
    assert np.abs(usual - theirs.numpy()).max() > 1e-2


def test_the_guide_names_every_recipe_with_its_readout() -> None:
    guide = (Path(__file__).parent.parent / "docs/guides/whose-embedding.md").read_text()
    for name, recipe in {"default": DEFAULT, **RECIPES}.items():
        row = next(line for line in guide.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| `{recipe.readout}` |" in row and ("dropout on" in row) is not recipe.evaluated


def test_what_needs_other_places_is_not_exported_from_the_usual_states(tmp_path: Path) -> None:
    slide = SlideEmbeddings(slide_id="s", tile_mean=np.ones((1, 4)), default_class=np.ones((1, 3)))
    assert slide.select("slide2vec").tolist() == [1, 1, 1]
    for tool in ("mussel", "lazyslide", "stamp"):
        with pytest.raises(ValueError, match=f"slide-embed --embedding {tool}"):
            slide.select(tool)
    with pytest.raises(ValueError, match="dropout"):
        SlideEmbedOptions(embedding="slide2vec-5")
    with pytest.raises(ValueError, match="--per section"):
        SlideEmbedOptions(embedding="mussel", per="section")


def test_orders_and_places() -> None:
    cells = np.array([[2, 1], [1, 3], [2, 0]])
    tiles = in_file_order(np.eye(3, dtype=np.float32), cells * 512, 512)

    def placed(**changes: Any) -> list[list[int]]:
        return tiles_as(tiles, replace(DEFAULT, **changes)).cells.tolist()

    assert placed() == [[2, 0], [2, 1], [1, 3]]
    assert placed(order="file") == placed(order="file", places="pitch") == cells.tolist()
    assert placed(order="column-major") == [[1, 3], [2, 0], [2, 1]]
    assert placed(order="file", places="level0") == (2 * cells).tolist()
    assert placed(order="file", places="unit") == (cells / [3, 4] * 1000 // 256).tolist()
    assert placed(order="file", places="swapped") == cells[:, ::-1].tolist()
    assert placed(order="file", places="none") == [[0, 0]] * 3
    far = in_file_order(np.eye(3, dtype=np.float32), cells * 512 + 60_000, 512)
    assert tiles_as(far, replace(DEFAULT, half_places=True)).cells.tolist() != far.cells.tolist()
    with pytest.raises(ValueError, match="float16"):
        wide = in_file_order(np.eye(3, dtype=np.float32), cells * 51200, 51200)
        tiles_as(wide, replace(DEFAULT, half_places=True))
