"""What this process may use of the machine."""

import os
from pathlib import Path

from gigapath.runs.options import RunOptions

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/cpu.max"),)


def available_cores() -> int:
    """Cores that this process may use: the least of its affinity, its control group's share and SLURM's grant."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    for path in _CGROUP_LIMITS:
        try:
            quota, period = path.read_text().split()
            counts.append(int(quota) // int(period))
        except (OSError, ValueError):  # no control group, or "max": no limit
            continue
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if granted.isdigit():
        counts.append(int(granted))
    return max(1, min(counts))


def threads(options: RunOptions) -> int:
    """Threads that read: as asked, else one per core."""
    return available_cores() if options.workers is None else options.workers
