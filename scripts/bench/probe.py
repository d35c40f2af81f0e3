"""The linear probe against a plain loop: read a zip of embeddings, train the published recipe, look at validation.

The plain loop is what one writes first, and what the published code amounts to: `torch.load` of each member of the
zip, a data set of single tiles behind `DataLoader(batch_size=128)`, one process.
"""

import csv
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from gigapath.evaluation.scores import f1_weighted
from gigapath.linear_probe import ProbeOptions, TileProbeOptions
from gigapath.linear_probe.data import load_data
from gigapath.linear_probe.embeddings import CACHE_SUFFIX
from gigapath.linear_probe.tiles import fit_heads
from gigapath.options import Options, option
from scripts.bench.protocol import Work, compare

WIDTH = 1536
LARGE_TILES = 327_680  # all of PCam
STEPS, BATCH, EVAL_EVERY = 4000, 128, 100
FIRST_BAR, CACHED_BAR = 3.0, 6.0
MEMORY_BAR, LARGE_MEMORY_BAR = 1.5e9, 4e9  # bytes


HEADING = "| what | measured | bar |\n|---|---|---|"


@dataclass(frozen=True)
class ProbeBench(Options):
    """What `python -m scripts.bench probe` measures."""

    tiles: int = option(26_000, "embeddings of 1536 in the zip", at_least=100)
    pairs: int = option(7, "pairs of turns, ours and the plain loop; 0 = peak memory only", at_least=0)
    large: bool = option(False, "peak memory of 327,680 tiles too, all of PCam (5 GB of disk)")
    folder: str | None = option(None, "where the made embeddings go (default: a temporary folder)", metavar="DIR")


def measure(options: ProbeBench) -> Iterator[dict[str, Any]]:
    """Measure one row after the other.

    Yields:
        Rows with `what`, `value` with `least` and `most` of the pairs (times as fast as the plain loop, or bytes),
        `unit` ("times" or "bytes"), `bar`, `met`, and for the speeds `seconds` and `plain_seconds`.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        zipped, labels = make_embeddings(folder, options.tiles)
        if options.pairs:
            for what, fresh, bar in (("first reading", True, FIRST_BAR), ("from the cache", False, CACHED_BAR)):
                yield _speed(zipped, labels, options.pairs, what=what, fresh=fresh, bar=bar)
        yield _memory(zipped, labels, options.tiles, MEMORY_BAR)
        if options.large:
            zipped.unlink()
            zipped.with_name(zipped.name + CACHE_SUFFIX).unlink(missing_ok=True)
            yield _memory(*make_embeddings(folder, LARGE_TILES), LARGE_TILES, LARGE_MEMORY_BAR)


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    met = "met" if row["met"] else "NOT met"
    if row["unit"] == "bytes":
        return f"| {row['what']} | {row['value'] / 1e9:.2f} GB | under {row['bar'] / 1e9:g} GB: {met} |"
    return (
        f"| {row['what']} | {row['value']:.1f} times ({row['least']:.1f} to {row['most']:.1f}), "
        f"{row['seconds']:.2f} s against {row['plain_seconds']:.2f} s | at least {row['bar']:g} times: {met} |"
    )


def make_embeddings(folder: Path, tiles: int) -> tuple[Path, Path]:
    """A zip of `.pt` files and the CSV of their labels: 80 % train, 10 % val, 10 % test, a planted rule."""
    generator = np.random.default_rng(0)
    direction = generator.normal(size=WIDTH) / np.sqrt(WIDTH)
    zipped, labels = folder / f"embeddings_{tiles}.zip", folder / f"labels_{tiles}.csv"
    with zipfile.ZipFile(zipped, "w") as archive, labels.open("w") as table:
        table.write("input,label,split\n")
        for number in range(tiles):
            split = "train" if number < 0.8 * tiles else "val" if number < 0.9 * tiles else "test"
            label = number % 2
            vector = generator.standard_normal(WIDTH, dtype=np.float32) + (2 * label - 1) * direction
            content = io.BytesIO()
            torch.save(torch.from_numpy(vector.astype(np.float32)), content)
            archive.writestr(f"embeddings/{split}/tile_{number:06d}.pt", content.getvalue())
            table.write(f"tile_{number:06d}.pt,{label},{split}\n")
    return zipped, labels


def ours(zipped: Path, labels: Path, *, fresh: bool) -> float:
    """Read, train and choose as `gigapath probe` does; the best weighted F1 on validation.

    Args:
        zipped: the embeddings.
        labels: the CSV.
        fresh: take away the cache first, as at the first reading (which writes it anew).
    """
    if fresh:
        zipped.with_name(zipped.name + CACHE_SUFFIX).unlink(missing_ok=True)
    options = ProbeOptions()
    recipe = TileProbeOptions(steps=STEPS, batch_size=BATCH, eval_every=EVAL_EVERY)
    results, _ = fit_heads(load_data(zipped, labels, options), options, recipe, torch.device("cpu"))
    return max(look.val_f1 for look in results[0].looks)


def plain_loop(zipped: Path, labels: Path) -> float:
    """The same work as one writes it first; the best weighted F1 on validation."""
    with labels.open() as table:
        rows = list(csv.DictReader(table))
    vectors = {}
    with zipfile.ZipFile(zipped) as archive:
        for name in archive.namelist():
            content = io.BytesIO(archive.read(name))
            vectors[Path(name).name] = torch.load(content, weights_only=True)

    def data_of(split: str) -> TensorDataset:
        chosen = [row for row in rows if row["split"] == split]
        stacked = torch.stack([vectors[row["input"]] for row in chosen])
        return TensorDataset(stacked, torch.tensor([int(row["label"]) for row in chosen]))

    train, val = data_of("train"), data_of("val")
    sampler = RandomSampler(train, replacement=True, num_samples=STEPS * BATCH)
    layer = torch.nn.Linear(WIDTH, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best = 0.0
    for step, (x, y) in enumerate(DataLoader(train, batch_size=BATCH, sampler=sampler), start=1):
        loss = torch.nn.functional.cross_entropy(layer(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % EVAL_EVERY == 0:
            with torch.inference_mode():
                said = [(layer(x).argmax(dim=1), y) for x, y in DataLoader(val, batch_size=BATCH)]
            predicted, truth = (torch.cat(part).numpy() for part in zip(*said, strict=True))
            best = max(best, f1_weighted(truth, predicted, 2))
    return best


def _speed(zipped: Path, labels: Path, pairs: int, *, what: str, fresh: bool, bar: float) -> dict[str, Any]:
    ratio = compare(
        Work(lambda: ours(zipped, labels, fresh=fresh), 1.0),
        Work(lambda: plain_loop(zipped, labels), 1.0),
        pairs,
        torch.device("cpu"),
    )
    return {
        "what": f"reading and training, {what}",
        "unit": "times",
        "value": ratio.median,
        "least": ratio.least,
        "most": ratio.most,
        "seconds": 1 / ratio.ours,
        "plain_seconds": 1 / ratio.theirs,
        "bar": bar,
        "met": ratio.median >= bar,
    }


def _memory(zipped: Path, labels: Path, tiles: int, bar: float) -> dict[str, Any]:
    """Peak memory of the whole command at its first reading, in a process of its own."""
    code = (
        "import resource, sys\nfrom gigapath.cli.main import main\nstatus = main(sys.argv[1:])\n"
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = zipped.parent / "out"
    command = ["probe", str(zipped), "--labels", str(labels), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.splitlines()[-1].startswith("0 "):
        raise ValueError(f"bench probe: the command failed: {done.stderr.strip().splitlines()[-1:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    peak = int(done.stdout.splitlines()[-1].split()[1]) * unit
    what = f"peak memory of the whole command, {tiles:,} tiles"
    return {"what": what, "unit": "bytes", "value": peak, "least": peak, "most": peak, "bar": bar, "met": peak < bar}
