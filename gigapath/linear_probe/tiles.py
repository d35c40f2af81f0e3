"""A probe of tile embeddings from files to figures."""

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import gigapath
from gigapath.devices import at_most_threads, resolve_device
from gigapath.evaluation import (
    Estimate,
    Evaluation,
    Predictions,
    calibration_slope,
    evaluate,
    macro_curves,
    paired_difference,
    prior_probabilities,
)
from gigapath.linear_probe.archive import Report
from gigapath.linear_probe.data import ProbeData, load_data
from gigapath.linear_probe.heads import Choice, LinearHead, Look, Recipe, choose_neighbours, choose_penalty, train
from gigapath.linear_probe.options import ProbeOptions, TileProbeOptions
from gigapath.linear_probe.table import TEST, TRAIN, VALIDATION
from gigapath.machine import available_cores
from gigapath.options import to_dict

FloatArray = npt.NDArray[np.float64]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeedResult:
    """One fitted head: its seed (None where nothing is drawn), what was chosen on validation, its looks at it, and
    its probabilities and logits (rows, C) per split; neighbours have no logits."""

    seed: int | None
    chosen: str
    step: int | None
    looks: tuple[Look, ...]
    probabilities: dict[str, FloatArray]
    logits: dict[str, FloatArray]


@dataclass(frozen=True)
class Control:
    """A predictor that knows less than the embeddings, on the test set, and by how much the probe beats it."""

    evaluation: Evaluation
    lead: dict[str, Estimate]


@dataclass(frozen=True)
class TileProbe:
    """Everything that a probe of tiles found; `evaluations` are those of the first seed."""

    data: ProbeData
    options: dict[str, Any]
    results: tuple[SeedResult, ...]
    evaluations: dict[str, Evaluation]
    slopes: dict[str, float]
    controls: dict[str, Control]
    seed_scores: dict[str, list[float]]
    choice: Choice | None
    device: str
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def published_scores(self, split: str) -> dict[str, float]:
        """The first seed's scores by the published code's definitions; none without logits (neighbours)."""
        if split not in self.results[0].logits:
            return {}
        auroc, auprc = macro_curves(self.data.truth(split), self.results[0].logits[split])
        return {
            "f1_weighted": self.evaluations[split]["f1_weighted"].value,
            "auroc_logits_macro": auroc,
            "auprc_logits_macro": auprc,
        }

    def predictions(self, split: str) -> Predictions:
        """Truth and the first seed's probabilities of a split."""
        return predictions_of(self.data, split, self.results[0].probabilities[split])


def probe_tiles(
    embeddings: Path | str,
    labels: Path | str | None,
    options: ProbeOptions = ProbeOptions(),  # noqa: B008 - frozen
    tile_options: TileProbeOptions = TileProbeOptions(),  # noqa: B008 - frozen
    *,
    report: Report | None = None,
    on_look: Callable[[int, Look], None] = lambda seed, look: None,
) -> TileProbe:
    """Read, fit, choose on validation, and score once on test.

    Args:
        embeddings: zip, folder or file of tile embeddings.
        labels: CSV, or None where the embeddings carry their labels.
        options: columns, intervals, what to allow.
        tile_options: solver and recipe.
        report: progress of the reading.
        on_look: called with the seed and each look at the validation set.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong; nothing was written.
    """
    device = _device(tile_options)
    started = time.perf_counter()
    data = load_data(
        embeddings,
        labels,
        options,
        pcam_meta=tile_options.pcam_meta,
        cache=not tile_options.no_cache,
        report=report,
    )
    read = time.perf_counter()
    with at_most_threads(available_cores()):
        results, choice = fit_heads(data, options, tile_options, device, on_look)
    fitted = time.perf_counter()
    notes = list(data.warnings)
    if tile_options.seeds > 1 and tile_options.solver != "sgd":
        notes.append(f"--seeds has no effect: {tile_options.solver} draws nothing")

    evaluations, slopes = {}, {}
    for split in (VALIDATION, TEST):
        predictions = predictions_of(data, split, results[0].probabilities[split])
        evaluations[split] = evaluate(predictions, replicates=options.replicates, seed=options.seed)
        slopes[split] = calibration_slope(predictions)
        notes += [f"{split}: {note}" for note in evaluations[split].notes]
    controls = _controls(data, results[0].probabilities[TEST], options)
    per_seed = [
        evaluate(predictions_of(data, TEST, result.probabilities[TEST]), replicates=0).estimates for result in results
    ]
    return TileProbe(
        data=data,
        options={**to_dict(options), **to_dict(tile_options)},
        results=results,
        evaluations=evaluations,
        slopes=slopes,
        controls=controls,
        seed_scores={name: [scores[name].value for scores in per_seed] for name in per_seed[0]},
        choice=choice,
        device=str(device),
        seconds={
            "read": read - started,
            "fit": fitted - read,
            "evaluate": time.perf_counter() - fitted,
        },
        notes=tuple(notes),
        facts={
            "implementation": gigapath.__implementation__,
            "package_version": gigapath.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    )


def fit_heads(
    data: ProbeData,
    options: ProbeOptions,
    tile_options: TileProbeOptions,
    device: torch.device,
    on_look: Callable[[int, Look], None] = lambda seed, look: None,
) -> tuple[tuple[SeedResult, ...], Choice | None]:
    """Fit the chosen solver, once per seed where it draws; the test rows are only predicted, once per head.

    Args:
        data: embeddings, labels and splits.
        options: the first seed.
        tile_options: solver, recipe, number of seeds.
        device: where it is fitted.
        on_look: called with the seed and each look at the validation set.

    Returns:
        a result a seed, and what was chosen on validation where the solver tries several.
    """
    features = torch.from_numpy(data.features).to(device)
    labels = torch.from_numpy(data.labels).to(device)
    rows = {split: torch.from_numpy(found).to(device) for split, found in data.rows.items()}
    classes = len(data.classes)
    if tile_options.solver == "sgd":
        recipe = Recipe(
            steps=tile_options.steps,
            batch_size=tile_options.batch_size,
            lr=tile_options.lr,
            weight_decay=tile_options.weight_decay,
            eval_every=tile_options.eval_every,
        )
        results = []
        for seed in range(options.seed, options.seed + tile_options.seeds):
            fit = train(
                features,
                labels,
                rows[TRAIN],
                rows[VALIDATION],
                classes,
                recipe,
                seed=seed,
                on_look=lambda look, seed=seed: on_look(seed, look),  # type: ignore[misc]
            )
            probabilities, logits = _outputs(fit.head, features, rows)
            results.append(
                SeedResult(
                    seed,
                    "the step with the best weighted F1 on validation",
                    fit.step,
                    fit.looks,
                    probabilities,
                    logits,
                )
            )
        return tuple(results), None
    if tile_options.solver == "lbfgs":
        head, choice = choose_penalty(features, labels, rows[TRAIN], rows[VALIDATION], classes)
        probabilities, logits = _outputs(head, features, rows)
        chosen = f"the penalty with the least cross-entropy on validation: {choice.value:g}"
        return (SeedResult(None, chosen, None, (), probabilities, logits),), choice
    neighbours, choice = choose_neighbours(features, labels, rows[TRAIN], rows[VALIDATION], classes)
    k = int(choice.value)
    probabilities = {split: neighbours.probabilities(rows[split], [k])[k] for split in (VALIDATION, TEST)}
    chosen = f"the number of neighbours with the best weighted F1 on validation: {k}"
    return (SeedResult(None, chosen, None, (), probabilities, {}),), choice


def _outputs(
    head: LinearHead, features: torch.Tensor, rows: dict[str, torch.Tensor]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """(probabilities, logits) of a head per split."""
    splits = (VALIDATION, TEST)
    probabilities = {split: head.probabilities(features, rows[split]) for split in splits}
    return probabilities, {split: head.logits(features, rows[split]) for split in splits}


def predictions_of(data: ProbeData, split: str, probabilities: FloatArray) -> Predictions:
    """Probabilities of a split's rows with their truth and groups."""
    return Predictions(data.truth(split), probabilities, data.classes, groups=data.groups_of(split))


def _device(tile_options: TileProbeOptions) -> torch.device:
    """The device of the options; logistic regression needs float64, which Apple's does not have."""
    device = resolve_device(tile_options.device)
    if device.type == "mps" and tile_options.solver == "lbfgs":
        if tile_options.device != "auto":
            raise ValueError("--device: expected one with float64 for --solver lbfgs, got 'mps'. Use --device cpu.")
        return torch.device("cpu")
    return device


def _controls(data: ProbeData, probabilities: FloatArray, options: ProbeOptions) -> dict[str, Control]:
    """What chance reaches, and what raw colour statistics reach where pixels were at hand, on the test set."""
    ours = predictions_of(data, TEST, probabilities)
    said = {"chance": prior_probabilities(data.truth(TRAIN), len(ours.truth), len(data.classes))}
    if data.colours is not None:
        colours = torch.from_numpy(data.colours.astype(np.float64))
        rows = {split: torch.from_numpy(found) for split, found in data.rows.items()}
        head, _ = choose_penalty(
            colours, torch.from_numpy(data.labels), rows[TRAIN], rows[VALIDATION], len(data.classes)
        )
        said["colour"] = head.probabilities(colours, rows[TEST])
    controls = {}
    for name, control in said.items():
        theirs = replace(ours, probabilities=control)
        controls[name] = Control(
            evaluate(theirs, replicates=options.replicates, seed=options.seed),
            paired_difference(ours, theirs, replicates=options.replicates, seed=options.seed),
        )
    return controls
