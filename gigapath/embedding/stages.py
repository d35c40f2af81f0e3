"""The stages of `run_embed` for a slide: with what, into which folders, and what of them is done already."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.reuse import StageOptions, digest, finished
from gigapath.cohort.run import CohortRun
from gigapath.cohort.status import Status, read_status
from gigapath.devices import device_identity
from gigapath.embedding.options import RunOptions
from gigapath.embedding.slide_stage import SlideStage
from gigapath.embedding.tiling import tiled_with, tiles_digest, tiles_done
from gigapath.features import NUMERICS_VERSION, Tiles, read_tiles
from gigapath.features.kept_rows import KeptRows
from gigapath.preprocessing.fast import OPENSLIDE
from gigapath.preprocessing.slide import SlideError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.tile_encoder import TileEncoder


@dataclass
class EmbedStages:
    """Tiles, tile embeddings, slide embeddings: what a run makes them with, where they go, and which of them hold.

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
            "device": device_identity(self.encoder.device),
            "batch_size": self.batch_size,
            "store": self.store,
            "reader": OPENSLIDE,  # its numbers, whatever reads them
            "numerics_version": NUMERICS_VERSION,
        }

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

    def made_with(self, entries: Sequence[SlideEntry], cohort: Collection[str]) -> list[StageOptions]:
        """What the results of a run over these slides are made with, stage by stage."""
        features = dict.fromkeys((entry.slide_id for entry in entries), self.run_identity())
        shared, given = self.run_identity(), ["slide_bytes", "tiles"]
        if not self.own_tiles:  # another folder's tiles are chosen by an option
            given.remove("tiles")
            shared["given_tiles"] = digest({"folder": str(self.tiles.resolve())})
            names = {entry.slide_id: self.tiles_name(entry) for entry in entries}
            features = {slide_id: self.identity(name) for slide_id, name in names.items() if name is not None}
        made = StageOptions(
            folder=self.features,
            shared=shared,
            own=features,
            cohort=cohort,
            overwrite=self.options.overwrites("features"),
            allow_mixed=self.options.allow_mixed,
            given=given,
        )
        tiled = [tiled_with(self.tiles, entries, cohort, self.tiling, self.options)] if self.own_tiles else []
        if self.slides is None:
            return [*tiled, made]
        slides = self.slides.made_with([entry.slide_id for entry in entries], cohort)
        return [*tiled, made, replace(slides, overwrite=slides.overwrite or made.overwrite)]  # they follow from these

    def features_done(self, entry: SlideEntry, tiles: str | None) -> Status | None:
        """The status of tile embeddings that hold; `tiles` names the tiles that they are of."""
        if tiles is None or self.options.overwrites("features"):
            return None
        return finished(self.features, entry.slide_id, self.identity(tiles), allow_mixed=self.options.allow_mixed)

    def identity(self, tiles: str) -> dict[str, Any]:
        """Everything that a slide's tile embeddings depend on; `tiles` names its tiles."""
        return {**self.run_identity(), "tiles": tiles}

    def kept_rows(self, entry: SlideEntry, identity: Mapping[str, Any], tiles: Tiles) -> KeptRows | None:
        """The rows of a slide that an earlier run has made safe, in whole batches; None where all are to be made again.

        A slide's rows may depend on their places in a batch, so a run goes on with a batch that begins where one began.
        """
        shape = len(tiles), self.encoder.embed_dim
        path, dtype = self.features_path(entry), np.dtype(self.store)
        kept = KeptRows(path, digest(identity), shape, dtype, step=self.batch_size)
        if self.options.overwrites("features"):
            kept.discard()
            return None
        return kept

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

    def features_path(self, entry: SlideEntry) -> Path:
        """Where a slide's tile embeddings go."""
        return self.features / f"{entry.slide_id}.h5"
