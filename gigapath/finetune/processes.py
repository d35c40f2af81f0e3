"""The processes of a run and their device: one, or those of `accelerate launch` and `torchrun`."""

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigapath.devices import is_out_of_memory, resolve_device


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
        """Add gradients up over all processes; a parameter that has none anywhere keeps none.

        A plain sum: each process divides its loss by the slides of the whole step, so that any share of slides a
        process gets, none included, leads to the gradient of the one batch.
        """
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
    # Left to the interpreter's end, the connections' threads can outlive what they use, and abort the process.
    atexit.register(dist.destroy_process_group)
    return Processes(state.device, state.process_index, state.num_processes)


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
