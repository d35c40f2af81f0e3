"""The slide encoder as code written for the published one reaches into it: one test a form."""

import copy
import subprocess
import sys
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from narrow_longnet import NarrowLongNet, largest_difference, made_tiles, narrow_model
from torch import nn
from weights_recipe import fill

import gigapath
from gigapath.longnet.encoder import EncoderLayer
from gigapath.pos_embed import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
)
from gigapath.slide_encoder import LongNetViT
from gigapath.torchscale.model.LongNet import LongNetEncoderLayer, make_longnet_from_name


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_a_rollout_by_hooks_on_the_attention_sees_tuples_with_a_batch() -> None:
    model, (x, coords) = narrow_model(), made_tiles(1, 30)
    with torch.no_grad():
        expected = model(x, coords)[0]
    seen, handles = [], []
    for layer in model.encoder.layers:
        handles.append(layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output)))
    with torch.no_grad():
        assert (model(x, coords)[0] - expected).abs().max() <= 1e-6
    assert len(seen) == 2
    rollout = torch.eye(31)
    for output in seen:
        assert isinstance(output, tuple) and output[1] is None
        tokens = nn.functional.normalize(output[0][0], dim=-1)
        assert output[0].shape == (1, 31, 32)
        rollout = ((tokens @ tokens.T).softmax(-1) + torch.eye(31)) / 2 @ rollout
    assert rollout.shape == (31, 31) and torch.allclose(rollout.sum(-1), torch.ones(31))
    for handle in handles:
        handle.remove()
    # a hook's own answer takes the place of the attention's
    model.encoder.layers[0].self_attn.register_forward_hook(lambda module, args, output: (0 * output[0], None))
    with torch.no_grad():
        assert (model(x, coords)[0] - expected).abs().max() > 1e-3


def test_the_attention_is_called_with_the_published_keywords() -> None:
    layer, x = narrow_model().encoder.layers[0], torch.randn(2, 30, 32)
    nothing = {"key_padding_mask": torch.zeros(2, 30, dtype=torch.bool), "attn_mask": None, "rel_pos": None}
    with torch.no_grad():
        answer, weights = layer.self_attn(query=x, key=x, value=x, incremental_state=None, **nothing)
        assert answer.shape == (2, 30, 32) and weights is None
        assert torch.equal(layer.self_attn(x, x, x)[0], answer)
        # Products of another number of rows may be rounded otherwise.
        torch.testing.assert_close(layer.self_attn(x[1:], x[1:], x[1:])[0], answer[1:], rtol=1e-5, atol=1e-5)
        for one in ("query", "key", "value"):  # each goes through its own projection
            other = layer.self_attn(**{"query": x, "key": x, "value": x, one: x.flip(0)})[0]
            assert (other - answer).abs().max() > 1e-4
    for asked in ({"key_padding_mask": torch.ones(2, 30)}, {"attn_mask": x}, {"rel_pos": x}, {"is_causal": True}):
        with pytest.raises(ValueError, match=next(iter(asked))):
            layer.self_attn(x, x, x, **asked)


def published_forward(self, x, encoder_padding_mask, attn_mask=None, rel_pos=None,
                      multiway_split_position=None, incremental_state=None):  # fmt: skip
    """A layer's pass as those write it who put something of their own into it."""
    assert self.normalize_before and not self.is_moe_layer and multiway_split_position is None
    masks = {"attn_mask": attn_mask, "rel_pos": rel_pos, "incremental_state": incremental_state}
    for norm, part in (
        (self.self_attn_layer_norm, lambda x: self.self_attn(
            query=x, key=x, value=x, key_padding_mask=encoder_padding_mask, **masks)[0]),
        (self.final_layer_norm, self.ffn),
    ):  # fmt: skip
        before, x = x, part(norm(x))
        if part is not self.ffn:
            x = self.dropout_module(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x = self.residual_connection(x, before)
    return x, None


@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_forward_of_the_published_form_runs_forward_and_backward(training) -> None:
    model = narrow_model(drop_path_rate=0.1).train(training)
    if training:  # drops nothing, so that both can be compared
        for part in model.modules():
            part.drop_prob = part.p = 0.0
    replaced = copy.deepcopy(model)
    for layer in replaced.encoder.layers:
        layer.forward = MethodType(published_forward, layer)
    x, coords = made_tiles(2, 30)
    mask = torch.arange(30) < torch.tensor([[30], [17]])
    for given in ({}, {"valid_mask": mask}):  # of slides of several lengths it gets one at a time
        for one in (model, replaced):
            one.zero_grad()
            one(x, coords, **given)[0].square().sum().backward()
        with torch.no_grad():
            assert largest_difference(replaced(x, coords, **given), model(x, coords, **given)) <= 1e-5
        assert largest_difference(gradients(replaced), gradients(model)) <= 1e-3
    replaced.set_grad_checkpointing()
    replaced(x, coords, valid_mask=mask)[0].sum().backward()


def test_a_wrapped_attention_of_the_published_form_sees_one_slide_at_a_time() -> None:
    class Watching(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.shapes = inner, []

        def forward(
            self, query, key, value, key_padding_mask=None, attn_mask=None, rel_pos=None, incremental_state=None
        ):
            self.shapes.append(tuple(query.shape))
            return self.inner(query=query, key=key, value=value, key_padding_mask=key_padding_mask)

    model, (x, coords) = narrow_model(), made_tiles(2, 30)
    mask = torch.arange(30) < torch.tensor([[30], [17]])
    with torch.no_grad():
        expected = model(x, coords, valid_mask=mask)
        layer = model.encoder.layers[0]
        layer.self_attn = Watching(layer.self_attn)
        assert largest_difference(model(x, coords, valid_mask=mask), expected) <= 1e-5
        assert layer.self_attn.shapes == [(1, 31, 32), (1, 18, 32)]


def test_parts_that_are_patched_in_place_are_called() -> None:
    x, coords = made_tiles(1, 30)
    for part in ("self_attn", "self_attn.out_proj", "ffn", "ffn.fc1", "final_layer_norm"):
        model = narrow_model()
        with torch.no_grad():
            before = model(x, coords)[0]
            module = model.encoder.layers[1].get_submodule(part)
            calls, inner = [], module.forward
            module.forward = lambda *args, calls=calls, inner=inner, **given: (calls.append(1), inner(*args, **given))[
                1
            ]
            assert (model(x, coords)[0] - before).abs().max() <= 1e-5
        assert calls, part


def test_subclassed_layers_and_encoders_have_what_theirs_read() -> None:
    class Halved(LongNetEncoderLayer):
        def residual_connection(self, x, residual):
            return residual + x / 2

    model, (x, coords) = narrow_model(), made_tiles(1, 30)
    layer = model.encoder.layers[1]
    assert (layer.normalize_before, layer.is_moe_layer, layer.alpha) == (True, False, 1.0)
    assert (layer.embed_dim, layer.ffn_dim, layer.drop_path) == (32, 128, None)
    assert layer.dropout_module.p == 0 and isinstance(layer.final_layer_norm, nn.LayerNorm)
    assert (layer.self_attn.scaling, layer.self_attn.embed_dim) == (2**-0.5, 32)
    assert narrow_model(drop_path_rate=0.2).encoder.layers[1].drop_path.drop_prob == 0.2
    halved = Halved(layer.args, depth=1, is_moe_layer=False, is_encoder_decoder=False)
    halved.load_state_dict(layer.state_dict())
    with torch.no_grad():
        before = model(x, coords)[0]
        model.encoder.layers[1] = halved.eval()
        assert (model(x, coords)[0] - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="is_moe_layer"):
        EncoderLayer(layer.args, 0, True)


def test_the_encoder_takes_the_published_order_and_answers_with_its_keys() -> None:
    model, tokens = narrow_model(), torch.randn(2, 30, 32)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    with torch.no_grad():
        answer = model.encoder(None, mask, None, True, tokens)
        assert set(answer) == {"encoder_out", "encoder_embedding", "encoder_padding_mask", "encoder_states", "l_aux"}
        assert torch.equal(answer["encoder_embedding"], tokens) and torch.equal(answer["encoder_padding_mask"], mask)
        assert answer["l_aux"] == [None, None] and len(answer["encoder_states"]) == 3
        assert torch.equal(
            model.encoder(token_embeddings=tokens, features_only=True)["encoder_out"], answer["encoder_out"]
        )
        out = model.encoder.layers[0](tokens, mask, None, None, None, None)
    assert torch.equal(out[0], answer["encoder_states"][1]) and out[1] is None
    with pytest.raises(ValueError, match="encoder_padding_mask"):
        model.encoder.layers[0](tokens, ~mask)


def test_torchscale_has_the_names_that_public_code_imports() -> None:
    code = """
import sys
import numpy as np
import gigapath.torchscale
import gigapath.torchscale.architecture.config as cfg
cfg.np = np
sys.modules["torchscale"] = gigapath.torchscale
from torchscale.architecture.config import EncoderConfig
from torchscale.component.multiway_network import MultiwayWrapper, set_split_position
from torchscale.model import LongNetConfig
from torchscale.model.LongNet import LongNetEncoder, longnet_arch, make_longnet
assert vars(longnet_arch).keys() == vars(LongNetConfig).keys()
names = [name for name, sizes in vars(longnet_arch).items() if name.endswith("_dim") and isinstance(sizes, dict)]
assert len(names) >= 18 and hasattr(longnet_arch, "LongNet_12_layers_768_dim"), names
sizes = longnet_arch.LongNet_12_layers_512_dim
assert (sizes["encoder_attention_heads"], sizes["encoder_ffn_embed_dim"]) == (8, 1024)
encoder = LongNetEncoder(EncoderConfig(**longnet_arch.LongNet_test, flash_attention=True, moe_freq=0))
encoder.apply(set_split_position(3))
assert MultiwayWrapper(encoder.layers[0].args, encoder) is encoder
from types import SimpleNamespace
assert make_longnet(SimpleNamespace(arch="LongNet_test", dropout=0.3)).dropout_module.p == 0.3
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(gigapath.__file__).parents[1])


def test_encoders_that_longnet_is_not_are_refused() -> None:
    from gigapath.torchscale.architecture.config import EncoderConfig
    from gigapath.torchscale.component.multiway_network import MultiwayWrapper

    assert EncoderConfig(subln=True, multiway=False, vocab_size=-1).ffn_ratio == 4
    for other in (
        {"subln": False},
        {"deepnorm": True},
        {"encoder_ffn_embed_dim": 1000},
        {"encoder_normalize_before": False},
    ):
        with pytest.raises(ValueError, match=next(iter(other))):
            EncoderConfig(**other)
    with pytest.raises(ValueError, match="multiway"):
        MultiwayWrapper(type("Args", (), {"multiway": True}), nn.Identity())
    with pytest.raises(ValueError, match="LongNet_12_layers_768_dim"):
        make_longnet_from_name("LongNet_5_layers_99_dim")


def test_lora_by_peft_trains_its_matrices_alone() -> None:
    peft = pytest.importorskip("peft")
    model, (x, coords) = narrow_model(), made_tiles(2, 30)
    with torch.no_grad():
        before = model(x, coords)[0]
    names = ["q_proj", "v_proj", "out_proj", "fc1"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=names))
    with torch.no_grad():
        assert (tuned(x, coords)[0] - before).abs().max() <= 1e-6  # starts as the model itself
    optimizer = torch.optim.SGD([part for part in tuned.parameters() if part.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B alone, which starts at zero
        optimizer.zero_grad()
        tuned(x, coords)[0].square().sum().backward()
        optimizer.step()
    trained = {name for name, part in tuned.named_parameters() if part.grad is not None and part.grad.abs().sum() > 0}
    assert len(trained) == 2 * len(names) * 2 and all("lora_" in name for name in trained)
    mask = torch.arange(30) < torch.tensor([[30], [17]])
    with torch.no_grad():
        after = tuned.eval()(x, coords)[0]
        assert after.shape == (2, 32) and (after - before).abs().max() > 1e-3
        alone = tuned(x[1:, :17], coords[1:, :17])[0]
        assert (tuned(x, coords, valid_mask=mask)[0][1:] - alone).abs().max() <= 1e-5
        assert (tuned.merge_and_unload()(x, coords)[0] - after).abs().max() <= 1e-4


def test_a_longnet_of_ones_own_takes_its_own_positions() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(12, 192)
            self.places = nn.Linear(2, 192)
            self.cls = nn.Parameter(torch.zeros(1, 1, 192))
            self.longnet = make_longnet_from_name("LongNet_test", "[1, 2]", "[8, 32]", drop_path_rate=0.0, dropout=0.0)

        def forward(self, x, coords):
            x = self.project(x) + self.places(coords / 10240)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
            return self.longnet(src_tokens=None, token_embeddings=x)["encoder_out"]

    torch.manual_seed(0)
    model, (x, coords) = Own(), made_tiles(2, 30)
    assert model.longnet.config.branches == ((8, 1), (32, 2)) and model.longnet.layers[0].self_attn.num_heads == 8
    out = model(x, coords)
    assert out.shape == (2, 31, 192)
    out.relu().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in model.parameters() if part.ndim > 1)


@pytest.mark.parametrize("how", ["parameter", "buffer"])
def test_a_slide_encoder_takes_a_table_of_positions_in_place_of_ours(how) -> None:
    class Tabled(NarrowLongNet):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            table = torch.randn(self.pos_embed.shape, generator=torch.Generator().manual_seed(1))
            if how == "parameter":
                self.pos_embed = nn.Parameter(table)
            else:
                self.register_buffer("pos_embed", table, persistent=False)

    ours = narrow_model(slide_ngrids=40)
    model = fill(Tabled(in_chans=12, embed_dim=32, depth=2, dropout=0.0, drop_path_rate=0.0, slide_ngrids=40)).eval()
    x, coords = made_tiles(2, 30)
    out = model(x, coords)[0]
    assert out.shape == (2, 32) and (out - ours(x, coords)[0]).abs().max() > 1e-3
    out.square().sum().backward()
    if how == "parameter":
        rows = model.coords_to_pos(coords).unique()
        assert (model.pos_embed.grad[0].abs().sum(-1) > 0).sum() == len(rows) + 1  # and the class token's
    else:
        assert "pos_embed" not in model.state_dict() and model.half().pos_embed.dtype == torch.float16


def test_the_table_of_positions_looks_like_a_tensor() -> None:
    table = narrow_model().pos_embed
    assert (table.ndim, table.dim(), table.numel(), table.requires_grad) == (3, 3, 1_000_001 * 32, False)
    table = narrow_model(slide_ngrids=7).pos_embed
    whole = table[:, :, :].clone()
    assert torch.equal(table[..., :3], whole[..., :3]) and torch.equal(table[..., 4:9, :], whole[..., 4:9, :])
    assert torch.equal(table[0, ..., 2], whole[0, ..., 2]) and torch.equal(table[...], whole)
    for refused in (None, (slice(None), torch.ones(50, dtype=torch.bool)), (0, 0, 0, 0)):
        with pytest.raises(IndexError, match="pos_embed"):
            table[refused]


def test_further_columns_of_coordinates_count_nothing() -> None:
    model, (x, coords) = narrow_model(), made_tiles(2, 30)
    more = torch.cat([coords, torch.full_like(coords, -7)], dim=-1)
    with torch.no_grad():
        expected = model(x, coords)[0]
        assert torch.equal(model(x, more)[0], expected)
        assert torch.equal(model(x[0], more[0, :, :3])[0], model(x[0], coords[0])[0])
        assert torch.equal(model.coords_to_pos(more), model.coords_to_pos(coords))
        packed = model.forward_packed(x.flatten(0, 1), more.flatten(0, 1), [30, 30])[0]
    assert (packed - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("width", "heads", "ffn"), [(256, 16, 1024), (512, 8, 1024), (768, 16, 3072), (1024, 16, 4096)]
)
def test_widths_have_their_published_heads_and_networks(width, heads, ffn) -> None:
    with torch.device("meta"):
        layer = LongNetViT(embed_dim=width, depth=1).encoder.layers[0]
    assert (layer.self_attn.num_heads, layer.ffn.fc1.out_features) == (heads, ffn)


def test_positions_of_any_grid_are_rows_of_the_table() -> None:
    rows, columns = np.meshgrid(np.arange(3), np.arange(3), indexing="ij")
    found = get_2d_sincos_pos_embed_from_grid(32, np.stack([columns, rows]))
    assert np.array_equal(found, get_2d_sincos_pos_embed(32, 3))
    assert np.array_equal(get_1d_sincos_pos_embed_from_grid(16, [0.0]), [[0.0] * 8 + [1.0] * 8])
    half = get_1d_sincos_pos_embed_from_grid(4, [0.5])[0]
    assert np.allclose(half, [np.sin(0.5), np.sin(0.005), np.cos(0.5), np.cos(0.005)])
