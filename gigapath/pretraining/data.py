"""Slides to batches: who trains and who validates, what of a slide is seen, what is hidden, what is to be predicted."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from gigapath.evaluation.labels import ID_COLUMNS, bare_name, column_of, first_twice, id_maker, patients_of, shown
from gigapath.features import FeatureFileError
from gigapath.features.data import CELL, GRID
from gigapath.features.folders import find_feature_files
from gigapath.features.h5 import open_h5, read_attrs
from gigapath.files import atomic_file
from gigapath.finetune.data import Bag, Bags, FileBags, FileFacts, look_at_all
from gigapath.finetune.loop import Processes
from gigapath.finetune.options import JoinOptions
from gigapath.pretraining.model import Batch
from gigapath.pretraining.options import CohortOptions, TaskOptions
from gigapath.read_ahead import read_ahead
from gigapath.tables import read_table

CACHE = "tiles.h5"
STATISTICS_SLIDES = 1000  # whose tiles give the mean and the deviation of each dimension
LEAST_DEVIATION = 1e-6  # of a dimension that never varies

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slides:
    """The slides of a run by row, the rows that are trained on and those that are kept for validation."""

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    files: tuple[Path, ...]
    facts: tuple[FileFacts, ...]
    train: IntArray
    val: IntArray
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names, sets and what the files hold."""
        rows = zip(self.ids, self.patients, (fact.fingerprint for fact in self.facts), strict=True)
        text = repr((list(rows), self.train.tolist(), self.val.tolist()))
        return hashlib.sha256(text.encode()).hexdigest()

    def table(self) -> list[list[str]]:
        """Which slide is in which set."""
        sets = (("train", self.train), ("val", self.val))
        rows = [(row, name) for name, rows in sets for row in rows]
        told = [[self.ids[row], self.patients[row], name, str(self.facts[row].tiles)] for row, name in rows]
        return [["slide_id", "patient_id", "set", "tiles"], *told]

    def counts(self) -> dict[str, dict[str, int]]:
        """Slides, patients and tiles of each set."""
        sums = {}
        for name, rows in (("train", self.train), ("val", self.val)):
            tiles, patients = sum(self.facts[row].tiles for row in rows), {self.patients[row] for row in rows}
            sums[name] = {"slides": len(rows), "patients": len(patients), "tiles": tiles}
        return sums


def find_slides(features: Sequence[str], options: CohortOptions, *, seed: int, workers: int) -> Slides:
    """Find the feature files, look at each, and keep a share of the patients for validation.

    Raises:
        FileNotFoundError, ValueError: nothing there, files that do not mix, a slide without a patient, nobody to train
            on. One sentence.
    """
    files = find_feature_files(features)
    join = JoinOptions(tile_size_level0=options.tile_size_level0, allow_mixed=options.allow_mixed)
    pairs = list(zip(files, look_at_all(files, join, workers=workers, allow_empty=True), strict=True))
    small = [file.name for file, fact in pairs if fact.tiles < 2]
    notes = [f"{len(small):,} slides of fewer than two tiles are left out ({shown(small)})"] if small else []
    kept = sorted([(bare_name(file), file, fact) for file, fact in pairs if fact.tiles > 1], key=lambda row: row[0])
    ids = tuple(row[0] for row in kept)
    twice = first_twice(ids)
    if twice is not None:
        raise ValueError(f"two feature files are of the slide {twice}. Name one of them.")
    # Two files of one slide under two names would let the model see what it is tested on.
    prints: dict[str, str] = {}
    for name, _, fact in kept:
        other = prints.setdefault(fact.fingerprint, name)
        if other != name:
            notes.append(f"{name} holds the same tiles as {other}")
    patients = _patients(ids, options)
    people = sorted(set(patients))
    count = 0 if options.val_share == 0 else max(1, round(options.val_share * len(people)))
    held = {people[place] for place in np.random.default_rng([seed, 4]).permutation(len(people))[:count]}
    is_val = np.array([patient in held for patient in patients])
    if is_val.all():
        raise ValueError(f"--val-share: expected patients to train on beside {count}, got {len(people)} in all.")
    train, val = np.flatnonzero(~is_val), np.flatnonzero(is_val)
    return Slides(ids, patients, tuple(row[1] for row in kept), tuple(row[2] for row in kept), train, val, tuple(notes))


def _patients(ids: tuple[str, ...], options: CohortOptions) -> tuple[str, ...]:
    """The patient of each slide, by the table, by the TCGA barcode, or the slide itself."""
    make = id_maker(options.id_rule, options.id_regex)
    if options.patients is None and options.id_rule == "tcga" and options.id_regex is None:
        return tuple("-".join(name.split("-")[:3]) for name in ids)  # the patient's part of a barcode
    if options.patients is None:
        return tuple(map(make, ids)) if options.id_regex is not None else ids
    table = read_table(Path(options.patients))
    names = table.filled(column_of(table, None, ID_COLUMNS, "slides", "slide_id"))
    _, found = patients_of(table, None, names, options.id_rule)
    if found is None:
        raise ValueError(f"--patients: expected a column patient_id in {Path(options.patients).name}, got none.")
    known = dict(zip(map(make, names), found, strict=True))
    lacking = [name for name in ids if make(name) not in known]
    if lacking:
        who = f"{len(lacking):,} ({shown(lacking)})"
        raise ValueError(
            f"--patients: expected a patient for each slide, got none for {who}. See --id-rule, --id-regex."
        )
    return tuple(known[make(name)] for name in ids)


class CachedBags:
    """Bags of one file that holds the tiles of all slides one after another, `ends` (S,) in it."""

    def __init__(self, path: Path, ends: IntArray) -> None:
        self.file, self.ends = h5py.File(path, "r"), ends

    def __getitem__(self, row: int) -> Bag:
        rows = slice(int(self.ends[row - 1]) if row else 0, int(self.ends[row]))
        return Bag(self.file["features"][rows].astype(np.float32), self.file["coords"][rows].astype(np.int64))


def open_bags(
    slides: Slides, options: CohortOptions, out: Path, processes: Processes, workers: int, check: Callable[[], None]
) -> Bags:
    """What reads the tiles: the files, or one copy of all in `out` (made once, by the first process)."""
    bags = FileBags(slides.files, slides.facts, options.tile_size_level0)
    if options.cache == "none":
        return bags
    path, key, there = out / CACHE, f"{slides.digest} {options.cache}", False
    with contextlib.suppress(FileNotFoundError, FeatureFileError), open_h5(path) as file:
        there = read_attrs(file).get("key") == key
    ends = np.cumsum([fact.tiles for fact in slides.facts])
    if processes.rank == 0 and not there:
        with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
            kind = np.float16 if options.cache == "fp16" else np.float32
            features = file.create_dataset("features", (int(ends[-1]), slides.facts[0].width), kind)
            coords = file.create_dataset("coords", (int(ends[-1]), 2), np.int32)
            for end, bag in zip(ends, read_ahead(bags._read, range(len(ends)), threads=workers), strict=True):
                check()
                features[end - len(bag) : end] = bag.features.astype(kind)  # HDF5 may round otherwise
                coords[end - len(bag) : end] = bag.coords
            file.attrs["key"] = key
    processes.gather(None)
    return CachedBags(path, ends)


@dataclass(frozen=True)
class Target:
    """What is predicted of a tile: its embedding, with `per_tile` standardised by its own mean and deviation, less
    `mean` over `deviation` (each (W,)). `centre` (W,) is the mean of the targets: what a predictor says that sees
    nothing."""

    mean: FloatArray
    deviation: FloatArray
    centre: FloatArray
    per_tile: bool = False

    def of(self, features: Array) -> FloatArray:
        """(N, W) embeddings to targets."""
        if self.per_tile:
            features = features.astype(np.float32)
            deviation = np.maximum(features.std(axis=1, keepdims=True), LEAST_DEVIATION)
            features = (features - features.mean(axis=1, keepdims=True)) / deviation
        return np.asarray((features - self.mean) / self.deviation, np.float32)


def fit_target(kind: str, bags: Bags, rows: IntArray, *, seed: int, workers: int) -> Target:
    """The target of a run; mean and deviation of each dimension over the tiles of up to 1,000 drawn training slides."""
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    plain = Target(zero, one, zero, per_tile=kind == "per-tile")
    drawn = np.random.default_rng([seed, 5]).permutation(rows)[:STATISTICS_SLIDES]
    count, total, squares = 0, 0.0, 0.0
    for bag in read_ahead(bags.__getitem__, drawn.tolist(), threads=workers):
        wide = plain.of(bag.features).astype(np.float64)
        count, total, squares = count + len(wide), total + wide.sum(axis=0), squares + np.square(wide).sum(axis=0)
    mean = np.asarray(total / count)
    deviation = np.sqrt(np.maximum(squares / count - mean**2, LEAST_DEVIATION**2))
    centre = mean.astype(np.float32)
    if kind == "standardized":
        return Target(centre, deviation.astype(np.float32), np.zeros_like(centre))
    return replace(plain, centre=centre)


@dataclass(frozen=True)
class View:
    """What is taken of a slide: features (N, W), cells (N, 2) (x, y) of the position grid, row by row, and which tiles
    are hidden (N,)."""

    features: Array
    cells: IntArray
    hidden: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Viewer:
    """How slides are seen. What is drawn depends on the seed, the epoch and the slide's name alone: not on the order,
    the number of threads or the number of processes."""

    task: TaskOptions
    seed: int

    def view(self, bag: Bag, slide_id: str, epoch: int | None) -> View:
        """A slide in training in an epoch, or whole, at its own place, with one mask for ever (`epoch` None)."""
        name = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "big")
        random = np.random.default_rng([self.seed, 6, 0 if epoch is None else epoch + 1, name])
        cells = bag.coords // CELL
        rows = np.arange(len(cells))
        if epoch is not None:
            rows, cells = self._window(cells, random)
        order = np.lexsort((cells[:, 0], cells[:, 1]))
        hidden = np.ones(len(order), np.bool_)
        visible = min(max(1, round((1 - self.task.mask_ratio) * len(order))), len(order) - 1)
        hidden[random.permutation(len(order))[:visible]] = False
        return View(bag.features[rows[order]], cells[order], hidden)

    def _window(self, cells: IntArray, random: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Rows of the tiles in a drawn window, and their cells after mirror and shift; all rows where it holds one."""
        low, high = cells.min(axis=0), cells.max(axis=0)
        side = np.ceil(self.task.crop * (high - low + 1)).astype(np.int64)
        corner = low + random.integers(0, high - low + 1 - side, endpoint=True)
        rows = np.flatnonzero(((cells >= corner) & (cells < corner + side)).all(axis=1))
        rows = rows if len(rows) > 1 else np.arange(len(cells))
        seen = cells[rows]
        low, high = seen.min(axis=0), seen.max(axis=0)
        if random.random() < self.task.mirror:
            seen = np.stack([low[0] + high[0] - seen[:, 0], seen[:, 1]], axis=1)
        far = self.task.shift - 1
        first, last = np.maximum(low - far, 0), np.minimum(low + far, GRID - 1 - (high - low))
        return rows, seen - low + random.integers(first, last, endpoint=True)


def pack_views(views: Sequence[View], target: Target) -> Batch:
    """Views one after another, as the model takes them."""
    lengths = tuple(len(view.hidden) for view in views)
    hidden = np.concatenate([view.hidden for view in views])
    # The decoder's tokens: of each slide the class token, which is seen, and its tiles.
    hidden_tokens = np.concatenate([part for view in views for part in ([False], view.hidden)])
    coords = np.concatenate([view.cells for view in views]) * CELL
    return Batch(
        visible=torch.from_numpy(np.concatenate([view.features[~view.hidden] for view in views])),
        visible_coords=torch.from_numpy(coords[~hidden]),
        coords=torch.from_numpy(coords),
        seen=torch.from_numpy(np.flatnonzero(~hidden_tokens)),
        hidden=torch.from_numpy(np.flatnonzero(hidden_tokens)),
        target=torch.from_numpy(np.concatenate([target.of(view.features[view.hidden]) for view in views])),
        lengths=lengths,
        hidden_lengths=tuple(int(view.hidden.sum()) for view in views),
    )
