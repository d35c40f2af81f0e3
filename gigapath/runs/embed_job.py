"""The work of `run_embed` on one slide: tiles, tile embeddings, slide embeddings, each kept and reused by itself."""

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.reuse import FAST_TRANSFORM, digest, finished, redone
from gigapath.cohort.status import Status, read_status
from gigapath.features import NUMERICS_VERSION, TileEmbeddingsWriter, Tiles, read_tiles
from gigapath.features.kept_rows import KeptRows
from gigapath.preprocessing.fast import reader_of_numbers
from gigapath.preprocessing.slide import SlideError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.runs.coming_slide import ComingSlide
from gigapath.runs.engine import CohortRun, Outcome
from gigapath.runs.machine import available_cores
from gigapath.runs.options import RunOptions
from gigapath.runs.slides import SlideStage
from gigapath.runs.tiling import tiles_digest, tiles_done, tiling_identities
from gigapath.tile_encoder import TileEncoder
from gigapath.tile_stream.busy import Snapshot, bottleneck
from gigapath.tile_stream.passes import PlainPass
from gigapath.tile_stream.settling import Settled
from gigapath.tile_stream.stream import TileStream
from gigapath.tile_stream.vectors import SlideVectors

# How often a run tells how busy its stages are.
_TELL_SECONDS = 1.0


@dataclass
class EmbedJob:
    """Brings slides through the stages: while one is encoded and written, the next is read and another one planned.

    Use it as a context manager: `announce` the slides, then `work` for each in that order; no thread is left.

    Attributes:
        run: the run; says when to stop.
        tiling: how slides are cut, where this run cuts them.
        options: how the run goes about it.
        encoders: the tile encoder, once a device; the same object where workers share it.
        batch_size: tiles of every batch that the encoder sees.
        workers: threads that read tiles.
        store: "float32" or "float16".
        features: folder of tile embeddings.
        tiles: folder of tiles.
        own_tiles: whether this run makes the tiles, or takes those of another folder.
        slides: the slide stage, or None.
        settled: how the devices are used; None for the plain way, a slide at a time.
        fast_transform: whether tiles that must shrink are read by the quick approximations.
    """

    run: CohortRun
    tiling: TileOptions
    options: RunOptions
    encoders: tuple[TileEncoder, ...]
    batch_size: int
    workers: int
    store: str
    features: Path
    tiles: Path
    own_tiles: bool
    slides: SlideStage | None
    settled: Settled | None = None
    fast_transform: bool = False
    _expected: dict[str, int] = field(default_factory=dict)
    _coming: deque[ComingSlide] = field(default_factory=deque)
    _stream: TileStream | None = None
    _told: Snapshot = (0.0, {})

    def __enter__(self) -> "EmbedJob":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._stream is not None:
            self._stream.__exit__(kind, error, trace)

    @property
    def encoder(self) -> TileEncoder:
        """The tile encoder, on its first device."""
        return self.encoders[0]

    def run_identity(self) -> dict[str, Any]:
        """The part of the tile embeddings' identity that all slides share."""
        return {
            "encoder": self.encoder.name,
            "weights_sha256": self.encoder.weights_sha256,
            "transform": self.encoder.transform_name,
            "precision": self.encoder.precision,
            "device": self.encoder.device.type,
            "batch_size": self.batch_size,
            "store": self.store,
            "reader": reader_of_numbers(self.options.reader),
            **({FAST_TRANSFORM: True} if self.fast_transform else {}),
            "numerics_version": NUMERICS_VERSION,
        }

    # ----------------------------------------------------------------------------------------------- what is done

    def is_done(self, entry: SlideEntry) -> bool:
        """Whether nothing is left to do for a slide."""
        features = self.features_done(entry, self.tiles_name(entry))
        if features is None:
            return False
        return self.slides is None or self.slides.done(entry.slide_id, features.digest) is not None

    def tiles_name(self, entry: SlideEntry) -> str | None:
        """The digest of the slide's tiles, where they are there and hold."""
        if self.own_tiles:
            status = tiles_done(self.tiles, entry, self.tiling, self.options)
            return None if status is None else status.digest
        with contextlib.suppress(ValueError, OSError):  # the stage itself says what is wrong with them
            return tiles_digest(self.read_tiles(entry), entry)
        return None

    def known_tiles(self, entry: SlideEntry) -> int | None:
        """How many tiles of a slide are still to be embedded; None where it is still to be tiled."""
        name = self.tiles_name(entry)
        if name is None:
            return None if self.own_tiles else 0
        if self.features_done(entry, name) is not None:
            return 0
        status = read_status(self.tiles, entry.slide_id) if self.own_tiles else None
        return status.tiles if status is not None else len(self.read_tiles(entry))

    def expect(self, tiles: dict[str, int]) -> None:
        """Take note of how many tiles each slide is thought to have; corrected slide by slide as they are tiled."""
        self._expected = dict(tiles)

    @property
    def expected(self) -> dict[str, int]:
        """By slide, how many tiles it is thought to have that are to be embedded."""
        return dict(self._expected)

    def redone(self, todo: Sequence[SlideEntry]) -> list[str]:
        """Sentences on results that are going to be made again because something that they depend on has changed."""
        tiles = tiling_identities(todo, self.tiling) if self.own_tiles else {}
        features = {entry.slide_id: self.run_identity() for entry in todo}
        return [*redone(self.tiles, tiles), *redone(self.features, features)]

    def features_done(self, entry: SlideEntry, tiles: str | None) -> Status | None:
        """The status of tile embeddings that hold; `tiles` names the tiles that they are of."""
        if tiles is None or self.options.overwrites("features"):
            return None
        return finished(self.features, entry.slide_id, self.identity(tiles), allow_mixed=self.options.allow_mixed)

    def identity(self, tiles: str) -> dict[str, Any]:
        """Everything that a slide's tile embeddings depend on; `tiles` names its tiles."""
        return {**self.run_identity(), "tiles": tiles}

    # ------------------------------------------------------------------------------------------------- the stages

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        """Say which slides are going to be worked on, in this order, so that they can be planned and read ahead."""
        self._coming.extend(ComingSlide(self, entry) for entry in entries)

    def work(self, entry: SlideEntry) -> list[Status]:
        """Bring a slide through what is left to do; the status of each stage that was done.

        Args:
            entry: the next of the slides announced, or one that was not announced, once all of those are through.
        """
        if not self._coming:
            self.announce([entry])
        stream = self._running_stream()
        slide = self._coming.popleft()
        assert slide.entry == entry, f"{slide.entry.slide_id} was announced before {entry.slide_id}"
        assert slide.vectors is not None
        try:
            slide.vectors.wait_prepared()
            return self._finish(slide, slide.vectors, stream)
        finally:
            slide.vectors.drop()
            self.run.facts["stages"] = self._stages(stream.busy.shares())

    def _running_stream(self) -> TileStream:
        """The stream, with every slide submitted that was announced."""
        if self._stream is None:
            passes = self.settled.passes if self.settled else tuple(PlainPass(encoder) for encoder in self.encoders)
            across = self.settled is not None and self.settled.across
            self._stream = TileStream(
                passes,
                self.batch_size,
                across=across,
                readers=max(1, self.workers),
                cores=available_cores(),
                check=self.run.stop.check,
            )
        for slide in self._coming:
            if slide.vectors is None:
                slide.vectors = self._stream.submit(slide)
        return self._stream

    def _finish(self, slide: ComingSlide, vectors: SlideVectors, stream: TileStream) -> list[Status]:
        """Take a slide's vectors and write them, then the slide's own embeddings."""
        entry, statuses = slide.entry, []
        if slide.tiled is not None:
            self._expect(entry, slide.tiled.tiles)
            statuses.append(slide.tiled)
            if not slide.tiled.finished:
                return statuses
        features = slide.features
        if features is None:
            identity = self.identity(slide.digest or "")
            written = _Clock()
            features = self.run.attempt(
                self.features,
                entry,
                "features",
                identity,
                lambda: self._embed_tiles(slide, identity, vectors, stream, written),
            )
            stream.busy.add("write", written.elapsed())
            statuses.append(features)
        if features.finished and self.slides is not None and not self.slides.done(entry.slide_id, features.digest):
            with stream.busy.working("slides"):
                statuses.append(self.slides.embed(self.run, entry, self._features_path(entry), features.digest))
        return statuses

    def _embed_tiles(
        self,
        slide: ComingSlide,
        identity: dict[str, Any],
        vectors: SlideVectors,
        stream: TileStream,
        written: "_Clock",
    ) -> Outcome:
        tiles = slide.checked_tiles()
        self._expect(slide.entry, len(tiles))
        attrs = {
            **{name: value for name, value in identity.items() if name != "tiles"},
            "batch_shape": (self.batch_size, tiles.tile_size, tiles.tile_size, 3),
            "trained": self.encoder.trained,
            "encoder_description": self.encoder.description,
            "tiles": identity["tiles"],
            "identity": digest(identity),
        }
        path = self._features_path(slide.entry)
        with (
            TileEmbeddingsWriter(
                path, tiles, embed_dim=self.encoder.embed_dim, dtype=self.store, attrs=attrs, kept=slide.kept
            ) as writer,
            contextlib.closing(vectors.blocks()) as blocks,
        ):
            for first, block in blocks:
                writer.write(first, block)
                self.run.watch.tiles(len(block))
                self._tell(stream)
            writer.amend(slide.reading)
            written.start()  # what follows is flushing and verifying
        facts = {
            "tile_encoder": self.encoder.name,
            "precision": self.encoder.precision,
            "device": self.encoder.device.type,
            "trained": self.encoder.trained,
            **slide.reading,
        }
        return Outcome(
            "done" if len(tiles) else "no_tissue",
            len(tiles),
            facts=facts,
            digest=digest(identity),
            since=vectors.encoding_since,
        )

    def kept_rows(self, entry: SlideEntry, identity: Mapping[str, Any], tiles: Tiles) -> KeptRows:
        """The rows of a slide that an earlier run has made safe, in whole batches; none where all are to be made again.

        A slide's rows may depend on their places in a batch, so a run goes on with a batch that begins where one began.
        """
        shape = len(tiles), self.encoder.embed_dim
        path, dtype = self._features_path(entry), np.dtype(self.store)
        kept = KeptRows(path, digest(identity), shape, dtype, step=self.batch_size)
        if self.options.overwrites("features"):
            kept.discard()
        return kept

    def _tell(self, stream: TileStream) -> None:
        """Tell whoever watches how busy the stages were of late."""
        if time.perf_counter() - self._told[0] < _TELL_SECONDS:
            return
        shares = stream.busy.shares(self._told if self._told[1] else None)
        self._told = stream.busy.snapshot()
        self.run.watch.busy(shares)

    def _stages(self, shares: dict[str, float]) -> dict[str, Any]:
        """How busy each stage was, for the run's record."""
        return {
            "busy": {stage: round(share, 3) for stage, share in shares.items()},
            "waited_for": bottleneck(shares),
            "batches_across_slides": self.settled is not None and self.settled.across,
        }

    def _expect(self, entry: SlideEntry, tiles: int) -> None:
        if self._expected.get(entry.slide_id) != tiles:
            self._expected[entry.slide_id] = tiles
            self.run.watch.expect(sum(self._expected.values()))

    def read_tiles(self, entry: SlideEntry) -> Tiles:
        """The slide's tiles, from their file."""
        path = self.tiles / f"{entry.slide_id}.h5"
        if not path.is_file():
            tiled = None if self.own_tiles else read_status(self.tiles, entry.slide_id)
            if tiled is not None and tiled.status == "failed":  # its reason is worth more than that it has no tiles
                raise SlideError(tiled.error)
            raise SlideError(
                f"slide {entry.slide_id!r}: expected its tiles, got none in the folder of --tiles. Tile it there first."
            )
        status = None if self.own_tiles else read_status(self.tiles, entry.slide_id)
        if status is not None and not status.finished:  # the file is an earlier run's, made with other options
            raise SlideError(
                f"slide {entry.slide_id!r}: expected its tiles, got those from before its last tiling, which ended as "
                f"{status.status!r}. Tile it again in the folder of --tiles."
            )
        return read_tiles(path)

    def _features_path(self, entry: SlideEntry) -> Path:
        return self.features / f"{entry.slide_id}.h5"


class _Clock:
    """Seconds since `start`; none where it was never started."""

    def __init__(self) -> None:
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        return 0.0 if self._started is None else time.perf_counter() - self._started
