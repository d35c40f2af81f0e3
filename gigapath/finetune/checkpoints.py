"""Checkpoints: tensors as safetensors, the rest as JSON, each file whole or absent. The JSON is written last and names
its tensors, so that it never speaks of a file that is not there."""

import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from gigapath.files import atomic_file, output_error, read_json, write_json_atomic

CHECKPOINT = "checkpoint.json"
MEND = "Choose another --out, or empty this one to begin anew."
_KEYS = ("epoch", "tensors", "tag", "history", "scaler")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        gigapath.files.OutputError: a full disk and its like, in one sentence.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            safetensors.torch.save_file(whole, temporary)
        except safetensors.SafetensorError as error:  # the system's error is in its words only
            code = re.search(r"os error (\d+)", str(error))
            raise output_error(path, OSError(int(code[1]) if code else 0, str(error))) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: expected a safetensors file, got a damaged one ({error}).") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the names of the parameters."""
    held = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            held[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    return held


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer back what `optimizer_tensors` took."""
    for name, parameter in model.named_parameters():
        state = {}
        for full, tensor in tensors.items():
            kind, _, rest = full.partition(".")
            key, _, of = rest.partition(".")
            if kind == "optimizer" and of == name:
                # AdamW keeps its count of steps on the CPU.
                state[key] = tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
        if state:
            optimizer.state[parameter] = state


def save_checkpoint(folder: Path, epoch: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the state after an epoch, and remove that of the epoch before once it is no longer needed."""
    name = f"checkpoint-{epoch}.safetensors"
    save_tensors(folder / name, tensors)
    write_json_atomic(folder / CHECKPOINT, {"epoch": epoch, "tensors": name, **facts})
    for file in folder.glob("checkpoint-*.safetensors"):
        if file.name != name:
            file.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(facts, tensors) of the last finished epoch, or None; ValueError where they are damaged."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    facts = read_json(path, keys=_KEYS, mend=MEND)
    try:
        return facts, load_tensors(folder / str(facts["tensors"]))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{str(error).rstrip('.')}. {MEND}") from error
