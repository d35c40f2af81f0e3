"""What a run looks like on a terminal, in a notebook, in a log, and to a machine."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from gigapath.cli.arguments import EXIT_FAILED_SLIDES, EXIT_STOPPED
from gigapath.cohort.status import failure_kind, failure_lines, failures_by_kind
from gigapath.progress import SILENT_SECONDS, Plan, Progress, StopFlag
from gigapath.text import slides_in_words, tiles_in_words

if TYPE_CHECKING:  # a verb that only shows progress needs no run over slides
    from gigapath.cohort.run import RunResult

EXIT_STATUS = {"planned": 0, "done": 0, "some slides failed": EXIT_FAILED_SLIDES, "stopped": EXIT_STOPPED}
_STAGES = {"plan": "tiling", "read": "reading", "encode": "device", "write": "writing", "slides": "slide encoder"}
_SHOWN_SHARE = 0.05
_NOTEBOOK_COLUMNS = 110


class Terminal(Progress):
    """Draws a bar where somebody watches, on a terminal or in a notebook; elsewhere writes a line a slide, and one
    after each silence of 30 s, without carriage returns.

    Use it as a context manager: no bar is left.

    Args:
        unit: what is counted, "tile" or "slide".
        machine: keep standard output for the JSON document; everything else goes to standard error.
        document: whether `report` prints that document.
    """

    def __init__(self, unit: str = "slide", *, machine: bool = False, document: bool = True) -> None:
        self._unit = unit
        self._document = machine and document
        self._out: TextIO = sys.stderr if machine else sys.stdout
        self._bar: tqdm[Any] | None = None
        self._shown: Plan | None = None
        self._again = False
        self._kinds: dict[str, str] = {}  # kind of failure -> the first slide that failed by it
        self._at = ""  # the slide that the run is at
        self._busy = ""  # how busy the stages were of late
        self._layer = ""  # how far the slide encoder is with that slide
        self._what = ""  # what the bar counts, where it counts steps
        self._tiles = [0, 0]  # embedded, and expected in all
        self._printed = time.monotonic()  # when the last line was printed, where there is no bar

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, text: str) -> None:
        if self._bar is None:
            self._print(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def step(self, what: str, done: int, total: int) -> None:
        if not watched():
            self._print_seldom(f"{what}: {done:,} of {total:,}")
            return
        if self._bar is None or self._what != what:
            self.close()
            self._draw(total, desc=what)
            self._what = what
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def plan(self, plan: Plan) -> None:
        self._shown = plan
        for line in plan.lines:
            self._print(line)
        todo = plan.slides - plan.reused
        self._tiles[1] = plan.tiles
        if todo and watched():
            self._draw(plan.tiles if self._unit == "tile" else todo, unit=f" {self._unit}s")

    def _draw(self, total: int, **given: Any) -> None:
        # As text in a notebook too: widgets ask for a package, and a saved notebook does not keep them.
        width: dict[str, Any] = {"dynamic_ncols": True} if sys.stderr.isatty() else {"ncols": _NOTEBOOK_COLUMNS}
        self._bar = tqdm(total=total, file=sys.stderr, smoothing=0.1, **given, **width)

    def stopping(self, signal: str) -> None:
        more = " Press Ctrl-C again to end immediately." if signal == "SIGINT" else ""
        print(f"\n{signal}: stopping within seconds; finished results are kept.{more}", file=sys.stderr, flush=True)

    def expect(self, tiles: int) -> None:
        self._tiles[1] = tiles
        if self._bar is not None and self._unit == "tile":
            self._bar.total = tiles
            self._bar.refresh()

    def tiles(self, count: int) -> None:
        self._tiles[0] += count
        if self._bar is not None and self._unit == "tile":
            self._bar.update(count)
        elif self._bar is None:
            self._print_seldom("{:,} of {:,} tiles embedded".format(*self._tiles))

    def busy(self, shares: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._busy = busy_text(shares)
            self._show()

    def _show(self) -> None:
        if self._bar is not None:
            parts = (self._at, self._layer, self._busy)
            self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)

    def layer(self, slide_id: str, done: int, layers: int) -> None:
        if self._bar is not None:
            self._layer = f"layer {done}/{layers}" if done < layers else ""
            self._show()
            self._bar.refresh()
        elif done < layers:
            self._print_seldom(f"{slide_id}: layer {done} of {layers} of the slide encoder")

    def slide(self, row: Mapping[str, Any], number: int, slides: int) -> None:
        line = _line(row)
        if row["status"] == "failed":
            first = self._kinds.setdefault(failure_kind(row["error"], row["slide_id"]), row["slide_id"])
            if first != row["slide_id"]:
                line = f"{row['slide_id']}: failed, as {first}"
            elif self._again:  # tried once more, to no other end
                line = f"{row['slide_id']}: failed as before"
        if self._bar is None:
            self._print(f"{number}/{slides} {line}")
            return
        self._at = f"slide {number}/{slides}"
        self._show()
        if self._unit == "slide" and not self._again:
            self._bar.update(1)
        if row["status"] == "failed":
            self._bar.write(line, file=sys.stderr)

    def retrying(self, slides: int) -> None:
        self._again = True
        self.line(f"{slides_in_words(slides)} failed with an input/output error; retrying once.")

    def _print_seldom(self, line: str) -> None:
        """Write a line unless one was written of late."""
        if time.monotonic() - self._printed >= SILENT_SECONDS:
            self._print(line)

    def _print(self, line: str) -> None:
        if quiet():
            return
        print(line, file=self._out, flush=True)
        self._printed = time.monotonic()

    def close(self) -> None:
        """Put the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def report(self, result: "RunResult") -> int:
        """Say how the run ended; the exit status."""
        self.close()
        status = EXIT_STATUS[result.outcome]
        if self._document:
            document = {
                "run_id": result.run_id,
                "outcome": result.outcome,
                "note": result.note,
                "exit_status": status,
                "out": str(result.out),
                "seconds": round(result.seconds, 3),
                "plan": dict(self._shown.facts) if self._shown else {},
                "counts": dict(result.counts),
                "slides": [dict(row) for row in result.rows],
            }
            print(json.dumps(document, indent=2))
        print(result.summary, file=self._out)
        if result.outcome == "stopped":
            print("Finished results are kept. Run the same command again to resume.", file=self._out)
        if result.note:
            print(result.note, file=self._out)
        for line in failure_lines(failures_by_kind(result.failed)):
            print(f"  {line}", file=self._out)
        if result.outcome != "planned":
            print(f"see {result.out / 'slides.csv'}", file=self._out)
        return status


@contextmanager
def stoppable(unit: str = "slide", *, quiet: bool = False) -> Iterator[tuple[Progress, Callable[[], None]]]:
    """(what shows the news, what raises Stopped once a signal came) of work that its checkpoint lets go on."""
    shown = nullcontext(Progress()) if quiet else Terminal(unit)
    with shown as watch, StopFlag(watch.stopping) as stop:
        yield watch, stop.check


def watched() -> bool:
    """Whether somebody sees a bar: on a terminal, or below a cell of a notebook; a log file gets lines in its place."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    seen = sys.stderr.isatty() or "IPKernelApp" in getattr(shell, "config", {})
    return seen and not quiet() and getattr(sys.stderr, "log", None) is None


def quiet() -> bool:
    """Whether errors and results alone are to be shown: what -q sets."""
    return logging.getLogger("gigapath").level >= logging.ERROR


def busy_text(shares: Mapping[str, float]) -> str:
    """How busy the stages are, the one that the others wait for in front; those that hardly work are left out."""
    slowest = max(shares, key=lambda stage: shares[stage])
    names = sorted(shares, key=lambda name: (name != slowest, -shares[name]))
    shown = [f"{_STAGES[name]} {shares[name]:.0%}" for name in names if name == slowest or shares[name] >= _SHOWN_SHARE]
    return "busy: " + ", ".join(shown)


def _line(row: Mapping[str, Any]) -> str:
    """One slide on one line."""
    words = f"{row['slide_id']}: {row['status'].replace('_', ' ')}"
    if row["error"]:
        prefix = f"slide {row['slide_id']!r}: "
        return f"{words}: {row['error'].removeprefix(prefix)}"
    rate = f", {row['tiles/s']:.3g} tiles/s" if row["tiles/s"] else ""
    warnings = f". {row['warnings']}" if row["warnings"] else ""
    return f"{words}, {tiles_in_words(row['tiles'])}, {row['seconds']:.1f} s{rate}{warnings}"
