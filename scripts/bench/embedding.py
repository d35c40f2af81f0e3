"""What reading, moving and writing cost around the tile encoder: `embed` end to end against its parts alone.

The end-to-end turns go through the stages of `gigapath embed` as they are, from the tiles' file and the slide to a
flushed, verified feature file and its status; what comes before (finding tissue) and after (the slide encoder) is left
out. One turn is several slides, all of them the same file, so that borders between slides are part of it.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun
from gigapath.devices import resolve_device, resolve_precision
from gigapath.embedding.features_stage import EmbedJob, FeatureStage
from gigapath.embedding.forward import DeviceProbe, PlainForward, choose_forward
from gigapath.embedding.options import RunOptions
from gigapath.embedding.run import default_batch_size
from gigapath.embedding.slides import open_entry
from gigapath.embedding.tiling import GivenTiles
from gigapath.features import Tiles, write_tiles
from gigapath.hub import download
from gigapath.options import Options, option
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.tile_encoder import TileEncoder, load_tile_encoder
from scripts.bench.protocol import Work, compare
from scripts.bench.tile_encoder import Sender

ENCODER_BAR, READER_BAR = 0.93, 0.85


@dataclass(frozen=True)
class EmbedBench(Options):
    """What `python -m scripts.bench embed` measures."""

    slide: str | None = option(None, "a slide (default: the demo slide, fetched where it is missing)", metavar="FILE")
    tile_encoder: str = option(
        "gigapath-flash",
        "the architecture; its weights are random",
        choices=("gigapath", "gigapath-flash", "standin"),
    )
    tiles: int = option(24, "tiles of each slide that the encoder gets", at_least=1)
    slides: int = option(4, "slides of a turn, all the same file", at_least=1)
    batch_size: int | None = option(None, "tiles per batch (default: that of embed)", at_least=1)
    workers: int | None = option(None, "threads that read tiles (default: one per core)", at_least=0)
    precision: str = option("auto", "fp16 on CUDA, fp32 elsewhere", choices=("auto", "fp32", "fp16", "bf16"))
    pairs: int = option(7, "pairs of turns, end to end and the part alone", at_least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE")


HEADING = (
    "| what | tiles a turn | end to end, tiles/s | alone, tiles/s | ratio | bar | busiest stage |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class FreeEncoder(TileEncoder):
    """An encoder that costs nothing: what is left is reading, moving and writing."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Zeros (B, D)."""
        return torch.zeros((len(pixels), self.embed_dim))


def measure(options: EmbedBench) -> Iterator[dict[str, Any]]:
    """Measure one row after the other.

    Yields:
        Rows with `what` ("encoder" or "reader", the part that runs alone), `tiles` of a turn, `tiles_per_second` end to
        end, `alone_per_second`, `ratio` with `ratio_least` and `ratio_most`, `bar`, `met`, `busy` (share by stage in
        the last turn) and `waited_for`.
    """
    device = resolve_device(options.device)
    with device:  # random weights are drawn where they stay
        encoder = load_tile_encoder(
            options.tile_encoder,
            device=device,
            precision=resolve_precision(options.precision, device),
            random_weights=True,
        )
    workers = RunOptions(workers=options.workers).reading_threads()
    path = Path(options.slide) if options.slide else download("demo-slide")[0].path
    entries = [SlideEntry(f"slide-{number}", path) for number in range(options.slides)]
    with tempfile.TemporaryDirectory() as folder, open_entry(entries[0], TileOptions()) as slide:
        found = plan_tiles(slide, TileOptions(), workers=workers).tiles
        if not len(found):
            raise ValueError(f"--slide: expected a slide with tissue, got none in {path.name}. Name another.")
        some = found.take(np.arange(min(len(found), options.tiles)))
        pixels = next(pixels for _, pixels in iter_tiles(slide, some, batch_size=len(some), workers=workers))
        batch_size = options.batch_size or default_batch_size(encoder)
        made = _Turn(Path(folder) / "encoder", entries, some, encoder, batch_size, workers)
        batches = _batches(np.concatenate([pixels] * len(entries)), batch_size, made.forward)

        def encode() -> None:
            sender = Sender(made.forward)
            for batch in batches:
                sender.send(batch)
            sender.wait()

        yield _row("encoder", ENCODER_BAR, made, encode, options.pairs, device)

        free = FreeEncoder(**{each.name: getattr(encoder, each.name) for each in dataclasses.fields(encoder)})
        made = _Turn(Path(folder) / "reader", entries, found, free, batch_size, workers)

        def read() -> None:
            for entry in entries:
                with open_entry(entry, TileOptions()) as each:
                    for _ in iter_tiles(each, found, batch_size=batch_size, workers=workers):
                        pass

        yield _row("reader", READER_BAR, made, read, options.pairs, device)


def _batches(pixels: np.ndarray, batch_size: int, forward: PlainForward) -> list[Tensor]:
    """The tiles in batches of one shape, where they would lie in a run."""
    found = []
    for first in range(0, len(pixels), batch_size):
        some = pixels[first : first + batch_size]
        batch = torch.zeros((batch_size, *[forward.encoder.transform.resize] * 2, 3), dtype=torch.uint8)
        forward.encoder.transform.fit(some, batch.numpy()[: len(some)])
        found.append(batch.pin_memory() if forward.pinned else batch)
    return found


class _Turn:
    """Slides from their tiles' files to their feature files, as `gigapath embed` does it."""

    def __init__(
        self,
        folder: Path,
        entries: Sequence[SlideEntry],
        tiles: Tiles,
        encoder: TileEncoder,
        batch_size: int,
        workers: int,
    ) -> None:
        for entry in entries:
            write_tiles(folder / "tiles" / f"{entry.slide_id}.h5", dataclasses.replace(tiles, slide_id=entry.slide_id))
        self.tiles = len(entries) * len(tiles)
        self.stages: dict[str, Any] = {}
        self._folder, self._entries, self._encoder = folder, entries, encoder
        self._batch_size, self._workers = batch_size, workers
        self.forward, words = choose_forward(encoder, batch_size)
        self._probe = DeviceProbe((self.forward,), len(entries) > 1, 0.0, (words,))

    def __call__(self) -> None:
        run = CohortRun(self._folder, "embed", self._entries, [], {})
        features = FeatureStage(
            folder=self._folder / "features",
            tiles=GivenTiles(self._folder / "tiles"),
            tiling=TileOptions(),
            options=RunOptions(overwrite="features"),
            encoders=(self._encoder,),
            batch_size=self._batch_size,
            workers=self._workers,
            store="float32",
            run=run,
            probe=self._probe,
        )
        with EmbedJob(run, features, None) as job:
            job.announce(self._entries)
            for entry in self._entries:
                (status,) = job.work(entry)
                if not status.finished:
                    raise ValueError(f"bench embed: {status.error}")
        self.stages = run.facts["stages"]


def _row(
    what: str, bar: float, turn: _Turn, alone: Callable[[], None], pairs: int, device: torch.device
) -> dict[str, Any]:
    ratio = compare(Work(turn, turn.tiles), Work(alone, turn.tiles), pairs, device)
    return {
        "what": what,
        "tiles": turn.tiles,
        "tiles_per_second": ratio.ours,
        "alone_per_second": ratio.theirs,
        "ratio": ratio.median,
        "ratio_least": ratio.least,
        "ratio_most": ratio.most,
        "bar": bar,
        "met": ratio.median >= bar,
        "busy": turn.stages["busy"],
        "waited_for": turn.stages["waited_for"],
    }


_WHAT = {
    "encoder": "against the encoder on tiles in memory",
    "reader": "an encoder that costs nothing, against the reader alone",
}


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {_WHAT[row['what']]} | {row['tiles']:,} | {row['tiles_per_second']:.3g} | {row['alone_per_second']:.3g} | "
        f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f}) | {row['bar']:.2f} | "
        f"{row['waited_for']}, {row['busy'][row['waited_for']]:.0%} |"
    )
