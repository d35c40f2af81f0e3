"""Small stand-ins for the released checkpoints: the released layouts, filled by the goldens' recipe."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from weights_recipe import filled


@cache
def folder() -> Path:
    """A folder for the whole session with what was asked for so far, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="gigapath-fake-weights-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def saved(name: str, state: Mapping[str, Tensor], *, wrapped: bool = True) -> Path:
    """Write `{"model": state}` (or the bare state) under `folder()`; returns the file."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": dict(state)} if wrapped else dict(state), path)
    return path


@cache
def flash_tile_checkpoint() -> Path:
    """`pytorch_model.bin` in GigaPath-Flash's layout, 87 MB."""
    from gigapath.tile_encoder import gigapath_tile_enc_dinov2s

    with torch.device("meta"):
        model = gigapath_tile_enc_dinov2s()
    state = filled({name: tuple(t.shape) for name, t in model.state_dict().items()})
    return saved("gigapath-flash/pytorch_model.bin", state, wrapped=False)


@cache
def slide_checkpoint(arch: str = "gigapath_slide_enc12l384d") -> Path:
    """`slide_encoder.pth` in the layout of a release, 86 MB for GigaPath-Flash; beside its tile encoder's."""
    shapes = json.loads((Path(__file__).parent / "goldens" / "state_dict_keys.json").read_text())[arch]
    release = "gigapath-flash" if arch.endswith("384d") else "gigapath"
    return saved(f"{release}/slide_encoder.pth", filled({name: tuple(shape) for name, shape in shapes.items()}))
