"""Pretraining on made slides in a minute: python demo/pretrain_planted.py [OUT]

Each slide has a few tissue kinds in patches (Voronoi cells), two smooth waves, strata (every row of tiles has something
of its own) and noise. A small slide encoder learns to predict hidden tiles from those around them; beside it stand the
mean of the visible tiles, the nearest ones and kriging, which learn nothing. Look at OUT/run/reconstructions.png and
curves.png.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from gigapath.cli.progress import Terminal
from gigapath.pretraining import CohortOptions, Pretrained, PretrainingOptions, SizeOptions, pretrain

WIDTH, KINDS = 32, 5
SIZES = SizeOptions(model_arch="gigapath_slide_enc2l64d", decoder_dim=64, decoder_depth=1)
RECIPE = PretrainingOptions(epochs=8, batch_size=8, base_lr=5e-3, device="cpu")


@dataclass(frozen=True)
class PlantedSlide:
    """A made slide: features (N, 32) float32, cells (N, 2); the share of each kind of tile; whether its strata stand
    upright, which is to be told from the arrangement alone."""

    features: np.ndarray
    cells: np.ndarray
    kinds: np.ndarray
    turned: bool


def planted_slides(count: int, *, seed: int = 0, turned: bool = False) -> list[PlantedSlide]:
    """Slides of about 120 tiles; kinds look the same in all. With `turned` the strata of every second slide are columns
    in place of rows."""
    world = np.random.default_rng(7)
    kinds, waves, strata = (world.standard_normal((n, WIDTH)) for n in (KINDS, 2, 2))
    random = np.random.default_rng([seed, 1])
    slides = []
    for number in range(count):
        side = random.integers(11, 15)
        cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
        middle = (side - 1) / 2
        cells = cells[np.hypot(*(cells - middle).T) < side * random.uniform(0.5, 0.56)]
        seeds, kind = random.uniform(0, side, (6, 2)), random.integers(0, KINDS, 6)
        nearest = np.linalg.norm(cells[:, None] - seeds, axis=-1).argmin(axis=1)
        heights = np.sin(cells @ random.uniform(-0.5, 0.5, (2, 2)) + random.uniform(0, 6, 2))
        upright = turned and number % 2 == 1
        layers = random.standard_normal((side, 2))[cells[:, 0 if upright else 1]]
        features = 1.5 * (kinds[kind[nearest]] + heights @ waves) + 1.4 * layers @ strata
        features += 0.4 * random.standard_normal((len(cells), WIDTH))
        shares = np.bincount(kind[nearest], minlength=KINDS) / len(cells)
        slides.append(PlantedSlide(features.astype(np.float32), cells + random.integers(0, 40, 2), shares, upright))
    return slides


def write_slides(folder: Path, slides: list[PlantedSlide]) -> None:
    """Write them as feature files, as TRIDENT's are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, slide in enumerate(slides):
        with h5py.File(folder / f"slide-{number:03d}.h5", "w") as file:
            file["features"] = slide.features
            file["coords"] = slide.cells * 256
            file["coords"].attrs["patch_size_level0"] = 256


def main(out: Path, *, epochs: int = RECIPE.epochs) -> Pretrained:
    """Write the cohort, pretrain on it, and print where to look."""
    write_slides(out / "features", planted_slides(400))
    result = pretrain(
        out / "features",
        out / "run",
        cohort=CohortOptions(val_share=0.1),
        sizes=SIZES,
        training=replace(RECIPE, epochs=epochs),
        watch=Terminal(),
    )
    print(f"R2 of hidden tiles {result.epochs[-1].r2:.3f}; see {out / 'run'}.")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/pretrained"))
