"""A slide encoder small enough for many calls, with several segments in few tokens."""

import torch
from torch import Tensor
from weights_recipe import fill

from gigapath.slide_encoder import LongNetViT


class NarrowLongNet(LongNetViT):
    """Segments of a few tokens; neither is a multiple of its dilation."""

    def get_optimal_segment_length(self, max_wsi_size: int = 262144, tile_size: int = 256) -> str:
        return "[8, 21, 50]"


def narrow_model(**kwargs) -> NarrowLongNet:
    """16 heads of width 2, two layers, weights by the goldens' recipe, no dropout, in eval mode."""
    options = {"in_chans": 12, "embed_dim": 32, "depth": 2, "dropout": 0.0, "drop_path_rate": 0.0, **kwargs}
    return fill(NarrowLongNet(**options)).eval()


def made_tiles(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tile embeddings (*shape, 12) and int64 coordinates (*shape, 2) in a 40 x 40 grid of 256 pixels."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 12, generator=random), torch.randint(0, 40, (*shape, 2), generator=random) * 256


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Over all entries of two lists of embeddings."""
    assert len(ours) == len(theirs)
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))
