"""The slide-encoder stage of one slide: from a file of tile embeddings, as stored, to `slides_*/<id>.h5`."""

import dataclasses
import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun
from gigapath.cohort.stage import Outcome, Stage, StageOptions, digest, section_name
from gigapath.devices import device_identity
from gigapath.embedding.slide_encoding import SlideEncoder, mean_of_rows
from gigapath.features import (
    SLIDE_NUMERICS_VERSION,
    SlideEmbeddings,
    TileEmbeddings,
    read_features,
    write_slide,
    write_tile_vectors,
)
from gigapath.features.data import Array, recipe_of
from gigapath.features.gigapath_file import check_ours, stage_of
from gigapath.features.h5 import check_undamaged, open_h5, read_attrs
from gigapath.options import KeepOptions

# What a slide's file repeats of its tile embeddings.
_CARRIED = ("encoder", "weights_sha256", "transform", "precision", "device", "batch_shape", "store", "mpp", "tile_size")


def slides_folder(out: Path, slide_encoder: str, tile_encoder: str, form: str = "slide") -> Path:
    """Where the embeddings of slides go, of their pieces (`form` "section"), one vector a tile (a name that ends with
    `:tiles`), or another tool's embedding (its name)."""
    pair = f"{slide_encoder}__{tile_encoder}"
    if recipe_of(form) is not None:
        return out / f"as-{form}_{pair}"
    if form in ("slide", "section"):
        return out / (f"slides_{pair}" if form == "slide" else f"slides_{pair}__sections")
    return out / f"contextual_{pair}__{form.removesuffix(':tiles').replace(':', '-')}"


class Features(Protocol):
    """Where a run's tile embeddings are."""

    def path(self, entry: SlideEntry) -> Path:
        """A slide's file."""

    def digest(self, entry: SlideEntry) -> str:
        """Names its content."""


@dataclass
class SlideStage(Stage):
    """From a slide's tile embeddings (`features`) to its own: `slides_*/<id>.h5`, by a slide encoder or the mean.

    `tile_size_level0` is what the user says of the step between tiles, for files of other tools; `tile_encoder` what
    all files must name, or None to ask nothing; `form` "slide" for one embedding a slide, "section" for one a connected
    piece of tissue, a name that ends with `:tiles` for one vector a tile, or a tool's for an embedding as that computes
    it.
    """

    folder: Path
    encoder: SlideEncoder
    features: Features
    options: KeepOptions
    run: CohortRun
    tile_size_level0: float | None = None
    tile_encoder: str | None = None
    form: str = "slide"
    name = "slides"

    def run_identity(self) -> dict[str, Any]:
        """The part of the identity that all slides share."""
        shared: dict[str, Any] = {"slide_encoder": self.encoder.name, "numerics_version": SLIDE_NUMERICS_VERSION}
        if self.encoder.model is None:  # a sum in float64 on the CPU, whatever the device
            return shared
        return {
            **shared,
            "weights_sha256": self.encoder.weights_sha256,
            "precision": self.encoder.precision,
            "device": device_identity(self.encoder.device),
        }

    def identity(self, entry: SlideEntry) -> dict[str, Any]:
        return {**self._chosen(), "features": self.features.digest(entry)}

    def _chosen(self) -> dict[str, Any]:
        step = {} if self.tile_size_level0 is None else {"tile_size_level0": self.tile_size_level0}
        form = {} if self.form == "slide" else {"form": self.form}
        return {**self.run_identity(), **step, **form}

    def made_with(self, entries: Sequence[SlideEntry], cohort: Collection[str]) -> StageOptions:
        """What the results of a run over these slides are made with."""
        own = dict.fromkeys((entry.slide_id for entry in entries), self._chosen())
        return self._made_with(self._chosen(), own, cohort)

    def make(self, entry: SlideEntry, identity: Mapping[str, Any]) -> Outcome:
        features, named = self.features.digest(entry), digest(identity)
        if self.form == "slide" or recipe_of(self.form) is not None:
            return self._embed_slide(entry, features, named)
        tiles = self._read(self.features.path(entry))
        if self.form == "section":
            return self._embed_sections(entry, tiles, features, named)
        return self._embed_tiles(entry, tiles, features, named)

    def _embed_slide(self, entry: SlideEntry, features: str, named: str) -> Outcome:
        result = self.path(entry)
        arrays, count, described = self._embeddings(entry)
        if count == 0:
            result.unlink(missing_ok=True)  # of an earlier run, which found tissue
            return Outcome("no_tissue")
        attrs = self._attrs(described, count, features, named)
        write_slide(result, SlideEmbeddings(slide_id=entry.slide_id, attrs=attrs, **arrays))
        return Outcome(tiles=count, facts=self._facts(attrs), digest=named)

    def _embed_sections(self, entry: SlideEntry, tiles: TileEmbeddings, features: str, named: str) -> Outcome:
        """One file a piece; positions stay those on the slide. Earlier files stay until all pieces are embedded."""
        if tiles.section is None:
            raise ValueError(
                "--per section: expected a file that says which piece of tissue each tile lies on, got one that does "
                "not. Tile the slide with gigapath tile."
            )
        made: list[SlideEmbeddings] = []
        pieces = [int(piece) for piece in np.unique(tiles.section) if piece > 0]
        for piece in pieces:
            of_piece = tiles.take(tiles.section == piece)
            attrs = self._attrs(_described(tiles), len(of_piece), features, named)
            name = section_name(entry.slide_id, piece)
            arrays = self.encoder.embed(of_piece, **self._heard(name))
            attrs = {**attrs, "of_slide": entry.slide_id, "section": piece}
            made.append(SlideEmbeddings(slide_id=name, attrs=attrs, **arrays))
        files = tuple(f"{section.slide_id}.h5" for section in made)
        for section, file in zip(made, files, strict=True):
            write_slide(self.folder / file, section)
        for earlier in self.folder.glob(f"{glob.escape(section_name(entry.slide_id, 0)[:-1])}*.h5"):
            if earlier.name not in files:
                earlier.unlink()
        if not made:
            return Outcome("no_tissue")
        left = int(np.count_nonzero(tiles.section == 0))
        warnings = (f"{left} tiles lie on no piece of tissue and are in no section's embedding.",) if left else ()
        facts = {**self._facts(attrs), "sections": len(pieces), "section_numbers": " ".join(map(str, pieces))}
        return Outcome(tiles=len(tiles), facts=facts, digest=named, warnings=warnings, files=files)

    def _embed_tiles(self, entry: SlideEntry, tiles: TileEmbeddings, features: str, named: str) -> Outcome:
        result = self.path(entry)
        if not len(tiles):
            result.unlink(missing_ok=True)
            return Outcome("no_tissue")
        vectors = self.encoder.embed_tiles(tiles, self.form, **self._heard(entry.slide_id))
        attrs = self._attrs(_described(tiles), len(tiles), features, named)
        # Whoever feeds these to a slide encoder as tile embeddings is told that they are none.
        attrs["encoder"] = f"{self.encoder.name}'s {self.form} of {tiles.encoder or 'an encoder without a name'}"
        attrs["of_encoder"] = tiles.encoder
        write_tile_vectors(result, dataclasses.replace(tiles, slide_id=entry.slide_id, features=vectors), attrs)
        return Outcome(tiles=len(tiles), facts=self._facts(attrs), digest=named)

    def _attrs(self, described: Mapping[str, Any], count: int, features: str, named: str) -> dict[str, Any]:
        """What a result's file records at its root."""
        return {
            **{name: described[name] for name in _CARRIED if name in described},
            "source": described["source"],
            "tiles": count,
            "slide_encoder": self.encoder.name,
            "slide_weights_sha256": self.encoder.weights_sha256,
            "slide_precision": self.encoder.precision,
            "slide_device": device_identity(self.encoder.device),
            "attention_kernel": self.encoder.kernel,
            "trained": self.encoder.trained and described.get("trained") is not False,
            "features": features,
            "identity": named,
            **({} if recipe_of(self.form) is None else {"recipe": self.form}),
        }

    def _facts(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        return {"slide_encoder": self.encoder.name, "trained": attrs["trained"]}

    def _heard(self, name: str) -> dict[str, Any]:
        """What the encoder calls within its layers, and after each."""
        return {"check": self.run.stop.check, "progress": partial(self.run.watch.layer, name)}

    def _embeddings(self, entry: SlideEntry) -> tuple[dict[str, Array], int, Mapping[str, Any]]:
        """The slide's embeddings by name, its number of tiles, and what the file of tile embeddings says of itself.

        The mean is streamed from our own files; the slide encoder takes the slide as a whole.
        """
        path = self.features.path(entry)
        if self.encoder.model is None and path.suffix not in (".npz", ".pt"):
            check_undamaged(path)
            with open_h5(path) as file:
                if stage_of(file) is not None:
                    check_ours(file, "features")
                    described = {**read_attrs(file), "source": "gigapath"}
                    self._check_encoder(described.get("encoder"))
                    count = len(file["features"])
                    return {"tile_mean": mean_of_rows(file["features"])[None]} if count else {}, count, described
        tiles = self._read(path)
        if not len(tiles):
            return {}, 0, _described(tiles)
        return self.encoder.embed(tiles, **self._heard(entry.slide_id)), len(tiles), _described(tiles)

    def _read(self, path: Path) -> TileEmbeddings:
        """The slide's tile embeddings, of the right encoder."""
        recipe = recipe_of(self.form)
        tiles = read_features(
            path,
            tile_size_level0=self.tile_size_level0,
            cells=self.encoder.model is not None,
            order="row-major" if recipe is None else "file",
        )
        self._check_encoder(tiles.encoder)
        self.encoder.check_pair(tiles.encoder, tiles.embed_dim)
        if recipe is None or not len(tiles):
            return tiles
        from gigapath.features.slide_vectors import tiles_as  # seldom asked for

        return tiles_as(tiles, recipe)

    def _check_encoder(self, found: str | None) -> None:
        if self.tile_encoder is not None and found != self.tile_encoder and not self.options.allow_mixed:
            raise ValueError(
                f"expected embeddings of {self.tile_encoder}, as of the other slides, got those of "
                f"{found or 'an encoder without a name'}. Keep one folder per tile encoder."
            )


def _described(tiles: TileEmbeddings) -> Mapping[str, Any]:
    return {**tiles.attrs, "encoder": tiles.encoder, "source": tiles.source}
