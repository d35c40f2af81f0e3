"""The torch dataset of bags: labels joined, the folds of fine-tuning, and a loop of plain PyTorch that learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_cohort import made_bag, write_cohort, write_csv, write_slide, write_task
from torch import nn
from torch.utils.data import DataLoader, Subset

import gigapath
from gigapath.evaluation.labels import load_task, read_labels
from gigapath.evaluation.splits import draw_folds


def test_bags_come_with_their_labels_as_the_slide_encoder_takes_them(tmp_path: Path) -> None:
    features, labels = write_cohort(tmp_path, [0, 2, 1, 0], patients=["p", "p", "q", "r"])
    bags = gigapath.BagDataset(str(features), str(labels))
    assert len(bags) == 4 and bags.embed_dim == 8 and bags.classes == ("0", "1", "2") and "4 slides" in repr(bags)
    assert bags.labels.tolist() == [0, 2, 1, 0] and bags.patients == ("p", "p", "q", "r")
    for index, (slide_id, (tiles, coords, label)) in enumerate(zip(bags.slide_ids, bags, strict=True)):
        stored = gigapath.read_features(features / f"{slide_id}.h5", order="file")
        np.testing.assert_array_equal(tiles, stored.features)
        np.testing.assert_array_equal(coords, stored.encoder_coords())
        assert tiles.dtype == torch.float32 and coords.dtype == torch.int64 and label == bags.labels[index]
    assert torch.equal(bags[-1][0], bags[3][0])
    model = gigapath.slide_encoder.LongNetViT(in_chans=8, embed_dim=16, depth=1)
    assert model(*bags[0][:2])[0].shape == (1, 16)


def test_the_folds_are_those_of_fine_tuning(tmp_path: Path) -> None:
    features, labels = write_cohort(
        tmp_path, [n // 2 % 3 for n in range(24)], patients=[f"p{n // 2}" for n in range(24)]
    )
    bags = gigapath.BagDataset(features, labels, task=write_task(tmp_path / "t.yaml"))
    wanted = draw_folds(read_labels(labels, load_task(tmp_path / "t.yaml")), 4, seed=3)
    for ours, theirs in zip(bags.folds(4, seed=3), wanted, strict=True):
        for name, rows in ours.sets().items():
            np.testing.assert_array_equal(rows, theirs.sets()[name])


def test_several_labels_and_what_is_missing(tmp_path: Path) -> None:
    for number in range(3):
        write_slide(tmp_path / "f" / f"s{number}.h5", *made_bag(number, np.random.default_rng(number)))
    rows = [[f"s{number}", number % 2, 1] for number in range(4)]
    labels = write_csv(tmp_path / "labels.csv", ["slide_id", "kras", "egfr"], rows)
    with pytest.raises(ValueError, match="s3"):
        gigapath.BagDataset(tmp_path / "f", labels, label=["kras", "egfr"])
    bags = gigapath.BagDataset(tmp_path / "f", labels, label=["kras", "egfr"], allow_missing=True)
    assert bags.labels.dtype == torch.float32 and bags.labels.tolist() == [[0, 1], [1, 1], [0, 1]]


def test_ten_lines_of_plain_pytorch_learn(tmp_path: Path) -> None:
    features, labels = write_cohort(tmp_path, [n % 2 for n in range(40)], tiles=30)
    torch.manual_seed(0)
    bags = gigapath.BagDataset(features, labels)
    fold = bags.folds(5)[0]
    model = nn.Linear(bags.embed_dim, len(bags.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(10):
        for tiles, _coords, label in DataLoader(Subset(bags, fold.train.tolist()), batch_size=None, shuffle=True):
            loss = nn.functional.cross_entropy(model(tiles.mean(0)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test = [model(bags[index][0].mean(0)).argmax() == bags.labels[index] for index in fold.test]
    assert len(test) == 8 and torch.stack(test).float().mean() >= 0.875
