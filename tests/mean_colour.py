"""An encoder without torch for runs that are killed: a tile's vector is the mean and spread of each of its colours.

`colours` is all of it. `run_mean_colours` brings a cohort through tiles, tile embeddings and slide embeddings with it,
in this process or over Ray, by the code that every run goes through but for torch's part: a process that takes
another's place is there in a fraction of the seconds that torch's import takes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

import gigapath.embedding.tiling
from gigapath.cohort.manifest import SlideEntry, find_slides, largest_first
from gigapath.cohort.run import CohortRun, RunResult
from gigapath.cohort.stage import Outcome, Stage, digest
from gigapath.cohort.status import Status
from gigapath.embedding.options import RunOptions
from gigapath.embedding.slides import open_entry
from gigapath.embedding.tiling import TileStage
from gigapath.features import SlideEmbeddings, TileEmbeddingsWriter, write_slide
from gigapath.features.gigapath_file import KeptRows
from gigapath.files import write_bytes_atomic
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.tiling import TileOptions
from gigapath.progress import Plan, Progress

NAME = "mean-colour"
WIDTH = 6
TILING = TileOptions(tile_size=64)
_BATCH = 8


def colours(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean and standard deviation of red, green and blue of each tile, in float32 (B, 6).

    From whole sums of bytes, so a tile's vector is the same to the last bit wherever it stands.

    Args:
        pixels: uint8 (B, T, T, 3).
    """
    values = pixels.reshape(len(pixels), -1, 3).astype(np.int64)
    mean, square = values.mean(axis=1), (values**2).mean(axis=1)
    return np.concatenate([mean, np.sqrt(square - mean**2)], axis=1).astype(np.float32) / 255


def plain() -> contextlib.ExitStack:
    """Within it no previews are drawn, and nothing is flushed: what a killed process has written, the system has."""
    stack = contextlib.ExitStack()
    pictures = {
        "preview_picture": lambda _, overview: overview,
        "write_preview": lambda path, *_, **__: write_bytes_atomic(path, b"a picture"),
    }
    stack.enter_context(mock.patch.multiple(gigapath.embedding.tiling, **pictures))
    stack.enter_context(mock.patch("os.fsync", lambda _: None))
    return stack


def run_mean_colours(slides: Path, out: Path, options: RunOptions, watch: Progress | None = None) -> RunResult:
    """Tiles, tile embeddings and slide embeddings of a folder of slides, by `options.engine`."""
    entries = find_slides([slides], exclude=out)
    stages = [out / "tiles", out / f"features_{NAME}", out / f"slides_mean__{NAME}"]
    run = CohortRun(out, "embed", entries, stages, {}, watch=watch or Progress())
    job = MeanColourJob(run)
    todo = [entry for entry in entries if not job.is_done(entry)]

    def plan() -> Plan:
        return Plan((), len(entries), len(entries) - len(todo))

    if options.engine == "ray":
        from gigapath.cohort.ray_tasks import RayTasks

        with RayTasks(run, address=options.ray_address, cores=options.worker_cores, device="none") as workers:
            workers.start(worker_job)
            return run.over_slides(largest_first(todo, out / "tiles"), workers.process, plan)
    with plain():
        return run.over_slides(todo, run.in_process(job.work), plan)


def worker_job(run: CohortRun, found: None) -> tuple["MeanColourJob", None]:
    """The job of one of Ray's workers."""
    plain()  # for good: the process is this run's
    return MeanColourJob(run), None


@dataclass
class ColourStage(Stage):
    """Tile embeddings of a slide."""

    before: TileStage
    options: RunOptions
    run: CohortRun
    name = "features"

    def __post_init__(self) -> None:
        self.folder = self.run.out / f"features_{NAME}"

    def identity(self, entry: SlideEntry) -> dict[str, Any]:
        return {"encoder": NAME, "before": self.before.digest(entry)}

    def make(self, entry: SlideEntry, identity: Mapping[str, Any]) -> Outcome:
        tiles, path, named = self.before.read(entry), self.path(entry), digest(identity)
        kept = KeptRows(path, named, (len(tiles), WIDTH), np.dtype("float32"), step=_BATCH)
        start, attrs = kept.find(), {"encoder": NAME, "identity": named}
        with (
            open_entry(entry, TILING) as slide,
            TileEmbeddingsWriter(path, tiles, embed_dim=WIDTH, attrs=attrs, kept=kept) as writer,
        ):
            for first, pixels in iter_tiles(slide, tiles, batch_size=_BATCH, start=start):
                self.run.stop.check()
                writer.write(first, colours(pixels))
        return Outcome("done" if len(tiles) else "no_tissue", len(tiles), digest=named)


@dataclass
class MeanStage(Stage):
    """The mean of a slide's tile embeddings."""

    before: ColourStage
    options: RunOptions
    name = "slides"

    def __post_init__(self) -> None:
        self.folder = self.before.run.out / f"slides_mean__{NAME}"

    def identity(self, entry: SlideEntry) -> dict[str, Any]:
        return {"encoder": NAME, "before": self.before.digest(entry)}

    def make(self, entry: SlideEntry, identity: Mapping[str, Any]) -> Outcome:
        from gigapath.features import read_features

        tiles, named = read_features(self.before.path(entry)), digest(identity)
        if not len(tiles):
            return Outcome("no_tissue")
        mean = tiles.features.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
        attrs = {"encoder": NAME, "identity": named}
        write_slide(self.path(entry), SlideEmbeddings(slide_id=entry.slide_id, attrs=attrs, tile_mean=mean))
        return Outcome(tiles=len(tiles), digest=named)


class MeanColourJob:
    """Brings a slide through the three stages; what is done and holds is left as it is."""

    def __init__(self, run: CohortRun) -> None:
        options = RunOptions(workers=0)
        self.run, tiles = run, TileStage(run.out, TILING, options)
        features = ColourStage(tiles, options, run)
        self.stages: list[Stage] = [tiles, features, MeanStage(features, options)]

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        """Nothing is read ahead."""

    def is_done(self, entry: SlideEntry) -> bool:
        return all(stage.done(entry) is not None for stage in self.stages)

    def work(self, entry: SlideEntry) -> list[Status]:
        statuses = self.run.through(self.stages, entry)
        return statuses or [status for stage in self.stages if (status := stage.done(entry)) is not None]
