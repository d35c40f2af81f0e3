"""Dilated attention and its kernels against plain float64 maths."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_longnet import plain_dilated_attention
from torch import Tensor

from gigapath.longnet.attention import use_kernel
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.dilated import dilated_attention, plan_blocks
from gigapath.longnet.encoder import count_operations

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


@st.composite
def made_branches(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Dilation 1 among up to four branches; segments that need not be multiples of the dilations."""
    others = draw(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 16)), max_size=3))
    at = draw(st.integers(0, len(others)))
    return (*others[:at], (draw(st.integers(16, 400)), 1), *others[at:])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    tokens=st.one_of(st.integers(1, 80), st.integers(1, 3000)),
    heads=st.integers(1, 6),
    head_dim=st.sampled_from([1, 3, 8]),
    branches=made_branches(),
    seed=st.integers(0, 1000),
)
def test_dilated_attention_equals_real_zero_keys_in_float64(tokens, heads, head_dim, branches, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k, v, grad = torch.randn(4, tokens, heads, head_dim, generator=random, dtype=torch.float64)
    mine, true = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out = dilated_attention(*mine, (tokens,), branches)
    exact = plain_dilated_attention(*true, branches)
    assert (out - exact).abs().max() <= 1e-9
    out.backward(grad)
    exact.backward(grad)
    for x, y in zip(mine, true, strict=True):
        assert (x.grad - y.grad).abs().max() <= 1e-9


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    heads=st.integers(1, 6),
    branches=made_branches(),
    strided=st.booleans(),
)
def test_slides_one_after_another_attend_within_themselves(lengths, heads, branches, strided) -> None:
    random = torch.Generator().manual_seed(sum(lengths))
    made = torch.randn(3, sum(lengths), 2 * heads, 4, generator=random, dtype=torch.float64)
    q, k, v = made[:, :, ::2] if strided else made[:, :, :heads]
    together = dilated_attention(q, k, v, tuple(lengths), branches)
    for part, alone in zip(
        together.split(lengths), zip(*(x.split(lengths) for x in (q, k, v)), strict=True), strict=True
    ):
        assert (part - dilated_attention(*alone, (part.shape[0],), branches)).abs().max() <= 1e-12


def test_blocks_are_few_and_cut_where_a_launch_grows_too_large() -> None:
    assert len(plan_blocks((10240,), 1024, 1, 16)) == 1
    assert len(plan_blocks((10240,), 1024, 16, 16)) == 1  # as many groups as heads: groups stand in for heads
    assert len(plan_blocks((10240,), 5120, 4, 16)) == 2  # fewer segments than groups: a launch each
    assert len(plan_blocks((10240,), 1024, 4, 16)) == 4  # fewer groups than segments: a launch each
    assert len(plan_blocks((7,) * 50, 1024, 1, 16)) == 1  # many slides of one length
    block = plan_blocks((10240,), 1024, 1, 16)[0]
    assert [part.batch for part in block.parts(3 * 1024 * 16)] == [3, 3, 3, 1]
    x = torch.arange(10240.0 * 16).view(10240, 16)
    assert torch.equal(torch.cat([part.of(x) for part in block.parts(3 * 1024 * 16)]), block.of(x))
    assert [(part.batch, part.heads) for part in block.parts(5 * 1024)] == [(1, 5), (1, 5), (1, 5), (1, 1)] * 10
    one = plan_blocks((10240,), 16384, 16, 16)[0]  # a head a group: each begins a token later
    alone = [part.of(x) for part in one.parts(1)]
    assert [part.shape for part in alone] == [(1, 1, 640)] * 16
    assert torch.equal(torch.cat(alone, dim=1), one.of(x))


def test_dilated_attention_refuses_lengths_that_do_not_add_up() -> None:
    q = torch.zeros(5, 2, 4)
    for lengths in ((4,), (5, 0), ()):
        with pytest.raises(ValueError, match="lengths"):
            dilated_attention(q, q, q, lengths, ((4, 1),))


def test_operations_of_a_slide_are_those_of_the_reference() -> None:
    counted = count_operations(LongNetConfig(), (10_001,))
    assert counted["linear"] == pytest.approx(1.7e12, rel=0.01)
    assert counted["attention"] == pytest.approx(1.3e12, rel=0.15)
    # one segment of 6 tokens: without dilation 6 x 6 scores a head, with dilation 2 one 3 x 3 square a head
    tiny = LongNetConfig(embed_dim=32, depth=1, segment_lengths=(6, 6), dilations=(1, 2))
    assert count_operations(tiny, (6,)) == {"linear": 2 * 6 * 12 * 32**2, "attention": 4 * 16 * 2 * (36 + 9)}
