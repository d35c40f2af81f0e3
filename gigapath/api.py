"""The verbs as functions: a path or many, and the command line's options as keywords of the same names.

Each calls what its verb calls, shows the same progress (a bar on a terminal and in a notebook, lines in a log), and
returns a result that prints as a table; `help(gigapath.embed)` lists every option. S slides, N tiles of a slide, D
width of an embedding.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigapath.cohort.run import RunResult
from gigapath.cohort.status import failure_lines, failures_by_kind
from gigapath.embedding.options import EmbedOptions, RunOptions, SlideEmbedOptions
from gigapath.features import TileEmbeddings
from gigapath.features import read_features as read_file
from gigapath.features.folders import find_feature_files, slide_name
from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions
from gigapath.linear_probe import ProbeOptions, SlideProbeOptions, TileProbeOptions
from gigapath.options import KeepOptions, as_keywords
from gigapath.preprocessing.slide import SlideError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.pretraining.options import CohortOptions, PretrainingOptions, SizeOptions, TaskOptions
from gigapath.progress import Progress
from gigapath.text import slides_in_words

if TYPE_CHECKING:
    from gigapath.finetune.run import RunResult as FineTuned
    from gigapath.linear_probe.slides import SlideProbe
    from gigapath.linear_probe.tiles import TileProbe
    from gigapath.pretraining import Pretrained

__all__ = ["FeatureFolder", "embed", "finetune", "pretrain", "probe", "read_features", "slide_embed", "tile"]


def __dir__() -> list[str]:
    """Tab completion shows the public names alone."""
    return __all__


Place = str | os.PathLike[str]
Places = Place | Iterable[Place]


@as_keywords(tiling=TileOptions, run=RunOptions)
def tile(slides: Places, *, out: Place, quiet: bool = False, tiling: TileOptions, run: RunOptions) -> RunResult:
    """Find tissue and lay tiles, as `gigapath tile`: look at the previews before embedding.

    Args:
        slides: slide files, folders of them, manifests (.csv); one or many.
        out: the output folder; what is done there with the same options is skipped.
        quiet: show no progress.

    Returns:
        The result: prints as a table, `to_frame()` has a row a slide.

    Raises:
        ValueError, FileNotFoundError, OSError: nothing could start; one sentence.
        SlideError: no slide came through. Where only some fail, a warning names them.
        KeyboardInterrupt: the run was stopped; the same call goes on from there.
    """
    from gigapath.embedding.tiling import run_tile

    return _run(
        "slide", quiet, lambda watch: run_tile(_paths(slides), Path(out), tiling=tiling, options=run, watch=watch)
    )


@as_keywords(encoders=EmbedOptions, tiling=TileOptions, run=RunOptions)
def embed(
    slides: Places = (),
    *,
    out: Place,
    quiet: bool = False,
    encoders: EmbedOptions,
    tiling: TileOptions,
    run: RunOptions,
) -> RunResult:
    """Bring slides to tiles, tile embeddings and slide embeddings, as `gigapath embed`.

    Args:
        slides: as for `tile`; may be left out with `tiles`.
        out: as for `tile`; gets `features_*/<slide>.h5` (N, D), `slides_*/<slide>.h5` and slides.csv.
        quiet: show no progress.

    Returns:
        As `tile`. `gigapath.read_slides(out)` gives the slide vectors, `gigapath.read_features(out)` those of tiles.

    Raises:
        PermissionError, ConnectionError: the weights are not to be had.
        ValueError, FileNotFoundError, SlideError, KeyboardInterrupt: as `tile`.
    """
    from gigapath.embedding.run import run_embed

    return _run(
        "tile",
        quiet,
        lambda watch: run_embed(_paths(slides), Path(out), tiling=tiling, embedding=encoders, options=run, watch=watch),
    )


@as_keywords(embedding=SlideEmbedOptions, run=KeepOptions)
def slide_embed(
    features: Places,
    *,
    out: Place | None = None,
    quiet: bool = False,
    embedding: SlideEmbedOptions,
    run: KeepOptions,
) -> RunResult:
    """Embed slides from the embeddings of their tiles, ours or another tool's, as `gigapath slide-embed`.

    Args:
        features: files of tile embeddings or folders of them; one or many.
        out: the output folder; by default that of the run which made the features.
        quiet: show no progress.

    Returns:
        As `tile`.

    Raises:
        PermissionError, ConnectionError: the weights are not to be had.
        ValueError, FileNotFoundError, SlideError, KeyboardInterrupt: as `tile`.
    """
    from gigapath.embedding.slide_embedding import run_slide_embed

    where = None if out is None else Path(out)
    return _run(
        "slide",
        quiet,
        lambda watch: run_slide_embed(_paths(features), where, embedding=embedding, options=run, watch=watch),
    )


@as_keywords(options=ProbeOptions, tiles=TileProbeOptions, slides=SlideProbeOptions)
def probe(
    embeddings: Place,
    *,
    out: Place,
    labels: Place | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    options: ProbeOptions,
    tiles: TileProbeOptions,
    slides: SlideProbeOptions,
) -> "TileProbe | SlideProbe":
    """Fit and score a linear layer on frozen embeddings, as `gigapath probe`.

    Args:
        embeddings: tiles: a zip, folder or file of embeddings; slides: the output folder of `embed`.
        out: the folder of the results.
        labels: CSV; not needed where the embeddings of tiles carry their labels.
        overwrite: probe again where the folder holds results of other options.
        quiet: show no progress.

    Returns:
        The scores with their intervals: prints as a table, `to_frame()` has a row a score.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing was written.
    """
    from gigapath.linear_probe import run_probe

    with _watch(quiet) as watch:
        found, _ = run_probe(
            os.fspath(embeddings),
            os.fspath(out),
            labels=None if labels is None else os.fspath(labels),
            overwrite=overwrite,
            options=options,
            tiles=tiles,
            slides=slides,
            watch=watch,
        )
    return found


@as_keywords(join=JoinOptions, split=SplitOptions, model=ModelOptions, training=TrainingOptions)
def finetune(
    features: Places = (),
    *,
    task: Place | None = None,
    labels: Place | None = None,
    tiles: Place | None = None,
    tile_encoder: str = "gigapath",
    out: Place,
    splits: Place | None = None,
    pretrained: Place = "hf_hub:prov-gigapath/prov-gigapath",
    controls: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    join: JoinOptions,
    split: SplitOptions,
    model: ModelOptions,
    training: TrainingOptions,
) -> "FineTuned":
    """Fine-tune the slide encoder on labelled slides, or a tile encoder on labelled tiles, as `gigapath finetune`.

    Args:
        features: files of tile embeddings or folders of them; one or many.
        task: panda, mutation_5_gene, or a YAML file (`gigapath.finetune.new_task` writes one).
        labels: CSV with a row a slide; with `tiles` a row a tile, where the tiles don't say their labels.
        tiles: labelled tile images to tune a tile encoder on, in place of features and task.
        tile_encoder: of `tiles`, as `gigapath.tile_encoder.load_tile_encoder` takes it.
        out: the output folder; a run that it holds goes on.
        splits: folder with train_0.csv, val_0.csv, test_0.csv, ...; by default folds are drawn.
        pretrained: slide encoder: hf_hub:REPO, a release's name, a file, or "" for random weights.
        controls: train controls too, and put all in one table.
        dry_run: show the plan and write nothing.
        quiet: say nothing of the plan and the epochs.

    Returns:
        The scores over the folds: prints as a table, `to_frame()` has a row a score.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with what was given, before anything is trained.
        KeyboardInterrupt: the run was stopped; the same call goes on after the last finished epoch.
    """
    from gigapath.cli.finetune import tune

    table, source, folder = (None if path is None else os.fspath(path) for path in (labels, tiles, splits))
    with _stoppable(quiet, "slide" if tiles is None else "tile") as (watch, check_stop):
        return tune(
            os.fspath(out),
            task=None if task is None else os.fspath(task),
            features=[os.fspath(path) for path in _paths(features)],
            labels=table,
            splits=folder,
            pretrained=os.fspath(pretrained),
            tiles=source,
            tile_encoder=tile_encoder,
            options=(join, split, model, training),
            controls=controls,
            dry_run=dry_run,
            watch=watch,
            check_stop=check_stop,
        )


@as_keywords(cohort=CohortOptions, sizes=SizeOptions, task=TaskOptions, training=PretrainingOptions)
def pretrain(
    features: Places,
    *,
    out: Place,
    init: Place = "",
    dry_run: bool = False,
    quiet: bool = False,
    cohort: CohortOptions,
    sizes: SizeOptions,
    task: TaskOptions,
    training: PretrainingOptions,
) -> "Pretrained | None":
    """Pretrain the slide encoder on unlabelled slides by predicting hidden tiles, as `gigapath pretrain`.

    Args:
        features: files of tile embeddings or folders of them; one or many.
        out: the output folder; a run that it holds goes on.
        init: weights to go on from: hf_hub:REPO, a release's name or a file; "" for new ones.
        dry_run: say the plan alone; nothing is written, and None is returned.
        quiet: say nothing of the plan and the epochs.

    Returns:
        `weights` is the file for `slide_encoder.create_model`; `epochs` hold the measures, the start first.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with what was given, before anything is trained.
        KeyboardInterrupt: the run was stopped; the same call goes on after the last checkpoint.
    """
    from gigapath.pretraining import pretrain as run

    paths, weights = _paths(features), os.fspath(init)
    groups: dict[str, Any] = {"cohort": cohort, "sizes": sizes, "task": task, "training": training}
    with _stoppable(quiet) as (watch, check_stop):
        return run(paths, Path(out), init=weights, **groups, dry_run=dry_run, watch=watch, check_stop=check_stop)


class FeatureFolder(Mapping[str, TileEmbeddings]):
    """The tile embeddings of many slides by slide; each is read when it is asked for, and none is kept.

    `gigapath.read_features(folder)` makes it.
    """

    def __init__(self, paths: Places, **how: Any) -> None:
        """Find the files; `how` is what `read_features` takes."""
        self.files = {slide_name(file): file for file in find_feature_files(_paths(paths))}
        self._how = how

    def __getitem__(self, slide_id: str) -> TileEmbeddings:
        return read_file(self.files[slide_id], **self._how)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        """One line, with the first slides."""
        return f"FeatureFolder({slides_in_words(len(self))}: {', '.join([*self.files][:3])}{', ...' * (len(self) > 3)})"


def read_features(path: Places, **how: Any) -> TileEmbeddings | FeatureFolder:
    """Read tile embeddings, ours or another tool's (TRIDENT, CLAM, Mussel, STAMP, slide2vec, the published code).

    Args:
        path: a file of one slide; or a folder, such as the output folder of `embed`, or many paths.
        how: `tile_size_level0`, `embed_dim`, `cells`, `order`, `coordinates`, `verify`; see
            `gigapath.features.read_features`.

    Returns:
        Of a file its `TileEmbeddings`: `features` (N, D), `coords` (N, 2) top-left (x, y) in level-0 pixels. Of a
        folder or many paths a mapping from slide to those, read when asked for.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no tile embeddings, those of several encoders, or a damaged file; one sentence that names it.
    """
    if isinstance(path, str | os.PathLike) and not Path(path).is_dir():
        return read_file(path if isinstance(path, str) else Path(path), **how)
    return FeatureFolder(path, **how)


def _paths(paths: Places) -> list[Path]:
    """One path or many as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def _watch(quiet: bool, unit: str = "slide") -> AbstractContextManager[Progress]:
    """What shows the news of long work, or nothing."""
    from gigapath.cli.progress import Terminal

    return nullcontext(Progress()) if quiet else Terminal(unit)


@contextmanager
def _stoppable(quiet: bool, unit: str = "slide") -> Iterator[tuple[Progress, Callable[[], None]]]:
    """`stoppable` for a caller in Python, whose work is stopped as by Ctrl-C."""
    from gigapath.cli.progress import stoppable
    from gigapath.progress import Stopped

    try:
        with stoppable(unit, quiet=quiet) as both:
            yield both
    except Stopped as stopped:
        raise KeyboardInterrupt(f"stopped by {stopped}; the same call goes on from the last checkpoint") from None


def _run(unit: str, quiet: bool, work: Callable[[Progress], RunResult]) -> RunResult:
    """The result of a run, shown while it works; a run that was stopped or came to nothing raises."""
    with _watch(quiet, unit) as watch:
        result = work(watch)
    if result.outcome == "stopped":
        raise KeyboardInterrupt(f"{result.summary} What is done is kept: the same call goes on from there")
    if result.failed:
        lines = failure_lines(failures_by_kind(result.failed))
        text = "\n".join([f"{slides_in_words(len(result.failed))} of {len(result.rows)} failed:", *lines])
        if len(result.failed) == len(result.rows):
            raise SlideError(text)
        warnings.warn(text, stacklevel=4)
    return result
