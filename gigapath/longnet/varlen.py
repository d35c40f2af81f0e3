"""Dilated attention on a GPU: one variable-length launch a branch, whose sequences are the head groups of all segments
of all slides.

Shapes as in `gigapath.longnet.dilated`. In a branch of dilation R a token belongs to one head group, that of its place
in the segment modulo R, so a branch has T rows of h = H / R heads. A sequence is a group of a segment; its rows are
gathered side by side, where R is 1 they lie so already.

Branch b gives out_b and lse_b without its zero keys; with n of them lse'_b = logaddexp(lse_b, log n). The average over
branches with weights softmax(lse'), each out_b scaled by exp(lse_b - lse'_b) for its zero keys, is

    sum over b of out_b * exp(lse_b - total),    total = logsumexp over b of lse'_b,

so that the zero keys cost no pass over the outputs.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigapath.longnet.kernels import CudaVarlenKernel, Spans, wide_dtype
from gigapath.longnet.linear import next_step

# Of one branch, the equal segments at a regular step: (first token, step, how many, tokens of each, their window).
Runs = tuple[tuple[int, int, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of one branch.

    Attributes:
        dilation: R.
        rows: (T,) number of each gathered row among the T * R groups of h heads; None where R is 1.
        spans: where each sequence begins and how long the longest is, as the kernel takes it.
        zero_keys: (T, 1) logarithm of the number of zero keys of each row's sequence; None where there are none.
    """

    dilation: int
    rows: Tensor | None
    spans: Spans
    zero_keys: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The rows (T, h, ...) of x (T, H, ...)."""
        if self.rows is None:
            return x
        groups = x.view(len(x) * self.dilation, -1)
        return groups.index_select(0, self.rows).view(len(x), x.shape[1] // self.dilation, *x.shape[2:])

    def add_to(self, x: Tensor, rows: Tensor) -> None:
        """Add rows (T, h, ...) to x (T, H, ...) where they were taken. No row is there twice."""
        if self.rows is None:
            x.add_(rows)
        else:
            groups = x.view(len(x) * self.dilation, -1)
            groups.index_add_(0, self.rows, rows.reshape(len(rows), -1))

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write rows (T, h) into x (T, H) where they belong."""
        if self.rows is None:
            x.copy_(rows)
        else:
            x.view(len(x) * self.dilation, -1).index_copy_(0, self.rows, rows)


@dataclass(frozen=True, eq=False)
class Layout:
    """The sequences of all branches.

    Attributes:
        branches: of each.
        zero_keys: (branches, T, H) logarithm of the number of zero keys, -inf where a branch does not reach; None where
            there are none at all.
    """

    branches: tuple[Sequences, ...]
    zero_keys: Tensor | None


@lru_cache(maxsize=1)  # all layers of a pass share it; another would hold a device's memory for nothing
def lay_out(branches: tuple[tuple[Runs, int], ...], heads: int, device: torch.device, wide: torch.dtype) -> Layout:
    """The sequences of all branches, brought to the device in one copy that the host does not wait for.

    Args:
        branches: segments and dilation of each.
        heads: H, a multiple of every dilation.
        device: where they are used.
        wide: dtype of the log-sum-exps.
    """
    made = [_sequences(runs, dilation) for runs, dilation in branches]
    parts = [part for rows, starts, zeros in made for part in (rows, starts, zeros)]
    host = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        host = host.pin_memory()
    there = torch.split(host.to(device, non_blocking=True), [len(part) for part in parts])
    found = []
    for (_, dilation), (_, starts, zeros), part in zip(branches, made, range(0, len(parts), 3), strict=True):
        begin, longest = there[part + 1].to(torch.int32), int(np.diff(starts).max())
        rows = None if dilation == 1 else there[part]
        logs = there[part + 2].to(wide).log_().unsqueeze(1) if zeros.any() else None
        found.append(Sequences(dilation, rows, (begin, begin, longest, longest), logs))
    table = None
    if any(each.zero_keys is not None for each in found):
        table = torch.full((len(found), len(made[0][2]), heads), float("-inf"), dtype=wide, device=device)
        for whole, each in zip(table, found, strict=True):
            if each.zero_keys is not None:
                each.put(whole, each.zero_keys.expand(-1, heads // each.dilation))
    return Layout(tuple(found), table)


def _sequences(runs: Runs, dilation: int) -> tuple[Any, Any, Any]:
    """Rows (none where the dilation is 1), starts and zero keys of each row, int64."""
    rows, counts, zeros = [], [0], []
    for start, step, count, tokens, window in runs:
        firsts = start + step * np.arange(count, dtype=np.int64)
        for group in range(min(dilation, tokens)):
            places = np.arange(group, tokens, dilation, dtype=np.int64)
            if dilation > 1:
                rows.append(((firsts[:, None] + places) * dilation + group).ravel())
            counts += [len(places)] * count
            zeros.append(np.full(count * len(places), -(-window // dilation) - len(places), np.int64))
    return np.concatenate(rows) if rows else np.empty(0, np.int64), np.cumsum(counts), np.concatenate(zeros)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, kernel: CudaVarlenKernel) -> Tensor:
    """(T, H, E) in the dtype of q (T, H, E); arguments as they come from `dilated_attention`. Differentiable once."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        found: Tensor = _VarlenAttention.apply(q, k, v, layout, kernel)
        return found
    return _forward(q, k, v, layout, kernel)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, kernel: CudaVarlenKernel
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, Any]]]:
    """The average, `total` (T, H), and of each branch its output and log-sum-exp without zero keys, and what its
    backward needs besides."""
    wide = wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5
    found = []
    lses = torch.full((len(layout.branches), *q.shape[:2]), float("-inf"), dtype=wide, device=q.device)
    for whole, each in zip(lses, layout.branches, strict=True):
        next_step()
        taken = [each.take(x) for x in (q, k, v)]
        out, lse, extra = kernel.packed(taken[0], taken[1], taken[2], each.spans, scale)
        each.put(whole, lse)
        found.append((out, lse, extra))
    total = (lses if layout.zero_keys is None else torch.logaddexp(lses, layout.zero_keys)).logsumexp(0)
    shares = lses.sub_(total).exp_()
    merged: Tensor | None = None
    for whole, each, (out, _, _) in zip(shares, layout.branches, found, strict=True):
        weighted = out * each.take(whole).unsqueeze(-1)
        if merged is None and each.rows is None:
            merged = weighted
            continue
        if merged is None:
            merged = torch.zeros(q.shape, dtype=wide, device=q.device)
        each.add_to(merged, weighted)
    assert merged is not None
    return merged.to(q.dtype), total, found


class _VarlenAttention(torch.autograd.Function):
    """All branches; the averaging weights carry no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, kernel: CudaVarlenKernel) -> Tensor:
        merged, total, found = _forward(q, k, v, layout, kernel)
        ctx.save_for_backward(q, k, v, total, *(part for out, lse, _ in found for part in (out, lse)))
        ctx.branches, ctx.kernel, ctx.extras = layout.branches, kernel, [extra for _, _, extra in found]
        return merged

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, total, *parts = ctx.saved_tensors
        grad = grads[0].contiguous()
        sums = [torch.zeros(q.shape, dtype=total.dtype, device=q.device) for _ in range(3)]
        scale = q.shape[-1] ** -0.5
        for each, extra, out, lse in zip(ctx.branches, ctx.extras, parts[::2], parts[1::2], strict=True):
            full = lse if each.zero_keys is None else torch.logaddexp(lse, each.zero_keys)
            out = (out * (lse - full).exp().unsqueeze(-1)).to(q.dtype)
            weighted = (each.take(grad) * (full - each.take(total)).exp_().unsqueeze(-1)).to(q.dtype)
            taken = [each.take(x) for x in (q, k, v)]
            gradients = ctx.kernel.packed_backward(weighted, *taken, out, full, extra, each.spans, scale)
            for whole, part in zip(sums, gradients, strict=True):
                each.add_to(whole, part.to(whole.dtype))
        return (*(whole.to(q.dtype) for whole in sums), None, None)
