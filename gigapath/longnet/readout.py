"""Where a query token looks, exactly: the weights behind `dilated_attention`, read out a few rows at a time.

T tokens of one slide, H heads, E head width, B branches. q and k are (T, H, E).

In branch b a query attends by softmax over the keys that it sees there, zero keys included, with log-sum-exp lse'_b;
the branches are averaged with weights softmax over b of lse'_b. A key with score s in branch b therefore has the weight

    exp(s - lse'_b) * exp(lse'_b - lse) = exp(s - lse),    lse = logsumexp over b of lse'_b,

and its weights add up over the branches that see it. The n_b zero keys of a branch, of score 0, have n_b * exp(-lse).
All of these add up to 1 by themselves: nothing is divided by a sum. Memory grows with T, not with its square.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gigapath.longnet.dilated import Block, plan_blocks

# Scores that are laid out at once, in bytes.
SCORE_BYTES = 32 << 20


@dataclass(frozen=True)
class AttentionWeights:
    """The attention of a query, or of a weighted sum of queries.

    Attributes:
        tokens: (H, T) weight of every token.
        zero_keys: (H,) weight on the zero keys of padding, whose value is zero.
        branches: (H, B) weight of each branch; it is that of its tokens and its zero keys together.
    """

    tokens: Tensor
    zero_keys: Tensor
    branches: Tensor

    @property
    def total(self) -> Tensor:
        """(H,): 1 for queries that add up to 1, but for rounding."""
        return self.tokens.sum(1) + self.zero_keys


@dataclass(frozen=True)
class _Rows:
    """Some queries of one head group of one segment: scores (heads, rows, keys)."""

    branch: int
    block: Block
    entry: int
    rows: Tensor
    scores: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The (heads, positions) view of x (T, H) that belongs to the segment and group."""
        return self.block.of(x)[self.entry]


def read_attention(
    q: Tensor, k: Tensor, branches: tuple[tuple[int, int], ...], queries: Tensor, *, scale: float | None = None
) -> AttentionWeights:
    """The weights with which queries attend, in float64 where the device has it.

    Args:
        q: queries (T, H, E) of one slide.
        k: keys (T, H, E).
        branches: (segment length, dilation) of each branch.
        queries: (T,) how much each token counts as a query: one 1 for a single token, 1 / N at each of N tokens for
            their mean. Rows of tokens that count 0 are not computed.
        scale: factor of the scores, 1 / sqrt(E) by default.

    Returns:
        sums over the queries; a query and head that no branch reaches adds nothing.
    """
    count, heads, width = q.shape
    if k.shape != q.shape or queries.shape != (count,):
        raise ValueError(
            f"read_attention: expected q and k (T, H, E) and queries (T,), got {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(queries.shape)}. Give one slide."
        )
    wide = torch.float32 if q.device.type == "mps" else torch.float64  # MPS has no float64
    q, k = q.to(wide) * (width**-0.5 if scale is None else scale), k.to(wide)
    share = queries.to(q).unsqueeze(1).expand(count, heads)

    lse = q.new_full((len(branches), count, heads), -math.inf)
    zero_keys = torch.zeros_like(lse[0])
    for part in _rows(q, k, branches, share):
        padding = part.block.zero_keys
        found = part.scores.logsumexp(-1)
        if padding:
            found = torch.logaddexp(found, torch.full((), math.log(padding), dtype=found.dtype, device=found.device))
            part.of(zero_keys)[:, part.rows] += padding
        part.of(lse[part.branch])[:, part.rows] = found
    total = lse.logsumexp(0)
    total[total == -math.inf] = math.inf  # reached by no branch: every weight below is zero

    tokens = torch.zeros_like(total)
    for part in _rows(q, k, branches, share):
        weights = part.scores.sub_(part.of(total)[:, part.rows].unsqueeze(-1)).exp_()
        part.of(tokens).add_((part.of(share)[:, part.rows].unsqueeze(1) @ weights).squeeze(1))
    return AttentionWeights(
        tokens=tokens.T.contiguous(),
        zero_keys=(zero_keys * (-total).exp() * share).sum(0),
        branches=((lse - total).exp() * share).sum(1).T.contiguous(),
    )


def _rows(q: Tensor, k: Tensor, branches: tuple[tuple[int, int], ...], share: Tensor) -> Iterator[_Rows]:
    """The scores of all queries that count, piece by piece; q is scaled."""
    counts = share != 0
    for branch, (segment, dilation) in enumerate(branches):
        for block in plan_blocks((q.shape[0],), segment, dilation, q.shape[1]):
            asked, keys, counted = block.of(q), block.of(k).transpose(-2, -1), block.of(counts)
            step = max(1, SCORE_BYTES // (block.heads * block.rows * q.element_size()))
            for entry in range(block.batch):
                rows = counted[entry].any(0).nonzero().squeeze(1)
                for chosen in torch.split(rows, step) if len(rows) else ():
                    yield _Rows(branch, block, entry, chosen, asked[entry][:, chosen] @ keys[entry])
