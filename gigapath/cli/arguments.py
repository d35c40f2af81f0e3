"""From options dataclasses to argparse and back."""

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, options_class: type, *, title: str | None = None) -> None:
    """Add one argument per field of `options_class`; a bool is a flag, a tuple takes several words."""
    group = parser.add_argument_group(title) if title else parser
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata.get("help", "").replace("%", "%%")
        kind, several = _value_type(hints[field.name])
        if kind is bool:
            group.add_argument(flag, action="store_true", default=field.default, help=text)
            continue
        shown = "" if field.default in (None, ()) else f" (default: {_show(field.default)})"
        group.add_argument(
            flag,
            type=kind,
            nargs="+" if several else None,
            default=field.default,
            choices=field.metadata.get("choices"),
            metavar=field.metadata.get("metavar"),
            help=text + shown,
        )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, of verbs that print one document."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, for machines")


def options_from(namespace: argparse.Namespace, options_class: type[T]) -> T:
    """The options dataclass that the parsed arguments describe; its own checks run here."""
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _value_type(hint: Any) -> tuple[type, bool]:
    """(type of one word, whether several are taken) of a field's annotation such as `float | None`."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _show(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
