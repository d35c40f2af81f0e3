"""The heads of a probe: a linear layer by the published recipe, multinomial logistic regression fitted to the end, and
nearest neighbours. The last two choose their one number on the validation set and draw nothing.

The matrix of embeddings lives on the device; a step gathers its rows from it, and no data loader is in the way.

The folder of a probe, or of fine-tuning on tiles, holds a linear layer as `head.json` and `head.safetensors`, as that
of a head of slides does; the JSON says which of the two it is. It is applied to the tiles of whole slides.

Legend: N rows, D width, C classes, B rows a step, M rows to predict.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch

from gigapath.evaluation.results import TERMS, Predicted, predictions_csv
from gigapath.evaluation.scores import f1_weighted
from gigapath.features.data import FeatureFileError, TileEmbeddings
from gigapath.files import check_replaceable, sha256_of, write_bytes_atomic, write_json_atomic, write_text_atomic
from gigapath.linear_probe import TileProbeOptions

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EVALUATED_ROWS = 16384  # rows scored at once
# Strength of the L2 penalty, in units of the mean loss on standardised embeddings; strong to weak, so that each fit
# starts from the one before.
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(2, -13, -1))
PATIENCE = 3  # weaker penalties tried after the best one
MAX_ITERATIONS = 500
TOLERANCE = 1e-5  # largest entry of the gradient of the mean loss
SMALL_MATRIX = 1 << 26  # entries; below this, several threads cost a fit more than they give
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO's protocol
QUERY_ROWS = 2048  # rows whose neighbours are looked for at once


@dataclass(frozen=True)
class LinearHead:
    """Logits = x @ weight.T + bias; weight (C, D), bias (C,), on the device of the matrix."""

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, features: torch.Tensor, rows: torch.Tensor) -> FloatArray:
        """The logits of some rows of a matrix, (rows, C)."""
        parts = [torch.addmm(self.bias, x, self.weight.t()) for _, x in blocks(features, rows)]
        return np.asarray(torch.cat(parts).cpu().double().numpy())

    def probabilities(self, features: torch.Tensor, rows: torch.Tensor) -> FloatArray:
        """Softmax of the logits of some rows of a matrix, (rows, C)."""
        return np.asarray(torch.from_numpy(self.logits(features, rows)).softmax(dim=1).numpy())


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


def train(
    features: torch.Tensor,
    labels: torch.Tensor,
    train_rows: torch.Tensor,
    val_rows: torch.Tensor,
    classes: int,
    recipe: TileProbeOptions,
    *,
    seed: int,
) -> Fit:
    """Run the recipe once.

    The gradient of the mean cross-entropy of a linear layer is (softmax - one-hot).T @ x / B; it is written out, since
    a step is so small that autograd's bookkeeping would cost as much as its arithmetic.

    Args:
        features: (N, D) float32 on the device.
        labels: (N,) int64 class index, on the device.
        train_rows: rows of `features` to draw from, int64 on the device.

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
            # Half a cosine from the first rate towards 0, which would be reached after the last step.
            lr = 0.5 * recipe.lr * (1 + math.cos(math.pi * step / recipe.steps))
            keep = 1 - lr * recipe.weight_decay
            weight.mul_(keep).addmm_(gradient.t(), x, alpha=-lr / recipe.batch_size)
            bias.mul_(keep).sub_(gradient.sum(dim=0), alpha=lr / recipe.batch_size)
            if (step + 1) % recipe.eval_every and step + 1 < recipe.steps:
                continue
            loss = -float(losses[last_look : step + 1].mean())
            if not math.isfinite(loss):
                raise ValueError(f"the loss is not finite at step {step + 1}. Lower --lr, or scale the embeddings.")
            head = LinearHead(weight.clone(), bias.clone())
            f1 = f1_weighted(val_truth, head.logits(features, val_rows).argmax(axis=1), classes)
            looks.append(Look(step + 1, loss, f1))
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


@dataclass(frozen=True)
class Choice:
    """A fitted head's number, and what it reached on validation for each number tried."""

    name: str
    value: float
    tried: dict[float, float]
    criterion: str


def standardisation(features: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse standard deviation (D,) of the training rows in float64, 0 for an entry that never changes;
    without copying the matrix."""
    width = features.shape[1]
    total = torch.zeros(width, dtype=torch.float64, device=features.device)
    for _, x in blocks(features, rows):
        total += x.sum(dim=0, dtype=torch.float64)
    mean = total / len(rows)
    squares = torch.zeros_like(total)
    for _, x in blocks(features, rows):
        squares += (x.double() - mean).square().sum(dim=0)
    deviation = (squares / len(rows)).sqrt()
    moves = deviation > 1e-6 * mean.abs().clamp_min(1e-12)
    return mean, torch.where(moves, 1 / deviation.clamp_min(1e-300), torch.zeros_like(deviation))


class LogisticRegression:
    """Multinomial logistic regression on standardised embeddings: mean cross-entropy + penalty / 2 * |W|^2, the bias
    free. Fitted by scipy's L-BFGS-B; the standardisation is folded into the weights, so the matrix stays as it is.

    Args:
        features: (N, D) float32 or float64 on the device.
        labels: (N,) int64 class index, on the device.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor,
        classes: int,
    ) -> None:
        self._features, self._labels, self._rows, self._classes = features, labels, rows, classes
        self._mean, self._scale = standardisation(features, rows)
        self._start = np.zeros(classes * (features.shape[1] + 1))

    def fit(self, penalty: float) -> LinearHead:
        """The best head for a penalty; starts from the fit before."""
        from scipy.optimize import minimize

        def objective(flat: FloatArray) -> tuple[float, FloatArray]:
            value, gradient = self._objective(torch.from_numpy(flat).to(self._features.device), penalty)
            return value, gradient.cpu().numpy()

        how = {"maxiter": MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0}
        self._start = minimize(objective, self._start, jac=True, method="L-BFGS-B", options=how).x
        weight, bias = self._unfold(torch.from_numpy(self._start).to(self._features.device))
        return LinearHead(weight.to(self._features.dtype), bias.to(self._features.dtype))

    def _unfold(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (C, D) and bias (C,) for plain embeddings from those for standardised ones, float64."""
        width = self._features.shape[1]
        weight = flat[: self._classes * width].view(self._classes, width) * self._scale
        return weight, flat[self._classes * width :] - weight @ self._mean

    def _objective(self, flat: torch.Tensor, penalty: float) -> tuple[float, torch.Tensor]:
        """Value and gradient at the parameters for standardised embeddings."""
        width = self._features.shape[1]
        weight, bias = self._unfold(flat)
        plain_weight, plain_bias = weight.to(self._features.dtype), bias.to(self._features.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=flat.device)
        to_weight = torch.zeros_like(weight)
        to_bias = torch.zeros_like(bias)
        for block, x in blocks(self._features, self._rows):
            target = self._labels[block].unsqueeze(1)
            log_softmax = torch.addmm(plain_bias, x, plain_weight.t()).log_softmax(dim=1)
            loss -= log_softmax.gather(1, target).sum(dtype=torch.float64)
            slope = log_softmax.exp()
            slope.scatter_add_(1, target, torch.full_like(slope[:, :1], -1.0))
            to_weight += slope.t() @ x
            to_bias += slope.sum(dim=0, dtype=torch.float64)
        rows = len(self._rows)
        # Chain rule through the standardisation: z = (x - mean) * scale.
        to_weight = (to_weight - to_bias[:, None] * self._mean) * self._scale / rows
        own = flat[: self._classes * width]
        gradient = torch.cat([to_weight.reshape(-1) + penalty * own, to_bias / rows])
        return float(loss / rows + 0.5 * penalty * own.square().sum()), gradient


def choose_penalty(
    features: torch.Tensor,
    labels: torch.Tensor,
    train_rows: torch.Tensor,
    val_rows: torch.Tensor,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[LinearHead, Choice]:
    """Fit for each penalty, and keep the head with the least cross-entropy on the validation rows.

    The penalties go from strong to weak; the search ends when `PATIENCE` of them in a row were no better.

    Args:
        features: (N, D) embeddings.
        labels: (N,) class index.
    """
    small = len(train_rows) * features.shape[1] < SMALL_MATRIX
    truth = labels[val_rows].cpu().numpy()
    tried: dict[float, float] = {}
    best: LinearHead | None = None
    with one_thread(features.device) if small else contextlib.nullcontext():
        regression = LogisticRegression(features, labels, train_rows, classes)
        for penalty in penalties:
            head = regression.fit(penalty)
            tried[penalty] = cross_entropy(head.probabilities(features, val_rows), truth)
            value = min(tried, key=lambda each: tried[each])
            if value == penalty:
                best = head
            if list(tried).index(value) + PATIENCE < len(tried):
                break
    assert best is not None
    return best, Choice("penalty", value, tried, "cross-entropy on validation, the least")


def cross_entropy(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean -log of the probability of the true class, in nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-300)).mean())


class NearestNeighbours:
    """Votes of the k training rows of greatest cosine similarity, each of weight exp(similarity / `TEMPERATURE`)."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, classes: int) -> None:
        self._features, self._labels, self._rows, self._classes = features, labels, rows, classes
        norms = [x.norm(dim=1) for _, x in blocks(features, rows)]
        self._inverse = 1 / torch.cat(norms).clamp_min(1e-12)

    def probabilities(self, rows: torch.Tensor, numbers: Sequence[int]) -> dict[int, FloatArray]:
        """For each number of neighbours k the shares of the votes, (M, C)."""
        found: dict[int, list[torch.Tensor]] = {k: [] for k in numbers}
        for _, x in blocks(self._features, rows, QUERY_ROWS):
            similarity, label = self._nearest(x, max(numbers))
            votes = ((similarity - similarity[:, :1]) / TEMPERATURE).cpu().double().exp()  # (M, K), the nearest has 1
            for k in numbers:
                shares = votes.new_zeros(len(x), self._classes).scatter_add_(1, label[:, :k].cpu(), votes[:, :k])
                found[k].append(shares / shares.sum(dim=1, keepdim=True))
        return {k: np.asarray(torch.cat(parts).cpu().numpy()) for k, parts in found.items()}

    def _nearest(self, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity and label of the k nearest training rows of x (M, D), the nearest first, (M, k) each."""
        query = torch.nn.functional.normalize(x, dim=1)
        similarity = query.new_empty(len(query), 0)
        label = self._labels.new_empty(len(query), 0)
        start = 0
        for block, known in blocks(self._features, self._rows):
            here = (query @ known.t()) * self._inverse[start : start + len(block)]
            start += len(block)
            # The best of this block join the best so far, and the best of both stay.
            best, position = here.topk(min(k, len(block)), dim=1)
            label = torch.cat([label, self._labels[block][position]], dim=1)
            similarity = torch.cat([similarity, best], dim=1)
            similarity, position = similarity.topk(min(k, similarity.shape[1]), dim=1)
            label = label.gather(1, position)
        return similarity, label


def choose_neighbours(
    features: torch.Tensor, labels: torch.Tensor, train_rows: torch.Tensor, val_rows: torch.Tensor, classes: int
) -> tuple[NearestNeighbours, Choice]:
    """The number of neighbours with the best weighted F1 on the validation rows; the fewest of equals."""
    numbers = [k for k in NEIGHBOURS if k <= len(train_rows)]
    neighbours = NearestNeighbours(features, labels, train_rows, classes)
    truth = labels[val_rows].cpu().numpy()
    shares = neighbours.probabilities(val_rows, numbers)
    tried = {float(k): f1_weighted(truth, shares[k].argmax(axis=1), classes) for k in numbers}
    value = max(tried, key=lambda k: tried[k])
    return neighbours, Choice("neighbours", value, tried, "weighted F1 on validation, the greatest")


HEAD, TENSORS = "head.json", "head.safetensors"
UNIT = "tile"
_MADE = ("encoder", "weights_sha256")


@dataclass(frozen=True)
class TileHead:
    """Logits = x @ weight.T + bias of a tile.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
        classes: C names.
        made: encoder and weights_sha256 of the embeddings that trained it; None = not stated.
        sha256: of the file of its tensors; "" of a head that was never in one.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    made: dict[str, Any]
    sha256: str = ""

    def probabilities(self, tiles: TileEmbeddings) -> FloatArray:
        """(N, C) of the tiles of a slide.

        Raises:
            FeatureFileError: embeddings of another encoder or width than those that trained the head.
        """
        theirs = {"encoder": tiles.encoder, "weights_sha256": tiles.attrs.get("weights_sha256")}
        for name in _MADE:
            mine, other = self.made.get(name), theirs[name]
            if mine is not None and other is not None and mine != other:
                raise FeatureFileError(
                    f"{tiles.slide_id}: its {name} is {other}, that of the tiles that trained the head {mine}. Embed "
                    "the slide with the encoder of the head."
                )
        if tiles.embed_dim != self.weight.shape[1]:
            raise FeatureFileError(
                f"{tiles.slide_id}: expected embeddings of width {self.weight.shape[1]}, got {tiles.embed_dim}. Embed "
                "the slide with the encoder of the head."
            )
        logits = np.asarray(tiles.features, np.float32) @ self.weight.T + self.bias
        shares = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def save_tile_head(folder: Path, head: TileHead) -> None:
    """Write `head.safetensors` and then `head.json`, which names its checksum."""
    tensors = {"weight": np.ascontiguousarray(head.weight), "bias": np.ascontiguousarray(head.bias)}
    write_bytes_atomic(folder / TENSORS, safetensors.numpy.save(tensors))
    write_json_atomic(
        folder / HEAD,
        {
            "format": 1,
            "unit": UNIT,
            "classes": list(head.classes),
            "features": head.made,
            "tensors": TENSORS,
            "sha256": sha256_of(folder / TENSORS),
            "terms": TERMS,
        },
    )


def is_tile_head(path: Path | str) -> bool:
    """Whether a folder, or its JSON, is a head of tiles, not of slides."""
    try:
        held = json.loads(_json_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("unit") == UNIT


def load_tile_head(path: Path | str) -> TileHead:
    """Read a head of tiles from its folder, its JSON or its tensors; ValueError where it is none, or damaged."""
    file = _json_of(path)
    if not is_tile_head(path):
        raise ValueError(
            f"{path}: expected a head of tiles (the folder of gigapath probe, or of finetune --tiles), got none."
        )
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        tensors = file.parent / str(held["tensors"])
        if not tensors.is_file() or sha256_of(tensors) != held["sha256"]:
            raise KeyError(tensors.name)
        found = safetensors.numpy.load_file(tensors)
        classes = tuple(map(str, held["classes"]))
        weight, bias = (np.asarray(found[name], np.float32) for name in ("weight", "bias"))
        if (
            weight.ndim != 2
            or not len(classes) == len(weight) == bias.size
            or not np.isfinite(weight.sum() + bias.sum())
        ):
            raise KeyError("weight")
        return TileHead(weight, bias.ravel(), classes, dict(held["features"]), held["sha256"])
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: expected a head of tiles with its tensors, got a damaged one. Copy both.") from error


def _json_of(path: Path | str) -> Path:
    path = Path(path)
    return (path.parent if path.name in (HEAD, TENSORS) else path) / HEAD


def count_tiles(
    checkpoint: Path | str,
    features: Sequence[Path | str],
    *,
    tile_size_level0: float | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    on_failed: Callable[[str], None] = lambda reason: None,
) -> Predicted:
    """Apply a head of tiles to feature files; a file that can't be read is recorded and the others go on.

    A row holds `slide_id`, `tiles`, `predicted` (the class of most tiles), `n_CLASS` (tiles whose most probable class
    it is) and `p_CLASS` (its mean probability).

    Args:
        out: a CSV to write, or None; other content of that name stays, with a ValueError, without `overwrite`.
    """
    from gigapath.features.folders import SUFFIXES, find_feature_files, slide_name
    from gigapath.features.reading import read_features  # no need of a probe

    head = load_tile_head(checkpoint)
    rows, shares, failed = [], [], {}
    for path in find_feature_files(features):
        try:
            if path.suffix not in SUFFIXES:
                raise FeatureFileError(f"{path.name}: expected a feature file ({', '.join(SUFFIXES)}).")
            tiles = read_features(path, tile_size_level0=tile_size_level0, cells=False)
            if len(tiles) == 0:
                raise FeatureFileError(f"{path.name}: it has no tiles. Leave the slide out.")
            found = head.probabilities(tiles)
        except (FeatureFileError, FileNotFoundError, PermissionError) as error:
            failed[path.name] = str(error)
            on_failed(str(error))
            continue
        counts = np.bincount(found.argmax(axis=1), minlength=len(head.classes))
        shares.append(found.mean(axis=0))
        rows.append(
            {
                "slide_id": slide_name(path),
                "tiles": len(tiles),
                "predicted": head.classes[int(counts.argmax())],
                **{f"n_{name}": int(count) for name, count in zip(head.classes, counts, strict=True)},
            }
        )
    if out is not None:
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ("slide_id", "tiles"))}
        text = predictions_csv(columns, np.stack(shares) if rows else np.zeros((0, 1)), head.classes)
        check_replaceable(out, text, overwrite)
        write_text_atomic(out, text)
    for row, means in zip(rows, shares, strict=True):
        row |= {f"p_{name}": float(share) for name, share in zip(head.classes, means, strict=True)}
    return Predicted(rows, failed)
