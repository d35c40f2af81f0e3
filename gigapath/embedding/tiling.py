"""The tiling stage of a slide, and `run_tile` over a cohort: tissue, tiles, previews. No torch in the process."""

import contextlib
import dataclasses
import glob
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.cohort.manifest import SlideEntry, find_slides, largest_first
from gigapath.cohort.run import CohortRun, RunResult
from gigapath.cohort.stage import Outcome, Stage, StageOptions, digest
from gigapath.cohort.status import Status, changed, derive, draw_contact_sheet, read_status
from gigapath.embedding.options import RunOptions
from gigapath.embedding.slides import (
    check_names,
    check_tissue,
    chosen,
    estimate_tiles,
    estimate_tiling,
    named,
    open_entry,
    options_for,
    share_in_words,
)
from gigapath.features import TILES_NUMERICS_VERSION, Tiles, read_tiles, write_tiles
from gigapath.files import hex_digest, sha256_of
from gigapath.options import to_dict
from gigapath.preprocessing.preview import preview_picture, write_preview
from gigapath.preprocessing.slide import SlideError
from gigapath.preprocessing.tiling import TileOptions, TilePlan, plan_tiles
from gigapath.preprocessing.tissue import METHODS
from gigapath.progress import Plan, Progress, StopFlag
from gigapath.text import in_words, slides_in_words, tiles_in_words

# Options that decide whether a slide is accepted, not which tiles come of it.
_ACCEPTANCE = ("allow_upsampling", "allow_dark_background")


def run_tile(
    slides: Sequence[str | Path],
    out: str | Path,
    *,
    tiling: TileOptions | None = None,
    options: RunOptions | None = None,
    watch: Progress | None = None,
    command: Sequence[str] = (),
) -> RunResult:
    """Tile slides: `tiles/<id>.h5`, a preview per slide, a contact sheet, slides.csv.

    Args:
        slides: slide files, folders of them, manifests.
        out: the output folder; what is done there with the same settings is skipped.
        tiling: how slides are cut.
        options: how the run goes about it.
        watch: receives the news.
        command: the words of the command line, for the record.

    Raises:
        ValueError: no slides, ids that collide, classes without a mask, a folder of mixed numerics.
        FileNotFoundError, OutputError: an input or the mask doesn't exist; the output folder can't be written.
    """
    out, tiling, options, watch = Path(out), tiling or TileOptions(), options or RunOptions(), watch or Progress()
    cohort = named(find_slides(slides, exclude=out), tiling, options)
    return tile_cohort(cohort, out, tiling, options, watch, command)


def tile_cohort(
    cohort: Sequence[SlideEntry],
    out: Path,
    tiling: TileOptions,
    options: RunOptions,
    watch: Progress,
    command: Sequence[str] = (),
) -> RunResult:
    """`run_tile` for slides that are found already."""
    with StopFlag(watch.stopping) as stop:
        check_tissue(cohort, tiling)
        check_names(cohort, out)
        stage = TileStage(out, tiling, options)
        folder = stage.folder
        ids = {entry.slide_id for entry in cohort}
        entries = chosen(cohort, out, "tile", [folder], options, tiles=folder)
        todo = [entry for entry in entries if stage.done(entry) is None]
        run = CohortRun(
            out=out,
            verb="tile",
            entries=entries,
            stages=[folder],
            options={**to_dict(tiling), **to_dict(options)},
            command=command,
            watch=watch,
            stop=stop,
            cohort=sorted(ids),
            max_failures=options.max_failures,
            dry_run=options.dry_run,
            made_with=[stage.made_with(entries, ids)],
        )

        def plan() -> Plan:
            return _plan(entries, todo, cohort, out, tiling, options)

        if options.over_ray:
            from gigapath.cohort.ray_tasks import RayTasks  # where it is asked for

            with RayTasks(run, address=options.ray_address, cores=options.worker_cores, device="none") as workers:
                reading = dataclasses.replace(options, workers=options.reading_threads(workers.cores))
                workers.start(partial(_worker_job, tiling=tiling, options=reading))
                todo = largest_first(todo, folder)
                result = run.over_slides(todo, workers.process, lambda: workers.with_line(plan()))
        else:
            result = run.over_slides(todo, run.in_process(lambda entry: [run.make(stage, entry)]), plan)
        if not options.dry_run:
            write_contact_sheet(out)
    return result


def _worker_job(run: CohortRun, found: None, *, tiling: TileOptions, options: RunOptions) -> tuple["_TileJob", None]:
    """The job of one of Ray's workers."""
    return _TileJob(run, TileStage(run.out, tiling, options)), None


@dataclasses.dataclass(frozen=True)
class _TileJob:
    run: CohortRun
    stage: "TileStage"

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        """Nothing is to be read ahead."""

    def work(self, entry: SlideEntry) -> list[Status]:
        """Tile a slide, unless a worker that was lost had just done it."""
        return [self.stage.done(entry) or self.run.make(self.stage, entry)]


@dataclasses.dataclass
class TileStage(Stage):
    """From a slide to its tiles, cut as `tiling` says: `tiles/<id>.h5` in the output folder `out`, with a preview."""

    out: Path
    tiling: TileOptions
    options: RunOptions
    name = "tiles"

    def __post_init__(self) -> None:
        self.folder = self.out / "tiles"

    def identity(self, entry: SlideEntry) -> dict[str, Any]:
        options = to_dict(options_for(entry, self.tiling))
        numbers = {name: value for name, value in options.items() if name not in _ACCEPTANCE}
        numbers["slide_mpp"] = entry.mpp if entry.mpp is not None else self.tiling.slide_mpp
        if numbers["tissue"] not in METHODS:
            numbers["tissue"] = _mask_digest(Path(numbers["tissue"]), entry.slide_id)
        if self.tiling.max_tiles is None:
            del numbers["seed"]
        return {**numbers, "slide_bytes": entry.path.stat().st_size, "numerics_version": TILES_NUMERICS_VERSION}

    def make(self, entry: SlideEntry, identity: Mapping[str, Any]) -> Outcome:
        if entry.mask is not None and not entry.mask.exists():
            raise SlideError(
                "mask: expected the file that the manifest names, got none. Correct its row in the manifest."
            )
        facts = _file_facts(entry, self.options)
        # Where tiles lie never depends on the reader: unless told to leave it to OpenSlide, what equals it may read.
        with open_entry(entry, self.tiling, "openslide" if self.options.reader == "openslide" else "auto") as slide:
            plan = plan_tiles(slide, options_for(entry, self.tiling), workers=self.options.reading_threads())
            picture = preview_picture(slide, plan.overview)
        tiles = dataclasses.replace(plan.tiles, attrs={**plan.tiles.attrs, "identity": digest(identity)})
        write_tiles(self.path(entry), tiles)
        preview = self.out / "previews" / f"{entry.slide_id}.jpg"
        write_preview(preview, plan.overview, plan.mask, plan.tiles, picture=picture)
        return Outcome(
            status="done" if len(plan.tiles) else "no_tissue",
            tiles=len(plan.tiles),
            warnings=plan.warnings,
            facts={**slide_facts(plan), **facts},
            digest=tiles_digest(plan.tiles, entry),
        )

    def read(self, entry: SlideEntry) -> Tiles:
        """The slide's tiles, from their file also where this run made them: the features' file is the same to the last
        byte then."""
        return read_tiles(self.path(entry))

    def made_with(self, entries: Sequence[SlideEntry], cohort: Collection[str]) -> StageOptions:
        """What the tiles of a run over these slides are made with; slides that can't be looked at are left out."""
        own = {}
        for entry in entries:
            with contextlib.suppress(OSError):
                own[entry.slide_id] = self.identity(entry)
        shared = {**to_dict(self.tiling), "numerics_version": TILES_NUMERICS_VERSION}
        instead = f"; embed --tiles {self.folder.parent} takes the tiles as they are"
        return self._made_with(shared, own, cohort, instead=instead)


# Slides that are planned, read and encoded at once, and one more.
_HELD = 4


@dataclasses.dataclass
class GivenTiles:
    """Tiles of another folder, made by `gigapath tile`; those of the last slides are held, for their name, to be read
    and to be written."""

    folder: Path
    _held: dict[str, Tiles] = dataclasses.field(default_factory=dict)

    def read(self, entry: SlideEntry) -> Tiles:
        """The slide's tiles, from their file; SlideError where there are none, or its last tiling came to nothing."""
        held = self._held.get(entry.slide_id)
        if held is None:
            held = self._held[entry.slide_id] = self._read(entry)
            for slide_id in list(self._held)[:-_HELD]:
                self._held.pop(slide_id, None)
        return held

    def _read(self, entry: SlideEntry) -> Tiles:
        path, status = self.folder / f"{entry.slide_id}.h5", read_status(self.folder, entry.slide_id)
        if not path.is_file():
            if status is not None and status.status == "failed":  # its reason is worth more than that it has no tiles
                raise SlideError(status.error)
            raise SlideError(
                f"slide {entry.slide_id!r}: expected its tiles, got none in the folder of --tiles. Tile it there first."
            )
        if status is not None and not status.finished:  # the file is an earlier run's, made with other options
            raise SlideError(
                f"slide {entry.slide_id!r}: expected its tiles, got older ones: its last tiling ended as "
                f"{status.status!r}. Tile it again in the folder of --tiles."
            )
        return read_tiles(path)

    def digest(self, entry: SlideEntry) -> str:
        """Names the slide's tiles."""
        return tiles_digest(self.read(entry), entry)


def tiles_digest(tiles: Tiles, entry: SlideEntry) -> str:
    """A short name for the tiles of a slide, however they were found: what is read where, of which file."""
    content = hashlib.sha256()
    geometry = [tiles.level, tiles.read_size, tiles.tile_size, tiles.tile_size_level0, entry.path.stat().st_size]
    content.update(json.dumps(geometry).encode())
    for array in (tiles.coords_level0, tiles.cells):
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]


def slide_facts(plan: TilePlan) -> dict[str, Any]:
    """Provenance columns of a tiled slide: plain numbers and words."""
    tiles, attrs = plan.tiles, plan.tiles.attrs
    width, height = attrs["slide_size"]
    mpp_x, mpp_y = attrs["mpp_level0"]
    return {
        "vendor": attrs["vendor"],
        "scanner": attrs["scanner"],
        "width": width,
        "height": height,
        "objective_power": attrs["objective_power"],
        "mpp_x": mpp_x,
        "mpp_y": mpp_y,
        "mpp_source": attrs["mpp_source"],
        "level": tiles.level,
        "read_width": tiles.read_size[0],
        "read_height": tiles.read_size[1],
        "tile_size": tiles.tile_size,
        "mpp": tiles.mpp,
        "tissue_method": plan.mask.method,
        "tissue_threshold": plan.mask.threshold,
        "tissue_area_mm2": round(plan.mask.area_mm2, 4),
        "tissue_pieces": plan.mask.pieces,
        **{f"dropped_{reason.replace(' ', '_')}": count for reason, count in plan.dropped.items()},
    }


def write_contact_sheet(out: Path) -> None:
    """Put the previews of all slides of an output folder on one sheet, suspects first."""
    derive(lambda: draw_contact_sheet(out), lambda: changed([out / "tiles"]))


def _mask_digest(path: Path, slide_id: str) -> str:
    """Names a mask by its content: a file, or the slide's files in a folder."""
    name = glob.escape(slide_id)
    files = sorted([*path.glob(f"{name}.*"), *path.glob(f"{name}_patches.h5")]) if path.is_dir() else [path]
    # opening a pipe would wait for ever; `make` says what is wrong with it
    return "sha256:" + " ".join(sha256_of(file) for file in files if not file.exists() or file.is_file())


def _file_facts(entry: SlideEntry, options: RunOptions) -> Mapping[str, Any]:
    """The slide file's SHA-256 where asked for, once its MD5 is what the manifest says."""
    if options.hash != "full":
        return {}
    if entry.md5:
        md5 = hex_digest(entry.path, hashlib.md5(usedforsecurity=False))
        if md5 != entry.md5:
            raise SlideError(
                f"slide {entry.slide_id!r}: expected MD5 {entry.md5} by the manifest, got {md5}. "
                "Copy the slide again, or correct the manifest."
            )
    return {"file_sha256": sha256_of(entry.path)}


def _plan(
    entries: Sequence[SlideEntry],
    todo: Sequence[SlideEntry],
    cohort: Sequence[SlideEntry],
    out: Path,
    tiling: TileOptions,
    options: RunOptions,
) -> Plan:
    """What a tiling run is going to do."""
    skipped = len(entries) - len(todo)
    lines = [
        f"{slides_in_words(len(entries))}: {len(todo)} to tile, {skipped} already done with these settings, skipped.",
        f"tiles of {tiling.tile_size} px at {tiling.mpp:g} microns a pixel, tissue by {_rule(tiling)}, "
        f"at least {tiling.min_tissue:g} of a tile.",
    ]
    if tiling.max_tiles is not None:
        lines.append(f"at most {tiling.max_tiles} tiles a slide, spread evenly over its tissue (seed {tiling.seed}).")
    lines[:0] = share_in_words(entries, cohort, options)
    guess = estimate_tiles([], todo, tiling)
    work = f"{tiles_in_words(guess, exact=not todo)} into {out}; their pixels are read when they are embedded"
    facts: dict[str, float] = {
        "slides": len(entries),
        "to_tile": len(todo),
        "skipped": skipped,
        "tiles_about": guess,
    }
    if todo:
        facts["seconds"] = estimate_tiling(todo, tiling, options.reading_threads())
        work += f"; about {in_words(facts['seconds'])} (measured by reading a block of some slides)"
    lines.append(f"{work}.")
    return Plan(tuple(lines), len(entries), skipped, facts=facts)


def _rule(tiling: TileOptions) -> str:
    return tiling.tissue if tiling.tissue in METHODS else f"the mask {tiling.tissue}"
