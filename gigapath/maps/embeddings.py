"""Maps of the tile embeddings themselves: principal components as colors, clusters, similarity to a tile.

N tiles of a slide, S sampled tiles of all slides, D width. What is fitted is fitted once for all slides, so that a
color means the same on each.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

SAMPLE = 20_000  # tiles of all slides together that components and clusters are fitted on
COLOR_PERCENTILES = (1.0, 99.0)
RESTARTS = 4  # of k-means
CLUSTERS, TILES_A_CLUSTER = 8, 20  # where no number is given: at most so many, each of so many different tiles
_ROWS = 8192  # tiles that are compared at once


def sample_tiles(slides: Iterable[Float32], count: int, *, seed: int = 0) -> Float32:
    """(S, D) tiles drawn from slides (N, D), the same number of each (or all of a small one), about SAMPLE in all.

    Args:
        slides: the embeddings of each slide; one is held at a time.
        count: how many slides there are.
        seed: of the draw.
    """
    each = max(1, SAMPLE // max(1, count))
    generator = np.random.default_rng(seed)
    drawn = []
    for features in slides:
        rows = np.arange(len(features))
        if len(rows) > each:
            rows = np.sort(generator.choice(len(rows), each, replace=False))
        drawn.append(np.asarray(features[rows], np.float32))
    return np.concatenate(drawn)


@dataclass(frozen=True, eq=False)
class Components:
    """The three leading principal components of sampled tiles.

    Attributes:
        mean: (D,).
        axes: (3, D) of length 1, the entry of largest magnitude positive.
        shares: (3,) of the variance.
        low, high: (3,) of the components, what becomes color 0 and 1.
    """

    mean: Float32
    axes: Float32
    shares: npt.NDArray[np.float64]
    low: Float32
    high: Float32

    def colors(self, features: Float32) -> Float32:
        """(N, 3) red, green and blue from 0 to 1 of tiles (N, D)."""
        shares = (self._project(features) - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.asarray(np.clip(shares, 0, 1), np.float32)

    def scaled(self, features: Float32) -> "Components":
        """The same axes with the color range of other tiles."""
        low, high = np.percentile(self._project(features), COLOR_PERCENTILES, axis=0).astype(np.float32)
        return Components(self.mean, self.axes, self.shares, low, high)

    def _project(self, features: Float32) -> Float32:
        return np.asarray((np.asarray(features, np.float32) - self.mean) @ self.axes.T)


def fit_components(sample: Float32) -> Components:
    """Principal components of tiles (S, D), centered and not scaled; fewer than three there are become zero axes."""
    mean = sample.mean(axis=0, dtype=np.float64)
    centered = sample.astype(np.float64) - mean
    scatter, divisor = centered.T @ centered, max(1, len(sample) - 1)
    variances, vectors = np.linalg.eigh(scatter / divisor)
    variances, axes = np.maximum(variances[::-1][:3], 0), vectors.T[::-1][:3]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    axes = axes * signs[:, None]
    total = max(float(np.trace(scatter) / divisor), 1e-30)
    mean, axes = mean.astype(np.float32), _three(axes).astype(np.float32)
    found = Components(mean, axes, _three(variances) / total, np.zeros(3, np.float32), np.ones(3, np.float32))
    return found.scaled(sample)


def _three(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rows filled up with zeros to three, for embeddings of one or two entries."""
    return np.concatenate([rows, np.zeros((3 - len(rows), *rows.shape[1:]))])


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centers (K, D) of k-means, the one with most of the sampled tiles first."""

    centers: Float32

    def labels(self, features: Float32) -> npt.NDArray[np.int32]:
        """(N,) the nearest center, 0 to K - 1, of tiles (N, D)."""
        found = np.empty(len(features), np.int32)
        squares = (self.centers.astype(np.float64) ** 2).sum(axis=1)
        for start in range(0, len(features), _ROWS):
            block = np.asarray(features[start : start + _ROWS], np.float64)
            found[start : start + _ROWS] = (squares - 2 * block @ self.centers.T.astype(np.float64)).argmin(axis=1)
        return found


def fit_clusters(sample: Float32, clusters: int | None = None, *, seed: int = 0) -> Clusters:
    """K-means (Euclidean, the best of RESTARTS starts of k-means++) on tiles (S, D).

    Args:
        sample: the tiles.
        clusters: how many; None for as many as suit the number of different tiles, at most CLUSTERS.
        seed: of the starts.

    Raises:
        ValueError: fewer different tiles than clusters.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("scikit-learn: not installed. Clusters need it: pip install 'gigapath[train]'.") from error
    different = len(np.unique(sample, axis=0))
    clusters = clusters or max(1, min(CLUSTERS, different // TILES_A_CLUSTER))
    if different < clusters:
        raise ValueError(
            f"--clusters: expected at most as many as there are different tiles, got {clusters} for {len(sample)} "
            "tiles. Ask for fewer."
        )
    fitted = KMeans(clusters, n_init=RESTARTS, random_state=seed).fit(sample)
    order = np.argsort(-np.bincount(fitted.labels_, minlength=clusters), kind="stable")
    return Clusters(np.asarray(fitted.cluster_centers_[order], np.float32))


def cosine_similarity(features: Float32, tile: Float32) -> Float32:
    """(N,) cosine of tiles (N, D) with one tile (D,), -1 to 1; 0 where either is zero."""
    found = np.empty(len(features), np.float32)
    length = float(np.linalg.norm(tile.astype(np.float64)))
    for start in range(0, len(features), _ROWS):
        block = np.asarray(features[start : start + _ROWS], np.float64)
        lengths = np.linalg.norm(block, axis=1) * length
        found[start : start + _ROWS] = (block @ tile.astype(np.float64)) / np.maximum(lengths, 1e-30)
    return found
