"""The stage from a slide's tiles to its tile embeddings, fed by a stream, and `EmbedJob`, which brings slides through
all stages of `run_embed`: while one is encoded and written, the next is read and another one planned."""

import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun
from gigapath.cohort.stage import Outcome, Stage, StageOptions, digest
from gigapath.cohort.status import Status, read_status
from gigapath.devices import device_identity
from gigapath.embedding.forward import DeviceProbe, PlainForward
from gigapath.embedding.options import RunOptions
from gigapath.embedding.slide_stage import SlideStage
from gigapath.embedding.slides import open_entry
from gigapath.embedding.stream import SlideVectors, Snapshot, TileStream
from gigapath.embedding.tiling import GivenTiles, TileStage
from gigapath.features import NUMERICS_VERSION, TileEmbeddingsWriter, Tiles
from gigapath.features.gigapath_file import KeptRows
from gigapath.machine import available_cores
from gigapath.preprocessing.fast import OPENSLIDE
from gigapath.preprocessing.reading import Take, filter_name, read_into
from gigapath.preprocessing.slide import Slide, SlideError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.tile_encoder import TileEncoder

# How often a run tells how busy its stages are.
_REPORT_SECONDS = 1.0


@dataclass
class FeatureStage(Stage):
    """From a slide's tiles to their embeddings: `features_*/<id>.h5`.

    Attributes:
        folder: of tile embeddings.
        tiles: the slides' tiles.
        tiling: the scale of slides that do not state theirs.
        options: how the run goes about it.
        encoders: the tile encoder, once a device; the same object where workers share it.
        batch_size: tiles of every batch that the encoder sees.
        workers: threads that read tiles.
        store: "float32" or "float16".
        probe: how the devices are used; None for the plain way, a slide at a time.
        streamed: the slides on their way, by id.
    """

    folder: Path
    tiles: TileStage | GivenTiles
    tiling: TileOptions
    options: RunOptions
    encoders: tuple[TileEncoder, ...]
    batch_size: int
    workers: int
    store: str
    run: CohortRun
    probe: DeviceProbe | None = None
    streamed: "dict[str, StreamedSlide]" = field(default_factory=dict)
    name = "features"
    _stream: TileStream | None = None
    _reported: Snapshot = (0.0, {})

    @property
    def encoder(self) -> TileEncoder:
        """The tile encoder, on its first device."""
        return self.encoders[0]

    def run_identity(self) -> dict[str, Any]:
        """The part of the identity that all slides share."""
        return {
            "encoder": self.encoder.name,
            "weights_sha256": self.encoder.weights_sha256,
            "transform": self.encoder.transform_name,
            "precision": self.encoder.precision,
            "device": device_identity(self.encoder.device),
            "batch_size": self.batch_size,
            "store": self.store,
            "reader": OPENSLIDE,  # its numbers, whatever reads them
            "numerics_version": NUMERICS_VERSION,
        }

    def identity(self, entry: SlideEntry) -> dict[str, Any]:
        return {**self.run_identity(), "tiles": self.tiles.digest(entry)}

    def made_with(self, entries: Sequence[SlideEntry], cohort: Collection[str]) -> StageOptions:
        """What the tile embeddings of a run over these slides are made with."""
        own: dict[str, dict[str, Any]] = dict.fromkeys((entry.slide_id for entry in entries), self.run_identity())
        shared, given = self.run_identity(), ["slide_bytes", "tiles"]
        if isinstance(self.tiles, GivenTiles):  # another folder's tiles are chosen by an option
            given.remove("tiles")
            shared["given_tiles"] = digest({"folder": str(self.tiles.folder.resolve())})
            own = {}
            for entry in entries:
                with contextlib.suppress(ValueError, OSError):  # the stage itself says what is wrong with them
                    own[entry.slide_id] = self.identity(entry)
        return self._made_with(shared, own, cohort, given=given)

    def kept_rows(self, entry: SlideEntry, tiles: Tiles) -> KeptRows | None:
        """The rows of a slide that an earlier run has made safe, in whole batches; None where all are to be made again.

        A slide's rows may depend on their places in a batch, so a run goes on with a batch that begins where one began.
        """
        shape = len(tiles), self.encoder.embed_dim
        named = digest(self.identity(entry))
        kept = KeptRows(self.path(entry), named, shape, np.dtype(self.store), step=self.batch_size)
        if self.options.overwrites("features"):
            kept.discard()
            return None
        return kept

    def stream(self) -> TileStream:
        """The stream, with every slide submitted that is on its way."""
        if self._stream is None:
            plain = tuple(PlainForward(encoder) for encoder in self.encoders)
            self._stream = TileStream(
                plain if self.probe is None else self.probe.forwards,
                self.batch_size,
                across=self.probe is not None and self.probe.across,
                readers=max(1, self.workers),
                cores=available_cores(),
                check=self.run.stop.check,
            )
        for slide in self.streamed.values():
            if slide.vectors is None:
                slide.vectors = self._stream.submit(slide)
        return self._stream

    def close(self, kind: type[BaseException] | None = None) -> None:
        """End the stream, and what it has in hand."""
        if self._stream is not None:
            self._stream.__exit__(kind, None, None)

    def make(self, entry: SlideEntry, identity: Mapping[str, Any]) -> Outcome:
        slide, stream = self.streamed[entry.slide_id], self.stream()
        if slide.problem is not None:
            raise slide.problem
        tiles, vectors = slide.tiles, slide.vectors
        assert tiles is not None and vectors is not None
        attrs = {
            **{name: value for name, value in identity.items() if name != "tiles"},
            "batch_shape": (self.batch_size, tiles.tile_size, tiles.tile_size, 3),
            "trained": self.encoder.trained,
            "encoder_description": self.encoder.description,
            "tiles": identity["tiles"],
            "identity": digest(identity),
        }
        with (
            TileEmbeddingsWriter(
                self.path(entry),
                tiles,
                embed_dim=self.encoder.embed_dim,
                dtype=self.store,
                attrs=attrs,
                kept=slide.kept,
            ) as writer,
            contextlib.closing(vectors.blocks()) as blocks,
        ):
            for first, block in blocks:
                writer.write(first, block)
                self.run.watch.tiles(len(block))
                self._report_busy(stream)
            writer.amend(slide.reading)
            since = time.perf_counter()
        stream.busy.add("write", time.perf_counter() - since)  # to flush and verify
        facts = {
            "tile_encoder": self.encoder.name,
            "precision": self.encoder.precision,
            "device": device_identity(self.encoder.device),
            "trained": self.encoder.trained,
            "trained_on": self.encoder.trained_on,
            **slide.reading,
        }
        return Outcome(
            "done" if len(tiles) else "no_tissue",
            len(tiles),
            facts=facts,
            digest=digest(identity),
            since=vectors.encoding_since,
        )

    def _report_busy(self, stream: TileStream) -> None:
        """Tell whoever watches how busy the stages were of late."""
        if time.perf_counter() - self._reported[0] < _REPORT_SECONDS:
            return
        shares = stream.busy.shares(self._reported if self._reported[1] else None)
        self._reported = stream.busy.snapshot()
        self.run.watch.busy(shares)


@dataclass(slots=True, eq=False)
class StreamedSlide:
    """A slide on its way through the stream, which finds out about it before its turn to be written comes.

    `statuses` are of the stages before, where this run did them; `tiles` those to be embedded; `kept` the rows that are
    safe already, and keeps more; `reading` what reads its tiles (`reader`) and makes them their size (`filter`);
    `problem` what is wrong with it, for the stage to raise.
    """

    stage: FeatureStage
    entry: SlideEntry
    statuses: list[Status] = field(default_factory=list)
    tiles: Tiles | None = None
    kept: KeptRows | None = None
    reading: dict[str, str] = field(default_factory=dict)
    problem: Exception | None = None
    vectors: SlideVectors | None = None
    _opened: Slide | None = None
    _start: int = 0

    def prepare(self) -> None:
        """Tile the slide where that is to do, and open it where its tiles are to be embedded; called from the planner's
        thread, so that the slide before is read meanwhile."""
        stage = self.stage
        if isinstance(stage.tiles, TileStage):
            self.statuses = stage.run.through([stage.tiles], self.entry)
        if any(not status.finished for status in self.statuses) or stage.done(self.entry) is not None:
            return
        try:
            self.tiles = tiles = stage.tiles.read(self.entry)
            self.kept = stage.kept_rows(self.entry, tiles)
            self._start = 0 if self.kept is None else self.kept.find()
            self._opened = slide = open_entry(self.entry, stage.tiling, stage.options.reader)
            size = tiles.attrs.get("slide_size")
            if size is not None and tuple(size) != slide.dimensions:
                raise SlideError(
                    f"slide {self.entry.slide_id!r}: expected {size[0]} x {size[1]} pixels, as when it was tiled, got "
                    f"{slide.dimensions[0]} x {slide.dimensions[1]}. Tile it again: --overwrite tiles."
                )
            self.reading = {
                "reader": slide.fast.used(tiles.level),
                "filter": filter_name(tiles.read_size, tiles.tile_size),
            }
        except Exception as error:  # the slide's own, whatever it is
            self.problem = error

    def read(self, take: Take) -> None:
        """Read the slide's tiles into the places that `take` gives, where they are to be embedded; in the reader's
        thread."""
        if self._opened is None or self.tiles is None or self.problem is not None:
            return
        transform = self.stage.encoder.transform
        fit = None if transform.fits(self.tiles.tile_size) else transform.fit
        read_into(self._opened, self.tiles, take, fit=fit, workers=self.stage.workers, start=self._start)

    def close(self) -> None:
        """Let go of the slide's file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


@dataclass
class EmbedJob:
    """Brings slides through the stages, of which the tile embeddings' reads ahead: `announce` them, then `work` for
    each in that order. Use as a context manager; no thread is left. `slides` is None without a slide encoder;
    `expected` says by slide how many tiles are thought to be embedded, corrected as they are tiled."""

    run: CohortRun
    features: FeatureStage
    slides: SlideStage | None
    expected: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> "EmbedJob":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.features.close(kind)

    @property
    def stages(self) -> list[Stage]:
        """The stages that a slide goes through."""
        tiles = self.features.tiles
        before: list[Stage] = [tiles] if isinstance(tiles, TileStage) else []
        return [*before, self.features, *([] if self.slides is None else [self.slides])]

    def is_done(self, entry: SlideEntry) -> bool:
        """Whether nothing is left to do for a slide."""
        return all(stage.done(entry) is not None for stage in self.stages)

    def made_with(self, entries: Sequence[SlideEntry], cohort: Collection[str]) -> list[StageOptions]:
        """What the results of a run over these slides are made with, stage by stage."""
        tiles, features = self.features.tiles, self.features.made_with(entries, cohort)
        tiled = [tiles.made_with(entries, cohort)] if isinstance(tiles, TileStage) else []
        if self.slides is None:
            return [*tiled, features]
        slides = self.slides.made_with(entries, cohort)
        return [*tiled, features, replace(slides, overwrite=slides.overwrite or features.overwrite)]

    def known_tiles(self, entry: SlideEntry) -> int | None:
        """How many tiles of a slide are still to be embedded; None where it is still to be tiled."""
        tiles = self.features.tiles
        status = read_status(tiles.folder, entry.slide_id) if isinstance(tiles, TileStage) else None
        if isinstance(tiles, TileStage) and status is not None and status.status == "failed" and not status.retryable:
            with contextlib.suppress(ValueError, OSError):
                if digest(status.identity) == digest(tiles.identity(entry)):  # it is going to fail again
                    return 0
        if isinstance(tiles, TileStage) and tiles.done(entry) is None:
            return None
        if self.features.done(entry) is not None:
            return 0
        with contextlib.suppress(ValueError, OSError):  # the stage itself says what is wrong with them
            return len(tiles.read(entry)) if status is None else status.tiles
        return 0

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        """Say which slides are going to be worked on, in this order, so that they can be planned and read ahead."""
        for entry in entries:
            self.features.streamed[entry.slide_id] = StreamedSlide(self.features, entry)

    def work(self, entry: SlideEntry) -> list[Status]:
        """Bring a slide through what is left to do; the status of each stage that was done. It is the next of the
        slides announced, or one that was not announced, once all of those are through."""
        streamed = self.features.streamed
        if not streamed:
            self.announce([entry])
        stream = self.features.stream()
        while (first := next(iter(streamed))) != entry.slide_id:  # passed over by the run: its file is not there
            passed = streamed.pop(first).vectors
            assert passed is not None
            passed.drop()
        slide = streamed[entry.slide_id]
        assert slide.vectors is not None
        try:
            slide.vectors.wait_prepared()
            statuses = slide.statuses
            tiles = len(slide.tiles) if slide.tiles is not None else max((s.tiles for s in statuses), default=None)
            if tiles is not None and self.expected.get(entry.slide_id) != tiles:
                self.expected[entry.slide_id] = tiles
                self.run.watch.expect(sum(self.expected.values()))
            if all(status.finished for status in statuses):
                statuses += self.run.through([self.features], entry)
            if self.slides is not None and all(status.finished for status in statuses):
                with stream.busy.working("slides"):
                    statuses += self.run.through([self.slides], entry)
            return statuses
        finally:
            slide.vectors.drop()
            del streamed[entry.slide_id]
            shares = stream.busy.shares()
            self.run.facts["stages"] = {
                "busy": {stage: round(share, 3) for stage, share in shares.items()},
                "waited_for": max(shares, key=lambda stage: shares[stage]),
                "batches_across_slides": self.features.probe is not None and self.features.probe.across,
            }
