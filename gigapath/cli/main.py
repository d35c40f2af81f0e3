"""`gigapath VERB ...`: finds the verb's module and runs it; nothing heavy is imported before that."""

import argparse
import contextlib
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import gigapath
from gigapath.file_names import for_terminal
from gigapath.signals import interrupting

# verb -> (module under gigapath.cli, one line of help), in the order of use. A module offers `add_arguments(parser)`
# and `run(namespace) -> exit status`.
VERBS: dict[str, tuple[str, str]] = {
    "download": ("download", "Fetch weights, demo data and the published tables; checked."),
    "doctor": ("doctor", "Look at this machine and installation: what is wrong, and the mend."),
    "plan": ("plan", "What a cohort is made of and what it will cost, from the slides' headers; a pilot on a few."),
    "tile": ("tile", "Find tissue and lay tiles: mask, tiles, previews. Look at them before embedding."),
    "embed": ("embed", "Slides to tiles, tile embeddings and slide embeddings."),
    "slide-embed": ("slide_embed", "Tile embeddings, ours or another tool's, to slide embeddings."),
    "status": ("status", "How far a cohort is: slides by state and stage, rate, time left, failures by kind."),
    "check": ("check", "Say what is wrong with feature files, ours or another tool's, and what it would do."),
    "inspect": ("inspect", "Say what a feature file is, ours or another tool's."),
    "convert": ("convert", "Tile embeddings as another tool's files: TRIDENT, CLAM, STAMP, slide2vec, the published."),
    "export": ("export", "One table of slide vectors from a run: parquet, CSV or npz."),
    "map": ("map", "Draw maps on slides: embeddings, attention, what a fitted head looks at; PNG, GeoJSON, arrays."),
    "report": ("report", "One page on a run or a cohort: what failed, slides with tiles and maps, scores."),
    "methods": ("methods", "Write the methods paragraph of a paper from the records of a run, with BibTeX."),
    "remove": ("remove", "Take a slide out of an output folder, every file and mention of it: consent withdrawn."),
    "embed-tiles": ("embed_tiles", "Tile images through a tile encoder into one file for probes."),
    "probe": ("probe", "Fit and score a linear layer on frozen tile or slide embeddings."),
    "init-task": ("init_task", "Write a task file for fine-tuning from a CSV of labels."),
    "finetune": ("finetune", "Fine-tune the slide encoder on labelled slides: the published PANDA recipe, or yours."),
    "evaluate": ("evaluate", "Test a fitted head on another cohort; nothing is fitted."),
    "predict": ("predict", "Apply a fitted head to feature files."),
    "verify": ("verify", "Check a released pair: files, demo tile, slide encoder, PANDA tiles; a report to paste."),
}

EXIT_FAILED_SLIDES = 3
EXIT_STOPPED = 75
EXIT_PIPE = 141  # as a shell says it: 128 + SIGPIPE


class _Parser(argparse.ArgumentParser):
    """A parser that says what is off in one line: argparse's usage of forty options would push it off the screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


class _Shown:
    """Standard output or error, where whatever comes from files (names, errors, attributes) is escaped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(for_terminal(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser of `gigapath`; only the chosen verb's module is imported."""
    parser = _Parser(
        prog="gigapath",
        description="Prov-GigaPath: whole-slide images to tiles, tile embeddings and slide embeddings. "
        "For research use only.",
    )
    parser.add_argument("--version", action="version", version=f"gigapath {gigapath.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (module, line) in VERBS.items():
        sub = verbs.add_parser(name, help=line, description=line, allow_abbrev=False)
        if name == verb:
            importlib.import_module(f"gigapath.cli.{module}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status: 0 done, 3 some slides failed, 75 stopped by a signal, 1 nothing could start,
    2 the arguments are off.

    Every error a user can cause ends here as one sentence; set GIGAPATH_DEBUG=1 to see where it came from.
    """
    shown: Any = _Shown(sys.stdout), _Shown(sys.stderr)
    with interrupting(), contextlib.redirect_stdout(shown[0]), contextlib.redirect_stderr(shown[1]):
        try:
            return _run_verb(argv)
        except KeyboardInterrupt:  # also while a verb's modules are imported
            print("gigapath: stopped.", file=sys.stderr)
            return EXIT_STOPPED


def _run_verb(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(verb)
    if verb is not None and verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        parser.error(f"expected a verb, got {verb!r}" + "".join(f"; did you mean {word}?" for word in near))
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:  # said here, where the verb is known: argparse would say it of `gigapath` as a whole
        parser.prog = f"{parser.prog} {verb}" if verb else parser.prog
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    namespace.words = arguments[1:]  # for the record of a run
    if namespace.verb is None:
        parser.print_help()
        return 0
    module = importlib.import_module(f"gigapath.cli.{VERBS[namespace.verb][0]}")
    try:
        return int(module.run(namespace))
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GIGAPATH_DEBUG"):
            raise
        print(f"gigapath {namespace.verb}: {error}", file=sys.stderr)
        return 1


def command() -> NoReturn:
    """`gigapath` as a program. Once all is said, Ctrl-C has nothing left to stop: Python, which is clearing up, would
    print lines about exceptions that it ignores."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    command()
