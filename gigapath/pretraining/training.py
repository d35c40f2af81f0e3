"""The epochs of a pretraining: which slides each step sees, a checkpoint within and after each epoch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gigapath.devices import computing
from gigapath.finetune import checkpoints
from gigapath.finetune.data import Bags
from gigapath.finetune.loop import Loop, Step, cosine_rate
from gigapath.finetune.processes import Processes
from gigapath.pretraining.data import Slides, Target, Viewer, pack_views
from gigapath.pretraining.model import Batch, MaskedAutoencoder, loss_of_slides
from gigapath.pretraining.options import PretrainingOptions
from gigapath.pretraining.outputs import Epoch
from gigapath.progress import Progress

IntArray = npt.NDArray[np.int64]


def steps_of(
    slides: Slides, training: PretrainingOptions, processes: Processes, epoch: int, *, shard: bool
) -> list[Step]:
    """The steps of an epoch, with what this process passes in each; every slide comes once.

    Args:
        slides: those of training are passed.
        training: slides a pass and passes a step, or tiles a step.
        processes: this one among those of the run.
        epoch: counted from 0; each has an order of its own.
        shard: each process keeps to its own slides in every epoch.
    """
    train, size, world = slides.train, training.batch_size, processes.world
    if shard:
        own = np.random.default_rng([training.seed, 3]).permutation(train)
        orders = [
            np.random.default_rng([training.seed, 1, epoch, rank]).permutation(own[rank::world])
            for rank in range(world)
        ]
        window = size * training.gradient_accumulation
        cuts = range(0, max(map(len, orders)), window)
        steps = [[_chunks(order[cut : cut + window], size) for order in orders] for cut in cuts]
    else:
        order = np.random.default_rng([training.seed, 1, epoch]).permutation(train)
        if training.tokens_per_step is None:
            window = size * training.gradient_accumulation * world
            parts = np.split(order, range(window, len(order), window))
        else:
            tiles = np.cumsum([slides.facts[row].tiles for row in order])
            parts = np.split(order, np.flatnonzero(np.diff((tiles - 1) // training.tokens_per_step)) + 1)
        steps = [[_chunks(part, size)[rank::world] for rank in range(world)] for part in parts]
    found, behind = [], 0
    for shares in steps:
        count = sum(len(chunk) for share in shares for chunk in share)
        found.append(Step(shares[processes.rank], count, epoch + behind / len(train)))
        behind += count
    return found


def _chunks(rows: IntArray, size: int) -> list[IntArray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass
class Training:
    """The training of one model, from the last checkpoint in `folder` if there is one.

    Attributes:
        model: is trained.
        slides: of the run.
        bags: their tiles by row.
        viewer: how they are seen.
        target: what is predicted.
        options: the recipe.
        shard: each process keeps to its own slides.
        precision: of the passes.
        processes: this one among those of the run.
        folder: of the checkpoints.
        tag: what a checkpoint must say of itself to be continued.
        watch: receives the news.
        check_stop: called between steps; raises to end the run.
        history: the epochs so far, the start first.
        done: steps of the next epoch that are done.
        loss: of them, summed over this process's slides.
    """

    model: MaskedAutoencoder
    slides: Slides
    bags: Bags
    viewer: Viewer
    target: Target
    options: PretrainingOptions
    shard: bool
    precision: str
    processes: Processes
    folder: Path
    tag: str
    watch: Progress = field(default_factory=Progress)
    check_stop: Callable[[], None] = lambda: None
    history: list[Epoch] = field(default_factory=list)
    done: int = 0
    loss: float = 0.0

    def __post_init__(self) -> None:
        options, bare = self.options, self.model.no_weight_decay()
        decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decayed[name not in bare].append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed[True], "weight_decay": options.weight_decay},
            {"params": decayed[False], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.base_lr, betas=(0.9, options.beta2))
        self.loop = Loop(self.processes, self.precision, options.workers, self.check_stop)
        self.scaler = self.loop.scaler()
        rank = self.processes.rank
        kept = checkpoints.resume_training(
            self.folder, self.model, self.optimizer, self.scaler, tag=self.tag, epoch_of=Epoch, rank=rank
        )
        if kept is not None:
            self.history, self.done, self.loss = kept.history, kept.done, kept.loss

    def epoch(self) -> Epoch:
        """Train for the next epoch, or the rest of it; its measures are still to be taken."""
        steps = steps_of(self.slides, self.options, self.processes, len(self.history) - 1, shard=self.shard)
        self._steps = len(steps)
        self.model.train()
        taken = self.loop.run(
            self.model,
            self.optimizer,
            self.scaler,
            steps[self.done :],
            what=f"epoch {len(self.history)}",
            read=self._read,
            loss_of=self.loss_of,
            set_rate=self._set_rate,
            clip=self.options.clip,
            before=self._before,
            after=self._after,
        )
        loss = sum(self.processes.gather(self.loss)) / len(self.slides.train)
        return Epoch(
            len(self.history),
            self.history[-1].steps + len(steps),
            loss,
            learning_rate=self._set_rate(steps[-1].epochs_done),
            seconds=taken.seconds,
            waiting=taken.waited / max(taken.seconds, 1e-9),
        )

    def close(self, entry: Epoch) -> None:
        """Count an epoch as done, with its measures."""
        self.history.append(entry)
        self.done, self.loss = 0, 0.0
        self.save()

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over the slides of a batch."""
        there = batch.to(self.processes.device)
        with computing(self.precision, self.processes.device):
            predicted = model(there)
        return loss_of_slides(predicted, there, self.viewer.task.loss).sum()

    def save(self) -> None:
        """Write a checkpoint of this moment; all processes call it."""
        losses = self.processes.gather(self.loss)
        if self.processes.rank == 0:
            checkpoints.save_training(
                self.folder,
                self.history[-1].steps + self.done,
                self.model,
                self.optimizer,
                self.scaler,
                tag=self.tag,
                history=self.history,
                done=self.done,
                losses=losses,
            )

    def _read(self, rows: IntArray) -> Batch:
        epoch = len(self.history) - 1
        views = [self.viewer.view(self.bags[int(row)], self.slides.ids[row], epoch) for row in rows]
        batch = pack_views(views, self.target)
        return batch.pinned() if self.processes.device.type == "cuda" else batch

    def _before(self, number: int) -> None:
        # Nothing random is carried from one step to the next: a run that goes on draws what an unbroken one draws. Each
        # process has its own dropout.
        seeds = np.random.SeedSequence((self.options.seed, self.history[-1].steps + self.done, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]) >> 1)

    def _after(self, number: int, loss: float) -> None:
        self.done, self.loss = self.done + 1, self.loss + loss
        self.watch.step(f"epoch {len(self.history)}: steps", self.done, self._steps)
        if self.done % self.options.save_steps == 0:
            self.save()

    def _set_rate(self, epochs_done: float) -> float:
        options = self.options
        rate = cosine_rate(options.base_lr, options.min_lr, options.warmup_epochs, options.epochs, epochs_done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate
