"""Encoders of a few thousand parameters, for tests of everything around them."""

import mean_colour
import torch
from torch import Tensor, nn

from gigapath.embedding.slide_encoding import SlideEncoder
from gigapath.slide_encoder import LongNetViT
from gigapath.tile_encoder import TileEncoder
from gigapath.tile_transform import TileTransform

WIDTH = 24


def tiny_tile_encoder(
    name: str = "tiny", *, width: int = WIDTH, precision: str = "fp32", sha256: str = "5e" * 32, trained: bool = True
) -> TileEncoder:
    """A convolution and a pooling with fixed weights: tells tiles apart, and costs next to nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, width, 8, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(4 * width, width))
    return TileEncoder(
        name=name,
        embed_dim=width,
        trained=trained,
        weights_sha256=sha256,
        transform=TileTransform(64, 56, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        description="a tiny encoder for tests",
        device=torch.device("cpu"),
        precision=precision,
        model=model.eval().requires_grad_(False),
    )


class MeanColourEncoder(TileEncoder):
    """The runs' form of `mean_colour.colours`: no operation of torch's takes part."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(mean_colour.colours(pixels.numpy()))


def mean_colour_encoder() -> TileEncoder:
    """A tile's vector is the mean and the spread of its colours; costs nothing, and says where its pixels went."""
    return MeanColourEncoder(
        name=mean_colour.NAME,
        embed_dim=mean_colour.WIDTH,
        trained=True,
        weights_sha256="c0" * 32,
        transform=TileTransform(64, 56, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        description="mean colours, for tests",
        device=torch.device("cpu"),
        precision="fp32",
        model=nn.Identity(),
    )


def tiny_longnet(in_chans: int = WIDTH, *, global_pool: bool = True) -> LongNetViT:
    """A LongNet of two layers, filled from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LongNetViT(in_chans=in_chans, embed_dim=32, depth=2, global_pool=global_pool)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def tiny_slide_encoder(in_chans: int = WIDTH, *, tile_encoder: str | None = None) -> SlideEncoder:
    """The tiny LongNet as the runs take it."""
    return SlideEncoder(
        name="tinynet",
        trained=True,
        weights_sha256="a7" * 32,
        tile_encoder=tile_encoder,
        description="a tiny slide encoder for tests",
        device=torch.device("cpu"),
        precision="fp32",
        model=tiny_longnet(in_chans),
    )
