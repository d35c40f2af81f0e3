"""Attention from q, k, v to (out, lse): one function, several kernels, exact zero keys.

Shapes: B batch, H heads, N queries, K keys, E head width. Tensors are (B, H, N, E) with any strides as long as the
last one is 1; a log-sum-exp is (B, H, N), natural logarithm, float32 (float64 for float64 inputs).

**Zero keys.** LongNet pads its segments with zero vectors after the projections, and the weights were trained so: a
zero key has score 0 and value 0 and takes part in the softmax. With n of them and real scores s,

    lse' = logaddexp(lse, log n),    out' = out * exp(lse - lse')

are exact, so no zero key is ever laid out. Backwards the factor belongs to the softmax: with P = exp(s - lse') the
gradients are dV = P^T g and dS = P * (g V^T - sum(g * out')), which is what a kernel's own backward computes when it
is given out' and lse' in place of out and lse.

**Choice.** A kernel of `gigapath.longnet.kernels` is taken for a device, dtype and head width only after a check at
first use (a few ms); where none passes, the plain one serves, and one warning says why.
"""

import contextlib
import itertools
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigapath.longnet.kernels import KERNELS, PLAIN, CudaVarlenKernel, Extra, Kernel, candidates, wide_dtype

logger = logging.getLogger(__name__)

# Largest error of a kernel against float64 maths on the same rounded inputs, relative to the largest entry: (outputs,
# log-sum-exp, gradients). Half precision: 4 units in the last place on outputs; gradients add up more roundings.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12, 1e-11),
    torch.float32: (2e-5, 2e-5, 5e-5),
    torch.float16: (4 * 2**-11, 1e-3, 1e-2),
    torch.bfloat16: (4 * 2**-8, 1e-3, 6e-2),
}

_chosen: dict[tuple[torch.device, torch.dtype, int], Kernel] = {}
_forced: list[Kernel] = []


def add_zero_keys(out: Tensor, lse: Tensor, zero_keys: int) -> tuple[Tensor, Tensor]:
    """Bring `zero_keys` keys with score 0 and value 0 into a finished softmax; changes `out` in place.

    Args:
        out: (B, H, N, E), without the zero keys.
        lse: (B, H, N), without the zero keys.
        zero_keys: how many; 0 returns the inputs as they are.
    """
    if zero_keys == 0:
        return out, lse
    # torch.full writes on the device; a tensor made of a Python number is copied there, and the host waits for it.
    full = torch.logaddexp(lse, torch.full((), math.log(zero_keys), dtype=lse.dtype, device=lse.device))
    return out.mul_((lse - full).exp().unsqueeze(-1)), full


def attend(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: int, scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor, Extra]:
    """(out', lse', what the kernel's backward needs besides), outside of autograd; see `attention`."""
    with torch.autocast(q.device.type, enabled=False):
        out, lse, extra = kernel.forward(q, k, v, scale)
        return *add_zero_keys(out, lse, zero_keys), extra


def side_by_side(*tensors: Tensor) -> list[Tensor]:
    """The tensors with the entries of their last dimension side by side, as the kernels read them: torch's own take
    other strides without a word and answer with other numbers."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for what `attend` gave."""
    with torch.autocast(q.device.type, enabled=False):
        return kernel.backward(grad, q, k, v, out, lse, extra, scale)


class _Attention(torch.autograd.Function):
    """Attention with zero keys; the gradient flows through `out` only."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, zero_keys: int, scale: float, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        out, lse, ctx.extra = attend(q, k, v, zero_keys, scale, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.kernel = scale, kernel
        ctx.mark_non_differentiable(lse)
        return out, lse

    # What was saved carries no gradient: a second derivative would come out wrong, so it is refused.
    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        found = attend_backward(grads[0], q, k, v, out, lse, ctx.extra, ctx.scale, ctx.kernel)
        return (*found, None, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    zero_keys: int = 0,
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every query to every key, and to `zero_keys` keys that are zero vectors; differentiable once.

    Args:
        q: queries (B, H, N, E), N at least 1.
        k: keys (B, H, K, E), K at least 1.
        v: values (B, H, K, E).
        zero_keys: keys with score 0 and value 0 beside the real ones.
        scale: factor of the scores, 1 / sqrt(E) by default.
        kernel: which implementation; by default the best one that passed its check on this device.

    Returns:
        out (B, H, N, E) in the dtype of q, and lse (B, H, N), the zero keys included. `out` carries the gradient.
    """
    if min(q.shape[2], k.shape[2]) < 1:
        raise ValueError(
            f"attention: expected at least one query and one key, got {q.shape[2]} and {k.shape[2]}. "
            "Leave empty slides out."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _Attention.apply(*side_by_side(q, k, v), zero_keys, scale, kernel or choose_kernel(q))
    return out, lse


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention` in the form of the flash-attn package, by the published name; on any device.

    Args:
        q: queries (B, L, H, D).
        k: keys (B, K, H, D).
        v: values (B, K, H, D).
        dropout: of the attention weights; only 0 is served, as LongNet uses it.
        bias: must be None, as LongNet uses none.
        softmax_scale: factor of the scores, 1 / sqrt(D) by default.
        is_causal: whether query i sees keys 0 to i only; float32 scores of the whole square are laid out for it.

    Returns:
        out (B, L, H, D), and lse (B, H, L).
    """
    if dropout or bias is not None:
        raise ValueError(
            f"flash_attn_func: expected dropout 0 and no bias, got {dropout!r} and {type(bias).__name__}. "
            "Use torch.nn.functional.scaled_dot_product_attention for these."
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if is_causal:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = (q.float() @ k.float().transpose(-2, -1) * scale).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v.float()).to(q.dtype).transpose(1, 2), scores.logsumexp(-1)
    out, lse = attention(q, k, v, scale=softmax_scale)
    return out.transpose(1, 2), lse


# ---------------------------------------------------------------------------------------------------- which kernel


@contextlib.contextmanager
def use_kernel(kernel: str | Kernel) -> Iterator[None]:
    """Within the block every attention of this process runs on `kernel` (a name of KERNELS or an object), unchecked."""
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            raise ValueError(f"use_kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}. Take one of these.")
        kernel = KERNELS[kernel]
    _forced.append(kernel)
    try:
        yield
    finally:
        _forced.pop()


def choose_kernel(q: Tensor) -> Kernel:
    """The kernel for tensors such as `q` (B, H, N, E): checked once per device, dtype and head width, then kept."""
    if _forced:
        return _forced[-1]
    key = (q.device, q.dtype, q.shape[-1])
    if key not in _chosen:
        _chosen[key] = _first_that_passes(*key)
    return _chosen[key]


def forget_choices() -> None:
    """Check the kernels again at their next use."""
    _chosen.clear()


def _first_that_passes(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    where = f"{device}, {str(dtype).removeprefix('torch.')}, head width {head_dim}"
    reasons = []
    for kernel in candidates(device, dtype):
        fault = find_fault(kernel, device, dtype, head_dim)
        if fault is None:
            logger.info("attention on %s: kernel %s, which agrees with the plain one", where, kernel.name)
            return kernel
        reasons.append(f"{kernel.name}: {fault}")
    why = "; ".join(reasons) or "torch has no kernel with a log-sum-exp there"
    warnings.warn(f"attention on {where} takes the plain path, slower but exact ({why}).", stacklevel=2)
    return PLAIN


def find_fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare a kernel with the plain one in float64, on the CPU; None where it is right, else what is wrong.

    Two cases, outputs, log-sum-exps and gradients each: a short one, and a ragged one of strided views as dilation
    makes them, with many zero keys, so that a backward that forgets them is found out.
    """
    with torch.no_grad():
        for case, (rows, stride, zero_keys) in {"short": (5, 1, 0), "ragged": (197, 3, 120)}.items():
            random = torch.Generator().manual_seed(rows)
            made = torch.randn(4, 2, rows * stride, 3, head_dim, generator=random, device="cpu").to(dtype)
            try:
                got = _everything(kernel, made.to(device), stride, zero_keys)
            except Exception as error:  # whatever a private operation raises, the plain kernel serves
                return f"the {case} case raised {type(error).__name__}: {str(error)[:200]}"
            true = _everything(PLAIN, made.double(), stride, zero_keys)
            fault = _difference(got, true, float(made.double()[2].abs().max()), dtype)
            if fault is not None:
                return f"the {case} case gives {fault}"
        if isinstance(kernel, CudaVarlenKernel):
            return _packed_fault(kernel, device, dtype, head_dim)
    return None


def _packed_fault(kernel: CudaVarlenKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """`find_fault` for sequences of several lengths side by side, single rows among them."""
    lengths, heads = (5, 197, 1, 64), 3
    random = torch.Generator().manual_seed(0)
    made = torch.randn(4, sum(lengths), heads, head_dim, generator=random, device="cpu").to(dtype)
    scale = head_dim**-0.5
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    spans = (starts, starts, max(lengths), max(lengths))
    q, k, v, grad = made.to(device)
    try:
        out, lse, extra = kernel.packed(q, k, v, spans, scale)
        gradients = kernel.packed_backward(grad, q, k, v, out, lse, extra, spans, scale)
    except Exception as error:
        return f"the packed case raised {type(error).__name__}: {str(error)[:200]}"
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))
    single = [_everything(PLAIN, part[:, None], 1, 0) for part in torch.split(made.double(), list(lengths), dim=1)]
    true = {name: torch.cat([each[name][0].transpose(0, 1) for each in single]) for name in got}
    fault = _difference(got, true, float(made.double()[2].abs().max()), dtype)
    return None if fault is None else f"the packed case gives {fault}"


def _everything(kernel: Kernel, made: Tensor, stride: int, zero_keys: int) -> dict[str, Tensor]:
    """Outputs, log-sum-exps and gradients for q, k, v and the output's gradient (4, B, rows * stride, H, E)."""
    q, k, v, grad = (tensor[:, ::stride].transpose(1, 2) for tensor in made)
    scale = q.shape[-1] ** -0.5
    out, lse, extra = attend(q, k, v, zero_keys, scale, kernel)
    dq, dk, dv = attend_backward(grad, q, k, v, out, lse, extra, scale, kernel)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _difference(got: dict[str, Tensor], true: dict[str, Tensor], largest_v: float, dtype: torch.dtype) -> str | None:
    """What in `got` differs from the float64 `true` by more than TOLERANCES; None where nothing does."""
    on_out, on_lse, on_grads = TOLERANCES[dtype]
    for name, exact in true.items():
        tolerance = {"out": on_out, "lse": on_lse}.get(name, on_grads)
        largest = largest_v if name == "out" else float(exact.abs().max())
        expected = wide_dtype(dtype) if name == "lse" else dtype
        if got[name].shape != exact.shape or got[name].dtype != expected:
            return f"{name} as {tuple(got[name].shape)} {got[name].dtype} in place of {tuple(exact.shape)} {expected}"
        difference = float((got[name].double().cpu() - exact).abs().max()) / largest
        if not difference <= tolerance:  # NaN is not
            return f"{name} wrong by {difference:.1e} of the largest entry, where {tolerance:.1e} is allowed"
    return None
