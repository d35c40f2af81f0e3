"""The device and the precision that words of the command line mean on this machine."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
# Set for a job that was granted GPUs, unless to one of _NO_GPU.
_GRANTS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")
_NO_GPU = ("", "-1", "NoDevFiles")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
# What autocast computes in; "fp32" does without.
AUTOCAST_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name means on this machine; "auto" prefers CUDA, then MPS. ValueError for other names, and for
    a device that is not there. A job for a GPU never runs on the CPU unasked: not where the GPU is named, and not with
    "auto" where a scheduler granted one."""
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        granted = next((word for word in _GRANTS if os.environ.get(word, "") not in _NO_GPU), None)
        if name == "cpu" and granted is not None:
            raise ValueError(
                f"--device auto: expected a GPU, which {granted}={os.environ[granted]} grants to this job, but torch "
                f"{torch.__version__} sees none. Check the driver and torch's build, or say --device cpu."
            )
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


def resolve_devices(devices: str | None, device: str) -> tuple[torch.device, ...]:
    """The devices that work side by side: those of a list ("cuda:0,cuda:1"), so many as a number says ("2", of the kind
    of `device`), or the one that `device` means. ValueError where they are no devices, not there, of several kinds, or
    a GPU named twice. "cpu,cpu" is two workers."""
    if devices is None:
        return (resolve_device(device),)
    names = [name.strip() for name in devices.split(",")]
    if devices.strip().isdigit():
        kind = resolve_device(device).type
        names = [f"cuda:{number}" if kind == "cuda" else kind for number in range(int(devices))]
    elif device != "auto":
        raise ValueError(f"--devices: expected no --device beside a list, got --device {device!r}. Drop one.")
    found = tuple(resolve_device(name) for name in names if name not in ("", "auto", "cuda"))
    gpus = [each for each in found if each.type != "cpu"]
    if len(found) != len(names) or not found or len({each.type for each in found}) > 1 or len(set(gpus)) < len(gpus):
        raise ValueError(
            f"--devices: expected a number above 0, or different devices of one kind such as cuda:0,cuda:1, got "
            f"{devices!r}."
        )
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32", "fp16" or "bf16"; "auto" is fp16 on CUDA, as published, and fp32 elsewhere."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return precision


_pins = threading.Lock()
_pinned = 0
_unpin = contextlib.ExitStack()


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """The context in which a model computes: autocast to "fp16" or "bf16", and for all that stays float32 true float32
    (no TF32, no bfloat16 behind its back) and deterministic convolutions, whatever the process has set.

    These switches belong to the process: of several threads inside, the first sets them and the last puts them back.
    """
    global _pinned
    with _pins:
        if _pinned == 0:
            _unpin.enter_context(_true_float32())
        _pinned += 1
    try:
        with torch.autocast(device.type, AUTOCAST_TYPES.get(precision), enabled=precision in AUTOCAST_TYPES):
            yield
    finally:
        with _pins:
            _pinned -= 1
            if _pinned == 0:
                _unpin.close()


@contextlib.contextmanager
def _true_float32() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    # Torch 2.9 brought a switch for each operation. They go along with the two older ones, which set them too; torch
    # refuses to say where the older one stands once somebody has used the newer ones alone.
    places: list[Any] = []
    if hasattr(cudnn, "conv"):
        places = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009
    newer = [(place, place.fp32_precision) for place in places]
    tf32 = products = None
    with contextlib.suppress(RuntimeError):
        tf32 = cudnn.allow_tf32
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    plain = (cudnn.deterministic, cudnn.benchmark)
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    torch.set_float32_matmul_precision("highest")
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = plain
        if tf32 is not None:
            cudnn.allow_tf32 = tf32
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for place, before in newer:
            place.fp32_precision = before


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Let torch take operations alone that give the same bits at each call on one device, and raise RuntimeError where
    it has none; without `enabled` nothing changes. The switch belongs to the process."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def device_identity(device: torch.device) -> str:
    """What numbers depend on of a device: its kind, and of a GPU the model and its compute capability too."""
    if device.type != "cuda":
        return device.type
    about = torch.cuda.get_device_properties(device)
    return f"cuda ({about.name}, {about.major}.{about.minor})"


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device; from the host to a GPU it travels without the host waiting for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory was too small: torch's own, cuBLAS's, cuDNN's or the driver's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|ALLOC_FAILED", str(error), re.IGNORECASE))


@contextlib.contextmanager
def at_most_threads(cores: int) -> Iterator[None]:
    """Let torch compute with at most `cores` threads within this block, in the thread that enters it.

    Torch counts the machine's cores; a job that was granted 4 of 64 would share them among 64 threads. OpenMP keeps the
    number by calling thread, and one that has not been told gets a pool of the machine's size at its first product,
    whatever the main thread was told: so each thread that runs an encoder enters a block of its own.
    """
    before = torch.get_num_threads()  # asking tells OpenMP the number in this thread
    if before <= cores:
        yield
        return
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)
