"""What `gigapath check` finds out by running encoders: whether tiles read again from their slide give the embeddings of
a file (`SlideCheck`), and how the slide vectors of other tools were computed (`Referee`).

The referee compares vectors with every way to compute them from their tile embeddings. A way is an order of the tiles,
a place of each in the encoder's grid and a readout (a state and a pooling); each is tried in float32, and what comes
near in the other precisions too. Named ways are those of `gigapath.features.slide_vectors`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gigapath.cohort.manifest import SlideEntry, find_slides
from gigapath.embedding.options import CheckOptions
from gigapath.embedding.slide_encoding import SlideEncoder, load_slide_encoder, mean_of_rows, usual_slide_encoder
from gigapath.features import TileEmbeddings, parse_embedding, read_features
from gigapath.features.cells import all_facts, tile_pixels
from gigapath.features.check import FileReport
from gigapath.features.data import Contents
from gigapath.features.folders import find_feature_files
from gigapath.features.reading import read_contents
from gigapath.features.slide_vectors import DEFAULT, ORDERS, PLACES, RECIPES, Recipe, read_slide_vectors, tiles_as
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


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    wide = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.maximum(lengths, 1e-12), dtype=np.float32)


# Relative distances |a - b| / |b|, averaged over slides: float32 moves a vector by less than EXACT from one device to
# another, half precision by less than ROUNDING.
EXACT, ROUNDING = 1e-5, 3e-2
# Slides that are compared, and those that decide which ways are worth the others.
_SLIDES, _FIRST = 20, 3
_DROPOUT_SLIDES, _DROPOUT_RUNS = 5, 4
# Fields of a recipe that order and place the tiles, by the word that a person reads.
_GEOMETRY = {"order": "order", "places": "places", "half_places": "coordinates in float16"}

NAMED = {"default": DEFAULT, **RECIPES}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Way:
    """One way to compute a slide embedding, and how near it comes to the vectors: `name` is of the named way that it
    is, or differs from by the fewest `changes` (such as {"pooling": "class"}); `cosine` and relative `distance` are
    averaged over slides; `precision` is that in which it comes nearest."""

    name: str
    changes: Mapping[str, str]
    recipe: Recipe
    distance: float
    cosine: float
    precision: str = "fp32"

    def __str__(self) -> str:
        changed = ", ".join(f"{what} {value}" for what, value in self.changes.items())
        return f"{self.name} with {changed}" if changed else self.name


@dataclass(frozen=True)
class Verdict:
    """What the vectors of a tool are, on so many `slides`: the `named` ways, nearest first; those that `fits` within
    rounding with the fewest changes (several where they cannot be told apart on these slides); with `dropout`, those
    whose runs in training mode differ from the vectors no more than from each other."""

    slides: int
    named: Sequence[Way]
    fits: Sequence[Way] = ()
    dropout: Sequence[Way] = ()


class Referee:
    """Says how vectors of slides were computed from `tiles` (slide id -> tile embeddings in the order of their file,
    with cells) by the encoder with the tools' weights; what several tools' vectors need is computed once."""

    def __init__(self, tiles: Mapping[str, TileEmbeddings], encoder: SlideEncoder) -> None:
        self._tiles, self._encoder = tiles, encoder
        depth = 0 if encoder.model is None else encoder.model.depth
        states = ["default", *(f"state:{state}" for state in range(depth + 1))]
        self._readouts = [f"{state}:{pooling}" for state in states for pooling in ("mean", "class")]
        self._named = {name: recipe for name, recipe in NAMED.items() if self._readout(recipe) in self._readouts}
        self._at: dict[str, SlideEncoder] = {}
        self._computed: dict[tuple[str, str, bytes, bytes], Array] = {}

    def judge(self, vectors: Mapping[str, Array]) -> Verdict:
        """Say how vectors, slide id -> (E,), were computed; ValueError where no slide is in common, or their width is
        neither the encoder's nor the tile embeddings'."""
        ids = sorted(set(vectors) & set(self._tiles))[:_SLIDES]
        if not ids:
            some = [", ".join(sorted(names)[:3]) for names in (vectors, self._tiles)]
            raise ValueError(f"expected vectors and tile embeddings of the same slides, got {some[0]} and {some[1]}.")
        width = len(vectors[ids[0]])
        if width == self._tiles[ids[0]].embed_dim:
            means = [_nearness(vectors[name], mean_of_rows(self._tiles[name].features)[None])[:, 0] for name in ids]
            distance, cosine = np.mean(means, axis=0).tolist()
            if distance <= ROUNDING:
                way = Way("tile-mean", {}, replace(DEFAULT, readout="tile-mean"), distance, cosine)
                return Verdict(len(ids), (way,), (way,))
        model = self._encoder.model
        if model is None or width != model.embed_dim:
            own = "none" if model is None else f"one of width {model.embed_dim}"
            raise ValueError(
                f"--slide-encoder {self._encoder.name}: expected the encoder that made these vectors, {width} wide, "
                f"got {own}. Name the one that the tool used."
            )
        return self._verdict(vectors, ids)

    def _verdict(self, vectors: Mapping[str, Array], ids: Sequence[str]) -> Verdict:
        """Try all ways on the first slides, the near ones and the named ones on all."""
        choices = itertools.product(ORDERS, PLACES, (False, True))
        ways = [replace(DEFAULT, order=order, places=places, half_places=half) for order, places, half in choices]
        first = self._try(vectors, ways, ids[:_FIRST])
        limit = max(10 * min(table[0].min() for table in first.values()), 1e-3)
        named = {_plain(recipe) for recipe in self._named.values()}
        kept = [way for way, table in first.items() if table[0].min() <= limit or way in named]
        found = {
            (way, readout): (*table[:, at].tolist(), "fp32")
            for way, table in self._try(vectors, kept, ids).items()
            for at, readout in enumerate(self._readouts)
        }
        best = min(distance for distance, _, _ in found.values())
        near = [key for key, (distance, _, _) in found.items() if distance <= max(3 * best, EXACT)]
        if EXACT < best <= ROUNDING:
            for precision in ("fp16", "bf16", "half"):
                for way, table in self._try(vectors, dict(near), ids, precision).items():
                    for at, readout in enumerate(self._readouts):
                        distance, cosine = table[:, at].tolist()
                        # Clearly nearer: on another device half precision rounds otherwise, and tells nothing.
                        if (way, readout) in near and distance < found[way, readout][0] / 3:
                            found[way, readout] = distance, cosine, precision
            best = min(found[key][0] for key in near)
        listed = [
            Way(name, {}, recipe, *found[key])
            for name, recipe in self._named.items()
            if (key := (_plain(recipe), self._readout(recipe))) in found and recipe.evaluated
        ]
        listed.sort(key=lambda way: way.distance)
        if best > ROUNDING:
            return Verdict(len(ids), listed, dropout=self._with_dropout(vectors, ids, listed))
        fits = []
        for way, readout in near:
            if found[way, readout][0] <= max(2 * best, EXACT):
                recipe, precision = replace(way, readout=readout), found[way, readout][2]
                for name, other in self._named.items():
                    changes = differences(replace(other, readout=self._readout(other)), recipe)
                    if (precision != "fp32" or best <= EXACT) and precision not in other.precision:
                        changes["precision"] = precision
                    if other.evaluated:
                        fits.append(Way(name, changes, recipe, *found[way, readout]))
        fewest = min(len(way.changes) for way in fits)
        fits = [way for way in fits if len(way.changes) == fewest]
        if fewest and any(way.name == "default" for way in fits):
            fits = [way for way in fits if way.name == "default"]
        return Verdict(len(ids), listed, sorted(fits, key=lambda way: list(NAMED).index(way.name)))

    def _readout(self, recipe: Recipe) -> str:
        """The readout of a recipe as this encoder numbers its states."""
        name = parse_embedding(recipe.readout)
        depth = 0 if self._encoder.model is None else self._encoder.model.depth
        return f"state:{depth}:{name.pooling}" if name.kind == "last-state" else str(name)

    def _try(
        self, vectors: Mapping[str, Array], ways: Iterable[Recipe], ids: Sequence[str], precision: str = "fp32"
    ) -> dict[Recipe, Array]:
        """Distances and cosines (2, readouts) of each way that these slides allow, averaged over them."""
        found = {}
        for way in ways:
            try:
                rows = [_nearness(vectors[slide_id], self._stacked(slide_id, way, precision)) for slide_id in ids]
            except ValueError:  # a place outside of the grid, a number that float16 does not hold
                continue
            found[way] = np.mean(rows, axis=0)
        return found

    def _stacked(self, slide_id: str, way: Recipe, precision: str) -> Array:
        placed = tiles_as(self._tiles[slide_id], way)
        assert placed.cells is not None
        key = slide_id, precision, placed.cells.tobytes(), placed.coords.tobytes()
        if precision not in self._at:
            self._at[precision] = self._encoder.at(precision)
        if key not in self._computed:
            self._computed[key] = _stacked(self._at[precision], placed)
        return self._computed[key]

    def _with_dropout(self, vectors: Mapping[str, Array], ids: Sequence[str], named: Sequence[Way]) -> list[Way]:
        """The named ways that are nearest without dropout, where runs of the nearest one with dropout lie as far from
        the vectors as from each other."""
        assert self._encoder.model is not None
        nearest = named[0]
        at, near, apart = self._readouts.index(self._readout(nearest.recipe)), [], []
        for slide_id in ids[:_DROPOUT_SLIDES]:
            placed = tiles_as(self._tiles[slide_id], nearest.recipe)
            with _training(self._encoder.model):
                runs = [_stacked(self._encoder.at("fp32"), placed)[at] for _ in range(_DROPOUT_RUNS)]
            near.append(_nearness(vectors[slide_id], np.stack(runs)).mean(axis=1))
            apart += [_nearness(a, b[None])[:, 0] for a, b in itertools.combinations(runs, 2)]
        (distance, cosine), (spread, likeness) = np.mean(near, axis=0), np.mean(apart, axis=0)
        if distance > 1.25 * spread or 1 - cosine > 1.5 * (1 - likeness):
            return []
        left_on = {(_plain(r), r.readout): name for name, r in NAMED.items() if not r.evaluated}
        found = []
        for way in named:
            if way.distance <= 1.1 * nearest.distance:  # nearer than dropout tells apart
                name = left_on.get((_plain(way.recipe), way.recipe.readout))
                found.append(replace(way, name=name or way.name, changes={} if name else {"eval": "left out"}))
        return found


def differences(one: Recipe, other: Recipe) -> dict[str, str]:
    """What the other way does differently, by the words that a person reads."""
    a, b = parse_embedding(one.readout), parse_embedding(other.readout)
    found = {"pooling": b.pooling} if a.pooling != b.pooling else {}
    if (a.kind, a.state) != (b.kind, b.state):
        found["state"] = b.kind if b.state is None else str(b.state)
    for name, word in _GEOMETRY.items():
        if getattr(one, name) != getattr(other, name):
            value = getattr(other, name)
            found[word] = {True: "yes", False: "no"}.get(value, value)
    return found


def apart(one: Mapping[str, Array], other: Mapping[str, Array]) -> tuple[int, float, float]:
    """How far apart two tools' vectors are: slides in common, the mean and the smallest cosine; ValueError without
    slides in common, or for vectors of two widths."""
    ids = sorted(set(one) & set(other))
    widths = {len(next(iter(vectors.values()))) for vectors in (one, other)}
    if not ids or len(widths) > 1:
        raise ValueError(
            f"expected two tools' vectors of the same slides and width, got {len(ids)} in common, {widths}."
        )
    cosines = [float(_nearness(one[name], other[name][None])[1, 0]) for name in ids]
    return len(ids), float(np.mean(cosines)), min(cosines)


def _plain(recipe: Recipe) -> Recipe:
    """The order and places of a recipe alone, as the ways that are tried have them."""
    return replace(DEFAULT, order=recipe.order, places=recipe.places, half_places=recipe.half_places)


def _stacked(encoder: SlideEncoder, tiles: TileEmbeddings) -> Array:
    """(readouts, E): the default output and all states, each by mean and class token."""
    found = encoder.embed(tiles)
    pairs = [np.concatenate([found[f"default_{pooling}"], found[f"states_{pooling}"]]) for pooling in ("mean", "class")]
    return np.stack(pairs, axis=1).reshape(-1, pairs[0].shape[1])


def _nearness(vector: Array, others: Array) -> Array:
    """Relative distances and cosines (2, M) of a vector (E,) with others (M, E)."""
    v, w = np.asarray(vector, dtype=np.float64), np.asarray(others, dtype=np.float64)
    lengths = np.maximum(np.linalg.norm(w, axis=1), 1e-12)
    return np.stack([np.linalg.norm(w - v, axis=1) / lengths, w @ v / lengths / max(float(np.linalg.norm(v)), 1e-12)])


@contextmanager
def _training(model: torch.nn.Module) -> Iterator[None]:
    """Dropout on, as long as this lasts, and the same each time."""
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        model.eval()


def compare_files(options: CheckOptions) -> dict[str, Any]:
    """What the files of `--slide-embeddings` are, as plain JSON values; FileNotFoundError or ValueError for a file that
    can't be read, no slide in common, a slide encoder that is named and can't be loaded."""
    tools = [read_slide_vectors(path) for path in options.slide_embeddings]
    referee, why_not = None, "no --features were given"
    if options.features is not None:
        tiles = {}
        for path in find_feature_files(options.features):
            held = read_features(path, order="file", tile_size_level0=options.tile_size_level0)
            tiles[held.slide_id] = held
        wanted = [tiles[name] for name in sorted(set(tiles) & {name for tool in tools for name in tool.vectors})]
        first = (wanted or list(tiles.values()))[0]
        name = options.slide_encoder or usual_slide_encoder(first.encoder, random_weights=options.random_weights)
        try:
            encoder = load_slide_encoder(
                name, in_chans=first.embed_dim, device=options.device, random_weights=options.random_weights
            )
            encoder.check_pair(first.encoder, first.embed_dim)
            referee = Referee(tiles, encoder)
        except (ValueError, OSError) as error:
            if options.slide_encoder is not None:
                raise
            why_not = f"no weights: {str(error).rstrip('.')}"
    found: list[dict[str, Any]] = []
    for tool in tools:
        facts: dict[str, Any] = {"file": tool.path.name, "slides": len(tool.vectors), "width": tool.width}
        facts |= {"says": {name: str(value) for name, value in tool.stated.items()}, "none_of_these": False}
        if referee is None:
            facts["not_compared"] = why_not
        else:
            verdict = referee.judge(tool.vectors)
            facts |= {name: [_as_json(way) for way in getattr(verdict, name)] for name in ("fits", "dropout", "named")}
            facts |= {"compared": verdict.slides, "none_of_these": not (verdict.fits or verdict.dropout)}
        found.append(facts)
    pairs = []
    for one, other in itertools.combinations(range(len(tools)), 2):
        count, mean, least = apart(tools[one].vectors, tools[other].vectors)
        pair: dict[str, Any] = {"tools": [tools[one].path.name, tools[other].path.name], "slides": count}
        pair |= {"cosine": mean, "least_cosine": least}
        if found[one].get("fits") and found[other].get("fits"):
            pair["differ_in"] = _differ_in(found[one]["fits"][0], found[other]["fits"][0])
        pairs.append(pair)
    return {"tools": found, "pairs": pairs}


def in_words(found: Mapping[str, Any]) -> list[str]:
    """What `compare_files` found as sentences, one a line."""
    lines = []
    for tool in found["tools"]:
        own = ", ".join(f"{name} {value}" for name, value in tool["says"].items()) or "nothing"
        lines.append(f"{tool['file']}: {tool['slides']} vectors of {tool['width']} values; of itself it says: {own}.")
        if "not_compared" in tool:
            lines.append(f"  Not compared: {tool['not_compared']}. Give --features, and --slide-encoder.")
            continue
        lines.append(f"  On {tool['compared']} slides    cosine    relative distance")
        lines += [f"  {way['way']:18} {way['cosine']:9.6f}    {way['distance']:.2g}" for way in tool["named"]]
        fits, left_on = ([way["way"] for way in tool[name]] for name in ("fits", "dropout"))
        if fits:
            way = tool["fits"][0]
            lines.append(f"  This is {' or '.join(fits)} (cosine {way['cosine']:.6f}, nearest in {way['precision']}).")
        elif left_on:
            text = "dropout was left on, so that every run gives another vector; nearest: "
            lines.append(f"  This is none of them exactly, and looks as if {text}{' or '.join(left_on)}.")
        else:
            lines.append("  This is none of these: other weights, other tile embeddings, or a way that is not known.")
    for pair in found["pairs"]:
        why = f"; they differ in {', '.join(pair['differ_in']) or 'nothing'}" if "differ_in" in pair else ""
        between = f"{' and '.join(pair['tools'])}: cosine {pair['cosine']:.4f} on average over {pair['slides']} slides"
        lines.append(f"{between}, {pair['least_cosine']:.4f} at the least{why}.")
    return lines


def _as_json(way: Way) -> dict[str, Any]:
    own = {name: getattr(way, name) for name in ("name", "cosine", "distance", "precision")}
    facts = {"readout": way.recipe.readout, **{name: getattr(way.recipe, name) for name in _GEOMETRY}}
    return {"way": str(way), **own, "changes": dict(way.changes), **facts}


def _differ_in(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in ("readout", *_GEOMETRY, "precision") if one[name] != other[name]]
