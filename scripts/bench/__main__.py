"""`python -m scripts.bench WHAT`: measurements of this machine, as a table or as JSON."""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from gigapath.cli.arguments import Json, make_app, verb
from gigapath.cli.main import run_verb
from scripts.bench.protocol import describe_machine

# what -> (module, its options class, one line of help). A module offers that class, `measure(options)` that yields
# rows, `in_words(row)` and `HEADING`.
KINDS = {
    "read": ("scripts.bench.reading", "ReadBench", "reading tiles against a plain loop with OpenSlide"),
    "tile-encoder": ("scripts.bench.tile_encoder", "TileEncoderBench", "the tile encoder against a plain product"),
    "embed": ("scripts.bench.embedding", "EmbedBench", "embed end to end against the encoder and the reader alone"),
    "probe": ("scripts.bench.probe", "ProbeBench", "the linear probe against a plain loop: speed and peak memory"),
    "slide-encoder": ("scripts.bench.slide_encoder", "SlideEncoderBench", "the slide encoder against a plain product"),
    "pretraining": ("scripts.bench.pretraining", "PretrainingBench", "a step against a plain product; use downstream"),
    "coverage": ("scripts.bench.coverage", "CoverageBench", "how often intervals over folds hold the truth"),
    "target-coverage": ("scripts.bench.target_coverage", "TargetCoverageBench", "the same of survival and regression"),
    "robustness": ("scripts.bench.robustness", "RobustnessBench", "the same of the robustness index"),
    "finetuning": ("scripts.bench.finetuning", "FinetuningBench", "a training step against a plain product"),
}


def measurement(module: ModuleType, options_class: type) -> Callable[..., int]:
    """The verb that prints the rows of one module."""

    def run(*, as_json: Json = False, options: Any) -> int:
        for number, row in enumerate(module.measure(options)):
            if not number and not as_json:  # not before: a slide that is missing leaves no table without rows
                print(describe_machine())
                print(module.HEADING)
            print(json.dumps(row) if as_json else module.in_words(row), flush=True)
        return 0

    run.__annotations__["options"] = options_class
    return verb(run)


app = make_app("python -m scripts.bench", "Measurements of this machine, as a table or as JSON.")
for name, (module, options_class, line) in KINDS.items():
    home = importlib.import_module(module)
    app.command(measurement(home, getattr(home, options_class)), name=name, help=line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement. Exit status: 0 done, 1 it could not start, 2 the arguments are off."""
    return run_verb(app, list(sys.argv[1:] if argv is None else argv) or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
