"""Slides as points in two dimensions: UMAP where it is installed, else t-SNE or PCA.

S slides, D width of an embedding.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gigapath.features import read_slides
from gigapath.report.collecting import is_trained

SEED = 0
FEW = 20  # neighbors say little among fewer slides: PCA
MANY = 5000  # t-SNE and UMAP of more slides take minutes: PCA too
LEAST = 3  # slides; fewer are no picture
COMPONENTS = 50  # what t-SNE starts from, as its authors advise

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Where the slides lie.

    Attributes:
        name: of the folder of slide embeddings.
        embedding: which embedding of it.
        method: in words, with its settings.
        axes: what the two axes are.
        slide_ids: S names.
        points: (S, 2).
        trained: False where the slide encoder's weights are random.
    """

    name: str
    embedding: str
    method: str
    axes: tuple[str, str]
    slide_ids: tuple[str, ...]
    points: FloatArray
    trained: bool


def project_folder(folder: Path, embedding: str | None, method: str) -> Projection | None:
    """Lay out the slides of a folder of slide embeddings; None for fewer than LEAST.

    Args:
        folder: a `slides_*` folder.
        embedding: the name of an embedding, or None for the default output, or the mean where there is no other.
        method: "auto", "umap", "tsne" or "pca".

    Raises:
        FileNotFoundError: no embeddings in the folder.
        ValueError: slides without that embedding, or of mixed numerics.
        ImportError: a method that is not installed was asked for.
    """
    name = embedding or ("tile-mean" if folder.name.startswith("slides_mean__") else "default")
    with warnings.catch_warnings():  # that the encoder is untrained stands at the picture
        warnings.simplefilter("ignore", UserWarning)
        ids, vectors = read_slides(folder, name)
    if len(ids) < LEAST:
        return None
    points, words, axes = project(vectors.astype(np.float64), method)
    return Projection(folder.name, name, words, axes, tuple(ids), points, is_trained(folder))


def project(vectors: FloatArray, method: str) -> tuple[FloatArray, str, tuple[str, str]]:
    """(points (S, 2), the method in words, the two axes) of vectors (S, D)."""
    if method == "auto":
        method = "pca"
        if FEW <= len(vectors) <= MANY:
            method = next((name for name, module in _MODULES.items() if _installed(module)), "pca")
    if method == "umap":
        return _umap(vectors)
    if method == "tsne":
        return _tsne(vectors)
    scores, shares = principal_components(vectors, 2)
    first, second = (f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    return scores, "PCA", (first, second)


_MODULES = {"umap": "umap", "tsne": "sklearn"}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def principal_components(vectors: FloatArray, count: int) -> tuple[FloatArray, Sequence[float]]:
    """(scores (S, count), share of the variance of each); the sign makes the largest loading positive."""
    centered = vectors - vectors.mean(axis=0)
    left, values, right = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    total = float((values**2).sum()) or 1.0
    scores = np.zeros((len(vectors), count))
    held = min(count, len(values))
    scores[:, :held] = (left * values * np.where(signs == 0, 1, signs))[:, :held]
    shares = [float(value**2) / total for value in values[:held]]
    return scores, [*shares, *[0.0] * (count - held)]


def _umap(vectors: FloatArray) -> tuple[FloatArray, str, tuple[str, str]]:
    try:
        import umap
    except ImportError as error:
        raise ImportError(
            "--projection umap: umap-learn is not installed. Install it (pip install 'gigapath[umap]'), or take tsne."
        ) from error
    neighbors = min(15, len(vectors) - 1)
    # With a seed UMAP runs in one thread.
    layout = umap.UMAP(n_neighbors=neighbors, metric="cosine", random_state=SEED, n_jobs=1)
    with warnings.catch_warnings():  # of slides alike it says in three lines how it goes on, which it does
        warnings.simplefilter("ignore", UserWarning)
        found = layout.fit_transform(vectors)
    words = f"UMAP ({neighbors} neighbors, cosine, seed {SEED})"
    return np.asarray(found, np.float64), words, ("UMAP 1 (no unit)", "UMAP 2 (no unit)")


def _tsne(vectors: FloatArray) -> tuple[FloatArray, str, tuple[str, str]]:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "--projection tsne: scikit-learn is not installed. Install it (pip install 'gigapath[train]'), or take pca."
        ) from error
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    start, _ = principal_components(vectors, min(COMPONENTS, *vectors.shape))
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(start)
    words = f"t-SNE (perplexity {perplexity:g}, seed {SEED})"
    return np.asarray(found, np.float64), words, ("t-SNE 1 (no unit)", "t-SNE 2 (no unit)")
