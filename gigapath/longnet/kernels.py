"""The kernels behind `gigapath.longnet.attention`: a plain one, and torch's own.

Shapes: B batch, H heads, N queries, K keys, E head width. Tensors are (B, H, N, E) with any strides as long as the
last one is 1; a log-sum-exp is (B, H, N), natural logarithm, float32 (float64 for float64 inputs).

torch's operations used here are private ones (their public caller hides the log-sum-exp). They are looked up by name
at each call, and `gigapath.longnet.attention` takes one only after checking it against the plain kernel.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of one chunk of the plain kernel, in bytes: large enough for efficient products, small enough for a laptop.
PLAIN_CHUNK_BYTES = 32 << 20

Extra = tuple[Any, ...]
# Of queries and of keys the rows where sequences begin, and their number ((S + 1,) int32), and rows of the longest.
Spans = tuple[Tensor, Tensor, int, int]


class Kernel(Protocol):
    """One way to compute attention with its log-sum-exp, forwards and backwards."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Extra]:
        """(out (B, H, N, E) in the dtype of q, lse (B, H, N), whatever `backward` needs besides)."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, where the softmax weights are exp(score - lse)."""
        ...


def aten(name: str) -> Any:
    """One of torch's operations by name; AttributeError where this torch lacks it."""
    return getattr(torch.ops.aten, name)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and log-sum-exps of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class PlainKernel:
    """Products and a softmax over chunks of queries: any device and dtype, half precision computed in float32."""

    name = "plain"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Extra]:
        wide = wide_dtype(q.dtype)
        keys, values = k.to(wide).transpose(-2, -1), v.to(wide)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
        for rows in self._row_chunks(q, k):
            scores = (q[:, :, rows].to(wide) * scale) @ keys
            lse[:, :, rows] = scores.logsumexp(-1)
            out[:, :, rows] = (scores.sub_(lse[:, :, rows, None]).exp_() @ values).to(q.dtype)
        return out, lse, ()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = wide_dtype(q.dtype)
        keys, values = k.to(wide), v.to(wide)
        dq = torch.empty(q.shape, dtype=wide, device=q.device)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for rows in self._row_chunks(q, k):
            queries, g = q[:, :, rows].to(wide) * scale, grad[:, :, rows].to(wide)
            weights = (queries @ keys.transpose(-2, -1)).sub_(lse[:, :, rows, None]).exp_()
            dv += weights.transpose(-2, -1) @ g
            delta = (g * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
            dscores = (g @ values.transpose(-2, -1)).sub_(delta).mul_(weights)
            dq[:, :, rows] = dscores @ keys * scale
            dk += dscores.transpose(-2, -1) @ queries
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)

    @staticmethod
    def _row_chunks(q: Tensor, k: Tensor) -> list[slice]:
        """Slices of the queries such that the scores of each stay below PLAIN_CHUNK_BYTES."""
        row_bytes = q.shape[0] * q.shape[1] * k.shape[2] * (8 if q.dtype == torch.float64 else 4)
        step = max(1, PLAIN_CHUNK_BYTES // max(row_bytes, 1))
        return [slice(start, start + step) for start in range(0, q.shape[2], step)]


class CpuFlashKernel:
    """torch's flash attention on the CPU, float64 to float16."""

    name = "cpu-flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Extra]:
        out, lse = aten("_scaled_dot_product_flash_attention_for_cpu")(q, k, v, 0.0, False, scale=scale)
        return out, lse, ()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        operation = aten("_scaled_dot_product_flash_attention_for_cpu_backward")
        # The kernel hands its log-sum-exp out as the transpose of (B, N, H), and reads it so.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv = operation(grad, q, k, v, out, lse, 0.0, False, scale=scale)
        return dq, dk, dv


class CudaFlashKernel:
    """torch's flash attention on CUDA, float16 and bfloat16."""

    name = "cuda-flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Extra]:
        result = aten("_scaled_dot_product_flash_attention")(q, k, v, 0.0, False, False, scale=scale)
        # (out, lse, offsets and lengths of q and of k, seed, offset, debug mask)
        return result[0], result[1], tuple(result[2:8])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        offsets_q, offsets_k, longest_q, longest_k, seed, offset = extra
        dq, dk, dv = aten("_scaled_dot_product_flash_attention_backward")(
            grad, q, k, v, out, lse.contiguous(), offsets_q, offsets_k, longest_q, longest_k, 0.0, False, seed, offset,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class CudaVarlenKernel:
    """torch's flash attention on CUDA over sequences of different lengths side by side, float16 and bfloat16.

    Packed shapes: R rows of all sequences, h heads.
    """

    name = "cuda-varlen"

    def packed(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor, Extra]:
        """(out (R, h, E), lse (R, h), what the backward needs besides) of q, k and v (R, h, E)."""
        out, lse, *random = aten("_flash_attention_forward")(q, k, v, *spans, 0.0, False, False, scale=scale)
        if lse.shape != (q.shape[1], q.shape[0]):  # some versions pad each sequence to the longest
            raise RuntimeError(f"expected a log-sum-exp {(q.shape[1], q.shape[0])}, got {tuple(lse.shape)}")
        return out, lse.t(), tuple(random[:2])

    def packed_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, where the softmax weights are exp(score - lse)."""
        operation = aten("_flash_attention_backward")
        dq, dk, dv = operation(grad, q, k, v, out, lse.t().contiguous(), *spans, 0.0, False, *extra, scale=scale)
        return dq, dk, dv

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Extra]:
        out, lse, extra = self.packed(_rows(q), _rows(k), _rows(v), _spans(q, k), scale)
        return _unrows(out, q), lse.reshape(len(q), q.shape[2], q.shape[1]).transpose(1, 2), extra

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = (_rows(grad), _rows(q), _rows(k), _rows(v), _rows(out))
        packed_lse = lse.transpose(1, 2).reshape(-1, q.shape[1])
        dq, dk, dv = self.packed_backward(*rows, packed_lse, extra, _spans(q, k), scale)
        return _unrows(dq, q), _unrows(dk, k), _unrows(dv, v)


def _rows(x: Tensor) -> Tensor:
    """(B, H, N, E) as (B * N, H, E)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    batch, heads, count, width = like.shape
    return rows.view(batch, count, heads, width).transpose(1, 2)


def _spans(q: Tensor, k: Tensor) -> Spans:
    starts = [torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[2] for x in (q, k)]
    return starts[0], starts[1], q.shape[2], k.shape[2]


class CudaEfficientKernel:
    """torch's memory-efficient attention on CUDA, every dtype up to float32."""

    name = "cuda-efficient"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Extra]:
        operation = aten("_scaled_dot_product_efficient_attention")
        out, lse, seed, offset = operation(q, k, v, None, True, 0.0, False, scale=scale)
        # The rows of the log-sum-exp are padded to whole blocks.
        return out, lse[:, :, : q.shape[2]], (lse.shape[2], seed, offset)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        padded, seed, offset = extra
        lse = F.pad(lse, (0, padded - lse.shape[2]), value=float("inf")).contiguous()
        operation = aten("_scaled_dot_product_efficient_attention_backward")
        dq, dk, dv, _ = operation(
            grad, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], False, scale=scale
        )
        return dq, dk, dv


PLAIN = PlainKernel()
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (PLAIN, CpuFlashKernel(), CudaVarlenKernel(), CudaFlashKernel(), CudaEfficientKernel())
}


def candidates(device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """Kernels made for tensors of this device and dtype, the best first, without the plain one."""
    if device.type == "cpu":
        return [KERNELS["cpu-flash"]]
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return [KERNELS["cuda-varlen"], KERNELS["cuda-flash"], KERNELS["cuda-efficient"]]
    if device.type == "cuda" and dtype == torch.float32:
        return [KERNELS["cuda-efficient"]]
    return []
