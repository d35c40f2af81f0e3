"""Bags of tile embeddings with their labels as a torch dataset, for training loops of one's own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gigapath.evaluation.labels import Task, load_task, task_of_columns
from gigapath.evaluation.splits import Fold, draw_folds
from gigapath.finetune.data import FileBags, join_features
from gigapath.finetune.options import JoinOptions


class BagDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """A bag a labelled slide: features (N, D) float32, coords (N, 2) int64 as the slide encoder takes them, label.

    The label is the index of the class in `classes`, a scalar int64; of a task with several labels (C,) float32 of 0
    and 1. Bags differ in N: `DataLoader(bags, batch_size=None, shuffle=True)` gives them one by one.

    Attributes:
        slide_ids: S names, in the order of the labels.
        labels: (S,) int64 or (S, C) float32.
        classes: C names.
        patients: (S,) or None where the CSV does not say them.
        embed_dim: D.
    """

    def __init__(
        self,
        features: str | Path | Iterable[str | Path],
        labels: str | Path,
        *,
        label: str | Iterable[str] = (),
        task: str | Path | Task | None = None,
        **join: Any,
    ) -> None:
        """Join labels to feature files, and look at every file.

        Args:
            features: feature files of any known tool, or folders of them; one or many.
            labels: CSV with a row a slide.
            label: its column of the label (the usual one where none is named); several make a task of several labels.
            task: instead of columns the task, its YAML file, or its name.
            join: options of `gigapath finetune`: `id_rule`, `id_regex`, `allow_missing`, `allow_mixed`,
                `tile_size_level0`.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: labels and features do not meet, or files of different encoders; one sentence.
        """
        options = JoinOptions(**join)
        if task is None:
            task = task_of_columns(labels, [label] if isinstance(label, str) else list(label))
        elif not isinstance(task, Task):
            task = load_task(task)
        joined, facts = join_features(labels, task, features, options)
        self._labels = joined.labels
        self._bags = FileBags(joined.files, facts, options.tile_size_level0)
        self.slide_ids, self.patients = joined.labels.slide_ids, joined.labels.patients
        self.classes = task.classes
        self.labels = torch.from_numpy(joined.labels.truth)
        if task.multi_label:
            self.labels = self.labels.float()
        self.embed_dim = facts[0].width

    def __len__(self) -> int:
        return len(self.slide_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N, D), coords (N, 2) and label of a slide."""
        bag = self._bags[range(len(self))[index]]
        return torch.from_numpy(bag.features), torch.from_numpy(bag.coords), self.labels[index]

    def __repr__(self) -> str:
        """One line."""
        return f"BagDataset({len(self):,} slides, width {self.embed_dim}, classes {', '.join(self.classes)})"

    def folds(self, folds: int | str = 5, *, seed: int = 0) -> list[Fold]:
        """Folds with `train`, `val` and `test`, arrays of indices: those that `finetune` draws with the same seed; even
        shares of the classes, a patient's slides together; "leave-site-out" makes one a site."""
        return draw_folds(self._labels, folds, seed=seed)
