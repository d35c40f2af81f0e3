"""The plan before fine-tuning: the line through two warm passes, held on passes whose cost is made up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigapath.devices import deterministic
from gigapath.evaluation.splits import Fold
from gigapath.finetune import plan
from gigapath.finetune.loop import Processes
from gigapath.finetune.options import TrainingOptions
from gigapath.finetune.plan import make_plan, measure_cost

CPU = torch.device("cpu")
FEW, MANY = plan.PROBED_TILES["cpu"]
START, PER_OPERATION, WEIGHTS, PER_TILE = 0.25, 1e-6, 5_000_000.0, 1_000.0


def operations(model: nn.Module, tiles: int) -> float:
    return 10.0 * tiles + 0.1 * tiles**2  # longer slides take more of a tile


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the place of passes: the tiles of each that was asked for. The first is cold, and takes a hundred times as
    long; weights that autocast has converted are kept whatever the length."""
    asked: list[int] = []

    def measured(loss_of: Callable[[], Any], model: nn.Module, device: torch.device) -> tuple[float, float]:
        asked.append(int(loss_of()))
        seconds = START + 3 * PER_OPERATION * operations(model, asked[-1])
        return WEIGHTS + PER_TILE * asked[-1], seconds * (100 if len(asked) == 1 else 1)

    monkeypatch.setattr(plan, "measure_pass", measured)
    monkeypatch.setattr(plan, "operations", operations)
    monkeypatch.setattr(plan, "_loss_of_made", lambda model, width, precision, device, tiles: tiles)
    monkeypatch.setattr(plan, "free_bytes", lambda device: 10**9)
    return asked


def test_the_line_goes_through_two_warm_passes(passes: list[int]) -> None:
    cost = measure_cost(lambda n: n, lambda n: 3 * operations(nn.Identity(), n), nn.Identity(), CPU)  # type: ignore[arg-type,return-value]
    assert passes == [FEW, FEW, MANY]
    found = (cost.kept, cost.kept_per_tile, cost.start, cost.per_operation)
    assert found == pytest.approx((WEIGHTS, PER_TILE, START, PER_OPERATION))


def test_the_plan_adds_up_passes_and_operations(passes: list[int]) -> None:
    model, tiles, most = nn.Linear(3, 2), [400, 9000, 700, 100, 2000], 5000
    folds = [Fold(0, np.array([0, 1, 2]), np.array([3]), np.array([4]))]
    options = TrainingOptions(epochs=7, batch_size=2, gradient_accumulation=1)
    made = make_plan(
        model, input_dim=3, tiles=tiles, max_tiles=most, folds=folds, options=options, precision="bf16",
        processes=Processes(CPU),
    )  # fmt: skip
    trained = sum(p.numel() for p in model.parameters())
    # Converted weights count once, not with each tile; the two largest slides, cut to the most, make the largest pass.
    assert made.memory == pytest.approx(trained * plan.ADAM_BYTES + WEIGHTS + PER_TILE * (5000 + 2000), abs=1)
    work = {n: operations(model, n) for n in (400, 5000, 700, 100, 2000)}
    total = 7 * (3 * (work[400] + work[5000] + work[700]) + work[100]) + work[2000]
    in_passes = 7 * (2 + 1 / 3) + 1 / 3  # three slides in two chunks; a pass forwards alone is a third
    assert made.seconds == pytest.approx(START * in_passes + PER_OPERATION * total)
    assert not made.too_large
    halved = make_plan(
        model, input_dim=3, tiles=tiles, max_tiles=most, folds=folds, options=replace(options, batch_size=1),
        precision="bf16", processes=Processes(CPU, 0, 2),
    )  # fmt: skip
    assert halved.seconds == pytest.approx((START * (7 * (3 + 1 / 3) + 1 / 3) + PER_OPERATION * total) / 2)


@pytest.mark.parametrize(
    ("slides", "more", "said"),
    [
        (
            24,
            {},
            "5 in all. Set --gradient-accumulation 2 with --base-lr 0.032 (the same rate a step) and --epochs 20.",
        ),
        (24, {"gradient_accumulation": 2}, None),
        (8, {"gradient_accumulation": 1, "batch_size": 8, "epochs": 20}, "Set a smaller --batch-size."),
        (2, {"gradient_accumulation": 1, "epochs": 20}, "Set more --epochs."),
    ],
)
def test_a_small_cohort_that_makes_few_steps_is_told(slides, more, said) -> None:
    rows = np.arange(slides)
    folds = [Fold(0, np.tile(rows, 2), rows, rows), Fold(1, rows, rows, rows)]
    told = plan.few_steps(folds, TrainingOptions(**more), Processes(CPU))
    assert (told == []) if said is None else told[0].endswith(said), told


class Adds(torch.nn.Module):
    """Adds something of its own to each pass, as sums in changing order do."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.layer, self.more, self.calls = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), more, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.more < 0 and self.calls > 1:
            raise RuntimeError("an_operation does not have a deterministic implementation")
        return self.layer(x) * (1 + self.more * self.calls)


@pytest.mark.parametrize("more", [0.0, 1e-6, -1.0])
def test_only_what_repeats_itself_is_deterministic(more: float) -> None:
    model = Adds(more)
    state = torch.get_rng_state()

    def check() -> None:
        plan.check_deterministic(lambda: model(torch.ones(40, 3)).sum(), model, CPU)

    if more:
        with pytest.raises(ValueError, match="--deterministic"):
            check()
    else:
        check()
    assert torch.equal(torch.get_rng_state(), state) and model.calls == 2


def test_the_switch_is_put_back_whatever_happens() -> None:
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_autocast_keeps_its_weights_once() -> None:
    model = nn.Linear(64, 512, bias=False)

    def loss_of(tiles: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.ones(tiles, 64, requires_grad=True)).float().square().sum()

    cost = measure_cost(loss_of, float, model, CPU)
    # The converted weight is kept by each pass; a tile adds its converted input, and its float32 output for the square.
    assert cost.kept == pytest.approx(2 * 64 * 512, rel=0.01)
    assert cost.kept_per_tile == pytest.approx(2 * 64 + 4 * 512, rel=0.01)
