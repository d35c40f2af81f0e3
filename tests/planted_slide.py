"""A planted slide: one small region of different tissue, on a slide with bounds; and a head fitted to find it.

The tile encoder is a colour encoder: the mean of a tile's red, green and blue.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from made_cohort import write_csv, write_slide, write_splits, write_task
from made_slides import UInt8Array, paint_tissue, write_scn

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.record import record_run
from gigapath.features import TileEmbeddingsWriter, Tiles
from gigapath.finetune import Inputs, ModelOptions, Settings, TrainingOptions, finetune
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles

SIZE = (3840, 2560)  # of the scanned area, in pixels of 0.5 microns: 15 x 10 tiles
CANVAS, OFFSET = (5200, 4100), (700, 900)
REGION = (896, 704, 1536, 1280)  # left, top, right, bottom within the scanned area: tissue of another kind
COLOUR = (96, 42, 74)
ID = "planted"


def paint_planted(step: int = 1, *, planted: bool = True, seed: int = 0) -> UInt8Array:
    """The scanned area at 1 / `step` of its size; without the region where not `planted`."""
    width, height = SIZE[0] // step, SIZE[1] // step
    image = paint_tissue(width, height, mpp=0.5 * step, seed=seed)
    if planted:
        left, top, right, bottom = (edge // step for edge in REGION)
        noise = np.random.default_rng(seed + 1).integers(-12, 13, (bottom - top, right - left, 1))
        image[top:bottom, left:right] = np.clip(np.array(COLOUR) + noise, 0, 255)
    return image


def colour_features(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(N, 3) of tiles (N, T, T, 3): their mean colour, about 0 and of size 1."""
    return ((pixels.mean(axis=(1, 2)) - 180) / 40).astype(np.float32)


def covered(coords_level0: npt.NDArray[np.integer], pitch: int = 256) -> npt.NDArray[np.float64]:
    """(N,) share of each tile, by its corner within the scanned area, that the region covers."""
    left, top, right, bottom = REGION
    x, y = coords_level0.T
    wide = np.clip(np.minimum(x + pitch, right) - np.maximum(x, left), 0, None)
    high = np.clip(np.minimum(y + pitch, bottom) - np.maximum(y, top), 0, None)
    return wide * high / pitch**2


def overlap(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((found & true).sum() / (found | true).sum())


def write_planted_run(folder: Path) -> Tiles:
    """Tile and embed the planted slide into `folder/run`, as a run does; its tiles."""
    slide_file = write_scn(folder / f"{ID}.scn", paint_planted(), canvas=CANVAS, offset=OFFSET, mpp=0.5)
    with open_slide(slide_file) as slide:
        tiles = plan_tiles(slide, TileOptions()).tiles
        batches = list(iter_tiles(slide, tiles, batch_size=64))
    path = folder / "run" / "features_colour" / f"{ID}.h5"
    with TileEmbeddingsWriter(path, tiles, embed_dim=3, attrs={"encoder": "colour", "trained": True}) as writer:
        for first, pixels in batches:
            writer.write(first, colour_features(pixels))
    record_run(folder / "run", "20260101T000000Z_planted", {}, [SlideEntry(ID, slide_file)])
    return tiles


def fit_head(
    folder: Path,
    *,
    head: str = "abmil-tiles",
    slides: int = 24,
    epochs: int = 12,
    base_lr: float = 0.3,
    **model: object,
) -> Path:
    """Fit a head on slides with and without such a region, painted at 1 / 16; the folder of the fitted head.

    Four of the slides are kept from training.
    """
    rows = []
    for number in range(slides):
        image = paint_planted(16, planted=number % 2 == 1, seed=10 + number)
        tiles = image.reshape(SIZE[1] // 256, 16, SIZE[0] // 256, 16, 3).swapaxes(1, 2)  # (rows, columns, 16, 16, 3)
        row, column = np.nonzero(tiles.mean(axis=(2, 3, 4)) < 235)
        cells = np.stack([column, row], axis=1)
        write_slide(
            folder / "train" / f"slide-{number:03d}.h5",
            colour_features(tiles[row, column]),
            cells,
            encoder="colour",
        )
        rows.append([f"slide-{number:03d}", number % 2])
    write_csv(folder / "labels.csv", ["slide_id", "label"], rows)
    task = write_task(folder / "task.yaml", classes=2)
    splits = write_splits(folder / "splits", (range(4, slides), (0, 1), (2, 3)))
    training = TrainingOptions(
        epochs=epochs, gradient_accumulation=4, base_lr=base_lr, device="cpu", replicates=0, workers=1, layer_decay=1.0
    )
    finetune(
        Inputs(str(task), str(folder / "train"), str(folder / "labels.csv"), str(splits), pretrained=""),
        folder / "tuned",
        Settings(model=ModelOptions(head=head, dropout=0.0, **model), training=training),
    )
    return folder / "tuned" / "fold_0"
