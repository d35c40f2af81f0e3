"""Learning is real: an arrangement that only the coordinates tell, and tumour in bags of real tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_bags import arrangement_bag, tumour_bags
from made_cohort import NARROW
from real_tiles import pcam_mini_embeddings

from gigapath.evaluation.calibration import probabilities
from gigapath.evaluation.intervals import evaluate
from gigapath.evaluation.scores import Predictions
from gigapath.evaluation.splits import Fold
from gigapath.finetune import ModelOptions, Task, TrainingOptions, training
from gigapath.finetune.data import Bag
from gigapath.finetune.heads import build_head
from gigapath.finetune.processes import Processes
from gigapath.finetune.training import Trainer
from gigapath.linear_probe.table import read_table

TASK = Task("made", "binary", ("no", "yes"))
CPU = Processes(torch.device("cpu"))


def auroc(truth: np.ndarray, said: np.ndarray) -> float:
    return evaluate(Predictions(truth, said, TASK.classes), replicates=0)["auroc"].value


def learn(
    folder: Path, bags: list[Bag], truth: np.ndarray, train: int, options: TrainingOptions, model: ModelOptions
) -> float:
    """The test AUROC after training on the first bags, from random weights."""
    torch.manual_seed(0)
    head = build_head(model, pretrained="", input_dim=bags[0].features.shape[1], n_classes=2)
    rows = np.arange(len(bags))
    trainer = Trainer(TASK, bags, truth, options, "fp32", CPU)
    trainer.train(head, Fold(0, rows[:train], rows[:0], rows[train:]), folder, {})
    return auroc(truth[train:], probabilities(trainer.logits(head, rows[train:]), TASK))


@pytest.mark.slow
def test_planted_arrangement_is_learned_and_only_from_coordinates(tmp_path) -> None:
    options = TrainingOptions(epochs=6, batch_size=16, gradient_accumulation=1, base_lr=0.032, layer_decay=1.0)
    model = ModelOptions(model_arch=NARROW, feat_layer="3", dropout=0.0, global_pool=True)
    scores = {}
    for permuted in (False, True):
        random = np.random.default_rng(3)
        truth = np.arange(400) % 2
        bags = [arrangement_bag(int(label), random, permuted=permuted) for label in truth]
        scores[permuted] = learn(tmp_path / str(permuted), bags, truth, 160, options, model)
        means = np.stack([bag.features.mean(axis=0) for bag in bags]).astype(np.float64)
        layer = training.fit_linear(means[:160], truth[:160], 2)
        blind = probabilities(layer(torch.from_numpy(means[160:])).detach().numpy(), TASK)
        assert abs(auroc(truth[160:], blind) - 0.5) < 0.1  # a control that sees no coordinates learns nothing
    assert scores[False] > 0.9 and abs(scores[True] - 0.5) < 0.1, scores


@pytest.mark.slow
def test_tumour_in_bags_of_real_tiles_is_found(tmp_path, shared, capsys) -> None:
    """All tiles of each split: of the first 700 of training alone, the 350 that show tumour are learned by heart, and
    the test AUROC stays at 0.9. 400 bags: with 200, so half the steps, it lies between 0.91 and 0.99 by the seed."""
    train = 400
    table = read_table(pcam_mini_embeddings(shared))
    splits, kinds = np.array(table.splits), np.array(table.labels)
    parts = []
    for split, count, seed in (("train", train, 1), ("test", 200, 2)):
        rows = np.flatnonzero(splits == split)
        parts.append(tumour_bags(table.features[rows], kinds[rows] == "1", count, tiles=60, seed=seed))
    bags, truth = parts[0][0] + parts[1][0], np.concatenate([parts[0][1], parts[1][1]])
    recipe = TrainingOptions(epochs=8, batch_size=8, gradient_accumulation=1, base_lr=0.016, layer_decay=1.0)
    model = ModelOptions(model_arch=NARROW, feat_layer="3", dropout=0.1, global_pool=True)
    attention = replace(model, head="abmil-tiles")
    scores = {
        "small LongNet from scratch": learn(tmp_path / "longnet", bags, truth, train, recipe, model),
        training.ATTENTION: learn(tmp_path / "abmil", bags, truth, train, training.abmil_options(recipe), attention),
    }
    means = training.tile_means(bags, range(len(bags)), workers=1)
    layer = training.fit_linear(means[:train], truth[:train], 2)
    scores[training.MEAN] = auroc(
        truth[train:], probabilities(layer(torch.from_numpy(means[train:])).detach().numpy(), TASK)
    )
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    assert min(scores.values()) > 0.9, scores
