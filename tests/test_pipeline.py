"""The published functions of `gigapath.pipeline`, called as the published demo calls them."""

import csv
import inspect
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from fake_weights import flash_tile_checkpoint, slide_checkpoint
from made_slides import paint_tissue, write_pyramid
from PIL import Image
from tiny_encoders import tiny_longnet
from torch import nn

import gigapath
from gigapath.pipeline import (
    TileEncodingDataset,
    load_tile_encoder_transforms,
    load_tile_slide_encoder,
    run_inference_with_slide_encoder,
    run_inference_with_tile_encoder,
    tile_one_slide,
)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a slide, the folder of its tiles)."""
    folder = tmp_path_factory.mktemp("published")
    slide = write_pyramid(folder / "slide.svs", paint_tissue(1100, 800), mpp=(0.5, 0.5), steps=(1,), aperio=True)
    return slide, tile_one_slide(str(slide), save_dir=str(folder / "saved"), level=0)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """A convolution that tells tiles apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 24, 16, stride=16), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model.train()  # the function puts it into eval mode


def paths_of(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(path.name for path in folder.glob("*.png"))]


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (tile_one_slide, "slide_file='' save_dir='' level=0 tile_size=256"),
        (load_tile_encoder_transforms, ""),
        (load_tile_slide_encoder, "local_tile_encoder_path='' local_slide_encoder_path='' global_pool=False"),
        (run_inference_with_tile_encoder, "image_paths tile_encoder batch_size=128"),
        (run_inference_with_slide_encoder, "tile_embeds coords slide_encoder_model"),
        (TileEncodingDataset, "image_paths transform=None"),
    ],
)
def test_published_signatures(function: object, signature: str) -> None:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    found = [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in parameters
    ]
    assert " ".join(found) == signature


def test_pipeline_resolves_on_a_bare_import() -> None:
    assert gigapath.pipeline.tile_one_slide is tile_one_slide


def test_tile_one_slide_writes_tiles_that_equal_the_slide_at_their_coordinates(tiled: tuple[Path, Path]) -> None:
    slide, folder = tiled
    assert folder == slide.parent / "saved/output/slide.svs"
    with (folder / "dataset.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    with openslide.OpenSlide(slide) as opened:
        for row in rows:
            corner = int(row["tile_x"]), int(row["tile_y"])
            expected = np.asarray(opened.read_region(corner, 0, (256, 256)).convert("RGB"))
            found = np.asarray(Image.open(folder / f"{corner[0]:05d}x_{corner[1]:05d}y.png"))
            np.testing.assert_array_equal(found, expected)
    thumbnails = {path.name for path in (slide.parent / "saved/thumbnails").iterdir()}
    assert thumbnails == {f"slide.svs_{kind}.png" for kind in ("original", "roi", "roi_tiles")}


def test_dataset_gives_images_and_their_corners(tiled: tuple[Path, Path]) -> None:
    paths = paths_of(tiled[1])
    plain, transformed = (
        TileEncodingDataset(paths),
        TileEncodingDataset(paths, transform=load_tile_encoder_transforms()),
    )
    assert len(plain) == len(paths)
    assert plain[0]["img"].size == (256, 256)
    item = transformed[1]
    assert item["img"].shape == (3, 224, 224)
    assert item["coords"].dtype == torch.float32
    assert f"{int(item['coords'][0]):05d}x_{int(item['coords'][1]):05d}y.png" == paths[1].name


@pytest.mark.parametrize(
    ("name", "corner"),
    [
        ("00256x_00512y.png", [256, 512]),
        ("-0128x_-0064y.png", [-128, -64]),  # as symmetric padding gives them
        ("slide-00256x_00512y.png", [256, 512]),
        ("TCGA-01.-0128x_00512y.png", [-128, 512]),
    ],
)
def test_dataset_reads_a_sign_only_where_no_word_is_joined_by_it(name: str, corner: list[int], tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert TileEncodingDataset([tmp_path / name])[0]["coords"].tolist() == corner


def test_dataset_names_a_file_without_corners(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tile\.png"):
        TileEncodingDataset([tmp_path / "tile.png"])[0]


def test_tile_pass_gives_embeddings_and_coords_in_order(tiled: tuple[Path, Path], encoder: nn.Module) -> None:
    paths = [str(path) for path in paths_of(tiled[1])]
    outputs = run_inference_with_tile_encoder(paths, encoder, batch_size=4)
    assert outputs["tile_embeds"].shape == (len(paths), 24)
    assert outputs["coords"].dtype == torch.float32
    assert [f"{int(x):05d}x_{int(y):05d}y.png" for x, y in outputs["coords"]] == [Path(path).name for path in paths]
    assert not encoder.training
    alone = run_inference_with_tile_encoder(paths[2:3], encoder, batch_size=4)
    assert (outputs["tile_embeds"][1] - outputs["tile_embeds"][2]).abs().max() > 1e-3
    assert torch.equal(alone["tile_embeds"][0], outputs["tile_embeds"][2])
    images = [load_tile_encoder_transforms()(Image.open(path).convert("RGB")) for path in paths[:4]]
    with torch.no_grad():
        assert torch.equal(outputs["tile_embeds"][:4], encoder(torch.stack(images)))


def test_slide_pass_names_every_state(tiled: tuple[Path, Path], encoder: nn.Module) -> None:
    tiles = run_inference_with_tile_encoder(paths_of(tiled[1]), encoder)
    model = tiny_longnet(24, global_pool=False)
    outputs = run_inference_with_slide_encoder(slide_encoder_model=model, **tiles)
    assert list(outputs) == ["layer_0_embed", "layer_1_embed", "layer_2_embed", "last_layer_embed"]
    assert all(value.shape == (1, 32) for value in outputs.values())
    assert torch.equal(outputs["last_layer_embed"], outputs["layer_2_embed"])
    with torch.no_grad():  # as the function itself: a forward that keeps gradients rounds otherwise
        states = model(tiles["tile_embeds"], tiles["coords"], all_layer_embed=True)
    assert all(torch.equal(outputs[f"layer_{i}_embed"], state) for i, state in enumerate(states))
    batched = run_inference_with_slide_encoder(tiles["tile_embeds"][None], tiles["coords"][None], model)
    assert torch.equal(batched["layer_2_embed"], outputs["layer_2_embed"])


def test_tile_pass_without_tiles_says_so(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected paths of tiles, got none"):
        run_inference_with_tile_encoder([], encoder)


def test_load_tile_slide_encoder_takes_local_checkpoints_of_either_release(tiled: tuple[Path, Path]) -> None:
    tile_encoder, slide_encoder = load_tile_slide_encoder(
        local_tile_encoder_path=str(flash_tile_checkpoint()), local_slide_encoder_path=str(slide_checkpoint())
    )
    tiles = run_inference_with_tile_encoder(paths_of(tiled[1])[:3], tile_encoder, batch_size=3)
    assert tiles["tile_embeds"].shape == (3, 384)
    outputs = run_inference_with_slide_encoder(**tiles, slide_encoder_model=slide_encoder)
    assert list(outputs)[-2:] == ["layer_12_embed", "last_layer_embed"]
    assert outputs["layer_0_embed"].shape == (1, 384)


def test_load_tile_slide_encoder_never_makes_up_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file"):
        load_tile_slide_encoder(local_tile_encoder_path=str(tmp_path / "none.bin"))
