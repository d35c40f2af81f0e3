"""Who trains, who validates, who tests: given files, or folds drawn here; audited before anything is trained."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.labels import ID_COLUMNS, SITE_COLUMNS, Labels, column_of, shown
from gigapath.files import read_json, write_json_atomic, write_text_atomic
from gigapath.options import LEAVE_SITE_OUT
from gigapath.tables import csv_text, read_table

SETS = ("train", "val", "test")
MANIFEST = "splits.json"
TABLE = "splits.csv"
VALIDATION_PARTS = 5  # of the slides of the other sites one part in so many validates

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Rows of the labels in each set; `val` may be empty; `site` is the one that tests, where folds are sites."""

    number: int
    train: IntArray
    val: IntArray
    test: IntArray
    site: str = ""

    def __str__(self) -> str:
        return f"fold {self.number}" + (f" (site {self.site})" if self.site else "")

    def sets(self) -> dict[str, IntArray]:
        """The rows by the set's name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def read_splits(
    folder: Path | str,
    labels: Labels,
    *,
    missing: Collection[str] = (),
    warn: Callable[[str], None] = lambda note: None,
) -> list[Fold]:
    """Read `train_K.csv`, `val_K.csv` (optional) and `test_K.csv` for K = 0, 1, ... with a column of slide names.

    Slides of the files that `labels` lacks are left out.

    Args:
        folder: of the split files.
        labels: the slides that have features.
        missing: labelled slides without features, of which the user knows.
        warn: gets a sentence on other slides that the labels lack, and one on slides that no file names.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a fold has no test file, a slide stands twice in one file, or nothing is left of a set.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--splits: expected a folder with train_0.csv and test_0.csv, got {str(folder)!r}.")
    numbers = sorted(
        int(found[1]) for file in folder.iterdir() if (found := re.fullmatch(r"train_(\d+)\.csv", file.name))
    )
    if not numbers:
        raise ValueError(
            f"{folder.name}: expected split files train_0.csv, val_0.csv, test_0.csv, found no train_0.csv."
        )
    row_of = {slide_id: row for row, slide_id in enumerate(labels.slide_ids)}
    folds, named = [], dict[str, None]()
    for number in numbers:
        rows = {}
        for name in SETS:
            file = folder / f"{name}_{number}.csv"
            if not file.is_file() and name == "val":
                rows[name] = np.zeros(0, np.int64)
                continue
            if not file.is_file():
                raise ValueError(f"{folder.name}: fold {number} has no {name} split: expected {file.name}. Add it.")
            table = read_table(file)
            ids = table.filled(column_of(table, None, ID_COLUMNS, "the slide's name", "id_column"))
            if len(set(ids)) != len(ids):
                raise ValueError(f"{file.name}: a slide is listed twice. Keep one row.")
            named |= dict.fromkeys(ids)
            rows[name] = np.array([row_of[slide_id] for slide_id in ids if slide_id in row_of], dtype=np.int64)
            if len(rows[name]) == 0 and name != "val":
                raise ValueError(f"{file.name}: none of its {len(ids):,} slides has features and a label.")
        folds.append(Fold(number, rows["train"], rows["val"], rows["test"]))
    known = {*row_of, *missing}
    strange = [slide_id for slide_id in named if slide_id not in known]
    if strange:
        warn(f"slides of the split files without a row in {labels.source}: {len(strange):,} ({shown(strange)})")
    unused = [slide_id for slide_id in labels.slide_ids if slide_id not in named]
    if unused:
        warn(f"labelled slides in no split file, left out: {len(unused):,} ({shown(unused)})")
    return folds


def draw_parts(truth: IntArray, groups: Sequence[Hashable], parts: int, *, seed: int) -> IntArray:
    """The part (N,) 0 .. parts-1 of each row: groups stay together, and every part gets its share of each class.

    Groups are taken in a drawn order, those with the largest share of a class first, and each goes to the part in
    which it leaves the classes most even. The order of the rows has no say.

    Args:
        truth: (N,) class index, or (N, C) of 0 and 1.
        groups: (N,) rows of one value stay together.
        parts: number of parts.
        seed: of the order.
    """
    _, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group_of_row.max()) + 1
    flags = truth if truth.ndim == 2 else np.eye(int(truth.max()) + 1)[truth]
    kinds = np.concatenate([flags, np.ones((len(truth), 1))], axis=1)  # the last column evens out the sizes
    shares = np.zeros((count, kinds.shape[1]))
    np.add.at(shares, group_of_row, kinds)
    shares /= np.maximum(shares.sum(axis=0), 1)
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-shares[order].max(axis=1), kind="stable")]
    filled = np.zeros((parts, kinds.shape[1]))
    part_of_group = np.empty(count, dtype=np.int64)
    for group in order:
        # Squared sums grow least where what the group holds is rarest so far.
        cost = ((filled + shares[group]) ** 2 - filled**2).sum(axis=1)
        part = int(np.lexsort((np.arange(parts), filled.sum(axis=1).round(12), cost.round(12)))[0])
        filled[part] += shares[group]
        part_of_group[group] = part
    return part_of_group[group_of_row]


def part_folds(part: IntArray, parts: int, sites: Sequence[str] = (), *, first: int = 0) -> list[Fold]:
    """A fold without validation for each part (N,), which tests it, numbered from `first`."""
    nobody = np.zeros(0, np.int64)
    return [
        Fold(first + number, np.flatnonzero(part != number), nobody, np.flatnonzero(part == number), site)
        for number, site in enumerate(sites or [""] * parts)
    ]


def site_parts(groups: Sequence[Hashable], sites: Sequence[str] | None) -> tuple[IntArray, list[str]]:
    """The part (N,) of each row where each site is a part, and the sites in that order.

    Args:
        groups: (N,) patients.
        sites: (N,) or None where they are not known.

    Raises:
        ValueError: a site is not known, there is one only, or a group is at two.
    """
    who = f"--folds {LEAVE_SITE_OUT}"
    if sites is None:
        raise ValueError(f"{who}: expected a column of the site ({', '.join(SITE_COLUMNS)}) in the labels, got none.")
    unknown = sum(not site for site in sites)
    if unknown:
        raise ValueError(f"{who}: {unknown:,} slides have no site. Name it in the labels, or leave them out.")
    names, part = np.unique(np.asarray(sites), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{who}: expected slides of two sites, all are of {names[0]}. Give a number of folds instead.")
    sites_of_group: defaultdict[Hashable, set[str]] = defaultdict(set)
    for group, site in zip(groups, sites, strict=True):
        sites_of_group[group].add(site)
    travelling = sorted(str(group) for group, places in sites_of_group.items() if len(places) > 1)
    if travelling:
        raise ValueError(
            f"{who}: {len(travelling):,} patients have slides of two sites ({shown(travelling)}). Keep the slides of "
            "one site each, or give them one site."
        )
    return part.astype(np.int64), names.tolist()


def draw_folds(labels: Labels, folds: int | str, *, seed: int) -> list[Fold]:
    """Folds with even shares of every class, of events or of the quarters of an amount; a patient's slides stay
    together where patients are known.

    Fold K tests on part K of `draw_parts` and validates on the part after it. With `LEAVE_SITE_OUT` it tests on site K
    and validates on a part of the others' slides.
    """
    groups = labels.slide_ids if labels.patients is None else labels.patients
    if isinstance(folds, str):
        part, sites = site_parts(groups, labels.sites)
        left_out = []
        for number, site in enumerate(sites):
            rows = np.flatnonzero(part != number)
            held = draw_parts(labels.kinds[rows], [groups[row] for row in rows], VALIDATION_PARTS, seed=seed) == 0
            left_out.append(Fold(number, rows[~held], rows[held], np.flatnonzero(part == number), site))
        return left_out
    count = len(set(groups))
    if count < folds:
        unit = "slides" if labels.patients is None else "patients"
        raise ValueError(f"--folds: expected at most {count}, the number of {unit}, got {folds}.")
    part_of_row = draw_parts(labels.kinds, groups, folds, seed=seed)
    drawn = []
    for number in range(folds):
        val = (number + 1) % folds
        train = np.flatnonzero((part_of_row != number) & (part_of_row != val))
        drawn.append(Fold(number, train, np.flatnonzero(part_of_row == val), np.flatnonzero(part_of_row == number)))
    return drawn


def audit(
    folds: Sequence[Fold],
    ids: Sequence[str],
    *,
    fingerprints: Sequence[Hashable] | None,
    patients: Sequence[str] | None,
    drawn: bool,
    allow_leakage: bool,
    unit: str = "patients",
) -> list[str]:
    """Refuse splits in which a slide, its twin or its patient stands in two sets; sentences of what was allowed.

    Args:
        folds: the splits.
        ids: (N,) slides, or tiles.
        fingerprints: (N,) equal where two rows hold the same embeddings; None where twins are no matter.
        patients: (N,) or None where they are not known.
        drawn: the folds were drawn here, so twins of two patients are refused wherever this seed put them.
        allow_leakage: go on, and say so.
        unit: what `patients` are called in messages.
    """
    found = []
    if drawn and fingerprints is not None:
        groups_of_print: defaultdict[Hashable, set[str]] = defaultdict(set)
        for key, group in zip(fingerprints, ids if patients is None else patients, strict=True):
            groups_of_print[key].add(group)
        twins = [name for name, key in zip(ids, fingerprints, strict=True) if len(groups_of_print[key]) > 1]
        if twins:
            found.append(f"{len(twins):,} identical slides that folds can take apart ({shown(twins)})")
    for fold in folds:
        for what, keys in (
            ("slides in both sets", ids),
            ("identical slides in both sets", None if drawn else fingerprints),
            (f"{unit} in both sets", patients),
        ):
            if keys is None:
                continue
            members = {name: {keys[row] for row in rows.tolist()} for name, rows in fold.sets().items()}
            for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
                both = members[first] & members[second]
                if both:
                    twins = [ids[row] for row, key in enumerate(keys) if key in both]
                    names = twins if keys is fingerprints else sorted(map(str, both))
                    found.append(f"{fold}: {len(both):,} {what}, {first} and {second} ({shown(names)})")
                    break
    if found and not allow_leakage:
        raise ValueError(
            f"{found[0]}: the score would be too good. Split by patient, as folds that are drawn here are where a "
            "column names the patient, and keep one of two identical slides; or go on with --allow-leakage."
        )
    return found


def check_classes(folds: Sequence[Fold], truth_of_row: npt.NDArray[Any], classes: Sequence[str]) -> list[str]:
    """Refuse folds that can't be learned or tested; sentences on classes that a test set lacks.

    Args:
        folds: the splits.
        truth_of_row: (N,) class index, or (N, C) of 0 and 1; float64 (N, 2) of times and events, (N,) of amounts.
        classes: their names.
    """
    of_events, multi_label = truth_of_row.dtype.kind == "f", truth_of_row.ndim == 2
    notes = []
    for fold in folds:
        for name, rows in fold.sets().items():
            truth = truth_of_row[rows]
            if len(rows) == 0 and name == "val":
                continue
            if len(rows) == 0:
                raise ValueError(f"{fold}: its {name} set is empty. Add slides, or take fewer folds.")
            if of_events:
                if multi_label and not truth[:, 1].any():
                    if name == "train":
                        raise ValueError(f"{fold}: no training slide has an event. Add slides, or take other folds.")
                    notes.append(f"{fold}: no {name} slide has an event")
                continue
            counts = truth.sum(axis=0) if multi_label else np.bincount(truth, minlength=len(classes))
            lacking = [classes[i] for i in np.flatnonzero(counts == 0).tolist()]
            if multi_label and name == "train":
                lacking += [classes[i] for i in np.flatnonzero(counts == len(rows)).tolist()]
            if name == "train" and lacking:
                raise ValueError(
                    f"{fold}: no training slide teaches {', '.join(lacking)}. Add slides of it, take "
                    f"{'other' if fold.site else 'fewer'} folds, or leave it out of the task."
                )
            if name == "test" and not multi_label and len(classes) - len(lacking) < 2:
                raise ValueError(
                    f"{fold}: its test set holds one class only ({classes[int(truth[0])]}), so "
                    "nothing can be told apart in it. Add slides, or "
                    + ("leave the site out of the labels." if fold.site else "take fewer folds.")
                )
            if name == "test" and lacking:
                notes.append(f"{fold}: no test slide of {', '.join(lacking)}")
    return notes


def keep_manifest(out: Path, folds: Sequence[Fold], labels: Labels, how: dict[str, Any]) -> str:
    """Write the manifest of the split, or check that the one in `out` is the same; returns its digest.

    Raises:
        ValueError: `out` holds the split of other labels, or another split.
    """
    table = _table(folds, labels)
    digest = hashlib.sha256(table.encode()).hexdigest()
    path = out / MANIFEST
    if path.is_file():
        kept = read_json(path, keys=("labels", "split"), mend="Choose another --out, or empty this one to begin anew.")
        if kept["labels"] != labels.digest:
            raise ValueError(
                f"{out.name}: the labels ({labels.source}) have changed since its split was made. Choose another --out."
            )
        if kept["split"] != digest:
            raise ValueError(f"{out.name}: it holds another split of these slides. Choose another --out.")
        return digest
    write_text_atomic(out / TABLE, table)
    write_json_atomic(path, {"labels": labels.digest, "split": digest, "slides": len(labels), **how})
    return digest


def _table(folds: Sequence[Fold], labels: Labels) -> str:
    columns = [["" for _ in folds] for _ in range(len(labels))]
    for place, fold in enumerate(folds):
        for name, rows in fold.sets().items():
            for row in rows.tolist():
                columns[row][place] = name
    patients = [] if labels.patients is None else ["patient_id"]
    table: list[list[str]] = [["slide_id", *patients, *(f"fold_{fold.number}" for fold in folds)]]
    for row, slide_id in enumerate(labels.slide_ids):
        table.append([slide_id, *([] if labels.patients is None else [labels.patients[row]]), *columns[row]])
    return csv_text(table)
