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
import importlib.util
import json
import mimetypes
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gigapath
from gigapath.cohort.record import hide_paths
from gigapath.features import parse_embedding, read_slides
from gigapath.file_names import folder_name
from gigapath.files import check_writable, write_text_atomic
from gigapath.machine import available_cores
from gigapath.options import Options, option
from gigapath.progress import Progress
from gigapath.report.collecting import Cohort, collect_cohort, fitted_heads, is_trained, read_runs
from gigapath.report.pictures import METHOD, Sources, notes_on_maps, remove_unshown, write_maps, write_pictures
from gigapath.report.results import Results, collect_results

MAX_IN_ONE_FILE = 20  # slides
SIDE, SIDE_IN_ONE_FILE = 4096, 2048


@dataclass(frozen=True)
class ReportOptions(Options):
    """How the report is made."""

    single_file: bool = option(False, f"all pictures inside report.html, for up to {MAX_IN_ONE_FILE} slides")
    title: str = option("gigapath report", "what stands at the head of the page", metavar="TEXT")
    side: int | None = option(
        None,
        f"the longer side of a slide's largest picture, in pixels (default: {SIDE}; {SIDE_IN_ONE_FILE} with "
        "--single-file)",
        at_least=256,
        at_most=8192,
    )
    embedding: str | None = option(
        None,
        "the slide embedding that is drawn (default: default, or tile-mean without a slide encoder)",
        metavar="NAME",
    )
    projection: str = option(
        "auto",
        "how slides are laid out in two dimensions; auto is UMAP where installed, else t-SNE, and PCA for fewer than "
        "20 slides or more than 5,000",
        choices=("auto", "umap", "tsne", "pca"),
    )
    overwrite: bool = option(False, "write over a page that was made from other folders")
    workers: int | None = option(None, "threads that read slides (default: one per core)", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding is not None and parse_embedding(self.embedding).pooling == "tiles":
            raise ValueError(f"--embedding: expected one vector a slide, got {self.embedding!r}.")

    @property
    def picture_side(self) -> int:
        """The longer side of a slide's largest picture, in pixels."""
        return self.side or (SIDE_IN_ONE_FILE if self.single_file else SIDE)


SEED = 0
FEW = 20  # neighbors say little among fewer slides: PCA
MANY = 5000  # t-SNE and UMAP of more slides take minutes: PCA too
LEAST = 3  # slides; fewer are no picture
COMPONENTS = 50  # what t-SNE starts from, as its authors advise

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Where the slides lie.

    Attributes:
        name: of the folder of slide embeddings.
        embedding: which embedding of it.
        method: in words, with its settings.
        axes: what the two axes are.
        slide_ids: S names.
        points: (S, 2).
        trained: False where the slide encoder's weights are random.
    """

    name: str
    embedding: str
    method: str
    axes: tuple[str, str]
    slide_ids: tuple[str, ...]
    points: FloatArray
    trained: bool


def project_folder(folder: Path, embedding: str | None, method: str) -> Projection | None:
    """Lay out the slides of a folder of slide embeddings; None for fewer than LEAST.

    Args:
        folder: a `slides_*` folder.
        embedding: the name of an embedding, or None for the default output, or the mean where there is no other.
        method: "auto", "umap", "tsne" or "pca".

    Raises:
        FileNotFoundError: no embeddings in the folder.
        ValueError: slides without that embedding, or of mixed numerics.
        ImportError: a method that is not installed was asked for.
    """
    name = embedding or ("tile-mean" if folder.name.startswith("slides_mean__") else "default")
    with warnings.catch_warnings():  # that the encoder is untrained stands at the picture
        warnings.simplefilter("ignore", UserWarning)
        ids, vectors = read_slides(folder, name)
    if len(ids) < LEAST:
        return None
    points, words, axes = project(vectors.astype(np.float64), method)
    return Projection(folder.name, name, words, axes, tuple(ids), points, is_trained(folder))


def project(vectors: FloatArray, method: str) -> tuple[FloatArray, str, tuple[str, str]]:
    """(points (S, 2), the method in words, the two axes) of vectors (S, D)."""
    if method == "auto":
        method = "pca"
        if FEW <= len(vectors) <= MANY:
            method = next((name for name, module in _MODULES.items() if _installed(module)), "pca")
    if method == "umap":
        return _umap(vectors)
    if method == "tsne":
        return _tsne(vectors)
    scores, shares = principal_components(vectors, 2)
    first, second = (f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    return scores, "PCA", (first, second)


_MODULES = {"umap": "umap", "tsne": "sklearn"}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def principal_components(vectors: FloatArray, count: int) -> tuple[FloatArray, Sequence[float]]:
    """(scores (S, count), share of the variance of each); the sign makes the largest loading positive."""
    centered = vectors - vectors.mean(axis=0)
    left, values, right = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    total = float((values**2).sum()) or 1.0
    scores = np.zeros((len(vectors), count))
    held = min(count, len(values))
    scores[:, :held] = (left * values * np.where(signs == 0, 1, signs))[:, :held]
    shares = [float(value**2) / total for value in values[:held]]
    return scores, [*shares, *[0.0] * (count - held)]


def _umap(vectors: FloatArray) -> tuple[FloatArray, str, tuple[str, str]]:
    try:
        import umap
    except ImportError as error:
        raise ImportError(
            "--projection umap: umap-learn is not installed. Install it (pip install 'gigapath[umap]'), or take tsne."
        ) from error
    neighbors = min(15, len(vectors) - 1)
    # With a seed UMAP runs in one thread.
    layout = umap.UMAP(n_neighbors=neighbors, metric="cosine", random_state=SEED, n_jobs=1)
    with warnings.catch_warnings():  # of slides alike it says in three lines how it goes on, which it does
        warnings.simplefilter("ignore", UserWarning)
        found = layout.fit_transform(vectors)
    words = f"UMAP ({neighbors} neighbors, cosine, seed {SEED})"
    return np.asarray(found, np.float64), words, ("UMAP 1 (no unit)", "UMAP 2 (no unit)")


def _tsne(vectors: FloatArray) -> tuple[FloatArray, str, tuple[str, str]]:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "--projection tsne: scikit-learn is not installed. Install it (pip install 'gigapath[train]'), or take pca."
        ) from error
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    start, _ = principal_components(vectors, min(COMPONENTS, *vectors.shape))
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(start)
    words = f"t-SNE (perplexity {perplexity:g}, seed {SEED})"
    return np.asarray(found, np.float64), words, ("t-SNE 1 (no unit)", "t-SNE 2 (no unit)")


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
        folder: the output folder of tile, embed, slide-embed, finetune, predict, probe or compare.
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
            f"{home}: expected the output folder of tile, embed, slide-embed, finetune, predict, probe or compare, "
            "found neither slides nor results in it."
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
            projections, more = _projections(cohort, options)
            notes += more
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


def _encoder_label(cohort: Cohort) -> str | None:
    """The tile encoder's name, and what the last run with it says of it: a stand-in must not pass for GigaPath."""
    if cohort.features is None:
        return None
    name = cohort.features.name.removeprefix("features_")
    described = [run.get("facts", {}).get("tile_encoder", {}) for run in cohort.runs]
    texts = [str(each.get("description", "")) for each in described if each.get("name") == name]
    return f"{name} ({texts[-1]})" if texts and texts[-1] else name


def _of_slides(
    cohort: Cohort, results: Sequence[Results], media: Sequence[Mapping[str, Any]], projections: Sequence[Projection]
) -> dict[str, Any]:
    """The slides column by column, which is half the size of a mapping for each."""
    predicted = [
        (f"{each.name} " if each.name else "", each.predictions) for each in results if each.predictions is not None
    ]
    rows = []
    for slide in cohort.slides:
        row = dict(slide.values)
        for prefix, predictions in predicted:
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
        "encoder": _encoder_label(cohort),
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
