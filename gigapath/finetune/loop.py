"""The loop that fine-tuning and pretraining share: the processes of a run, the optimizer's steps over slides, and the
checkpoints that a run goes on from: tensors as safetensors, the rest as JSON, each file whole or absent. The JSON is
written last and names its tensors, so that it never speaks of a file that is not there."""

import atexit
import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigapath.cohort.stage import differences
from gigapath.devices import computing, is_out_of_memory, resolve_device
from gigapath.files import atomic_file, output_error, read_json, sha256_of, write_json_atomic
from gigapath.finetune.options import completed
from gigapath.read_ahead import read_ahead
from gigapath.releases import HUB_PREFIXES
from gigapath.slide_encoder import WEIGHTS_FILE
from gigapath.weights import find_weights

CHECKPOINT = "checkpoint.json"
MEND = "Choose another --out, or empty this one to begin anew."
_KEYS = ("epoch", "tensors", "tag", "history", "scaler")
_LEAVE_SECONDS = 1.0

IntArray = npt.NDArray[np.int64]
Batch = TypeVar("Batch")
Epoch = TypeVar("Epoch")
Resumed = tuple[list[Epoch], dict[str, Tensor], int, float]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place."""
        if self.world > 1:
            with _others_there():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _others_there():
            dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add gradients up over all processes; a parameter that has none anywhere keeps none."""
        # A plain sum: each process divides its loss by the slides of the whole step, so that any share of slides a
        # process gets, none included, leads to the gradient of the one batch.
        if self.world == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        has = torch.tensor([float(p.grad is not None) for p in trained], device=self.device)
        used = [p for p, count in zip(trained, self.sum(has).tolist(), strict=True) if count]
        for dtype in {p.dtype for p in used}:
            those = [p for p in used if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in those])
            for p, part in zip(those, torch.split(self.sum(flat), [p.numel() for p in those]), strict=True):
                p.grad = part.view_as(p).clone()


@contextlib.contextmanager
def _others_there() -> Iterator[None]:
    """Turn what a backend raises where another process has died into one sentence (gloo raises RuntimeError itself)."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ConnectionError(
            "another process of this run has ended or is out of reach; the same command goes on after the last "
            "finished epoch."
        ) from error


def join_processes(device: str) -> Processes:
    """The processes that a launcher started, joined by accelerate; else this one alone on the device that it names.

    Raises:
        ImportError: a launcher started several processes, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(resolve_device(device))
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            "several processes: accelerate is not installed. Install it: pip install 'gigapath[train]'."
        ) from error
    state = PartialState(cpu=device == "cpu")
    atexit.register(_leave)
    return Processes(state.device, state.process_index, state.num_processes)


def _leave() -> None:
    """Leave the group: left to the interpreter's end, the connections' threads can outlive what they use, and abort the
    process."""
    # Leaving waits for these threads with the interpreter's lock held, which they want to let go of the last tensors:
    # one that had not yet done so would be waited for for ever.
    time.sleep(_LEAVE_SECONDS)
    dist.destroy_process_group()


def training_precision(precision: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16". "auto" is what `accelerate launch --mixed_precision` says, else on CUDA bf16 where it
    exists and fp16 (with scaling of the loss) elsewhere, and fp32 on other devices."""
    if precision != "auto":
        return precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    if launched in ("bf16", "fp16"):
        return launched
    if launched == "no" or device.type != "cuda":
        return "fp32"
    with torch.cuda.device(device):
        # A T4 or V100 computes in it by emulation, slower than in float32.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass(frozen=True)
class Step:
    """One step of the optimizer: the rows of each pass of this process, the slides of the whole step over all passes
    and processes, and the passes over the training slides that lie behind it, a fraction."""

    chunks: Sequence[IntArray]
    slides: int
    epochs_done: float


@dataclass(frozen=True)
class StepsTaken:
    """What some steps gave: the loss summed over all slides of all processes, the last learning rate, the seconds that
    they took and the seconds of them spent waiting for batches."""

    loss: float
    learning_rate: float
    seconds: float
    waited: float


@dataclass(frozen=True)
class Loop:
    """What takes steps, by "fp32", "bf16" or "fp16", whose loss is scaled, with some threads that read ahead;
    `check_stop` is called between steps, and raises to end the run."""

    processes: Processes
    precision: str
    workers: int
    check_stop: Callable[[], None] = lambda: None

    def scaler(self) -> Any:
        """What scales the loss of one training."""
        return torch.amp.GradScaler(self.processes.device.type, enabled=self.precision == "fp16")

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        steps: Sequence[Step],
        *,
        what: str,
        read: Callable[[IntArray], Batch],
        loss_of: Callable[[nn.Module, Batch], Tensor],
        set_rate: Callable[[float], float],
        whole: Callable[[nn.Module, Sequence[Batch]], Callable[[nn.Module, Batch], Tensor]] | None = None,
        clip: float = 0.0,
        before: Callable[[int], None] = lambda number: None,
        after: Callable[[int, float], None] = lambda number, loss: None,
    ) -> StepsTaken:
        """Take some steps.

        Args:
            what: is trained, such as "epoch 3", for messages.
            read: the batch of a chunk's rows; called by threads, ahead of time.
            loss_of: the loss summed over a batch's slides.
            set_rate: sets the rates for a moment, in epochs that are done, and returns the one to report.
            whole: where the loss of a slide depends on the others of its step: makes `loss_of` of this process's
                batches of a step, which are then held in memory together.
            clip: largest norm of all gradients together; 0 = any.
            before: called with the number of each step before it.
            after: called with the number of each step, and this process's loss of it summed over slides.

        Raises:
            ValueError: the loss is not finite.
        """
        chunks = [chunk for step in steps for chunk in step.chunks]
        total, rate, waited, started = 0.0, 0.0, 0.0, time.perf_counter()

        def batches(count: int) -> Iterable[Batch]:
            nonlocal waited
            for _ in range(count):
                asked = time.perf_counter()
                batch = next(ahead)
                waited += time.perf_counter() - asked
                yield batch

        with contextlib.closing(read_ahead(read, chunks, threads=self.workers)) as ahead:
            for number, step in enumerate(steps):
                self.check_stop()
                before(number)
                rate = set_rate(step.epochs_done)
                optimizer.zero_grad(set_to_none=True)
                held: Iterable[Batch] = batches(len(step.chunks))
                if whole is not None:
                    loss_of = whole(model, held := list(held))
                loss = self.add_gradients(model, held, loss_of, step.slides, scaler)
                if not math.isfinite(sum(self.processes.gather(loss))):
                    raise ValueError(
                        f"training: the loss of {what} is not finite. Lower --base-lr, or take --precision fp32."
                    )
                total += loss
                if clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                after(number, loss)
        return StepsTaken(sum(self.processes.gather(total)), rate, time.perf_counter() - started, waited)

    def add_gradients(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss_of: Callable[[nn.Module, Batch], Tensor],
        slides: int,
        scaler: Any = None,
    ) -> float:
        """Run this process's batches of a step of so many `slides`, forwards and backwards, and add the gradients of
        the mean loss up over all processes; returns the loss summed over the slides of this process."""
        total = 0.0
        for batch in batches:
            with computing("fp32", self.processes.device):  # the way back too
                loss = loss_of(model, batch)
                mean = loss / slides
                (mean if scaler is None else scaler.scale(mean)).backward()
            total += float(loss.detach())
        self.processes.sum_gradients(model.parameters())
        return total


def set_rates(optimizer: torch.optim.Optimizer, top: float, recipe: Any, done: float) -> float:
    """Set the rates after `done` epochs, and return that of the head: linear warm-up from 0 to `top` in the recipe's
    `warmup_epochs`, then half a cosine to its `min_lr` at the end of its `epochs`."""
    if done < recipe.warmup_epochs:
        rate = top * done / recipe.warmup_epochs
    else:
        share = min((done - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1e-9), 1.0)
        rate = recipe.min_lr + (top - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return float(rate)


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
) -> Resumed[Epoch]:
    """Bring model, optimizer and scaler to where the training in `folder` stood, if there is one.

    Returns:
        Its epochs, the weights kept beside, the steps done of the next epoch, and this process's loss of them.

    Raises:
        ValueError: the checkpoint is of another run, or damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return [], {}, 0, 0.0
    facts = read_json(path, keys=_KEYS, mend=MEND)
    try:
        tensors = load_tensors(folder / str(facts["tensors"]))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{str(error).rstrip('.')}. {MEND}") from error
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
        return history, parts["best"], done, 0.0 if losses is None else float(losses[rank])
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: its checkpoint is damaged. {MEND}") from error


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
