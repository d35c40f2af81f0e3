"""What callers reach inside the slide encoder: hooks, replaced parts, segments, positions."""

from functools import partial

import pytest
import torch
from narrow_longnet import NarrowLongNet, made_tiles, narrow_model
from torch import nn
from weights_recipe import fill

from gigapath.pos_embed import get_2d_sincos_pos_embed
from gigapath.slide_encoder import LongNetViT


def test_hooks_on_the_projections_fire_in_inference_and_see_whole_slides() -> None:
    model = narrow_model()
    x, coords = made_tiles(2, 30)
    with torch.inference_mode():
        expected = model(x, coords)[0]
        seen = {}
        for layer, module in enumerate(model.encoder.layers):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                module_of = getattr(module.self_attn, name)
                module_of.register_forward_hook(
                    lambda module, args, out, key=(layer, name): seen.update({key: (out, out.clone())})
                )
        assert (model(x, coords)[0] - expected).abs().max() <= 1e-6
    assert len(seen) == 8 and all(out.shape == (2, 31, 32) for out, _ in seen.values())
    assert all(torch.equal(out, then) for out, then in seen.values())  # nothing writes into what a hook kept
    attention = model.encoder.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim) == (16, 2)


@pytest.mark.parametrize(
    "part", ["", "self_attn", "self_attn.inner_attn_ln", "self_attn_layer_norm", "ffn", "ffn.fc1", "ffn.ffn_layernorm",
             "final_layer_norm"],
)  # fmt: skip
def test_hooks_on_any_part_see_whole_tensors_that_stay_as_they_were(part) -> None:
    model = narrow_model()
    x, coords = made_tiles(1, 300)
    kept = []

    def keep(module, args, given, out):
        out, x = out[0] if isinstance(out, tuple) else out, given.get("query", *args)
        kept.append((x, x.clone(), out, out.clone()))

    with torch.inference_mode():
        expected = model(x, coords)[0]
        for layer in model.encoder.layers:
            layer.get_submodule(part).register_forward_hook(keep, with_kwargs=True)
        assert (model(x, coords)[0] - expected).abs().max() <= 1e-6
    assert len(kept) == 2 and all(before.shape[:2] == (1, 301) for before, *_ in kept)
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in kept)


def test_replaced_parts_are_called() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    x, coords = made_tiles(1, 30)
    for part in ("self_attn.q_proj", "self_attn.out_proj", "ffn.fc1", "ffn.fc2"):
        model = narrow_model()
        with torch.inference_mode():
            before = model(x, coords)[0]
            layer = model.encoder.layers[0]
            parent, name = part.split(".")
            setattr(layer.get_submodule(parent), name, Scaled(layer.get_submodule(part)))
            after = model(x, coords)[0]
        with_grad = model(x, coords)[0]
        assert (after - before).abs().max() > 1e-4, part
        assert (after - with_grad).abs().max() <= 1e-5, part


def test_encoder_answers_with_a_dict_and_layers_with_a_pair() -> None:
    model = narrow_model()
    tokens = torch.randn(2, 30, 32)
    given = tokens.clone()
    with torch.inference_mode():
        answer = model.encoder(src_tokens=None, token_embeddings=tokens, return_all_hiddens=True)
        x = tokens
        for i, layer in enumerate(model.encoder.layers):
            assert torch.equal(answer["encoder_states"][i], x)
            x, second = layer(x, encoder_padding_mask=None)
            assert second is None
        assert torch.equal(answer["encoder_states"][-1], x)
        assert torch.equal(answer["encoder_out"], model.encoder.layer_norm(x))
        assert model.encoder(token_embeddings=tokens)["encoder_states"] == []
    assert torch.equal(tokens, given)
    assert model.encoder.num_layers == len(model.encoder.layers) == 2
    with pytest.raises(ValueError, match="encoder_padding_mask"):
        model.encoder(token_embeddings=tokens, encoder_padding_mask=torch.ones(2, 30))


@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_takes_embeddings_of_any_strides(autocast) -> None:
    encoder, tokens = narrow_model().encoder, torch.randn(30, 2, 32).transpose(0, 1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = (encoder(token_embeddings=x)["encoder_out"] for x in (tokens, tokens.contiguous()))
    assert torch.equal(found, expected)


def test_subclasses_may_change_positions_and_segments() -> None:
    class Shifted(NarrowLongNet):
        def coords_to_pos(self, coords, tile_size=256):
            return super().coords_to_pos(coords, tile_size) + 1

    model, x, coords = narrow_model(), *made_tiles(1, 30)
    shifted = fill(Shifted(in_chans=12, embed_dim=32, depth=2)).eval()
    with torch.no_grad():
        moved = coords + torch.tensor([0, 256])
        assert (shifted(x, coords)[0] - model(x, moved)[0]).abs().max() <= 1e-6


def test_positions_follow_the_model_for_who_writes_the_forward_pass_anew() -> None:
    class Own(NarrowLongNet):
        """The published pass: every part on the device and in the dtype of the model, the positions too."""

        def forward(self, x, coords):
            x = self.patch_embed(x) + self.pos_embed[:, self.coords_to_pos(coords, self.tile_size), :].squeeze(0)
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1, :]).expand(len(x), -1, -1), x], dim=1)
            return [self.norm(self.encoder(src_tokens=None, token_embeddings=x)["encoder_out"])[:, 0]]

    x, coords = made_tiles(2, 30)
    own, model = fill(Own(in_chans=12, embed_dim=32, depth=2)).eval(), narrow_model()
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16, torch.float64):
            found, expected = own.to(dtype)(x.to(dtype), coords)[0], model.to(dtype)(x.to(dtype), coords)[0]
            assert found.dtype == dtype
            assert (found - expected).abs().max() <= (5e-3 if dtype == torch.float16 else 1e-5)
    assert nn.Sequential(own).to("meta")[0].pos_embed[:, :1, :].device.type == "meta"
    for moved in (own, model.to("meta")):  # loading without a copy moves and converts, too
        moved.load_state_dict(fill(narrow_model()).half().state_dict(), assign=True)
        assert (moved(x.half(), coords)[0] - expected).abs().max() <= 5e-3
        assert moved.pos_embed[:, [0, 3], :].dtype == torch.float16
    model.to("meta")
    for name, weight in fill(narrow_model()).state_dict().items():  # and so does accelerate
        part, _, last = name.rpartition(".")
        setattr(model.get_submodule(part), last, nn.Parameter(weight))
    assert (model(x.float(), coords)[0] - expected).abs().max() <= 5e-3


def test_arrays_in_place_of_tensors_are_one_sentence() -> None:
    (x, coords), model = made_tiles(2, 30), narrow_model()
    for call, name in (
        (lambda: model(x.numpy(), coords), "x"),
        (lambda: model(x, coords.tolist()), "coords"),
        (lambda: model(x, coords, valid_mask=coords[..., 0].numpy() >= 0), "valid_mask"),
        (lambda: model.forward_packed(x[0].numpy(), coords[0], [30]), "x"),
    ):
        with pytest.raises(TypeError, match=rf"expected a tensor as {name}, got .*torch\.as_tensor"):
            call()


def test_segments_come_from_the_method_that_callers_replace(monkeypatch) -> None:
    monkeypatch.setattr(LongNetViT, "get_optimal_segment_length", lambda self, max_wsi_size, tile_size: "[4, 16, 64]")
    model = LongNetViT(in_chans=12, embed_dim=32, depth=1)
    assert model.encoder.config.branches == ((4, 1), (16, 2), (64, 4))
    monkeypatch.setattr(LongNetViT, "get_optimal_segment_length", lambda *_: "[__import__('os').getpid(), 1]")
    with pytest.raises(ValueError, match="segment lengths"):
        LongNetViT(in_chans=12, embed_dim=32, depth=1)
    monkeypatch.undo()
    model = LongNetViT(in_chans=12, embed_dim=32, depth=1)
    assert model.get_optimal_segment_length() == "[1024, 5792, 32768, 185363, 1048576]"
    assert model.get_optimal_segment_length(250000) == "[1024, 4870, 23170, 110217, 524288]"


def test_constructor_has_the_published_defaults_and_attributes() -> None:
    model = LongNetViT(embed_dim=32, depth=1)
    assert (model.tile_size, model.slide_ngrids, model.global_pool) == (256, 1000, False)
    assert model.patch_embed.proj.weight.shape == (32, 1536) and isinstance(model.norm, nn.LayerNorm)
    assert model.encoder.config.dropout == 0.25 and model.encoder.config.drop_path_rate == 0.1
    assert isinstance(model.encoder_name, str)
    assert LongNetViT(embed_dim=32, depth=1, norm_layer=partial(nn.LayerNorm, eps=1e-3)).norm.eps == 1e-3
    assert LongNetViT(embed_dim=32, depth=1, mlp_ratio=2.0).encoder.layers[0].ffn.fc1.out_features == 64
    assert (
        0.01 < float(model.cls_token.detach().std()) < 0.04
        and float(model.patch_embed.proj.bias.detach().abs().max()) == 0
    )


def test_positions_are_rows_of_the_published_table() -> None:
    model = narrow_model(slide_ngrids=20)
    table = torch.from_numpy(get_2d_sincos_pos_embed(32, 20, cls_token=True)).float()
    assert table.shape == (401, 32) and model.pos_embed.shape == (1, 401, 32)
    assert torch.equal(model.pos_embed[:, :, :][0], table)
    assert torch.equal(model.pos_embed[:, :1, :], torch.zeros(1, 1, 32))
    assert torch.equal(model.pos_embed[:, 1:, :][0], table[1:])
    coords = torch.tensor([[[0, 0], [511, 256], [256 * 19, 300]]])
    positions = model.coords_to_pos(coords)
    assert positions.dtype == torch.int64 and positions.tolist() == [[1, 1 * 20 + 1 + 1, 19 * 20 + 1 + 1]]
    assert torch.equal(model.pos_embed[:, positions, :], table[positions][None])
    assert model.coords_to_pos(coords, tile_size=512).tolist() == [[1, 1, 9 * 20 + 1]]
    assert not any("pos_embed" in name for name in model.state_dict())
    # the first half of a row tells gy, the second gx
    assert torch.equal(table[1 + 3 * 20 + 5][:16], table[1 + 7 * 20 + 5][:16])
    assert torch.equal(table[1 + 3 * 20 + 5][16:], table[1 + 3 * 20 + 9][16:])
    assert get_2d_sincos_pos_embed(32, 20).shape == (400, 32)
    with pytest.raises(IndexError, match="401"):
        model.pos_embed[:, torch.tensor([401]), :]


@pytest.mark.parametrize("training", [False, True])
def test_compiled_model_gives_the_same(training) -> None:
    model = narrow_model(global_pool=True).train(training)
    x, coords = made_tiles(1, 60)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.set_grad_enabled(training):
        expected, out = model(x, coords)[0], compiled(x, coords)[0]
    assert (out - expected).abs().max() <= 1e-5
    if training:
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in model.encoder.layers.parameters())
