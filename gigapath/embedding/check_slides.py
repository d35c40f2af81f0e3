"""Tiles read again from their slide, and their embeddings beside those of the file."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.cohort.manifest import SlideEntry, find_slides
from gigapath.embedding.options import CheckOptions
from gigapath.features.cells import all_facts, tile_pixels
from gigapath.features.check import FileReport
from gigapath.features.data import Contents
from gigapath.features.reading import read_contents
from gigapath.findings import NOTE, Finding
from gigapath.preprocessing.reading import resample
from gigapath.preprocessing.slide import Slide, open_slide
from gigapath.tile_encoder import TileEncoder, load_tile_encoder

# Cosines below these are another result. Ours: half precision and another device move it by 1e-3 at the most. Other
# tools resample with filters of their own, from levels of their own.
TOLERANCE_OURS = 0.999
TOLERANCE_OTHERS = 0.95
_SEED = 0
# Findings of files whose tiles have no place to be read again at.
_UNUSABLE = ("shapes", "coords-not-finite", "no-tiles")

Float32Array = npt.NDArray[np.float32]


@dataclass
class SlideCheck:
    """Compares files of tile embeddings with their slides; encoders are loaded once."""

    options: CheckOptions
    _slides: dict[str, SlideEntry] | None = None
    _encoders: dict[str, TileEncoder | str] = field(default_factory=dict)

    def check(self, report: FileReport) -> list[Finding]:
        """What the slide says about a file that was checked; nothing where it holds no tiles that could be compared.
        ValueError or OSError where the slides that are named can't be listed."""
        unusable = any(finding.name in _UNUSABLE for finding in report.findings)
        if report.kind != "tile embeddings" or unusable:
            return []
        held = read_contents(report.path, tile_size_level0=self.options.tile_size_level0)
        if self._slides is None:
            self._slides = {entry.slide_id: entry for entry in find_slides([str(self.options.slides)])}
        entry = self._slides.get(held.slide_id)
        if entry is None:
            return [_skipped(f"no slide {held.slide_id!r} is among those of --slides")]
        encoder = self._encoder(held)
        if isinstance(encoder, str):
            return [_skipped(encoder)]
        try:
            with open_slide(entry.path, slide_id=entry.slide_id, slide_mpp=entry.mpp) as slide:
                return compare_tiles(held, slide, encoder, sample=self.options.sample)
        except (ValueError, OSError) as error:
            return [Finding("slide-unreadable", str(error), "The embeddings can't be compared with it.")]

    def _encoder(self, held: Contents) -> TileEncoder | str:
        """The encoder to compare with, or why there is none."""
        name = self.options.tile_encoder or held.encoder
        if name is None:
            return "the file names no encoder; name it with --tile-encoder"
        if name not in self._encoders:
            try:
                random = name.endswith("-random")
                self._encoders[name] = load_tile_encoder(
                    name.removesuffix("-random"), device=self.options.device, precision="auto", random_weights=random
                )
            except (ValueError, OSError, ImportError) as error:
                self._encoders[name] = f"the encoder {name!r} can't be loaded ({str(error).rstrip('.')})"
        return self._encoders[name]


def _skipped(why: str) -> Finding:
    return Finding("not-compared", f"its tiles were not compared with a slide: {why}.", state=NOTE)


def compare_tiles(held: Contents, slide: Slide, encoder: TileEncoder, *, sample: int) -> list[Finding]:
    """Embed `sample` tiles of a file again, spread at random (always the same ones), by what made its embeddings.
    `held` is ours, or another tool's with level-0 coordinates and a known step. ValueError where a tile can't be read.
    """
    assert held.features is not None and held.coords is not None
    if held.frame != "level0" or held.step is None:
        return [_skipped("its coordinates are not level-0 pixels of a known step")]
    if held.features.shape[1] != encoder.embed_dim:
        text = f"its embeddings have {held.features.shape[1]} values, those of {encoder.name} {encoder.embed_dim}."
        return [Finding("width", text, "They are another encoder's.")]
    size = all_facts(held.attrs).get("slide_size")
    if isinstance(size, tuple | list) and tuple(size) != slide.dimensions:
        text = f"it was made of a slide of {size[0]} x {size[1]} pixels; this one has {slide.dimensions}."
        return [Finding("other-slide", text, "Its embeddings are of another slide, or of another version of it.")]
    findings = []
    stated = held.attrs.get("weights_sha256")
    if held.tool == "gigapath" and stated is not None and stated != encoder.weights_sha256:
        text = (
            f"its encoder's weights have sha256 {str(stated)[:12]}, those at hand {str(encoder.weights_sha256)[:12]}."
        )
        findings.append(Finding("other-weights", text, "They can't be compared with embeddings of these weights."))
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(held.features))[:sample])
    again, stored = _unit(encoder.encode(_read(held, slide, rows))), _unit(held.features)
    tolerance = TOLERANCE_OURS if held.tool == "gigapath" else TOLERANCE_OTHERS
    cosines = (again * stored[rows]).sum(axis=1)
    bad = np.flatnonzero(~(cosines >= tolerance))
    if len(bad) == 0:
        return findings
    row, worst = int(rows[bad[0]]), float(np.nanmin(cosines)) if np.isfinite(cosines).any() else float("nan")
    nearest = int(np.nanargmax(stored @ again[bad[0]]))
    if nearest != row and float(stored[nearest] @ again[bad[0]]) >= tolerance:
        text = (
            f"{len(bad)} of {len(rows)} tiles read again have the embedding of another row: that of row {row} "
            f"stands in row {nearest}."
        )
        effect = "Embeddings and coordinates are shuffled: each place of the slide gets another's tissue."
        return [*findings, Finding("shuffled", text, effect)]
    text = (
        f"{len(bad)} of {len(rows)} tiles read again give another embedding: cosine {worst:.4f} at the worst, expected "
        f"{tolerance} or more."
    )
    effect = "The file is of another slide, encoder, scale or place than it says, or its pixels were read otherwise."
    return [*findings, Finding("other-embeddings", text, effect)]


def _read(held: Contents, slide: Slide, rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The pixels (n, T, T, 3) of some rows: ours as they were read, other tools' from level 0."""
    assert held.coords is not None and held.step is not None
    size = tile_pixels(held.attrs, held.tool) or 256
    level, read_size = held.attrs.get("level"), held.attrs.get("read_size")
    if level is None or read_size is None or "converted_from" in held.attrs:
        level, read_size = 0, (round(held.step[0]), round(held.step[1]))
    corners = np.rint(held.coords[rows]).astype(np.int64)
    places = np.concatenate([corners, np.broadcast_to(np.array(read_size), corners.shape)], axis=1)
    read = slide.reads(int(level), places)
    pixels = np.empty((len(rows), size, size, 3), np.uint8)
    for index, row in enumerate(pixels):
        row[...] = resample(read(index, None), (size, size))
    return pixels


def _unit(vectors: npt.NDArray[Any]) -> Float32Array:
    wide = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.maximum(lengths, 1e-12), dtype=np.float32)
