"""The linear layer of the encoder, on the fastest product that the machine has, and what happens between the steps of a
long computation.

In inference on a CPU in float32 oneDNN's product serves, which is some 10 % faster than the default one here and takes
the GELU along while a block is still in cache. It is a private operation of torch's compiler: it is compared with the
public one at first use, which serves wherever the private one is missing or wrong.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Rows of one step in inference on a CPU: a second or two of work. Each row's numbers are those of one large product.
_STEP_ROWS = 1 << 16


_between: ContextVar[Callable[[], None] | None] = ContextVar("between_steps", default=None)


@contextlib.contextmanager
def between_steps(check: Callable[[], None]) -> Iterator[None]:
    """Within the block `check` is called between the steps of this thread's inference; it may raise to end it.

    A step is one launch of an attention kernel, or one part of a linear layer's rows: seconds on a CPU at the most,
    where a layer over 500,000 tiles takes minutes.
    """
    token = _between.set(check)
    try:
        yield
    finally:
        _between.reset(token)


def next_step() -> None:
    """Call what `between_steps` was given, if anything."""
    if not torch.compiler.is_compiling() and (check := _between.get()) is not None:
        check()


class Linear(nn.Linear):
    """A linear layer that starts with Xavier-uniform weights and zero biases, written once.

    With `half_products` its products in inference on a CPU take bfloat16 inputs; sums are float32.
    """

    half_products = False

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        product = self.product(input)
        if input.numel() <= self.in_features * _STEP_ROWS or not self._is_plain_inference(input):
            return product(input)
        rows = input.reshape(-1, self.in_features)
        out = rows.new_empty(len(rows), self.out_features)
        for some, target in zip(torch.split(rows, _STEP_ROWS), torch.split(out, _STEP_ROWS), strict=True):
            next_step()
            target.copy_(product(some))
        return out.view(*input.shape[:-1], self.out_features)

    def product(self, like: Tensor, *, gelu: bool = False) -> Callable[[Tensor], Tensor]:
        """What computes this layer for inputs such as `like`, made ready once for many of them.

        Args:
            like: tells device and dtype.
            gelu: whether the exact GELU, computed in float32, follows; with `half_products` its result may be
                bfloat16, for the next product to take.
        """
        if not self._is_plain_inference(like):
            return self._default_with_gelu if gelu else self._default
        fused = find_fused_product(torch.bfloat16 if self.half_products else torch.float32)
        if self.half_products:
            weight, bias = self.weight.bfloat16(), self.bias.bfloat16()
            if not gelu:
                return lambda x: F.linear(x.bfloat16(), weight, bias).float()
            if fused is None:
                return lambda x: F.gelu(F.linear(x.bfloat16(), weight, bias).float())
            return lambda x: cast(Tensor, fused(x.bfloat16(), weight, bias, "gelu", [], "none"))
        if fused is None:
            return self._default_with_gelu if gelu else self._default
        weight, bias = self.weight, self.bias
        return lambda x: cast(Tensor, fused(x, weight, bias, "gelu" if gelu else "none", [], "none"))

    def _default(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _default_with_gelu(self, x: Tensor) -> Tensor:
        return gelu_in_float32(self._default(x))

    def _is_plain_inference(self, like: Tensor) -> bool:
        return (
            like.device.type == "cpu"
            and like.dtype == self.weight.dtype == torch.float32
            and self.bias is not None
            and like.numel() > 0
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        )


def gelu_in_float32(x: Tensor) -> Tensor:
    """The exact GELU, computed in float32 and rounded to the dtype of x. CUDA's own kernel does so by itself, without
    writing float32 to memory and back: equal to the bit in bfloat16, within 8e-6 in float16."""
    return F.gelu(x) if x.device.type == "cuda" else F.gelu(x.float()).type_as(x)


# How far a fused product may lie from the true one, relative to 1 + its size: rounding of the type, with room.
FUSED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@cache
def find_fused_product(dtype: torch.dtype) -> Any:
    """oneDNN's linear operation with an activation, if it is right on tensors of `dtype` here; else None.

    Some CPUs have it in one type only: without AVX-512, oneDNN has no bfloat16 product.
    """
    random = torch.Generator().manual_seed(0)
    # On the CPU by name: a script, or the loading of a checkpoint, may have made another device the default.
    shapes = ((2, 5, 24), (40, 24), (40,))
    x, weight, bias = (torch.randn(*shape, generator=random, device="cpu").to(dtype) for shape in shapes)
    try:
        operation = torch.ops.mkldnn._linear_pointwise
        with torch.no_grad():
            linear = F.linear(x.double(), weight.double(), bias.double())
            error = max(
                ((operation(x, weight, bias, name, [], "none") - true).abs() / (1 + true.abs())).max().item()
                for name, true in (("none", linear), ("gelu", F.gelu(linear)))
            )
    except Exception as reason:  # whatever a private operation raises, the public one serves
        logger.info("linear layers in %s take the default product: oneDNN's raised %s", dtype, reason)
        return None
    if not error <= FUSED_TOLERANCE[dtype]:
        logger.info("linear layers in %s take the default product: oneDNN's is wrong by %.1e", dtype, error)
        return None
    logger.info("linear layers in %s take oneDNN's product, which agrees with the default one", dtype)
    return operation


@lru_cache(maxsize=1)
def bfloat16_pays() -> bool:
    """Whether this machine's bfloat16 product is at least twice as fast as its float32 product, by a quick try."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(1024, 1024, dtype=dtype, device="cpu") for _ in range(2))
        tries = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b)
            tries.append(time.perf_counter() - start)
        seconds[dtype] = min(tries)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    logger.info("bfloat16 products take 1 / %.2f of the time of float32 ones here", ratio)
    return ratio >= 2
