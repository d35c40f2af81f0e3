"""`gigapath VERB ...`: finds the verb's function and runs it; nothing heavy is imported before that."""

import contextlib
import dataclasses
import difflib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from inspect import BoundArguments, Parameter
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cyclopts import App, CycloptsError, UnknownOptionError

from gigapath.cli.arguments import EXIT_STOPPED, OutputOptions, make_app
from gigapath.file_names import for_terminal
from gigapath.files import output_error
from gigapath.machine import check_device
from gigapath.progress import SILENT_SECONDS, Stopped, interrupting
from gigapath.releases import HUB_PREFIXES, RELEASES, check_encoder
from gigapath.text import in_words

# verb -> (its function in a module of gigapath.cli, one line of help), in the order of use
VERBS = {
    "demo": ("slides:demo", "Embed a small public slide, or yours, and say where everything is."),
    "download": ("install:download", "Fetch weights, demo data and the published tables; checked."),
    "doctor": (
        "install:doctor",
        "Check this machine, the installation or the released weights, and say how to fix problems.",
    ),
    "plan": ("plan:plan", "Summarize a cohort and estimate its cost from the slides' headers; optionally tile a few."),
    "tile": ("slides:tile", "Find tissue and place tiles: mask, tiles, previews. Check the previews before embedding."),
    "embed": ("slides:embed", "Turn slides into tiles, tile embeddings and slide embeddings."),
    "slide-embed": ("slides:slide_embed", "Compute slide embeddings from tile embeddings, ours or another tool's."),
    "status": (
        "cohort:status",
        "Show progress on a cohort: slides by state and stage, rate, time left, failures by kind.",
    ),
    "check": ("features:check", "Describe feature files, ours or another tool's, and report what is wrong with them."),
    "convert": (
        "features:convert",
        "Convert tile embeddings to files of other tools, or a run's slide vectors to a table (parquet, CSV, npz).",
    ),
    "map": (
        "report:draw_maps",
        "Draw maps on slides: embeddings, attention, what a head looks at; PNG, GeoJSON, arrays.",
    ),
    "report": (
        "report:report",
        "Write one page on a run or a cohort: slides, maps, scores; or a paper's methods paragraph.",
    ),
    "remove": (
        "cohort:remove",
        "Remove a slide and every mention of it from an output folder, e.g. when consent is withdrawn.",
    ),
    "embed-tiles": ("probe:embed_tiles", "Embed tile images with a tile encoder into one file for probes."),
    "probe": ("probe:probe", "Fit and score a linear layer on frozen tile or slide embeddings."),
    "compare": ("probe:compare", "Compare embeddings or models on the same folds: differences, tests, their power."),
    "pretrain": ("finetune:pretrain", "Pretrain the slide encoder on unlabeled slides, by predicting hidden tiles."),
    "init-task": ("finetune:init_task", "Write a task file for fine-tuning from a CSV of labels."),
    "finetune": (
        "finetune:finetune",
        "Fine-tune the slide encoder on labeled slides: by the published recipe or yours.",
    ),
    "predict": ("finetune:predict", "Apply a fitted head to feature files; with --labels, test it on another cohort."),
    "study": ("study:study", "Run a study file: models, comparisons and outside tests, with tables and a checklist."),
}
# former verbs -> what they are now
ALIASES = {
    "evaluate": ("predict",),
    "inspect": ("check", "--describe"),
    "export": ("convert",),
    "methods": ("report", "--methods"),
    "verify": ("doctor", "--verify"),
}

EXIT_PIPE = 141  # as a shell says it: 128 + SIGPIPE

app = make_app(
    "gigapath",
    "Prov-GigaPath: whole-slide images to tiles, tile embeddings and slide embeddings. For research use only.",
)
for order, (name, (place, line)) in enumerate(VERBS.items()):
    app.command(f"gigapath.cli.{place}", name=name, help=line, sort_key=order)
app.register_install_completion_command()


_MOVES = {"\r", "\x1b"}  # by which a terminal's cursor goes back


class _Shown:
    """Standard output or error, where whatever comes from files (names, errors, attributes) is escaped."""

    log: TextIO | None = None  # gets whole lines, each with its time
    line = ""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.wrote = time.monotonic()

    def write(self, text: str) -> int:
        self.wrote = time.monotonic()
        text = for_terminal(text)
        if self.log is not None and not _MOVES & {*text}:  # a bar draws over itself
            self.line += text
            *whole, self.line = self.line.split("\n")
            for line in whole:
                self.log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")
            self.log.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status: 0 done, 3 some slides failed, 75 stopped by a signal, 1 nothing could start,
    2 the arguments are off.

    Every error a user can cause ends here as one sentence; set GIGAPATH_DEBUG=1 to see where it came from.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words[:1] = ALIASES.get(words[0], words[:1]) if words else ["--help"]
    shown: Any = _Shown(sys.stdout), _Shown(sys.stderr)
    with interrupting(), contextlib.redirect_stdout(shown[0]), contextlib.redirect_stderr(shown[1]):
        try:
            return run_verb(app, words)
        except KeyboardInterrupt:  # also while a verb's modules are imported
            print("gigapath: stopped.", file=sys.stderr)
            return EXIT_STOPPED


def run_verb(app: App, words: Sequence[str]) -> int:
    """Run one verb of `app`; the exit status."""
    program = f"{app.name[0]} {words[0]}"
    help: Any = app.help_formatter
    help.everything, help.left_out = "--help-all" in words, 0
    words = ["--help" if word == "--help-all" else word for word in words]
    if words[0] not in app:  # cyclopts would import every verb to suggest one
        near = difflib.get_close_matches(words[0], list(app), n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        print(f"{app.name[0]}: expected a verb, got {words[0]!r}{meant} See {app.name[0]} --help.", file=sys.stderr)
        return 2
    try:
        function, bound, given = app.parse_args(words, print_error=False, exit_on_error=False)
    except FileNotFoundError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except (CycloptsError, ValueError) as error:  # ValueError: of the options' own checks
        print(f"{program}: {in_one_line(error)} See {program} --help.", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as shown:
        try:
            shown.enter_context(_showing(program, bound.arguments.pop("output", OutputOptions())))
            check_inputs(bound)
            status = function(*bound.args, **bound.kwargs, **dict.fromkeys(given, words[1:])) or 0
            if help.left_out:
                print(f"{help.left_out} more options: {program} --help-all")
            sys.stdout.flush()  # a reader that has gone shows here, not at exit
        except Stopped as stopped:
            print(f"{program}: stopped by {stopped}; run the same command again to resume.", file=sys.stderr)
            return EXIT_STOPPED
        except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("GIGAPATH_DEBUG"):
                raise
            print(f"{program}: {error}", file=sys.stderr)
            logging.getLogger("gigapath").debug("where it came from:", exc_info=error)
            return 1
    return status


def _print_signs_of_life(program: str, ended: threading.Event, out: Any, err: Any) -> None:
    """Write how long the work has gone on whenever nothing was written for long, until it has ended."""
    started = time.monotonic()
    while not ended.wait(max(0.01, max(out.wrote, err.wrote) + SILENT_SECONDS - time.monotonic())):
        if time.monotonic() - max(out.wrote, err.wrote) >= SILENT_SECONDS:
            print(f"{program}: at work for {in_words(time.monotonic() - started)}", file=err, flush=True)


def in_one_line(error: CycloptsError | ValueError) -> str:
    """What is wrong with the words; an unknown option with the closest one of the verb, those of help included."""
    if isinstance(error, CycloptsError):
        error.command_chain = None
    if not isinstance(error, UnknownOptionError):
        return str(error)
    given = (error.token.keyword or error.token.value).partition("=")[0].strip("[]")
    known = [name for argument in error.argument_collection for name in argument.names]
    given = given if given.startswith("-") else "--" + given.replace("_", "-")  # as a file of options has it
    near = difflib.get_close_matches(given, [*known, "--help", "--help-all"], n=1)
    where = "" if error.token.source == "cli" else f" in {error.token.source}"
    return f"unknown option {given}{where}" + (f"; did you mean {near[0]}?" if near else ".")


@contextlib.contextmanager
def _showing(program: str, options: OutputOptions) -> Iterator[None]:
    """Show what the options say, within this block only: log messages with -v, errors alone with -q, all in a file
    too, and in a log a line after each silence."""
    logger = logging.getLogger("gigapath")
    before = logger.level
    handler = logging.StreamHandler() if options.verbose else None
    with contextlib.ExitStack() as undo:
        undo.callback(logger.setLevel, before)
        if options.log_file is not None:
            try:
                log = undo.enter_context(Path(options.log_file).open("a", encoding="utf-8"))
            except OSError as error:
                raise output_error(Path(options.log_file), error) from error
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, _Shown):
                    stream.log = log
                    undo.callback(setattr, stream, "log", None)
        if options.quiet:
            logger.setLevel(logging.ERROR)
        elif isinstance(sys.stderr, _Shown) and not sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            ended = threading.Event()
            given = program, ended, sys.stdout, sys.stderr
            thread = threading.Thread(target=_print_signs_of_life, args=given, daemon=True)
            thread.start()
            undo.callback(thread.join)
            undo.callback(ended.set)
        if handler is not None:
            logger.setLevel(logging.DEBUG)
            logger.addHandler(handler)
            undo.callback(logger.removeHandler, handler)
        yield


# option or argument -> what has to exist there; other names are checked below, or by the verb itself
_PATHS = {
    "slides": "a slide, a folder or a manifest",
    "tiles": "a folder or file of tiles",
    "labels": "a CSV of labels",
    "splits": "a folder of split files",
    "coordinates": "a folder",
    "maps": "a folder made by gigapath map",
    "pcam_meta": "a folder",
    "weights": "a folder with pytorch_model.bin and slide_encoder.pth",
    "reference": "a file made by scripts/make_reference.py",
    "panda": "a folder",
    "patients": "a CSV of patients",
}


def check_inputs(bound: BoundArguments) -> None:
    """Refuse what can't be right, by the names that options and arguments bear in every verb.

    Raises:
        FileNotFoundError, ValueError: names the option.
    """
    given = {name: value for name, value in _values(bound) if value not in (None, "", ())}
    flags = {name: name.upper() for name, value in bound.signature.parameters.items() if _by_place(value)}
    for name in _PATHS.keys() & given.keys():
        paths = given[name] if isinstance(given[name], tuple) else (given[name],)
        for path in paths:
            flag = flags.get(name, _flag(name))
            if not isinstance(path, str):  # a measurement's --tiles is a number
                continue
            if path.endswith(".gz"):
                raise ValueError(f"{flag}: expected {_PATHS[name]}, got {path!r}, which is packed. Unpack it: gunzip.")
            if not Path(path).expanduser().exists():
                raise FileNotFoundError(f"{flag}: expected {_PATHS[name]}, got {path!r}, which does not exist.")
    for kind in ("tile", "slide"):
        if f"{kind}_encoder" in given:
            check_encoder(kind, given[f"{kind}_encoder"])
    _check_devices(given)
    head = Path(given.get("checkpoint", "head.json"))
    if "checkpoint" in given and not (head.is_file() or (head / "head.json").is_file()):
        raise FileNotFoundError(
            f"{flags.get('checkpoint', '--checkpoint')}: expected a fitted head (a folder such as OUT/fold_0), got "
            f"{given['checkpoint']!r}, which holds no head.json. Has its run ended?"
        )
    for name in ("pretrained", "init"):
        weights = given.get(name, "")
        known = weights in ("", *RELEASES) or weights.startswith(HUB_PREFIXES)
        if not known and not Path(weights).expanduser().exists():
            raise FileNotFoundError(
                f"{_flag(name)}: expected {', '.join(RELEASES)}, hf_hub:REPO, the path of a checkpoint, or '' for new "
                f"weights, got {weights!r}. Check the name or the path."
            )
    # `check` looks at files of every kind, of several encoders too, and needs no torch to say what is wrong.
    if "features" in given and "describe" not in bound.signature.parameters:
        from gigapath.features.folders import find_feature_files  # numpy, h5py

        find_feature_files(given["features"])


def _check_devices(given: Mapping[str, Any]) -> None:
    if given.get("engine") == "ray":  # the workers' machines count
        return
    check_device(given.get("device", "auto"))
    for name in given.get("devices", "").split(","):
        if name and not name.strip().isdigit():
            check_device(name.strip(), "--devices")


def _values(bound: BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        if dataclasses.is_dataclass(value):
            yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        else:
            yield name, value


def _by_place(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.POSITIONAL_ONLY


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def command() -> NoReturn:
    """`gigapath` as a program. Once all is said, Ctrl-C has nothing left to stop: Python, which is clearing up, would
    print lines about exceptions that it ignores."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    command()
