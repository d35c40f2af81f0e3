"""Bad input to the slide encoder is one clear error; options leave the numbers alone."""

import argparse
import warnings
import weakref

import pytest
import torch
from narrow_longnet import made_tiles, narrow_model
from weights_recipe import fill

from gigapath.longnet import dilated
from gigapath.slide_encoder import create_model

FLASH = "gigapath_slide_enc12l384d"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 256.0 * 1000, -256.1])
def test_coordinates_outside_the_grid_name_the_first_row(value) -> None:
    x, coords = made_tiles(2, 30)
    coords = coords.float()
    coords[1, 17, 1] = value
    with pytest.raises(ValueError, match="row 17 of slide 1"):
        narrow_model()(x, coords)


def test_coordinates_outside_the_grid_name_the_slide_of_packed_ones() -> None:
    x, coords = made_tiles(2, 30)
    coords[1, 17, 1] = 256_000
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 25:] = False
    for call in (
        lambda model: model(x, coords, valid_mask=mask),
        lambda model: model.forward_packed(x.view(-1, 12), coords.view(-1, 2), [30, 30]),
    ):
        with pytest.raises(ValueError, match="row 17 of slide 1"):
            call(narrow_model())


@pytest.mark.parametrize("size", [0, -256, float("nan"), float("inf")])
def test_a_tile_size_that_is_none_is_named(size) -> None:
    model = narrow_model()
    model.tile_size = size
    with pytest.raises(ValueError, match="tile_size above 0"):
        model(*made_tiles(1, 5))


def test_half_precision_that_overflowed_is_named() -> None:
    x, coords = made_tiles(1, 30)
    coords[0, 4] = 70000
    with pytest.raises(ValueError, match=r"row 4.*half precision"):
        narrow_model()(x, coords.half())


def test_cell_minus_one_is_moved_to_zero_with_one_warning() -> None:
    model = narrow_model(global_pool=True)
    x, coords = made_tiles(1, 30)
    below = coords.clone()
    coords[0, [3, 5], 0] = 0
    below[0, 3, 0], below[0, 5, 0] = -1, -256
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(model(x, below)[0], model(x, coords)[0])
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("x", "coords", "match"),
    [
        ((1, 5, 11), (1, 5, 2), r"\(B, L, 12\), got \(1, 5, 11\)"),
        ((1, 5, 12), (1, 6, 2), r"coordinates \(1, 5, 2\).*got \(1, 6, 2\)"),
        ((1, 5, 12), (1, 5, 1), "coordinates"),
        ((2, 5, 12), (3, 5, 2), "coordinates"),
        ((1, 0, 12), (1, 0, 2), "at least one tile"),
        ((0, 12), (0, 2), "at least one tile"),
        ((0, 5, 12), (0, 5, 2), "at least one tile"),
        ((1, 1, 5, 12), (1, 5, 2), "tile embeddings"),
    ],
)
def test_wrong_shapes_are_one_clear_error(x, coords, match) -> None:
    with pytest.raises(ValueError, match=match):
        narrow_model()(torch.zeros(x), torch.zeros(coords))


def test_activation_checkpointing_holds_no_output_of_the_attention(monkeypatch) -> None:
    alive = []

    def record(*arguments):
        out, lse, extra = attend(*arguments)
        alive.append(weakref.ref(out))
        return out, lse, extra

    attend = dilated.attend
    monkeypatch.setattr(dilated, "attend", record)
    model = narrow_model(checkpoint_activations=True).train()
    answer = model(*made_tiles(1, 40))[0]
    assert answer.requires_grad and alive and all(out() is None for out in alive)
    model.set_grad_checkpointing(False)
    assert not model.encoder.checkpoint_activations


def test_bfloat16_products_stay_close_and_auto_follows_the_machine(monkeypatch) -> None:
    from gigapath.longnet import encoder as encoder_module
    from gigapath.longnet.linear import Linear

    x, coords = made_tiles(1, 300)
    exact, half = narrow_model(global_pool=True), narrow_model(global_pool=True, linear_precision="bf16")
    with torch.inference_mode():
        a, b = exact(x, coords)[0], half(x, coords)[0]
    assert b.dtype == torch.float32 and (a - b).abs().max() > 1e-5
    assert torch.cosine_similarity(a, b).min() > 0.9999
    assert torch.equal(half(x, coords)[0], exact(x, coords)[0])  # training stays in float32
    for pays in (True, False):
        monkeypatch.setattr(encoder_module, "bfloat16_pays", lambda pays=pays: pays)
        exact.encoder.set_linear_precision("auto")
        assert all(m.half_products == pays for m in exact.encoder.modules() if isinstance(m, Linear))
    with pytest.raises(ValueError, match="fp32, bf16 or auto"):
        exact.encoder.set_linear_precision("fp8")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", ["wrong", "missing", "absent in this type"])
def test_private_products_that_fail_leave_the_public_one(monkeypatch, precision, fault) -> None:
    from gigapath.longnet import linear

    used = torch.bfloat16 if precision == "bf16" else torch.float32
    real = torch.ops.mkldnn._linear_pointwise

    def lacking(x, *rest):  # as oneDNN without AVX-512 in bfloat16
        if x.dtype == used:
            raise RuntimeError("could not create a primitive descriptor")
        return real(x, *rest)

    x, coords = made_tiles(1, 30)
    model = narrow_model(linear_precision=precision)
    exact = narrow_model()
    operation = {"wrong": lambda *args: args[0] @ args[1].T, "missing": None, "absent in this type": lacking}[fault]
    with torch.inference_mode():
        expected = exact(x, coords)[0]
        monkeypatch.setattr(torch.ops, "mkldnn", argparse.Namespace(_linear_pointwise=operation))
        linear.find_fused_product.cache_clear()
        assert linear.find_fused_product(used) is None
        assert (model(x, coords)[0] - expected).abs().max() <= (1e-5 if precision == "fp32" else 0.1)
    monkeypatch.undo()
    linear.find_fused_product.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slide_encoder_on_the_gpu_agrees_with_the_cpu(dtype) -> None:
    model = fill(create_model("", FLASH, 384, global_pool=True, depth=3)).eval()
    random = torch.Generator().manual_seed(3)
    x, coords = torch.randn(1, 5000, 384, generator=random), torch.randint(0, 900, (1, 5000, 2), generator=random) * 256
    with torch.inference_mode():
        exact = model(x, coords, True)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            out = model.cuda()(x.cuda(), coords.cuda(), True)
    for ours, true in zip(out, exact, strict=True):
        assert torch.cosine_similarity(ours.float().cpu(), true).min() > 0.9999
        if dtype == torch.float32:
            assert (ours.cpu() - true).abs().max() <= 1e-4
