"""Attention read out of the slide encoder: the weights are those that made its outputs, nothing renormalised."""

import math

import pytest
import torch
from narrow_longnet import NarrowLongNet, made_tiles, narrow_model
from torch import Tensor
from weights_recipe import fill

from gigapath.longnet import readout
from gigapath.longnet.dilated import dilated_attention
from gigapath.longnet.readout import read_attention
from gigapath.maps import encoder_attention, rollout
from gigapath.slide_encoder import LongNetViT

SMALL = ((8, 1), (21, 2), (50, 4))  # as NarrowLongNet: neither is a multiple of its dilation
RELEASED = ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16))
# Just below, at and above every segment border of the released models up to 6,000 tokens.
BORDERS = [n + d for n in (1024, 2048, 3072, 4096, 5120, 5792) for d in (-1, 0, 1)] + [6000]


def made_qkv(tokens: int, heads: int = 16, width: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    return 2 * torch.randn(3, tokens, heads, width, generator=random, dtype=torch.float64)


def one_query(tokens: int, at: int) -> Tensor:
    share = torch.zeros(tokens, dtype=torch.float64)
    share[at] = 1
    return share


def check_query(q: Tensor, k: Tensor, v: Tensor, branches, at: int, out: Tensor) -> None:
    """The weights of token `at` add up to 1 with the zero keys, per head, and make its attention output."""
    weights = read_attention(q, k, branches, one_query(len(q), at))
    assert (weights.total - 1).abs().max() <= 1e-6
    assert (weights.branches.sum(1) - 1).abs().max() <= 1e-6
    assert min(weights.tokens.min(), weights.zero_keys.min()) >= 0
    made = torch.einsum("ht,the->he", weights.tokens, v)
    assert (made - out[at]).abs().max() <= 1e-5


@pytest.mark.parametrize("tokens", range(1, 105))
def test_weights_add_up_and_make_the_output_around_every_small_border(tokens: int) -> None:
    q, k, v = made_qkv(tokens)
    out = dilated_attention(q, k, v, (tokens,), SMALL)
    borders = {b + d for w, _ in SMALL for b in range(0, tokens + 1, w) for d in (-1, 0, 1)}
    for at in sorted(at for at in borders | {tokens - 1} if 0 <= at < tokens):
        check_query(q, k, v, SMALL, at, out)


@pytest.mark.parametrize("tokens", [1023, 1024, 1025])
def test_weights_add_up_and_make_the_output_at_the_first_released_border(tokens: int) -> None:
    check_long(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", BORDERS[3:])
def test_weights_add_up_and_make_the_output_at_released_borders(tokens: int) -> None:
    check_long(tokens)


def check_long(tokens: int) -> None:
    q, k, v = made_qkv(tokens)
    out = dilated_attention(q, k, v, (tokens,), RELEASED)
    for at in {0, 1, 1022, 1023, 1024, tokens // 2, 5791, 5792, tokens - 2, tokens - 1}:
        if at < tokens:
            check_query(q, k, v, RELEASED, at, out)


def test_zero_keys_take_their_share_where_a_segment_is_not_full() -> None:
    q = torch.zeros(9, 2, 3)  # all scores 0: every key of a branch counts alike
    alone = read_attention(q, q, ((8, 1),), one_query(9, 8))  # token 8 alone in its segment of 8
    assert alone.zero_keys.tolist() == pytest.approx([7 / 8] * 2)
    assert alone.tokens[:, 8].tolist() == pytest.approx([1 / 8] * 2)
    assert float(alone.tokens[:, :8].max()) == 0


def test_the_mean_over_queries_is_the_mean_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "SCORE_BYTES", 4096)  # a few rows at a time
    tokens = 61
    q, k, v = made_qkv(tokens)
    mean = read_attention(q, k, SMALL, torch.full((tokens,), 1 / tokens, dtype=torch.float64))
    each = [read_attention(q, k, SMALL, one_query(tokens, at)) for at in range(tokens)]
    for name in ("tokens", "zero_keys", "branches"):
        whole = torch.stack([getattr(one, name) for one in each]).mean(0)
        assert (getattr(mean, name) - whole).abs().max() <= 1e-12
    out = dilated_attention(q, k, v, (tokens,), SMALL)
    assert (torch.einsum("ht,the->he", mean.tokens, v) - out.mean(0)).abs().max() <= 1e-9


def test_scores_are_laid_out_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rows = readout._rows
    monkeypatch.setattr(
        readout, "_rows", lambda *given: (seen.append(part.scores.nbytes) or part for part in rows(*given))
    )
    monkeypatch.setattr(readout, "SCORE_BYTES", 1 << 20)
    q, k, _ = made_qkv(4000)
    read_attention(q, k, RELEASED, torch.full((4000,), 1 / 4000))
    assert max(seen) <= 1 << 20
    assert sum(seen) > 100 << 20  # more than was ever held at once


def test_a_token_that_no_branch_reaches_attends_to_nothing() -> None:
    q, k, v = made_qkv(7, heads=2)
    weights = read_attention(q, k, ((7, 2),), one_query(7, 1))  # head 0 sees even positions, head 1 odd ones
    assert weights.total.tolist() == pytest.approx([0, 1])
    assert dilated_attention(q, k, v, (7,), ((7, 2),))[1, 0].abs().max() == 0


def attention_outputs(model: LongNetViT, tiles: Tensor, coords: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer, what goes into `inner_attn_ln`, and the values (T, H, E), as the encoder makes them."""
    outs: list[Tensor] = []
    values: list[Tensor] = []
    hooks = []
    for layer in model.encoder.layers:
        attention = layer.self_attn
        hooks.append(attention.inner_attn_ln.register_forward_pre_hook(lambda m, args: outs.append(args[0][0])))
        hooks.append(attention.v_proj.register_forward_hook(lambda m, args, out: values.append(out[0])))
    with torch.no_grad():
        model(tiles, coords)
    for hook in hooks:
        hook.remove()
    heads = model.encoder.config.num_heads
    return outs, [value.unflatten(-1, (heads, -1)) for value in values]


@pytest.mark.parametrize("tiles", [1, 6, 7, 8, 20, 21, 49, 50, 70])
@pytest.mark.parametrize("query", ["pooled", "class", 0])
def test_attention_of_the_encoder_makes_what_its_inner_norm_gets(tiles: int, query: str | int) -> None:
    model: NarrowLongNet = narrow_model().double()
    features, coords = made_tiles(tiles)
    features = features.double()
    outs, values = attention_outputs(model, features[None], coords[None])
    found = encoder_attention(model, features, coords, query=query, layers=(1, 2))
    assert [read.layer for read in found] == [1, 2]
    for read, out, v in zip(found, outs, values, strict=True):
        sums = read.tiles.sum(axis=1) + read.class_token + read.zero_keys
        assert abs(sums - 1).max() <= 1e-6
        weights = torch.from_numpy(read.tiles)
        made = torch.einsum("ht,the->he", weights, v[1:]) + torch.from_numpy(read.class_token)[:, None] * v[0]
        expected = {"pooled": out[1:].mean(0), "class": out[0]}.get(query, out[1])
        assert (made.flatten() - expected).abs().max() <= 1e-5


def test_reading_attention_leaves_the_encoder_as_it_is() -> None:
    model = narrow_model(global_pool=True)
    features, coords = made_tiles(30)
    with torch.no_grad():
        before = model(features, coords)[0]
        encoder_attention(model, features, coords, layers=(1, 2))
        after = model(features, coords)[0]
    assert torch.equal(before, after)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rollout_is_the_product_of_the_layers_matrices() -> None:
    model = narrow_model().double()
    features, coords = made_tiles(40)
    features = features.double()
    product = torch.eye(41, dtype=torch.float64)
    for layer in (1, 2):
        rows = []
        for query in ("class", *range(40)):
            read = encoder_attention(model, features, coords, query=query, layers=(layer,))[0]
            row = torch.from_numpy(read.tiles).mean(0)
            rows.append(torch.cat([torch.tensor([read.class_token.mean()]), row]))
        product = (0.5 * torch.eye(41) + 0.5 * torch.stack(rows)) @ product
    for query, row in (("class", product[0]), ("pooled", product[1:].mean(0)), (7, product[8])):
        found = rollout(model, features, coords, query=query)
        assert abs(torch.from_numpy(found.tiles) - row[1:]).max() <= 1e-9
        assert found.class_token == pytest.approx(float(row[0]))
        assert found.tiles.sum() + found.class_token + found.zero_keys == pytest.approx(1)


def test_a_layer_or_tile_that_is_not_there_is_named() -> None:
    model = narrow_model()
    features, coords = made_tiles(5)
    with pytest.raises(ValueError, match=r"layers 1 to 2, got 3"):
        encoder_attention(model, features, coords, layers=(3,))
    with pytest.raises(ValueError, match=r"a tile from 0 to 4, got 5"):
        encoder_attention(model, features, coords, query=5)
    with pytest.raises(ValueError, match="one slide"):
        read_attention(torch.zeros(4, 2, 3), torch.zeros(5, 2, 3), SMALL, torch.zeros(4))


@pytest.mark.slow
def test_every_head_of_a_released_encoder_adds_up_in_every_layer() -> None:
    model = fill(LongNetViT(in_chans=12, embed_dim=96, depth=12, dropout=0.0, drop_path_rate=0.0)).double().eval()
    features, coords = made_tiles(1500)
    found = encoder_attention(model, features.double(), coords, query="pooled", layers=range(1, 13))
    assert len(found) == 12
    for read in found:
        sums = read.tiles.sum(axis=1) + read.class_token + read.zero_keys
        assert abs(sums - 1).max() <= 1e-6
        assert read.zero_keys.min() > 0 and math.isclose(read.branches.sum(), 16)
