"""What a run works on and how; read, joined and audited before anything is trained or written."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gigapath.evaluation.labels import Joined, join_labels, read_labels, shown
from gigapath.evaluation.splits import Fold, audit, check_classes, draw_folds, read_splits
from gigapath.evaluation.task import Task, load_task
from gigapath.features.reading import find_feature_files
from gigapath.finetune.data import FileFacts, look_at_all
from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        task: name or YAML file.
        features: folder of feature files.
        labels: CSV.
        splits: folder of split files, or None for folds drawn here.
        pretrained: weights of the slide encoder: "hf_hub:REPO", a file, "" for random ones.
    """

    task: str
    features: str
    labels: str
    splits: str | None = None
    pretrained: str = "hf_hub:prov-gigapath/prov-gigapath"


@dataclass(frozen=True)
class Settings:
    """How it is done."""

    join: JoinOptions = field(default_factory=JoinOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    controls: bool = False


@dataclass(frozen=True)
class Cohort:
    """Joined, audited, looked at: what every fold shares."""

    task: Task
    joined: Joined
    facts: list[FileFacts]
    folds: list[Fold]
    notes: list[str]


def prepare(inputs: Inputs, settings: Settings) -> Cohort:
    """Read and check everything that can be wrong before anything is trained or written."""
    task = load_task(inputs.task)
    files = find_feature_files(inputs.features)
    labels = read_labels(inputs.labels, task, id_rule=settings.join.id_rule)
    joined = join_labels(
        labels,
        files,
        id_rule=settings.join.id_rule,
        id_regex=settings.join.id_regex,
        allow_missing=settings.join.allow_missing,
    )
    if settings.training.balanced and task.multi_label:
        raise ValueError(
            "--balanced: expected a task with one class a slide, got one with several labels. Leave it out."
        )
    notes: list[str] = []
    if inputs.splits is None:
        folds = draw_folds(joined.labels, settings.split.folds, seed=settings.training.seed)
    else:
        folds = read_splits(inputs.splits, joined.labels, missing=joined.missing, tell=notes.append)
    if settings.training.select == "val" or settings.training.calibrate:
        lacking = [fold.number for fold in folds if len(fold.val) == 0]
        if lacking:
            raise ValueError(f"--select val, --calibrate: expected validation slides, fold {lacking[0]} has none.")
    notes += joined.labels.class_notes(task.classes)
    notes += check_classes(folds, joined.labels.truth, task.classes)
    used = sorted({int(row) for fold in folds for rows in fold.sets().values() for row in rows})
    joined = _keep(joined, used)
    folds = [_renumber(fold, used) for fold in folds]
    facts = look_at_all(joined.files, settings.join, workers=settings.training.workers)
    prints = [fact.fingerprint for fact in facts]
    notes += audit(
        folds,
        joined.labels.slide_ids,
        fingerprints=prints,
        patients=joined.labels.patients,
        drawn=inputs.splits is None,
        allow_leakage=settings.split.allow_leakage,
    )
    if joined.missing:
        notes.append(f"{len(joined.missing):,} labelled slides have no features ({shown(joined.missing)})")
    if joined.unlabelled:
        notes.append(f"{len(joined.unlabelled):,} feature files have no label ({shown(joined.unlabelled)})")
    return Cohort(task, joined, facts, folds, notes)


def check_folder(out: Path | str) -> None:
    """Refuse an output folder that is a file."""
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}.")


def _keep(joined: Joined, rows: Sequence[int]) -> Joined:
    return replace(joined, labels=joined.labels.take(rows), files=tuple(joined.files[row] for row in rows))


def _renumber(fold: Fold, used: Sequence[int]) -> Fold:
    place = {row: number for number, row in enumerate(used)}
    renamed = {name: np.array([place[int(row)] for row in rows], dtype=np.int64) for name, rows in fold.sets().items()}
    return Fold(fold.number, **renamed)
