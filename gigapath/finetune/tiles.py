"""Fine-tuning a tile encoder on labelled tile images: adapters, its last blocks or all of it, from a linear probe on.

First a linear layer is fitted on the frozen encoder's embeddings: what the tuned encoder is compared with, and what its
head starts from, so that the first steps don't undo what the encoder knows (Kumar et al. 2022). One "slide" of the
recipe is one tile here. Legend: B tiles of a pass, S pixels of a tile's side as resized, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gigapath.cohort.stage import Ownership
from gigapath.devices import at_most_threads, computing
from gigapath.evaluation.calibration import probabilities
from gigapath.evaluation.labels import Task
from gigapath.evaluation.results import (
    TILE_TUNING,
    Results,
    confusion_picture,
    predictions_csv,
    score,
    score_lines,
    summary_csv,
    write_results,
)
from gigapath.evaluation.splits import Fold
from gigapath.finetune.data import Bag, check_folder
from gigapath.finetune.heads import OneRate, adapt, merge
from gigapath.finetune.loop import Processes, join_processes, training_precision
from gigapath.finetune.options import ModelOptions, TrainingOptions
from gigapath.finetune.plan import Plan, foresee, measure_cost
from gigapath.finetune.run import NO_CHANGE, TUNED, RunResult
from gigapath.finetune.training import Trainer
from gigapath.linear_probe import ProbeOptions
from gigapath.linear_probe.data import label_tiles, load_data, own_labels, rows_of_table
from gigapath.linear_probe.embed_tiles import TileSet, embed_tiles, open_tile_set
from gigapath.linear_probe.embeddings import TEST, TRAIN, VALIDATION, EmbeddingTable
from gigapath.linear_probe.heads import TileHead, choose_penalty, save_tile_head
from gigapath.linear_probe.tiles import predictions_of
from gigapath.machine import available_cores
from gigapath.options import to_dict
from gigapath.progress import Progress
from gigapath.tables import read_table
from gigapath.tile_encoder import load_tile_encoder, save_tile_encoder
from gigapath.tile_transform import TileTransform

FROZEN = "frozen probe"
ENCODER = "tile_encoder"  # the folder of the tuned encoder
EMBEDDED = "frozen.h5"
PROBED = {"cuda": (8, 32), "cpu": (2, 6)}  # tiles of the passes that the plan measures
TOGETHER = 32  # tiles of a pass without gradients, and of a batch of the frozen encoder
_MODEL = ("adapt", "lora_rank", "lora_alpha", "lora_dropout", "last_blocks")


class TileClassifier(OneRate):
    """A tile encoder and a linear layer; training turns and mirrors the tiles of a pass, as tissue has no up."""

    def __init__(self, encoder: nn.Module, transform: TileTransform, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.transform = encoder, transform
        self.classifier = nn.Linear(width, classes)

    def train(self, mode: bool = True) -> "TileClassifier":
        """Training mode; batch norms keep the statistics that the encoder came with, whatever a pass holds."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward_packed(self, pixels: Tensor, coords: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (B, C) of pixels (B, S, S, 3) from 0 to 255; the coordinates play no part."""
        if self.training:
            turns, mirrored = (int(torch.randint(most, ())) for most in (4, 2))
            pixels = torch.rot90(pixels, turns, (1, 2))
            pixels = pixels.flip(1) if mirrored else pixels
        vectors: Tensor = self.encoder(self.transform.normalise(pixels))
        logits: Tensor = self.classifier(vectors.float())
        return logits


@dataclass(frozen=True)
class TileBags:
    """The tiles of the table's rows, resized, as bags of one."""

    tiles: TileSet
    places: Sequence[int]
    transform: TileTransform

    def __getitem__(self, row: int) -> Bag:
        pixels = self.transform.fit(np.stack(self.tiles.read([self.places[row]])))
        return Bag(pixels, np.zeros((1, 2), np.int64))


def finetune_tiles(
    tiles: Path | str,
    out: Path | str,
    *,
    tile_encoder: str = "gigapath",
    labels: Path | str | None = None,
    model: ModelOptions | None = None,
    training: TrainingOptions | None = None,
    probe: ProbeOptions | None = None,
    dry_run: bool = False,
    watch: Progress | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> RunResult:
    """Tune a tile encoder on labelled tiles, or go on with the run that `out` holds.

    `OUT/tile_encoder` then holds the encoder, which `gigapath embed --tile-encoder` takes, and OUT the head, which
    `gigapath predict` takes.

    Args:
        tiles: as for `gigapath embed-tiles`: folders by split and class, a zip or folder with a CSV, PCam's HDF5 files.
        tile_encoder: a name as `load_tile_encoder` takes it.
        labels: CSV (input or file, label, split); not needed where the tiles say them.
        model: what is trained; what concerns slides has no effect.
        training: the recipe, in tiles. Without a batch size the tiles of a step are one pass.
        probe: columns of the labels, what to allow.
        dry_run: show the plan, and neither train nor write; the result holds no scores then.
        check_stop: called between steps; raises to end the run, which can go on later.

    Raises:
        ValueError, FileNotFoundError: one sentence on what is wrong.
    """
    model, training, probe = model or ModelOptions(), training or TrainingOptions(), probe or ProbeOptions()
    out, watch = Path(out), watch or Progress()
    check_folder(out)
    model.check_adapters(tile_encoder)
    if model.adapt == "head":
        raise ValueError("--adapt head: expected lora, last or full; gigapath probe fits a head on a frozen encoder.")
    processes = join_processes(training.device)
    if processes.world > 1:
        raise ValueError(f"--tiles: expected one process, got {processes.world}. Leave the launcher out.")
    if training.batch_size == 1:
        training = replace(training, batch_size=training.gradient_accumulation, gradient_accumulation=1)
    tile_set, encoder = open_tile_set(tiles), load_tile_encoder(tile_encoder, device=training.device, precision="auto")
    given = {key: value for key, value in to_dict(training).items() if key not in NO_CHANGE}
    chosen = {key: value for key, value in to_dict(model).items() if key in _MODEL}
    precision = training_precision(training.precision, processes.device)
    tag: dict[str, Any] = {"encoder": encoder.name, "model": chosen, "training": given, "precision": precision}
    with Ownership({} if dry_run else {out: tag}), at_most_threads(available_cores()):
        if labels is None:
            none = np.zeros((len(tile_set), 0), np.float32)
            held = EmbeddingTable(tile_set.names, none, tile_set.splits, tile_set.labels, tile_set.groups)
            listed = own_labels(held, Path(tiles).name)
        else:
            listed = rows_of_table(read_table(labels), label=probe.label, split=probe.split, group=probe.group)
        _, _, rows_of, classes = label_tiles(tile_set.names, tile_set.splits, listed, probe, noun="tile")
        counts = {split: len(found) for split, found in rows_of.items()}
        watch.line(f"{len(tile_set):,} tiles, {encoder.description}")
        torch.manual_seed(training.seed)
        # The frozen one may hold its weights in half precision.
        whole = load_tile_encoder(tile_encoder, device=training.device, precision="fp32").model.requires_grad_(True)
        tuned = TileClassifier(whole, encoder.transform, encoder.embed_dim, len(classes))
        adapt(tuned.encoder, model)
        tuned.to(processes.device)
        plan = _plan(tuned, counts, len(tile_set), training, precision, processes)
        plan.tell(watch, processes, allow_low_memory=training.allow_low_memory)
        if dry_run:
            return RunResult({}, [], out, {})
        table = out / EMBEDDED
        embed_tiles(tile_set, encoder, table, batch_size=TOGETHER, watch=watch, check_stop=check_stop)
        data = load_data(table, labels, probe, watch=watch)
        features, truth = torch.from_numpy(data.features), torch.from_numpy(data.labels)
        rows = {split: torch.from_numpy(found) for split, found in data.rows.items()}
        start, choice = choose_penalty(features, truth, rows[TRAIN], rows[VALIDATION], len(data.classes))
        frozen = start.probabilities(features, rows[TEST])
        tuned.classifier.load_state_dict({"weight": start.weight, "bias": start.bias})
        place = {name: index for index, name in enumerate(tile_set.names)}
        bags = TileBags(tile_set, [place[name] for name in data.names], encoder.transform)
        task = Task("tiles", "binary" if len(data.classes) == 2 else "multi_class", data.classes)
        trainer = Trainer(
            task,
            bags,
            data.labels,
            training,
            precision,
            processes,
            check_stop=check_stop,
            watch=watch,
            together=TOGETHER,
        )
        fold = Fold(0, data.rows[TRAIN], data.rows[VALIDATION], data.rows[TEST])
        tag |= {"tiles": tile_set.identity, "classes": list(data.classes)}
        history = trainer.train(tuned, fold, out, tag)
        if model.adapt == "lora":
            merge(tuned)
        shares = probabilities(trainer.logits(tuned, fold.test), task)

        save_tile_encoder(out / ENCODER, encoder, tile_encoder, tuned.encoder, model.adapt)
        saved = load_tile_encoder(str(out / ENCODER))
        layer = tuned.classifier
        weight, bias = (each.detach().float().cpu().numpy() for each in (layer.weight, layer.bias))
        made = {"encoder": saved.name, "weights_sha256": saved.weights_sha256}
        save_tile_head(out, TileHead(weight, bias, data.classes, made))
        scored = partial(score, unit="tiles", replicates=training.replicates, seed=training.seed)
        control = predictions_of(data, TEST, frozen)
        scores = {
            TUNED: scored(predictions_of(data, TEST, shares), against={FROZEN: control}),
            FROZEN: scored(control),
        }
        details = {
            "chosen": {"what": f"{training.select} epoch; penalty of the frozen probe {choice.value:g}, on validation"},
            "history": [vars(epoch) for epoch in history],
            "data": data.facts,
            "options": {**chosen, **given},
        }
        columns = {
            "name": [data.names[row] for row in fold.test],
            "label": [data.classes[label] for label in data.labels[fold.test]],
            "predicted": [data.classes[index] for index in shares.argmax(axis=1)],
        }
        notes = (*data.warnings, *scores[TUNED].notes)
        write_results(
            out,
            Results(TILE_TUNING, task.described(), scores, details=details, notes=notes),
            texts={
                "summary.csv": summary_csv(scores),
                "predictions.csv": predictions_csv(columns, shares, data.classes),
            },
            pictures={"confusion.png": lambda: confusion_picture(scores[TUNED], data.classes, "test tiles")},
        )
    lines = [*score_lines(scores), *(f"note: {note}" for note in notes)]
    return RunResult({name: [found.headline] for name, found in scores.items()}, lines, out, scores)


def _plan(
    model: TileClassifier,
    counts: dict[str, int],
    embedded: int,
    training: TrainingOptions,
    precision: str,
    processes: Processes,
) -> Plan:
    """What the run takes, by two measured passes; the frozen encoder's over `embedded` tiles is the first of it."""

    def made(tiles: int) -> Tensor:
        side = model.transform.resize
        with computing(precision, processes.device):
            pixels = torch.zeros(tiles, side, side, 3, device=processes.device)
            return model.forward_packed(pixels, torch.empty(0), ()).sum()

    cost = measure_cost(made, lambda n: 3.0 * n, model, processes.device, PROBED)
    batch, each = training.batch_size, {split: max(1, count) for split, count in counts.items()}
    forwards = embedded + each[TEST] + training.epochs * each[VALIDATION]
    return foresee(
        model,
        cost,
        processes,
        ["tiles: " + ", ".join(f"{count:,} {split}" for split, count in counts.items())],
        tiles=min(batch, each[TRAIN]),
        passes=training.epochs * -(-each[TRAIN] // batch) + forwards / TOGETHER / 3,
        operations=forwards + 3 * training.epochs * each[TRAIN],
        ways=["a smaller --batch-size with more --gradient-accumulation"] * (batch > 1),
        beside=4 * sum(p.numel() for p in model.parameters()),  # the frozen encoder
        largest="pass",
    )
