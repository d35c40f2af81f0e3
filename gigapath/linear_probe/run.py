"""A probe as `gigapath probe` and `gigapath.probe` run it: checked against what the folder holds, fitted, written.

What is wrong with names and options is told before torch is imported.
"""

import contextlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigapath.cohort.stage import Ownership, check_same
from gigapath.files import atomic_file, write_text_atomic
from gigapath.linear_probe.options import ProbeOptions, SlideProbeOptions, TileProbeOptions
from gigapath.options import to_dict
from gigapath.progress import Progress
from gigapath.tables import csv_text

if TYPE_CHECKING:
    from gigapath.linear_probe.slides import SlideProbe
    from gigapath.linear_probe.tiles import TileProbe

# Where the published PCam embeddings and labels lie once downloaded.
PUBLISHED = "GigaPath_PCam_embeddings.zip"
# Embeddings made on the spot, for trying the probe without any download: a known linear rule under noise.
WIDTH = 256
TILES = {"train": 6000, "val": 1000, "test": 1000}
SLIDES = {"train": 30, "val": 10, "test": 10}
SEPARATION = 2.0  # distance of the two classes' means, in standard deviations


def run_probe(
    embeddings: str | Path | None,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    overwrite: bool = False,
    options: ProbeOptions,
    tiles: TileProbeOptions,
    slides: SlideProbeOptions,
    watch: Progress | None = None,
) -> "tuple[TileProbe | SlideProbe, list[str]]":
    """Probe slides where `slides.embedding` names their embedding, else tiles; write the results.

    Args:
        embeddings: tiles: a zip, folder or file of embeddings; slides: the output folder of a run; None makes some of
            tiles by a planted rule.
        out: the folder of the results.
        labels: CSV; not needed where the embeddings carry their labels.
        overwrite: probe again where the folder holds results of other options.
        options: columns, intervals, what to allow.
        tiles: the recipe of a probe of tiles.
        slides: embeddings, folds and repeats of a probe of slides.
        watch: receives the news of the reading.

    Returns:
        what was found, and the names of the files in the folder.

    Raises:
        FileNotFoundError, ValueError: one sentence on what is wrong; nothing was written.
    """
    out = Path(out)
    given = {**to_dict(options), **to_dict(tiles if slides.embedding is None else slides)}
    with Ownership({out: given}):
        if not overwrite:
            _check_same(out, given)
        if slides.embedding is not None:
            if embeddings is None:
                raise ValueError("--demo: expected a probe of tiles. Leave out --embedding.")
            from gigapath.linear_probe.slides import probe_slides, write_slide_report

            of_slides = probe_slides(embeddings, labels, options, slides)
            return of_slides, write_slide_report(out, of_slides)
        if embeddings is None:
            embeddings, labels = write_planted(out / "demo")
        elif any(Path(embeddings).glob("slides_*/*.h5")):
            raise ValueError(
                f"{embeddings}: expected embeddings of tiles with a label each, got the output of a run. "
                "To probe its slides name their embedding, such as --embedding tile-mean."
            )
        elif Path(embeddings).name == PUBLISHED and not Path(embeddings).exists():
            raise FileNotFoundError(
                f"{embeddings}: no such file. Get it (2 GB) with `gigapath download pcam`, or try without: --demo."
            )
        from gigapath.linear_probe.tiles import probe_tiles, write_tile_report

        of_tiles = probe_tiles(embeddings, labels, options, tiles, watch=watch)
        return of_tiles, write_tile_report(out, of_tiles)


def _check_same(out: Path, given: dict[str, Any]) -> None:
    """Refuse to put results of other options in place of those that are there."""
    before = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads((out / "results.json").read_text(encoding="utf-8"))["options"]
    if isinstance(before, dict):
        check_same(out, before, json.loads(json.dumps(given)))


def write_planted(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write `embeddings.zip` (one `.pt` per tile, the split in its path) and `labels.csv` into a folder.

    Two classes, normal with unit variance, whose means lie `SEPARATION` apart along a random direction.

    Returns:
        the zip and the CSV.
    """
    import numpy as np
    import torch

    generator = np.random.default_rng(seed)
    direction = generator.normal(size=WIDTH)
    direction *= SEPARATION / np.linalg.norm(direction)
    rows: list[list[object]] = [["input", "label", "split", "slide"]]
    archive, labels = folder / "embeddings.zip", folder / "labels.csv"
    with atomic_file(archive) as temporary, zipfile.ZipFile(temporary, "w") as packed:
        for split in TILES:
            for number in range(TILES[split]):
                label = number % 2
                name = f"{split}_{number:05d}.pt"
                content = io.BytesIO()
                vector = generator.normal(size=WIDTH) + (label - 0.5) * direction
                torch.save(torch.from_numpy(vector.astype(np.float32)), content)
                packed.writestr(f"planted/{split}/{name}", content.getvalue())
                rows.append([name, label, split, f"{split}-slide-{number % SLIDES[split]}"])
    write_text_atomic(labels, csv_text(rows))
    return archive, labels


def bayes_accuracy() -> float:
    """The accuracy that no rule can beat on these data."""
    return 0.5 * (1 + math.erf(SEPARATION / 2 / math.sqrt(2)))
