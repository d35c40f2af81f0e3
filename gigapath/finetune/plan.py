"""What a run will cost, before it starts: slides, tiles, parameters, memory, time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gigapath.devices import computing, is_out_of_memory
from gigapath.evaluation.splits import Fold
from gigapath.features.data import CELL
from gigapath.finetune.data import Bag
from gigapath.finetune.heads import pack
from gigapath.finetune.loop import Processes
from gigapath.finetune.options import TrainingOptions
from gigapath.longnet.encoder import count_operations
from gigapath.machine import free_memory
from gigapath.progress import Progress
from gigapath.text import in_bytes, in_words

# Passes over so many tiles measure bytes and seconds; a GPU needs more of them to have work to do.
PROBED_TILES = {"cuda": (1024, 8192), "cpu": (128, 512)}
FEW_STEPS = 50  # of the optimizer, in all; PANDA's recipe makes 1,195
GOOD_STEPS, GOOD_EPOCHS = 10, 20  # steps an epoch and epochs that are proposed to small cohorts
ADAM_BYTES = 16  # of a parameter: weight, gradient and two moments in float32


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        about: lines about what it works on.
        trained: parameters that are trained, of `parameters` of the whole model.
        memory: bytes at the largest pass, of `available` ones that the device has free.
        seconds: of all of it, evaluation included, shared by `processes`.
        advice: a sentence where there are too few steps to learn in.
        too_large: what would make the largest pass fit, in one sentence; "" where it does.
        largest: what makes the largest pass.
    """

    about: tuple[str, ...]
    trained: int
    parameters: int
    memory: int
    available: int
    seconds: float
    processes: int
    advice: tuple[str, ...] = ()
    too_large: str = ""
    largest: str = "slide"

    def lines(self) -> list[str]:
        """For people."""
        return [
            *self.about,
            f"parameters trained: {self.trained:,} of {self.parameters:,} ({self.trained / self.parameters:.1%})",
            f"memory: about {in_bytes(self.memory)} at the largest {self.largest}, {in_bytes(self.available)} are free",
            f"time: about {in_words(self.seconds)} at the rate measured now, processes: {self.processes}",
            *self.advice,
        ]

    def tell(self, watch: Progress, processes: Processes, *, allow_low_memory: bool) -> None:
        """Say it; ValueError where the largest pass of any process won't fit, with what would help."""
        for line in self.lines():
            watch.line(line)
        too_large = next(filter(None, processes.gather(self.too_large)), "")
        if too_large and not allow_low_memory:
            raise ValueError(f"{too_large}, or go on with --allow-low-memory.")


def foresee(
    model: nn.Module,
    cost: "Cost",
    processes: Processes,
    about: Sequence[str],
    *,
    tiles: float,
    passes: float,
    operations: float,
    ways: Sequence[str],
    beside: int = 0,
    advice: Sequence[str] = (),
    largest: str = "slide",
) -> Plan:
    """The plan of a run of so many passes with so many operations in all.

    Args:
        tiles: of the largest pass.
        ways: what makes that smaller.
        beside: bytes that lie beside the model and its pass.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = int(weights_bytes(model) + cost.kept + cost.kept_per_tile * tiles + beside)
    available, too_large = free_bytes(processes.device), ""
    if memory > available:
        too_large = (
            f"the largest {largest} won't fit: it takes {in_bytes(memory)}, {in_bytes(available)} are free. Set "
            f"{', or '.join(ways or ['--device to a larger one'])}"
        )
    seconds = (passes * cost.start + operations * cost.per_operation) / processes.world
    given = (tuple(about), trained, parameters, memory, available, seconds, processes.world)
    return Plan(*given, tuple(advice), too_large, largest)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, with gradients and moments of those that are trained."""
    return sum(p.numel() * (ADAM_BYTES if p.requires_grad else 4) for p in model.parameters())


def operations(model: nn.Module, tiles: int) -> float:
    """Multiply-adds times two of a forward pass over one slide; a backward pass takes twice that.

    Real keys only. Where the model has no slide encoder, its layers' products alone.
    """
    encoder: Any = getattr(model, "slide_encoder", None)
    if encoder is None:
        return 2.0 * tiles * sum(p.numel() for p in model.parameters() if p.ndim == 2)
    products = sum(count_operations(encoder.encoder.config, (tiles + 1,)).values())
    return float(products + 2 * tiles * encoder.in_chans * encoder.embed_dim)


def make_plan(
    model: nn.Module,
    *,
    input_dim: int,
    tiles: Sequence[int],
    max_tiles: int,
    folds: Sequence[Fold],
    options: TrainingOptions,
    precision: str,
    processes: Processes,
    cached: bool = False,
) -> Plan:
    """The plan of a run on slides of so many tiles, at most `max_tiles` of which are taken in training, by passes over
    a few made tiles."""
    counts = np.asarray(tiles)
    capped = np.minimum(counts, max_tiles)
    made = partial(_loss_of_made, model, input_dim, precision, processes.device)
    ways, exact = 1 if cached else 3, options.deterministic  # a backward pass takes twice a forward pass
    cost = measure_cost(made, lambda n: ways * operations(model, n), model, processes.device, deterministic=exact)
    work = {int(count): operations(model, int(count)) for count in np.unique(np.concatenate([counts, capped]))}
    total = passes = 0.0  # operations, and passes forwards and backwards; one forwards alone is a part of it
    if cached:
        total, passes = sum(work[int(n)] for n in counts), len(counts)
    for fold in folds if not cached else ():
        train, val, test = (
            sum(work[int(n)] for n in each) for each in (capped[fold.train], counts[fold.val], counts[fold.test])
        )
        total += options.epochs * (3 * train + val) + test
        passes += options.epochs * (-(-len(fold.train) // options.batch_size) + len(fold.val) / 3) + len(fold.test) / 3
    room = free_bytes(processes.device) - weights_bytes(model) - cost.kept
    fits = max(0, int(room / max(cost.kept_per_tile * options.batch_size, 1.0)))
    about = (
        f"slides: {len(counts):,}, tiles: {counts.sum():,} (median {int(np.median(counts)):,} a slide, largest "
        f"{counts.max():,}), folds: {len(folds)}"
    )
    return foresee(
        model,
        cost,
        processes,
        [about],
        tiles=np.sort(capped)[::-1][: options.batch_size].sum(),
        passes=passes,
        operations=total,
        ways=[f"max_tiles of the task to {fits:,} or less"] * bool(fits)
        + ["a smaller --batch-size"] * (options.batch_size > 1),
        advice=few_steps(folds, options, processes),
    )


def few_steps(folds: Sequence[Fold], options: TrainingOptions, processes: Processes) -> list[str]:
    """A sentence where a small cohort, in slides, makes a recipe for thousands of them few steps of the optimizer."""
    slides = min(len(fold.train) for fold in folds)
    window = options.batch_size * options.gradient_accumulation * processes.world
    steps = -(-slides // window)
    if steps * options.epochs >= FEW_STEPS:
        return []
    passes = max(1, slides // (GOOD_STEPS * options.batch_size * processes.world))
    ways = []
    if passes < options.gradient_accumulation:
        rate = options.base_lr * options.gradient_accumulation / passes
        ways.append(f"--gradient-accumulation {passes} with --base-lr {rate:.3g} (the same rate a step)")
    if options.epochs < GOOD_EPOCHS:
        ways.append(f"--epochs {GOOD_EPOCHS}")
    if options.batch_size > 1 and passes == 1:
        ways.append("a smaller --batch-size")
    return [
        f"few steps to learn in: {window} slides make one, so {slides:,} training slides give {steps} an epoch, "
        f"{steps * options.epochs} in all. Set {' and '.join(ways or ['more --epochs'])}."
    ]


@dataclass(frozen=True)
class Cost:
    """What passes take, a part that each has, and one that grows with it: bytes that any keeps for the way back, such
    as weights that autocast has converted, and those that a tile adds; seconds of any pass, and of an operation."""

    kept: float
    kept_per_tile: float
    start: float
    per_operation: float


def measure_cost(
    loss_of: Callable[[int], torch.Tensor],
    operations: Callable[[int], float],
    model: nn.Module,
    device: torch.device,
    probed: Mapping[str, tuple[int, int]] = PROBED_TILES,
    *,
    deterministic: bool = False,
) -> Cost:
    """The line through two passes in training, after one that warms up; no state is changed.

    Args:
        loss_of: makes the loss, of shape (), of so many tiles by the model.
        operations: of a pass over so many tiles.
        probed: tiles of the two by the kind of device.

    Raises:
        ValueError: `deterministic`, and two equal passes differ.
    """
    if deterministic:
        check_deterministic(partial(loss_of, PROBED_TILES["cpu"][1]), model, device)
    few, many = probed.get(device.type, probed["cpu"])
    measure_pass(partial(loss_of, few), model, device)
    (kept, seconds), (kept_more, longer) = (measure_pass(partial(loss_of, n), model, device) for n in (few, many))
    per_tile = (kept_more - kept) / (many - few)
    rise, start = (longer - seconds) / (operations(many) - operations(few)), 0.0
    if rise > 0:
        start = max(0.0, seconds - rise * operations(few))
    else:  # the clock was disturbed
        rise = longer / operations(many)
    return Cost(max(0.0, kept - few * per_tile), per_tile, start, rise)


def measure_pass(loss_of: Callable[[], torch.Tensor], model: nn.Module, device: torch.device) -> tuple[float, float]:
    """(bytes kept for the backward pass, seconds of both passes) of one pass in training; no state is changed."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    state = torch.get_rng_state()
    model.train()
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = loss_of()
    loss.backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    return float(sum(size for place, size in kept.items() if place not in weights)), seconds


def check_deterministic(loss_of: Callable[[], torch.Tensor], model: nn.Module, device: torch.device) -> None:
    """Raise ValueError where two equal passes in training give other gradients; no state is changed."""
    found, why = [], "two equal passes gave other gradients"
    try:
        for _ in range(2):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                model.train()
                loss_of().backward()  # type: ignore[no-untyped-call]
            found.append([p.grad for p in model.parameters() if p.grad is not None])
            model.zero_grad(set_to_none=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        why = str(error).strip().splitlines()[0]
    if len(found) < 2 or not all(map(torch.equal, *found)):
        raise ValueError(
            f"--deterministic: expected training on {device} to repeat itself to the bit, but {why}. Take another "
            "--precision or --device, or leave it out."
        )


def made_bag(tiles: int, width: int) -> Bag:
    """So many tiles side by side in a square."""
    places, side = np.arange(tiles), int(np.ceil(tiles**0.5))
    cells = np.stack([places % side, places // side], axis=1).astype(np.int64)
    return Bag(np.ones((tiles, width), np.float32), cells * CELL)


def _loss_of_made(model: nn.Module, input_dim: int, precision: str, device: torch.device, tiles: int) -> torch.Tensor:
    """The sum of the logits over made tiles."""
    with computing(precision, device):
        packed = pack([made_bag(tiles, input_dim)], device)
        return model.forward_packed(*packed).float().sum()  # type: ignore[operator,no-any-return]


def free_bytes(device: torch.device) -> int:
    """Bytes that the device has free; on a CPU what the machine and the job's control groups have left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = free_memory()
    return 8 << 30 if free is None else free
