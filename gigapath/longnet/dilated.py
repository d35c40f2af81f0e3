"""Dilated attention: branches of segments and head groups as strided views, merged in place.

Shapes: T tokens of all slides one after another, H heads, E head width. q, k, v are (T, H, E); `lengths` holds the
tokens of each slide. One branch has segments of W tokens and dilation R.

In a segment, head group j (of R groups of ceil(H / R) consecutive heads) sees the positions j, j + R, j + 2R, ...;
the segment counts as W tokens, rounded up to a multiple of R, and positions behind the slide's end are zero keys.
Branches are averaged with weights softmax(lse') per token and head, which carry no gradient; where a branch does not
reach a token and head its lse' is -inf, so a running `lerp` over the blocks of all branches gives the average.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigapath.longnet.attention import attend, attend_backward, choose_kernel, side_by_side
from gigapath.longnet.kernels import CudaVarlenKernel, Extra, Kernel, wide_dtype
from gigapath.longnet.linear import next_step

# Output of one launch, in bytes: a kernel's answer exists beside the merged one for a moment.
LARGEST_LAUNCH = {"cpu": 16 << 20, "other": 256 << 20}


@dataclass(frozen=True)
class Block:
    """Attentions of one shape at regular steps in (T, H, E): one launch of a kernel.

    Row n of head h of batch entry b lies at token `token + b * batch_tokens + h * head_tokens + n * row_tokens` and
    head `head + b * batch_heads + h`.
    """

    token: int
    head: int
    batch: int
    batch_tokens: int
    batch_heads: int
    heads: int
    head_tokens: int
    rows: int
    row_tokens: int
    zero_keys: int

    def of(self, x: Tensor) -> Tensor:
        """The (batch, heads, rows, E) view of x (T, H, E), or the (batch, heads, rows) view of x (T, H)."""
        token, head, *rest = x.stride()
        size: tuple[int, ...] = (self.batch, self.heads, self.rows)
        stride = (
            self.batch_tokens * token + self.batch_heads * head,
            self.head_tokens * token + head,
            self.row_tokens * token,
        )
        return x.as_strided(
            (*size, *x.shape[2:]), (*stride, *rest), x.storage_offset() + self.token * token + self.head * head
        )

    def parts(self, largest: int) -> "list[Block]":
        """This block cut along its batch, and along the heads of an entry that is too large by itself, so that no part
        has more than `largest` rows of heads (or one head)."""
        batch = max(1, largest // (self.heads * self.rows))
        heads = min(self.heads, max(1, largest // self.rows))
        return [
            replace(
                self,
                token=self.token + entry * self.batch_tokens + head * self.head_tokens,
                head=self.head + entry * self.batch_heads + head,
                batch=min(batch, self.batch - entry),
                heads=min(heads, self.heads - head),
            )
            for entry in range(0, self.batch, batch)
            for head in range(0, self.heads, heads)
        ]


Plan = tuple[Block, ...]


@lru_cache(maxsize=256)
def plan_blocks(lengths: tuple[int, ...], segment: int, dilation: int, num_heads: int) -> Plan:
    """The blocks of one branch over slides of these lengths, as few as possible.

    Args:
        lengths: tokens of each slide, at least 1.
        segment: tokens of a segment; a shorter slide is one segment of its own length.
        dilation: R.
        num_heads: H, not necessarily a multiple of R.
    """
    blocks: list[Block] = []
    heads = -(-num_heads // dilation)
    whole_groups, heads_left = divmod(num_heads, heads)
    for start, step, count, tokens, window in _segment_runs(lengths, segment):
        keys = -(-window // dilation)
        rows, longer = divmod(tokens, dilation)
        # Groups below `longer` have one position more than the others in a segment of this many tokens.
        for first, last, positions in ((0, longer, rows + 1), (longer, dilation, rows)):
            if positions == 0:
                continue
            common = {"rows": positions, "row_tokens": dilation, "zero_keys": keys - positions}
            groups = min(last, whole_groups) - first
            if groups > 0:
                blocks += _blocks_of_groups(start, step, count, first, groups, heads, common)
            if heads_left and first <= whole_groups < last:
                blocks += _blocks_of_groups(start, step, count, whole_groups, 1, heads, common, heads_left)
    return tuple(blocks)


def _segment_runs(lengths: tuple[int, ...], segment: int) -> list[tuple[int, int, int, int, int]]:
    """Equal segments at a regular step: (first token, step in tokens, how many, tokens of each, their window)."""
    runs: list[tuple[int, int, int, int, int]] = []
    start = 0
    for length in lengths:
        window = min(segment, length)
        for offset in range(0, length, window):
            first, tokens = start + offset, min(window, length - offset)
            if runs and runs[-1][3:] == (tokens, window):
                begin, step, count, _, _ = runs[-1]
                if count == 1 or begin + step * count == first:
                    runs[-1] = (begin, step if count > 1 else first - begin, count + 1, tokens, window)
                    continue
            runs.append((first, 0, 1, tokens, window))
        start += length
    return runs


def _blocks_of_groups(
    start: int,
    step: int,
    count: int,
    group: int,
    groups: int,
    group_heads: int,
    common: dict[str, int],
    heads: int | None = None,
) -> list[Block]:
    """Blocks for `groups` head groups of `count` segments: group j starts at token j and head j * group_heads."""
    if group_heads == 1:  # the groups are the heads: one launch for all segments
        return [Block(start + group, group, count, step, 0, groups, 1, **common)]
    heads = heads or group_heads
    if groups <= count:
        return [
            Block(start + j, j * group_heads, count, step, 0, heads, 0, **common) for j in range(group, group + groups)
        ]
    return [
        Block(start + i * step + group, group * group_heads, groups, 1, group_heads, heads, 0, **common)
        for i in range(count)
    ]


def count_operations(
    lengths: tuple[int, ...], branches: tuple[tuple[int, int], ...], num_heads: int, head_dim: int
) -> int:
    """Multiply-adds x 2 of the dilated attention over slides of these lengths, real keys only."""
    return sum(
        4 * block.batch * block.heads * block.rows**2 * head_dim
        for segment, dilation in branches
        for block in plan_blocks(lengths, segment, dilation, num_heads)
    )


@dataclass
class _Saved:
    """What the backward pass of one block needs."""

    block: Block
    out: Tensor
    lse: Tensor
    extra: Extra


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plans: list[Plan], kernel: Kernel, keep: list[_Saved] | None
) -> tuple[Tensor, Tensor]:
    """(out (T, H, E), lse (T, H)) of all branches together, in the wide dtype of q; fills `keep` for the backward."""
    wide = wide_dtype(q.dtype)
    merged = torch.empty(q.shape, dtype=wide, device=q.device)
    total = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    scale = q.shape[-1] ** -0.5
    # A first branch that reaches every token and head (dilation 1 does) is written, not merged into zeros.
    write = sum(block.batch * block.heads * block.rows for block in plans[0]) == total.numel()
    if not write:
        merged.zero_()
    for plan in plans:
        for block in plan:
            next_step()
            out, lse, extra = attend(block.of(q), block.of(k), block.of(v), block.zero_keys, scale, kernel)
            target = block.of(total)
            if write:
                block.of(merged).copy_(out)
                target.copy_(lse)
            else:
                new = torch.logaddexp(target, lse)
                block.of(merged).lerp_(out.to(wide), (lse - new).exp_().unsqueeze(-1))
                target.copy_(new)
            if keep is not None:
                keep.append(_Saved(block, out, lse, extra))
        write = False
    return merged, total


class _DilatedAttention(torch.autograd.Function):
    """All branches of the dilated attention; the averaging weights carry no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plans: list[Plan], kernel: Kernel) -> Tensor:
        keep: list[_Saved] = []
        merged, total = _forward(q, k, v, plans, kernel, keep)
        # Every large tensor goes through save_for_backward, where activation checkpointing can drop it.
        ctx.save_for_backward(q, k, v, total, *(part for saved in keep for part in (saved.out, saved.lse)))
        ctx.blocks, ctx.kernel = [(saved.block, saved.extra) for saved in keep], kernel
        return merged.to(q.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, total, *parts = ctx.saved_tensors
        sums = [torch.zeros(q.shape, dtype=total.dtype, device=q.device) for _ in range(3)]
        scale = q.shape[-1] ** -0.5
        for (block, extra), out, lse in zip(ctx.blocks, parts[::2], parts[1::2], strict=True):
            weight = (lse - block.of(total)).exp_().unsqueeze(-1)
            grad = (block.of(grads[0]) * weight).to(q.dtype)
            views = (block.of(q), block.of(k), block.of(v))
            found = attend_backward(grad, *views, out, lse, extra, scale, ctx.kernel)
            for whole, part in zip(sums, found, strict=True):
                block.of(whole).add_(part)
        return (*(whole.to(q.dtype) for whole in sums), None, None)


# Nothing in here gains by a compiler, and each length would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator,misc]
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    branches: tuple[tuple[int, int], ...],
    *,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attend within each slide by several branches and average them by their log-sum-exps; differentiable once.

    Args:
        q: queries (T, H, E).
        k: keys (T, H, E).
        v: values (T, H, E).
        lengths: tokens of each slide, T in all.
        branches: (segment length, dilation) of each branch.
        kernel: see `gigapath.longnet.attention.attention`.

    Returns:
        (T, H, E) in the dtype of q; zero where no branch reaches a token and head.
    """
    if sum(lengths) != q.shape[0] or min(lengths, default=0) < 1:
        raise ValueError(
            f"dilated_attention: expected lengths of at least 1 that add up to {q.shape[0]} tokens, got {lengths}. "
            "Give the number of tokens of each slide."
        )
    q, k, v = side_by_side(q, k, v)
    kernel = kernel or choose_kernel(q)
    if isinstance(kernel, CudaVarlenKernel) and all(q.shape[1] % dilation == 0 for _, dilation in branches):
        from gigapath.longnet.varlen import lay_out, varlen_attention  # on CUDA alone

        runs = tuple((tuple(_segment_runs(lengths, segment)), dilation) for segment, dilation in branches)
        return varlen_attention(q, k, v, lay_out(runs, q.shape[1], q.device, wide_dtype(q.dtype)), kernel)
    largest = LARGEST_LAUNCH["cpu" if q.device.type == "cpu" else "other"] // (q.shape[2] * q.element_size())
    plans = [
        tuple(part for block in plan_blocks(lengths, segment, dilation, q.shape[1]) for part in block.parts(largest))
        for segment, dilation in branches
    ]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _DilatedAttention.apply(q, k, v, plans, kernel)
        return out
    return _forward(q, k, v, plans, kernel, None)[0].to(q.dtype)
