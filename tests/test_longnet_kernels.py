"""The choice of an attention kernel: what the check at first use lets through, and what it does not."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from plain_longnet import plain_dilated_attention
from torch import Tensor

from gigapath.longnet import attention as attention_module
from gigapath.longnet import kernels, linear
from gigapath.longnet.attention import (
    attention,
    choose_kernel,
    find_fault,
    flash_attn_func,
    forget_choices,
    use_kernel,
)
from gigapath.longnet.dilated import dilated_attention
from gigapath.longnet.kernels import KERNELS, PLAIN

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Faithful:
    """Stand-ins for torch's CUDA operations, with their layouts, computed by the plain kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _ = PLAIN.forward(q, k, v, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse

    def backward(self, *arguments, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        return PLAIN.backward(*arguments, (), scale)

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, debug, *, scale):
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert (dropout, causal, debug) == (0.0, False, False)
        out, lse = self.forward(q, k, v, scale)
        seed = torch.zeros(2, dtype=torch.int64)
        return out, lse, None, None, q.shape[2], k.shape[2], seed, torch.zeros(()), None

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k) == (None, None, q.shape[2], k.shape[2])
        assert lse.is_contiguous() and seed.dtype == torch.int64
        return self.backward(grad, q, k, v, out, lse, scale=scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, want_lse, dropout, causal, *, scale):
        assert want_lse and bias is None
        out, lse = self.forward(q, k, v, scale)
        return out, F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf")), torch.zeros(()), torch.zeros(())

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, q, k, v, bias, out, lse, seed, offset, dropout, mask, causal, *, scale
    ):
        assert lse.shape[2] % 32 == 0 and lse.is_contiguous() and mask == [True, True, True, False]
        return (*self.backward(grad, q, k, v, out, lse[:, :, : q.shape[2]], scale=scale), None)


class BaseTwo(Faithful):
    def forward(self, q, k, v, scale):
        out, lse = super().forward(q, k, v, scale)
        return out, lse / torch.log(torch.tensor(2.0))


class HalfLse(Faithful):
    def forward(self, q, k, v, scale):
        out, lse = super().forward(q, k, v, scale)
        return out, lse.half()


class IgnoresGivenLse(Faithful):
    """Its backward computes its own softmax, so that zero keys are lost."""

    def backward(self, grad, q, k, v, out, lse, *, scale):
        own_out, own_lse, _ = PLAIN.forward(q, k, v, scale)
        return PLAIN.backward(grad, q, k, v, own_out, own_lse, (), scale)


class WrongOnRagged(Faithful):
    def forward(self, q, k, v, scale):
        out, lse = super().forward(q, k, v, scale)
        if q.shape[2] % 8:
            out[:, :, q.shape[2] // 8 * 8 :] = float("nan")
        return out, lse


class SwapsGradients(Faithful):
    def backward(self, *arguments, scale):
        dq, dk, dv = super().backward(*arguments, scale=scale)
        return dq, dv, dk


class ReadsPacked(Faithful):
    """Takes strided inputs for dense ones."""

    def forward(self, q, k, v, scale):
        dense = [x.as_strided(x.shape, x.contiguous().stride(), x.storage_offset()) for x in (q, k, v)]
        return super().forward(*dense, scale)


class Raises(Faithful):
    def forward(self, q, k, v, scale):
        raise RuntimeError("No available kernel")


def put_in(monkeypatch: pytest.MonkeyPatch, **operations: Faithful) -> None:
    """Let flash=... and efficient=... take the place of torch's CUDA operations, and CPU tensors go there."""

    def aten(name: str):
        return getattr(operations["flash" if "flash" in name else "efficient"], name)

    monkeypatch.setattr(kernels, "aten", aten)
    monkeypatch.setattr(
        attention_module, "candidates", lambda device, dtype: [KERNELS["cuda-flash"], KERNELS["cuda-efficient"]]
    )
    monkeypatch.setattr(attention_module, "_chosen", {})


@pytest.mark.parametrize("head_dim", [2, 24, 48])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "cpu-flash"])
def test_kernels_of_the_cpu_pass_their_check(name, dtype, head_dim) -> None:
    assert find_fault(KERNELS[name], CPU, dtype, head_dim) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_kernels_pass_with_faithful_operations(monkeypatch, dtype) -> None:
    put_in(monkeypatch, flash=Faithful(), efficient=Faithful())
    assert find_fault(KERNELS["cuda-flash"], CPU, dtype, 48) is None
    assert find_fault(KERNELS["cuda-efficient"], CPU, dtype, 48) is None
    assert find_fault(KERNELS["cuda-efficient"], CPU, torch.float32, 48) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_kernel(torch.empty(1, 1, 1, 48, dtype=dtype)).name == "cuda-flash"


@pytest.mark.parametrize(
    ("faulty", "word"),
    [
        (BaseTwo, "lse"),
        (HalfLse, "lse"),
        (IgnoresGivenLse, "d[qk]"),
        (WrongOnRagged, "out"),
        (SwapsGradients, "d[kv]"),
        (ReadsPacked, "out"),
        (Raises, "raised RuntimeError: No available kernel"),
    ],
)
def test_check_stops_faulty_operations(monkeypatch, faulty, word) -> None:
    put_in(monkeypatch, flash=faulty(), efficient=faulty())
    for name, dtype in (("cuda-flash", torch.bfloat16), ("cuda-efficient", torch.float32)):
        fault = find_fault(KERNELS[name], CPU, dtype, 24)
        assert re.search(word, fault or "no fault"), fault


def test_choice_falls_to_the_next_kernel_then_to_the_plain_one_with_one_warning(monkeypatch) -> None:
    q = torch.empty(1, 1, 1, 24, dtype=torch.bfloat16)
    put_in(monkeypatch, flash=BaseTwo(), efficient=Faithful())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_kernel(q).name == "cuda-efficient"
    put_in(monkeypatch, flash=BaseTwo(), efficient=Raises())
    with pytest.warns(UserWarning, match=r"cuda-flash: .*lse.*cuda-efficient: .*No available kernel") as caught:
        assert choose_kernel(q) is PLAIN
        assert choose_kernel(q) is PLAIN
    assert len(caught) == 1


def test_missing_private_operation_leaves_the_plain_path(monkeypatch) -> None:
    def aten(name: str):
        raise AttributeError(f"no {name} in this torch")

    monkeypatch.setattr(kernels, "aten", aten)
    forget_choices()
    q, k, v = torch.randn(3, 9, 2, 8)
    with pytest.warns(UserWarning, match="takes the plain path"):
        out = dilated_attention(q, k, v, (9,), ((4, 1), (8, 2)))
    forget_choices()
    exact = plain_dilated_attention(q.double(), k.double(), v.double(), ((4, 1), (8, 2)))
    assert (out - exact).abs().max() <= 1e-6


def test_use_kernel_overrides_the_choice_and_refuses_unknown_names() -> None:
    q = torch.empty(1, 1, 1, 8)
    with use_kernel("plain"):
        assert choose_kernel(q) is PLAIN
    assert choose_kernel(q).name == "cpu-flash"
    with pytest.raises(ValueError, match=r"cpu-flash.*'fast'"), use_kernel("fast"):
        pass


@pytest.mark.parametrize("name", ["plain", "cpu-flash"])
@pytest.mark.parametrize("zero_keys", [0, 1, 7])
def test_zero_keys_are_exact_forwards_and_backwards(name, zero_keys) -> None:
    random = torch.Generator().manual_seed(zero_keys)
    q, k, v = (torch.randn(2, 3, 11, 8, generator=random, dtype=torch.float64) for _ in range(3))
    grad = torch.randn(2, 3, 11, 8, generator=random, dtype=torch.float64)
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*ours, zero_keys=zero_keys, kernel=KERNELS[name])
    out.backward(grad)
    real = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (F.pad(x, (0, 0, 0, zero_keys)) for x in real[1:])
    scores = real[0] @ keys.transpose(-2, -1) * 8**-0.5
    true = scores.softmax(-1) @ values
    true.backward(grad)
    assert (out - true).abs().max() <= 1e-12
    assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-12
    for mine, theirs in zip(ours, real, strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-9
    assert not lse.requires_grad


@pytest.mark.parametrize("name", ["plain", "cpu-flash"])
def test_strides_of_the_arguments_play_no_part(name) -> None:
    random = torch.Generator().manual_seed(2)
    apart = [torch.randn(2, 8, 33, 4, generator=random).permute(0, 2, 3, 1) for _ in range(3)]  # (B, L, H, D)
    answers = []
    with use_kernel(name):
        for given in (apart, [x.contiguous() for x in apart]):
            mine = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in given]
            assert mine[0].stride() == given[0].stride()
            out, lse = flash_attn_func(*mine)
            packed = dilated_attention(*(x[0] for x in mine), (33,), ((8, 1), (20, 2)))
            (out.square().sum() + packed.square().sum()).backward()
            answers.append([out, lse, packed, *(x.grad for x in mine)])
    for one, other in zip(*answers, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", ["plain", "cpu-flash"])
def test_second_derivatives_are_refused_not_wrong(name) -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    with use_kernel(name):
        for out in (attention(q, q, q)[0], dilated_attention(q[0], q[0], q[0], (2,), ((4, 1),))):
            (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.square().sum().backward()


def test_kernels_are_checked_whatever_device_is_the_default() -> None:
    """Scripts say torch.set_default_device("cuda"); the meta device stands for any that is not the CPU."""
    forget_choices()
    linear.find_fused_product.cache_clear()
    q = torch.randn(1, 2, 5, 8)
    with torch.device("meta"):
        assert choose_kernel(q).name == "cpu-flash"
        assert linear.find_fused_product(torch.float32) is not None
    forget_choices()


def test_attention_refuses_empty_sequences() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        attention(torch.zeros(1, 1, 0, 8), torch.zeros(1, 1, 0, 8), torch.zeros(1, 1, 0, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_four_units_of_the_last_place(dtype) -> None:
    q, k, v = torch.randn(3, 150, 16, 24, generator=torch.Generator().manual_seed(5)).to(dtype)
    branches = ((32, 1), (64, 2), (100, 4))
    exact = plain_dilated_attention(q.double(), k.double(), v.double(), branches)
    unit = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(v.double().abs().max()))
    for name in ("plain", "cpu-flash"):
        with use_kernel(name):
            out = dilated_attention(q, k, v, (150,), branches)
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() <= 4 * unit, name


@pytest.mark.parametrize("name", ["plain", "cpu-flash"])
def test_autocast_does_not_reach_into_the_attention(name) -> None:
    q, k, v = torch.randn(3, 90, 4, 8, generator=torch.Generator().manual_seed(6))
    branches = ((16, 1), (40, 2))
    grads = []
    with use_kernel(name):
        for enabled in (False, True):
            mine = [x.clone().requires_grad_() for x in (q, k, v)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                dilated_attention(*mine, (90,), branches).square().sum().backward()
            grads.append([x.grad for x in mine])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_of_the_gpu_passes_its_check(dtype, head_dim) -> None:
    forget_choices()
    kernel = choose_kernel(torch.empty(1, 1, 1, head_dim, dtype=dtype, device="cuda"))
    assert kernel.name == ("cuda-efficient" if dtype == torch.float32 else "cuda-varlen")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), (37, 200, 5), (1025,)])
def test_dilated_attention_on_the_gpu_agrees_with_float64(dtype, lengths) -> None:
    branches = ((32, 1), (50, 2), (90, 4), (512, 8), (1024, 16))
    random = torch.Generator().manual_seed(sum(lengths))
    q, k, v, grad = torch.randn(4, sum(lengths), 16, 48, generator=random).to(dtype)
    mine = [x.cuda().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*mine, lengths, branches)
    out.backward(grad.cuda())
    true = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.cat(
        [plain_dilated_attention(*part, branches) for part in zip(*(x.split(lengths) for x in true), strict=True)]
    )
    exact.backward(grad.double())
    unit = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(v.double().abs().max()))
    assert (out.double().cpu() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 4 * unit)
    for x, y in zip(mine, true, strict=True):
        largest = y.grad.abs().max().clamp(min=1e-3)
        allowed = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
        assert (x.grad.double().cpu() - y.grad).abs().max() <= allowed * largest
