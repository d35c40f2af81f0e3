"""Weights of the tile encoder kept in half precision: equal to the bit, given back where they are not, and no weight
converted within a batch. The GPU's way, on a CPU in bfloat16."""

import dataclasses
from typing import Any

import pytest
import torch
from named_tensors import Operations, named_tensors_work
from tiny_encoders import tiny_tile_encoder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gigapath.embedding.forward import made_batch
from gigapath.tile_architectures import gigapath_tile_enc_dinov2s, gigapath_tile_enc_vitg
from gigapath.tile_encoder import TileEncoder, hold_half


def dtypes(encoder: TileEncoder) -> set[torch.dtype]:
    return {p.dtype for p in encoder.model.parameters()}


def test_vectors_stay_and_weights_take_half_the_memory() -> None:
    encoder = tiny_tile_encoder(precision="bf16")
    batch = made_batch(encoder, 5, seed=3)
    expected = encoder.forward(batch)
    assert not torch.equal(expected[0], expected[1])
    assert hold_half(encoder) and dtypes(encoder) == {torch.bfloat16}
    assert torch.equal(encoder.forward(batch), expected)
    assert not hold_half(encoder), "once is enough"


def test_weights_that_are_loaded_later_count() -> None:
    held, plain = tiny_tile_encoder(precision="bf16"), tiny_tile_encoder(precision="bf16")
    assert hold_half(held)
    other = {name: torch.randn(p.shape) / 10 for name, p in plain.model.named_parameters()}
    for encoder in (held, plain):
        encoder.model.load_state_dict(other)
    batch = made_batch(plain, 4)
    assert torch.equal(held.forward(batch), plain.forward(batch))
    with torch.no_grad():
        for encoder in (held, plain):
            encoder.model[0].bias.data.mul_(2)  # type: ignore[index,operator,union-attr]
    assert torch.equal(held.forward(batch), plain.forward(batch))


class Careful(nn.Module):
    """A model in which half weights would be others: it reads one outside of a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.inner[0].weight  # type: ignore[index]
        return self.inner(x).float() * weight.float().sum()


class Breaks(Careful):
    """A model that can't take half weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.inner[0].weight  # type: ignore[index]
        if weight.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float")
        return self.inner(x)


@pytest.mark.parametrize("kind", [Careful, Breaks])
def test_where_vectors_would_change_everything_stays(kind: type[Careful]) -> None:
    encoder = tiny_tile_encoder(precision="bf16")
    encoder = dataclasses.replace(encoder, model=kind(encoder.model).eval())
    before, batch = encoder.model.state_dict(), made_batch(encoder, 3)
    expected = encoder.forward(batch)
    assert not hold_half(encoder) and dtypes(encoder) == {torch.float32}
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.model.state_dict().items())
    assert torch.equal(encoder.forward(batch), expected)


def test_float32_stays() -> None:
    encoder = tiny_tile_encoder()
    assert not hold_half(encoder) and dtypes(encoder) == {torch.float32}


class WeightCasts(Operations):
    """Counts conversions of parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights, self.casts = {id(p) for p in model.parameters()}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_to_copy":
            self.casts += any(id(leaf) in self.weights for leaf in tree_leaves(args))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("build", [gigapath_tile_enc_vitg, gigapath_tile_enc_dinov2s])
def test_no_weight_is_converted_within_a_batch(build: Any, held: bool) -> None:
    with torch.device("meta"):
        model = build().eval().requires_grad_(False)
    halves = (nn.Linear, nn.Conv2d)  # as `hold_half` chooses them
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(False), torch.no_grad():
        for part in model.modules():
            dtype = torch.float16 if held and type(part) in halves else torch.float32
            for name, p in part._parameters.items():
                if p is not None:
                    there = torch.empty(p.shape, dtype=dtype, device="cuda")
                    part._parameters[name] = nn.Parameter(there, requires_grad=False)
        pixels = torch.empty(2, 3, 224, 224, device="cuda")
        torch.set_autocast_enabled("cuda", True)  # the context manager asks for a driver
        torch.set_autocast_dtype("cuda", torch.float16)
        try:
            with WeightCasts(model) as counted:
                model(pixels)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert counted.seen["_to_copy"] > 0 and counted.found == {}
    assert (counted.casts == 0) == held
