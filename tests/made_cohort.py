"""Cohorts of labelled slides for fine-tuning tests: small feature files, label tables, and a narrow slide encoder."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from feature_files import write_h5
from timm.models import is_model, register_model

from gigapath.slide_encoder import LongNetViT

NARROW = "test_slide_enc3l64d"
PANDA = ("PANDA.csv", "train_0.csv", "val_0.csv", "test_0.csv")

if not is_model(NARROW):

    def test_slide_enc3l64d(**kwargs) -> LongNetViT:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return LongNetViT(**{"embed_dim": 64, "depth": 3, **kwargs})

    register_model(test_slide_enc3l64d)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header, *rows])
    return path


def write_slide(path: Path, features: np.ndarray, cells: np.ndarray, *, published: bool = False, **root) -> Path:
    """A feature file: TRIDENT's attributes (a step of 512), or the published form, which states none (256)."""
    if published:
        return write_h5(path, {"features": features, "coords": (cells * 256).astype(np.float32)})
    attrs = {"coords": {"patch_size": 256, "patch_size_level0": 512, "overlap": 0}, "": root}
    return write_h5(path, {"features": features, "coords": cells.astype(np.int64) * 512}, attrs)


def made_bag(
    label: int, random: np.random.Generator, *, tiles: int = 12, width: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """(features, cells): the label shows in the first columns of every tile; cells off the diagonal, none twice."""
    features = random.standard_normal((tiles, width)).astype(np.float32)
    features[:, label % width] += 1.5
    places = np.sort(random.choice(20 * 7, size=tiles, replace=False))
    return features, np.stack([places % 20 + 3, places // 20 + 1], axis=1)


def write_cohort(
    folder: Path,
    labels: Sequence[int],
    *,
    patients: Sequence[str] | None = None,
    seed: int = 0,
    tiles: int = 12,
    width: int = 8,
    **root,
) -> tuple[Path, Path]:
    """(features folder, labels CSV) of slides named slide-000, slide-001, ... with a column `site`."""
    random = np.random.default_rng(seed)
    names = [f"slide-{number:03d}" for number in range(len(labels))]
    for name, label in zip(names, labels, strict=True):
        write_slide(
            folder / "features" / f"{name}.h5", *made_bag(label, random, tiles=tiles + int(label), width=width), **root
        )
    header = ["slide_id", "label", "site", *(["patient_id"] if patients else [])]
    rows = [
        [name, label, "ab"[number % 2], *([patients[number]] if patients else [])]
        for number, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    return folder / "features", write_csv(folder / "labels.csv", header, rows)


def write_splits(folder: Path, *folds: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> Path:
    """Split files of numbers of slides: (train, val, test) of each fold; an empty val writes no file."""
    for number, sets in enumerate(folds):
        for name, rows in zip(("train", "val", "test"), sets, strict=True):
            if len(rows):
                write_csv(folder / f"{name}_{number}.csv", ["slide_id"], [[f"slide-{row:03d}"] for row in rows])
    return folder


def write_task(path: Path, *, classes: int = 3, **more: object) -> Path:
    lines = ["name: made", "setting: multi_class", f"label_dict: {{{', '.join(f'{c}: {c}' for c in range(classes))}}}"]
    path.write_text("\n".join(lines + [f"{key}: {value}" for key, value in more.items()]) + "\n")
    return path


def write_panda(
    folder: Path, csv_folder: Path | None, *, width: int = 1536, tiles: int = 6, each: int = 3
) -> tuple[Path, Path]:
    """A synthetic PANDA: (h5 folder, CSV folder). A few slides of each grade in each set are present.

    The CSVs are those of `csv_folder`, or ones made like them.
    """
    random = np.random.default_rng(0)
    if csv_folder is None:
        csv_folder = folder / "dataset_csv" / "PANDA"
        rows = [[f"{n:032x}", ("karolinska", "radboud")[n % 2], n % 6] for n in range(120)]
        parts = {"PANDA.csv": rows, "train_0.csv": rows[:72], "val_0.csv": rows[72:96], "test_0.csv": rows[96:]}
        for name, some in parts.items():
            write_csv(csv_folder / name, ["slide_id", "data_provider", "label"], some)
    for name in PANDA[1:]:
        taken: dict[str, int] = {}
        with (csv_folder / name).open(newline="") as file:
            for row in csv.DictReader(file):
                grade = row["label"]
                taken[grade] = taken.get(grade, 0) + 1
                if taken[grade] <= each:
                    bag = made_bag(int(grade), random, tiles=tiles + int(grade), width=width)
                    write_slide(folder / "h5_files" / f"{row['slide_id']}.h5", *bag, published=True)
    return folder / "h5_files", csv_folder
