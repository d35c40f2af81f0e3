"""`make_maps`: maps of many slides, each with the colors of all; and their files, which the report reads too.

`OUT/<slide_id>/` holds for every map, with the same stem NAME:

    NAME.json          what the map is (below); written last, so a map with a JSON is whole
    NAME.png           the figure: slide beside map, axes in mm, title, color bar
    NAME_overlay.png   RGBA, one pixel a cell, clear where there is no tile: to lay over the slide, scaled up without
                       smoothing, at `overlay.level0` less the corner of `slide.bounds`
    NAME.geojson       tiles for QuPath, relative to the bounds; absent where coordinates are not level-0 pixels
    NAME.npz           `values` (N,) or (N, 3) as drawn, `coords_level0` (N, 2), `cells` (N, 2), and by kind `weights`
                       (H, N), `class_token`, `zero_keys` (H,), `branches` (H, B), `components` (3, D), ...
    NAME_curve.png     for maps of a fitted head: deletion and insertion

The JSON: `format` 1, `slide_id`, `name`, `kind` (of `options.KINDS`), `title`, `model` (in words), `trained` (false
where a part has random weights), `layer`, `head`, `query`, `target` (null where it has none), `normalisation`,
`heuristic` (true for rollout), `weight` (of attention: its shares on tiles, class token and zero keys), `check` (of a
head's map: what its curve says of it), `made_from` (below), `colour` (`palette`, `label`, `scope`; `low`, `high`,
`colormap`; or `categories` of `name`, `colour` and `tiles`), `tiles`, `tile` (`pitch_level0`, `pitch_mm`), `slide`
(`size`, `bounds`, `mpp_level0`, `at_hand`), `overlay` (`level0` [x, y, w, h] absolute, `shape` [rows, columns]),
`marked_tile` (the row that the map is about, outlined in the figure), `options` (those that change numbers or colors,
but for what is in the name), `files` (their names by role), `curve` (numbers of the curve), `details` (what else the
kind states, such as the weight on zero keys), `note`, `version`, `terms`. What is not known is null. No paths.

`made_from` tells a map that is out of date: `features_sha256` and `tiles_sha256` of the slide's embeddings and of the
places of its tiles, `features_folder` and `features_digest` as the run's status file names them (null where there is
none), `cohort_sha256` of all slides that gave the range and what is fitted, `head_sha256` of a fitted head's tensors.
A map that is made again loses its JSON once the new one is drawn, so that what a killed run leaves is never taken for
whole, and a map stays where a run is stopped before.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

import gigapath
from gigapath.cohort.manifest import SlideEntry, find_slides
from gigapath.cohort.record import recorded_paths, without_paths
from gigapath.cohort.stage import Ownership, differences
from gigapath.cohort.status import read_status
from gigapath.devices import resolve_device
from gigapath.embedding.slide_embedding import entries_of
from gigapath.embedding.slide_encoding import SlideEncoder, load_slide_encoder, usual_slide_encoder
from gigapath.evaluation.plots import plotting_available
from gigapath.features import FeatureFileError, TileEmbeddings, read_features
from gigapath.files import (
    OutputError,
    check_writable,
    discard,
    open_temporary,
    output_error,
    publish,
    write_bytes_atomic,
    write_json_atomic,
)
from gigapath.finetune.data import look_at_all
from gigapath.finetune.fitted import FittedHead, load_head
from gigapath.finetune.options import JoinOptions
from gigapath.linear_probe.heads import load_tile_head
from gigapath.maps.attribution import check_attends, check_layers, check_target
from gigapath.maps.drawing import (
    FloatArray,
    Place,
    TileMap,
    draw_curve,
    draw_map,
    map_geojson,
    place_of,
    png,
    tile_rgba,
)
from gigapath.maps.embeddings import fit_clusters, fit_components, sample_tiles
from gigapath.maps.kinds import Shared, slide_maps
from gigapath.maps.options import HEAD_KINDS, MOST_CLUSTERS, MapOptions
from gigapath.preprocessing.preview import preview_picture
from gigapath.preprocessing.slide import Overview, SlideError, open_slide
from gigapath.progress import Progress
from gigapath.releases import RELEASES

FORMAT = 1
TERMS = "For research use only, not for diagnosis."
STATED = ("model", "trained", "layer", "head", "query", "target", "normalisation", "heuristic", "weight", "check")
SCOPES = {"all": "range over all slides given", "slide": "range of this slide"}
_ROWS = 4096  # embeddings that are hashed at once
_OPTIONS = ("clusters", "range", "opacity", "tile_size_level0", "random_weights", "seed")


@dataclass
class MapsResult:
    """What came of a run of maps.

    Attributes:
        written: slide_id -> names of the maps.
        failed: slide_id -> why there is none.
        empty: slides without tiles.
    """

    written: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)


def make_maps(
    features: Sequence[str | Path],
    out: str | Path,
    options: MapOptions | None = None,
    *,
    watch: Progress | None = None,
) -> MapsResult:
    """Write maps of slides to `OUT/<slide_id>/`, as this module's docstring says; a slide that fails is recorded,
    the others go on.

    Args:
        features: files of tile embeddings, folders of them, or the folder of a run.
        out: the output folder.
        options: which maps.
        watch: receives the news.

    Raises:
        FileNotFoundError: an input, the head or the weights are not there.
        ValueError: options that fit no slide: a mean in place of a slide encoder, an unknown class, layer or tile; maps
            of other options are there, or another run makes such (FolderTaken).
        OutputError: the output folder can't be written.
        ImportError: matplotlib, or for clusters scikit-learn, is not installed.
    """
    out, options = Path(out), options or MapOptions()
    if not plotting_available():
        raise ImportError("matplotlib: not installed. Maps need it: pip install 'gigapath[train]'.")
    entries = {entry.slide_id: entry.path for entry in entries_of(features)}
    check_writable(out)
    result = MapsResult()
    reader = _Reader(entries, options, result, watch or Progress())
    given = {kind: numbers_of(options, kind) for kind in options.kind}
    owned = {out / f".{kind}.runs": numbers for kind, numbers in given.items()}
    with Ownership(owned), contextlib.ExitStack() as unfinished:
        if not options.overwrite:
            _check_same(out, entries, given)
        if next(reader.slides(), None) is not None:
            _make_maps(reader, _fit_shared(reader, options), entries, out, options, unfinished)
    return result


def numbers_of(options: MapOptions, kind: str) -> dict[str, Any]:
    """The options that change the numbers or colors of a map without changing its name."""
    names = [name for name in _OPTIONS if name != "clusters" or kind == "clusters"]
    return {name: getattr(options, name) for name in names}


def _check_same(out: Path, slide_ids: Iterable[str], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to draw maps in place of those with other options."""
    changed: Counter[str] = Counter()
    for path in (path for slide_id in slide_ids for path in (out / slide_id).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # no map of ours
            stated = json.loads(path.read_text(encoding="utf-8"))
            changed.update(differences(stated["options"], given[stated["kind"]]))
    if changed:
        found = "; ".join(f"{what} ({count} maps)" for what, count in changed.most_common(3))
        raise ValueError(
            f"{out.name}: expected the options with which its maps were drawn, got others: {found}. Give those of "
            "before, or use another --out; --overwrite draws them again."
        )


def _make_maps(
    reader: "_Reader",
    shared: Shared,
    entries: dict[str, Path],
    out: Path,
    options: MapOptions,
    unfinished: contextlib.ExitStack,
) -> None:
    """Compute all maps, whose arrays wait in temporary files, and then write them with the colors of all."""
    places: dict[str, Place] = {}
    drawn: dict[str, list[TileMap]] = {}
    arrays: dict[tuple[str, str], Path] = {}
    sources: dict[str, dict[str, str | None]] = {}
    for slide_id, tiles in reader.slides():
        with reader.recording(slide_id):
            if shared.head is not None:
                _check_made(shared.head, entries[slide_id])
            place, maps = place_of(tiles), []
            for tile_map in slide_maps(shared, tiles):
                arrays[slide_id, tile_map.name] = waiting = write_arrays(out / slide_id, tile_map, place)
                unfinished.callback(discard, waiting)
                maps.append(dataclasses.replace(tile_map, arrays={}))
            sources[slide_id] = made_from(entries[slide_id], tiles)
            places[slide_id], drawn[slide_id] = place, maps
            reader.watch.step("slides computed", len(drawn), len(entries))
    # One digest for the slides that were given, by what each was made from.
    lines = (f"{slide_id} {sources[slide_id]['features_sha256']}\n" for slide_id in sorted(sources))
    cohort = hashlib.sha256("".join(lines).encode()).hexdigest()
    slides = _slide_files(options, entries)
    # Values of all slides for each name of a map, as many of each slide at most.
    samples: dict[str, list[FloatArray]] = {}
    for tile_map in (each for maps in drawn.values() for each in maps):
        samples.setdefault(tile_map.name, []).append(tile_map.sample())
    for slide_id, maps in drawn.items():
        with reader.recording(slide_id):
            place, overview, note = look_at_slide(places[slide_id], slides.get(slide_id))
            for tile_map in maps:
                values = tile_map.sample() if options.range == "slide" else np.concatenate(samples[tile_map.name])
                ranged = dataclasses.replace(tile_map, colors=tile_map.colors.spanning(values, SCOPES[options.range]))
                write_map(
                    out / slide_id,
                    ranged,
                    place,
                    overview,
                    arrays=arrays[slide_id, tile_map.name],
                    made_from={**sources[slide_id], "cohort_sha256": cohort},
                    options=options,
                    note=note,
                )
            names = reader.result.written[slide_id] = [tile_map.name for tile_map in maps]
            reader.watch.line(f"{slide_id}: {', '.join(names)}{f' ({note})' if note else ''}")


class _Reader:
    """Reads the tile embeddings of each slide in turn; what can't be read or has no tiles is recorded once."""

    def __init__(self, entries: dict[str, Path], options: MapOptions, result: MapsResult, watch: Progress) -> None:
        self.entries, self.options, self.result, self.watch = entries, options, result, watch
        self.made: tuple[str | None, int] | None = None

    def slides(self) -> Iterator[tuple[str, TileEmbeddings]]:
        """(slide_id, its tiles in row-major order with cells) of every slide that has some."""
        for slide_id, path in self.entries.items():
            if slide_id in self.result.failed or slide_id in self.result.empty:
                continue
            tiles: TileEmbeddings | None = None
            with self.recording(slide_id):
                tiles = self.read(path)
                self._check_alike(slide_id, tiles)
            if tiles is not None and len(tiles) == 0:
                self.result.empty.append(slide_id)
                self.watch.line(f"{slide_id}: no tiles, no map")
            elif tiles is not None:
                yield slide_id, dataclasses.replace(tiles, slide_id=slide_id)

    def _check_alike(self, slide_id: str, tiles: TileEmbeddings) -> None:
        """Refuse embeddings of another encoder or width than those of the first slide that could be read."""
        first = self.made = self.made or (tiles.encoder, tiles.embed_dim)
        named = tiles.encoder is not None and first[0] is not None and tiles.encoder != first[0]
        if named or tiles.embed_dim != first[1]:
            raise FeatureFileError(
                f"{slide_id}: expected embeddings of {first[0]}, width {first[1]}, as of the first slide, got those of "
                f"{tiles.encoder}, width {tiles.embed_dim}. Give slides of one encoder."
            )

    def read(self, path: Path) -> TileEmbeddings:
        return read_features(path, tile_size_level0=self.options.tile_size_level0)

    @contextlib.contextmanager
    def recording(self, slide_id: str) -> Iterator[None]:
        """What is wrong with one slide is recorded; what would meet the next slide too is raised."""
        try:
            yield
        except (ValueError, OSError) as error:
            if isinstance(error, OutputError) or getattr(error, "stops_run", False):
                raise
            self.result.failed[slide_id] = str(error)
            self.watch.line(f"{slide_id}: failed: {error}")


def _fit_shared(reader: _Reader, options: MapOptions) -> Shared:
    """Load models and fit what all slides share; what no slide could satisfy is raised here."""
    device, kinds = resolve_device(options.device), set(options.kind)
    tile_head = None
    if options.checkpoint is not None and "classes" in kinds:
        tile_head = load_tile_head(options.checkpoint)
        if len(tile_head.classes) > MOST_CLUSTERS:
            raise ValueError(f"--kind classes: expected at most {MOST_CLUSTERS} classes, got {len(tile_head.classes)}.")
    head = None if options.checkpoint is None or tile_head else load_head(options.checkpoint)
    if tile_head and {*HEAD_KINDS} & kinds:
        raise ValueError("--kind classes: expected no kind of a head of slides beside it. Draw them one after another.")
    if head is not None and options.target is not None:
        check_target(head.task, options.target)
    if head is not None and "head-attention" in kinds:
        check_attends(head)
    encoder = _encoder(reader, options, head, device) if {"attention", "rollout"} & kinds else None
    if not set(HEAD_KINDS) & kinds:
        head = None  # at most its slide encoder was asked for
    components = clusters = None
    if {"pca", "clusters"} & kinds:
        features = (np.asarray(tiles.features, np.float32) for _, tiles in reader.slides())
        sample = sample_tiles(features, len(reader.entries), seed=options.seed)
        components = fit_components(sample) if "pca" in kinds else None
        clusters = fit_clusters(sample, options.clusters, seed=options.seed) if "clusters" in kinds else None
    chosen = _chosen_tile(reader, options) if "similarity" in kinds else None
    return Shared(options, device, components, clusters, chosen, encoder, head, tile_head)


def _encoder(reader: _Reader, options: MapOptions, head: FittedHead | None, device: torch.device) -> SlideEncoder:
    """The slide encoder whose attention is asked for: the one that is named, the head's, or the tile encoder's pair."""
    model: Any
    if head is not None and options.slide_encoder is None:
        model = getattr(head.model, "slide_encoder", None)
        if model is None:
            raise ValueError(
                f"--kind attention: expected a head on a slide encoder, got {head.options.head!r}, which has none. "
                "Take --kind head-attention."
            )
        model = model.to(device).eval()
        name = f"of the fitted head ({head.options.model_arch}, task {head.task.name})"
        encoder = SlideEncoder(name, True, head.sha256, None, name, device, "fp32", model)
    else:
        _, tiles = next(reader.slides())
        wanted = options.slide_encoder or usual_slide_encoder(tiles.encoder, random_weights=options.random_weights)
        if wanted == "mean":
            raise ValueError(
                "--kind attention: expected a slide encoder with layers, got the mean of the tiles, which attends to "
                "nothing. Name one with --slide-encoder, or try an untrained one with --random-weights."
            )
        untrained = options.random_weights and wanted in RELEASES
        encoder = load_slide_encoder(wanted, in_chans=tiles.embed_dim, device=device, random_weights=untrained)
        encoder.check_pair(tiles.encoder, tiles.embed_dim)
        model = encoder.model
    check_layers(model, options.layer)
    heads = model.encoder.config.num_heads
    if options.attention_head is not None and options.attention_head >= heads:
        raise ValueError(f"--attention-head: expected 0 to {heads - 1}, got {options.attention_head}.")
    return encoder


def _chosen_tile(reader: _Reader, options: MapOptions) -> tuple[str, int, npt.NDArray[np.float32]]:
    slide_id = options.of_slide or next(iter(reader.entries))
    if slide_id not in reader.entries:
        known = ", ".join(list(reader.entries)[:5])
        raise ValueError(f"--of-slide: expected a slide of those given ({known}, ...), got {slide_id!r}.")
    tiles, row = reader.read(reader.entries[slide_id]), options.tile or 0
    if len(tiles) == 0:
        raise ValueError(f"--tile: expected a tile of {slide_id}, got a slide without tiles. Name one with --of-slide.")
    if row >= len(tiles):
        raise ValueError(f"--tile: expected a tile of {slide_id} from 0 to {len(tiles) - 1}, got {row}.")
    return slide_id, row, np.asarray(tiles.features[row], np.float32)


def _check_made(head: FittedHead, path: Path) -> None:
    """Refuse features of another encoder, mpp or numerics than those that trained the head."""
    look_at_all([path], JoinOptions(), **head.expects)


def _slide_files(options: MapOptions, entries: dict[str, Path]) -> dict[str, SlideEntry]:
    """slide_id -> its file, as the options say, else as the run remembers that made the features."""
    if options.slides:
        return {entry.slide_id: entry for entry in find_slides(options.slides)}
    runs = dict.fromkeys(path.parent.parent for path in entries.values())
    return {entry.slide_id: entry for run in runs for entry in recorded_paths(run)}


def look_at_slide(place: Place, entry: SlideEntry | None) -> tuple[Place, Overview | None, str]:
    """Open a slide and look at it at low power.

    Returns:
        the place with what the slide adds (size, bounds, mpp), the overview or None, and in words why there is none.
    """
    if place.grid_level0 is None:
        return place, None, "coordinates are not level-0 pixels: tiles drawn on the grid, no GeoJSON"
    if entry is None:
        return place, None, "slide not at hand: tiles drawn on the grid"
    stated = entry.mpp if place.mpp_level0 is None else float(np.mean(place.mpp_level0))
    try:
        with open_slide(entry.path, slide_id=entry.slide_id, slide_mpp=stated) as slide:
            if place.slide_size is not None and slide.dimensions != place.slide_size:
                was, found = ("{} x {}".format(*size) for size in (place.slide_size, slide.dimensions))
                return place, None, f"the slide has {found} pixels, the features one of {was}: drawn on the grid"
            mpp = place.mpp_level0 or (slide.mpp.x, slide.mpp.y)
            place = dataclasses.replace(place, slide_size=slide.dimensions, bounds=slide.bounds, mpp_level0=mpp)
            return place, preview_picture(slide, slide.overview()), ""
    except (SlideError, OSError) as error:
        return place, None, f"tiles drawn on the grid: {without_paths(str(error), entry)}"


def write_arrays(folder: Path, tile_map: TileMap, place: Place) -> Path:
    """Write what becomes `NAME.npz` into a temporary file: a map of that name stays until the new one is whole."""
    arrays = {"values": tile_map.values, "cells": place.cells, **tile_map.arrays}
    if place.coords_level0 is not None:
        arrays["coords_level0"] = place.coords_level0
    path = folder / f"{tile_map.name}.npz"
    temporary, descriptor = open_temporary(path)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(descriptor)
    except BaseException as error:
        discard(temporary)
        if isinstance(error, OSError):
            raise output_error(path, error) from error
        raise
    return temporary


def write_map(
    folder: Path,
    tile_map: TileMap,
    place: Place,
    overview: Overview | None,
    *,
    arrays: Path,
    made_from: Mapping[str, Any],
    options: MapOptions,
    note: str = "",
) -> None:
    """Write everything of a map, its JSON last; an earlier map stays until all is drawn.

    Args:
        folder: of the slide's maps.
        tile_map: the map, with its range.
        place: where its tiles lie.
        overview: the slide to draw on, or None for the tiles' grid alone.
        arrays: the temporary file of `write_arrays`.
        made_from: digests of what it was made of, for the JSON.
        options: opacity, and what the JSON says of options.
        note: what to say beneath the picture, such as why the slide is not shown.
    """
    name = tile_map.name
    files = {"npz": f"{name}.npz", "png": f"{name}.png", "overlay": f"{name}_overlay.png"}
    overlay = io.BytesIO()
    Image.fromarray(tile_rgba(tile_map, place)).save(overlay, format="PNG")
    drawn = {
        "png": png(draw_map(tile_map, place, overview, opacity=options.opacity, note=note)),
        "overlay": overlay.getvalue(),
    }
    if place.coords_level0 is not None and place.pitch_level0 is not None:
        files["geojson"] = f"{name}.geojson"
        drawn["geojson"] = map_geojson(tile_map, place).encode()
    if tile_map.curve is not None:
        files["curve"] = f"{name}_curve.png"
        drawn["curve"] = png(draw_curve(tile_map, place))
    facts = describe(tile_map, place, files, made_from=made_from, at_hand=overview is not None, note=note)
    facts["options"] = numbers_of(options, tile_map.kind)
    (folder / f"{name}.json").unlink(missing_ok=True)
    publish(arrays, folder / files["npz"])
    for role, content in drawn.items():
        write_bytes_atomic(folder / files[role], content)
    write_json_atomic(folder / f"{name}.json", facts)


def describe(
    tile_map: TileMap,
    place: Place,
    files: dict[str, str],
    *,
    made_from: Mapping[str, Any],
    at_hand: bool,
    note: str = "",
) -> dict[str, Any]:
    """The JSON of a map; see this module's docstring."""
    facts = dict(tile_map.facts)
    pitch, mpp, grid = place.pitch_level0, place.mpp_level0, place.grid_level0
    pitch_mm = None if pitch is None or mpp is None else [p * m / 1000 for p, m in zip(pitch, mpp, strict=True)]
    stated = {name: facts.pop(name, None) for name in STATED}
    color = tile_map.colors.to_dict()
    if "categories" in color:
        counts = np.bincount(tile_map.values, minlength=len(tile_map.colors.names)).tolist()
        color["categories"] = [{**each, "tiles": n} for each, n in zip(color["categories"], counts, strict=True)]
    return {
        "format": FORMAT,
        "slide_id": place.slide_id,
        "name": tile_map.name,
        "kind": tile_map.kind,
        "title": tile_map.title,
        **stated,
        "heuristic": bool(stated["heuristic"]),
        "made_from": {**made_from, "head_sha256": facts.pop("head_sha256", None)},
        "colour": color,
        "tiles": len(place),
        "tile": {"pitch_level0": None if pitch is None else list(pitch), "pitch_mm": pitch_mm},
        "slide": {
            "size": None if place.slide_size is None else list(place.slide_size),
            "bounds": None if place.bounds is None else list(place.bounds),
            "mpp_level0": None if mpp is None else list(mpp),
            "at_hand": at_hand,
        },
        "overlay": {"level0": None if grid is None else list(grid), "shape": list(place.grid_shape)},
        "files": files,
        "curve": None if tile_map.curve is None else dict(tile_map.curve),
        "marked_tile": tile_map.mark,
        "details": facts,
        "note": note,
        "version": gigapath.__version__,
        "terms": TERMS,
    }


def made_from(path: Path, tiles: TileEmbeddings) -> dict[str, str | None]:
    """What one slide's maps are made from, by digests.

    Args:
        path: the file of its tile embeddings; where a status file lies beside it, its folder and digest are taken down.
        tiles: what was read from it.
    """
    places = hashlib.sha256()
    for part in (tiles.coords, tiles.cells):
        if part is not None:
            places.update(np.ascontiguousarray(part, np.float64).tobytes())
    content = places.copy()
    for start in range(0, len(tiles), _ROWS):
        content.update(np.ascontiguousarray(tiles.features[start : start + _ROWS]).tobytes())
    status = read_status(path.parent, tiles.slide_id)
    named = status.digest if status is not None and status.finished else ""
    return {
        "features_folder": path.parent.name if named else None,
        "features_digest": named or None,
        "features_sha256": content.hexdigest(),
        "tiles_sha256": places.hexdigest(),
    }
