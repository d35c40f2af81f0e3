"""A whole run: labels joined to features, folds audited, a plan, then for each fold training, evaluation, controls."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gigapath.cohort.record import versions
from gigapath.cohort.stage import Ownership
from gigapath.devices import at_most_threads, deterministic
from gigapath.evaluation.calibration import (
    Calibration,
    default_calibration,
    fit_calibration,
    fit_scale,
    outputs,
    target_scale,
)
from gigapath.evaluation.intervals import Evaluation
from gigapath.evaluation.plots import Curves, draw_curves
from gigapath.evaluation.results import (
    FINE_TUNING,
    FOLD,
    SITE_ALONE,
    Results,
    Scores,
    groups_of,
    pictures_of,
    score_lines,
    stratum_lines,
    summary_csv,
    write_results,
)
from gigapath.evaluation.scores import FloatArray, Predictions, rank_by, scale_of, site_probabilities
from gigapath.evaluation.splits import Fold, keep_manifest
from gigapath.features import FeatureFileError
from gigapath.files import write_json_atomic
from gigapath.finetune.data import Cohort, FileBags, Inputs, Settings, check_folder, prepare, prints_of, vector_bags
from gigapath.finetune.fitted import (
    FittedHead,
    predictions_of,
    save_head,
    score_slides,
    slides_csv,
)
from gigapath.finetune.heads import CumulativeLogits, VectorHead, adapt, build_head, cache_states, merge
from gigapath.finetune.loop import Processes, check_same_run, join_processes, start_of, training_precision
from gigapath.finetune.options import ModelOptions, TrainingOptions
from gigapath.finetune.plan import Plan, make_plan
from gigapath.finetune.training import (
    ATTENTION,
    MEAN,
    RANDOM,
    Epoch,
    Trainer,
    abmil_options,
    fit_linear,
    task_loss,
    tile_means,
)
from gigapath.machine import available_cores
from gigapath.options import to_dict
from gigapath.progress import Progress
from gigapath.read_ahead import read_ahead
from gigapath.tables import data_frame
from gigapath.text import in_bytes

RUN = "finetune.json"
ENCODER = "slide_encoder"  # the folder of the tuned slide encoder alone, in a fold's
# The model itself, beside its controls; from random weights it bears that control's name.
TUNED, FROZEN = "fine-tuned", "frozen encoder"
UNMEASURED = "intervals over folds were measured on linear probes: of fine-tuned models they are uncalibrated"
# What may differ between a run and the one that goes on with it: it changes no number that is stored.
NO_CHANGE = ("workers", "device", "replicates", "allow_low_memory")


@dataclass(frozen=True)
class RunResult:
    """What a run found: model -> the evaluation of each fold; first the model itself: "fine-tuned", "frozen
    encoder" where only the head is trained, or "from random weights" where it began without any."""

    evaluations: dict[str, list[Evaluation]]
    lines: list[str]
    out: Path
    scores: dict[str, Scores]

    def __repr__(self) -> str:
        """The table of scores."""
        return "\n".join([*self.lines, f"written to {self.out}"])

    def to_frame(self) -> Any:
        """A `pandas.DataFrame` with a row a model and score, over the folds: value, interval, leads."""
        return data_frame(summary_csv(self.scores))


def finetune(
    inputs: Inputs,
    out: Path | str,
    settings: Settings | None = None,
    *,
    cohort: Cohort | None = None,
    dry_run: bool = False,
    watch: Progress | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> RunResult:
    """Fine-tune on every fold, or go on with the run that `out` holds.

    Args:
        cohort: what `prepare` makes of both, where that is done.
        dry_run: show the plan, and neither train nor write.
        check_stop: called between steps; raises to end the run, which can go on later from the last epoch.

    Raises:
        ValueError: whatever is wrong with what the user gave, in one sentence, before anything is trained.
    """
    settings = settings or Settings()
    out = Path(out)
    check_folder(out)
    cohort = cohort or prepare(inputs, settings)
    processes = join_processes(settings.training.device)
    precision = training_precision(settings.training.precision, processes.device)
    watch = watch if watch is not None and processes.rank == 0 else Progress()
    run = _Run(inputs, settings, cohort, out, processes, precision, watch, check_stop, dry_run)
    owned = {out: run.identity} if processes.rank == 0 and not dry_run else {}
    with Ownership(owned), at_most_threads(available_cores()), deterministic(settings.training.deterministic):
        return run()


@dataclass
class _Run:
    inputs: Inputs
    settings: Settings
    cohort: Cohort
    out: Path
    processes: Processes
    precision: str
    watch: Progress
    check_stop: Callable[[], None]
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.task, self.labels = self.cohort.task, self.cohort.joined.labels
        self.width = self.cohort.facts[0].width
        self.bags = FileBags(self.cohort.joined.files, self.cohort.facts, self.settings.join.tile_size_level0)
        self.cached: dict[int, Any] = {}
        self.first = self.processes.rank == 0
        self.checkpointed = False  # the plan finds that the largest slide would not fit otherwise
        training = {key: value for key, value in to_dict(self.settings.training).items() if key not in NO_CHANGE}
        # What the slide encoder starts from; nothing where it is random or there is none.
        bare = self.settings.model.head == "abmil-tiles"
        self.weights: dict[str, str] = {} if bare else start_of(self.inputs.pretrained)
        self.identity = {
            "task": self.task.to_dict(),
            "labels": self.labels.digest,
            "features": prints_of(self.cohort.facts),
            "weights": self.weights.get("sha256", ""),
            "model": to_dict(self.settings.model),
            "training": training,
            "precision": self.precision,
            "processes": self.processes.world,
            "tile_size_level0": self.settings.join.tile_size_level0,
        }

    def __call__(self) -> RunResult:
        cohort, settings, training = self.cohort, self.settings, self.settings.training
        if self.first:
            check_same_run(self.out / RUN, self.identity)
        for note in cohort.notes:
            self.watch.line(f"note: {note}")
        plan = self._plan()
        if self.task.loss == "cox":
            slides = training.batch_size * training.gradient_accumulation * self.processes.world
            self.watch.line(f"Cox: the risk set of a slide is the slides of its step, {slides:,} at most")
        if settings.controls:
            self.watch.line("the controls take additional time")
        plan.tell(self.watch, self.processes, allow_low_memory=training.allow_low_memory)
        if self.dry_run:
            return RunResult({}, [], self.out, {})
        self._check_files()
        split = self.processes.gather(self._record() if self.first else "")[0]
        folds = [self._fold(fold, split) for fold in cohort.folds]
        scores = folds[0] if len(folds) == 1 else self._over_folds(folds)
        lines, notes = [*score_lines(scores), *stratum_lines(scores)], list[str]()
        if len(folds) > 1:
            notes += [*next(iter(scores.values())).notes, UNMEASURED]
        if self.first:
            # The fold's own results say what a single one reached at thresholds and by site.
            main = next(iter(scores.values()))
            details, noted = groups_of(main, self.task), (*cohort.notes, *notes)
            results = Results(FINE_TUNING, self.task.described(), scores, details=details, notes=noted)
            pictures = {} if self.task.of_classes else pictures_of(main, self.task, "all folds")
            write_results(self.out, results, texts={"summary.csv": summary_csv(scores)}, pictures=pictures)
        for line in [*lines, *(f"note: {note}" for note in notes)]:
            self.watch.line(line)
        models = [name for name in scores if name != SITE_ALONE]
        evaluations = {name: [found[name].headline for found in folds] for name in models}
        return RunResult(evaluations, lines, self.out, scores)

    def _over_folds(self, folds: list[dict[str, Scores]]) -> dict[str, Scores]:
        """The scores of each model over all folds: of the slides that each did not train on, pooled."""
        labels = self.labels
        rows = np.concatenate([fold.test for fold in self.cohort.folds])
        fold_of_row = np.concatenate([np.full(len(fold.test), fold.number) for fold in self.cohort.folds])
        predicted: dict[str, Predictions] = {}
        for name in folds[0]:
            parts = [part for found in folds if (part := found[name].predictions) is not None]
            shares = np.concatenate([part.probabilities for part in parts])
            ranks = [part.ranking for part in parts if part.ranking is not None]
            ranking = np.concatenate(ranks) if ranks else None
            tested = predictions_of(labels.take(rows), shares, self.task)
            groups = tested.groups if labels.patients else np.asarray(labels.slide_ids)[rows]
            predicted[name] = replace(tested, groups=groups, folds=fold_of_row, ranking=ranking)
        return self._scores(rows, predicted, None)

    def _scores(
        self, rows: npt.NDArray[np.int64], predicted: dict[str, Predictions], how: Calibration | None
    ) -> dict[str, Scores]:
        """The scores of all models on the same slides; the first, which is decided on by `how`, with its leads."""
        labels, training, task = self.labels.take(rows), self.settings.training, self.task
        scored = partial(score_slides, labels, task=task, replicates=training.replicates, seed=training.seed)
        name, main = next(iter(predicted.items()))
        others = {each: found for each, found in predicted.items() if each != name}
        scores = {name: scored(main, how=how, against=others)}
        return scores | {each: scored(found, how=None, sites=False) for each, found in others.items()}

    def _check_files(self) -> None:
        """Read every bag once before anything is written, each process its share, so that a bad file stops no run in
        its first epoch. Bags that stay in memory cost nothing more; a run that goes on has done it."""
        if self.processes.gather((self.out / RUN).is_file())[0]:
            return
        started, wrong = time.perf_counter(), ""
        mine = range(self.processes.rank, len(self.bags.files), self.processes.world)
        try:
            bags = read_ahead(self.bags.__getitem__, mine, threads=self.settings.training.workers)
            for number, _ in enumerate(bags, start=1):
                self.check_stop()
                self.watch.step("feature files read", number, len(mine))
        except FeatureFileError as error:
            wrong = str(error)
        if found := next(filter(None, self.processes.gather(wrong)), ""):
            raise FeatureFileError(found)
        size = sum(fact.tiles * fact.width for fact in self.cohort.facts) * 4
        seconds = time.perf_counter() - started
        self.watch.line(f"files: {len(self.bags.files):,} read and checked, {size / 1e9:.2f} GB in {seconds:.1f} s")

    def _record(self) -> str:
        """Write what the run is, and return the digest of its folds."""
        folds, seed = self.cohort.folds, self.settings.training.seed
        how: dict[str, Any] = {"splits": "files" if self.inputs.splits else "drawn", "seed": seed}
        if sites := {f"fold_{fold.number}": fold.site for fold in folds if fold.site}:
            how["site_of_fold"] = sites
        split = keep_manifest(self.out, folds, self.labels, how)
        groups = ("join", "split", "model", "training")
        facts = {
            "identity": self.identity,
            "options": {name: to_dict(getattr(self.settings, name)) for name in groups},
            "split": split,
            "notes": self.cohort.notes,
            "weights": self.weights,
            "device": str(self.processes.device),
            "versions": versions(),
        }
        write_json_atomic(self.out / RUN, facts)
        return split

    def _plan(self) -> Plan:
        settings = self.settings
        model: Any = self._model(settings.model, self.inputs.pretrained, fold=0)
        plan_of = partial(
            make_plan,
            model,
            input_dim=self.width,
            tiles=[fact.tiles for fact in self.cohort.facts],
            max_tiles=self.task.max_tiles,
            folds=self.cohort.folds,
            options=settings.training,
            precision=self.precision,
            processes=self.processes,
            cached=settings.model.adapt == "head" and settings.model.head == "linear",
        )
        plan = plan_of()
        encoder = getattr(getattr(model, "slide_encoder", None), "encoder", None)
        if not plan.too_large or encoder is None or encoder.checkpoint_activations:
            return plan
        encoder.checkpoint_activations = self.checkpointed = True
        way = (
            f"the largest slide would take {in_bytes(plan.memory)}: activations are computed again in the backward "
            "pass (--checkpoint-activations)"
        )
        plan = plan_of()
        return replace(plan, advice=(way, *plan.advice))

    def _model(self, options: ModelOptions, pretrained: str, *, fold: int) -> Any:
        torch.manual_seed(self.settings.training.seed * 1000 + fold)
        model = build_head(options, self.task, pretrained=pretrained, input_dim=self.width)
        if self.checkpointed and hasattr(model, "slide_encoder"):
            model.slide_encoder.set_grad_checkpointing()
        if options.adapt in ("lora", "last"):
            adapt(model.slide_encoder, options)
        return model.to(self.processes.device)

    def _fold(self, fold: Fold, split: str) -> dict[str, Scores]:
        """Train and evaluate everything on a fold; what an earlier run finished is not done again."""
        folder = self.out / f"fold_{fold.number}"
        options, recipe = self.settings.model, self.settings.training
        main = (FROZEN if options.adapt == "head" else TUNED) if self.weights else RANDOM
        fitted = {main: self._fit(main, options, self.inputs.pretrained, recipe, fold, folder, split)}
        if self.settings.controls:
            itself = "" if self.weights else " (the model itself is trained from random weights)"
            self.watch.line(f"fold {fold.number}: controls{itself}")
            place = folder / "controls"
            rows = (fold.train.tolist(), fold.test.tolist())
            train, test = (tile_means(self.bags, each, workers=recipe.workers) for each in rows)
            fitted[MEAN] = self._linear(train, test, fold)  # convex: it takes seconds and needs no checkpoint
            self._write(fold, place / "tile_mean", {MEAN: fitted[MEAN]}, {})
            bare = replace(options, head="abmil-tiles", adapt="full")
            for_bags = abmil_options(recipe, self.processes.world)
            others = {ATTENTION: (bare, "", for_bags, "abmil_tiles")}
            if self.weights:
                others[RANDOM] = (options, "", recipe, "random_weights")
            for name, (model, weights, how, where) in others.items():
                fitted[name] = self._fit(name, model, weights, how, fold, place / where, split)
                self._write(fold, place / where, {name: fitted[name]}, {})
        return self._write(fold, folder, fitted, self._site_alone(fold))

    def _site_alone(self, fold: Fold) -> dict[str, Predictions]:
        """What a predictor says that knows the site of a slide only; none without sites."""
        labels, task = self.labels, self.task
        if labels.sites is None:
            return {}
        train = fold.train
        sites = np.full(len(labels), "") if fold.site else np.asarray(labels.sites)  # a new site tells nothing
        if not task.of_classes:
            flags = (sites[:, None] == np.unique(sites[train])).astype(np.float64)
            said = self._linear(flags[train], flags[fold.test], fold)
            return {SITE_ALONE: self._predictions(fold, said.shares, said.scale)}
        known = site_probabilities(labels.truth[train], sites[train], sites, len(task.classes))
        return {SITE_ALONE: self._predictions(fold, known[fold.test], self._scale(fold, lambda: known[train]))}

    def _scale(self, fold: Fold, of_train: Callable[[], FloatArray]) -> FloatArray | None:
        """A model's own scale (C, 2) by its probabilities of the training slides, which are asked for where the models
        of several folds are to be ranked together by them."""
        if len(self.cohort.folds) == 1:
            return None
        truth = self.labels.truth[fold.train]
        return scale_of(of_train() if self.task.of_classes else truth, truth)

    def _predictions(self, fold: Fold, shares: FloatArray, scale: FloatArray | None) -> Predictions:
        task = self.task
        found = predictions_of(self.labels.take(fold.test), shares, task)
        if scale is None:
            return found
        ranking = rank_by(shares, scale, multi_label=task.multi_label, of_classes=task.of_classes)
        return replace(found, ranking=ranking)

    def _write(
        self, fold: Fold, folder: Path, fitted: dict[str, "_Fitted"], alone: dict[str, Predictions]
    ) -> dict[str, Scores]:
        """Score models on a fold's test slides, and write the first one's files with the scores of all."""
        task, labels = self.task, self.labels.take(fold.test)
        name, main = next(iter(fitted.items()))
        predicted = {each: self._predictions(fold, found.shares, found.scale) for each, found in fitted.items()}
        scores = self._scores(fold.test, predicted | alone, main.how)
        if self.first:
            what = f"fold {fold.number}, {name}"
            pictures, series = pictures_of(scores[name], task, what), _series(main.history)
            curves = None
            if series:
                losses = {"training, while it goes on": "train_loss", "validation, after the epoch": "val_loss"}
                shown = {line: _columns(series[key]) for line, key in losses.items() if key in series}
                unit = "" if task.setting == "regression" else " (nats)"
                panels = {f"mean loss of a slide{unit}": shown}
                curves = Curves(f"Learning curve: {task.name}, {what}", "epoch", panels)
                pictures["curves.png"] = partial(draw_curves, curves)
            details = {**main.facts, "history": [vars(entry) for entry in main.history]}
            if main.scale is not None:
                details["scale"] = main.scale.tolist()
            results = Results(
                FOLD,
                task.described(),
                scores,
                curves=None if curves is None else curves.to_dict(),
                details=details | groups_of(scores[name], task),
                notes=scores[name].notes,
            )
            texts = {"predictions.csv": slides_csv(labels, main.shares, task, main.how)}
            write_results(folder, results, texts=texts, pictures=pictures, events={"": series} if series else None)
        self.processes.gather(None)
        return scores

    def _fit(
        self,
        name: str,
        options: ModelOptions,
        pretrained: str,
        recipe: TrainingOptions,
        fold: Fold,
        folder: Path,
        split: str,
    ) -> "_Fitted":
        """Train a model on a fold, and predict its test set."""
        task, truth, processes = self.task, self.labels.truth, self.processes
        model: Any = self._model(options, pretrained, fold=fold.number)
        targets = target_scale(task, truth[fold.train])
        given = (task, self.bags, truth, recipe, self.precision, processes, targets)
        trainer = Trainer(*given, check_stop=self.check_stop, watch=self.watch)
        trained = model
        if options.adapt == "head" and options.head == "linear":
            trained, trainer = self._on_states(model, trainer, fold, cache=bool(pretrained))
        training = {key: value for key, value in to_dict(recipe).items() if key not in NO_CHANGE}
        tag = {"split": split, "fold": fold.number, "model": to_dict(options), "training": training}
        tag["random"] = pretrained == ""
        trained.to(processes.device)
        history = trainer.train(trained, fold, folder, json.loads(json.dumps(tag)))
        if options.adapt == "lora":  # what is scored is what is saved
            merge(trained)
        how = default_calibration(task)
        if recipe.calibrate:
            how = fit_calibration(trainer.logits(trained, fold.val), truth[fold.val], task)
        if not task.of_classes:
            how = fit_scale(task, targets, trainer.logits(trained, fold.train), truth[fold.train])
        shares = outputs(trainer.logits(trained, fold.test), task, how)
        scale = self._scale(fold, lambda: outputs(trainer.logits(trained, fold.train), task, how))
        if self.first:
            if trained is not model:
                model.classifier.load_state_dict(trained.classifier.state_dict())
            made = self.cohort.facts[0].made
            save_head(folder, FittedHead(model, task, options, self.width, made, how, self.precision))
            if pretrained and options.adapt != "head":
                model.slide_encoder.save_pretrained(folder / ENCODER)
        chosen = "the last epoch" if recipe.select == "last" else "the epoch of least validation loss"
        facts = {
            "chosen": {"what": chosen, "calibration": how.fitted_on},
            "weights": self.weights if pretrained else {},
        }
        return _Fitted(shares, scale, how, history, facts)

    def _on_states(self, model: Any, trainer: Trainer, fold: Fold, *, cache: bool) -> tuple[nn.Module, Trainer]:
        """The classifier alone, on the frozen encoder's states, which are computed once for all folds."""
        held = self.cached if cache else {}
        wanted = [int(row) for rows in fold.sets().values() for row in rows]
        lacking = [row for row in wanted if row not in held]
        bags = read_ahead(self.bags.__getitem__, lacking, threads=self.settings.training.workers)
        held.update(cache_states(model, lacking, bags, self.processes.device))
        vectors = np.zeros((len(self.labels), model.feat_dim), np.float32)
        vectors[list(held)] = np.stack(list(held.values()))
        alone = VectorHead(model.feat_dim, self.task.outputs, grades=self.task.setting == "ordinal")
        alone.classifier.load_state_dict(model.classifier.state_dict())
        return alone, replace(trainer, bags=vector_bags(vectors))

    def _linear(self, train: FloatArray, test: FloatArray, fold: Fold) -> "_Fitted":
        """A penalised linear model of the training slides' vectors, applied to those of the test slides."""
        task, truth = self.task, self.labels.truth[fold.train]
        targets = target_scale(task, truth)
        grades = CumulativeLogits() if task.setting == "ordinal" else nn.Identity()
        fitted = fit_linear(train, task.outputs, lambda logits: task_loss(grades(logits), truth, task, targets))
        layer = nn.Sequential(fitted, grades)
        with torch.no_grad():
            of_train, of_test = (layer(torch.from_numpy(vectors)).numpy() for vectors in (train, test))
        how = default_calibration(task) if task.of_classes else fit_scale(task, targets, of_train, truth)
        scale = self._scale(fold, lambda: outputs(of_train, task, how))
        return _Fitted(outputs(of_test, task, how), scale, how, [], {})


@dataclass(frozen=True)
class _Fitted:
    """A model on a fold: its probabilities for the test slides (S, C), its own scale (C, 2) among those of several
    folds, how it is decided on, its training, facts."""

    shares: FloatArray
    scale: FloatArray | None
    how: Calibration
    history: list[Epoch]
    facts: dict[str, Any]


def _series(history: list[Epoch]) -> dict[str, list[tuple[int, float]]]:
    """What each epoch gave, by name; what none has is left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in vars(entry).items():
            if name != "epoch" and value is not None:
                found.setdefault(name, []).append((entry.epoch, value))
    return found


def _columns(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
