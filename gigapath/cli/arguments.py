"""How verbs are declared: a typed function a verb, dataclasses of options as groups of its help, the shared arguments.

cyclopts reads a function's signature and a dataclass's fields, help and defaults included. What `option(...)` declares
beside them (placeholder, choices) it reads from annotations only, which `verb` gives to the fields. It gives every verb
the options of `OutputOptions` too, which `main` acts on.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

from cyclopts import App, ArgumentCollection, CoercionError, Group, Parameter
from cyclopts.help import DefaultFormatter, HelpPanel, PanelSpec
from rich.box import Box
from rich.console import Console

import gigapath
from gigapath.options import Options, option

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


@dataclasses.dataclass(frozen=True)
class OutputOptions(Options):
    """What every verb shows, and where its options come from."""

    config: str | None = option(
        None,
        "take options from a YAML or JSON file, such as a run's record (OUT/runs/*.json); the command line wins",
        metavar="FILE",
    )
    log_file: str | None = option(None, "append what is shown to this file, a time before each line", metavar="FILE")
    quiet: bool = option(False, "show errors and results, no plan and no progress")
    verbose: bool = option(False, "show log messages too, and where an error came from")


_SHORT = {"quiet": "-q", "verbose": "-v"}

# What `VERB --help` shows; `--help-all` shows every option.
COMMON = frozenset(
    f"--{name}"
    for line in (
        "out to json overwrite dry-run help help-all config device workers random-weights embedding",
        "mpp tile-size tissue max-tiles tile-encoder slide-encoder tiles",
        "pilot tiles-per-second describe slides slide-mpp kind checkpoint tile layer target",
        "maps methods single-file title demo labels label split group solver seeds folds offline verify weights name",
        "ordinal task features splits pretrained controls head feat-layer adapt epochs base-lr allow-missing",
    )
    for name in line.split()
)


def verb(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function a verb: the fields of each dataclass that it takes become options, one group of the help each."""
    hints, defaults = get_type_hints(function, include_extras=True), dict(function.__kwdefaults__ or {})
    signature = inspect.signature(function)
    shared = inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, default=OutputOptions())
    hints["output"] = OutputOptions
    for order, (name, hint) in enumerate(hints.items()):
        if dataclasses.is_dataclass(hint):
            types = get_type_hints(hint)
            hint.__annotations__ = {
                field.name: Annotated[
                    types[field.name],
                    Parameter(
                        metavar=field.metadata.get("metavar"),
                        # of a number that may be a word the type names the word
                        choices=None if int in get_args(types[field.name]) else field.metadata.get("choices"),
                        alias=_SHORT.get(field.name),
                        show=not field.metadata.get("hidden"),
                    ),
                ]
                for field in dataclasses.fields(hint)
            }
            group = Group(name.replace("_", " ").capitalize(), sort_key=order)
            hints[name] = Annotated[hint, Parameter(name="*", group=group)]
            defaults[name] = cast(type, hint)()
    function.__annotations__, function.__kwdefaults__ = hints, defaults
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature.parameters.items()
    ]
    function.__signature__ = signature.replace(parameters=[*parameters, shared])  # type: ignore[attr-defined]
    return function


class Help(DefaultFormatter):
    """Help in plain text: the common options, or with `everything` all."""

    everything = False
    left_out = 0

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        if panel.format == "parameter" and not self.everything:
            shown = [entry for entry in panel.entries if entry.positional_label or COMMON & {*entry.positive_names}]
            self.left_out += len(panel.entries) - len(shown)
            panel = panel.copy(entries=shown)
        super().__call__(console, options, panel)


def make_app(name: str, help: str) -> App:
    """A command line of verbs, plain text without boxes or colors on a terminal as in a pipe."""
    return App(
        name=name,
        help=help,
        help_format="plaintext",
        help_formatter=Help(panel_spec=PanelSpec(box=Box("    \n" * 8), padding=(0, 0, 0, 3))),
        version=_version,
        version_format="plaintext",
        console=Console(color_system=None),
        config=(_from_file, _refuse_fractions),
        default_parameter=Parameter(
            negative=(), consume_multiple=(1, None), allow_repeating=True, show_default=shown_default
        ),
    )


def _version() -> str:
    """The version, with the commit where an installation from git or a checkout tells."""
    import importlib.metadata
    import json
    import subprocess

    commit = ""
    try:
        origin = json.loads(importlib.metadata.distribution("gigapath").read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", "")[:12]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass
    root = Path(gigapath.__file__).parent.parent
    if not commit and (root / ".git").exists():
        words = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return f"gigapath {gigapath.__version__}" + f" (commit {commit})" * bool(commit)


def _from_file(app: App, verbs: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the options of `--config FILE` to the arguments that the command line leaves out.

    Raises:
        FileNotFoundError, ValueError: no such file, or no options in it.
        UnknownOptionError: an option that the verb does not have.
    """
    named = [token.value for argument in arguments if argument.name == "--config" for token in argument.tokens]
    if not named:
        return
    path = Path(named[-1]).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--config: expected a YAML or JSON file, got {named[-1]!r}, which does not exist.")
    import yaml
    from cyclopts.config import Dict

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"--config: expected YAML or JSON, got {path.name}, which is neither.") from error
    content = content.get("options", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise ValueError(f"--config: expected options and their values, got {path.name}, which holds none.")
    options: dict[str, Any] = {}
    for name, value in content.items():  # a record of fine-tuning has groups of options
        options |= {str(key): inner for key, inner in (value if isinstance(value, Mapping) else {name: value}).items()}
    nested = next((name for name, value in options.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise ValueError(f"--config: expected a value of {nested[:80]} in {path.name}, got keys and values.")
    given = {name: value for name, value in options.items() if not (value is None or value is False or value == [])}
    Dict(given, source=path.name, use_commands_as_keys=False)(app, verbs, arguments)


def _refuse_fractions(app: App, verbs: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse "3.7" where a whole number is meant, which cyclopts would round."""
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                if any(token.value in get_args(hint) for hint in get_args(argument.hint)):  # a word for a number
                    continue
                try:
                    int(token.value)
                except ValueError:
                    raise CoercionError(token=token, target_type=int, argument=argument) from None


def shown_default(value: Any) -> str | None:
    """A default as help shows it; none for flags and empty lists."""
    if value is None or value is False or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
