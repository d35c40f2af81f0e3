"""How fast the slide encoder is, as a share of the rate of a plain matrix product measured in the same run."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gigapath.devices import computing, resolve_device
from gigapath.longnet.attention import choose_kernel
from gigapath.longnet.encoder import count_operations
from gigapath.options import Options, option
from gigapath.slide_encoder import LongNetViT, create_model
from scripts.bench.protocol import Work, compare, product
from scripts.bench.roofline import limits

WIDTHS = {"gigapath": ("gigapath_slide_enc12l768d", 1536), "gigapath-flash": ("gigapath_slide_enc12l384d", 384)}


@dataclass(frozen=True)
class SlideEncoderBench(Options):
    """What `python -m scripts.bench slide-encoder` measures."""

    slide_encoder: str = option("gigapath", "the architecture; its weights are random", choices=tuple(WIDTHS))
    tokens: tuple[int, ...] = option((10_000,), "tiles of the made slides", metavar="N")
    depth: int = option(12, "layers; fewer are quicker to measure and have the same share", at_least=1, at_most=12)
    pairs: int = option(7, "pairs of turns, ours and a product", at_least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens, default=0) < 1:
            raise ValueError(f"--tokens: expected at least 1, got {self.tokens}.")


def measure(options: SlideEncoderBench) -> Iterator[dict[str, Any]]:
    """Measure one row after the other.

    Yields:
        Rows with `tokens`, `precision`, `tokens_per_second`, `operations` (multiply-adds x 2, real keys only),
        `share` (of the product's rate in float32 on a CPU, in the row's precision elsewhere) with `share_least` and
        `share_most`, `product_per_second`, `kernel`, `bytes_per_token` (beyond weights and inputs; None where it can't
        be told), what `roofline.limits` says, and for bf16 `time_of_fp32`, the time as a part of that of fp32 in the
        same run.
    """
    device = resolve_device(options.device)
    arch, in_chans = WIDTHS[options.slide_encoder]
    model = create_model("", arch, in_chans, depth=options.depth, global_pool=True).eval().to(device)
    for tokens in options.tokens:
        x = torch.randn(1, tokens, in_chans, device=device)
        cells = torch.arange(tokens, device=device)
        coords = torch.stack([cells % model.slide_ngrids, cells // model.slide_ngrids], -1)[None] * 256
        operations = sum(count_operations(model.encoder.config, (tokens + 1,)).values())
        operations += 2 * tokens * in_chans * model.embed_dim
        works = {
            precision: Work(_call(model, x, coords, precision), float(operations)) for precision in ("fp32", "bf16")
        }
        for precision, work in works.items():
            dtype = torch.float32 if precision == "fp32" or device.type == "cpu" else torch.bfloat16
            with torch.inference_mode():
                share = compare(work, product(device, dtype), options.pairs, device)
                row: dict[str, Any] = {
                    "tokens": tokens,
                    "precision": precision,
                    "tokens_per_second": share.ours / operations * tokens,
                    "operations": operations,
                    "share": share.median,
                    "share_least": share.least,
                    "share_most": share.most,
                    "product_per_second": share.theirs,
                    "kernel": choose_kernel(torch.empty(1, 1, 1, model.embed_dim // 16, device=device).to(dtype)).name,
                    "bytes_per_token": _bytes_per_token(work, tokens, device),
                    **limits(work, share, device),
                }
                if precision == "bf16":
                    row["time_of_fp32"] = 1 / compare(work, works["fp32"], options.pairs, device).median
            yield row


def _call(model: LongNetViT, x: torch.Tensor, coords: torch.Tensor, precision: str) -> Any:
    """One forward pass: bf16 means bfloat16 products in the linear layers on a CPU, autocast elsewhere."""

    def call() -> None:
        model.encoder.set_linear_precision(precision if x.device.type == "cpu" else "fp32")
        with computing(precision if x.device.type != "cpu" else "fp32", x.device):
            model(x, coords)

    return call


def _bytes_per_token(work: Work, tokens: int, device: torch.device) -> float | None:
    """The peak of one call beyond what was there before, by the device's or the system's own count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work.call()
        return (torch.cuda.max_memory_allocated(device) - before) / tokens
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type != "cpu" or not reset.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not serve this one unseen
        reset.write_text("5")  # the peak starts at what is resident now
    except (OSError, AttributeError):  # no right to it, or a C library without it
        return None
    before = _kilobytes(status, "VmRSS")
    work.call()
    return (_kilobytes(status, "VmHWM") - before) * 1024 / tokens


def _kilobytes(status: Path, key: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    memory = "-" if row["bytes_per_token"] is None else f"{row['bytes_per_token'] / 1000:.1f}"
    of_fp32 = f"{row['time_of_fp32']:.2f}" if "time_of_fp32" in row else "-"
    return (
        f"| {row['tokens']:,} | {row['precision']} | {row['tokens_per_second']:,.0f} | "
        f"{row['operations'] / 1e12:.2f} | "
        f"{row['share']:.2f} ({row['share_least']:.2f} to {row['share_most']:.2f}) | "
        f"{row['product_per_second'] / 1e9:,.0f} | {of_fp32} | {memory} | {row['kernel']} |"
    )


HEADING = (
    "| tokens | precision | tokens/s | TFLOP | share of a product's rate | product GFLOP/s | time / fp32 | kB/token | "
    "kernel |\n|---|---|---|---|---|---|---|---|---|"
)
