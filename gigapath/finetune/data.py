"""What a run works on: labels joined to feature files, folds audited, and the bags of tile embeddings, ours or another
tool's, read ahead by threads."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.labels import Joined, Task, join_labels, load_task, read_labels, shown
from gigapath.evaluation.splits import Fold, audit, check_classes, draw_folds, read_splits
from gigapath.features import FeatureFileError, read_features
from gigapath.features.data import CELL, GRID
from gigapath.features.folders import find_feature_files, look_at_features
from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions

MADE = ("encoder", "weights_sha256", "mpp", "numerics_version")
MPP_TOLERANCE = 0.02
KEPT_BYTES = 1 << 30  # bags of a cohort up to this size stay in memory after the first pass

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Bag:
    """All embeddings of a slide: features (N, D) float32, coords (N, 2) int64, (x, y) = cell * CELL."""

    features: Array
    coords: Array

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Array) -> "Bag":
        """Some of the tiles, in the order given."""
        return Bag(self.features[rows], self.coords[rows])


class Bags(Protocol):
    """The bags of a cohort by the row of the labels: `FileBags`, or a list."""

    def __getitem__(self, row: int, /) -> Bag: ...


@dataclass(frozen=True)
class FileFacts:
    """What is known of a feature file without reading its embeddings.

    Attributes:
        width: of an embedding.
        made: what must agree between files, by the names in MADE; None = not stated.
        fingerprint: equal where two files hold the same embeddings.
        states_step: the file says how far apart its tiles lie.
        scanner: of the slide, "" where the file does not say it.
    """

    tiles: int
    width: int
    made: dict[str, Any]
    fingerprint: str
    states_step: bool
    scanner: str = ""


def look_at(path: Path) -> FileFacts:
    """What a file says of itself; an h5 file's embeddings are not read.

    Raises:
        FeatureFileError: not a feature file, cut off, without coordinates.
    """
    found = look_at_features(path)
    made = {"encoder": found.encoder, **{name: found.attrs.get(name) for name in MADE[1:]}}
    content = f"{found.tiles} {found.width}".encode() + np.ascontiguousarray(found.ends).tobytes()
    scanner = str(found.attrs.get("scanner") or "")
    return FileFacts(found.tiles, found.width, made, hashlib.sha256(content).hexdigest(), found.states_step, scanner)


def prints_of(facts: Sequence[FileFacts]) -> str:
    """SHA-256 over the fingerprints of files, in their order."""
    return hashlib.sha256("".join(fact.fingerprint for fact in facts).encode()).hexdigest()


def look_at_all(
    paths: Sequence[Path],
    join: JoinOptions,
    *,
    width: int | None = None,
    made: Mapping[str, Any] | None = None,
    workers: int = 2,
    allow_empty: bool = False,
) -> list[FileFacts]:
    """`look_at` for every file; one width, and one make unless `allow_mixed`; no file without tiles unless
    `allow_empty`.

    Args:
        width: the width that is expected, or None for that of the first.
        made: what the features that trained a head were made of, or None.
    """
    with ThreadPoolExecutor(workers) as pool:
        facts = list(pool.map(look_at, paths))
    width = facts[0].width if width is None else width
    for path, fact in zip(paths, facts, strict=True):
        if fact.tiles == 0 and not allow_empty:
            raise FeatureFileError(f"{path.name}: it has no tiles. Leave the slide out.")
        if fact.width != width:
            raise FeatureFileError(
                f"{path.name}: expected embeddings of width {width}, got {fact.width}. Features of another encoder?"
            )
        if not join.allow_mixed:
            _check_made(fact.made, facts[0].made, path.name, paths[0].name)
            _check_made(fact.made, made or {}, path.name, "the features that trained the head")
    return facts


def join_features(
    labels: str | Path,
    task: Task,
    features: str | Path | Iterable[str | Path],
    join: JoinOptions,
    *,
    workers: int = 2,
    **expected: Any,
) -> tuple[Joined, list[FileFacts]]:
    """Labels joined to feature files, and what these say; a slide without tissue counts as one without features.
    Scanners are those that the files say, where neither the table nor the run says them.

    Args:
        expected: `width` and `made`, as for `look_at_all`.

    Raises:
        ValueError: slides have no features, or no tiles, and `allow_missing` is not set, or none has any.
    """
    files = find_feature_files(features)
    table = read_labels(labels, task, id_rule=join.id_rule)
    joined = join_labels(table, files, id_rule=join.id_rule, id_regex=join.id_regex, allow_missing=join.allow_missing)
    facts = look_at_all(joined.files, join, workers=workers, allow_empty=True, **expected)
    full = [row for row, fact in enumerate(facts) if fact.tiles]
    if len(full) < len(facts):
        empty = tuple(joined.labels.slide_ids[row] for row, fact in enumerate(facts) if not fact.tiles)
        if not join.allow_missing or not full:
            raise ValueError(
                f"{joined.labels.source}: slides without tiles, so without tissue: {len(empty)} ({shown(empty)}). "
                "Leave them out of the labels, or go on without them: --allow-missing."
            )
        facts, kept = [facts[row] for row in full], tuple(joined.files[row] for row in full)
        joined = replace(joined, labels=joined.labels.take(full), files=kept, missing=joined.missing + empty)
    strata = joined.labels.strata
    if "scanner" not in strata and any(fact.scanner for fact in facts):
        strata = {**strata, "scanner": tuple(fact.scanner for fact in facts)}
    return replace(joined, labels=replace(joined.labels, strata=strata)), facts


def _check_made(made: Mapping[str, Any], other: Mapping[str, Any], who: str, than: str) -> None:
    """Raise FeatureFileError where two sets of features state different encoders, mpp or numerics."""
    for key in MADE:
        mine, theirs = made.get(key), other.get(key)
        if mine is None or theirs is None or mine == theirs:
            continue
        if key == "mpp" and abs(float(mine) - float(theirs)) <= MPP_TOLERANCE * float(theirs):
            continue
        raise FeatureFileError(
            f"{who}: its {key} is {mine}, that of {than} {theirs}. Such features do not mix; make them alike, or "
            "insist with --allow-mixed."
        )


class FileBags:
    """The bags of feature files, all tiles in the file's order; read when asked for, and kept while they are few.

    Raises, when a bag is asked for:
        FeatureFileError: the file can't be read, holds NaN, has no step, has a tile outside the grid.
    """

    def __init__(self, files: Sequence[Path], facts: Sequence[FileFacts], tile_size_level0: float | None) -> None:
        self.files = list(files)
        self.facts = list(facts)
        self.tile_size_level0 = tile_size_level0
        self.kept: dict[int, Bag] = {}
        self.room = KEPT_BYTES
        self._verified: set[int] = set()  # rows whose files are as their run made them: read every epoch, asked once

    def __getitem__(self, row: int) -> Bag:
        bag = self.kept.get(row)
        if bag is None:
            bag = self._read(row)
            size = bag.features.nbytes + bag.coords.nbytes
            if size <= self.room:
                self.room -= size
                self.kept[row] = bag
        return bag

    def _read(self, row: int) -> Bag:
        path = self.files[row]
        facts = self.facts[row]
        stated = None if facts.states_step else self.tile_size_level0
        held = read_features(
            path, tile_size_level0=stated, embed_dim=facts.width, order="file", verify=row not in self._verified
        )
        self._verified.add(row)
        if len(held) == 0:
            raise FeatureFileError(f"{path.name}: it has no tiles. Leave the slide out.")
        coords = held.encoder_coords(CELL)
        if coords.min() < 0 or coords.max() >= GRID * CELL:
            worst = int(np.argmax((coords < 0).any(axis=1) | (coords >= GRID * CELL).any(axis=1)))
            raise FeatureFileError(
                f"{path.name}: expected cells 0 to {GRID - 1}, got {(coords[worst] // CELL).tolist()} in row {worst}. "
                "Is the distance between its tiles right?"
            )
        return Bag(np.asarray(held.features, dtype=np.float32), coords)


def vector_bags(vectors: Array) -> list[Bag]:
    """One vector a slide (S, D) as bags of one tile."""
    nowhere = np.zeros((1, 2), np.int64)
    return [Bag(vector[None], nowhere) for vector in np.asarray(vectors, dtype=np.float32)]


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        task: name or YAML file.
        features: feature files or folders of them; one or many.
        labels: CSV.
        splits: folder of split files, or None for folds drawn here.
        pretrained: weights of the slide encoder: "hf_hub:REPO", a file, "" for random ones.
    """

    task: str
    features: str | Sequence[str]
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
    settings.model.check_adapters(inputs.pretrained)
    task = load_task(inputs.task)
    training, features = settings.training, inputs.features
    joined, facts = join_features(inputs.labels, task, features, settings.join, workers=training.workers)
    if training.balanced and (task.multi_label or not task.of_classes):
        what = "several labels" if task.multi_label else f"the setting {task.setting}"
        raise ValueError(f"--balanced: expected a task with one class a slide, got one with {what}. Leave it out.")
    if training.calibrate and not task.of_classes:
        raise ValueError(f"--calibrate: expected a task of classes, got one of {task.setting}. Leave it out.")
    if task.loss == "cox" and training.batch_size * training.gradient_accumulation < 2:
        raise ValueError(
            "--batch-size, --gradient-accumulation: expected at least 2 slides a step, which Cox's loss compares, "
            "got 1."
        )
    notes: list[str] = []
    if inputs.splits is None:
        folds = draw_folds(joined.labels, settings.split.folds, seed=training.seed)
    else:
        folds = read_splits(inputs.splits, joined.labels, missing=joined.missing, warn=notes.append)
    if training.select == "val" or training.calibrate:
        lacking = [fold.number for fold in folds if len(fold.val) == 0]
        if lacking:
            raise ValueError(f"--select val, --calibrate: expected validation slides, fold {lacking[0]} has none.")
    notes += joined.labels.class_notes(task.classes)
    notes += check_classes(folds, joined.labels.truth, task.classes)
    used = sorted({int(row) for fold in folds for rows in fold.sets().values() for row in rows})
    joined = replace(joined, labels=joined.labels.take(used), files=tuple(joined.files[row] for row in used))
    folds = [
        replace(fold, **{name: np.searchsorted(used, rows) for name, rows in fold.sets().items()})  # type: ignore[arg-type]
        for fold in folds
    ]
    facts = [facts[row] for row in used]
    notes += audit(
        folds,
        joined.labels.slide_ids,
        fingerprints=[fact.fingerprint for fact in facts],
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
