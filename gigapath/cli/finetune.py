"""Training on slides: pretrain, init-task, finetune, predict."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gigapath.cli.arguments import EXIT_FAILED_SLIDES, Checkpoint, Csv, Features, Folder, Name, verb
from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions
from gigapath.options import BootstrapOptions, DeviceOptions
from gigapath.pretraining.options import CohortOptions, PretrainingOptions, SizeOptions, TaskOptions
from gigapath.progress import Progress

if TYPE_CHECKING:
    from gigapath.finetune.run import RunResult


@verb
def init_task(
    labels: str,
    /,
    *,
    label: Annotated[tuple[str, ...], Parameter(metavar="COL")] = (),
    ordinal: bool = False,
    survival: Annotated[tuple[str, str] | None, Parameter(metavar="TIME EVENT")] = None,
    regression: Annotated[str | None, Parameter(metavar="COL")] = None,
    name: Name | None = None,
    to: Annotated[str | None, Parameter(metavar="YAML")] = None,
) -> int:
    """Write the file and say what is in it.

    Args:
        labels: a CSV with a row a slide
        label: column of the label; several = several labels
        ordinal: the classes are grades: cumulative logits, and quadratic-weighted kappa
        survival: instead, columns of the follow-up and of the event (1, or 0 = censored)
        regression: instead, column of an amount
        name: of the task (default: that of the CSV)
        to: where the task goes (default: beside the CSV)
    """
    from gigapath.evaluation.labels import new_task

    path = Path(to or Path(labels).with_suffix(".yaml"))
    task, counts = new_task(
        labels, path, columns=label, name=name, ordinal=ordinal, survival=survival or (), regression=regression
    )
    shares = ", ".join(f"{label} {count:,}" for label, count in counts.items())
    print(f"{path}: task {task.name}, {task.setting}; slides a label: {shares}.")
    return 0


@verb
def finetune(
    *,
    task: Annotated[str | None, Parameter(metavar="TASK")] = None,
    features: Folder | None = None,
    labels: Csv | None = None,
    tiles: Annotated[str | None, Parameter(metavar="FOLDER_OR_ZIP_OR_H5")] = None,
    tile_encoder: Name = "gigapath",
    splits: Folder | None = None,
    pretrained: Annotated[str, Parameter(metavar="WEIGHTS")] = "hf_hub:prov-gigapath/prov-gigapath",
    out: Folder,
    controls: bool = False,
    dry_run: bool = False,
    labels_and_features: JoinOptions,
    folds: SplitOptions,
    model: ModelOptions,
    training: TrainingOptions,
) -> int:
    """Run, telling the plan, each epoch and the table of scores.

    Args:
        task: panda, mutation_5_gene, or a YAML file (gigapath init-task)
        features: folder with a feature file a slide
        labels: a row a slide (with --tiles a row a tile, where the tiles don't say their labels)
        tiles: tune a tile encoder on labeled tiles, as embed-tiles takes them, in place of a slide encoder
        tile_encoder: of --tiles: gigapath, gigapath-flash, standin, timm:NAME or a checkpoint
        splits: folder with train_0.csv, val_0.csv, test_0.csv, ... (default: folds drawn here)
        pretrained: slide encoder: hf_hub:REPO, a file, or '' for random weights
        out: output folder; a run that it holds goes on
        controls: train controls too, and put all in one table
        dry_run: show the plan and write nothing
    """
    from gigapath.cli.progress import stoppable

    with stoppable("slide" if tiles is None else "tile") as (watch, check_stop):
        result = tune(
            out,
            task=task,
            features=features,
            labels=labels,
            splits=splits,
            pretrained=pretrained,
            tiles=tiles,
            tile_encoder=tile_encoder,
            options=(labels_and_features, folds, model, training),
            controls=controls,
            dry_run=dry_run,
            watch=watch,
            check_stop=check_stop,
        )
    if dry_run:
        print("Dry run: nothing was written.")
    elif tiles is None:
        print(f"Results: {out}")
    else:
        from gigapath.finetune.tiles import ENCODER

        embed = f"gigapath embed SLIDES --tile-encoder {out}/{ENCODER} --out DIR"
        print(f"{result}\nnext: {embed}, then gigapath predict {out} DIR")
    return 0


def tune(
    out: str,
    *,
    task: str | None,
    features: str | Sequence[str] | None,
    labels: str | None,
    splits: str | None,
    pretrained: str,
    tiles: str | None,
    tile_encoder: str,
    options: tuple[JoinOptions, SplitOptions, ModelOptions, TrainingOptions],
    controls: bool,
    dry_run: bool,
    watch: Progress,
    check_stop: Callable[[], None],
) -> "RunResult":
    """Fine-tune a slide encoder on slides, or a tile encoder where `tiles` are given, for the verb and for Python."""
    join, split, model, training = options
    if tiles is not None:
        of_slides = {"features": features, "task": task, "splits": splits, "controls": controls}
        of_slides |= {"folds": split.folds != SplitOptions.folds, "head": model.head != ModelOptions.head}
        if given := [name for name, value in of_slides.items() if value]:
            raise ValueError(f"--tiles: expected no --{given[0]} beside it, which is for slides. Leave it out.")
        model.check_adapters(tile_encoder)
        from gigapath.finetune.tiles import finetune_tiles
        from gigapath.linear_probe import ProbeOptions

        return finetune_tiles(
            tiles,
            out,
            tile_encoder=tile_encoder,
            labels=labels,
            model=model,
            training=training,
            probe=ProbeOptions(allow_missing=join.allow_missing, allow_leakage=split.allow_leakage),
            dry_run=dry_run,
            watch=watch,
            check_stop=check_stop,
        )
    if task is None or not features or labels is None:
        lacking = "task" if task is None else "labels" if features else "features"
        raise ValueError(f"--{lacking}: expected --task, --features and --labels for slides, or --tiles. Name it.")
    from gigapath.finetune.data import Inputs, Settings, check_folder, prepare

    inputs = Inputs(task, features, labels, splits, pretrained)
    settings = Settings(join, split, model, training, controls)
    check_folder(out)
    cohort = prepare(inputs, settings)
    from gigapath.finetune.run import finetune  # torch, once labels and features are read

    return finetune(inputs, out, settings, cohort=cohort, dry_run=dry_run, watch=watch, check_stop=check_stop)


@verb
def predict(
    checkpoint: Checkpoint,
    features: Features,
    /,
    *,
    labels: Csv | None = None,
    out: Annotated[str | None, Parameter(metavar="CSV_OR_DIR")] = None,
    draw: Folder | None = None,
    allow_leakage: bool = False,
    lock: bool = False,
    overwrite: bool = False,
    files: JoinOptions,
    model: DeviceOptions,
    intervals: BootstrapOptions,
) -> int:
    """Print a line a slide, or with labels the table of scores; a slide that can't be read is named on stderr and the
    status is 3.

    Of a head of tiles (gigapath probe, finetune --tiles) the tiles of each class are counted.

    Args:
        labels: test the head on these, a row a slide; nothing is fitted
        draw: of a head of tiles: draw the class of each tile, as gigapath map --kind classes, into this folder
        out: write the predictions to this CSV; with --labels a folder for predictions.csv and results.json
        allow_leakage: with --labels, take slides that trained the head, too
        lock: with --labels, lock this test set: its digest is kept in CSV.lock, each test on it is counted and shown,
            and changed labels or features are refused
        overwrite: write over other predictions, or the scores of another head, test set or options
    """
    from gigapath.linear_probe.heads import is_tile_head

    if is_tile_head(checkpoint):
        if labels is not None:
            raise ValueError("--labels: expected a head of slides, got one of tiles. Leave it out to count tiles.")
        return _count(checkpoint, features, out, draw, overwrite, files, model)
    if draw is not None:
        raise ValueError("--draw: expected a head of tiles, got one of slides. Take gigapath map --checkpoint.")
    if labels is not None:
        if out is None:
            raise ValueError("--labels: expected --out DIR beside it, a folder for the scores. Name one.")
        from gigapath.evaluation.results import score_lines, stratum_lines
        from gigapath.finetune import evaluate_head

        result = evaluate_head(
            checkpoint,
            features,
            labels,
            out,
            join=files,
            device=model.device,
            replicates=intervals.replicates,
            seed=intervals.seed,
            allow_seen=allow_leakage,
            lock=lock,
            overwrite=overwrite,
        )
        scores = {"frozen head": result}
        notes = (f"note: {note}" for note in result.notes)
        print("\n".join([*score_lines(scores), *stratum_lines(scores), *notes, f"Results: {out}"]))
        return 0
    if lock:
        raise ValueError("--lock: expected --labels CSV beside it, the test set. Name it.")
    from gigapath.finetune import predict as predict_slides

    found = predict_slides(
        checkpoint,
        features,
        join=files,
        device=model.device,
        out=out,
        overwrite=overwrite,
        on_failed=lambda reason: print(f"gigapath predict: {reason}", file=sys.stderr),
    )
    for row in found.rows:
        numbers = {name.removeprefix("p_"): each for name, each in row.items() if isinstance(each, float)}
        shares = ", ".join(f"{name} {each:.3f}" for name, each in numbers.items())
        print(f"{row['slide_id']}: {row['predicted'] or 'none'} ({shares})")
    if out:
        print(f"written to {out}")
    return EXIT_FAILED_SLIDES if found.failed else 0


def _count(
    checkpoint: str,
    features: Sequence[str],
    out: str | None,
    maps: str | None,
    overwrite: bool,
    files: JoinOptions,
    model: DeviceOptions,
) -> int:
    from gigapath.linear_probe.heads import count_tiles

    found = count_tiles(
        checkpoint,
        features,
        tile_size_level0=files.tile_size_level0,
        out=out,
        overwrite=overwrite,
        on_failed=lambda reason: print(f"gigapath predict: {reason}", file=sys.stderr),
    )
    for row in found.rows:
        counts = ", ".join(f"{name[2:]} {count:,}" for name, count in row.items() if name.startswith("n_"))
        print(f"{row['slide_id']}: {row['tiles']:,} tiles ({counts})")
    if out:
        print(f"written to {out}")
    if maps is None or not found.rows:
        return EXIT_FAILED_SLIDES if found.failed else 0
    from gigapath.cli.report import draw_maps
    from gigapath.maps.options import MapOptions

    options = MapOptions(
        kind=("classes",), checkpoint=checkpoint, device=model.device, tile_size_level0=files.tile_size_level0
    )
    drawn = draw_maps(tuple(features), out=maps, maps=options)
    return EXIT_FAILED_SLIDES if found.failed else drawn


@verb
def pretrain(
    features: Features,
    /,
    *,
    out: Folder,
    init: Annotated[str, Parameter(metavar="WEIGHTS")] = "",
    dry_run: bool = False,
    cohort: CohortOptions,
    sizes: SizeOptions,
    task: TaskOptions,
    training: PretrainingOptions,
) -> int:
    """Tell the plan, then train; after each epoch OUT/slide_encoder.pth holds the weights.

    Args:
        out: output folder; a run that it holds goes on
        init: weights to go on from: hf_hub:REPO or a file (default: new ones)
        dry_run: show the plan and write nothing
    """
    from gigapath.cli.progress import stoppable
    from gigapath.pretraining import pretrain as run

    groups: dict[str, Any] = {"cohort": cohort, "sizes": sizes, "task": task, "training": training}
    with stoppable() as (watch, check_stop):
        result = run(features, out, init=init, **groups, dry_run=dry_run, watch=watch, check_stop=check_stop)
    print("Dry run: nothing was written." if result is None else f"Weights: {result.weights}")
    return 0
