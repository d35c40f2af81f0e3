"""What a LongNet encoder is made of, in numbers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


def optimal_segment_lengths(max_wsi_size: int = 262144, tile_size: int = 256) -> tuple[int, ...]:
    """The five segment lengths of the released models, in tokens.

    They are the whole parts of five points spaced evenly in log2 between 1024 and the largest power of two that is
    not above the number of tiles in a square slide of `max_wsi_size` pixels (262144 gives 1024, 5792, 32768, 185363
    and 1048576).

    Args:
        max_wsi_size: side of the largest slide, in pixels at the level of the tiles.
        tile_size: side of a tile, in the same pixels.
    """
    tiles = (int(max_wsi_size) // int(tile_size)) ** 2
    if tiles < 1:
        raise ValueError(
            f"optimal_segment_lengths: expected max_wsi_size of at least one tile, got {max_wsi_size} pixels at a tile "
            f"size of {tile_size}. Give both in the same pixels."
        )
    last = tiles.bit_length() - 1
    return tuple(int(2.0 ** (10 + (last - 10) * i / 4)) for i in range(5))


def parse_lengths(lengths: str | Sequence[int]) -> tuple[int, ...]:
    """Read segment lengths such as "[1024, 5792]" or a sequence of whole numbers; no code in the string is run."""
    if isinstance(lengths, str):
        if not re.fullmatch(r"\s*[\[(]?\s*\d+(\s*,\s*\d+)*\s*,?\s*[\])]?\s*", lengths):
            raise ValueError(
                f"segment lengths: expected whole numbers such as '[1024, 5792]', got {lengths!r}. "
                "Return them from get_optimal_segment_length in that form."
            )
        return tuple(int(number) for number in re.findall(r"\d+", lengths))
    return tuple(int(length) for length in lengths)


@dataclass(frozen=True)
class LongNetConfig:
    """Sizes and rates of a LongNet encoder; the defaults are those of the released models.

    Branch i of the dilated attention has segments of `segment_lengths[i]` tokens and dilation `dilations[i]`.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 16
    ffn_ratio: int = 4
    segment_lengths: tuple[int, ...] = (1024, 5792, 32768, 185363, 1048576)
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16)
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"LongNetConfig: expected a width that {self.num_heads} heads divide, got embed_dim {self.embed_dim}. "
                "Choose a multiple of the heads."
            )
        if not self.segment_lengths or len(self.segment_lengths) != len(self.dilations):
            raise ValueError(
                f"LongNetConfig: expected one dilation per segment length, got segments {self.segment_lengths} and "
                f"dilations {self.dilations}. Give as many of the one as of the other."
            )
        if min(*self.segment_lengths, *self.dilations, math.inf) < 1:
            raise ValueError(
                f"LongNetConfig: expected segment lengths and dilations of at least 1, got {self.segment_lengths} and "
                f"{self.dilations}. Check the slide and tile sizes that they derive from."
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """(segment length, dilation) of each branch."""
        return tuple(zip(self.segment_lengths, self.dilations, strict=True))

    def drop_path(self, layer: int) -> float:
        """The rate of layer 0..depth-1: it grows linearly from 0 to `drop_path_rate`."""
        return self.drop_path_rate * layer / max(self.depth - 1, 1)
