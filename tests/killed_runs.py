"""Runs in processes of their own that die: at a named point of the write path, or by a signal at any moment.

The processes are forked from one that has imported everything, so that a run costs a tenth of a second and not four.

python tests/killed_runs.py 2000     memory and open files over that many slides
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from made_slides import make_slides
from tiny_encoders import MeanColourEncoder, mean_colour_encoder

import gigapath.cohort.run
import gigapath.embedding.run
import gigapath.embedding.stream
import gigapath.embedding.tiling
import gigapath.features.gigapath_file
import gigapath.features.h5
import gigapath.files
import gigapath.preprocessing.preview
import gigapath.tile_encoder
from gigapath.cli.main import main
from gigapath.progress import Progress

TESTS = Path(__file__).parent
DIED = 99
# Where a process dies: function -> whether before or after it has done its work.
POINTS = {
    "open": ("open_temporary", "after"),
    "after data": ("write", "after"),
    "before flush": ("fsync", "before"),
    "before rename": ("publish", "before"),
    "after rename": ("publish", "after"),
    "before status": ("write_status", "before"),
}


def embed(slides: Path, out: Path, *, point: str = "", at: int = 1, words: tuple[str, ...] = ()) -> None:
    """`gigapath embed` with mean colours and plain pictures, in this process, which it ends."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    prepare(point, at)
    given = ["--out", str(out), "--tile-size", "64", "--tile-encoder", "standin", "--device", "cpu", "--workers", "0"]
    os._exit(main(["embed", str(slides), *given, "--batch-size", "8", *words]))


def embed_tiles(tiles: Path, out: Path, *, number: int = 0, at: int = 0) -> None:
    """`gigapath embed-tiles` with mean colours in this process, which it ends; what is printed goes to `<out>.log`.

    It sends itself the signal of that number when it comes to batch `at`.
    """
    encoder, batches = mean_colour_encoder(), itertools.count(1)

    def encode(pixels: np.ndarray) -> np.ndarray:
        if next(batches) == at:
            os.kill(os.getpid(), number)
        return MeanColourEncoder.encode(encoder, pixels)

    encoder.encode = encode  # type: ignore[method-assign]
    gigapath.tile_encoder.load_tile_encoder = lambda *_, **__: encoder
    with out.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
    status = main(["embed-tiles", str(tiles), "--out", str(out), "--tile-encoder", "standin", "--batch-size", "4"])
    sys.stdout.flush()
    os._exit(status)


def prepare(point: str = "", at: int = 1) -> Callable[[], None]:
    """Put in mean colours and plain pictures; the process dies the `at`-th time that it comes to `point`.

    Returns:
        takes colours and pictures out again.
    """
    tiling, embedding = gigapath.embedding.tiling, gigapath.embedding.run
    changes: dict[Any, dict[str, Any]] = {
        embedding: {"load_tile_encoder": lambda *_, **__: mean_colour_encoder()},  # its slide encoder is the mean
        tiling: {
            "preview_picture": lambda _, overview: overview,
            "write_preview": lambda path, *_, **__: gigapath.files.write_bytes_atomic(path, b"a picture"),
        },
        gigapath.preprocessing.preview: {"contact_sheet": lambda *_, **__: None},
        gigapath.features.gigapath_file: {"KEEP_SECONDS": 0.02, "WORTH_SECONDS": 0.0},
        os: {"fsync": lambda _: None},  # a killed process takes nothing with it that the system has
        gigapath.embedding.stream: {"_BLOCK": 8},  # every batch is written by itself
    }
    before = [(module, name, getattr(module, name)) for module, names in changes.items() for name in names]
    for module, names in changes.items():
        for name, value in names.items():
            setattr(module, name, value)

    def undo() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    if not point:
        return undo
    name, when = POINTS[point]
    owners: dict[str, tuple[Any, ...]] = {
        "open_temporary": (gigapath.features.h5,),
        "write": (gigapath.features.gigapath_file.TileEmbeddingsWriter,),
        "fsync": (os,),
        "publish": (gigapath.features.h5,),
        "write_status": (gigapath.cohort.run,),
    }
    for owner in owners[name]:
        setattr(owner, name, _deadly(getattr(owner, name), at, when))
    return undo


def _deadly(real: Callable[..., Any], at: int, when: str) -> Callable[..., Any]:
    calls = itertools.count(1)  # several threads come here, and each call has its own number

    def call(*args: Any, **given: Any) -> Any:
        number = next(calls)
        if number == at and when == "before":
            os._exit(DIED)
        value = real(*args, **given)
        if number == at:
            os._exit(DIED)
        return value

    return call


def context() -> ForkServerContext:
    """Where the processes come from."""
    ctx = multiprocessing.get_context("forkserver")
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the server finds its modules by this alone
    ctx.set_forkserver_preload(["killed_runs"])
    try:
        first = ctx.Process(target=int)
        first.start()
        first.join()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return ctx


def start(ctx: ForkServerContext, slides: Path, out: Path, **given: Any) -> ForkServerProcess:
    process = ctx.Process(target=embed, args=(slides, out), kwargs=given)
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 60.0) -> int | None:
    """The exit status; a process that hangs is killed, and has none."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def differences(unbroken: Path, out: Path) -> list[str]:
    """What is not as an unbroken run leaves it: files that lack or are too many, other bytes, other statuses."""
    one, other = _files(unbroken), _files(out)
    found = [f"lacks {name}" for name in sorted(one.keys() - other.keys())]
    found += [f"has {name}" for name in sorted(other.keys() - one.keys())]
    for name in sorted(one.keys() & other.keys()):
        same = _timeless(one[name]) == _timeless(other[name])
        found += [] if same else [f"differs in {name}"]
    return found


def _files(out: Path) -> dict[str, Path]:
    """The results of a run; every run adds records of its own besides."""
    skipped = ("runs", "private")
    return {
        str(path.relative_to(out)): path
        for path in out.rglob("*")
        if path.is_file() and (path.relative_to(out).parts[0] not in skipped or "partial" in path.name)
    }


def _timeless(path: Path) -> Any:
    """A file's content but for times: statuses and tables carry them."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return {name: value for name, value in content.items() if name not in ("seconds", "ended")}
    if path.name == "slides.csv":
        rows = [line.split(",") for line in path.read_text().splitlines()]
        timeless = [i for i, name in enumerate(rows[0]) if "seconds" not in name and name != "tiles/s"]
        return [[row[i] for i in timeless] for row in rows]
    return path.read_bytes()


def kill_at_random(ctx: ForkServerContext, slides: Path, unbroken: Path, out: Path, seed: int, seconds: float) -> str:
    """Start a run and kill it, again and again, until one gets through; what happened, in a line.

    Each is killed at a moment drawn between nothing and a little more than an unbroken run takes.
    """
    random = np.random.default_rng(seed)
    kills = 0
    while True:
        process = start(ctx, slides, out)
        process.join(float(random.uniform(0, 1.2 * seconds if kills < 6 else 100 * seconds)))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    wrong = differences(unbroken, out)
    rows = len(list(out.rglob("*.rows.partial")))
    return f"seed {seed}: {kills} kills, exit {process.exitcode}, {rows} rows left, {wrong or 'as unbroken'}"


def time_unbroken(ctx: ForkServerContext, slides: Path, out: Path) -> float:
    """Do the unbroken run; its seconds."""
    started = time.monotonic()
    assert finish(start(ctx, slides, out)) == 0
    return time.monotonic() - started


class _Handles(Progress):
    """Writes down memory (MB) and open files once every so many slides."""

    def __init__(self, every: int, aloud: bool) -> None:
        self.rows: list[tuple[int, float, int]] = []
        self._every = every
        self._aloud = aloud

    def slide(self, row: Any, number: int, slides: int) -> None:
        if number % self._every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            self.rows.append((number, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files))
            if self._aloud:
                print("{} slides, {:.1f} MB, {} open files".format(*self.rows[-1]), flush=True)


def soak(count: int, folder: Path, *, aloud: bool = False) -> list[tuple[int, float, int]]:
    """(slides, MB of memory, open files) along a run over `count` slides, which are links to forty files."""
    from gigapath.embedding.options import EmbedOptions, RunOptions
    from gigapath.embedding.run import run_embed
    from gigapath.preprocessing.tiling import TileOptions

    files = sorted(make_slides(folder / "made", 40).iterdir())
    (folder / "slides").mkdir()
    for number in range(count):
        (folder / "slides" / f"n{number:05d}.tif").symlink_to(files[number % 40])
    undo = prepare()
    watch = _Handles(max(1, count // 10), aloud)
    try:
        run_embed(
            [folder / "slides"],
            folder / "out",
            tiling=TileOptions(tile_size=64),
            embedding=EmbedOptions(tile_encoder="standin", device="cpu", batch_size=8),
            options=RunOptions(workers=1),
            watch=watch,
        )
    finally:
        undo()
    return watch.rows


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as made:
        soak(int(sys.argv[1]), Path(made), aloud=True)
