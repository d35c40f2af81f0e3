"""How everything here is measured: alternating pairs in one process, and the median of their ratios.

One warm-up is thrown away; then ours and theirs take turns, each for at least `SECONDS`. A single run on a shared
machine scatters by a factor of two; the ratio of neighbours in time does not.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 1.0
# Rows and width of the plain product: 8192 on a GPU, which smaller ones do not fill.
SIZES = {"cuda": (8192, 8192), "cpu": (4096, 3072)}


@dataclass(frozen=True)
class Ratio:
    """Ours divided by theirs over several pairs, and the medians of the two rates (work per second)."""

    median: float
    least: float
    most: float
    ours: float
    theirs: float


@dataclass(frozen=True)
class Work:
    """Something to time: a call, and the amount of work that one call does."""

    call: Callable[[], object]
    amount: float


def compare(ours: Work, theirs: Work, pairs: int, device: torch.device, seconds: float | None = None) -> Ratio:
    """Time ours and theirs in turns.

    Args:
        ours: its rate is the numerator.
        theirs: its rate is the denominator.
        pairs: how many turns count.
        device: waited for around each turn.
        seconds: a turn repeats its call until at least so long, SECONDS by default.
    """
    seconds = SECONDS if seconds is None else seconds
    repeats = []
    for work in (ours, theirs):
        time_of(work, 1, device)
        repeats.append(max(1, math.ceil(seconds / time_of(work, 1, device))))
    rates = [(_rate(ours, repeats[0], device), _rate(theirs, repeats[1], device)) for _ in range(pairs)]
    ratios = [a / b for a, b in rates]
    return Ratio(
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(a for a, _ in rates),
        statistics.median(b for _, b in rates),
    )


def time_of(work: Work, repeats: int, device: torch.device) -> float:
    """Seconds that so many calls take, at least one step of the clock: rates are divisions by them."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work.call()
    _wait(device)
    return max(time.perf_counter() - start, time.get_clock_info("perf_counter").resolution)


def _rate(work: Work, repeats: int, device: torch.device) -> float:
    return work.amount * repeats / time_of(work, repeats, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def product(device: torch.device, dtype: torch.dtype) -> Work:
    """A plain matrix product (rows x width x width) of SIZES; its amount is in operations, multiply-adds x 2."""
    rows, width = SIZES.get(device.type, SIZES["cpu"])
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, width, device=device).to(dtype)
    return Work(lambda: a @ b, 2.0 * rows * width * width)


def describe_machine() -> str:
    """Processor, cores that this process may use, memory, load, versions, and the day, on one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{_processor()}, {cores} cores, {_memory()}{gpu}{load}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, {platform.machine()}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _memory() -> str:
    totals = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return f"{totals[0] / 2**20:.0f} GiB" if totals else "unknown memory"


def _lines(path: str) -> list[str]:
    """The lines of a file of the kernel's, none where there is no such file."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
