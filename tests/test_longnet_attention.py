"""Dilated attention and its kernels against plain float64 maths."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from gigapath.longnet.attention import use_kernel
from gigapath.longnet.dilated import dilated_attention

CASES = [
    f"{heads}_{segments}_n{tokens}"
    for heads, segments, counts in (
        ("h4_e8", "w8-16-64_r1-2-4", (1, 2, 5, 8, 16, 21, 37, 64, 100, 129)),
        ("h16_e24", "w32-64-128-256-512_r1-2-4-8-16", (1, 33, 200)),
        ("h3_e8", "w8-16_r1-2", (7, 30)),
        ("h4_e8", "w6-9-22_r1-2-4", (50,)),
        ("h5_e8", "w7-10_r1-4", (33,)),
        ("h16_e24", "w32-50-90_r1-4-16", (180,)),
    )
    for tokens in counts
]


def branches_of(case: str) -> tuple[tuple[int, int], ...]:
    segments, dilations = re.findall(r"w([\d-]+)_r([\d-]+)", case)[0]
    return tuple(zip(map(int, segments.split("-")), map(int, dilations.split("-")), strict=True))


def relative_error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).abs().max() / true.double().abs().max())


@pytest.mark.parametrize("kernel", ["plain", "cpu-flash"])
@pytest.mark.parametrize(("dtype", "on_out", "on_grads"), [(torch.float32, 1e-5, 1e-3), (torch.float64, 1e-6, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_dilated_attention_meets_the_goldens(goldens, case, dtype, on_out, on_grads, kernel) -> None:
    golden = np.load(goldens / "dilated_attention.npz")
    q, k, v = (torch.from_numpy(golden[f"{case}/{name}"]).to(dtype).requires_grad_() for name in "qkv")
    with use_kernel(kernel):
        out = dilated_attention(q, k, v, (q.shape[0],), branches_of(case))
        probe = torch.arange(out.numel(), dtype=torch.float64).cos().view_as(out).to(dtype)
        (out * probe).sum().backward()
        without_grad = dilated_attention(q.detach(), k.detach(), v.detach(), (q.shape[0],), branches_of(case))
    assert (out - torch.from_numpy(golden[f"{case}/out"])).abs().max() <= on_out
    assert torch.equal(out, without_grad)
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        true = torch.from_numpy(golden[f"{case}/d{name}"])
        if true.abs().max() == 0:  # a single token: its softmax is constant
            assert tensor.grad.abs().max() <= on_out, name
        else:
            assert relative_error(tensor.grad, true) <= on_grads, name
