"""Bags that a model must learn from, in memory: real tiles with a share of tumour, and a planted arrangement."""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np

from gigapath.finetune.data import Bag

SIDE = 8  # cells on a side of a bag's square


def arrangement_bag(label: int, random: np.random.Generator, *, width: int = 16, permuted: bool = False) -> Bag:
    """Two kinds of tiles on one square: class 0 has the first kind on the left, class 1 on the right.

    Both classes hold the same numbers of each kind on the same cells; only who sits where differs. `permuted` shuffles
    the coordinates within the bag, which leaves nothing to learn. The order of the tiles is drawn.
    """
    places = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2)  # (column, row)
    left = places[:, 0] < SIDE // 2
    kind = left if label == 0 else ~left
    features = random.standard_normal((len(places), width)).astype(np.float32)
    features[:, 0] += np.where(kind, 2.0, -2.0)
    order = random.permutation(len(places))
    bag = Bag(features[order], (places[order] + 20).astype(np.int64) * 256)
    return Bag(bag.features, bag.coords[random.permutation(len(places))]) if permuted else bag


def pcam_tiles(archive: Path, per_split: dict[str, int]) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """split -> (tiles (96, 96, 3) uint8, labels): the first of each class, as many of each."""
    from PIL import Image

    found: dict[str, tuple[list[np.ndarray], list[int]]] = {split: ([], []) for split in per_split}
    with zipfile.ZipFile(archive) as held:
        name = next(name for name in held.namelist() if name.endswith("labels.csv"))
        for row in csv.DictReader(io.StringIO(held.read(name).decode())):
            tiles, labels = found.get(row["split"], ([], []))
            if row["split"] in found and labels.count(int(row["label"])) < per_split[row["split"]] // 2:
                tiles.append(np.asarray(Image.open(io.BytesIO(held.read(row["file"]))).convert("RGB")))
                labels.append(int(row["label"]))
    return {split: (tiles, np.array(labels)) for split, (tiles, labels) in found.items()}


def tumour_bags(
    features: np.ndarray, labels: np.ndarray, count: int, *, tiles: int, seed: int
) -> tuple[list[Bag], np.ndarray]:
    """Bags of tiles of one split: every second bag is positive, a fifth of its tiles being tumour."""
    random = np.random.default_rng(seed)
    normal, tumour = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    bags, truth = [], np.arange(count) % 2
    for label in truth:
        of_tumour = tiles // 5 if label else 0
        rows = np.concatenate([random.choice(tumour, of_tumour), random.choice(normal, tiles - of_tumour)])
        cells = random.choice(40 * 30, size=tiles, replace=False)
        coords = np.stack([cells % 40, cells // 40], axis=1).astype(np.int64) * 256
        bags.append(Bag(features[random.permutation(rows)], coords))
    return bags, truth
