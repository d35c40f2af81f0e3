"""Small stand-ins for the released checkpoints: the released layouts, filled by the goldens' recipe."""

import hashlib
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these names and shapes, each entry drawn from its own name (goldens/README.md)."""
    state = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        if name.endswith("weight") and t.ndim == 1:
            t = 1 + 0.1 * t
        elif name.endswith("bias"):
            t = 0.1 * t
        elif t.ndim == 2:
            t = t / t.shape[1] ** 0.5
        else:
            t = 0.02 * t
        state[name] = t
    return state


def fill(model: nn.Module) -> nn.Module:
    """Give a model the weights of the goldens' recipe; returns the model."""
    model.load_state_dict(filled({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    return model


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gigapath-fake-weights-"))


def saved(name: str, state: Mapping[str, Tensor], *, wrapped: bool = True) -> Path:
    """Write `{"model": state}` (or the bare state) once per session and name; returns the file."""
    path = _folder() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": dict(state)} if wrapped else dict(state), path)
    return path
