"""The training of one model on one split: windows of slides, one step of AdamW each, a checkpoint after each epoch.

A window is what one step sees: batch_size x gradient_accumulation x processes slides, the last of an epoch may be
smaller. A chunk is what one pass sees: batch_size slides, packed without padding.

Below: what a user compares with: a linear layer on mean tile embeddings, ABMIL on the tiles, random weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigapath.devices import AUTOCAST_TYPES, computing, send
from gigapath.evaluation.calibration import target_loss
from gigapath.evaluation.labels import Task
from gigapath.evaluation.splits import Fold
from gigapath.finetune.data import Bag, Bags
from gigapath.finetune.heads import Packed, pack, pack_on_host
from gigapath.finetune.loop import Loop, Processes, Step, resume_training, save_training, set_rates
from gigapath.finetune.options import TrainingOptions
from gigapath.progress import Progress
from gigapath.read_ahead import read_ahead

MEAN, ATTENTION, RANDOM = "tile mean + linear", "ABMIL on tiles", "from random weights"

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Batch = tuple[Sequence[Bag] | Packed, IntArray]  # slides, and their rows


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training slides gave (counted from 1): mean losses over the slides, while training and of
    validation (None without any), the head's last rate, seconds of training with the share spent waiting for files."""

    epoch: int
    train_loss: float
    val_loss: float | None
    learning_rate: float
    seconds: float
    waiting: float
    slides_per_second: float

    def describe(self, epochs: int) -> str:
        """One line."""
        val = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f}"
        return (
            f"epoch {self.epoch}/{epochs}: training loss {self.train_loss:.4f}{val}, "
            f"{self.slides_per_second:.2f} slides/s, {self.waiting:.1%} of the time waiting for files"
        )


@dataclass(frozen=True)
class Trainer:
    """What the training of a fold needs besides the model.

    Attributes:
        bags: by row.
        truth: (S,) or (S, C), by row; of survival (S, 2) time and event.
        scale: what the loss knows of the training slides, `calibration.target_scale`.
        dtype: of the computation where precision is fp32; float64 for tests.
        together: slides of one pass without gradients; what stands for a slide may be a tile image.
    """

    task: Task
    bags: Bags
    truth: npt.NDArray[Any]
    options: TrainingOptions
    precision: str
    processes: Processes
    scale: tuple[float, ...] = ()
    check_stop: Callable[[], None] = lambda: None
    watch: Progress = field(default_factory=Progress)
    dtype: torch.dtype = torch.float32
    together: int = 1

    def train(self, model: nn.Module, fold: Fold, folder: Path, tag: dict[str, Any]) -> list[Epoch]:
        """Train, from the last finished epoch in `folder` if there is one; the model ends with the chosen weights."""
        options, rank = self.options, self.processes.rank
        groups = model.parameter_groups(  # type: ignore[operator]
            options.learning_rate(self.window),
            options.weight_decay,
            options.layer_decay,
            published=options.published_layer_decay,
        )
        optimizer, scaler = torch.optim.AdamW(groups), self.loop.scaler()
        history, best, _, _ = resume_training(folder, model, optimizer, scaler, tag=tag, epoch_of=Epoch, rank=rank)
        save = partial(save_training, folder, scaler=scaler, tag=tag, history=history)
        if history:
            self.watch.line(f"fold {fold.number} goes on after epoch {len(history)}")
        for epoch in range(len(history), options.epochs):
            history.append(self._epoch(model, optimizer, scaler, fold, epoch))
            self.watch.line(f"fold {fold.number}, {history[-1].describe(options.epochs)}")
            losses = [math.inf if entry.val_loss is None else entry.val_loss for entry in history]
            if options.select == "val" and losses[-1] == min(losses) and losses.count(losses[-1]) == 1:
                best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            if rank == 0:
                save(len(history), model, optimizer, best=best)
        if best:
            model.load_state_dict(best)
        if rank == 0:  # done: the optimizer's moments, two thirds of the file, are not needed any more
            save(len(history), model, None)
        return history

    @property
    def loop(self) -> Loop:
        """What takes its steps."""
        return Loop(self.processes, self.precision, self.options.workers, self.check_stop)

    @property
    def window(self) -> int:
        """Slides of one step."""
        return self.options.batch_size * self.options.gradient_accumulation * self.processes.world

    def order(self, train: IntArray, epoch: int) -> IntArray:
        """The training rows of an epoch: each once in a drawn order, or as many draws of balanced classes."""
        random = np.random.default_rng([self.options.seed, 1, epoch])
        if not self.options.balanced:
            return random.permutation(train)
        truth = self.truth[train]
        weights = 1 / np.bincount(truth)[truth]
        return random.choice(train, size=len(train), p=weights / weights.sum())

    def _epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, fold: Fold, epoch: int) -> Epoch:
        options, processes = self.options, self.processes
        # Nothing random is carried from one epoch to the next, so that a run that goes on draws what an unbroken one
        # draws; each process has its own dropout.
        seed = np.random.SeedSequence((options.seed, fold.number, epoch, processes.rank))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
        order = self.order(fold.train, epoch)
        steps = []
        for start in range(0, len(order), self.window):
            step = order[start : start + self.window]
            chunks = [step[first : first + options.batch_size] for first in range(0, len(step), options.batch_size)]
            mine = chunks[processes.rank :: processes.world]
            steps.append(Step(mine, len(step), epoch + start / len(order)))
        dtype = self.input_dtype(model, int(fold.train[0]))
        model.train()
        what = f"fold {fold.number}, epoch {epoch + 1} of {options.epochs}"
        taken = self.loop.run(
            model,
            optimizer,
            scaler,
            steps,
            what=what,
            read=partial(self.read, epoch=epoch, dtype=dtype),
            loss_of=self.loss_of,
            set_rate=partial(set_rates, optimizer, options.learning_rate(self.window), options),
            whole=self.loss_of_risk_set if self.task.loss == "cox" else None,
            after=lambda number, _: self.watch.step(f"{what}: steps", number + 1, len(steps)),
        )
        val = self.mean_loss(model, fold.val) if len(fold.val) else None
        seconds, slides = taken.seconds, len(order)
        waiting = taken.waited / seconds
        return Epoch(epoch + 1, taken.loss / slides, val, taken.learning_rate, seconds, waiting, slides / seconds)

    def read(self, rows: IntArray, epoch: int, dtype: torch.dtype) -> tuple[Packed, IntArray]:
        """The batch of a chunk's rows, ready for the device; called by threads, ahead of time."""
        bags = [self._drawn(self.bags[int(row)], int(row), epoch) for row in rows]
        return pack_on_host(bags, dtype, pinned=self.processes.device.type == "cuda"), rows

    def input_dtype(self, model: nn.Module, row: int) -> torch.dtype:
        """What tile embeddings travel in: half precision where the model, on drawn ones at some tiles of a slide, has
        the same outputs then to the bit, as one has that begins with a product under autocast; else `dtype`."""
        half = AUTOCAST_TYPES.get(self.precision)
        if half is None or self.dtype != torch.float32:
            return self.dtype
        bag = self.bags[row]
        some = bag.take(np.arange(min(len(bag), 64)))
        drawn = np.random.default_rng(0).standard_normal(some.features.shape, np.float32)
        some = replace(some, features=drawn)
        was = model.training
        model.eval()
        with torch.no_grad():
            whole, halved = (self._forward(model, pack_on_host([some], dtype)) for dtype in (self.dtype, half))
        model.train(was)
        return half if torch.equal(whole, halved) else self.dtype

    def _drawn(self, bag: Bag, row: int, epoch: int) -> Bag:
        """The tiles that training sees of a slide: shuffled, and at most `max_tiles` of them, drawn for this epoch."""
        shuffle = self.task.shuffle_tiles and not self.options.file_order
        if not shuffle and len(bag) <= self.task.max_tiles:
            return bag
        drawn = np.random.default_rng([self.options.seed, 2, epoch, row]).permutation(len(bag))[: self.task.max_tiles]
        return bag.take(drawn if shuffle else np.sort(drawn))

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over the slides of a batch: bags, and their rows."""
        return task_loss(self._forward(model, batch[0]), self.truth[batch[1]], self.task, self.scale)

    def loss_of_risk_set(self, model: nn.Module, batches: Sequence[Batch]) -> Callable[[nn.Module, Batch], Tensor]:
        """The loss of batches by Cox: all slides of the step, over all passes and processes, are one risk set.

        A first pass without gradients gives every slide's risk, and with them the loss and its slope in each risk; in
        the second each batch gives its risks times their slopes, so that its gradient is that of the whole and no more
        than one batch's activations are held. Both draw the same dropout.
        """
        seeds = torch.randint(1 << 62, (len(batches),)).tolist()
        found = []
        with torch.no_grad():
            for seed, (bags, rows) in zip(seeds, batches, strict=True):
                torch.manual_seed(seed)
                found.append((self._forward(model, bags).double().cpu(), rows))
        every = self.processes.gather(found)
        shares = [each for share in every for each in share]
        risks = torch.cat([logits for logits, _ in shares]).requires_grad_()
        truth = self.truth[np.concatenate([rows for _, rows in shares])]
        loss = task_loss(risks, truth, self.task, self.scale)
        (slopes,) = torch.autograd.grad(loss, risks)
        before = sum(len(logits) for share in every[: self.processes.rank] for logits, _ in share)
        mean, turn = float(loss.detach()) / len(risks), iter(seeds)

        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            nonlocal before
            torch.manual_seed(next(turn))
            logits = self._forward(model, batch[0])
            slope = slopes[before : before + len(logits)].to(logits)
            before += len(logits)
            return ((logits - logits.detach()) * slope).sum() + mean * len(logits)

        return loss_of

    def _forward(self, model: nn.Module, bags: Sequence[Bag] | Packed) -> Tensor:
        """Outputs (B, outputs) of bags, in float32 or float64."""
        with computing(self.precision, self.processes.device):
            logits: Tensor = model.forward_packed(*pack(bags, self.processes.device, self.dtype))  # type: ignore[operator]
        return logits if self.dtype == torch.float64 else logits.float()

    def logits(self, model: nn.Module, rows: IntArray) -> FloatArray:
        """Logits (len(rows), C) in eval mode: all tiles of each slide in the file's order, slide by slide.

        Each process takes its share; all get the whole.
        """
        model.eval()
        processes = self.processes
        mine = [int(row) for row in rows[processes.rank :: processes.world]]
        parts = [mine[first : first + self.together] for first in range(0, len(mine), self.together)]
        found: list[FloatArray] = []
        with torch.no_grad():
            for bags in read_ahead(lambda part: [self.bags[row] for row in part], parts, threads=self.options.workers):
                self.check_stop()
                with computing(self.precision, processes.device):
                    logits = model.forward_packed(*pack(bags, processes.device, self.dtype))  # type: ignore[operator]
                found.extend(logits.double().cpu().numpy())
        out = np.empty((len(rows), len(self.task.classes) if self.task.of_classes else self.task.outputs))
        for rank, share in enumerate(processes.gather(found)):
            if len(share):
                out[rank :: processes.world] = np.stack(share)
        return out

    def mean_loss(self, model: nn.Module, rows: IntArray) -> float:
        """The mean loss of some slides in eval mode."""
        logits = torch.from_numpy(self.logits(model, rows))
        return float(task_loss(logits, self.truth[rows], self.task, self.scale)) / len(rows)


def task_loss(logits: Tensor, truth: npt.NDArray[Any], task: Task, scale: tuple[float, ...] = ()) -> Tensor:
    """The loss of a task summed over slides with outputs (B, outputs): cross-entropy (truth (B,)), of several labels
    the mean binary one of the labels (truth (B, C)), or `calibration.target_loss`; by Cox they are one risk set."""
    if not task.of_classes:
        return target_loss(logits, truth, task, scale)
    target = send(torch.as_tensor(truth), logits.device)
    if target.ndim == 1:
        return F.cross_entropy(logits, target, reduction="sum")
    entries = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return entries.mean(dim=1).sum()


def abmil_options(options: TrainingOptions, processes: int = 1) -> TrainingOptions:
    """The recipe for ABMIL as a control: AdamW at 2e-4 over steps of 8 slides, however many processes share them (of
    one each where there are more), at least 20 epochs."""
    accumulation = max(1, 8 // processes)
    return replace(
        options,
        epochs=max(options.epochs, 20),
        batch_size=1,
        gradient_accumulation=accumulation,
        base_lr=2e-4 * 256 / (accumulation * processes),
        select="last",
    )


def tile_means(bags: Bags, rows: Sequence[int], *, workers: int) -> FloatArray:
    """The mean embedding (len(rows), D) of each slide."""
    bags_of_rows = read_ahead(bags.__getitem__, rows, threads=workers)
    return np.stack([bag.features.mean(axis=0, dtype=np.float64) for bag in bags_of_rows])


def fit_linear(vectors: FloatArray, outputs: int, loss_of: Callable[[Tensor], Tensor]) -> nn.Linear:
    """Logistic regression (by another loss ridge regression, or Cox with ridge) on standardised vectors (S, D), folded
    into one layer on the vectors as they are.

    The penalty is half the squared weights over the number of slides (C = 1 in scikit-learn's terms); L-BFGS finds the
    one optimum, so that nothing is drawn.

    Args:
        loss_of: of logits (S, outputs) the loss summed over the slides.
    """
    centre, spread = vectors.mean(axis=0), vectors.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    inputs = torch.from_numpy((vectors - centre) / spread)
    layer = nn.Linear(inputs.shape[1], outputs, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(
        layer.parameters(), max_iter=500, tolerance_grad=1e-9, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = (loss_of(layer(inputs)) + 0.5 * layer.weight.square().sum()) / len(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight /= torch.from_numpy(spread)
        layer.bias.sub_(layer.weight @ torch.from_numpy(centre))
    return layer
