"""Probes of frozen embeddings: a linear layer on tiles by the published recipe, logistic regression, nearest
neighbours; and the same question asked of slide embeddings.

Here are the options, and a probe as `gigapath probe` and `gigapath.probe` run it: checked against what the folder
holds, fitted, written. What is wrong with names and options is told before torch is imported.
"""

import contextlib
import io
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gigapath.files import atomic_file, write_text_atomic
from gigapath.options import (
    LEAVE_SITE_OUT,
    BootstrapOptions,
    DeviceOptions,
    EncoderOptions,
    IdOptions,
    option,
    to_dict,
)
from gigapath.progress import Progress

if TYPE_CHECKING:
    from gigapath.linear_probe.slides import SlideProbe
    from gigapath.linear_probe.tiles import TileProbe


SOLVERS = ("sgd", "lbfgs", "knn")


@dataclass(frozen=True)
class ProbeOptions(BootstrapOptions):
    """What probes of tiles and of slides share: columns, what to allow, intervals."""

    label: str = option("label", "column of the label", metavar="COL")
    split: str | None = option(
        None,
        "column of the split (tiles: default split, else the embeddings' own paths; slides: default folds)",
        metavar="COL",
    )
    group: str | None = option(
        None,
        "column of the patient or slide; intervals draw whole groups "
        "(default: group, patient_id, patient, slide_id, slide or wsi where the CSV has one)",
        metavar="COL",
    )
    positive: str | None = option(
        None, "of two classes the positive one (default: the later in order)", metavar="LABEL"
    )
    allow_missing: bool = option(False, "go on where labels lack embeddings or embeddings lack labels")
    allow_leakage: bool = option(False, "continue where a group is in several splits")


@dataclass(frozen=True)
class TileProbeOptions(DeviceOptions):
    """A probe of tile embeddings."""

    solver: str = option(
        "sgd", "sgd = the published recipe; lbfgs = logistic regression; knn = nearest neighbours", choices=SOLVERS
    )
    steps: int = option(4000, "sgd: steps", at_least=1)
    batch_size: int = option(128, "sgd: tiles a step, drawn with replacement, fresh at every step", at_least=1)
    lr: float = option(0.02, "sgd: first learning rate; falls to 0 along a cosine", above=0)
    weight_decay: float = option(0.01, "sgd: weight decay", at_least=0)
    eval_every: int = option(100, "sgd: steps between looks at the validation set; the best one is kept", at_least=1)
    seeds: int = option(1, "sgd: repeat with this many seeds, from --seed on", at_least=1)
    pcam_meta: str | None = option(
        None, "folder of PCam's own meta files: groups tiles by slide where names and labels fit them", metavar="DIR"
    )
    no_cache: bool = option(False, "neither use nor write the cache beside a zip or folder")


@dataclass(frozen=True)
class SlideProbeOptions(IdOptions):
    """A probe of slide embeddings, as `gigapath embed` writes them."""

    embedding: str | None = option(
        None,
        "probe slides instead of tiles: names of slide embeddings, with commas; tile-mean comes beside",
        metavar="NAMES",
    )
    task: str | None = option(
        None, "task file (gigapath init-task) of classes, survival or regression, instead of --label", metavar="YAML"
    )
    folds: int | Literal["leave-site-out"] = option(
        5,
        "folds, stratified by label and grouped by --group; or leave-site-out = one a site, drawn once",
        choices=(LEAVE_SITE_OUT,),
        metavar="N",
        at_least=2,
    )
    repeats: int = option(5, "how often the folds are drawn anew", at_least=1)
    test_embeddings: str | None = option(
        None, "slide embeddings of another cohort: one fit on all slides is tested on it, without folds", metavar="DIR"
    )
    test_labels: str | None = option(None, "that cohort's labels, as --labels", metavar="CSV")
    lock: bool | None = option(None, "lock that cohort as a test set, as gigapath predict --lock")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.test_labels is None) != (self.test_embeddings is None):
            raise ValueError("--test-labels: expected --test-embeddings beside it, and the other way round.")
        if self.lock and self.test_labels is None:
            raise ValueError("--lock: expected --test-labels CSV beside it, the test set. Name it.")


@dataclass(frozen=True)
class EmbedTilesOptions(EncoderOptions):
    """Tile images to embeddings."""

    tile_encoder: str = option(
        "gigapath", "gigapath, gigapath-flash, standin, timm:NAME, or a checkpoint of a released one", metavar="NAME"
    )
    batch_size: int = option(64, "tiles of a batch; a part of the numerics, so keep it in a comparison", at_least=1)


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
    from gigapath.cohort.stage import Ownership

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
    from gigapath.cohort.stage import check_same

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

    from gigapath.tables import csv_text

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
