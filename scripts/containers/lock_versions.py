"""The versions that the containers install: every package that ours needs, as it is in the environment that runs this.

python scripts/containers/lock_versions.py      rewrites the lock.txt beside it
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = Path(__file__).with_name("lock.txt")
EXTRAS = ("standin", "train")
# PyTorch's own CUDA libraries are pinned by PyTorch, and differ by platform.
LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|triton$")


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, the extras of the containers included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for name in EXTRAS for line in project["optional-dependencies"][name])]
    return [Requirement(line) for line in lines]


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """name -> version of everything that `wanted` needs, directly or not, as installed here."""
    found: dict[str, str] = {}
    waiting = [(requirement.name, tuple(requirement.extras)) for requirement in wanted]
    while waiting:
        name, extras = waiting.pop()
        key = canonicalize_name(name)
        if key in found or LEFT_TO_TORCH.match(key):
            continue
        found[key] = metadata.version(name).split("+")[0]
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((needed.name, tuple(needed.extras)))
    return found


if __name__ == "__main__":
    rows = [f"{name}=={version}" for name, version in sorted(closure(declared()).items())]
    head = "# Made by `python scripts/containers/lock_versions.py`; the CUDA libraries follow from PyTorch's version.\n"
    LOCK.write_text(head + "\n".join(rows) + "\n")
