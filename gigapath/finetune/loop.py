"""The optimizer's steps over slides, whatever is trained on them: fine-tuning and pretraining share them."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gigapath.devices import computing
from gigapath.finetune.processes import Processes
from gigapath.read_ahead import read_ahead

IntArray = npt.NDArray[np.int64]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Step:
    """One step of the optimizer.

    Attributes:
        chunks: the rows of each pass of this process.
        slides: of the whole step, over all passes and processes.
        epochs_done: passes over the training slides that lie behind it, a fraction.
    """

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
    """What takes steps.

    Attributes:
        processes: this one among those of the run.
        precision: "fp32", "bf16" or "fp16", whose loss is scaled.
        workers: threads that read ahead.
        check_stop: called between steps; raises to end the run.
    """

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
            model: is trained.
            optimizer: of its parameters.
            scaler: of `scaler()`.
            steps: in their order.
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

        with closing(read_ahead(read, chunks, threads=self.workers)) as ahead:
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
        """Run this process's share of a step, forwards and backwards, and add the gradients up over all processes.

        Args:
            model: gets the gradients of the mean loss over the step.
            batches: of this process.
            loss_of: the loss summed over a batch's slides.
            slides: of the whole step, over all passes and processes.
            scaler: of the loss, for fp16.

        Returns:
            the loss summed over the slides of this process.
        """
        total = 0.0
        for batch in batches:
            with computing("fp32", self.processes.device):  # the way back too
                loss = loss_of(model, batch)
                mean = loss / slides
                (mean if scaler is None else scaler.scale(mean)).backward()
            total += float(loss.detach())
        self.processes.sum_gradients(model.parameters())
        return total


def cosine_rate(top: float, least: float, warmup: float, epochs: float, done: float) -> float:
    """The learning rate after `done` of `epochs`: linear warm-up from 0 to `top`, then half a cosine to `least`."""
    if done < warmup:
        return top * done / warmup
    share = (done - warmup) / max(epochs - warmup, 1e-9)
    return least + (top - least) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
