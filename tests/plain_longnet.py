"""Dilated attention spelled out with real zero keys, for float64 autograd to differentiate."""

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_dilated_attention(q: Tensor, k: Tensor, v: Tensor, branches: tuple[tuple[int, int], ...]) -> Tensor:
    """Of one slide, (N, H, E): pad to whole segments, pad each to a multiple of the dilation, attend, put back."""
    tokens, heads, _ = q.shape
    outs, lses = [], []
    for segment, dilation in branches:
        window = min(segment, tokens)
        padded = -(-window // dilation) * dilation
        group_heads = -(-heads // dilation)
        out = torch.zeros_like(q)
        lse = q.new_full((tokens, heads), float("-inf"))
        for start in range(0, tokens, window):
            length = min(window, tokens - start)
            parts = [F.pad(x[start : start + length], (0, 0, 0, 0, 0, padded - length)) for x in (q, k, v)]
            for head in range(heads):
                group = head // group_heads
                a, b, c = (part[group::dilation, head] for part in parts)
                scores = a @ b.T * q.shape[-1] ** -0.5
                positions = torch.arange(group, padded, dilation)
                real = positions < length
                at = start + positions[real]
                out = out.index_put((at, torch.tensor(head)), (scores.softmax(-1) @ c)[real])
                lse = lse.index_put((at, torch.tensor(head)), scores.logsumexp(-1)[real])
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0).detach()
    return (torch.stack(outs) * weights.unsqueeze(-1)).sum(0)
