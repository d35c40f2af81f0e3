"""How verbs are declared: a typed function a verb, dataclasses of options as groups of its help, the shared arguments.

cyclopts reads a function's signature and a dataclass's fields, help and defaults included. What `option(...)` declares
beside them (placeholder, choices) it reads from annotations only, which `verb` gives to the fields.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast, get_args, get_type_hints

from cyclopts import App, ArgumentCollection, CoercionError, Group, Parameter
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import Box
from rich.console import Console

import gigapath

EXIT_FAILED_SLIDES = 3
EXIT_STOPPED = 75

# What stands after an option in help; what help says of it is in the verb's docstring.
Folder = Annotated[str, Parameter(metavar="DIR")]
File = Annotated[str, Parameter(metavar="FILE")]
Name = Annotated[str, Parameter(metavar="NAME")]
Csv = Annotated[str, Parameter(metavar="CSV")]
GivenFolder = Annotated[str, Parameter(name="DIR")]  # an argument by its place

# Arguments of several verbs, each with what help says of it.
Slides = Annotated[tuple[str, ...], Parameter(help="slide files, folders of them, manifests (.csv)")]
Features = Annotated[
    tuple[str, ...],
    Parameter(
        help="files of tile embeddings or folders of them: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, slide2vec's, "
        "the published"
    ),
]
Checkpoint = Annotated[str, Parameter(help="a fitted head, such as OUT/fold_0")]
RunFolder = Annotated[str, Parameter(metavar="DIR", help="the output folder; what is done there is kept")]
Json = Annotated[bool, Parameter(name="--json", help="print one JSON document, for machines")]
Words = Annotated[tuple[str, ...], Parameter(parse=False)]  # the command as it was typed, for the record of a run


def verb(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function a verb: the fields of each dataclass that it takes become options, one group of the help each."""
    hints, defaults = get_type_hints(function, include_extras=True), dict(function.__kwdefaults__ or {})
    for order, (name, hint) in enumerate(hints.items()):
        if dataclasses.is_dataclass(hint):
            types = get_type_hints(hint)
            hint.__annotations__ = {
                field.name: Annotated[
                    types[field.name],
                    Parameter(metavar=field.metadata.get("metavar"), choices=field.metadata.get("choices")),
                ]
                for field in dataclasses.fields(hint)
            }
            group = Group(name.replace("_", " ").capitalize(), sort_key=order)
            hints[name] = Annotated[hint, Parameter(name="*", group=group)]
            defaults[name] = cast(type, hint)()
    function.__annotations__, function.__kwdefaults__ = hints, defaults
    return function


def make_app(name: str, help: str) -> App:
    """A command line of verbs, plain text without boxes or colours on a terminal as in a pipe."""
    return App(
        name=name,
        help=help,
        help_format="plaintext",
        help_formatter=DefaultFormatter(panel_spec=PanelSpec(box=Box("    \n" * 8), padding=(0, 0, 0, 3))),
        version=f"gigapath {gigapath.__version__}",
        version_format="plaintext",
        console=Console(color_system=None),
        config=_refuse_fractions,
        default_parameter=Parameter(
            negative=(), consume_multiple=(1, None), allow_repeating=True, show_default=shown_default
        ),
    )


def _refuse_fractions(app: App, verbs: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse "3.7" where a whole number is meant, which cyclopts would round."""
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                try:
                    int(token.value)
                except ValueError:
                    raise CoercionError(token=token, target_type=int, argument=argument) from None


def shown_default(value: Any) -> str | None:
    """A default as help shows it; none for flags and empty lists."""
    if value is None or value is False or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
