"""Options: one frozen dataclass per verb, beside its owner, is the one source of the command line.

A field declared with `option(...)` carries its help text and its bounds; what several verbs take is declared here.
`to_dict` is what is written next to the outputs.
"""

import dataclasses
import difflib
import functools
import inspect
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

LEAVE_SITE_OUT = "leave-site-out"  # in place of a number of folds: one a site

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "above": (operator.gt, "a value above"),
    "at_least": (operator.ge, "at least"),
    "at_most": (operator.le, "at most"),
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    hidden: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare a dataclass field that is also a command-line option: its default (False for a flag), one line of help
    with the unit, the allowed words (`choices`; beside bounds those that may stand for a number), its placeholder in
    help, bounds of its value, and whether it is a former spelling, which help leaves out (`hidden`)."""
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices else None,
        "metavar": metavar,
        "hidden": hidden,
        "above": above,
        "at_least": at_least,
        "at_most": at_most,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """What all options are made of: ValueError with an option's name where a value, or one of several, lies outside
    what its field allows."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            for item in value if isinstance(value, tuple) else (value,):
                _check_value("--" + field.name.replace("_", "-"), item, field.metadata)


def _check_value(flag: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata.get("choices")
    bounded = any(metadata.get(bound) is not None for bound in _BOUNDS)
    if choices and value in choices:
        return
    if choices and (isinstance(value, str) or not bounded):
        raise ValueError(f"{flag}: expected one of {', '.join(choices)}, got {value!r}.")
    for bound, (holds, words) in _BOUNDS.items():
        limit = metadata.get(bound)
        if limit is not None and not holds(value, limit):  # NaN fails every comparison, and so every bound
            raise ValueError(f"{flag}: expected {words} {limit:g}, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where models run, in every verb that runs one."""

    device: str = option("auto", "where models run: auto, cpu, cuda, cuda:N or mps", metavar="DEVICE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOptions(DeviceOptions):
    """How an encoder runs, in every verb that embeds."""

    precision: str = option("auto", "auto is fp16 on CUDA, fp32 elsewhere", choices=("auto", "fp32", "fp16", "bf16"))
    random_weights: bool = option(False, "untrained weights, for trying things; every output says so")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapOptions(Options):
    """How intervals are drawn, in every verb that scores."""

    seed: int = option(0, "seed of all that is drawn: weights, order, folds, bootstrap", at_least=0)
    replicates: int = option(
        2000,
        "bootstrap replicates of 95 % intervals of one fitted model (over folds none are drawn); 0 = no intervals",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PitchOptions(Options):
    """How far apart the tiles of feature files lie, in every verb that reads them."""

    tile_size_level0: float | None = option(
        None,
        "distance between neighbouring tiles, in the unit of the files' coordinates, where a file does not say",
        metavar="PIXELS",
        above=0,
    )


@dataclasses.dataclass(frozen=True)
class KeepOptions(Options):
    """What a run does with the results that it finds."""

    overwrite: str | None = option(
        None, "do a stage again even where it is done", choices=("tiles", "features", "slides", "all")
    )
    allow_mixed: bool = option(False, "accept results of other precision, device or weights in the same folder")
    only: str | None = option(None, "failed: leave out slides that did not fail before", choices=("failed",))
    max_failures: int | None = option(None, "end the run once more slides than this failed", metavar="N", at_least=0)
    dry_run: bool = option(False, "show the plan and write nothing")

    def overwrites(self, stage: str) -> bool:
        """Whether this stage is to be done again."""
        return self.overwrite in (stage, "all")


@dataclasses.dataclass(frozen=True)
class IdOptions(Options):
    """How rows of labels meet slides, in every verb that joins the two."""

    id_rule: str = option(
        "exact",
        "how slides meet rows: exact, or tcga = by what stands before the first dot",
        choices=("exact", "tcga"),
    )
    id_regex: str | None = option(
        None, "a pattern whose first group (or whole match) is the id in file names and in rows", metavar="REGEX"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.id_regex is not None:
            try:
                re.compile(self.id_regex)
            except re.error as error:
                raise ValueError(
                    f"--id-regex: expected a regular expression, got {self.id_regex!r} ({error})."
                ) from None


def to_dict(options: Any) -> dict[str, Any]:
    """The options as plain JSON values, tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}


def as_keywords(**groups: type[Options]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Let a function take the fields of options as keywords, by the names of the command line.

    The function is handed one object a group; its signature and help list every option. An unknown keyword raises
    TypeError with the nearest one that exists; a path may stand for its text, a list for a tuple.
    """
    fields = {field.name: (group, field) for group, cls in groups.items() for field in dataclasses.fields(cls)}

    def take(function: Callable[..., T]) -> Callable[..., T]:
        own = [each for name, each in inspect.signature(function).parameters.items() if name not in groups]
        names = [*(each.name for each in own), *fields]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> T:
            unknown = next((name for name in given if name not in names), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, names, n=1)
                hint = f" Did you mean {near[0]}?" if near else f" help(gigapath.{function.__name__}) lists all."
                raise TypeError(f"gigapath.{function.__name__}: unknown keyword {unknown!r}.{hint}")
            values: dict[str, dict[str, Any]] = {group: {} for group in groups}
            for name in [name for name in given if name in fields]:
                value = given.pop(name)
                plain = os.fspath(value) if isinstance(value, os.PathLike) else value
                values[fields[name][0]][name] = tuple(plain) if isinstance(plain, list) else plain
            return function(*args, **given, **{group: groups[group](**held) for group, held in values.items()})

        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(name, keyword, default=field.default, annotation=field.type)
            for name, (_, field) in fields.items()
        ]
        lines = [f"        {name}: {field.metadata['help']}" for name, (_, field) in fields.items()]
        call.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return call

    return take


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The options `cls` from a mapping; an unknown key raises ValueError with the keys that exist."""
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown option {', '.join(unknown)}. Known: {', '.join(sorted(fields))}.")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
