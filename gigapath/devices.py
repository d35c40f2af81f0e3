"""The device and the precision that words of the command line mean on this machine."""

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name means on this machine; "auto" prefers CUDA, then MPS.

    Raises:
        ValueError: it is none of the known names, or is not there. A job for a GPU never runs on the CPU unasked.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"--device: expected one of {', '.join(DEVICES)} or cuda:N, got {name!r}.")
    resolved = torch.device(name)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: expected a device that is there, got {name!r}, and torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices. Check the driver and torch's build, or use --device cpu."
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device: expected a device that is there, got {name!r}. Use --device cpu.")
    return resolved


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32", "fp16" or "bf16"; "auto" is fp16 on CUDA, as published, and fp32 elsewhere."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return precision


_reproducible_lock = threading.Lock()
_reproducible_users = 0
_reproducible_flags: Any = None


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA, convolutions in true float32 and by deterministic kernels, within this block only.

    cuDNN's switches belong to the process: of several threads inside, the first sets them and the last puts them back.
    """
    global _reproducible_users, _reproducible_flags
    if device.type != "cuda":
        yield
        return
    with _reproducible_lock:
        if _reproducible_users == 0:
            flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            flags.__enter__()
            _reproducible_flags = flags
        _reproducible_users += 1
    try:
        yield
    finally:
        with _reproducible_lock:
            _reproducible_users -= 1
            if _reproducible_users == 0:
                _reproducible_flags.__exit__(None, None, None)
