"""A probe of tile embeddings from files to figures."""

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import gigapath
from gigapath.devices import at_most_threads, computing, resolve_device
from gigapath.evaluation.intervals import evaluate, plain
from gigapath.evaluation.plots import Curves, draw_curves
from gigapath.evaluation.results import (
    CHANCE,
    TILE_PROBE,
    Results,
    Scores,
    confusion_picture,
    predictions_csv,
    score,
    score_lines,
    summary_csv,
    write_results,
)
from gigapath.evaluation.scores import Predictions, macro_curves, prior_probabilities
from gigapath.linear_probe import ProbeOptions, TileProbeOptions
from gigapath.linear_probe.data import ProbeData, load_data
from gigapath.linear_probe.embeddings import TEST, TRAIN, VALIDATION
from gigapath.linear_probe.heads import (
    HEAD,
    TENSORS,
    Choice,
    Fit,
    LinearHead,
    Look,
    TileHead,
    choose_neighbours,
    choose_penalty,
    save_tile_head,
    train,
)
from gigapath.machine import available_cores
from gigapath.options import to_dict
from gigapath.progress import Progress
from gigapath.tables import data_frame

FloatArray = npt.NDArray[np.float64]

PROBE = "probe"
# What the heads that try several numbers vary, and by what they choose, on validation.
_TRIED = {
    "penalty": ("penalty (mean loss per squared weight)", "cross-entropy, validation (nats)"),
    "neighbours": ("neighbours k", "weighted F1, validation"),
}


@dataclass(frozen=True)
class SeedResult:
    """One fitted head: its seed (None where nothing is drawn), what was chosen on validation, its looks at it,
    its probabilities and logits (rows, C) per split, and itself; neighbours have neither logits nor a layer."""

    seed: int | None
    chosen: str
    step: int | None
    looks: tuple[Look, ...]
    probabilities: dict[str, FloatArray]
    logits: dict[str, FloatArray]
    layer: LinearHead | None = None


@dataclass(frozen=True, repr=False)
class TileProbe:
    """Everything that a probe of tiles found; `scores` are those of the first seed on the test set, those of controls
    beside, `seed_scores` those of each seed."""

    data: ProbeData
    options: dict[str, Any]
    heads: tuple[SeedResult, ...]
    scores: dict[str, Scores]
    validation: Scores
    seed_scores: dict[str, list[float]]
    choice: Choice | None
    device: str
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The table of scores, and what is to be noted."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        data = self.data
        tiles = ", ".join(f"{len(rows):,} {split}" for split, rows in data.rows.items())
        width = data.features.shape[1]
        yield f"{tiles} tiles of {len(data.classes)} classes ({', '.join(data.classes)}), embeddings of width {width}"
        yield f"kept: {self.heads[0].chosen}" + (f" (step {self.heads[0].step})" if self.heads[0].step else "")
        more = {}
        if len(self.heads) > 1:
            cells = {name: f"{np.mean(all):.4f} +- {np.std(all, ddof=1):.4f}" for name, all in self.seed_scores.items()}
            more = {f"mean and SD of {len(self.heads)} seeds": cells}
        yield from score_lines(self.scores, more)
        if len(data.classes) == 2:
            prevalence = self.scores[PROBE].headline.prevalence[data.classes[1]]
            yield f"positive class: {data.classes[1]} ({prevalence:.1%} of the test tiles)"
        yield from (f"note: {note}" for note in self.notes)

    def to_frame(self) -> Any:
        """A `pandas.DataFrame` with a row a model and score, of the first seed: value, interval, leads."""
        return data_frame(summary_csv(self.scores))

    def published_scores(self, split: str) -> dict[str, float]:
        """The first seed's scores by the published code's definitions; none without logits (neighbours)."""
        if split not in self.heads[0].logits:
            return {}
        auroc, auprc = macro_curves(self.data.truth(split), self.heads[0].logits[split])
        ours = self.validation if split == VALIDATION else self.scores[PROBE]
        return {"f1_weighted": ours["f1_weighted"].value, "auroc_logits_macro": auroc, "auprc_logits_macro": auprc}

    @property
    def curves(self) -> Curves:
        """Loss and validation score over the steps; for the heads without steps the score over what was tried."""
        if self.choice is not None:
            x, y = _TRIED[self.choice.name]
            values = sorted(self.choice.tried)
            lines = {"tried": (values, [self.choice.tried[value] for value in values])}
            mark = (self.choice.value, f"kept: {self.choice.value:g}")
            return Curves(f"Choice of the {self.choice.name}", x, {y: lines}, mark, log=True)
        loss, f1 = {}, {}
        for head in self.heads[:7]:
            steps = [look.step for look in head.looks]
            loss[f"seed {head.seed}"] = (steps, [look.train_loss for look in head.looks])
            f1[f"seed {head.seed}"] = (steps, [look.val_f1 for look in head.looks])
        panels = {"training cross-entropy (nats)": loss, "weighted F1, validation": f1}
        step = self.heads[0].step or 0
        mark = (step, f"kept: step {step} (seed {self.heads[0].seed})")
        axis = f"step (of {self.options['batch_size']} tiles)"
        return Curves("Learning curve: linear probe, SGD", axis, panels, mark)

    @property
    def results(self) -> Results:
        """What `results.json` holds."""
        first, classes = self.heads[0], self.data.classes
        chosen: dict[str, Any] = {"what": first.chosen, "on": "validation", "step": first.step}
        if self.choice:
            chosen["tried"] = {f"{value:g}": found for value, found in self.choice.tried.items()}
            chosen["criterion"] = self.choice.criterion
        published = {"validation": self.published_scores(VALIDATION), "test": self.published_scores(TEST)}
        return Results(
            TILE_PROBE,
            {
                "classes": list(classes),
                **({"positive_class": classes[1]} if len(classes) == 2 else {}),
                "auprc_baseline": "the prevalence",
            },
            self.scores,
            self.validation,
            self.curves.to_dict(),
            {
                "published_definitions": {
                    "what": "raw logits against one-hot truth, macro over all classes",
                    **plain(published),
                },
                "chosen": chosen,
                "seeds": {
                    "seeds": [head.seed for head in self.heads],
                    "test": {name: _spread(values) for name, values in self.seed_scores.items()},
                },
                "data": self.data.facts,
                "options": self.options,
                "device": self.device,
                "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
                "versions": {
                    "implementation": gigapath.__implementation__,
                    "package_version": gigapath.__version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                    "threads": torch.get_num_threads(),
                },
            },
            self.notes,
        )


def probe_tiles(
    embeddings: Path | str,
    labels: Path | str | None,
    options: ProbeOptions = ProbeOptions(),  # noqa: B008 - frozen
    tile_options: TileProbeOptions = TileProbeOptions(),  # noqa: B008 - frozen
    *,
    watch: Progress | None = None,
) -> TileProbe:
    """Read, fit, choose on validation, and score once on test.

    Args:
        labels: CSV, or None where the embeddings carry their labels.
        watch: receives the news of the reading.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong; nothing was written.
    """
    device = _device(tile_options)
    started = time.perf_counter()
    meta, cache = tile_options.pcam_meta, not tile_options.no_cache
    data = load_data(embeddings, labels, options, pcam_meta=meta, cache=cache, watch=watch)
    read = time.perf_counter()
    with at_most_threads(available_cores()), computing("fp32", device):
        heads, choice = fit_heads(data, options, tile_options, device)
    fitted = time.perf_counter()
    notes = list(data.warnings)
    if tile_options.seeds > 1 and tile_options.solver != "sgd":
        notes.append(f"--seeds has no effect: {tile_options.solver} draws nothing")

    scored = partial(score, unit="tiles", replicates=options.replicates, seed=options.seed)
    predicted = {split: predictions_of(data, split, heads[0].probabilities[split]) for split in (VALIDATION, TEST)}
    controls = _controls(data)
    scores = {PROBE: scored(predicted[TEST], against=controls)}
    scores |= {name: scored(control) for name, control in controls.items()}
    validation = scored(predicted[VALIDATION])
    for split, found in ((VALIDATION, validation), (TEST, scores[PROBE])):
        notes += [f"{split}: {note}" for note in found.notes]
    per_seed = [
        evaluate(predictions_of(data, TEST, head.probabilities[TEST]), replicates=0).estimates for head in heads
    ]
    return TileProbe(
        data=data,
        options={**to_dict(options), **to_dict(tile_options)},
        heads=heads,
        scores=scores,
        validation=validation,
        seed_scores={name: [found[name].value for found in per_seed] for name in per_seed[0]},
        choice=choice,
        device=str(device),
        seconds={"read": read - started, "fit": fitted - read, "evaluate": time.perf_counter() - fitted},
        notes=tuple(notes),
    )


def fit_heads(
    data: ProbeData,
    options: ProbeOptions,
    tile_options: TileProbeOptions,
    device: torch.device,
) -> tuple[tuple[SeedResult, ...], Choice | None]:
    """Fit the chosen solver, once per seed where it draws; the test rows are only predicted, once per head.

    Returns:
        a result a seed, and what was chosen on validation where the solver tries several.
    """
    features = torch.from_numpy(data.features).to(device)
    labels = torch.from_numpy(data.labels).to(device)
    rows = {split: torch.from_numpy(found).to(device) for split, found in data.rows.items()}

    def fitted(head: LinearHead, seed: int | None, chosen: str, fit: Fit | None = None) -> SeedResult:
        probabilities, logits = (
            {split: outputs(features, rows[split]) for split in (VALIDATION, TEST)}
            for outputs in (head.probabilities, head.logits)
        )
        return SeedResult(
            seed, chosen, fit.step if fit else None, fit.looks if fit else (), probabilities, logits, head
        )

    training = features, labels, rows[TRAIN], rows[VALIDATION], len(data.classes)
    if tile_options.solver == "sgd":
        results = []
        for seed in range(options.seed, options.seed + tile_options.seeds):
            fit = train(*training, tile_options, seed=seed)
            results.append(fitted(fit.head, seed, "the step with the best weighted F1 on validation", fit))
        return tuple(results), None
    if tile_options.solver == "lbfgs":
        head, choice = choose_penalty(*training)
        chosen = f"the penalty with the least cross-entropy on validation: {choice.value:g}"
        return (fitted(head, None, chosen),), choice
    neighbours, choice = choose_neighbours(*training)
    k = int(choice.value)
    probabilities = {split: neighbours.probabilities(rows[split], [k])[k] for split in (VALIDATION, TEST)}
    chosen = f"the number of neighbours with the best weighted F1 on validation: {k}"
    return (SeedResult(None, chosen, None, (), probabilities, {}),), choice


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


def _controls(data: ProbeData) -> dict[str, Predictions]:
    """Chance's predictions of the test set, and those of raw colour statistics where pixels were at hand."""
    truth = data.truth(TEST)
    predicted = {CHANCE: prior_probabilities(data.truth(TRAIN), len(truth), len(data.classes))}
    if data.colours is not None:
        colours = torch.from_numpy(data.colours.astype(np.float64))
        rows = {split: torch.from_numpy(found) for split, found in data.rows.items()}
        head, _ = choose_penalty(
            colours, torch.from_numpy(data.labels), rows[TRAIN], rows[VALIDATION], len(data.classes)
        )
        predicted["colour"] = head.probabilities(colours, rows[TEST])
    return {name: predictions_of(data, TEST, probabilities) for name, probabilities in predicted.items()}


def write_tile_report(out: Path, probe: TileProbe) -> list[str]:
    """Write all files of a probe of tiles into a folder; returns their names."""
    events = {
        f"seed_{head.seed}": {
            "train/loss": [(look.step, look.train_loss) for look in head.looks],
            "validation/f1_weighted": [(look.step, look.val_f1) for look in head.looks],
        }
        for head in probe.heads
        if head.looks
    }
    layer, data = probe.heads[0].layer, probe.data
    if layer is None:
        (out / HEAD).unlink(missing_ok=True)  # of a probe before
    else:
        weight, bias = (tensor.float().cpu().numpy() for tensor in (layer.weight, layer.bias))
        sha256 = data.facts.get("encoder_weights_sha256")
        made = {"encoder": data.facts.get("encoder_encoder"), "weights_sha256": None if sha256 == "none" else sha256}
        save_tile_head(out, TileHead(weight, bias, data.classes, made))
    return ([] if layer is None else [HEAD, TENSORS]) + write_results(
        out,
        probe.results,
        texts={"results.txt": published_lines(probe), "predictions.csv": _predictions(probe)},
        pictures={
            "confusion.png": lambda: confusion_picture(probe.scores[PROBE], probe.data.classes, "test set"),
            "curve.png": lambda: draw_curves(probe.curves),
        },
        events=events,
    )


def published_lines(probe: TileProbe) -> str:
    """The two lines of the published `results.txt`, of the first seed, by our definitions; then the areas by the
    published ones."""
    val, test = probe.validation, probe.scores[PROBE]
    lines = (
        f"Val f1: {val['f1_weighted'].value:.4f}\n"
        f"Test f1: {test['f1_weighted'].value:.4f} Test AUROC: {test['auroc'].value:.4f} "
        f"Test AUPRC: {test['auprc'].value:.4f}\n"
    )
    if published := probe.published_scores(TEST):
        lines += (
            f"Test AUROC (logits, macro): {published['auroc_logits_macro']:.4f} "
            f"Test AUPRC (logits, macro): {published['auprc_logits_macro']:.4f}\n"
        )
    return lines


def _predictions(probe: TileProbe) -> str:
    data = probe.data
    rows = np.concatenate([data.rows[split] for split in (VALIDATION, TEST)])
    shares = np.concatenate([probe.heads[0].probabilities[split] for split in (VALIDATION, TEST)])
    columns = {
        "name": [data.names[row] for row in rows],
        "split": [split for split in (VALIDATION, TEST) for _ in data.rows[split]],
        **({} if data.groups is None else {data.group_column or "group": data.groups[rows].tolist()}),
        "label": [data.classes[label] for label in data.labels[rows]],
        "predicted": [data.classes[index] for index in shares.argmax(axis=1)],
    }
    return predictions_csv(columns, shares, data.classes)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample), least and greatest over seeds."""
    numbers = np.array(values)
    found: dict[str, Any] = plain(
        {
            "mean": float(numbers.mean()),
            "sd": float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0,
            "min": float(numbers.min()),
            "max": float(numbers.max()),
            "values": values,
        }
    )
    return found
