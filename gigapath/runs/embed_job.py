"""The work of `run_embed` on one slide: tiles, tile embeddings, slide embeddings, each kept and reused by itself."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.reuse import digest, finished, redone
from gigapath.cohort.status import Status, read_status
from gigapath.encoding import encode_padded, encode_tiles
from gigapath.features import NUMERICS_VERSION, TileEmbeddingsWriter, Tiles, read_tiles
from gigapath.preprocessing.reading import READER, UInt8Array, iter_tiles
from gigapath.preprocessing.slide import Slide, SlideError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.runs.engine import CohortRun, Outcome
from gigapath.runs.entries import open_entry
from gigapath.runs.options import RunOptions
from gigapath.runs.slides import SlideStage
from gigapath.runs.tiling import tile_slide, tiles_digest, tiles_done, tiling_identities
from gigapath.tile_encoder import TileEncoder


@dataclass
class EmbedJob:
    """Brings one slide after the other through the stages.

    Attributes:
        run: the run; says when to stop.
        tiling: how slides are cut, where this run cuts them.
        options: how the run goes about it.
        encoder: the tile encoder.
        batch_size: tiles of every batch that the encoder sees.
        workers: threads that read tiles.
        store: "float32" or "float16".
        features: folder of tile embeddings.
        tiles: folder of tiles.
        own_tiles: whether this run makes the tiles, or takes those of another folder.
        slides: the slide stage, or None.
    """

    run: CohortRun
    tiling: TileOptions
    options: RunOptions
    encoder: TileEncoder
    batch_size: int
    workers: int
    store: str
    features: Path
    tiles: Path
    own_tiles: bool
    slides: SlideStage | None
    _expected: dict[str, int] = field(default_factory=dict)

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
            "reader": READER,
            "numerics_version": NUMERICS_VERSION,
        }

    # ----------------------------------------------------------------------------------------------- what is done

    def is_done(self, entry: SlideEntry) -> bool:
        """Whether nothing is left to do for a slide."""
        features = self._features_done(entry, self.tiles_name(entry))
        if features is None:
            return False
        return self.slides is None or self.slides.done(entry.slide_id, features.digest) is not None

    def tiles_name(self, entry: SlideEntry) -> str | None:
        """The digest of the slide's tiles, where they are there and hold."""
        if self.own_tiles:
            status = tiles_done(self.tiles, entry, self.tiling, self.options)
            return None if status is None else status.digest
        with contextlib.suppress(ValueError, OSError):  # the stage itself says what is wrong with them
            return tiles_digest(self._read_tiles(entry), entry)
        return None

    def known_tiles(self, entry: SlideEntry) -> int | None:
        """How many tiles of a slide are still to be embedded; None where it is still to be tiled."""
        name = self.tiles_name(entry)
        if name is None:
            return None if self.own_tiles else 0
        if self._features_done(entry, name) is not None:
            return 0
        status = read_status(self.tiles, entry.slide_id) if self.own_tiles else None
        return status.tiles if status is not None else len(self._read_tiles(entry))

    def expect(self, tiles: dict[str, int]) -> None:
        """Take note of how many tiles each slide is thought to have; corrected slide by slide as they are tiled."""
        self._expected = dict(tiles)

    def redone(self, todo: Sequence[SlideEntry]) -> list[str]:
        """Sentences on results that are going to be made again because something that they depend on has changed."""
        tiles = tiling_identities(todo, self.tiling) if self.own_tiles else {}
        features = {entry.slide_id: self.run_identity() for entry in todo}
        return [*redone(self.tiles, tiles), *redone(self.features, features)]

    def _features_done(self, entry: SlideEntry, tiles: str | None) -> Status | None:
        if tiles is None or self.options.overwrites("features"):
            return None
        return finished(self.features, entry.slide_id, self._identity(tiles), allow_mixed=self.options.allow_mixed)

    def _identity(self, tiles: str) -> dict[str, Any]:
        return {**self.run_identity(), "tiles": tiles}

    # ------------------------------------------------------------------------------------------------- the stages

    def work(self, entry: SlideEntry) -> list[Status]:
        """Bring a slide through what is left to do; the status of each stage that was done."""
        statuses = []
        tiles = None
        name = self.tiles_name(entry)
        if name is None and self.own_tiles:
            status, tiles = tile_slide(self.run, self.tiles, entry, self.tiling, self.options)
            self._expect(entry, status.tiles)
            statuses.append(status)
            if not status.finished:
                return statuses
            name = status.digest
        features = self._features_done(entry, name)
        if features is None:
            identity = self._identity(name or "")
            features = self.run.attempt(
                self.features, entry, "features", identity, lambda: self._embed_tiles(entry, identity, tiles)
            )
            statuses.append(features)
        if features.finished and self.slides is not None and not self.slides.done(entry.slide_id, features.digest):
            statuses.append(self.slides.embed(self.run, entry, self._features_path(entry), features.digest))
        return statuses

    def _embed_tiles(self, entry: SlideEntry, identity: dict[str, Any], tiles: Tiles | None) -> Outcome:
        tiles = self._read_tiles(entry) if tiles is None else tiles
        self._expect(entry, len(tiles))
        attrs = {
            **{name: value for name, value in identity.items() if name != "tiles"},
            "batch_shape": (self.batch_size, tiles.tile_size, tiles.tile_size, 3),
            "trained": self.encoder.trained,
            "encoder_description": self.encoder.description,
            "tiles": identity["tiles"],
            "identity": digest(identity),
        }
        path = self._features_path(entry)
        with (
            open_entry(entry, self.tiling) as slide,
            TileEmbeddingsWriter(
                path, tiles, embed_dim=self.encoder.embed_dim, dtype=self.store, attrs=attrs
            ) as writer,
        ):
            size = tiles.attrs.get("slide_size")
            if size is not None and tuple(size) != slide.dimensions:
                raise SlideError(
                    f"slide {entry.slide_id!r}: expected {size[0]} x {size[1]} pixels, as when it was tiled, got "
                    f"{slide.dimensions[0]} x {slide.dimensions[1]}. Tile it again: --overwrite tiles."
                )
            with contextlib.closing(self._batches(slide, tiles)) as batches:
                encode_tiles(
                    batches, self.encoder, writer, batch_size=self.batch_size, after_batch=self.run.watch.tiles
                )
        facts = {
            "tile_encoder": self.encoder.name,
            "precision": self.encoder.precision,
            "device": self.encoder.device.type,
            "trained": self.encoder.trained,
        }
        return Outcome("done" if len(tiles) else "no_tissue", len(tiles), facts=facts, digest=digest(identity))

    def warm_up(self) -> None:
        """Encode one batch of nothing, of the run's shape."""
        size = self.tiling.tile_size
        encode_padded(np.zeros((1, size, size, 3), np.uint8), self.encoder, self.batch_size)

    def _batches(self, slide: Slide, tiles: Tiles) -> Generator[tuple[int, UInt8Array], None, None]:
        """The slide's tiles in batches, until a signal comes; closing it ends the readers."""
        batches = iter_tiles(slide, tiles, batch_size=self.batch_size, workers=self.workers)
        for batch in batches:
            self.run.stop.check()
            yield batch

    def _expect(self, entry: SlideEntry, tiles: int) -> None:
        if self._expected.get(entry.slide_id) != tiles:
            self._expected[entry.slide_id] = tiles
            self.run.watch.expect(sum(self._expected.values()))

    def _read_tiles(self, entry: SlideEntry) -> Tiles:
        path = self.tiles / f"{entry.slide_id}.h5"
        if not path.is_file():
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
