"""The layer norm of one pass, run by Triton's interpreter: the numbers of PyTorch's own, and no trust in a kernel that
is wrong or missing."""

import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigapath.longnet import norm
from gigapath.longnet.norm import find_one_pass, normalize
from gigapath.slide_encoder import create_model

CPU = torch.device("cpu")
MODULE = "gigapath.longnet.triton_norm"
CASES = [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)]


def forget() -> None:
    find_one_pass.cache_clear()
    sys.modules.pop(MODULE, None)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """One pass serves on this CPU, by Triton's interpreter; gets whether each call took a GELU along."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is there")
    monkeypatch.setattr(norm, "DEVICES", ("cpu",))
    forget()
    calls: list[bool] = []
    found = norm.find_one_pass

    def counting(*key: Any) -> Callable[..., Tensor] | None:
        one_pass = found(*key)
        return one_pass and (lambda *given: (calls.append(given[-1]), one_pass(*given))[1])

    monkeypatch.setattr(norm, "find_one_pass", counting)
    yield calls
    forget()


@pytest.mark.parametrize(("dtype", "out"), CASES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", [64, 200])
def test_it_passes_the_comparison_with_float64(interpreted, dtype, out, gelu, width) -> None:
    assert find_one_pass(CPU, dtype, out, torch.float32, width, gelu) is not None


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_an_encoder_gives_the_same_within_rounding(interpreted: list[bool], precision, monkeypatch) -> None:
    torch.manual_seed(0)
    model = create_model("", "gigapath_slide_enc2l64d", 32).eval()
    random = torch.Generator().manual_seed(1)
    x, places = torch.randn(90, 32, generator=random), torch.arange(90)
    coords = torch.stack([places % 10, places // 10], dim=1) * 256.0
    found = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(norm, "DEVICES", devices)
        with torch.no_grad(), torch.autocast("cpu", precision):
            found.append(model(x[None], coords[None])[0].float())
    # Two norms, one before the output of the attention, one with the GELU, in each of two layers.
    assert sorted(interpreted) == [False] * 6 + [True] * 2
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    assert (found[0] - found[1]).abs().max() <= {torch.float16: 4e-3, torch.bfloat16: 6e-2}[precision]


def wrong_type(*given: Any) -> Tensor:
    return given[0]


def without_epsilon(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, gelu: bool) -> Tensor:
    return (x.float() * weight + bias).to(dtype)


def without_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, gelu: bool) -> Tensor:
    return nn.functional.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)


def not_a_number(x: Tensor, *given: Any) -> Tensor:
    return torch.full_like(x, float("nan"), dtype=given[3])


def raises(*given: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler.")


@pytest.mark.parametrize("faulty", [wrong_type, without_epsilon, without_gelu, not_a_number, raises, None])
def test_a_faulty_or_missing_kernel_is_refused_and_pytorch_serves(faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "DEVICES", ("cpu",))
    forget()
    # None in this place: importing it raises ImportError, as without Triton.
    monkeypatch.setitem(sys.modules, MODULE, faulty and SimpleNamespace(layer_norm=faulty))
    assert find_one_pass(CPU, torch.float32, torch.float16, torch.float32, 16, True) is None
    layer, x = nn.LayerNorm(16), torch.randn(3, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert torch.equal(normalize(layer, x, gelu=True), layer(nn.functional.gelu(x)))
    find_one_pass.cache_clear()


def test_full_precision_gradients_and_replaced_norms_are_pytorchs(interpreted: list[bool]) -> None:
    class Mine(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return input + 1

    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(normalize(nn.LayerNorm(16), x), nn.LayerNorm(16)(x))
        assert torch.equal(normalize(Mine(16), x.half()), x.half() + 1)
        assert normalize(nn.LayerNorm(16).half(), x[:0].half()).shape == (0, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert normalize(nn.LayerNorm(16).double(), x.double()).dtype != torch.bfloat16
    model = create_model("", "gigapath_slide_enc2l64d", 32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 5, 32), torch.zeros(1, 5, 2))[0].sum().backward()
    assert interpreted == [] and model.encoder.layers[0].ffn.ffn_layernorm.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [768, 3072, 384, 1536])
def test_on_a_gpu_it_agrees(out: torch.dtype, width: int) -> None:
    """Where Triton and a compiler are there; the reason is logged where one is not."""
    layer_norm = pytest.importorskip(MODULE).layer_norm
    cuda = torch.device("cuda", 0)
    for dtype, gelu in ((torch.float32, False), (out, False), (out, True)):
        assert norm._error(layer_norm, cuda, dtype, out, torch.float32, width, gelu) <= norm.TOLERANCES[out]
