"""Slide embeddings as other tools compute them: against vectors of their own code, and against restated calls."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_files import CELLS, make_features, write_foreign
from tiny_encoders import WIDTH, tiny_slide_encoder
from weights_recipe import fill

from gigapath.cli.main import main
from gigapath.embedding import slide_embedding
from gigapath.embedding.options import SlideEmbedOptions
from gigapath.embedding.slide_encoding import SlideEncoder
from gigapath.features import SlideEmbeddings, TileEmbeddings, read_features, read_slide, read_slides
from gigapath.features.cells import cells_of
from gigapath.features.slide_vectors import DEFAULT, RECIPES, Recipe, tiles_as
from gigapath.slide_encoder import LongNetViT, create_model
from scripts.referee_goldens import ARCH, PITCHES, made_tiles

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
    return dataclasses.replace(tiny_slide_encoder(), model=model)


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


def deep_encoder() -> SlideEncoder:
    """Twelve narrow layers, for there is a state 11 to take."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LongNetViT(in_chans=WIDTH, embed_dim=32, depth=12)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return dataclasses.replace(tiny_slide_encoder(), model=model.eval().requires_grad_(False))


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
        return tiles_as(tiles, dataclasses.replace(DEFAULT, **changes)).cells.tolist()

    assert placed() == [[2, 0], [2, 1], [1, 3]]
    assert placed(order="file") == placed(order="file", places="pitch") == cells.tolist()
    assert placed(order="column-major") == [[1, 3], [2, 0], [2, 1]]
    assert placed(order="file", places="level0") == (2 * cells).tolist()
    assert placed(order="file", places="unit") == (cells / [3, 4] * 1000 // 256).tolist()
    assert placed(order="file", places="swapped") == cells[:, ::-1].tolist()
    assert placed(order="file", places="none") == [[0, 0]] * 3
    far = in_file_order(np.eye(3, dtype=np.float32), cells * 512 + 60_000, 512)
    assert tiles_as(far, dataclasses.replace(DEFAULT, half_places=True)).cells.tolist() != far.cells.tolist()
    with pytest.raises(ValueError, match="float16"):
        wide = in_file_order(np.eye(3, dtype=np.float32), cells * 51200, 51200)
        tiles_as(wide, dataclasses.replace(DEFAULT, half_places=True))
