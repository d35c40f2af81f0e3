"""What a run goes on from: who it is, and checkpoints, tensors as safetensors, the rest as JSON, each file whole or
absent. The JSON is written last and names its tensors, so that it never speaks of a file that is not there."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from gigapath.cohort.stage import differences
from gigapath.files import atomic_file, output_error, read_json, sha256_of, write_json_atomic
from gigapath.finetune.options import completed
from gigapath.releases import HUB_PREFIXES
from gigapath.slide_encoder import WEIGHTS_FILE
from gigapath.weights import find_weights

CHECKPOINT = "checkpoint.json"
MEND = "Choose another --out, or empty this one to begin anew."
_KEYS = ("epoch", "tensors", "tag", "history", "scaler")

Epoch = TypeVar("Epoch")


@dataclass(frozen=True)
class Resumed(Generic[Epoch]):
    """Where a training stood: its epochs, the weights kept beside or None, the steps done of the next epoch and this
    process's loss of them."""

    history: list[Epoch]
    best: dict[str, Tensor] | None
    done: int
    loss: float


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


def save_training(
    folder: Path,
    number: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scaler: Any,
    *,
    tag: Any,
    history: Sequence[Any],
    best: Mapping[str, Tensor] | None = None,
    **facts: Any,
) -> None:
    """Write where a training stands, and remove the checkpoint before once it is no longer needed.

    Args:
        number: of the checkpoint, rising.
        optimizer: its moments are kept too; None where the training has ended.
        tag: what a training must be to go on from here.
        history: the epochs so far, dataclasses.
        best: weights that are kept beside.
        facts: what else is to be known, for JSON.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in (best or {}).items()}
    for name, parameter in model.named_parameters():
        for key, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    file = f"checkpoint-{number}.safetensors"
    save_tensors(folder / file, tensors)
    epochs = [asdict(entry) for entry in history]
    held = {"epoch": number, "tensors": file, "tag": tag, "history": epochs, "scaler": scaler.state_dict(), **facts}
    write_json_atomic(folder / CHECKPOINT, held)
    for other in folder.glob("checkpoint-*.safetensors"):
        if other.name != file:
            other.unlink(missing_ok=True)


def resume_training(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    *,
    tag: Any,
    epoch_of: Callable[..., Epoch],
    rank: int,
) -> Resumed[Epoch] | None:
    """Bring model, optimizer and scaler to where a training stood, if `folder` holds one.

    Raises:
        ValueError: the checkpoint is of another run, or damaged.
    """
    kept = load_checkpoint(folder)
    if kept is None:
        return None
    facts, tensors = kept
    if facts["tag"] != tag and completed(facts["tag"], tag) != tag:
        raise ValueError(f"{folder}: its checkpoint is of another run. Choose another --out.")
    try:
        history = [epoch_of(**entry) for entry in facts["history"]]
        done, losses = int(facts.get("done", 0)), facts.get("losses")
        scaler.load_state_dict(facts["scaler"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}}
        parameters = dict(model.named_parameters())
        for full, tensor in tensors.items():
            kind, _, name = full.partition(".")
            if kind in parts:
                parts[kind][name] = tensor
            elif kind == "optimizer":
                key, _, of = name.partition(".")
                # AdamW keeps its count of steps on the CPU.
                place = "cpu" if key == "step" else parameters[of].device
                optimizer.state[parameters[of]][key] = tensor.to(place, copy=True)
        model.load_state_dict(parts["model"])
        return Resumed(history, parts["best"] or None, done, 0.0 if losses is None else float(losses[rank]))
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: its checkpoint is damaged. {MEND}") from error


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


def start_of(weights: str) -> dict[str, str]:
    """What a slide encoder starts from: its name, never its place, and its checksum; nothing of random weights."""
    if not weights:
        return {}
    name = weights if weights.startswith(HUB_PREFIXES) else Path(weights).name
    return {"name": name, "sha256": sha256_of(find_weights(weights, WEIGHTS_FILE))}


def check_same_run(path: Path, identity: Mapping[str, Any]) -> None:
    """Raise ValueError where `path`, if it is there, records a run of another identity."""
    if not path.is_file():
        return
    now = json.loads(json.dumps(identity))
    kept = completed(read_json(path, keys=("identity",), mend=MEND)["identity"], now)
    changed = []
    for key in [key for key in now if kept.get(key) != now[key]]:
        inner = isinstance(kept.get(key), dict) and isinstance(now[key], dict)
        changed.append(f"{key} ({', '.join(differences(kept[key], now[key]))})" if inner else key)
    if changed:
        raise ValueError(
            f"{path.parent}: it holds another run, which differs in {', '.join(changed)}. Choose another --out, or "
            "give the same options to go on with it."
        )
