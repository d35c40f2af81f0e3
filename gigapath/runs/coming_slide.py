"""A slide of `run_embed` on its way: what the stream's threads find out before its turn to be written comes."""

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.status import Status
from gigapath.embedding.batches import SlideVectors
from gigapath.features import Tiles
from gigapath.features.kept_rows import KeptRows
from gigapath.preprocessing.places import Take
from gigapath.preprocessing.reading import filter_of, read_into
from gigapath.preprocessing.slide import Slide, SlideError
from gigapath.runs.embed_stages import EmbedStages
from gigapath.runs.entries import open_entry
from gigapath.runs.tiling import tile_slide, tiles_digest


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
        self._start = self.kept.find()
        try:
            self._opened = slide = open_entry(
                self.entry, stages.tiling, stages.options.reader, fast_transform=stages.fast_transform
            )
            size = tiles.attrs.get("slide_size")
            if size is not None and tuple(size) != slide.dimensions:
                raise SlideError(
                    f"slide {self.entry.slide_id!r}: expected {size[0]} x {size[1]} pixels, as when it was tiled, got "
                    f"{slide.dimensions[0]} x {slide.dimensions[1]}. Tile it again: --overwrite tiles."
                )
            self.reading = {"reader": slide.fast.used(tiles.level), "filter": filter_of(slide, tiles)}
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
