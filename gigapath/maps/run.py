"""`make_maps`: maps of many slides, each with the colours of all."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gigapath.cohort.manifest import SlideEntry, find_slides
from gigapath.cohort.privacy import recorded_paths, without_paths
from gigapath.devices import resolve_device
from gigapath.downloads import RELEASES
from gigapath.embedding.slide_embedding import find_features
from gigapath.embedding.slide_encoding import SlideEncoder, load_slide_encoder, usual_slide_encoder
from gigapath.evaluation.plots import plotting_available
from gigapath.features import FeatureFileError, TileEmbeddings, read_features
from gigapath.files import OutputError, check_writable
from gigapath.finetune.data import Bag, look_at_all
from gigapath.finetune.fitted import FittedHead, load_head
from gigapath.finetune.options import JoinOptions
from gigapath.maps.attention import check_layers
from gigapath.maps.data import FloatArray, Place, TileMap, place_of
from gigapath.maps.embeddings import fit_clusters, fit_components, sample_tiles
from gigapath.maps.files import write_arrays, write_pictures
from gigapath.maps.heads import check_attends, check_target
from gigapath.maps.identity import cohort_sha256, made_from
from gigapath.maps.making import ChosenTile, Maker
from gigapath.maps.options import HEAD_KINDS, MapOptions
from gigapath.preprocessing.preview import preview_picture
from gigapath.preprocessing.slide import Overview, SlideError, open_slide
from gigapath.tensors import read_tensor

SCOPES = {"all": "range over all slides given", "slide": "range of this slide"}


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
    tell: Callable[[str], None] = lambda line: None,
) -> MapsResult:
    """Write maps of slides to `OUT/<slide_id>/`, see `gigapath.maps.files`; a slide that fails is recorded, the others
    go on.

    Args:
        features: files of tile embeddings, folders of them, or the folder of a run.
        out: the output folder.
        options: which maps.
        tell: gets a line a slide.

    Raises:
        FileNotFoundError: an input, the head or the weights are not there.
        ValueError: options that fit no slide: a mean in place of a slide encoder, an unknown class, layer or tile.
        OutputError: the output folder can't be written.
        ImportError: matplotlib, or for clusters scikit-learn, is not installed.
    """
    out, options = Path(out), options or MapOptions()
    if not plotting_available():
        raise ImportError("matplotlib: not installed. Maps need it: pip install 'gigapath[train]'.")
    entries = {entry.slide_id: entry.path for entry in find_features(features)}
    check_writable(out)
    result = MapsResult()
    reader = _Reader(entries, options, result, tell)
    if next(reader.slides(), None) is None:
        return result
    maker = _make_maker(reader, options)
    places: dict[str, Place] = {}
    drawn: dict[str, list[TileMap]] = {}
    sources: dict[str, dict[str, str | None]] = {}
    for slide_id, tiles in reader.slides():
        with reader.recording(slide_id):
            if maker.head is not None:
                _check_made(maker.head, entries[slide_id], options)
            place, bag = place_of(tiles), partial(_bag_of, tiles)
            maps = []
            for tile_map in maker.maps(tiles, bag):
                write_arrays(out / slide_id, tile_map, place)
                maps.append(dataclasses.replace(tile_map, arrays={}))
            sources[slide_id] = made_from(entries[slide_id], tiles)
            places[slide_id], drawn[slide_id] = place, maps
    cohort = cohort_sha256(sources)
    slides = _slide_files(options, entries)
    common = _values_by_name(drawn)
    for slide_id, maps in drawn.items():
        with reader.recording(slide_id):
            place, overview, note = look_at_slide(places[slide_id], slides.get(slide_id))
            for tile_map in maps:
                values = tile_map.sample() if options.range == "slide" else common[tile_map.name]
                ranged = dataclasses.replace(tile_map, colours=tile_map.colours.spanning(values, SCOPES[options.range]))
                write_pictures(
                    out / slide_id,
                    ranged,
                    place,
                    overview,
                    made_from={**sources[slide_id], "cohort_sha256": cohort},
                    opacity=options.opacity,
                    note=note,
                )
            result.written[slide_id] = [tile_map.name for tile_map in maps]
            tell(f"{slide_id}: {', '.join(result.written[slide_id])}{f' ({note})' if note else ''}")
    return result


class _Reader:
    """Reads the tile embeddings of each slide in turn; what can't be read or has no tiles is recorded once."""

    def __init__(
        self, entries: dict[str, Path], options: MapOptions, result: MapsResult, tell: Callable[[str], None]
    ) -> None:
        self.entries, self.options, self.result, self.tell = entries, options, result, tell
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
                self.tell(f"{slide_id}: no tiles, no map")
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
        return read_features(path, tile_size_level0=self.options.tile_size_level0, read_tensor=read_tensor)

    def embeddings(self) -> Iterator[npt.NDArray[np.float32]]:
        """The embeddings (N, D) of every slide that has some."""
        for _, tiles in self.slides():
            yield np.asarray(tiles.features, np.float32)

    def described(self) -> tuple[str | None, int]:
        """(tile encoder, width D) of the first slide that has tiles."""
        for _, tiles in self.slides():
            return tiles.encoder, tiles.embed_dim
        raise ValueError("expected slides with tiles, got none.")

    @contextlib.contextmanager
    def recording(self, slide_id: str) -> Iterator[None]:
        """What is wrong with one slide is recorded; what would meet the next slide too is raised."""
        try:
            yield
        except (ValueError, OSError) as error:
            if isinstance(error, OutputError) or getattr(error, "stops_run", False):
                raise
            self.result.failed[slide_id] = str(error)
            self.tell(f"{slide_id}: failed: {error}")


def _make_maker(reader: _Reader, options: MapOptions) -> Maker:
    """Load models and fit what all slides share; what no slide could satisfy is raised here."""
    device = resolve_device(options.device)
    head = None if options.checkpoint is None else load_head(options.checkpoint)
    if head is not None and options.target is not None:
        check_target(head.task, options.target)
    if head is not None and "head-attention" in options.kind:
        check_attends(head)
    encoder = None
    if {"attention", "rollout"} & set(options.kind):
        encoder = _encoder(reader, options, head, device)
        check_layers(encoder.model, options.layer)  # type: ignore[arg-type]
        heads = encoder.model.encoder.config.num_heads  # type: ignore[union-attr]
        if options.attention_head is not None and options.attention_head >= heads:
            raise ValueError(f"--attention-head: expected 0 to {heads - 1}, got {options.attention_head}.")
    if head is not None and not set(HEAD_KINDS) & set(options.kind):
        head = None  # only its slide encoder was asked for
    components = clusters = None
    if {"pca", "clusters"} & set(options.kind):
        sample = sample_tiles(reader.embeddings(), len(reader.entries), seed=options.seed)
        components = fit_components(sample) if "pca" in options.kind else None
        clusters = fit_clusters(sample, options.clusters, seed=options.seed) if "clusters" in options.kind else None
    chosen = _chosen_tile(reader, options) if "similarity" in options.kind else None
    return Maker(options, device, components, clusters, chosen, encoder, head)


def _encoder(reader: _Reader, options: MapOptions, head: FittedHead | None, device: torch.device) -> SlideEncoder:
    """The slide encoder whose attention is asked for: the one that is named, the head's, or the tile encoder's pair."""
    if head is not None and options.slide_encoder is None:
        model = getattr(head.model, "slide_encoder", None)
        if model is None:
            raise ValueError(
                f"--kind attention: expected a head on a slide encoder, got {head.options.head!r}, which has none. "
                "Take --kind head-attention."
            )
        name = f"of the fitted head ({head.options.model_arch}, task {head.task.name})"
        model = model.to(device).eval()
        return SlideEncoder(name, True, head.sha256, None, name, device, "fp32", model)
    of_tiles, width = reader.described()
    wanted = options.slide_encoder or usual_slide_encoder(of_tiles, random_weights=options.random_weights)
    if wanted == "mean":
        raise ValueError(
            "--kind attention: expected a slide encoder with layers, got the mean of the tiles, which attends to "
            "nothing. Name one with --slide-encoder, or try an untrained one with --random-weights."
        )
    untrained = options.random_weights and wanted in RELEASES
    encoder = load_slide_encoder(wanted, in_chans=width, device=device, random_weights=untrained)
    encoder.check_pair(of_tiles, width)
    return encoder


def _chosen_tile(reader: _Reader, options: MapOptions) -> ChosenTile:
    slide_id = options.of_slide or next(iter(reader.entries))
    if slide_id not in reader.entries:
        known = ", ".join(list(reader.entries)[:5])
        raise ValueError(f"--of-slide: expected a slide of those given ({known}, ...), got {slide_id!r}.")
    tiles, row = reader.read(reader.entries[slide_id]), options.tile or 0
    if len(tiles) == 0:
        raise ValueError(f"--tile: expected a tile of {slide_id}, got a slide without tiles. Name one with --of-slide.")
    if row >= len(tiles):
        raise ValueError(f"--tile: expected a tile of {slide_id} from 0 to {len(tiles) - 1}, got {row}.")
    return ChosenTile(slide_id, row, np.asarray(tiles.features[row], np.float32))


def _check_made(head: FittedHead, path: Path, options: MapOptions) -> None:
    """Refuse features of another encoder, mpp or numerics than those that trained the head."""
    facts = look_at_all([path], JoinOptions(tile_size_level0=options.tile_size_level0), width=head.input_dim)[0]
    head.check_features(facts.made, path.name)


def _bag_of(tiles: TileEmbeddings) -> Bag:
    return Bag(np.asarray(tiles.features, dtype=np.float32), tiles.encoder_coords())


def _values_by_name(drawn: dict[str, list[TileMap]]) -> dict[str, FloatArray]:
    """Values of all slides for each name of a map, as many of each slide at most."""
    found: dict[str, list[FloatArray]] = {}
    for maps in drawn.values():
        for tile_map in maps:
            found.setdefault(tile_map.name, []).append(tile_map.sample())
    return {name: np.concatenate(samples) for name, samples in found.items()}


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
