"""Where the slide encoder looks: the exact attention of its layers, and rollout, a heuristic over all of them.

N tiles of a slide, T = N + 1 tokens (the class token first), H heads, B branches. Layers count from 1: layer i makes
state i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.longnet.readout import AttentionWeights, read_attention
from gigapath.slide_encoder import LongNetViT

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """The attention of one layer from the chosen query.

    `tiles` (H, N), `class_token` (H,) and `zero_keys` (H,) add up to 1 in every head as they are; the zero keys are
    those of padding, whose value is zero. `branches` (H, B) is the weight of each branch.
    """

    layer: int
    tiles: Float64
    class_token: Float64
    zero_keys: Float64
    branches: Float64


@dataclass(frozen=True, eq=False)
class Rollout:
    """Attention followed through all layers: `tiles` (N,), `class_token`, and `zero_keys`, what was lost on padding."""

    tiles: Float64
    class_token: float
    zero_keys: float


def encoder_attention(
    model: LongNetViT, features: Tensor, coords: Tensor, *, query: str | int = "pooled", layers: Sequence[int] = ()
) -> list[LayerAttention]:
    """The exact attention of the slide encoder's layers, read while the encoder runs as it always does.

    Args:
        model: the slide encoder, in eval mode.
        features: tile embeddings (N, D).
        coords: (N, 2) (x, y) in pixels of which the model's `tile_size` make a cell.
        query: "pooled" for the mean over the tiles' tokens, "class" for the class token, or the number of a tile.
        layers: which, from 1; the last when empty.

    Raises:
        ValueError: a layer or a tile that is not there.
    """
    wanted = check_layers(model, layers)
    share = query_shares(query, len(features)).to(features.device)
    found: dict[int, LayerAttention] = {}

    def read(number: int, x: Tensor) -> None:
        weights = _weights(model, number, x, share)
        tokens = weights.tokens.cpu().numpy().astype(np.float64)
        found[number] = LayerAttention(
            number,
            tokens[:, 1:],
            tokens[:, 0],
            weights.zero_keys.cpu().numpy().astype(np.float64),
            weights.branches.cpu().numpy().astype(np.float64),
        )

    _run(model, features, coords, wanted, read)
    return [found[number] for number in wanted]


def rollout(model: LongNetViT, features: Tensor, coords: Tensor, *, query: str | int = "pooled") -> Rollout:
    """Attention rollout (Abnar and Zuidema 2020): in each layer the mean over heads and the residual path count half
    each, and the layers are multiplied. A heuristic: values, norms and the feed-forward network are left out.

    The encoder's layers are gone through backwards with one row of weights, never with a T x T matrix. The inputs of
    all layers are kept for it: depth * T * D numbers. Arguments as in `encoder_attention`.
    """
    inputs: dict[int, Tensor] = {}
    _run(model, features, coords, range(1, model.depth + 1), inputs.__setitem__)
    share = query_shares(query, len(features)).to(features.device)
    lost = 0.0
    for number in range(model.depth, 0, -1):
        with torch.inference_mode():
            weights = _weights(model, number, inputs.pop(number), share)
        share = share.to(weights.tokens)
        lost += 0.5 * float(weights.zero_keys.mean())
        share = 0.5 * share + 0.5 * weights.tokens.mean(0)
    tokens = share.cpu().numpy().astype(np.float64)
    return Rollout(tokens[1:], float(tokens[0]), lost)


def check_layers(model: LongNetViT, layers: Sequence[int]) -> list[int]:
    """The layers asked for, the last when none is; ValueError where there is no such one."""
    for layer in layers:
        if not 1 <= layer <= model.depth:
            raise ValueError(f"--layer: expected layers 1 to {model.depth}, got {layer}.")
    return list(dict.fromkeys(layers)) or [model.depth]


def query_shares(query: str | int, tiles: int) -> Tensor:
    """(T,) float64, how much each token counts as a query."""
    share = torch.zeros(tiles + 1, dtype=torch.float64)
    if query == "pooled":
        share[1:] = 1 / tiles
    elif query == "class":
        share[0] = 1
    elif isinstance(query, int) and 0 <= query < tiles:
        share[query + 1] = 1
    else:
        raise ValueError(f"--tile: expected a tile from 0 to {tiles - 1}, got {query!r}.")
    return share


def _weights(model: LongNetViT, number: int, x: Tensor, share: Tensor) -> AttentionWeights:
    """The attention of layer `number` on its input x (1, T, D)."""
    layer: Any = model.encoder.layers[number - 1]
    q, k, _ = layer.self_attn.project(layer.self_attn_layer_norm(x))
    return read_attention(q, k, layer.self_attn.branches, share)


def _run(model: LongNetViT, features: Tensor, coords: Tensor, layers: Sequence[int], see: Any) -> None:
    """Run the encoder and show `see(number, input (1, T, D))` of the layers; their answers stay as they are."""
    hooks = [
        model.encoder.layers[number - 1].register_forward_pre_hook(
            lambda layer, args, number=number: see(number, args[0])
        )
        for number in layers
    ]
    try:
        with torch.inference_mode():
            model.forward_packed(features, coords, [len(features)])
    finally:
        for hook in hooks:
            hook.remove()
