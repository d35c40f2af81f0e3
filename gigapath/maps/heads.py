"""What a fitted head makes of each tile: its attention, its gradient times input, what leaving tiles out changes; and
whether such a ranking of tiles means anything.

N tiles of a slide, C classes. The score of a class is what its probability comes from: the logit of a label of its own,
else the log-odds of the class against all others, logit - logsumexp(other logits). All in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gigapath.evaluation.task import Task
from gigapath.features.data import CELL
from gigapath.finetune.data import Bag
from gigapath.finetune.fitted import FittedHead
from gigapath.finetune.heads import GatedAttention, pack

Float32 = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.integer[Any]]

PACKED_TILES = 8192  # of several bags that go through the model at once
MOST_BLOCKS = 256  # occluded one by one; more tiles than that are left out in squares
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the tiles, at which the curves are measured
RANDOM_ORDERS = (3, 10)  # at least and at most, as many as ORDERED_TILES allows
ORDERED_TILES = 4096


def class_scores(logits: Tensor, target: int, task: Task) -> Tensor:
    """(B,) score of a class from logits (B, C); of survival the risk, of regression the amount in standard deviations
    of training."""
    if not task.of_classes:
        if task.loss != "discrete":
            return logits[:, 0]
        return -torch.exp(-torch.cumsum(F.softplus(logits), dim=1)).mean(dim=1)
    if task.multi_label or logits.shape[1] == 1:
        return logits[:, target]
    others = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1)
    return logits[:, target] - others.logsumexp(1)


def choose_target(head: FittedHead, name: str | None, bag: Bag, device: torch.device) -> int:
    """The class that a name means; without one the second of two, else the one that the head predicts for the bag; 0
    of a risk or an amount."""
    if name is not None:
        return check_target(head.task, name)
    if len(head.task.classes) == 2 and not head.task.multi_label:
        return 1
    return predicted_class(head, bag, device)


def predicted_class(head: FittedHead, bag: Bag, device: torch.device) -> int:
    """The class with the highest logit for the bag; 0 of a risk or an amount."""
    if not head.task.of_classes:
        return 0
    with torch.no_grad():
        return int(_logits(head, [bag], device)[0].argmax())


def check_target(task: Task, name: str) -> int:
    """The index of a class; ValueError lists the classes."""
    if name not in task.classes:
        raise ValueError(f"--target: expected a class of the head ({', '.join(task.classes)}), got {name!r}.")
    return task.classes.index(name)


def head_attention(head: FittedHead, bag: Bag, device: torch.device) -> Float32:
    """(N,) weights of gated attention (ABMIL), which sum to 1.

    Raises:
        ValueError: the head has no attention.
    """
    check_attends(head)
    attention: Any = head.model.attention
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(
        lambda module, args: seen.append(GatedAttention.weights(module, *args)[0][:, 0])
    )
    try:
        with torch.no_grad():
            _logits(head, [bag], device)
    finally:
        hook.remove()
    return np.asarray(seen[0].cpu().numpy(), np.float32)


def check_attends(head: FittedHead) -> None:
    """Raise ValueError unless the head has gated attention."""
    if not isinstance(getattr(head.model, "attention", None), GatedAttention):
        raise ValueError(
            f"--kind head-attention: expected a head with attention (abmil, abmil-tiles), got {head.options.head!r}. "
            "Take --kind gradient or occlusion."
        )


def gradient_times_input(head: FittedHead, bag: Bag, target: int, device: torch.device) -> Float32:
    """(N,) for each tile the sum over its embedding of value times gradient of the class's score.

    A first-order estimate of what the tile adds. Within the slide encoder it is the gradient of training: the weights
    between the branches of the dilated attention carry none.
    """
    features, coords, lengths = pack([bag], device)
    features.requires_grad_(True)
    head.model.to(device).eval()
    with torch.enable_grad():
        logits: Tensor = head.model.forward_packed(features, coords, lengths)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(class_scores(logits.float(), target, head.task).sum(), features)
    return np.asarray((gradient * features.detach()).sum(1).cpu().numpy(), np.float32)


def occlusion(head: FittedHead, bag: Bag, target: int, device: torch.device) -> tuple[Float32, int]:
    """What each tile adds to the class's score: the score of the slide less that without the tile.

    Tiles are taken out of the bag, not replaced. Where there are many, squares of cells are left out together, and
    each of their tiles gets the square's difference.

    Returns:
        (N,) values, and the side of the squares in cells. Of a bag of one tile or square NaN: nothing is left to score.
    """
    squares, side = occluded_squares(bag.coords)
    count = int(squares.max()) + 1
    rest = [np.flatnonzero(squares != number) for number in range(count)]
    if len(rest[0]) == 0:
        return np.full(len(bag), np.nan, np.float32), side
    found = score_parts(head, bag, [np.arange(len(bag)), *rest], target, device)
    return (found[0] - found[1:])[squares], side


def occluded_squares(coords: IntArray) -> tuple[IntArray, int]:
    """(N,) number of the square that each tile lies in, and the side in cells: the least with at most MOST_BLOCKS."""
    cells = (np.asarray(coords) - np.asarray(coords).min(axis=0)) // CELL
    side = 1
    while True:
        _, numbers = np.unique(cells // side, axis=0, return_inverse=True)
        numbers = np.asarray(numbers).reshape(-1)
        if numbers.max() < MOST_BLOCKS:
            return numbers, side
        side += 1


@dataclass(frozen=True, eq=False)
class Curves:
    """Whether a ranking of tiles means something: the class's score as its first tiles go, or come.

    Attributes:
        shares: (K,) shares of the tiles, 0 to 1.
        deletion: (K,) score after the first tiles by the map were left out; at 1 one tile is left.
        insertion: (K,) score of the first tiles alone; at 0 there is one tile.
        random_deletion: (R, K) of random orders.
        random_insertion: (R, K).
    """

    shares: npt.NDArray[np.float64]
    deletion: Float32
    insertion: Float32
    random_deletion: Float32
    random_insertion: Float32

    def areas(self) -> dict[str, float]:
        """Mean score along each curve, less the mean of the random ones: a deletion below 0 and an insertion above 0
        speak for the map."""
        return {
            "deletion_minus_random": self._area(self.deletion) - self._area(self.random_deletion.mean(axis=0)),
            "insertion_minus_random": self._area(self.insertion) - self._area(self.random_insertion.mean(axis=0)),
        }

    def _area(self, scores: Float32) -> float:
        steps = np.diff(self.shares)
        return float(((scores[1:] + scores[:-1]) / 2 * steps).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {
            name: np.asarray(getattr(self, name), np.float64).tolist()
            for name in ("shares", "deletion", "insertion", "random_deletion", "random_insertion")
        }
        return {**lists, **self.areas(), "random_orders": len(self.random_deletion)}

    def in_words(self) -> str:
        """What the curves say of the map, in one sentence."""
        areas = self.areas()
        left_out, brought_in = areas["deletion_minus_random"], areas["insertion_minus_random"]
        said = (left_out < 0) + (brought_in > 0)
        verdict = ("the ranking does NOT hold, do not go by this map", "it holds one way only", "the ranking holds")
        return (
            f"the highest tiles left out first change the score by {left_out:+.3g} against random ones, brought in "
            f"first by {brought_in:+.3g}: {verdict[said]}"
        )


def deletion_and_insertion(
    head: FittedHead, bag: Bag, values: Float32, target: int, device: torch.device, *, seed: int = 0
) -> Curves:
    """Leave out, and bring in, the tiles of greatest value first, and random ones (Petsiuk, Das and Saenko 2018).

    Args:
        head: the fitted head.
        bag: the slide's N tiles.
        values: (N,) what the map says of each tile.
        target: index of the class whose score is followed.
        device: where the head runs.
        seed: of the random orders.
    """
    generator = np.random.default_rng(seed)
    least, most = RANDOM_ORDERS
    count = max(least, min(most, ORDERED_TILES // len(bag)))
    orders = [np.argsort(-values, kind="stable"), *(generator.permutation(len(bag)) for _ in range(count))]
    shares = np.array([0.0, *SHARES, 1.0])
    cuts = np.clip(np.rint(shares * len(bag)).astype(int), 0, len(bag))
    parts = []
    for order in orders:
        parts += [np.sort(order[min(cut, len(bag) - 1) :]) for cut in cuts]
        parts += [np.sort(order[: max(cut, 1)]) for cut in cuts]
    found = score_parts(head, bag, parts, target, device).reshape(len(orders), 2, len(cuts))
    return Curves(shares, found[0, 0], found[0, 1], found[1:, 0], found[1:, 1])


def score_parts(head: FittedHead, bag: Bag, parts: Sequence[IntArray], target: int, device: torch.device) -> Float32:
    """The class's score (len(parts),) of parts of a bag, rows in ascending order; several in one pass."""
    scores: list[Float32] = []
    waiting: list[Bag] = []
    with torch.no_grad():
        for number, rows in enumerate(parts):
            waiting.append(bag.take(rows))
            if sum(map(len, waiting)) >= PACKED_TILES or number == len(parts) - 1:
                logits = _logits(head, waiting, device)
                scores.append(class_scores(logits, target, head.task).cpu().numpy())
                waiting = []
    return np.concatenate(scores)


def _logits(head: FittedHead, bags: Sequence[Bag], device: torch.device) -> Tensor:
    """(B, C) float32."""
    head.model.to(device).eval()
    logits: Tensor = head.model.forward_packed(*pack(bags, device))  # type: ignore[operator]
    return logits.float()
