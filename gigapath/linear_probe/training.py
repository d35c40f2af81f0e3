"""The published recipe: one linear layer, plain SGD, a cosine to 0, the best weighted F1 on validation.

The matrix of embeddings lives on the device; a step gathers its rows from it, and no data loader is in the way.

Legend: N rows, D width, C classes, B rows a step.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gigapath.evaluation import f1_weighted

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EVALUATED_ROWS = 16384  # rows scored at once


@dataclass(frozen=True)
class Recipe:
    """The numbers of the published recipe."""

    steps: int = 4000
    batch_size: int = 128
    lr: float = 0.02
    weight_decay: float = 0.01
    eval_every: int = 100


@dataclass(frozen=True)
class LinearHead:
    """Logits = x @ weight.T + bias; weight (C, D), bias (C,), on the device of the matrix."""

    weight: torch.Tensor
    bias: torch.Tensor

    def probabilities(self, features: torch.Tensor, rows: torch.Tensor) -> FloatArray:
        """Softmax of the logits of some rows of a matrix, (rows, C)."""
        return np.asarray(torch.from_numpy(self.logits(features, rows)).softmax(dim=1).numpy())

    def logits(self, features: torch.Tensor, rows: torch.Tensor) -> FloatArray:
        """The logits of some rows of a matrix, (rows, C)."""
        return np.asarray(torch.cat([part.cpu().double() for part in self._logits(features, rows)]).numpy())

    def predicted(self, features: torch.Tensor, rows: torch.Tensor) -> IntArray:
        """The most probable class of some rows of a matrix, (rows,)."""
        return np.asarray(torch.cat([part.argmax(dim=1) for part in self._logits(features, rows)]).cpu().numpy())

    def _logits(self, features: torch.Tensor, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        for _, x in blocks(features, rows):
            yield torch.addmm(self.bias, x, self.weight.t())


@dataclass(frozen=True)
class Look:
    """One look at the validation set: after which step, the mean training loss since the last look, the weighted F1."""

    step: int
    train_loss: float
    val_f1: float


@dataclass(frozen=True)
class Fit:
    """What a run of the recipe gives: the head of the best look, that look's step, and all looks."""

    head: LinearHead
    step: int
    looks: tuple[Look, ...]


def first_weights(classes: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C, D) and bias (C,) as torch's linear layer begins: uniform within 1 / sqrt(D), from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(width)
    weight = torch.empty(classes, width).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(classes).uniform_(-bound, bound, generator=generator)


def draw_batches(rows: int, steps: int, batch_size: int, seed: int) -> torch.Tensor:
    """Positions (steps, B) among the training rows, drawn with replacement, fresh at every step.

    Drawn on the CPU, so that every device trains on the same tiles.
    """
    generator = torch.Generator().manual_seed(seed + (1 << 32))  # another stream than the weights'
    return torch.randint(rows, (steps, batch_size), generator=generator)


def learning_rate(step: int, steps: int, lr: float) -> float:
    """The rate of a step counted from 0: half a cosine from `lr` towards 0, which would be reached at step `steps`."""
    return 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def train(
    features: torch.Tensor,
    labels: torch.Tensor,
    train_rows: torch.Tensor,
    val_rows: torch.Tensor,
    classes: int,
    recipe: Recipe,
    *,
    seed: int,
    on_look: Callable[[Look], None] = lambda look: None,
) -> Fit:
    """Run the recipe once.

    The gradient of the mean cross-entropy of a linear layer is (softmax - one-hot).T @ x / B; it is written out, since
    a step is so small that autograd's bookkeeping would cost as much as its arithmetic.

    Args:
        features: (N, D) float32 on the device.
        labels: (N,) int64 class index, on the device.
        train_rows: rows of `features` to draw from, int64 on the device.
        val_rows: rows that choose the best look.
        classes: C.
        recipe: the numbers.
        seed: of the first weights and the draws.
        on_look: called after each look.

    Raises:
        ValueError: the loss is no longer finite.
    """
    device = features.device
    weight, bias = (tensor.to(device) for tensor in first_weights(classes, features.shape[1], seed))
    drawn = train_rows[draw_batches(len(train_rows), recipe.steps, recipe.batch_size, seed).to(device)]  # (steps, B)
    targets = labels[drawn].unsqueeze(2)  # (steps, B, 1)
    minus_one = torch.full((recipe.batch_size, 1), -1.0, device=device)
    losses = torch.zeros(recipe.steps, device=device)
    val_truth = labels[val_rows].cpu().numpy()
    best: tuple[float, int, LinearHead] | None = None
    looks: list[Look] = []
    last_look = 0
    with torch.inference_mode(), one_thread(device):
        for step in range(recipe.steps):
            x = features.index_select(0, drawn[step])  # (B, D)
            log_softmax = torch.addmm(bias, x, weight.t()).log_softmax(dim=1)  # (B, C)
            losses[step] = log_softmax.gather(1, targets[step]).mean()
            gradient = log_softmax.exp_().scatter_add_(1, targets[step], minus_one)  # softmax - one-hot
            lr = learning_rate(step, recipe.steps, recipe.lr)
            keep = 1 - lr * recipe.weight_decay
            weight.mul_(keep).addmm_(gradient.t(), x, alpha=-lr / recipe.batch_size)
            bias.mul_(keep).sub_(gradient.sum(dim=0), alpha=lr / recipe.batch_size)
            if (step + 1) % recipe.eval_every and step + 1 < recipe.steps:
                continue
            loss = -float(losses[last_look : step + 1].mean())
            if not math.isfinite(loss):
                raise ValueError(f"the loss is not finite at step {step + 1}. Lower --lr, or scale the embeddings.")
            head = LinearHead(weight.clone(), bias.clone())
            f1 = f1_weighted(val_truth, head.predicted(features, val_rows), classes)
            looks.append(Look(step + 1, loss, f1))
            on_look(looks[-1])
            last_look = step + 1
            if best is None or f1 > best[0]:
                best = (f1, step + 1, head)
    assert best is not None
    return Fit(best[2], best[1], tuple(looks))


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU let torch use one thread, and give it back its threads afterwards.

    A step of SGD takes a fifth of a millisecond: handing it to several threads costs more than it saves (seven times
    as much on a machine where others work too), and one thread makes the result independent of their number.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def blocks(
    features: torch.Tensor, rows: torch.Tensor, size: int = EVALUATED_ROWS
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of a matrix in blocks: (rows, their embeddings); without a copy where they lie side by side."""
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        first, last = int(block[0]), int(block[-1])
        if last - first + 1 == len(block) and bool((block[1:] > block[:-1]).all()):
            yield block, features[first : last + 1]
        else:
            yield block, features.index_select(0, block)
