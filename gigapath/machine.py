"""What this process may use of the machine."""

import contextlib
import math
import os
import re
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_MEMORY_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")  # of control groups of version 1
# What SLURM grants to a task, and to a whole job on a node where it doesn't say that.
_SLURM = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


def check_device(name: str, option: str = "--device") -> None:
    """Refuse a device that certainly is not here, without torch, by its version file and the driver's libraries:
    ValueError for an unknown name, CUDA without a driver, GPU or CUDA build of torch, MPS elsewhere than on macOS."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"{option}: expected one of auto, cpu, cuda, mps or cuda:N, got {name!r}.")
    reason = ""
    if name == "mps" and sys.platform != "darwin":
        reason = "which only macOS has"
    elif name.startswith("cuda"):
        reason = _cuda_problem(int(name.partition(":")[2] or 0))
    if reason:
        raise ValueError(f"{option}: expected a device of this machine, got {name!r}: {reason}. Use --device cpu.")


def _cuda_problem(index: int) -> str:
    """Why there is certainly no such CUDA device, or "" where only torch can tell.

    NVML counts the GPUs: the driver's own library would bind this process to them, and no fork could use them then.
    """
    import ctypes
    import importlib.util

    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None:
        built = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
        if re.search(r"^hip\b.*= '", built, re.MULTILINE):  # ROCm calls its devices cuda, and has no such libraries
            return ""
        if not re.search(r"^cuda\b.*= '", built, re.MULTILINE):
            return "the installed torch is built without CUDA"
    if sys.platform != "linux":
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # small boards have none
        return ""
    count = ctypes.c_uint(0)
    if management.nvmlInit_v2() or management.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return ""
    return f"the NVIDIA driver finds {count.value} GPUs" if index >= count.value else ""


def available_cores() -> int:
    """Cores that this process may use: the least of its affinity, its control groups' shares and SLURM's grant."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    counts += [math.ceil(limit) for limit in _cgroup_limits()]
    granted = next((value for name in _SLURM if (value := os.environ.get(name, ""))), "")
    if granted.isdigit():
        counts.append(int(granted))
    return max(1, min(counts))


def available_memory() -> int | None:
    """Bytes of memory of the machine, or of a control group of this process where that is less; None where neither
    says."""
    limits = [limit for limit, _ in _cgroup_memory()]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits) if limits else None


def free_memory() -> int | None:
    """Bytes of memory that this process can still take: what Linux calls available, or what a control group has left
    where that is less; caches of files don't count as taken. None where nothing says."""
    left = [max(0, limit - taken) for limit, taken in _cgroup_memory()]
    with contextlib.suppress(OSError, ValueError, KeyError):  # no Linux
        left.append(1024 * _numbers(_MEMINFO, ":")["MemAvailable"])
    return min(left) if left else None


def _cgroup_limits() -> list[float]:
    """Cores' worth of time that the control groups of this process allow, its own and those around it."""
    limits = []
    for here, unified in _cgroup_folders("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if unified:
                quota, period = (here / "cpu.max").read_text().split()
            else:
                quota, period = ((here / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # version 1 says -1, version 2 "max", where there is no limit
                limits.append(int(quota) / int(period))
    return limits


def _cgroup_memory() -> list[tuple[int, int]]:
    """(bytes allowed, bytes taken without caches of files) of the control groups of this process that bound memory."""
    found = []
    for here, unified in _cgroup_folders("memory"):
        names = ("memory.max", "memory.current", "") if unified else (*_MEMORY_FILES, "total_")
        with contextlib.suppress(OSError, ValueError):  # version 2 says "max" where there is no limit
            limit = int((here / names[0]).read_text())
            taken = 0
            with contextlib.suppress(OSError, ValueError):  # the root of version 2 has no count
                kinds = _numbers(here / "memory.stat", " ")
                cached = sum(kinds.get(f"{names[2]}{kind}_file", 0) for kind in ("active", "inactive"))
                taken = max(0, int((here / names[1]).read_text()) - cached)
            found.append((limit, taken))
    return found


def _numbers(path: Path, mark: str) -> dict[str, int]:
    """The whole numbers of a file of names and values."""
    lines = (line.partition(mark) for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) for name, _, value in lines if value.split()}


def _cgroup_folders(controller: str) -> list[tuple[Path, bool]]:
    """(folder of a control group that may bound this process, whether it is of version 2), its own and those around
    it; the mount's root included."""
    folders = [(_CGROUPS, True), (_CGROUPS / controller, False)]
    with contextlib.suppress(OSError, ValueError):  # no Linux, a group's name that is no text
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                folders.append((_CGROUPS / path.lstrip("/"), True))
            elif controller in controllers.split(","):
                folders += [(_CGROUPS / name / path.lstrip("/"), False) for name in (controllers, controller)]
    found = []
    for folder, unified in folders:
        for here in (folder, *folder.parents):
            found.append((here, unified))
            if here == _CGROUPS:
                break
    return found
