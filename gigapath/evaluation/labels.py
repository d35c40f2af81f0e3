"""Tasks and labels: what the labels are called and mean (a small YAML file), one way to read a table, what is a missing
value, when two labels are one class, how rows meet names."""

import hashlib
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from gigapath.files import write_text_atomic
from gigapath.tables import Table, plain_number, read_table, separator_hint, some_names

SETTINGS = ("multi_class", "binary", "multi_label", "ordinal", "survival", "regression")
LOSSES = {"survival": ("cox", "discrete"), "regression": ("mse", "huber")}  # of each setting first the usual one
INTERVALS = 8  # of discrete-time hazards
GRID = 20  # times up to the last horizon at which survival is predicted
FOLDER = Path(__file__).parent / "tasks"
_METRICS = ("qwk",)
_COLUMNS = ("id_column", "label_column", "patient_column", "site_column", "time_column", "event_column")
_MOST_CLASSES = 10_000
_MOST_HORIZONS = 100
_MOST_BYTES = 2_000_000


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        name: of the task.
        setting: "multi_class", "binary" (two classes, the second is the positive one), "multi_label", "ordinal"
            (grades, by cumulative logits), "survival" or "regression".
        classes: names of the classes in order of their index; of a multi-label task the columns of the labels; of
            survival "risk", of regression the label's column.
        ordinal: the classes are grades: quadratic-weighted kappa is reported.
        max_tiles: in training a slide with more tiles gives this many, drawn anew at each pass.
        shuffle_tiles: whether training shuffles the tiles of a slide.
        id_column: column of the slide's name; None takes the first of `labels.ID_COLUMNS`.
        label_column: column of the class or amount; None takes the first of `labels.LABEL_COLUMNS`.
        patient_column: column of the patient; None takes the first of `labels.PATIENT_COLUMNS` that is there.
        site_column: column of the hospital, scanner or provider; None takes the first of `labels.SITE_COLUMNS`.
        time_column: of survival the column of the follow-up.
        event_column: of survival the column of 0 (censored) and 1 (event).
        horizons: of survival the rising times at which predictions are scored.
        loss: of survival "cox" (partial likelihood; the slides of a step are its risk set) or "discrete" (hazards in
            `INTERVALS` intervals), of regression "mse" or "huber"; "" for classes.
    """

    name: str
    setting: str
    classes: tuple[str, ...]
    ordinal: bool = False
    max_tiles: int = 1_000_000
    shuffle_tiles: bool = True
    id_column: str | None = None
    label_column: str | None = None
    patient_column: str | None = None
    site_column: str | None = None
    time_column: str | None = None
    event_column: str | None = None
    horizons: tuple[float, ...] = ()
    loss: str = ""

    @property
    def of_classes(self) -> bool:
        """True where slides have classes or labels, not times or amounts."""
        return self.setting not in LOSSES

    @property
    def outputs(self) -> int:
        """How many numbers a model gives a slide."""
        if self.setting == "ordinal":
            return len(self.classes) - 1
        return INTERVALS if self.loss == "discrete" else len(self.classes)

    @property
    def times(self) -> tuple[float, ...]:
        """Rising times at which survival is predicted: the horizons, and even steps up to the last; else none."""
        if not self.horizons:
            return ()
        even = {self.horizons[-1] * step / GRID for step in range(1, GRID)}
        return tuple(sorted(even | {*self.horizons}))

    @property
    def multi_label(self) -> bool:
        """True where a slide can have several labels."""
        return self.setting == "multi_label"

    def described(self) -> dict[str, Any]:
        """What results say of the task."""
        horizons = {"horizons": list(self.horizons)} if self.horizons else {}
        return {"name": self.name, "setting": self.setting, "classes": list(self.classes), **horizons}

    def to_dict(self) -> dict[str, Any]:
        """The keys of the YAML file."""
        values: dict[str, Any] = {"name": self.name, "setting": self.setting}
        if self.of_classes:
            values["label_dict"] = {name: index for index, name in enumerate(self.classes)}
        values |= {"max_tiles": self.max_tiles, "shuffle_tiles": self.shuffle_tiles}
        if self.ordinal:
            values["add_metrics"] = ["qwk"]
        values |= {key: getattr(self, key) for key in _COLUMNS if getattr(self, key) is not None}
        if self.horizons:
            values["horizons"] = list(self.horizons)
        return values | ({"loss": self.loss} if self.loss else {})


def load_task(name: str | Path) -> Task:
    """The task of a name of the package ("panda", "mutation_5_gene") or of a YAML file.

    Raises:
        FileNotFoundError: neither.
        ValueError: not YAML, an unknown key, a value that makes no sense; the file is named.
    """
    path = FOLDER / f"{name}.yaml" if (FOLDER / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(
            f"--task: expected {known} or a YAML file, got {str(name)!r}. `gigapath init-task LABELS` writes one."
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name}: expected a task file of at most {_MOST_BYTES:,} bytes, got a larger one.")
    try:
        content = _KeysAsWritten(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        without = f" without {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise ValueError(
            f"{path.name}: expected YAML{without}, got something else{where}. Correct it, or write it anew: "
            "gigapath init-task LABELS."
        ) from error
    return task_from(content, path.name)


def task_from(content: Any, who: str) -> Task:
    """The task that a mapping with the keys of the YAML file describes; ValueError names `who`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{who}: expected keys and values, got {type(content).__name__}.")
    known = (
        "name",
        "setting",
        "label_dict",
        "max_tiles",
        "shuffle_tiles",
        "add_metrics",
        *_COLUMNS,
        "horizons",
        "loss",
    )
    unknown = sorted(str(key) for key in set(content) - set(known))
    if unknown:
        raise ValueError(f"{who}: unknown key {', '.join(unknown)}. Known: {', '.join(known)}.")
    setting = content.get("setting")
    needed = {"survival": ("time_column", "event_column", "horizons"), "regression": ("label_column",)}
    of_setting = needed.get(setting, ("label_dict",)) if isinstance(setting, str) else ()
    missing = [key for key in ("name", "setting", *of_setting) if key not in content]
    if missing:
        raise ValueError(f"{who}: expected the key {', '.join(missing)}, which is not there.")
    if not isinstance(content["name"], str | int | float):
        raise ValueError(f"{who}: expected a name, got {_brief(content['name'])}.")
    if setting not in SETTINGS:
        raise ValueError(f"{who}: expected setting {', '.join(SETTINGS)}, got {_brief(setting)}.")
    metrics = content.get("add_metrics") or []
    if not isinstance(metrics, list) or any(metric not in _METRICS for metric in metrics):
        raise ValueError(f"{who}: expected add_metrics of {', '.join(_METRICS)}, got {_brief(metrics)}.")
    max_tiles, shuffle = content.get("max_tiles", 1_000_000), content.get("shuffle_tiles", True)
    if not isinstance(max_tiles, int) or isinstance(max_tiles, bool) or max_tiles < 1:
        raise ValueError(f"{who}: expected max_tiles of at least 1, got {_brief(max_tiles)}.")
    if not isinstance(shuffle, bool):
        raise ValueError(f"{who}: expected shuffle_tiles true or false, got {_brief(shuffle)}.")
    for key in _COLUMNS:
        if (content.get(key) is not None or key in of_setting) and not isinstance(content[key], str):
            raise ValueError(f"{who}: expected {key} to name a column, got {_brief(content[key])}.")
    losses = LOSSES.get(setting, ("",))
    if (loss := content.get("loss", losses[0])) not in losses:
        raise ValueError(f"{who}: expected loss {' or '.join(losses) or 'left out'}, got {_brief(loss)}.")
    if setting in LOSSES:
        classes: tuple[str, ...] = ("risk",) if setting == "survival" else (content["label_column"],)
    else:
        classes = _classes(content["label_dict"], setting, who)
    return Task(
        name=str(content["name"]),
        setting=setting,
        classes=classes,
        ordinal="qwk" in metrics or setting == "ordinal",
        max_tiles=max_tiles,
        shuffle_tiles=shuffle,
        **{key: content.get(key) for key in _COLUMNS},
        horizons=_horizons(content["horizons"], who) if setting == "survival" else (),
        loss=loss,
    )


def _horizons(values: Any, who: str) -> tuple[float, ...]:
    """Rising times above 0."""
    plain = isinstance(values, list) and all(type(each) in (int, float) and 0 < each < math.inf for each in values)
    if not plain or not values or values != sorted(set(values)) or len(values) > _MOST_HORIZONS:
        raise ValueError(f"{who}: expected horizons as rising times above 0, such as [12, 36], got {_brief(values)}.")
    return tuple(map(float, values))


def _brief(value: Any) -> str:
    """A value for a message; of lists and mappings the type alone: aliases of YAML make small files huge."""
    plain = value is None or isinstance(value, str | int | float)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


def _classes(label_dict: Any, setting: str, who: str) -> tuple[str, ...]:
    """Names in the order of their index, which must run from 0 without a gap."""
    if not isinstance(label_dict, Mapping) or not label_dict:
        raise ValueError(f"{who}: expected label_dict with a label and its index a line, got {_brief(label_dict)}.")
    if len(label_dict) > _MOST_CLASSES:
        raise ValueError(f"{who}: expected at most {_MOST_CLASSES:,} labels in label_dict, got {len(label_dict):,}.")
    by_index = {index: str(name) for name, index in label_dict.items() if type(index) is int}
    if sorted(by_index) != list(range(len(label_dict))):
        raise ValueError(f"{who}: expected the indices 0 to {len(label_dict) - 1} in label_dict, each once.")
    if setting == "binary" and len(by_index) != 2:
        raise ValueError(f"{who}: expected two labels for a binary task, got {len(by_index)}.")
    if setting in ("multi_class", "ordinal") and len(by_index) < 2:
        raise ValueError(f"{who}: expected at least two labels, got {len(by_index)}.")
    return tuple(by_index[index] for index in range(len(by_index)))


class KeysOnce(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice in a mapping, of which it would take the last, is refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        twice = first_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _KeysAsWritten(KeysOnce):
    """As that, but keys stay the text that stands there: of the labels no, on, 01 and null it would make
    truth values, numbers and nothing. Merged mappings, by which a small file grows without end, are refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "a merged mapping", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def write_task(path: Path | str, task: Task) -> None:
    """Write a task's YAML file, whole or not at all."""
    text: str = yaml.safe_dump(task.to_dict(), sort_keys=False, allow_unicode=True)
    write_text_atomic(path, text)


ID_COLUMNS = ("slide_id", "image_id", "slide", "image", "input", "file", "name")
LABEL_COLUMNS = ("label", "isup_grade")
PATIENT_COLUMNS = ("patient_id", "pat_id", "patient", "case_submitter_id", "case_id", "group")
SITE_COLUMNS = ("site", "data_provider", "provider", "hospital", "center", "scanner")
# What besides the site a score is told apart by: its name -> columns of labels, or of the slides.csv of a run.
STRATA = {"scanner": ("scanner", "scanner_model"), "stain": ("stain", "staining")}
SHOWN = 3  # examples in a message
MOST_CLASSES = 50  # of a task that is made from a column

_YES = {"1", "1.0", "true", "yes"}
_NO = {"0", "0.0", "false", "no"}
_WHOLE_NUMBER = re.compile(r"(0|-?[1-9][0-9]*)(?:\.0+)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_BARCODE = re.compile(r"TCGA-\w{2}-\w{4}")
# What tells classes apart: letters, numbers with the marks inside them (1.5, 3+4), signs before a number or at the end
# (-1, <5, ER+).
_TELLING = re.compile(r"\d+(?:[^\w\s]\d+)*|[^\W\d_]+|^[^\w\s]+(?=\d)|[+-]+$")

IntArray = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The labelled slides of a CSV.

    Attributes:
        slide_ids: S names, each once.
        truth: (S,) index of the class; of a multi-label task (S, C) of 0 and 1; of survival (S, 2) time and event, of
            regression (S,) amounts, float64.
        patients: (S,) or None where they are not known.
        sites: (S,) or None.
        source: the CSV's name.
        digest: SHA-256 over what is above; a split is reused only where it is the same.
        strata: "scanner", "stain" -> (S,) what each slide has, "" = not known; those that are known.
    """

    slide_ids: tuple[str, ...]
    truth: npt.NDArray[Any]
    patients: tuple[str, ...] | None
    sites: tuple[str, ...] | None
    source: str
    digest: str
    strata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.slide_ids)

    def class_notes(self, classes: Sequence[str]) -> list[str]:
        """`class_notes` of these slides; none of times or amounts."""
        if self.truth.dtype.kind == "f":
            return []
        known = self.patients is not None
        return class_notes(classes, self.truth, self.patients or self.slide_ids, "patient" if known else "slide")

    @property
    def kinds(self) -> IntArray:
        """`kinds_of` these slides."""
        return kinds_of(self.truth)

    def take(self, rows: Sequence[int] | IntArray) -> "Labels":
        """Some of the slides, in the order given; the digest stays that of the whole CSV."""
        index = [int(row) for row in rows]

        def chosen(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[row] for row in index)

        return replace(
            self,
            slide_ids=chosen(self.slide_ids),
            truth=self.truth[index],
            patients=self.patients and chosen(self.patients),
            sites=self.sites and chosen(self.sites),
            strata={name: chosen(column) for name, column in self.strata.items()},
        )


def kinds_of(truth: npt.NDArray[Any]) -> IntArray:
    """(S,) or (S, C) what folds get even shares of: the classes, events, or quarters of the amounts."""
    if truth.dtype.kind != "f":
        return truth
    if truth.ndim == 2:
        return truth[:, 1].astype(np.int64)
    return np.searchsorted(np.quantile(truth, [0.25, 0.5, 0.75]), truth).astype(np.int64)


def canonical_label(label: str) -> str:
    """The name of a label's class: a whole number loses its decimal point, and everything else stays as it is written.

    "1" and "1.0" are one class; "01", "1e3" and "1_0" are text.
    """
    number = _WHOLE_NUMBER.fullmatch(label)
    return number[1] if number else label


def sorted_classes(labels: Iterable[str]) -> list[str]:
    """The classes of some labels: numbers in their order, then text in its order."""

    def order(name: str) -> tuple[bool, float, str]:
        return (False, float(name), name) if _NUMBER.fullmatch(name) else (True, 0.0, name)

    return sorted(set(map(canonical_label, set(labels))), key=order)


def alike_classes(classes: Iterable[str]) -> list[list[str]]:
    """Classes that differ in case, blanks or punctuation only, such as `Tumor` and `tumor`."""
    by_letters: dict[str, list[str]] = {}
    for name in classes:
        by_letters.setdefault("".join(_TELLING.findall(name.casefold())) or name, []).append(name)
    return [names for names in by_letters.values() if len(names) > 1]


def class_notes(classes: Sequence[str], truth: IntArray, units: Sequence[str], unit: str) -> list[str]:
    """Sentences on classes that look like one, and on classes of a single slide or patient.

    Args:
        truth: (N,) class index, or (N, C) of 0 and 1.
        units: (N,) the slide or patient of each row.
        unit: what these are called.
    """
    notes = [
        f"the classes {' and '.join(map(repr, names[:SHOWN]))} differ in case, blanks or punctuation only: if they are "
        "one, write them alike"
        for names in alike_classes(classes)
    ]
    for index, name in enumerate(classes):
        rows = np.flatnonzero(truth[:, index] if truth.ndim == 2 else truth == index)
        if len(of_class := {units[row] for row in rows.tolist()}) == 1:
            notes.append(f"the class {name} has a single {unit} ({of_class.pop()}): no score of it means much")
    return notes


def read_labels(path: Path | str, task: Task, *, id_rule: str = "exact") -> Labels:
    """Read and check labels.

    Args:
        path: a CSV with the columns that the task names, or the usual ones: the published PANDA table, Kaggle's
            train.csv (image_id, isup_grade), the published mutation table.
        id_rule: "tcga" takes the patient from the barcode where no column has it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a label that the task does not know, a time, event or amount that is none, a
            slide in two rows.
    """
    table = read_table(path)
    name = table.source
    id_column = column_of(table, task.id_column, ID_COLUMNS, "the slide's name", "id_column")
    slide_ids = table.filled(id_column)
    twice = first_twice(slide_ids)
    if twice is not None:
        raise ValueError(f"{name}: {twice} has two rows. Keep one.")
    truth: npt.NDArray[Any]
    if task.multi_label:
        truth = _flags(table, task.classes)
    elif task.setting == "survival":
        columns = [
            column_of(table, stated, (), what, key)
            for stated, what, key in (
                (task.time_column, "the time", "time_column"),
                (task.event_column, "the event", "event_column"),
            )
        ]
        times = _numbers(table, columns[0], at_least=0)
        truth = np.stack([times, _flags(table, columns[1:])[:, 0].astype(np.float64)], axis=1)
    elif task.setting == "regression":
        truth = _numbers(table, column_of(table, task.label_column, (), "the amount", "label_column"))
    else:
        label_column = column_of(table, task.label_column, LABEL_COLUMNS, "the label", "label_column")
        truth = _class_of_rows(table.filled(label_column), task, name)
    if task.patient_column is not None and task.patient_column not in table.columns:
        raise ValueError(
            f"{name}: expected a column {task.patient_column}, got {some_names(table.header)}. Correct the task."
        )
    _, patients = patients_of(table, task.patient_column, slide_ids, id_rule)
    stated = task.site_column if task.site_column in table.columns else None
    site_column = stated or first_column(table, SITE_COLUMNS)
    sites = None if site_column is None else table.columns[site_column]
    digest = hashlib.sha256(repr((slide_ids, truth.tolist(), patients, sites)).encode()).hexdigest()
    return Labels(
        tuple(slide_ids),
        truth,
        tuple(patients) if patients else None,
        tuple(sites) if sites else None,
        name,
        digest,
        strata_of(table, site_column),
    )


def strata_of(table: Table, site_column: str | None = None) -> dict[str, tuple[str, ...]]:
    """The columns of `STRATA` that a table has and that are not its site's."""
    found = {name: first_column(table, usual) for name, usual in STRATA.items()}
    return {name: tuple(table.columns[column]) for name, column in found.items() if column not in (None, site_column)}


def strata_of_run(features: Path, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What the run that made some slides' features knows of them, from the slides.csv in its output folder.

    Args:
        features: that folder, or one right in it.
        ids: the slides' names as the run has them.
    """
    for folder in (features, features.parent):
        if (folder / "slides.csv").is_file():
            table = read_table(folder / "slides.csv")
            row_of = {slide_id: row for row, slide_id in enumerate(table.columns.get("slide_id", ()))}
            rows = [row_of.get(slide_id) for slide_id in ids]
            columns = strata_of(table).items()
            known = {name: tuple("" if row is None else cells[row] for row in rows) for name, cells in columns}
            return {name: cells for name, cells in known.items() if any(cells)}
    return {}


def patients_of(
    table: Table, stated: str | None, slide_ids: Sequence[str], id_rule: str
) -> tuple[str | None, list[str] | None]:
    """(column, patient of each row), by the stated column or the first usual one; without one, the rule "tcga" takes
    the patients from the barcodes. (None, None) where nothing says them; ValueError where one is missing."""
    column = stated or first_column(table, PATIENT_COLUMNS)
    if column is not None:
        return column, table.filled(column)
    barcodes = [_BARCODE.match(slide_id) for slide_id in slide_ids] if id_rule == "tcga" else [None]
    found = [barcode[0] for barcode in barcodes if barcode]
    return ("TCGA barcode", found) if len(found) == len(slide_ids) else (None, None)


def first_column(table: Table, usual: Sequence[str]) -> str | None:
    """The first of the usual columns that the table has."""
    return next((column for column in usual if column in table.columns), None)


def column_of(table: Table, stated: str | None, usual: Sequence[str], what: str, key: str) -> str:
    """The column that the task states, or the first usual one."""
    got = some_names(table.header)
    if stated is not None and stated not in table.columns:
        raise ValueError(f"{table.source}: {what}: expected a column {stated}, got {got}. Correct {key} of the task.")
    found = stated or first_column(table, usual)
    if found is None:
        raise ValueError(
            f"{table.source}: {what}: expected a column {' or '.join(usual)}, got {got}. Name it as {key} of the task"
            + (" (`gigapath init-task --label COL` writes it)." if key == "label_column" else ".")
            + separator_hint(table.header)
        )
    return found


def _class_of_rows(labels: Sequence[str], task: Task, name: str) -> IntArray:
    index = {canonical_label(label): number for number, label in enumerate(task.classes)}
    unknown = [row for row, label in enumerate(labels) if canonical_label(label) not in index]
    if unknown:
        row = unknown[0]
        raise ValueError(
            f"{name}: row {row + 2} has the label {labels[row]!r}, and {len(unknown):,} rows have labels that the "
            f"task {task.name} does not know ({', '.join(task.classes)}). Correct the CSV or the task."
        )
    return np.array([index[canonical_label(label)] for label in labels], dtype=np.int64)


def _numbers(table: Table, column: str, *, at_least: float = -math.inf) -> npt.NDArray[np.float64]:
    """A column of finite numbers."""
    values = np.empty(len(table))
    for number, cell in enumerate(table.filled(column)):
        values[number] = plain_number(cell)
        if not at_least <= values[number] < math.inf or values[number] == -math.inf:
            least = "" if at_least == -math.inf else f" of at least {at_least:g}"
            raise ValueError(f"{table.source}: row {number + 2} has {cell!r} under {column}, expected a number{least}.")
    return values


def _flags(table: Table, columns: Sequence[str]) -> IntArray:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{table.source}: expected columns {', '.join(columns)}, {', '.join(missing)} is not there.")
    truth = np.empty((len(table), len(columns)), dtype=np.int64)
    for place, column in enumerate(columns):
        for number, cell in enumerate(table.filled(column)):
            if cell.lower() not in _YES | _NO:
                got = f"row {number + 2} has {cell!r} under {column}"
                raise ValueError(f"{table.source}: {got}, expected 0 or 1 (no or yes, false or true).")
            truth[number, place] = cell.lower() in _YES
    return truth


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that occurs twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


@dataclass(frozen=True)
class Joined:
    """Labelled slides and their files.

    Attributes:
        labels: the slides that have a file, in the order of the CSV.
        files: (S,) their feature files.
        missing: labelled slides without a file.
        unlabelled: files without a label.
    """

    labels: Labels
    files: tuple[Path, ...]
    missing: tuple[str, ...]
    unlabelled: tuple[str, ...]


def id_maker(id_rule: str, id_regex: str | None = None) -> Callable[[str], str]:
    """What makes a name, of a file or in a row, the id by which the two meet, in Unicode's composed form."""
    pattern = None if id_regex is None else re.compile(id_regex)

    def make(name: str) -> str:
        name = unicodedata.normalize("NFC", name)
        if pattern is not None:
            found = pattern.search(name)
            return name if found is None else found[1] if pattern.groups else found[0]
        return name.partition(".")[0] if id_rule == "tcga" else name

    return make


def join_labels(
    labels: Labels,
    files: Sequence[Path],
    *,
    id_rule: str = "exact",
    id_regex: str | None = None,
    allow_missing: bool = False,
) -> Joined:
    """Find the file of each labelled slide; nothing is ever substituted.

    Args:
        id_rule: "exact", or "tcga" for what stands before the first dot.
        id_regex: a pattern whose first group (or whole match) is the id; goes before `id_rule`.

    Raises:
        ValueError: two files or two rows share an id, no file has a row, or slides have no file and
            `allow_missing` is not set.
    """
    make = id_maker(id_rule, id_regex)
    by_id: dict[str, Path] = {}
    for file in files:
        key = make(bare_name(file))
        if key in by_id:
            raise ValueError(f"two files have the id {key}: {by_id[key].name} and {file.name}. Keep one.")
        by_id[key] = file
    keys = [make(slide_id) for slide_id in labels.slide_ids]
    twice = first_twice(keys)
    if twice is not None:
        raise ValueError(f"{labels.source}: two rows have the id {twice}. Make the id rule more exact.")
    found = [row for row, key in enumerate(keys) if key in by_id]
    missing = tuple(slide_id for slide_id, key in zip(labels.slide_ids, keys, strict=True) if key not in by_id)
    wanted = set(keys)
    unlabelled = tuple(file.name for key, file in by_id.items() if key not in wanted)
    if not found:
        raise ValueError(
            f"{labels.source}: none of its {len(labels):,} slides (such as {labels.slide_ids[0]}) is among the "
            f"{len(files):,} feature files (such as {files[0].name}). See --id-rule and --id-regex."
        )
    if missing and not allow_missing:
        raise ValueError(
            f"{labels.source}: {len(missing):,} of {len(labels):,} slides have no features ({shown(missing)}). "
            "Embed them, or go on without them: --allow-missing."
        )
    joined, paths = labels.take(found), tuple(by_id[keys[row]] for row in found)
    if len(folders := {path.parent for path in paths}) == 1:
        made = strata_of_run(folders.pop(), [bare_name(path) for path in paths])
        joined = replace(joined, strata={**made, **joined.strata})
    return Joined(joined, paths, missing, unlabelled)


def bare_name(file: Path) -> str:
    """A feature file's name without its suffix (Mussel's `.patch` included)."""
    return file.stem.removesuffix(".patch")


def shown(names: Sequence[str]) -> str:
    """A few of the names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def new_task(
    labels: Path | str,
    to: Path | str,
    *,
    columns: Sequence[str] = (),
    name: str | None = None,
    ordinal: bool = False,
    survival: Sequence[str] = (),
    regression: str | None = None,
) -> tuple[Task, dict[str, int]]:
    """Write the YAML file of a task.

    Args:
        columns: of the label; several make a multi-label task; none takes the usual one.
        name: of the task; by default that of the CSV.
        ordinal: the classes are grades, in the order of `sorted_classes`.
        survival: instead, the columns of time and event; the quartiles of the times of events become horizons.
        regression: instead, the column of an amount.

    Returns:
        the task, and how many slides each label has.

    Raises:
        ValueError: a column is missing, there is one class only, or so many that the column is hardly a label; no
            event before the end of the last follow-up.
    """
    path = Path(to)
    if path.exists():
        raise ValueError(f"{path}: it is there already. Choose another --to.")
    if sum((bool(columns) or ordinal, bool(survival), regression is not None)) > 1:
        raise ValueError("--survival, --regression, --label: expected one of them. A task learns one thing.")
    title = name or Path(labels).stem
    if survival:
        times, events = survival
        task = Task(title, "survival", ("risk",), time_column=times, event_column=events, loss="cox")
    elif regression is not None:
        task = Task(title, "regression", (regression,), label_column=regression, loss="mse")
    else:
        task = task_of_columns(labels, columns, name=name, ordinal=ordinal)
    read = read_labels(labels, task)
    truth = read.truth
    if task.setting == "survival":
        task = replace(task, horizons=_usual_horizons(read))
        events_in_all = int(truth[:, 1].sum())
        counts = {"event": events_in_all, "censored": len(read) - events_in_all}
    elif task.setting == "regression":
        if np.ptp(truth) == 0:
            raise ValueError(f"{read.source}: expected amounts that differ under {regression}, all are {truth[0]:g}.")
        counts = {regression or "": len(read)}
    elif task.multi_label:
        counts = dict(zip(task.classes, truth.sum(axis=0).tolist(), strict=True))
    else:
        counts = {label: int((truth == index).sum()) for index, label in enumerate(task.classes)}
    write_task(path, task)
    notes = read.class_notes(task.classes)
    if ordinal and not all(map(_NUMBER.fullmatch, task.classes)):
        notes.append(
            f"grades in words are taken in the order of the alphabet, {' < '.join(task.classes)}: correct it in "
            f"label_dict of {path.name} where it is another"
        )
    for note in notes:
        log.warning("note: %s", note)
    return task, counts


def _usual_horizons(labels: Labels) -> tuple[float, ...]:
    """Quartiles of the times of events, to three digits, those before the end of the last follow-up."""
    times, events = labels.truth.T
    quartiles = np.quantile(times[events == 1], [0.25, 0.5, 0.75]).tolist() if events.any() else []
    found = sorted({float(f"{each:.3g}") for each in quartiles})
    kept = tuple(each for each in found if 0 < each < times.max())
    if not kept:
        raise ValueError(f"{labels.source}: expected events before the end of the last follow-up, got none.")
    return kept


def task_of_columns(
    labels: Path | str, columns: Sequence[str] = (), *, name: str | None = None, ordinal: bool = False
) -> Task:
    """The task of classes or labels that columns of a CSV make, as `new_task` writes it; raises as that."""
    source, table = Path(labels).name, read_table(labels)
    id_column = column_of(table, None, ID_COLUMNS, "the slide's name", "id_column")
    chosen = list(columns) or [column_of(table, None, LABEL_COLUMNS, "the label", "label_column")]
    absent = [column for column in chosen if column not in table.columns]
    if absent:
        raise ValueError(f"{source}: expected columns {', '.join(chosen)}, got {some_names(table.header)}.")
    title = name or Path(labels).stem
    if len(chosen) > 1:
        return Task(title, "multi_label", tuple(chosen), id_column=id_column)
    found = sorted_classes(table.filled(chosen[0]))
    if not 2 <= len(found) <= MOST_CLASSES:
        raise ValueError(
            f"{source}: expected 2 to {MOST_CLASSES} classes under {chosen[0]}, got {len(found)}. Name the label's "
            "column with --label."
        )
    setting = "binary" if len(found) == 2 else "ordinal" if ordinal else "multi_class"
    return Task(title, setting, tuple(found), ordinal=ordinal, id_column=id_column, label_column=chosen[0])
