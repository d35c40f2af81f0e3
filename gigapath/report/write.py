"""`write_report`: from an output folder to report.html and report_files/.

Everything but the pictures is in one HTML file: data as compressed JSON, styles and scripts inlined. What comes from a
run reaches the page through JSON alone, and the script sets text, never markup. Scripts other than ours do not run: the
page's own policy lists the hashes of those that may.
"""

import base64
import gzip
import hashlib
import html
import importlib.resources
import json
import mimetypes
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gigapath
from gigapath.cohort.record import hide_paths
from gigapath.file_names import folder_name
from gigapath.files import check_writable, write_text_atomic
from gigapath.machine import available_cores
from gigapath.progress import Progress
from gigapath.report.collecting import Cohort, collect_cohort, fitted_heads, read_runs
from gigapath.report.maps import Sources, notes_on_maps, write_maps
from gigapath.report.options import MAX_IN_ONE_FILE, ReportOptions
from gigapath.report.pictures import METHOD, remove_unshown, write_pictures
from gigapath.report.projection import Projection, project_folder
from gigapath.report.results import Results, collect_results

PAGE, FILES = "report.html", "report_files"
SCRIPTS = ("openseadragon/openseadragon.min.js", "report.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_INPUTS = re.compile(r'<meta name="gigapath-report" content="(\w*)">')
_OLDER = 'Content-Security-Policy" content="default-src &#x27;none&#x27;'  # a page of a version that names no inputs
TERMS = (
    "For research use only. Not for clinical care, diagnosis or any clinical decision.",
    "Embeddings, maps and scores fall under the terms of the weights that made them; those of Prov-GigaPath are their "
    "authors' (research only; the access form of GigaPath-Flash says non-commercial). The code that made this page is "
    "under the Apache License 2.0.",
)
# How columns of slides.csv begin that say how the run went; they stand in the details of a slide alone.
_HIDDEN = "numerics_version_"


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        slides: how many slides it shows.
        without_picture: ids of those of which there is none.
        notes: sentences on what is missing.
    """

    page: Path
    slides: int
    without_picture: tuple[str, ...]
    notes: tuple[str, ...]


def write_report(
    folder: str | Path,
    *,
    slides: str | Path | None = None,
    maps: str | Path | None = None,
    to: str | Path | None = None,
    options: ReportOptions | None = None,
    watch: Progress | None = None,
) -> Report:
    """Write `report.html`, and `report_files/` beside it, of a run or a cohort.

    Args:
        folder: the output folder of tile, embed, slide-embed, finetune, evaluate or probe.
        slides: the output folder that holds the slides of a fine-tuning or probe run; `folder` itself where None.
        maps: the folder of maps; `maps` beside the slides where None.
        to: where the report goes; `folder` where None.
        options: how it is made.
        watch: receives the news.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder that holds neither slides nor results, too many slides for one file, a page made from
            other folders.
        OutputError: the report can't be written.
    """
    options = options or ReportOptions()
    folder = Path(folder)
    home = Path(slides) if slides is not None else folder
    for place in (folder, home, *([Path(maps)] if maps is not None else [])):
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: no such folder. Name the output folder of a run.")
    cohort = collect_cohort(home)
    results = collect_results(folder)
    if cohort is None and (slides is not None or not results):
        raise ValueError(
            f"{home}: expected the output folder of tile, embed, slide-embed, finetune, evaluate or probe, found "
            "neither slides nor results in it."
        )
    count = 0 if cohort is None else len(cohort.slides)
    if options.single_file and count > MAX_IN_ONE_FILE:
        raise ValueError(
            f"--single-file: expected at most {MAX_IN_ONE_FILE} slides, got {count:,}. Leave it out: the pictures go "
            f"to {FILES}/ beside the page."
        )
    target = Path(to) if to is not None else folder
    inputs = _digest_of_inputs(target, folder, home)
    if not options.overwrite:
        _check_same_inputs(target / PAGE, inputs, its_own=target.resolve() == folder.resolve())
    check_writable(target)
    notes: list[str] = []
    data = _about(options, results, read_runs(folder) if cohort is None else cohort.runs)
    media: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gigapath_report_") if options.single_file else nullcontext() as passing:
        files = Path(passing) if passing is not None else target / FILES
        if cohort is not None:
            of_maps = Path(maps) if maps is not None else home / "maps"
            heads = fitted_heads(folder)
            media = _pictures(cohort, files, of_maps, heads, options, watch or Progress())
            notes += notes_on_maps([entry["maps"] for entry in media])
            projections, said = _projections(cohort, options)
            notes += said
            data |= _of_slides(cohort, results, media, projections)
        if options.single_file:
            data["files"] = _contents(files, media)
    data["notes"] = [hide_paths(note) for note in notes]
    write_text_atomic(target / PAGE, render(options.title, inputs, data))
    shown = {} if options.single_file else {entry["folder"]: set(_names(entry)) for entry in media}
    remove_unshown(target / FILES, shown)
    bare = tuple(
        slide.slide_id
        for slide, entry in zip(cohort.slides if cohort is not None else (), media, strict=True)
        if "thumbnail" not in entry
    )
    return Report(target / PAGE, count, bare, tuple(notes))


def _digest_of_inputs(target: Path, *folders: Path) -> str:
    """What a page is known by to be made from the same folders: their places beside it, which move with them."""
    places = [os.path.relpath(folder.resolve(), target.resolve()) for folder in folders]
    return hashlib.sha256("\n".join(places).encode()).hexdigest()[:32]


def _check_same_inputs(page: Path, inputs: str, *, its_own: bool) -> None:
    """Refuse to write over a file that is no page of these inputs."""
    if not page.exists():
        return
    with page.open(encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    stated = _INPUTS.search(head)
    if (its_own and _OLDER in head) if stated is None else stated[1] == inputs:
        return
    what = "no page of gigapath report" if stated is None and _OLDER not in head else "made from other folders"
    raise ValueError(
        f"{page.name}: expected none there, or one of the same folders, got one that is {what}. Choose "
        "another --to, or --overwrite it."
    )


def _pictures(
    cohort: Cohort,
    files: Path,
    maps: Path,
    heads: frozenset[str],
    options: ReportOptions,
    watch: Progress,
) -> list[dict[str, Any]]:
    """Pictures and maps of each slide, in the order of the cohort, with the folder of each in `files`."""
    workers = available_cores() if options.workers is None else options.workers
    media = []
    for number, slide in enumerate(cohort.slides, start=1):
        place = files / folder_name(slide.slide_id)
        pictures = write_pictures(place, cohort, slide, side=options.picture_side, workers=workers)
        sources = Sources(slide.slide_id, cohort.embedded, heads)
        layers = write_maps(place, maps / slide.slide_id, sources) if "frame" in pictures else []
        media.append({"folder": place.name, **pictures, "maps": layers})
        watch.step("slides", number, len(cohort.slides))
    return media


def _projections(cohort: Cohort, options: ReportOptions) -> tuple[list[Projection], list[str]]:
    """Every folder of slide embeddings as points, and sentences on those that can't be."""
    found, notes = [], []
    for folder in cohort.slide_folders:
        try:
            projection = project_folder(folder, options.embedding, options.projection)
        except (ValueError, FileNotFoundError) as error:
            notes.append(f"Slides of {folder.name} are not drawn: {str(error).replace(str(folder), folder.name)}")
            continue
        if projection is not None:
            found.append(projection)
    return found, notes


def _about(options: ReportOptions, results: Sequence[Results], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says of itself, of the runs and of the results."""
    terms = [*TERMS, *(each.terms for each in results if each.terms)]
    return {
        "title": options.title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": gigapath.__version__,
        "implementation": gigapath.__implementation__,
        "terms": list(dict.fromkeys(terms)),
        "runs": list(runs),
        "results": [
            {"name": each.name, "title": each.title, "blocks": each.blocks, "options": each.options or {}}
            for each in results
        ],
        "slides": None,
    }


def _encoder_in_words(cohort: Cohort) -> str | None:
    """The tile encoder's name, and what the last run with it says of it: a stand-in must not pass for GigaPath."""
    if cohort.features is None:
        return None
    name = cohort.features.name.removeprefix("features_")
    said = [run.get("facts", {}).get("tile_encoder", {}) for run in cohort.runs]
    described = [str(each.get("description", "")) for each in said if each.get("name") == name]
    return f"{name} ({described[-1]})" if described and described[-1] else name


def _of_slides(
    cohort: Cohort, results: Sequence[Results], media: Sequence[Mapping[str, Any]], projections: Sequence[Projection]
) -> dict[str, Any]:
    """The slides column by column, which is half the size of a mapping for each."""
    said = [
        (f"{each.name} " if each.name else "", each.predictions) for each in results if each.predictions is not None
    ]
    rows = []
    for slide in cohort.slides:
        row = dict(slide.values)
        for prefix, predictions in said:
            row |= {f"{prefix}{key}": value for key, value in predictions.get(slide.slide_id, {}).items()}
        rows.append(row)
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith(_HIDDEN)]
    return {
        "slides": {
            "ids": [slide.slide_id for slide in cohort.slides],
            "status": [slide.status for slide in cohort.slides],
            "tiles": [slide.tiles for slide in cohort.slides],
            "errors": [slide.error for slide in cohort.slides],
            "warnings": [list(slide.warnings) for slide in cohort.slides],
            "columns": columns,
            "values": [[row.get(name) for name in columns] for row in rows],
        },
        "media": list(media),
        "counts": cohort.counts(),
        "failures": [{"reason": reason, "slides": ids} for reason, ids in cohort.failures()],
        "encoder": _encoder_in_words(cohort),
        "tiles_method": METHOD,
        "projections": [
            {
                "name": each.name,
                "embedding": each.embedding,
                "method": each.method,
                "axes": each.axes,
                "trained": each.trained,
                "ids": each.slide_ids,
                "points": [[float(f"{value:.5g}") for value in point] for point in each.points.tolist()],
            }
            for each in projections
        ],
    }


def _contents(files: Path, media: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """ "folder/file" -> the file as a data address, of every picture that the page names."""
    found = {}
    for entry in media:
        for name in _names(entry):
            path = files / entry["folder"] / name
            kind = mimetypes.types_map[path.suffix]
            content = base64.b64encode(path.read_bytes()).decode()
            found[f"{entry['folder']}/{name}"] = f"data:{kind};base64,{content}"
    return found


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "file" and item:
                yield item
            else:
                yield from _names(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _names(item)


def render(title: str, inputs: str, data: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        title: of the page.
        inputs: digest of the folders that it is made from.
        data: plain JSON values, what `report.js` shows.
    """
    scripts = [script_text(read_asset(name)) for name in SCRIPTS]
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src 'self' file: data:",
            "style-src 'unsafe-inline'",
            "script-src " + " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "title": html.escape(title),
        "inputs": inputs,
        "policy": html.escape(policy, quote=True),
        "style": read_asset("report.css"),
        # Slides of a cohort say much the same of themselves: twenty thousand are 40 MB plain, a few compressed.
        "data": base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode(),
        "viewer_license": html.escape(read_asset("openseadragon/LICENSE.txt").strip()),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    return _PLACE.sub(lambda match: parts[match[1]], read_asset("report.html"))


def script_text(source: str) -> str:
    """A script as it stands in the page: without its map's address, and with nothing that ends its element."""
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE).strip()
    return re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def read_asset(name: str) -> str:
    """The text of a file of the folder `assets`."""
    path = importlib.resources.files("gigapath.report").joinpath("assets")
    for part in name.split("/"):
        path = path.joinpath(part)
    return path.read_text(encoding="utf-8")
