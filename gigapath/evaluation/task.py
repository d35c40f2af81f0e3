"""A task: what the labels are called and mean; a small YAML file, of the package or the user's own."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gigapath.files import write_text_atomic

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


@dataclasses.dataclass(frozen=True)
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
        raise ValueError(
            f"{path.name}: expected YAML, got something else{where}. Correct it, or write it anew: gigapath init-task "
            "LABELS."
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
        raise ValueError(f"{who}: expected a name, got {_shown(content['name'])}.")
    if setting not in SETTINGS:
        raise ValueError(f"{who}: expected setting {', '.join(SETTINGS)}, got {_shown(setting)}.")
    metrics = content.get("add_metrics") or []
    if not isinstance(metrics, list) or any(metric not in _METRICS for metric in metrics):
        raise ValueError(f"{who}: expected add_metrics of {', '.join(_METRICS)}, got {_shown(metrics)}.")
    max_tiles, shuffle = content.get("max_tiles", 1_000_000), content.get("shuffle_tiles", True)
    if not isinstance(max_tiles, int) or isinstance(max_tiles, bool) or max_tiles < 1:
        raise ValueError(f"{who}: expected max_tiles of at least 1, got {_shown(max_tiles)}.")
    if not isinstance(shuffle, bool):
        raise ValueError(f"{who}: expected shuffle_tiles true or false, got {_shown(shuffle)}.")
    for key in _COLUMNS:
        if (content.get(key) is not None or key in of_setting) and not isinstance(content[key], str):
            raise ValueError(f"{who}: expected {key} to name a column, got {_shown(content[key])}.")
    losses = LOSSES.get(setting, ("",))
    if (loss := content.get("loss", losses[0])) not in losses:
        raise ValueError(f"{who}: expected loss {' or '.join(losses) or 'left out'}, got {_shown(loss)}.")
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
        raise ValueError(f"{who}: expected horizons as rising times above 0, such as [12, 36], got {_shown(values)}.")
    return tuple(map(float, values))


def _shown(value: Any) -> str:
    """A value for a message; of lists and mappings the type alone: aliases of YAML make small files huge."""
    plain = value is None or isinstance(value, str | int | float)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


def _classes(label_dict: Any, setting: str, who: str) -> tuple[str, ...]:
    """Names in the order of their index, which must run from 0 without a gap."""
    if not isinstance(label_dict, Mapping) or not label_dict:
        raise ValueError(f"{who}: expected label_dict with a label and its index a line, got {_shown(label_dict)}.")
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


class _KeysAsWritten(yaml.SafeLoader):
    """YAML's safe loader, but keys stay the text that stands there: of the labels no, on, 01 and null it would make
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
