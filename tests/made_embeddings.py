"""Embeddings written on the spot, in the containers that the probe reads."""

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

Vectors = Mapping[str, npt.NDArray[np.float32]]  # path of the .pt -> vector


def pt_bytes(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def made_vectors(
    counts: Mapping[str, int], width: int = 12, *, seed: int = 0, separation: float = 2.0
) -> tuple[dict[str, npt.NDArray[np.float32]], list[dict[str, str]]]:
    """Vectors by path and CSV rows: two classes whose means lie apart in the first entry; slides of ten tiles."""
    generator = np.random.default_rng(seed)
    vectors, rows = {}, []
    for split, count in counts.items():
        for number in range(count):
            label = number % 2
            vector = generator.normal(size=width).astype(np.float32)
            vector[0] += separation * (label - 0.5)
            name = f"{split}_{number:04d}"
            vectors[f"emb/{split}/{name}.pt"] = vector
            slide = f"{split}-{number // 10}"
            rows.append({"input": f"{name}.pt", "label": "ab"[label], "split": split, "slide": slide})
    return vectors, rows


def write_zip(path: Path, vectors: Vectors, *, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, vector in vectors.items():
            archive.writestr(name, pt_bytes(torch.from_numpy(vector)))
    return path


def write_folder(path: Path, vectors: Vectors) -> Path:
    for name, vector in vectors.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(pt_bytes(torch.from_numpy(vector)))
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
