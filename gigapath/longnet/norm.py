"""The encoder's layer norms in inference, in one pass over memory where a GPU can.

Under autocast PyTorch converts what it normalizes to float32, and the answer back for the next product: of a layer's
bytes outside of products and attention two thirds. A Triton kernel reads and writes each entry once, in half precision,
and takes the GELU before the norm along. It serves for a device, types and width only after it has been compared with
PyTorch's own at first use; that one serves wherever Triton, a compiler or the right answer is missing.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigapath.longnet.linear import gelu_in_float32

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)  # where one pass is tried

# How far an answer may lie from the true one, relative to 1 + its size: two units in the last place.
TOLERANCES = {torch.float16: 2**-9, torch.bfloat16: 2**-6}


def normalize(norm: Any, x: Tensor, *, gelu: bool = False) -> Tensor:
    """norm(x), or norm(gelu(x)), of x (..., D), outside of autograd; from one pass in the type of the next product."""
    one_pass = choose_one_pass(norm, x, x.dtype, gelu=gelu)
    if one_pass is not None and x.numel():
        found: Tensor = one_pass(x, norm.weight, norm.bias, norm.eps, product_dtype(x), gelu)
        return found
    answer: Tensor = norm(gelu_in_float32(x) if gelu else x)
    return answer


def product_dtype(like: Tensor) -> torch.dtype:
    """In which type products of `like` are computed; autocast leaves float64 alone."""
    device = like.device.type
    takes = torch.is_autocast_enabled(device) and like.dtype != torch.float64
    return torch.get_autocast_dtype(device) if takes else like.dtype


def choose_one_pass(norm: Any, like: Tensor, dtype: torch.dtype, *, gelu: bool) -> Callable[..., Tensor] | None:
    """What normalizes activations of `dtype` on the device of `like` in one pass; None where PyTorch's own serves."""
    if like.device.type not in DEVICES or (out := product_dtype(like)) not in TOLERANCES:
        return None
    if type(norm) is not nn.LayerNorm or norm.bias is None or "forward" in norm.__dict__:
        return None
    if torch.compiler.is_compiling():  # it would be compared while it is traced
        return None
    return find_one_pass(like.device, dtype, out, norm.weight.dtype, norm.weight.numel(), gelu)


@lru_cache(maxsize=64)
def find_one_pass(
    device: torch.device, dtype: torch.dtype, out: torch.dtype, weights: torch.dtype, width: int, gelu: bool
) -> Callable[..., Tensor] | None:
    """The Triton kernel, if it is right on such tensors here; else None."""
    where = f"{device}, {dtype} to {out}, width {width}"
    try:
        from gigapath.longnet.triton_norm import layer_norm

        error = _error(layer_norm, device, dtype, out, weights, width, gelu)
    except Exception as reason:  # without Triton, a driver or a compiler, or whatever a new version raises
        logger.info("layer norms on %s are PyTorch's own: %s: %s", where, type(reason).__name__, str(reason)[:200])
        return None
    if not error <= TOLERANCES[out]:
        logger.info("layer norms on %s are PyTorch's own: the one of one pass is wrong by %.1e", where, error)
        return None
    logger.info("layer norms on %s take one pass, which agrees with PyTorch's own", where)
    return layer_norm


def _error(
    layer_norm: Any,
    device: torch.device,
    dtype: torch.dtype,
    out: torch.dtype,
    weights: torch.dtype,
    width: int,
    gelu: bool,
) -> float:
    """Its largest difference from float64 math on the CPU, relative to 1 + the size of the true value; infinite for an
    answer of another type or shape."""
    random = torch.Generator().manual_seed(width)
    x = (torch.randn(5, width, generator=random, device="cpu") * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, width, generator=random, device="cpu").to(weights)
    found = layer_norm(x.to(device), weight.to(device), bias.to(device), 1e-5, out, gelu)
    if found.shape != x.shape or found.dtype != out:
        return float("inf")
    before = gelu_in_float32(x).double() if gelu else x.double()
    true = F.layer_norm(before, (width,), weight.double(), bias.double(), 1e-5)
    return float(((found.cpu().double() - true).abs() / (1 + true.abs())).max())
