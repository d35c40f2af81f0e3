"""What a user compares with: a linear layer on mean tile embeddings, ABMIL on the tiles, random weights."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gigapath.finetune.data import Bags, ReadAhead
from gigapath.finetune.options import TrainingOptions
from gigapath.finetune.training import summed_loss

MEAN = "tile mean + linear"
ATTENTION = "ABMIL on tiles"
RANDOM = "from random weights"

FloatArray = npt.NDArray[np.float64]


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
    ahead = ReadAhead(bags.__getitem__, workers=workers)
    return np.stack([bag.features.mean(axis=0, dtype=np.float64) for bag in ahead(rows)])


def fit_linear(vectors: FloatArray, truth: npt.NDArray[np.int64], classes: int) -> nn.Linear:
    """Logistic regression on standardised vectors, folded into one layer on the vectors as they are.

    The penalty is half the squared weights over the number of slides (C = 1 in scikit-learn's terms); L-BFGS finds the
    one optimum, so that nothing is drawn.
    """
    centre, spread = vectors.mean(axis=0), vectors.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    inputs, target = torch.from_numpy((vectors - centre) / spread), torch.as_tensor(truth)
    layer = nn.Linear(inputs.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(
        layer.parameters(), max_iter=500, tolerance_grad=1e-9, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = (summed_loss(layer(inputs), target) + 0.5 * layer.weight.square().sum()) / len(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight /= torch.from_numpy(spread)
        layer.bias.sub_(layer.weight @ torch.from_numpy(centre))
    return layer
