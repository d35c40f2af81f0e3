"""The layer norm as one Triton kernel, with the exact GELU before it and the rounding to another type after it.

Imported by `gigapath.longnet.norm` alone, where Triton is installed and may serve.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,misc]
def _normalize_row(x, weight, bias, out, width, eps, gelu: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * width  # a million rows of 3072 are more than 32 bits count
    places = tl.arange(0, block)
    there = places < width
    values = tl.load(x + start + places, mask=there, other=0.0).to(tl.float32)
    if gelu:
        values = 0.5 * values * (1 + tl.math.erf(values * 0.7071067811865476))
        values = values.to(x.dtype.element_ty).to(tl.float32)  # as PyTorch's GELU leaves it in memory
    centered = tl.where(there, values - tl.sum(values, 0) / width, 0.0)
    scaled = centered * tl.rsqrt(tl.sum(centered * centered, 0) / width + eps)
    factors = tl.load(weight + places, mask=there, other=0.0).to(tl.float32)
    shifts = tl.load(bias + places, mask=there, other=0.0).to(tl.float32)
    tl.store(out + start + places, (scaled * factors + shifts).to(out.dtype.element_ty), mask=there)


@torch.library.custom_op("gigapath::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, gelu: bool) -> Tensor:
    """The layer norm over the last dimension of x (..., D), or of gelu(x) rounded to the type of x, in `dtype`;
    computed in float32. Without a gradient."""
    out = _like(x, dtype)
    width = x.shape[-1]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _normalize_row[(x.numel() // width,)](
            x.contiguous(), weight, bias, out, width, eps, gelu=gelu, block=triton.next_power_of_2(width)
        )
    return out


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, gelu: bool) -> Tensor:
    return _like(x, dtype)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
