"""The variable-length path of the dilated attention, with a faithful stand-in for torch's CUDA operation: the same
outputs and gradients as block by block, few launches, and no trust in an operation that is wrong."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from named_tensors import PANDA, Operations, named_tensors_work, on_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gigapath.longnet import kernels, varlen
from gigapath.longnet.attention import find_fault, use_kernel
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.dilated import dilated_attention
from gigapath.longnet.encoder import EncoderLayer
from gigapath.longnet.kernels import KERNELS, PLAIN

CPU = torch.device("cpu")
VARLEN = KERNELS["cuda-varlen"]
RELEASED = ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16))


class Faithful:
    """torch's `_flash_attention_forward` and its backward, sequence by sequence with the plain kernel."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def _flash_attention_forward(self, q, k, v, starts_q, starts_k, most_q, most_k, dropout, causal, debug, *, scale):
        assert starts_q.dtype == starts_k.dtype == torch.int32 and (dropout, causal, debug) == (0.0, False, False)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        self.calls["forward"] += 1
        outs, lses = [], []
        for q_, k_, v_ in self.sequences(starts_q, starts_k, most_q, most_k, (q,), (k, v)):
            out, lse = self.one(q_, k_, v_, scale)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1), torch.zeros(2), torch.zeros(()), None

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, dropout, causal, seed, unused, *, scale
    ):
        assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
        self.calls["backward"] += 1
        found = [
            self.one_back(g, q_, k_, v_, o, row[..., 0], scale)
            for g, o, row, q_, k_, v_ in self.sequences(
                starts_q, starts_k, most_q, most_k, (grad, out, lse.t()[..., None], q), (k, v)
            )
        ]
        return [torch.cat([each[i][0].transpose(0, 1) for each in found]) for i in range(3)]

    def sequences(self, starts_q, starts_k, most_q, most_k, of_q, of_k):
        assert int(starts_q.diff().max()) == most_q and int(starts_k.diff().max()) == most_k
        for a, b, c, d in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
            rows = [x[a:b] for x in of_q] + [x[c:d] for x in of_k]
            yield [x.transpose(0, 1)[None] for x in rows]

    def one(self, q, k, v, scale):
        out, lse, _ = PLAIN.forward(q, k, v, scale)
        return out, lse

    def one_back(self, grad, q, k, v, out, lse, scale):
        return PLAIN.backward(grad, q, k, v, out, lse, (), scale)


class BaseTwo(Faithful):
    def one(self, q, k, v, scale):
        out, lse = super().one(q, k, v, scale)
        return out, lse / torch.log(torch.tensor(2.0))


class ForgetsGivenLse(Faithful):
    def one_back(self, grad, q, k, v, out, lse, scale):
        return super().one_back(grad, q, k, v, *super().one(q, k, v, scale), scale)


class WrongOnSingleRows(Faithful):
    def one(self, q, k, v, scale):
        out, lse = super().one(q, k, v, scale)
        return (out * 2 if q.shape[2] == 1 else out), lse


class ReadsTheLongestAlways(Faithful):
    """Sees beyond the end of a short sequence."""

    def _flash_attention_forward(self, q, k, v, starts_q, starts_k, most_q, most_k, *rest, scale):
        out, lse, *others = super()._flash_attention_forward(
            q, k, v, starts_q, starts_k, most_q, most_k, *rest, scale=scale
        )
        if len(starts_k.diff().unique()) > 1:
            out = out + v.abs().mean(0)
        return out, lse, *others


class PadsTheLse(Faithful):
    def _flash_attention_forward(self, *arguments, scale):
        out, lse, *others = super()._flash_attention_forward(*arguments, scale=scale)
        return out, lse[None], *others


class Raises(Faithful):
    def one(self, q, k, v, scale):
        raise RuntimeError("no kernel image is available")


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Callable[[Faithful], Faithful]:
    """Puts a stand-in in the place of torch's operation."""
    varlen.lay_out.cache_clear()

    def put_in(stand_in: Faithful) -> Faithful:
        monkeypatch.setattr(kernels, "aten", lambda name: getattr(stand_in, name))
        return stand_in

    return put_in


def results(lengths: tuple[int, ...], heads: int, branches: Any, kernel: Any) -> list[Tensor]:
    """Output and gradients in float64."""
    random = torch.Generator().manual_seed(sum(lengths))
    q, k, v, grad = torch.randn(4, sum(lengths), heads, 8, generator=random, dtype=torch.float64)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        inferred = dilated_attention(q, k, v, lengths, branches, kernel=kernel)
    out = dilated_attention(*mine, lengths, branches, kernel=kernel)
    out.backward(grad)
    return [inferred, out.detach(), *(x.grad for x in mine if x.grad is not None)]


@pytest.mark.parametrize(
    ("lengths", "heads", "branches"),
    [
        ((1,), 4, ((4, 1), (8, 2))),
        ((37, 200, 5, 1), 4, ((16, 1), (50, 2), (300, 4))),
        ((90,), 4, ((20, 2), (90, 4))),  # no branch reaches all tokens and heads
        ((64, 64), 2, ((16, 2), (16, 1))),
        ((3, 130), 8, ((7, 1), (130, 8))),
        ((70,), 3, ((16, 1), (40, 3))),
    ],
)
def test_it_equals_the_blocks_forwards_and_backwards(operation, lengths, heads, branches) -> None:
    called = operation(Faithful()).calls
    ours = results(lengths, heads, branches, VARLEN)
    assert dict(called) == {"forward": 2 * len(branches), "backward": len(branches)}, "one launch a branch"
    for mine, theirs in zip(ours, results(lengths, heads, branches, PLAIN), strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))


def test_heads_that_the_groups_do_not_share_evenly_are_served_block_by_block(operation) -> None:
    operation(Faithful())
    for mine, theirs in zip(
        *(results((37, 20), 3, ((16, 1), (40, 2)), kernel) for kernel in (VARLEN, PLAIN)), strict=True
    ):
        assert (mine - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_faithful_operation_passes_the_check(operation, dtype) -> None:
    operation(Faithful())
    assert find_fault(VARLEN, CPU, dtype, 48) is None


@pytest.mark.parametrize(
    "faulty", [BaseTwo, ForgetsGivenLse, WrongOnSingleRows, ReadsTheLongestAlways, PadsTheLse, Raises]
)
def test_a_faulty_operation_is_refused(operation, faulty) -> None:
    operation(faulty())
    assert find_fault(VARLEN, CPU, torch.bfloat16, 48) is not None


@pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")
@pytest.mark.parametrize("lengths", [(10_001,), (4_001,) * 8, tuple(count + 1 for count in PANDA)])
def test_a_layer_takes_the_same_few_launches_for_one_slide_and_for_thirty(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen.lay_out.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_kernel("cuda-varlen"):
        layer = on_cuda(EncoderLayer(LongNetConfig(depth=1), 0)).eval()
        x = torch.empty(1, sum(lengths), 768, dtype=torch.bfloat16, device="cuda")
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)  # these can't be
        layer(x, lengths=lengths)  # lays the sequences out, for all layers
        with Operations() as counted:
            layer(x, lengths=lengths)
    varlen.lay_out.cache_clear()
    assert counted.seen["_flash_attention_forward"] == len(RELEASED)
    assert counted.found == {}, "nothing waits"
    assert sum(counted.seen.values()) <= 60
