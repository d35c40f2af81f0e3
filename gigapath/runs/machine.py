"""What this process may use of the machine."""

import math
import os
from pathlib import Path

from gigapath.runs.options import RunOptions

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# What SLURM grants to a task, and to a whole job on a node where it doesn't say that.
_SLURM = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


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


def threads(options: RunOptions, cores: int | None = None) -> int:
    """Threads that read: as asked, else one per core, of which there are `cores` or all that may be used."""
    if options.workers is not None:
        return options.workers
    return cores or available_cores()


def _cgroup_limits() -> list[float]:
    """Cores' worth of time that the control groups of this process allow, its own and those around it."""
    limits = []
    for folder, unified in _cgroup_folders():
        for here in (folder, *folder.parents):
            try:
                if unified:
                    quota, period = (here / "cpu.max").read_text().split()
                else:
                    quota, period = ((here / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                if int(quota) > 0:  # version 1 says -1, version 2 "max", where there is no limit
                    limits.append(int(quota) / int(period))
            except (OSError, ValueError, ZeroDivisionError):
                pass
            if here == _CGROUPS:
                break
    return limits


def _cgroup_folders() -> list[tuple[Path, bool]]:
    """(folder of a control group that may bound cores, whether it is of version 2); the mount's root included."""
    folders = [(_CGROUPS, True), (_CGROUPS / "cpu", False)]
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders.append((_CGROUPS / path.lstrip("/"), True))
        elif "cpu" in controllers.split(","):
            folders += [(_CGROUPS / name / path.lstrip("/"), False) for name in (controllers, "cpu")]
    return folders
