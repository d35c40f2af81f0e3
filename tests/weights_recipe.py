"""Weights and inputs of the goldens (goldens/README.md): every tensor is filled from its own name."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these names and shapes."""
    state = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        new = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        if name.endswith("weight") and new.ndim == 1:
            new = 1 + 0.1 * new
        elif name.endswith("bias"):
            new = 0.1 * new
        elif new.ndim == 2:
            new = new / new.shape[1] ** 0.5
        else:
            new = 0.02 * new
        state[name] = new
    return state


def fill(model: nn.Module) -> nn.Module:
    """Fill every entry of a model's state dict; returns the model."""
    model.load_state_dict(filled({name: tuple(old.shape) for name, old in model.state_dict().items()}))
    return model


def made_slide(seed: int, batch: int, tiles: int, in_chans: int, grid: int) -> tuple[Tensor, Tensor]:
    """(x (batch, tiles, in_chans), coords (batch, tiles, 2) int64) of a golden."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tiles, in_chans, generator=random)
    return x, torch.randint(0, grid, (batch, tiles, 2), generator=random) * 256
