"""The work of `run_embed` on one slide: tiles, tile embeddings, slide embeddings, each kept and reused by itself.

The stream's threads find out about a slide before its turn to be written comes.
"""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.reuse import digest
from gigapath.cohort.run import Outcome
from gigapath.cohort.status import Status
from gigapath.devices import device_identity
from gigapath.embedding.forward import DeviceProbe, PlainForward
from gigapath.embedding.slides import open_entry
from gigapath.embedding.stages import EmbedStages
from gigapath.embedding.stream import SlideVectors, Snapshot, TileStream
from gigapath.embedding.tiling import tile_slide, tiles_digest
from gigapath.features import TileEmbeddingsWriter, Tiles
from gigapath.features.kept_rows import KeptRows
from gigapath.machine import available_cores
from gigapath.preprocessing.reading import Take, filter_name, read_into
from gigapath.preprocessing.slide import Slide, SlideError


class ComingSlide:
    """One slide and what the stream's threads found out about it before its turn to be written came.

    Attributes:
        tiled: the status of the tiling, where this run tiled the slide.
        digest: names its tiles, where there are any.
        tiles: its tiles, where they are to be embedded.
        features: the status of its tile embeddings, where they were done before.
        kept: the rows of its tile embeddings that are safe already, and keeps more.
        reading: what reads its tiles (`reader`) and makes them their size (`filter`), where they are to be embedded.
        vectors: its vectors on their way.
    """

    __slots__ = (
        "_opened",
        "_problem",
        "_stages",
        "_start",
        "digest",
        "entry",
        "features",
        "kept",
        "reading",
        "tiled",
        "tiles",
        "vectors",
    )

    def __init__(self, stages: EmbedStages, entry: SlideEntry) -> None:
        self.entry = entry
        self.tiled: Status | None = None
        self.digest: str | None = None
        self.tiles: Tiles | None = None
        self.features: Status | None = None
        self.kept: KeptRows | None = None
        self.reading: dict[str, str] = {}
        self.vectors: SlideVectors | None = None
        self._stages = stages
        self._opened: Slide | None = None
        self._start = 0
        self._problem: Exception | None = None

    def prepare(self) -> None:
        """Find out what is left to do, tile the slide where that is to do, and open it to be read; called from the
        planner's thread, so that the slide before is read meanwhile."""
        stages = self._stages
        if not stages.own_tiles:
            self._prepare_given()
            return
        self.digest = stages.tiles_name(self.entry)
        if self.digest is None:
            self.tiled = tile_slide(stages.run, stages.tiles, self.entry, stages.tiling, stages.options)
            if not self.tiled.finished:
                return
            self.digest = self.tiled.digest
        self.features = stages.features_done(self.entry, self.digest)
        if self.features is None:
            try:  # from their file also where this run made them: the features' file is the same to the last byte then
                self.tiles = stages.read_tiles(self.entry)
            except (ValueError, OSError) as error:
                self._problem = error
                return
            self._begin(self.tiles)

    def _prepare_given(self) -> None:
        """Likewise with the tiles of another folder, which are read once."""
        stages = self._stages
        try:
            tiles = stages.read_tiles(self.entry)
            self.digest = tiles_digest(tiles, self.entry)
        except (ValueError, OSError) as error:
            self._problem = error
            return
        self.features = stages.features_done(self.entry, self.digest)
        if self.features is None:
            self.tiles = tiles
            self._begin(tiles)

    def _begin(self, tiles: Tiles) -> None:
        """Find where an earlier run came to, and open the slide."""
        stages = self._stages
        self.kept = stages.kept_rows(self.entry, stages.identity(self.digest or ""), tiles)
        self._start = 0 if self.kept is None else self.kept.find()
        try:
            self._opened = slide = open_entry(self.entry, stages.tiling, stages.options.reader)
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
            self._problem = error

    def checked_tiles(self) -> Tiles:
        """The tiles that are to be embedded, or what is wrong with them."""
        if self._problem is not None:
            raise self._problem
        assert self.tiles is not None
        return self.tiles

    def read(self, take: Take) -> None:
        """Read the slide's tiles into the places that `take` gives, where they are to be embedded; called from the
        reader's thread."""
        if self._opened is None or self.tiles is None or self._problem is not None:
            return
        stages = self._stages
        transform = stages.encoder.transform
        fit = None if transform.fits(self.tiles.tile_size) else transform.fit
        read_into(self._opened, self.tiles, take, fit=fit, workers=stages.workers, start=self._start)

    def close(self) -> None:
        """Let go of the slide's file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


# How often a run tells how busy its stages are.
_TELL_SECONDS = 1.0


@dataclass
class EmbedJob(EmbedStages):
    """Brings slides through the stages: while one is encoded and written, the next is read and another one planned.

    Use it as a context manager: `announce` the slides, then `work` for each in that order; no thread is left.

    Attributes (beside those of `EmbedStages`):
        probe: how the devices are used; None for the plain way, a slide at a time.
    """

    probe: DeviceProbe | None = None
    _expected: dict[str, int] = field(default_factory=dict)
    _coming: deque[ComingSlide] = field(default_factory=deque)
    _stream: TileStream | None = None
    _told: Snapshot = (0.0, {})

    def __enter__(self) -> "EmbedJob":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._stream is not None:
            self._stream.__exit__(kind, error, trace)

    def expect(self, tiles: dict[str, int]) -> None:
        """Take note of how many tiles each slide is thought to have; corrected slide by slide as they are tiled."""
        self._expected = dict(tiles)

    @property
    def expected(self) -> dict[str, int]:
        """By slide, how many tiles it is thought to have that are to be embedded."""
        return dict(self._expected)

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
            forwards = self.probe.forwards if self.probe else tuple(PlainForward(encoder) for encoder in self.encoders)
            across = self.probe is not None and self.probe.across
            self._stream = TileStream(
                forwards,
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
                statuses.append(self.slides.embed(self.run, entry, self.features_path(entry), features.digest))
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
        path = self.features_path(slide.entry)
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
            "device": device_identity(self.encoder.device),
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
            "waited_for": max(shares, key=lambda stage: shares[stage]),
            "batches_across_slides": self.probe is not None and self.probe.across,
        }

    def _expect(self, entry: SlideEntry, tiles: int) -> None:
        if self._expected.get(entry.slide_id) != tiles:
            self._expected[entry.slide_id] = tiles
            self.run.watch.expect(sum(self._expected.values()))


class _Clock:
    """Seconds since `start`; none where it was never started."""

    def __init__(self) -> None:
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        return 0.0 if self._started is None else time.perf_counter() - self._started
