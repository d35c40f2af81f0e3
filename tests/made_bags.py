"""Bags that a model must learn from, in memory: real tiles with a share of tumour, and a planted arrangement."""

import numpy as np

from gigapath.finetune.data import Bag

SIDE = 8  # cells on a side of a bag's square


def arrangement_bag(
    label: int,
    random: np.random.Generator,
    *,
    width: int = 16,
    permuted: bool = False,
    side: int = SIDE,
    axis: int = 0,
    column: int = 0,
    strength: float = 2.0,
) -> Bag:
    """Two kinds of tiles on one square: class 0 has the first kind on the left, class 1 on the right.

    Both classes hold the same numbers of each kind on the same cells; only who sits where differs. `permuted` shuffles
    the coordinates within the bag, which leaves nothing to learn. The order of the tiles is drawn. With `axis` 1 the
    halves are above and below; the kinds differ by twice `strength` in one `column` of the features.
    """
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)  # (column, row)
    left = places[:, axis] < side // 2
    kind = left if label == 0 else ~left
    features = random.standard_normal((len(places), width)).astype(np.float32)
    features[:, column] += np.where(kind, strength, -strength)
    order = random.permutation(len(places))
    bag = Bag(features[order], (places[order] + 20).astype(np.int64) * 256)
    return Bag(bag.features, bag.coords[random.permutation(len(places))]) if permuted else bag


def tumour_bags(
    features: np.ndarray, is_tumour: np.ndarray, count: int, *, tiles: int, seed: int
) -> tuple[list[Bag], np.ndarray]:
    """Bags of tiles of one split: every second bag is positive, a fifth of its tiles being tumour."""
    random = np.random.default_rng(seed)
    normal, tumour = np.flatnonzero(~is_tumour), np.flatnonzero(is_tumour)
    bags, truth = [], np.arange(count) % 2
    for label in truth:
        of_tumour = tiles // 5 if label else 0
        rows = np.concatenate([random.choice(tumour, of_tumour), random.choice(normal, tiles - of_tumour)])
        cells = random.choice(40 * 30, size=tiles, replace=False)
        coords = np.stack([cells % 40, cells // 40], axis=1).astype(np.int64) * 256
        bags.append(Bag(features[random.permutation(rows)], coords))
    return bags, truth
