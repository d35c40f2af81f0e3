"""The variable-length path of the dilated attention, with a faithful stand-in for torch's CUDA operation: the same
outputs and gradients as block by block, few launches, and no trust in an operation that is wrong."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from named_tensors import PANDA, Operations, named_tensors_work, norms_of, on_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gigapath.longnet import dilated, kernels, varlen
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
@pytest.mark.parametrize(("one_pass", "most"), [(False, 55), (True, 54)])
def test_a_layer_takes_the_same_few_launches_for_one_slide_and_for_thirty(
    lengths: tuple[int, ...], one_pass: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen.lay_out.cache_clear()
    norms_of(monkeypatch, one_pass=one_pass)
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
    assert sum(counted.seen.values()) <= most


# What a layer dispatches in training, forwards and backwards of the attention; more would be launches come back.
TRAINING, BACKWARD = 64, 105


@pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")
@pytest.mark.parametrize("lengths", [(10_001,), (4_001,) * 8, tuple(count + 1 for count in PANDA)])
def test_a_layer_in_training_takes_few_launches_and_waits_for_nothing(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen.lay_out.cache_clear()
    config = LongNetConfig(depth=2, dropout=0.1, drop_path_rate=0.2)
    with FakeTensorMode(allow_non_fake_inputs=True), use_kernel("cuda-varlen"):
        layer = on_cuda(EncoderLayer(config, 1)).train().requires_grad_(True)
        x = torch.empty(1, sum(lengths), 768, dtype=torch.bfloat16, device="cuda")
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
        layer(x, lengths=lengths)
        with Operations() as counted:
            out = layer(x, lengths=lengths)[0]
            out.float().square().sum()
    varlen.lay_out.cache_clear()
    assert layer.drop_path is not None and counted.seen["native_dropout"] == counted.seen["bernoulli_"] == 2
    assert counted.found == {} and sum(counted.seen.values()) <= TRAINING + 3  # those of this loss


@pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")
@pytest.mark.parametrize("name", ["cuda-varlen", "cuda-flash", "cuda-efficient"])
def test_no_backward_of_the_attention_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called directly: autograd's own threads ask for a driver."""
    varlen.lay_out.cache_clear()
    lengths, kernel = tuple(count + 1 for count in PANDA[:5]), KERNELS[name]
    dtype = torch.float32 if name == "cuda-efficient" else torch.bfloat16
    saved: list[Tensor] = []
    context = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors), needs_input_grad=(True,) * 3)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
        q, k, v, grad = torch.empty(4, sum(lengths), 16, 48, dtype=dtype, device="cuda")
        runs = tuple((tuple(dilated._segment_runs(lengths, segment)), rate) for segment, rate in RELEASED)
        if name == "cuda-varlen":
            layout = varlen.lay_out(runs, 16, q.device, torch.float32)
            function, more = varlen._VarlenAttention, (layout, kernel)
        else:
            plans = [dilated.plan_blocks(lengths, segment, rate, 16) for segment, rate in RELEASED]
            function, more = dilated._DilatedAttention, (plans, kernel)
        function.forward(context, q, k, v, *more)
        context.saved_tensors = saved
        with Operations() as counted:
            gradients = function.backward(context, grad)
    varlen.lay_out.cache_clear()
    assert [each.shape for each in gradients[:3]] == [q.shape] * 3 and counted.found == {}
    if name == "cuda-varlen":
        assert counted.seen["_flash_attention_backward"] == len(RELEASED)
        assert sum(counted.seen.values()) <= BACKWARD


class Bytes(Operations):
    """Counts bytes of what is neither a product nor attention. Rows that an index takes or adds to count alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        given, made = ([x for x in tree_leaves(side) if isinstance(x, Tensor)] for side in ((args, kwargs), out))
        if name in self.VIEWS or name in ("addmm", "mm") or "attention" in name or not made:
            return out
        if name == "index_select":
            given, made = given[1:], made * 2
        elif name in ("index_add_", "index_copy_"):
            given, made = given[1:], [given[2]] * (2 if name == "index_add_" else 1)
        self.bytes += sum(x.numel() * x.element_size() for x in given + made)
        return out


# What the same count gave before the variable-length path, with `cuda-flash` at 10,000 tiles under autocast.
BYTES_BEFORE = 2_187_000_000


@pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")
@pytest.mark.parametrize(("one_pass", "share"), [(False, 0.77), (True, 0.39)])
def test_a_layer_moves_fewer_bytes_than_block_by_block(
    one_pass: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen.lay_out.cache_clear()
    norms_of(monkeypatch, one_pass=one_pass)
    with torch.device("meta"):
        layer = EncoderLayer(LongNetConfig(depth=1), 0).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_kernel("cuda-varlen"):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
        on_cuda(layer, torch.float32)
        torch.set_autocast_enabled("cuda", True)  # the context manager asks for a driver
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            layer(torch.empty(1, 10_001, 768, device="cuda"))
            with Bytes() as counted:
                layer(torch.empty(1, 10_001, 768, device="cuda"))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    varlen.lay_out.cache_clear()
    assert counted.bytes <= share * BYTES_BEFORE and counted.found == {}
