"""Encoding: full batches of one shape, streams into the file, all states of a slide in one pass, the pair rule."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_encoders import WIDTH, tiny_longnet, tiny_slide_encoder, tiny_tile_encoder

from gigapath.embedding.forward import encode_padded
from gigapath.embedding.slide_encoding import (
    load_slide_encoder,
    mean_of_rows,
    pooled_states,
    usual_slide_encoder,
)
from gigapath.features import SlideEmbeddings, TileEmbeddings
from gigapath.longnet.dilated import LARGEST_LAUNCH
from gigapath.progress import Stopped

Pixels = npt.NDArray[np.uint8]


def some_pixels(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)


def test_encode_padded_shows_the_encoder_one_shape_and_no_neighbour_changes_a_vector() -> None:
    encoder, pixels, seen = tiny_tile_encoder(), some_pixels(10), []
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    together = [encode_padded(pixels[first : first + 4], encoder, 4) for first in (0, 4, 8)]
    assert (seen, list(map(len, together))) == ([4, 4, 4], [4, 4, 2])
    alone = [encode_padded(tile[None], encoder, 4) for tile in pixels]
    assert np.concatenate(alone).tobytes() == np.concatenate(together).tobytes()


def some_embeddings(count: int = 7, width: int = WIDTH, dtype: type = np.float32) -> TileEmbeddings:
    rng = np.random.default_rng(3)
    cells = np.stack([np.arange(count) % 3, np.arange(count) // 3], axis=1).astype(np.int32)
    return TileEmbeddings(
        slide_id="s",
        features=rng.normal(size=(count, width)).astype(dtype),
        coords=cells.astype(np.int64) * 512,
        cells=cells,
        tile_size_level0=512.0,
    )


def test_pooled_states_equal_the_model_called_four_times() -> None:
    tiles = some_embeddings()
    features, coords = torch.from_numpy(tiles.features), torch.from_numpy(tiles.encoder_coords())
    states, default = pooled_states(tiny_longnet(), features, coords)
    assert states.shape == (3, 2, 32)
    for place, global_pool in enumerate((True, False)):
        model = tiny_longnet(global_pool=global_pool)
        expected = torch.cat(model(features, coords, all_layer_embed=True))
        torch.testing.assert_close(states[:, place], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(default[place][None], model(features, coords)[0], rtol=0, atol=1e-5)
    assert (states[:, 0] - states[:, 1]).abs().max() > 1e-2
    assert (states[-1] - default).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_as_the_model_does_and_sums_in_float32(dtype: torch.dtype) -> None:
    tiles = some_embeddings(40)
    features, coords = torch.from_numpy(tiles.features), torch.from_numpy(tiles.encoder_coords())
    model, seen = tiny_longnet(), []
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        states, default = pooled_states(
            model, features, coords, see_tokens=lambda state, tokens: seen.append(tokens.dtype)
        )
        assert set(seen) == {torch.float32}
        assert torch.equal(states[:, 0], torch.cat(model(features, coords, all_layer_embed=True)))
        assert torch.equal(default[:1], model(features, coords)[0])


def test_slide_encoder_gets_cells_times_256_whatever_the_slide_is_scanned_at() -> None:
    encoder, seen, tiles = tiny_slide_encoder(), [], some_embeddings()
    assert encoder.model is not None
    original = encoder.model.coords_to_pos
    encoder.model.coords_to_pos = lambda coords, size: (seen.append(coords), original(coords, size))[1]  # type: ignore[method-assign]
    arrays = encoder.embed(tiles)
    assert seen[0].tolist() == [(tiles.cells * 256).tolist()]  # type: ignore[operator]
    shapes = {"states_mean": (3, 32), "states_class": (3, 32), "default_mean": (1, 32), "default_class": (1, 32)}
    assert {name: value.shape for name, value in arrays.items()} == {**shapes, "tile_mean": (1, WIDTH)}
    np.testing.assert_allclose(arrays["tile_mean"][0], tiles.features.mean(0), atol=1e-6)


def test_slide_embeddings_that_overflow_half_precision_are_refused() -> None:
    tiles = dataclasses.replace(some_embeddings(), features=np.full((7, WIDTH), 6e4, np.float32))
    encoder = dataclasses.replace(tiny_slide_encoder(), precision="fp16")
    for work in (encoder.embed, encoder.embed_tiles):
        with pytest.raises(ValueError, match="--precision"):
            work(tiles)
    assert all(np.isfinite(value).all() for value in tiny_slide_encoder().embed(tiles).values())


@pytest.mark.parametrize("name", ["default", "default:tiles"])
def test_a_stop_is_heard_within_a_layer_and_asking_changes_no_number(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tiles, encoder = some_embeddings(3000), tiny_slide_encoder()
    news: list[str] = []

    def work(check: Callable[[], None]) -> Any:
        news.clear()
        given: dict[str, Any] = {"check": check, "progress": lambda done, layers: news.append(f"{done}/{layers}")}
        if name == "default":
            return encoder.embed(tiles, **given)["states_mean"]
        return encoder.embed_tiles(tiles, name, **given)

    asked = work(lambda: news.append("?"))
    first, second = news.index("1/2"), news.index("2/2")
    assert second - first > 20  # launches of the attention's branches, and parts of the rows
    assert np.array_equal(
        asked, encoder.embed(tiles)["states_mean"] if name == "default" else encoder.embed_tiles(tiles)
    )

    def stop() -> None:
        news.append("?")
        if len(news) > first + 5:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        work(stop)
    assert news[first] == "1/2" and len(news) == first + 6
    # Larger parts than a step are cut: no product of all rows, no launch of all heads.
    monkeypatch.setattr("gigapath.longnet.linear._STEP_ROWS", 500)
    monkeypatch.setitem(LARGEST_LAUNCH, "cpu", 1000 * 8 * 4)
    cut = work(lambda: news.append("?"))
    assert news.index("2/2") - news.index("1/2") > second - first + 4 * 6
    np.testing.assert_allclose(cut, asked, rtol=0, atol=1e-5)


def test_check_pair_knows_its_encoder_by_every_name_and_refuses_others() -> None:
    encoder = tiny_slide_encoder(tile_encoder="gigapath")
    released = "hf-hub:prov-gigapath/prov-gigapath"
    for name in ("gigapath", "prov-gigapath", "Prov-GigaPath", released, None):
        encoder.check_pair(name, WIDTH)
    for name in ("uni_v2", "hoptimus0", "gigapath-flash", "pytorch_model-00000000"):
        with pytest.raises(ValueError, match=f"expected embeddings of its own tile encoder, gigapath.*'{name}'"):
            encoder.check_pair(name, WIDTH)
    with pytest.raises(ValueError, match=f"expected tile embeddings of width {WIDTH}, got 7"):
        tiny_slide_encoder().check_pair("uni", 7)


def test_load_slide_encoder_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected gigapath, gigapath-flash, mean, none or the path"):
        load_slide_encoder("titan", in_chans=8)
    weights = tmp_path / "other.pth"
    torch.save({"head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match=r"other\.pth"):
        load_slide_encoder(str(weights), in_chans=8)
    with pytest.raises(ValueError, match="expected the name of a slide encoder"):
        load_slide_encoder(str(weights), in_chans=8, random_weights=True)


def test_random_slide_encoder_says_so_and_is_the_same_every_time() -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = (load_slide_encoder("gigapath-flash", in_chans=12, random_weights=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.name == "gigapath-flash-random"
    assert not first.trained
    assert "UNTRAINED" in first.description
    assert first.tile_encoder is None
    assert first.model is not None
    assert second.model is not None
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_mean_has_no_model_and_sums_in_float64() -> None:
    assert set(load_slide_encoder("mean", in_chans=5).embed(some_embeddings())) == {"tile_mean"}
    features = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float16) + np.float16(500)
    np.testing.assert_array_equal(mean_of_rows(features), features.astype(np.float64).mean(0).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "width"),
    [("default:tiles", 32), ("last-state:tiles", 32), ("state:0:tiles", 32), ("all-states:tiles", 96)],
)
def test_mean_of_vectors_of_tiles_is_the_slides_vector(name: str, width: int) -> None:
    encoder, tiles = tiny_slide_encoder(), some_embeddings()
    vectors = encoder.embed_tiles(tiles, name)
    assert vectors.shape == (len(tiles), width)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert encoder.model is not None
    pooled = encoder.model.norm(torch.from_numpy(vectors).reshape(len(tiles), -1, 32).mean(0)).numpy().reshape(-1)
    slide = SlideEmbeddings(slide_id="s", **encoder.embed(tiles))
    for wrong, words in (("default", "expected a name that ends with :tiles"), ("state:3:tiles", "a state of 0 to 2")):
        with pytest.raises(ValueError, match=words):
            encoder.embed_tiles(tiles, wrong)
    np.testing.assert_allclose(pooled, slide.select(name.replace("tiles", "mean")), atol=1e-5)


@pytest.mark.parametrize(
    ("tiles", "trained", "untrained"),
    [
        ("gigapath-flash", "gigapath-flash", "gigapath-flash"),
        ("gigapath-flash-random", "mean", "gigapath-flash"),
        ("standin", "mean", "gigapath"),
        ("Prov-GigaPath", "gigapath", "gigapath"),
        (None, "mean", "gigapath"),
    ],
)
def test_slide_encoder_that_nobody_names_is_the_pair_of_the_tiles(
    tiles: str | None, trained: str, untrained: str
) -> None:
    assert usual_slide_encoder(tiles, random_weights=False) == trained
    assert usual_slide_encoder(tiles, random_weights=True) == untrained
