"""A whole pretraining: slides found, a plan, epochs of steps, and after each epoch weights, measures and pictures."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigapath.cohort.record import versions
from gigapath.cohort.stage import Ownership
from gigapath.devices import at_most_threads, computing
from gigapath.evaluation.plots import plotting_available
from gigapath.files import read_json, write_bytes_atomic, write_json_atomic, write_text_atomic
from gigapath.finetune import checkpoints
from gigapath.finetune.data import KEPT_BYTES, check_folder
from gigapath.finetune.plan import ADAM_BYTES, free_bytes, made_bag, measure_cost
from gigapath.finetune.processes import Processes, join_processes, training_precision
from gigapath.machine import available_cores
from gigapath.options import to_dict
from gigapath.pretraining.data import Slides, Target, View, Viewer, find_slides, fit_target, open_bags, pack_views
from gigapath.pretraining.measures import MEAN, Explained, spread_and_rank, without_learning
from gigapath.pretraining.model import MaskedAutoencoder, build_autoencoder, loss_of_slides
from gigapath.pretraining.options import CohortOptions, PretrainingOptions, SizeOptions, TaskOptions
from gigapath.pretraining.outputs import Epoch, draw_reconstructions, model_card, write_curves
from gigapath.pretraining.training import Training, steps_of
from gigapath.progress import Progress, Stopped
from gigapath.read_ahead import read_ahead
from gigapath.slide_encoder import WEIGHTS_FILE
from gigapath.tables import csv_text
from gigapath.text import in_bytes, in_words

RUN, CARD = "pretrain.json", "model_card.md"
MEASURED = 200  # validation slides that are measured after each epoch
COMPARED = 50  # slides on which predictors without learning are measured, and as many that they are fitted on
LEAST_RANK, LEAST_SPREAD = 1.5, 0.005  # of slide vectors; below it they are all alike
GAIN = 0.02  # of R2 over the slide mean's; with less nothing of the arrangement is learned yet
PLATEAU_STEPS = 300  # that the loss may stay at the slide mean from a new start
# What may differ between a run and the one that goes on with it: it changes no number that is stored.
_FREE = ("workers", "device", "allow_low_memory", "save_steps")


@dataclass(frozen=True)
class Pretrained:
    """What a pretraining gave: its folder, the epochs (the first is the start), R2 without learning by name."""

    out: Path
    epochs: list[Epoch]
    without_learning: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Path:
        """The slide encoder, for `create_model`, `--slide-encoder` and `finetune --pretrained`."""
        return self.out / WEIGHTS_FILE


def pretrain(
    features: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    init: str = "",
    cohort: CohortOptions | None = None,
    sizes: SizeOptions | None = None,
    task: TaskOptions | None = None,
    training: PretrainingOptions | None = None,
    dry_run: bool = False,
    watch: Progress | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Pretrained | None:
    """Pretrain a slide encoder by predicting hidden tiles, or go on with the run that `out` holds.

    It follows what is public of the published pretraining and is no reproduction of it.

    Args:
        features: files of tile embeddings, ours or another tool's, or folders of them.
        out: the output folder.
        init: weights to go on from: "hf_hub:REPO", a checkpoint's file, or "" for new ones.
        cohort: which slides; who validates.
        sizes: of encoder and decoder.
        task: what is hidden and predicted.
        training: the recipe.
        dry_run: show the plan alone, and write nothing.
        watch: receives the news.
        check_stop: called between steps; raises to end the run, which can go on later.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with what was given, in one sentence, before anything is
            trained; a loss that is not finite.
    """
    cohort, sizes = cohort or CohortOptions(), sizes or SizeOptions()
    task, training = task or TaskOptions(), training or PretrainingOptions()
    if cohort.shard and training.tokens_per_step:
        raise ValueError("--shard, --tokens-per-step: expected one of the two, got both.")
    out = Path(out)
    check_folder(out)
    given = [features] if isinstance(features, str | Path) else features
    slides = find_slides([str(path) for path in given], cohort, seed=training.seed, workers=training.workers)
    processes = join_processes(training.device)
    precision = training_precision(training.precision, processes.device)
    first = processes.rank == 0
    watch = watch if watch is not None and first else Progress()
    run = _Run(slides, init, cohort, sizes, task, training, out, processes, precision, watch, check_stop)
    with at_most_threads(available_cores()):
        model = run.prepare()
        if dry_run:
            return None
        with Ownership({out: run.identity} if first else {}):
            return run(model)


@dataclass
class _Run:
    slides: Slides
    init: str
    cohort: CohortOptions
    sizes: SizeOptions
    task: TaskOptions
    training: PretrainingOptions
    out: Path
    processes: Processes
    precision: str
    watch: Progress
    check_stop: Callable[[], None]

    def prepare(self) -> MaskedAutoencoder:
        """The model at its start, and the plan told; ValueError where the run can't be."""
        self.first = self.processes.rank == 0
        if self.first:
            checkpoints.check_same_run(self.out / RUN, self.identity)
        for note in self.slides.notes:
            self.watch.line(f"note: {note}")
        torch.manual_seed(self.training.seed)
        model = build_autoencoder(self.init, self.sizes, in_chans=self.slides.facts[0].width)
        model.to(self.processes.device)
        self.viewer = Viewer(self.task, self.training.seed)
        too_large = next(filter(None, self.processes.gather(self._plan(model))), "")
        if too_large and not self.training.allow_low_memory:
            raise ValueError(f"{too_large}, or go on with --allow-low-memory.")
        return model

    def __call__(self, model: MaskedAutoencoder) -> Pretrained:
        """Train, or go on."""
        workers = self.training.workers
        self.bags = open_bags(self.slides, self.cohort, self.out, self.processes, workers, self.check_stop)
        self.target = fit_target(
            self.task.target, self.bags, self.slides.train, seed=self.training.seed, workers=workers
        )
        val = np.random.default_rng([self.training.seed, 7]).permutation(self.slides.val)
        self.val: list[int] = val[:MEASURED].tolist()
        baselines = self.processes.gather(self._without_learning() if self.first else {})[0]
        for name, value in baselines.items():
            self.watch.line(f"R2 without learning, {name}: {value:.3f}")
        if self.first:
            self._record(baselines)
        history = self._train(model)
        warnings = self._warnings(history, baselines)
        for warning in warnings:
            self.watch.line(f"warning: {warning}")
        if self.first:
            card = model_card(read_json(self.out / RUN, keys=(), mend=checkpoints.MEND), history, warnings)
            write_text_atomic(self.out / CARD, card)
        return Pretrained(self.out, history, baselines, warnings)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "slides": self.slides.digest,
            "weights": self._weights.get("sha256", ""),
            "cohort": {name: getattr(self.cohort, name) for name in ("shard", "tile_size_level0", "cache")},
            "sizes": to_dict(self.sizes),
            "task": to_dict(self.task),
            "training": {key: value for key, value in to_dict(self.training).items() if key not in _FREE},
            "precision": self.precision,
            "processes": self.processes.world,
        }

    @cached_property
    def _weights(self) -> dict[str, str]:
        return checkpoints.start_of(self.init)

    def _record(self, baselines: Mapping[str, float]) -> None:
        """Write what the run is, and which slides it has."""
        slides, sets = self.slides, {"train": self.slides.train, "val": self.slides.val}
        groups = {"cohort": self.cohort, "sizes": self.sizes, "task": self.task, "training": self.training}
        counts = {
            name: {
                "slides": len(rows),
                "patients": len({slides.patients[row] for row in rows}),
                "tiles": sum(slides.facts[row].tiles for row in rows),
            }
            for name, rows in sets.items()
        }
        table: list[list[Any]] = [["slide_id", "patient_id", "set", "tiles"]]
        for name, rows in sets.items():
            table += [[slides.ids[row], slides.patients[row], name, slides.facts[row].tiles] for row in rows]
        write_text_atomic(self.out / "slides.csv", csv_text(table))
        facts = {
            "identity": self.identity,
            "options": {name: to_dict(group) for name, group in groups.items()},
            "init": self._weights,
            "embeddings": slides.facts[0].made,
            "sets": counts,
            "r2_without_learning": dict(baselines),
            "notes": list(slides.notes),
            "device": str(self.processes.device),
            "versions": versions(),
        }
        write_json_atomic(self.out / RUN, facts)

    def _plan(self, model: MaskedAutoencoder) -> str:
        """Say what the run will take; a sentence where the largest pass won't fit."""
        slides, training = self.slides, self.training
        counts = np.array([fact.tiles for fact in slides.facts])
        train = counts[slides.train]
        seen = np.maximum(2, np.rint(train * self.task.crop**2)).astype(int)
        cost = measure_cost(
            partial(self._made_pass, model),
            lambda n: 3 * model.operations(n, self.task.mask_ratio),
            model,
            self.processes.device,
        )
        epoch = sum(3 * model.operations(int(n), self.task.mask_ratio) for n in seen)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        largest = np.sort(train)[::-1][: training.batch_size].sum()
        memory = int(trained * ADAM_BYTES + cost.kept + cost.kept_per_tile * largest)
        free = free_bytes(self.processes.device)
        tile = 4 * slides.facts[0].width
        if self.processes.device.type == "cpu":  # else what is read lies beside the device's memory
            memory += int(largest * (training.workers + 2) * tile)  # batches read ahead, in hand, and being made
            memory += min(KEPT_BYTES, int(train.sum()) * tile) if self.cohort.cache == "none" else 0
        size = int(train.sum()) * (tile // 2 if self.cohort.cache == "fp16" else tile)
        in_epoch = len(steps_of(slides, training, self.processes, 0, shard=self.cohort.shard))
        steps = in_epoch * training.epochs
        passes = -(-len(train) // training.batch_size)
        hours = training.epochs * cost.seconds(passes, epoch) / self.processes.world
        for line in (
            f"slides: {len(slides.train):,} to train on, {len(slides.val):,} to validate on, of "
            f"{len(set(slides.patients)):,} patients",
            f"tiles: {counts.sum():,} (median {int(np.median(counts)):,} a slide, largest {counts.max():,})",
            f"parameters trained: {trained:,}; an epoch: {epoch:.2g} operations, {in_bytes(size)} to read, "
            f"{in_epoch:,} steps",
            f"memory: about {in_bytes(memory)} at the largest pass, {in_bytes(free)} are free",
            f"time: about {in_words(hours)} for {training.epochs} epochs at the rate measured now, processes: "
            f"{self.processes.world}",
        ):
            self.watch.line(line)
        if steps < 2 * PLATEAU_STEPS and not self.init:
            self.watch.line(
                f"note: {steps:,} steps in all; from new weights the loss stays at the slide mean for about "
                f"{PLATEAU_STEPS}. Set more --epochs or a smaller --batch-size."
            )
        if memory <= free:
            return ""
        further = {"none": ["--checkpoint-activations decoder"], "decoder": ["--checkpoint-activations all"]}
        ways = further.get(self.sizes.checkpoint_activations, [])
        ways += ["a smaller --batch-size"] if training.batch_size > 1 else []
        return (
            f"the largest pass won't fit: it takes {in_bytes(memory)}, {in_bytes(free)} are free. Set "
            f"{', or '.join(ways or ['--device to a larger one'])}"
        )

    def _made_pass(self, model: MaskedAutoencoder, tiles: int) -> Tensor:
        """The loss of a made slide of so many tiles."""
        width = self.slides.facts[0].width
        bag = made_bag(tiles, width)
        whole = Target(np.zeros(width, np.float32), np.ones(width, np.float32), np.zeros(width, np.float32))
        batch = pack_views([self.viewer.view(bag, "made", None)], whole).to(self.processes.device)
        with computing(self.precision, self.processes.device):
            predicted = model(batch)
        return loss_of_slides(predicted, batch, self.task.loss).sum()

    def _train(self, model: MaskedAutoencoder) -> list[Epoch]:
        tag = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        training = Training(
            model=model,
            slides=self.slides,
            bags=self.bags,
            viewer=self.viewer,
            target=self.target,
            options=self.training,
            shard=self.cohort.shard,
            precision=self.precision,
            processes=self.processes,
            folder=self.out,
            tag=tag,
            watch=self.watch,
            check_stop=self.check_stop,
        )
        history = training.history
        if history:
            self.watch.line(f"goes on after epoch {len(history) - 1} and {training.done} steps of the next")
        else:
            history.append(self._measured(model, Epoch(0, 0)))
            self._tell(history[-1])
        self._publish(model, history)  # also what a run that was killed between the two had only saved
        try:
            while len(history) <= self.training.epochs:
                entry = self._measured(model, training.epoch())
                self._tell(entry)
                training.close(entry)
                self._publish(model, history)
        except Stopped:
            if self.processes.world == 1:  # several may have heard of it between different steps
                training.save()
            raise
        return history

    def _whole_view(self, row: int) -> View:
        return self.viewer.view(self.bags[row], self.slides.ids[row], None)

    def _without_learning(self) -> dict[str, float]:
        """R2 of predictors without learning on some validation slides."""
        if not self.val:
            return {}
        some = np.random.default_rng([self.training.seed, 8]).permutation(self.slides.train)[:COMPARED].tolist()
        views = [self._whole_view(row) for row in self.val[:COMPARED]]
        return without_learning(views, self.target, [self._whole_view(row) for row in some])

    def _measured(self, model: MaskedAutoencoder, entry: Epoch) -> Epoch:
        """The epoch with its measures on the validation slides, each process taking its share."""
        if not self.val:
            return entry
        processes, device = self.processes, self.processes.device
        model.eval()
        explained, losses, vectors = Explained(), [], []
        mine = self.val[processes.rank :: processes.world]
        with torch.no_grad():
            for view in read_ahead(self._whole_view, mine, threads=self.training.workers):
                self.check_stop()
                batch = pack_views([view], self.target).to(device)
                features = torch.from_numpy(np.ascontiguousarray(view.features)).to(device)
                with computing(self.precision, device):
                    predicted = model(batch)
                    vector = model.slide_encoder(features[None], batch.coords[None])[0][0]
                vectors.append(vector.double().cpu().numpy())
                losses.append(float(loss_of_slides(predicted, batch, self.task.loss)))
                said, truth = predicted.double().cpu().numpy(), batch.target.double().cpu().numpy()
                if self.task.loss == "cosine":  # which leaves their length open: the best one for the slide
                    said = said * (said * truth).sum() / max(float(np.square(said).sum()), 1e-12)
                explained.add(truth, said, self.target.centre)
        parts = processes.gather((explained.left, explained.whole, losses, vectors))
        whole = Explained(sum(part[0] for part in parts), sum(part[1] for part in parts))
        every = [loss for part in parts for loss in part[2]]
        spread, rank = spread_and_rank(np.stack([vector for part in parts for vector in part[3]]))
        return replace(entry, val_loss=sum(every) / len(every), r2=whole.r2, spread=spread, rank=rank)

    def _warnings(self, history: Sequence[Epoch], baselines: Mapping[str, float]) -> list[str]:
        last, found = history[-1], []
        if last.r2 is None or last.rank is None or last.spread is None:
            return []
        if len(self.val) >= 8 and (last.rank < LEAST_RANK or last.spread < LEAST_SPREAD):
            found.append(
                f"the embeddings of the validation slides have collapsed: effective rank {last.rank:.1f}, spread "
                f"{last.spread:.4f} of their size. Lower --base-lr, or raise --mask-ratio."
            )
        if last.r2 < baselines[MEAN] + GAIN:
            found.append(
                f"hidden tiles are predicted no better (R2 {last.r2:.3f}) than by the mean of the visible ones "
                f"({baselines[MEAN]:.3f}): nothing of the arrangement is learned. Train for more steps, raise "
                "--base-lr, or lower --shift."
            )
        return found

    def _publish(self, model: MaskedAutoencoder, history: Sequence[Epoch]) -> None:
        """Write the weights, the curves and the pictures of the last epoch."""
        if not self.first:
            return
        if history[-1].epoch:
            model.slide_encoder.save_pretrained(self.out)
        write_curves(self.out, history)
        rows = self.val[:3]
        if rows and plotting_available():
            views = [self._whole_view(row) for row in rows]
            picture = draw_reconstructions(model, views, self.target, [self.slides.ids[row] for row in rows])
            write_bytes_atomic(self.out / "reconstructions.png", picture)

    def _tell(self, last: Epoch) -> None:
        r2 = "" if last.r2 is None else f", R2 of hidden validation tiles {last.r2:.3f}, effective rank {last.rank:.1f}"
        if last.epoch == 0:
            self.watch.line(f"start: nothing trained yet{r2}")
        else:
            waiting = f"{last.waiting:.1%} of the time waiting for files"
            self.watch.line(f"epoch {last.epoch}/{self.training.epochs}: loss {last.train_loss:.4f}{r2}, {waiting}")
