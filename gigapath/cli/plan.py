"""`gigapath plan SLIDES`: what a cohort is made of and what it will cost, before anything is tiled."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from gigapath.cli.arguments import EXIT_FAILED_SLIDES, Folder, Json, Slides, Words, verb
from gigapath.cli.progress import Terminal
from gigapath.cohort.status import failure_lines, failures_by_kind
from gigapath.embedding.preflight import CohortHeaders, PlanOptions, read_headers, run_pilot
from gigapath.preprocessing.tiling import TileOptions
from gigapath.releases import RELEASES
from gigapath.text import in_bytes, in_words, rounded, slides_in_words

_SHOWN = 10
_BAR = 30


@verb
def plan(
    slides: Slides,
    /,
    *,
    out: Folder | None = None,
    as_json: Json = False,
    plan: PlanOptions,
    tiles: TileOptions,
    words: Words = (),
) -> int:
    """Print what the headers say; the status is 3 where a run would refuse a slide.

    Args:
        out: the output folder of --pilot
    """
    if plan.pilot is not None and out is None:
        raise ValueError("--pilot: expected --out DIR beside it, where tiles and previews go.")
    if plan.pilot is None and out is not None:
        raise ValueError("--out: expected --pilot N beside it: without a pilot nothing is written. Leave it out.")
    folder = None if out is None else Path(out)
    found, entries = read_headers(slides, tiles, exclude=folder)
    failed = False
    if plan.pilot is not None and folder is not None:
        with Terminal("slide", machine=True, document=False) as watch:
            found, result = run_pilot(found, entries, folder, plan.pilot, tiles, watch=watch, command=words)
        failed = watch.report(result) != 0
    rate, source, seconds = plan.tiles_per_second, "stated", None
    if rate is None and plan.tile_encoder is not None:
        from gigapath.embedding.run import measure_encoder  # torch takes seconds, which the headers do not need

        usable = sum(header.places > 0 for header in found.headers)
        source = "measured on one batch"
        rate, seconds = measure_encoder(plan.tile_encoder, plan.device, tiles=found.tiles, slides=usable)
    if seconds is None and rate is not None:
        seconds = found.tiles / rate
    if as_json:
        print(json.dumps(found.as_dict(rate, seconds), indent=2, ensure_ascii=False))
    else:
        for line in lines(found, rate, seconds, source):
            print(line)
        if folder is not None and found.piloted:
            print(f"look at {folder / 'contact_sheet.jpg'} before anything is embedded.")
    return EXIT_FAILED_SLIDES if failed or found.refused or found.id_problems else 0


def lines(found: CohortHeaders, rate: float | None, seconds: float | None, source: str) -> Iterable[str]:
    """The headers for a person."""
    headers = found.headers
    yield f"{slides_in_words(len(headers))}, {in_bytes(sum(header.bytes for header in headers))}"
    yield from _counted("formats", Counter(header.vendor or "unknown" for header in headers))
    yield from _counted("scanners", Counter(header.scanner or "unknown" for header in headers))
    counts = found.native_mpp()
    if counts:
        yield "microns per pixel of level 0:"
    for mpp, count in counts.items():
        bar = "#" * max(1, round(_BAR * count / max(counts.values())))
        yield f"  {mpp:5.2f}  {count:>7,}  {bar}"
    refused = {header.slide_id: header.error for header in headers if header.error}
    yield from failure_lines(failures_by_kind(refused), "refused")
    lacking = {
        header.slide_id: f"{in_bytes(header.missing_bytes)} missing" for header in headers if header.missing_bytes
    }
    yield from _listed("cut short", lacking)
    clashes = {h.slide_id: h.mpp_problem for h in headers if h.mpp_problem and not h.error}
    yield from _listed("contradictory microns per pixel", clashes)
    yield from _listed("ids that a run rejects", dict.fromkeys(found.id_problems, ""))
    groups = {", ".join(group): "" for group in found.duplicates}
    yield from _listed("groups of identical files", groups)
    yield from _listed("ids that look like names or dates", found.odd_ids)
    yield (
        f"about {rounded(found.tiles):,} tiles: {found.tissue_share:.0%} of the grid is counted as tissue, "
        + (f"as on the pilot's {slides_in_words(found.piloted)}." if found.piloted else "a typical share.")
    )
    sizes = ", ".join(f"{in_bytes(found.tiles * release.tile_dim * 4)} ({name})" for name, release in RELEASES.items())
    yield f"tile embeddings in float32: {sizes}."
    if rate is None or seconds is None:
        yield "hours: give --tiles-per-second X, or --tile-encoder NAME to measure one batch here."
    else:
        yield f"{seconds / 3600:,.3g} GPU hours at {rate:,.3g} tiles/s ({source}): {in_words(seconds)} on one."


def _counted(title: str, counts: Counter[str]) -> Iterable[str]:
    yield f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _listed(title: str, items: Mapping[str, str]) -> Iterable[str]:
    """A title with a count, and the first few below it."""
    if items:
        yield f"{title}: {len(items):,}"
    for name, words in list(items.items())[:_SHOWN]:
        yield f"  {name}: {words}" if words else f"  {name}"
    if len(items) > _SHOWN:
        yield f"  and {len(items) - _SHOWN:,} more"
