"""The slides of a cohort as the manifest and the options say together: opened, chosen, and what they will cost."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gigapath.cohort.manifest import SlideEntry, find_slides, take_shard
from gigapath.cohort.record import KEPT_COLUMNS, pseudonymised, read_key, recorded_paths
from gigapath.cohort.status import read_status, read_statuses
from gigapath.embedding.options import RunOptions, parse_shard
from gigapath.preprocessing.slide import Slide, SlideError, open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_grid
from gigapath.preprocessing.tissue import METHODS


def open_entry(entry: SlideEntry, tiling: TileOptions, reader: str = "auto") -> Slide:
    """Open a slide with the scale that the manifest or the options state; SlideError where that can't be, or it has a
    `problem`."""
    if entry.problem:
        raise SlideError(entry.problem)
    source = "manifest" if entry.mpp is not None else "--slide-mpp"
    return open_slide(
        entry.path,
        slide_id=entry.slide_id,
        slide_mpp=entry.mpp if entry.mpp is not None else tiling.slide_mpp,
        mpp_source=source,
        mpp_from_objective=tiling.mpp_from_objective,
        reader=reader,
    )


def options_for(entry: SlideEntry, tiling: TileOptions) -> TileOptions:
    """The options with the slide's own mask, where the manifest names one."""
    return tiling if entry.mask is None else dataclasses.replace(tiling, tissue=str(entry.mask))


def named(entries: list[SlideEntry], tiling: TileOptions, options: RunOptions) -> list[SlideEntry]:
    """The slides under the names that this run gives them, pseudonyms with `--pseudonymise`; FileNotFoundError or
    ValueError where there is no key, or a poor one."""
    if options.pseudonymise is None:
        return entries
    key = read_key(options.pseudonymise)
    if tiling.tissue not in METHODS and Path(tiling.tissue).is_dir():  # its masks bear the slides' own names
        entries = [_with_mask(entry, Path(tiling.tissue)) for entry in entries]
    return pseudonymised(entries, key)


def cohort_to_embed(
    slides: Sequence[str | Path], out: Path, tiles: str | None, tiling: TileOptions, options: RunOptions
) -> list[SlideEntry]:
    """The slides of an embedding run: those named, else those that the tiling run of `tiles` recorded. ValueError where
    there are none, ids or pseudonyms collide, classes come without a mask; FileNotFoundError."""
    entries = named(find_slides(slides, exclude=out), tiling, options) if slides else _recorded(tiles)
    check_names(entries, out)
    if tiles is None:
        check_tissue(entries, tiling)
    return entries


def _recorded(tiles: str | None) -> list[SlideEntry]:
    if tiles is None:
        raise ValueError("SLIDES: expected slides, a folder or a manifest, got none. Name them, or give --tiles DIR.")
    for folder in (Path(tiles), Path(tiles).parent):
        entries = recorded_paths(folder)
        if entries:
            tiled = read_statuses(folder / "tiles")
            columns = {slide_id: status.columns for slide_id, status in tiled.items()}
            return [dataclasses.replace(entry, columns=columns.get(entry.slide_id, {})) for entry in entries]
    raise FileNotFoundError(
        f"--tiles: expected a folder made by gigapath tile, with private/paths.csv, got {tiles!r}. Name the slides."
    )


def _with_mask(entry: SlideEntry, folder: Path) -> SlideEntry:
    from gigapath.preprocessing.masks import mask_file  # where masks are given

    with contextlib.suppress(FileNotFoundError):  # the stage says so
        return entry if entry.mask is not None else dataclasses.replace(entry, mask=mask_file(folder, entry.slide_id))
    return entry


def check_names(entries: Iterable[SlideEntry], out: Path) -> None:
    """Refuse names other than those under which the folder has the same slides: each would be there twice, and once
    under its own name where pseudonyms were wanted. ValueError for pseudonyms of another key, or of none where the
    folder has some, or the other way round."""
    before = {entry.original_id or entry.slide_id: entry for entry in recorded_paths(out)}
    for entry in entries:
        earlier = before.get(entry.original_id or entry.slide_id, entry)
        if earlier.slide_id != entry.slide_id:
            had = "pseudonyms of the earlier key" if earlier.original_id else "the slides' own names, as before"
            got = "pseudonyms of another key" if earlier.original_id else "pseudonyms"
            raise ValueError(
                f"--pseudonymise: expected {had}, got {got if entry.original_id else 'their own names'}: the "
                "output folder would hold slides under two names. Run it as before, or use another --out."
            )


def chosen(
    entries: Sequence[SlideEntry], out: Path, verb: str, stages: Sequence[Path], options: RunOptions, *, tiles: Path
) -> list[SlideEntry]:
    """The slides of a cohort that this run is for: its `--shard`, of which `--only failed` leaves the failed ones."""
    mine = list(entries)
    if options.shard is not None:
        mine = take_shard(out, verb, mine, parse_shard(options.shard), tiles=tiles, keep=not options.dry_run)
    return only_failed(mine, stages) if options.only == "failed" else mine


def share_in_words(entries: Sequence[SlideEntry], cohort: Sequence[object], options: RunOptions) -> list[str]:
    """Sentences where a run is for some slides of the cohort only, or under other names."""
    words = [f"shard {options.shard}"] * (options.shard is not None) + ["those that failed"] * bool(options.only)
    lines = [f"{', '.join(words)}: {len(entries)} of {len(cohort)} slides."] if words else []
    if options.pseudonymise is not None:
        kept = " and ".join(KEPT_COLUMNS)
        lines.append(f"ids are pseudonyms; of the manifest's columns patient_id (a pseudonym too), {kept} are kept.")
    return lines


def only_failed(entries: Sequence[SlideEntry], stages: Sequence[Path]) -> list[SlideEntry]:
    """The slides that failed in one of the stages' folders."""
    return [
        entry
        for entry in entries
        if any((found := read_status(folder, entry.slide_id)) and found.status == "failed" for folder in stages)
    ]


def check_tissue(entries: Iterable[SlideEntry], tiling: TileOptions) -> None:
    """Refuse a `--tissue` that can serve no slide, before work starts: FileNotFoundError where it is neither a method
    nor a file or folder that exists, ValueError for classes where no file could hold them."""
    if all(entry.mask is not None for entry in entries):
        return
    if tiling.tissue not in METHODS and not Path(tiling.tissue).exists():
        raise FileNotFoundError(
            f"--tissue: expected {', '.join(METHODS)} or a file or folder that exists, got {tiling.tissue!r}."
        )
    if tiling.tissue in METHODS and (tiling.include or tiling.exclude):
        raise ValueError(
            f"--include, --exclude: expected --tissue FILE beside them, got --tissue {tiling.tissue}. Give one."
        )


# So many slides are opened for an estimate; the others are taken to be like them.
_SAMPLE = 20
# Share of a slide's grid that is tissue, about, where nothing is known yet.
TISSUE_SHARE = 0.3
# Pixels a side that are read to learn how fast a slide can be decoded.
_BLOCK = 1024
# What tiling a slide takes beside decoding: tissue, flags, preview. As measured on two cores for any size of slide.
_SECONDS_A_SLIDE = 0.4


def estimate_tiles(counted: Sequence[int], unknown: Sequence[SlideEntry], tiling: TileOptions) -> int:
    """Tiles of slides whose tiles are known, and of those still to be tiled by a sample of their headers."""

    def guess(slide: Slide) -> int:
        grid = plan_grid(slide, mpp=tiling.mpp, tile_size=tiling.tile_size, tolerance=tiling.mpp_tolerance)
        places = grid.columns * grid.rows
        tiles = places if tiling.tissue == "none" else math.ceil(places * TISSUE_SHARE)
        return tiles if tiling.max_tiles is None else min(tiles, tiling.max_tiles)

    return sum(counted) + round(_over_sample(unknown, tiling, guess))


def estimate_tiling(todo: Sequence[SlideEntry], tiling: TileOptions, workers: int) -> float:
    """Seconds that tiling is going to take here, by a block of pixels read from each slide of a sample."""
    return _over_sample(todo, tiling, lambda slide: _tiling_seconds(slide, tiling, workers))


def _over_sample(entries: Sequence[SlideEntry], tiling: TileOptions, cost: Callable[[Slide], float]) -> float:
    """The sum of `cost` over slides, from a sample of them; a slide that can't be opened costs nothing."""
    step = max(1, len(entries) // _SAMPLE)
    sample = entries[::step][:_SAMPLE]
    found = 0.0
    for entry in sample:
        with contextlib.suppress(ValueError, OSError), open_entry(entry, tiling) as slide:
            found += cost(slide)
    return found * len(entries) / len(sample) if sample else 0.0


def _tiling_seconds(slide: Slide, tiling: TileOptions, workers: int) -> float:
    """The level that the overview comes from is read as a whole, that of the tiles too by the published rule."""
    level, columns, rows = slide.overview_source()
    pixels = columns * rows
    if tiling.tissue == "published":
        grid = plan_grid(slide, mpp=tiling.mpp, tile_size=tiling.tile_size, tolerance=tiling.mpp_tolerance)
        pixels += grid.columns * grid.rows * grid.read_size[0] * grid.read_size[1]
    width, height = min(_BLOCK, columns), min(_BLOCK, rows)
    left, top, w, h = slide.bounds
    down = slide.level_downsamples[level]
    corner = left + max(0, int((w - width * down) / 2)), top + max(0, int((h - height * down) / 2))
    started = time.perf_counter()
    slide.reads(level, np.array([(*corner, width, height)]))(0, None)
    seconds = time.perf_counter() - started
    return _SECONDS_A_SLIDE + seconds * pixels / (width * height) / max(1, workers)
