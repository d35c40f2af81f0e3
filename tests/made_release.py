"""A release of two small encoders: a ViT and a LongNet of twelve layers in the released layouts, with files, recorded
hashes, a demo tile and its vector, all made on the spot."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import register_model
from weights_recipe import fill

from gigapath import tile_architectures, tile_encoder, weights
from gigapath.files import digest_of, sha256_of
from gigapath.releases import DOWNLOADS, RELEASES, RemoteFile
from gigapath.slide_encoder import LongNetViT
from gigapath.tile_encoder import load_tile_encoder

TILE_ARCH, SLIDE_ARCH, WIDTH = "made_tile_enc", "made_slide_enc12l32d", 48


@register_model
def made_slide_enc12l32d(**kwargs: object) -> LongNetViT:
    """Twelve layers of width 32, 16 heads."""
    names = ("in_chans", "global_pool")
    return LongNetViT(**{name: kwargs[name] for name in names if name in kwargs}, embed_dim=32, depth=12, dropout=0.0)


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def made_release(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the small pair in the place of `gigapath`, with its own recorded hashes; the folder of its files.

    `pytorch_model.bin`, `slide_encoder.pth`, and `images/` with the demo tile and its vector.
    """
    size = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
    monkeypatch.setitem(tile_architectures.SIZES, TILE_ARCH, size)
    tile = fill(tile_encoder.create_model("", TILE_ARCH))
    with torch.no_grad():
        tile.pos_embed.zero_()
        tile.patch_embed.proj.weight.mul_(3)
        for name, parameter in tile.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
    slide = fill(timm.create_model(SLIDE_ARCH, pretrained=False, in_chans=WIDTH))
    torch.save(tile.state_dict(), folder / "pytorch_model.bin")
    torch.save({"model": slide.state_dict()}, folder / "slide_encoder.pth")
    monkeypatch.setitem(weights._MARKS["tile"], TILE_ARCH, _shapes(tile.state_dict()))
    monkeypatch.setitem(weights._MARKS["slide"], SLIDE_ARCH, _shapes(slide.state_dict()))
    release = dataclasses.replace(
        RELEASES["gigapath"],
        tile_sha256=sha256_of(folder / "pytorch_model.bin"),
        slide_sha256=sha256_of(folder / "slide_encoder.pth"),
        tile_arch=TILE_ARCH,
        slide_arch=SLIDE_ARCH,
        tile_dim=WIDTH,
    )
    monkeypatch.setitem(RELEASES, "gigapath", release)
    _make_demo(folder, monkeypatch)
    return folder


def _make_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (20, 20, 3), np.uint8)
    tile = np.asarray(Image.fromarray(coarse).resize((128, 128), Image.Resampling.NEAREST))
    Image.fromarray(tile).save(images / "prov_normal_000_1.png")
    vector = load_tile_encoder(str(folder / "pytorch_model.bin")).encode(tile[None])[0]
    torch.save(torch.from_numpy(vector), images / "prov_normal_000_1.pt")
    record_demo(folder, monkeypatch)


def record_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the demo tile's two files, as they are now, for the released ones."""
    files = tuple(
        RemoteFile(file.file, file.source, digest=digest_of(folder / file.file, "git"))
        for file in DOWNLOADS["demo-tile"].files
    )
    monkeypatch.setitem(DOWNLOADS, "demo-tile", dataclasses.replace(DOWNLOADS["demo-tile"], files=files))
