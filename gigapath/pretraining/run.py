"""A whole pretraining: slides found, a plan, epochs of steps, and after each epoch weights, measures and pictures."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gigapath.cohort.record import versions
from gigapath.cohort.stage import Ownership
from gigapath.devices import at_most_threads, computing, deterministic
from gigapath.evaluation.plots import plotting_available
from gigapath.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from gigapath.finetune.data import KEPT_BYTES, Bag, FileBags, check_folder
from gigapath.finetune.loop import (
    Loop,
    Processes,
    Step,
    check_same_run,
    join_processes,
    resume_training,
    save_training,
    set_rates,
    start_of,
    training_precision,
)
from gigapath.finetune.plan import Plan, foresee, made_bag, measure_cost
from gigapath.machine import available_cores
from gigapath.options import to_dict
from gigapath.pretraining import measures
from gigapath.pretraining.data import Slides, Target, View, Viewer, find_slides, fit_target, open_bags, pack_views
from gigapath.pretraining.measures import Epoch
from gigapath.pretraining.model import Batch, build_autoencoder, loss_of_slides
from gigapath.pretraining.options import CohortOptions, PretrainingOptions, SizeOptions, TaskOptions
from gigapath.progress import Progress, Stopped
from gigapath.read_ahead import read_ahead
from gigapath.slide_encoder import WEIGHTS_FILE
from gigapath.tables import csv_text
from gigapath.text import in_bytes

IntArray = npt.NDArray[np.int64]

RUN, CARD = "pretrain.json", "model_card.md"
MEASURED = 200  # validation slides that are measured after each epoch
PROCESS_BYTES = 130_000_000  # by which runs on a CPU exceeded what is counted here, at 1,000 to 16,000 tiles alike
COMPARED = 50  # slides on which predictors without learning are measured, and as many that they are fitted on
REDRAW_SECONDS = 60.0  # between pictures of epochs: an epoch of a small cohort takes less than its pictures
LEAST_RANK, LEAST_SPREAD = 1.5, 0.005  # of slide vectors; below it they are all alike
GAIN = 0.02  # of R2 over the slide mean's; with less nothing of the arrangement is learned yet
PLATEAU_STEPS = 300  # that the loss may stay at the slide mean from a new start
# What may differ between a run and the one that goes on with it: it changes no number that is stored.
_FREE = ("workers", "device", "deterministic", "allow_low_memory", "save_steps")


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

    The arguments are those of `gigapath.pretrain`, with options in groups. `watch` receives the news; `check_stop` is
    called between steps, and raises to end the run, which can go on later.

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
    watch = watch if watch is not None and processes.rank == 0 else Progress()
    run = _Run(slides, init, cohort, sizes, task, training, out, processes, watch, check_stop)
    with at_most_threads(available_cores()), deterministic(training.deterministic):
        run.prepare()
        if dry_run:
            return None
        with Ownership({out: run.identity} if run.first else {}):
            return run()


def steps_of(
    slides: Slides, training: PretrainingOptions, processes: Processes, epoch: int, *, shard: bool
) -> list[Step]:
    """The steps of an epoch (counted from 0; each has an order of its own), with what this process passes in each;
    every slide of training comes once. With `shard` each process keeps to its own slides in every epoch."""
    train, size, world = slides.train, training.batch_size, processes.world
    window = size * training.gradient_accumulation
    if shard:
        own = np.random.default_rng([training.seed, 3]).permutation(train)
        seeds = ([training.seed, 1, epoch, rank] for rank in range(world))
        orders = [np.random.default_rng(seed).permutation(own[rank::world]) for rank, seed in enumerate(seeds)]
        cuts = range(0, max(map(len, orders)), window)
        steps = [[_chunks(order[cut : cut + window], size) for order in orders] for cut in cuts]
    else:
        order = np.random.default_rng([training.seed, 1, epoch]).permutation(train)
        ends = np.arange(window * world, len(order), window * world)
        if training.tokens_per_step is not None:
            tiles = np.cumsum([slides.facts[row].tiles for row in order])
            ends = np.flatnonzero(np.diff((tiles - 1) // training.tokens_per_step)) + 1
        steps = [[_chunks(part, size)[rank::world] for rank in range(world)] for part in np.split(order, ends)]
    found, behind = [], 0
    for shares in steps:
        count = sum(len(chunk) for share in shares for chunk in share)
        found.append(Step(shares[processes.rank], count, epoch + behind / len(train)))
        behind += count
    return found


def _chunks(rows: IntArray, size: int) -> list[IntArray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass
class _Run:
    """A run, from the last checkpoint in `out` if there is one: the epochs so far, the start first, the steps of the
    next that are done, and their loss summed over this process's slides."""

    slides: Slides
    init: str
    cohort: CohortOptions
    sizes: SizeOptions
    task: TaskOptions
    training: PretrainingOptions
    out: Path
    processes: Processes
    watch: Progress
    check_stop: Callable[[], None]
    history: list[Epoch] = field(default_factory=list)
    done: int = 0
    loss: float = 0.0
    drawn: float = float("-inf")  # when pictures were

    def prepare(self) -> None:
        """Build the model, and tell the plan; ValueError where the run can't be."""
        self.first, self.device = self.processes.rank == 0, self.processes.device
        self.precision = training_precision(self.training.precision, self.device)
        self.start, self.viewer = start_of(self.init), Viewer(self.task, self.training.seed)
        if self.first:
            check_same_run(self.out / RUN, self.identity)
        for note in self.slides.notes:
            self.watch.line(f"note: {note}")
        torch.manual_seed(self.training.seed)
        self.model = build_autoencoder(self.init, self.sizes, in_chans=self.slides.facts[0].width).to(self.device)
        self._plan().tell(self.watch, self.processes, allow_low_memory=self.training.allow_low_memory)

    def __call__(self) -> Pretrained:
        """Train, or go on."""
        slides, seed, workers = self.slides, self.training.seed, self.training.workers
        self.bags = open_bags(slides, self.cohort, self.out, self.processes, workers, self.check_stop)
        self.target = fit_target(self.task.target, self.bags, slides.train, seed=seed, workers=workers)
        self.val: list[int] = np.random.default_rng([seed, 7]).permutation(slides.val)[:MEASURED].tolist()
        baselines = self.processes.gather(self._without_learning() if self.first else {})[0]
        for name, value in baselines.items():
            self.watch.line(f"R2 without learning, {name}: {value:.3f}")
        facts = self._facts(baselines)
        if self.first:
            write_text_atomic(self.out / "slides.csv", csv_text(slides.table()))
            write_json_atomic(self.out / RUN, facts)
        self._train()
        warnings = warnings_of(self.history[-1], len(self.val), baselines.get(measures.MEAN, 0.0))
        for warning in warnings:
            self.watch.line(f"warning: {warning}")
        if self.first:
            write_text_atomic(self.out / CARD, measures.model_card(facts, self.history, warnings))
        return Pretrained(self.out, self.history, baselines, warnings)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "slides": self.slides.digest,
            "weights": self.start.get("sha256", ""),
            "cohort": {name: getattr(self.cohort, name) for name in ("shard", "tile_size_level0", "cache")},
            "sizes": to_dict(self.sizes),
            "task": to_dict(self.task),
            "training": {key: value for key, value in to_dict(self.training).items() if key not in _FREE},
            "precision": self.precision,
            "processes": self.processes.world,
        }

    def _facts(self, baselines: Mapping[str, float]) -> dict[str, Any]:
        """What the run is, for JSON."""
        return {
            "identity": self.identity,
            "options": {name: to_dict(getattr(self, name)) for name in ("cohort", "sizes", "task", "training")},
            "init": self.start,
            "embeddings": self.slides.facts[0].made,
            "sets": self.slides.counts(),
            "r2_without_learning": dict(baselines),
            "notes": list(self.slides.notes),
            "device": str(self.device),
            "versions": versions(),
        }

    def _plan(self) -> Plan:
        slides, training, model, ratio = self.slides, self.training, self.model, self.task.mask_ratio
        counts, width = np.array([fact.tiles for fact in slides.facts]), slides.facts[0].width
        train, tile, device, patients = counts[slides.train], 4 * width, self.device, len(set(slides.patients))
        epoch = sum(3 * model.operations(max(2, round(n * self.task.crop**2)), ratio) for n in train.tolist())
        size = int(train.sum()) * tile
        in_epoch = len(steps_of(slides, training, self.processes, 0, shard=self.cohort.shard))
        advice, largest = [], self._largest_pass()
        if in_epoch * training.epochs < 2 * PLATEAU_STEPS and not self.init:
            advice.append(
                f"note: {in_epoch * training.epochs:,} steps in all; from new weights the loss stays at the slide mean "
                f"for about {PLATEAU_STEPS}. Set more --epochs or a smaller --batch-size."
            )
        further = {"none": ["--checkpoint-activations decoder"], "decoder": ["--checkpoint-activations all"]}
        smaller = ["a smaller --batch-size"] if training.batch_size > 1 else []
        plain = Target(np.zeros(width, np.float32), np.ones(width, np.float32), np.zeros(width, np.float32))

        def made(tiles: int) -> Tensor:
            return self._loss_of(model, pack_views([self.viewer.view(made_bag(tiles, width), "made", None)], plain))

        exact = training.deterministic
        cost = measure_cost(made, lambda n: 3 * model.operations(n, ratio), model, device, deterministic=exact)
        # Where the device has no memory of its own, what is read lies there too: batches ahead, in hand, being made.
        kept = min(KEPT_BYTES, size) if self.cohort.cache == "none" else 0
        beside = PROCESS_BYTES + largest * (training.workers + 2) * tile + kept
        to_read = in_bytes(size // 2 if self.cohort.cache == "fp16" else size)
        about = [
            f"slides: {len(train):,} to train on, {len(slides.val):,} to validate on, of {patients:,} patients",
            f"tiles: {counts.sum():,} (median {int(np.median(counts)):,} a slide, largest {counts.max():,})",
            f"an epoch: {epoch:.2g} operations, {to_read} to read, {in_epoch:,} steps",
        ]
        return foresee(
            model,
            cost,
            self.processes,
            about,
            tiles=largest,
            passes=training.epochs * -(-len(train) // training.batch_size),
            operations=training.epochs * epoch,
            ways=[*further.get(self.sizes.checkpoint_activations, []), *smaller],
            beside=beside if device.type == "cpu" else 0,
            advice=advice,
            largest="pass",
        )

    def _largest_pass(self) -> int:
        """Tiles of the largest pass: what the largest slides will show of themselves, since the seed draws windows."""
        slides, size, epochs = self.slides, self.training.batch_size, range(self.training.epochs)
        rows = sorted(slides.train.tolist(), key=lambda row: -slides.facts[row].tiles)[:size]
        bags, shown = FileBags(slides.files, slides.facts, self.cohort.tile_size_level0), []
        for row in rows:
            bare = Bag(np.empty((slides.facts[row].tiles, 0), np.float32), bags._read(row).coords)
            shown.append(max(len(self.viewer.view(bare, slides.ids[row], epoch).cells) for epoch in epochs))
        return sum(shown)

    def _train(self) -> None:
        """All epochs that are left; the model ends as it is after the last."""
        options, rank = self.training, self.processes.rank
        groups = self.model.parameter_groups(options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.base_lr, betas=(0.9, options.beta2))
        self.loop = Loop(self.processes, self.precision, options.workers, self.check_stop)
        self.scaler = self.loop.scaler()
        self.tag = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        given = (self.out, self.model, self.optimizer, self.scaler)
        self.history, _, self.done, self.loss = resume_training(*given, tag=self.tag, epoch_of=Epoch, rank=rank)
        if self.history:
            self.watch.line(f"goes on after epoch {len(self.history) - 1} and {self.done} steps of the next")
        else:
            self.history.append(self._measured(Epoch(0, 0)))
        self._publish()  # also what a run that was killed between the two had only saved
        try:
            while len(self.history) <= options.epochs:
                self.history.append(self._measured(self._epoch()))
                self.done, self.loss = 0, 0.0
                self._save()
                self._publish()
        except Stopped:
            if self.processes.world == 1:  # several may have heard of it between different steps
                self._save()
            raise

    def _epoch(self) -> Epoch:
        """Train for the next epoch, or the rest of it; its measures are still to be taken."""
        number, options = len(self.history), self.training
        steps = steps_of(self.slides, options, self.processes, number - 1, shard=self.cohort.shard)
        set_rate = partial(set_rates, self.optimizer, options.base_lr, options)
        self.model.train()
        taken = self.loop.run(
            self.model,
            self.optimizer,
            self.scaler,
            steps[self.done :],
            what=f"epoch {number}",
            read=self._read,
            loss_of=self._loss_of,
            set_rate=set_rate,
            clip=options.clip,
            before=self._before,
            after=partial(self._after, len(steps)),
        )
        return Epoch(
            number,
            self.history[-1].steps + len(steps),
            sum(self.processes.gather(self.loss)) / len(self.slides.train),
            learning_rate=set_rate(steps[-1].epochs_done),
            seconds=taken.seconds,
            waiting=taken.waited / max(taken.seconds, 1e-9),
        )

    def _read(self, rows: IntArray) -> Batch:
        epoch = len(self.history) - 1
        views = [self.viewer.view(self.bags[int(row)], self.slides.ids[row], epoch) for row in rows]
        batch = pack_views(views, self.target)
        return batch.pinned() if self.device.type == "cuda" else batch

    def _loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        there = batch.to(self.device)
        with computing(self.precision, self.device):
            predicted = model(there)
        return loss_of_slides(predicted, there, self.task.loss).sum()

    def _before(self, number: int) -> None:
        # Nothing random is carried from one step to the next: a run that goes on draws what an unbroken one draws. Each
        # process has its own dropout.
        seeds = np.random.SeedSequence((self.training.seed, self.history[-1].steps + self.done, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]) >> 1)

    def _after(self, steps: int, number: int, loss: float) -> None:
        self.done, self.loss = self.done + 1, self.loss + loss
        self.watch.step(f"epoch {len(self.history)}: steps", self.done, steps)
        if self.done % self.training.save_steps == 0:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint of this moment; all processes call it."""
        losses = self.processes.gather(self.loss)
        if self.first:
            number = self.history[-1].steps + self.done
            facts: dict[str, Any] = {"tag": self.tag, "history": self.history, "done": self.done, "losses": losses}
            save_training(self.out, number, self.model, self.optimizer, self.scaler, **facts)

    def _whole_view(self, row: int) -> View:
        return self.viewer.view(self.bags[row], self.slides.ids[row], None)

    def _without_learning(self) -> dict[str, float]:
        """R2 of predictors without learning on some validation slides."""
        if not self.val:
            return {}
        some = np.random.default_rng([self.training.seed, 8]).permutation(self.slides.train)[:COMPARED].tolist()
        views = [self._whole_view(row) for row in self.val[:COMPARED]]
        return measures.without_learning(views, self.target, [self._whole_view(row) for row in some])

    def _measured(self, entry: Epoch) -> Epoch:
        """The epoch with its measures on the validation slides, each process taking its share; it is told."""
        if self.val:
            processes, device, model = self.processes, self.device, self.model.eval()
            sums, losses, vectors = np.zeros(2), [], []
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
                    sums = sums + measures.squares(truth, said, self.target.centre)
            parts = processes.gather((sums, losses, vectors))
            loss = sum(loss for part in parts for loss in part[1]) / len(self.val)
            spread, rank = measures.spread_and_rank(np.stack([vector for part in parts for vector in part[2]]))
            r2 = measures.explained(sum(part[0] for part in parts))
            entry = replace(entry, val_loss=loss, r2=r2, spread=spread, rank=rank)
        self.watch.line(entry.describe(self.training.epochs))
        return entry

    def _publish(self) -> None:
        """Write the weights and the curves of the last epoch, and now and then, and at the end, its pictures."""
        if not self.first:
            return
        if self.history[-1].epoch:
            self.model.slide_encoder.save_pretrained(self.out)
        due = time.monotonic() >= self.drawn + REDRAW_SECONDS or len(self.history) > self.training.epochs
        draw = due and plotting_available()
        measures.write_curves(self.out, self.history, draw=draw)
        if draw:
            self.drawn = time.monotonic()
            if rows := self.val[:3]:
                views, names = [self._whole_view(row) for row in rows], [self.slides.ids[row] for row in rows]
                picture = measures.draw_reconstructions(self.model, views, self.target, names)
                write_bytes_atomic(self.out / "reconstructions.png", picture)


def warnings_of(last: Epoch, measured: int, slide_mean: float) -> list[str]:
    """What is wrong with a training, by its last epoch on so many validation slides, and the R2 of the slide mean."""
    if last.r2 is None or last.rank is None or last.spread is None:
        return []
    found = []
    if measured >= 8 and (last.rank < LEAST_RANK or last.spread < LEAST_SPREAD):
        found.append(
            f"the embeddings of the validation slides have collapsed: effective rank {last.rank:.1f}, spread "
            f"{last.spread:.4f} of their size. Lower --base-lr, or raise --mask-ratio."
        )
    if last.r2 < slide_mean + GAIN:
        found.append(
            f"hidden tiles are predicted no better (R2 {last.r2:.3f}) than by the mean of the visible ones "
            f"({slide_mean:.3f}): nothing of the arrangement is learned. Train for more steps, raise --base-lr, or "
            "lower --shift."
        )
    return found
