"""The slide encoder as its public callers use it, each written as the caller writes it."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from narrow_longnet import NarrowLongNet, largest_difference, made_tiles, narrow_model
from weights_recipe import fill

import gigapath
from gigapath import slide_encoder
from gigapath.slide_encoder import create_model

FLASH = "gigapath_slide_enc12l384d"


def test_readme_call_runs_with_squeeze(tmp_path) -> None:
    torch.save({"model": fill(create_model("", FLASH, 12, depth=2)).state_dict()}, tmp_path / "slide_encoder.pth")
    model = gigapath.slide_encoder.create_model(str(tmp_path / "slide_encoder.pth"), FLASH, 12, depth=2)
    model.eval()
    x, coords = made_tiles(1, 9)
    with torch.no_grad():
        assert model(x, coords).squeeze().shape == (384,)
        assert model(x, coords, all_layer_embed=True).squeeze().shape == (3, 384)


def test_answers_are_lists_of_states() -> None:
    model = narrow_model()
    x, coords = made_tiles(2, 30)
    with torch.no_grad():
        last, states = model(x, coords), model(x, coords, all_layer_embed=True)
        token = model(x, coords, True)[0]
    assert isinstance(last, list) and isinstance(states, list) and len(last) == 1 and len(states) == 3
    assert torch.cat(states).shape == (6, 32)
    assert (last[0] - states[-1]).abs().max() > 1e-3  # the default output has encoder.layer_norm, the states not
    assert torch.allclose(token, model.norm(model.cls_token[0]).expand(2, -1))  # state 0 is the input


def test_one_slide_may_come_without_batch() -> None:
    model = narrow_model(global_pool=True)
    x, coords = made_tiles(1, 30)
    with torch.no_grad():
        expected = model(x, coords)
        for form in (model(x[0], coords[0]), model(x, coords[0]), model(x[0], coords)):
            assert largest_difference(form, expected) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float32, torch.float64])
def test_coordinates_of_every_dtype_give_the_same(dtype) -> None:
    model = narrow_model(global_pool=True)
    x, coords = made_tiles(1, 30)
    with torch.no_grad():
        assert largest_difference(model(x, coords.to(dtype)), model(x, coords)) == 0


@pytest.mark.parametrize("size", [512, np.int64(512), np.int32(512), torch.tensor(512), 512.0])
def test_trident_assigns_the_tile_size_and_takes_state_11(size) -> None:
    model = fill(NarrowLongNet(in_chans=12, embed_dim=32, depth=12, global_pool=True)).eval()
    x, coords = made_tiles(1, 25)
    with torch.inference_mode():
        expected = model(x, coords, all_layer_embed=True)[11]
        model.tile_size = size
        level0 = coords * 2 + 1  # int64, at level 0 of a 40x slide
        assert torch.equal(model(x, level0, all_layer_embed=True)[11], expected)
        with pytest.warns(UserWarning, match="below zero"):  # its own test feeds randn
            assert model(x, torch.randn(1, 25, 2), all_layer_embed=True)[11].shape == (1, 32)


def test_stamp_runs_the_whole_model_in_half_with_half_coordinates() -> None:
    model = narrow_model(global_pool=True)
    x, coords = made_tiles(1, 60)
    with torch.inference_mode():
        exact = model(x, coords, all_layer_embed=True)
        out = model.half()(x.half(), coords.half(), all_layer_embed=True)
    assert all(state.dtype == torch.float16 for state in out)
    for ours, true in zip(out, exact, strict=True):
        assert torch.cosine_similarity(ours.float(), true).min() > 0.9999


def test_slide2vec_gives_coordinates_without_batch() -> None:
    model = narrow_model()
    x, coords = made_tiles(1, 30)
    with torch.no_grad():
        assert torch.equal(model(x, coords.squeeze(0))[0], model(x, coords)[0])


def test_mussel_runs_under_half_autocast_on_the_cpu() -> None:
    model = narrow_model(global_pool=True)
    x, coords = made_tiles(1, 60)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # numpy's own type is float64
        assert torch.equal(model(x.double(), coords)[0], model(x, coords)[0])
    with torch.inference_mode():
        exact = model(x, coords)[0]
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(x, coords)[0]
    assert torch.cosine_similarity(out.float(), exact).min() > 0.9999


def test_raw2features_aliases_torchscale_and_takes_the_last_state() -> None:
    code = """
import sys
import gigapath.torchscale
sys.modules["torchscale"] = gigapath.torchscale
import torchscale.component.multihead_attention as attention
from torchscale.component.flash_attention import flash_attn_func
from torchscale.model.LongNet import LongNetEncoder
from gigapath.longnet.encoder import LongNetEncoder as ours
assert attention.flash_attn_func is flash_attn_func and LongNetEncoder is ours
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(gigapath.__file__).parents[1])
    model = narrow_model()
    with torch.no_grad():
        assert model(*made_tiles(1, 9), all_layer_embed=True)[-1].shape == (1, 32)


def test_patho_bench_copies_trains_and_reads_layers_from_names() -> None:
    model = copy.deepcopy(narrow_model(global_pool=True)).train()
    x, coords = made_tiles(1, 30)
    model(x, coords)[0].square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for name, grad in grads.items() if name != "cls_token")
    ids = {slide_encoder.layer_id(name, 2) for name in grads}
    assert ids == {0, 1, 2, 3}
    for name in grads:
        if name.startswith("encoder.layers."):
            assert slide_encoder.layer_id(name, 2) == int(name.split(".")[2]) + 1


def test_slideflow_finds_an_attention_function() -> None:
    from gigapath.torchscale.component import flash_attention, multihead_attention

    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 3, 8, generator=random)
    for module in (flash_attention, multihead_attention):
        assert module.flash_attn_func is not None
        out, lse = module.flash_attn_func(q, k, v)
        scores = torch.einsum("blhd,bkhd->bhlk", q, k) * 8**-0.5
        assert (out - torch.einsum("bhlk,bkhd->blhd", scores.softmax(-1), v)).abs().max() <= 1e-6
        assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-6
        out, lse = module.flash_attn_func(q, k, v, softmax_scale=1.0, is_causal=True)
        scores = (scores * 8**0.5).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf"))
        assert (out - torch.einsum("bhlk,bkhd->blhd", scores.softmax(-1), v)).abs().max() <= 1e-5
        assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="dropout"):
        flash_attention.flash_attn_func(q, k, v, dropout=0.1)
