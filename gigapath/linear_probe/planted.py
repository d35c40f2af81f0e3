"""Embeddings made on the spot, for trying the probe without any download: a known linear rule under noise."""

import csv
import io
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from gigapath.files import atomic_file, write_text_atomic
from gigapath.linear_probe.table import SPLITS

WIDTH = 256
TILES = {"train": 6000, "val": 1000, "test": 1000}
SLIDES = {"train": 30, "val": 10, "test": 10}
SEPARATION = 2.0  # distance of the two classes' means, in standard deviations


def write_planted(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write `embeddings.zip` (one `.pt` per tile, the split in its path) and `labels.csv` into a folder.

    Two classes, normal with unit variance, whose means lie `SEPARATION` apart along a random direction.

    Returns:
        the zip and the CSV.
    """
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=WIDTH)
    direction *= SEPARATION / np.linalg.norm(direction)
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["input", "label", "split", "slide"])
    archive, labels = folder / "embeddings.zip", folder / "labels.csv"
    with atomic_file(archive) as temporary, zipfile.ZipFile(temporary, "w") as packed:
        for split in SPLITS:
            for number in range(TILES[split]):
                label = number % 2
                name = f"{split}_{number:05d}.pt"
                content = io.BytesIO()
                vector = generator.normal(size=WIDTH) + (label - 0.5) * direction
                torch.save(torch.from_numpy(vector.astype(np.float32)), content)
                packed.writestr(f"planted/{split}/{name}", content.getvalue())
                writer.writerow([name, label, split, f"{split}-slide-{number % SLIDES[split]}"])
    write_text_atomic(labels, rows.getvalue())
    return archive, labels


def bayes_accuracy() -> float:
    """The accuracy that no rule can beat on these data."""
    return 0.5 * (1 + math.erf(SEPARATION / 2 / math.sqrt(2)))
