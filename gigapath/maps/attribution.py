"""Which tiles count: the slide encoder's exact attention and its rollout, a heuristic; a fitted head's attention, its
gradient times input, what leaving tiles out changes, and whether such a ranking of tiles means anything.

N tiles of a slide, T = N + 1 tokens (the class token first), H heads, B branches, C classes. Layers count from 1: layer
i makes state i. The score of a class is what its probability comes from: the logit of a label of its own, else the
log-odds of the class against all others, logit - logsumexp(other logits). A head's maps are in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gigapath.evaluation.labels import Task
from gigapath.features.data import CELL
from gigapath.finetune.data import Bag
from gigapath.finetune.fitted import FittedHead
from gigapath.finetune.heads import GatedAttention, pack
from gigapath.longnet.readout import AttentionWeights, read_attention
from gigapath.slide_encoder import LongNetViT

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """The attention of one layer from the chosen query.

    `tiles` (H, N), `class_token` (H,) and `zero_keys` (H,) add up to 1 in every head as they are; the zero keys are
    those of padding, whose value is zero. `branches` (H, B) is the weight of each branch.
    """

    layer: int
    tiles: Float64
    class_token: Float64
    zero_keys: Float64
    branches: Float64


@dataclass(frozen=True, eq=False)
class Rollout:
    """Attention followed through all layers: `tiles` (N,), `class_token`, and `zero_keys`, what was lost on padding."""

    tiles: Float64
    class_token: float
    zero_keys: float


def encoder_attention(
    model: LongNetViT, features: Tensor, coords: Tensor, *, query: str | int = "pooled", layers: Sequence[int] = ()
) -> list[LayerAttention]:
    """The exact attention of the slide encoder's layers, read while the encoder runs as it always does.

    Args:
        model: the slide encoder, in eval mode.
        features: tile embeddings (N, D).
        coords: (N, 2) (x, y) in pixels of which the model's `tile_size` make a cell.
        query: "pooled" for the mean over the tiles' tokens, "class" for the class token, or the number of a tile.
        layers: which, from 1; the last when empty.

    Raises:
        ValueError: a layer or a tile that is not there.
    """
    wanted = check_layers(model, layers)
    share = query_shares(query, len(features)).to(features.device)
    found: dict[int, LayerAttention] = {}

    def read(number: int, x: Tensor) -> None:
        weights = _weights(model, number, x, share)
        tokens = weights.tokens.cpu().numpy().astype(np.float64)
        found[number] = LayerAttention(
            number,
            tokens[:, 1:],
            tokens[:, 0],
            weights.zero_keys.cpu().numpy().astype(np.float64),
            weights.branches.cpu().numpy().astype(np.float64),
        )

    _run(model, features, coords, wanted, read)
    return [found[number] for number in wanted]


def rollout(model: LongNetViT, features: Tensor, coords: Tensor, *, query: str | int = "pooled") -> Rollout:
    """Attention rollout (Abnar and Zuidema 2020): in each layer the mean over heads and the residual path count half
    each, and the layers are multiplied. A heuristic: values, norms and the feed-forward network are left out.

    The encoder's layers are gone through backwards with one row of weights, never with a T x T matrix. The inputs of
    all layers are kept for it: depth * T * D numbers. Arguments as in `encoder_attention`.
    """
    inputs: dict[int, Tensor] = {}
    _run(model, features, coords, range(1, model.depth + 1), inputs.__setitem__)
    share = query_shares(query, len(features)).to(features.device)
    lost = 0.0
    for number in range(model.depth, 0, -1):
        with torch.inference_mode():
            weights = _weights(model, number, inputs.pop(number), share)
        share = share.to(weights.tokens)
        lost += 0.5 * float(weights.zero_keys.mean())
        share = 0.5 * share + 0.5 * weights.tokens.mean(0)
    tokens = share.cpu().numpy().astype(np.float64)
    return Rollout(tokens[1:], float(tokens[0]), lost)


def check_layers(model: LongNetViT, layers: Sequence[int]) -> list[int]:
    """The layers asked for, the last when none is; ValueError where there is no such one."""
    for layer in layers:
        if not 1 <= layer <= model.depth:
            raise ValueError(f"--layer: expected layers 1 to {model.depth}, got {layer}.")
    return list(dict.fromkeys(layers)) or [model.depth]


def query_shares(query: str | int, tiles: int) -> Tensor:
    """(T,) float64, how much each token counts as a query."""
    share = torch.zeros(tiles + 1, dtype=torch.float64)
    if query == "pooled":
        share[1:] = 1 / tiles
    elif query == "class":
        share[0] = 1
    elif isinstance(query, int) and 0 <= query < tiles:
        share[query + 1] = 1
    else:
        raise ValueError(f"--tile: expected a tile from 0 to {tiles - 1}, got {query!r}.")
    return share


def _weights(model: LongNetViT, number: int, x: Tensor, share: Tensor) -> AttentionWeights:
    """The attention of layer `number` on its input x (1, T, D)."""
    layer: Any = model.encoder.layers[number - 1]
    q, k, _ = layer.self_attn.project(layer.self_attn_layer_norm(x))
    return read_attention(q, k, layer.self_attn.branches, share)


def _run(model: LongNetViT, features: Tensor, coords: Tensor, layers: Sequence[int], see: Any) -> None:
    """Run the encoder and show `see(number, input (1, T, D))` of the layers; their answers stay as they are."""
    hooks = [
        model.encoder.layers[number - 1].register_forward_pre_hook(
            lambda layer, args, number=number: see(number, args[0])
        )
        for number in layers
    ]
    try:
        with torch.inference_mode():
            model.forward_packed(features, coords, [len(features)])
    finally:
        for hook in hooks:
            hook.remove()


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

    def verdict(self) -> str:
        """What the curves say of the map, in one sentence."""
        areas = self.areas()
        left_out, brought_in = areas["deletion_minus_random"], areas["insertion_minus_random"]
        holds = (left_out < 0) + (brought_in > 0)
        verdicts = ("the ranking does NOT hold, do not go by this map", "it holds one way only", "the ranking holds")
        return (
            f"the highest tiles left out first change the score by {left_out:+.3g} against random ones, brought in "
            f"first by {brought_in:+.3g}: {verdicts[holds]}"
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
