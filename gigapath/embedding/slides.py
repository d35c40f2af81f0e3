"""A slide of a cohort, opened and tiled as its row of the manifest and the options say together."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.privacy import KEPT_COLUMNS, pseudonymised, read_key, recorded_paths
from gigapath.cohort.shards import parse_shard, take_shard
from gigapath.cohort.status import read_status
from gigapath.embedding.options import RunOptions
from gigapath.preprocessing.masks import METHODS, mask_file
from gigapath.preprocessing.slide import Slide, SlideError, open_slide
from gigapath.preprocessing.tiling import TileOptions


def open_entry(entry: SlideEntry, tiling: TileOptions, reader: str = "auto") -> Slide:
    """Open a slide with the scale that the manifest or the options state, to be read as `open_slide` says.

    Raises:
        SlideError: it can't be opened, or has a `problem`.
    """
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
    """The slides under the names that this run gives them: pseudonyms with `--pseudonymise`.

    Raises:
        FileNotFoundError, ValueError: there is no key, or a poor one.
    """
    if options.pseudonymise is None:
        return entries
    key = read_key(options.pseudonymise)
    if tiling.tissue not in METHODS and Path(tiling.tissue).is_dir():  # its masks bear the slides' own names
        entries = [_with_mask(entry, Path(tiling.tissue)) for entry in entries]
    return pseudonymised(entries, key)


def _with_mask(entry: SlideEntry, folder: Path) -> SlideEntry:
    with contextlib.suppress(FileNotFoundError):  # the stage says so
        return entry if entry.mask is not None else dataclasses.replace(entry, mask=mask_file(folder, entry.slide_id))
    return entry


def check_names(entries: Iterable[SlideEntry], out: Path) -> None:
    """Refuse names other than those under which the folder has the same slides: each would be there twice, and once
    under its own name where pseudonyms were wanted.

    Raises:
        ValueError: pseudonyms of another key, or of none where the folder has some, or the other way round.
    """
    before = {entry.original_id or entry.slide_id: entry for entry in recorded_paths(out)}
    for entry in entries:
        earlier = before.get(entry.original_id or entry.slide_id, entry)
        if earlier.slide_id != entry.slide_id:
            had = "pseudonyms of the key of before" if earlier.original_id else "the slides' own names, as before"
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
        mine = take_shard(out, verb, mine, parse_shard(options.shard), tiles=tiles)
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
    """Refuse a `--tissue` that can serve no slide, before work starts: a slip there is no fault of the slides.

    Raises:
        FileNotFoundError: `--tissue` is neither a method nor a file or folder that exists.
        ValueError: classes are asked for where no file could hold them.
    """
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
