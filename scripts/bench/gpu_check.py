"""The first ten minutes with a GPU: `bash scripts/gpu_check.sh` runs what only a GPU can tell, and writes one table.

Each part runs in a process and a budget of its own; one that fails, or runs out of time, is a row that says so. All of
them together end within nine minutes. What this machine lacks (OpenSlide, say) leaves out the parts that need it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 530.0  # seconds of all parts together
PANDA = (459, 212, 1018, 249, 396) * 6  # tiles of five slides, six times over
DONE, NOT_STARTED, SHORT = 0, 1, 3
_PACKAGE = re.compile(r"No module named '([\w.]+)'")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        what: was measured.
        found: in words.
        of_product: share of an 8192 x 8192 x 8192 product's rate, None where it says nothing.
        of_roofline: share of the speed that `scripts.bench.roofline` allows.
        peak: bytes on the device.
        aim: in words.
        met: whether the aim is; None where there is none, or nothing was measured.
    """

    what: str
    found: str
    of_product: float | None = None
    of_roofline: float | None = None
    peak: float | None = None
    aim: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        shares = ["" if share is None else f"{share:.2f}" for share in (self.of_product, self.of_roofline)]
        peak = "" if self.peak is None else f"{self.peak / 1e9:.1f} GB"
        aim = ": ".join(filter(None, (self.aim, {None: "", True: "met", False: "**not met**"}[self.met])))
        return f"| {' | '.join((self.what, self.found, *shares, peak, aim))} |"


HEADING = "| what | found | of an 8192 product | of the roofline | peak memory | aim |\n|---|---|---|---|---|---|"
Rows = Iterator[Row]


# ------------------------------------------------------------------------------------------------ parts, in processes


def tests(device: str, small: bool) -> Rows:
    """The tests marked gpu; on a CPU they are collected."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    command += ["--continue-on-collection-errors"] + (["--collect-only"] if device == "cpu" else [])
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout, file=sys.stderr)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+)(?:/\d+)? (passed|failed|error|skipped|tests? coll)", run.stdout)
    }
    bad = {what: count for what, count in counts.items() if what in ("failed", "error")}
    missing = sorted(set(_PACKAGE.findall(run.stdout)))
    found = (
        ", ".join(f"{number} {word.replace('coll', 'collected')}" for word, number in counts.items()) or "nothing ran"
    )
    found += f" (not installed: {', '.join(missing)})" if missing else ""
    yield Row("tests marked gpu", found, aim="all pass", met=not bad and run.returncode == 0)


def waiting(device: str, small: bool) -> Rows:
    """What makes the host wait: within one slide, one batch of tiles and one training step."""
    import numpy as np
    import torch

    from gigapath.embedding.forward import choose_forward, made_batch
    from gigapath.embedding.slide_encoding import load_slide_encoder
    from gigapath.features.data import TileEmbeddings
    from gigapath.tile_encoder import load_tile_encoder
    from scripts.bench import finetuning

    there, name = torch.device(device), "gigapath-flash"
    with there:
        slide_encoder = load_slide_encoder(name, in_chans=384, device=device, precision="auto", random_weights=True)
        tile_encoder = load_tile_encoder(name, device=device, precision="auto", random_weights=True)
    count = 50 if small else 10_000
    places = np.arange(count)
    cells = np.stack([places % 100, places // 100], axis=1)
    features = np.random.default_rng(0).standard_normal((count, 384), np.float32)
    tiles = TileEmbeddings(slide_id="made", features=features, coords=cells * 256, cells=cells)
    forward, way = choose_forward(tile_encoder, 2 if small else 64)
    batch = made_batch(tile_encoder, 2 if small else 64)
    batch = batch.pin_memory() if forward.pinned else batch
    model, trainer = finetuning.made_trainer("gigapath-flash", (30, 20) if small else PANDA, 12, "auto", there)
    step = finetuning.steps(model, trainer, [np.arange(len(trainer.truth))], 1)
    answers = []
    works: tuple[tuple[str, Callable[[], object], int], ...] = (
        ("one slide, from its stored embeddings to its vectors", lambda: slide_encoder.embed(tiles), 1),
        (f"one batch of tiles ({way})", lambda: answers.append(forward.start(batch)), 0),
        ("one training step", step, 1),
    )
    for what, call, most in works:
        call()
        with synchronizations(there) as found:
            call()
        places_of = ", ".join(f"{place} {number}" for place, number in found.most_common(6))
        total = sum(found.values())
        text = f"the host waits {total} times" + (f" ({places_of})" if total else "")
        yield Row(f"waits: {what}", text, aim=f"at most {most}", met=total <= most)
    for answer in answers:
        answer()


@contextmanager
def synchronizations(device: "torch.device") -> Iterator[Counter[str]]:  # noqa: F821
    """Counts what makes the host wait for a GPU, by file and line."""
    import torch

    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for warning in said:
        if "synchronizing" in str(warning.message):
            found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def slide_encoder(device: str, small: bool) -> Rows:
    """10,000 and 100,000 tokens."""
    from scripts.bench.slide_encoder import SlideEncoderBench, measure

    tokens = (40, 80) if small else (10_000, 100_000)
    options = SlideEncoderBench(tokens=tokens, depth=1 if small else 12, pairs=1 if small else 3, device=device)
    aims = {10_000: 24.9e-3, 100_000: 326e-3}  # 1.5 times what was counted for an H100
    for row in measure(options):
        if row["precision"] != "bf16":
            continue
        seconds, aim = row["tokens"] / row["tokens_per_second"], aims.get(row["tokens"])
        yield Row(
            f"slide encoder 768-d, {row['tokens']:,} tiles, bf16, {row['kernel']}",
            f"{1000 * seconds:.1f} ms",
            row["share"],
            row.get("of_roofline"),
            row.get("peak_bytes"),
            "" if aim is None else f"at most {1000 * aim:.1f} ms (on an H100)",
            None if aim is None else seconds <= aim,
        )


def tile_encoders(device: str, small: bool) -> Rows:
    """ViT-g and Flash."""
    from scripts.bench.tile_encoder import TileEncoderBench, measure

    for name, batch in (("gigapath-flash", 512), ("gigapath", 128)):
        if small and name == "gigapath":
            continue  # a billion weights
        options = TileEncoderBench(
            tile_encoder=name, batch_size=(1 if small else batch,), pairs=1 if small else 3, device=device
        )
        (row,) = measure(options)
        yield Row(
            f"tile encoder {name}, {row['precision']}, batches of {row['batch_size']}",
            f"{row['tiles_per_second']:,.0f} tiles/s",
            row["share"],
            row.get("of_roofline"),
            row.get("peak_bytes"),
            "half of a product" if name == "gigapath" else "",
            row["share"] >= 0.5 if name == "gigapath" else None,
        )


def finetuning(device: str, small: bool) -> Rows:
    """PANDA's lengths packed, against one slide after the other."""
    from scripts.bench.finetuning import FinetuningBench, measure

    tiles, depth = ((30, 20), 1) if small else (PANDA, 12)
    options = FinetuningBench(tiles=tiles, depth=depth, pairs=1 if small else 3, files=2, device=device)
    (row,) = measure(options)
    yield Row(
        f"fine-tuning 768-d, {row['slides']} slides of PANDA's lengths packed, {row['precision']}",
        f"{row['slides_per_second']:.1f} slides/s, {row['packed']:.1f} times one by one, "
        f"{row['waiting']:.0%} waiting for files",
        row["share"],
        row.get("of_roofline"),
        row.get("peak_bytes"),
        "3 times one by one",
        row["packed"] >= 3,
    )


def pretraining(device: str, small: bool) -> Rows:
    """One step."""
    from scripts.bench.pretraining import PretrainingBench, measure

    tiles, depth = (64, 1) if small else (16_000, 12)
    (row,) = measure(PretrainingBench(tiles=tiles, depth=depth, slides=0, pairs=1 if small else 3, device=device))
    yield Row(
        f"pretraining 768-d, a slide of {row['tiles']:,} tiles, {row['precision']}",
        f"{row['tiles_per_second']:,.0f} tiles/s, {row['kept'] / 1e6:.2f} MB a tile kept",
        row["share"],
        row.get("of_roofline"),
        row.get("peak_bytes"),
    )


def end_to_end(device: str, small: bool) -> Rows:
    """From a slide's tiles to a feature file, against the encoder alone."""
    from gigapath.doctor.selftest import paint, write_slide
    from scripts.bench.embedding import EmbedBench, measure

    side, tiles, name = (1100, 4, "gigapath-flash") if small else (8000, 600, "gigapath")
    with tempfile.TemporaryDirectory(prefix="gigapath-bench-") as folder:
        path = Path(folder) / "made.tif"
        write_slide(path, paint(side, side), mpp=0.5)
        options = EmbedBench(
            slide=str(path), tile_encoder=name, tiles=tiles, slides=2, batch_size=2 if small else 128,
            pairs=1 if small else 3, device=device,
        )  # fmt: skip
        with closing(measure(options)) as rows:
            row = next(rows)
    yield Row(
        f"end to end, {name}, {row['tiles']:,} tiles of made slides",
        f"{row['tiles_per_second']:,.0f} tiles/s, {row['ratio']:.2f} of the encoder alone ({row['waited_for']})",
        aim="0.9 of the encoder alone",
        met=row["ratio"] >= 0.9,
    )


# name -> (part, its longest time in seconds)
PARTS: dict[str, tuple[Callable[[str, bool], Rows], float]] = {
    "slide encoder": (slide_encoder, 80.0),
    "tile encoders": (tile_encoders, 110.0),
    "fine-tuning": (finetuning, 90.0),
    "waits": (waiting, 60.0),
    "pretraining": (pretraining, 50.0),
    "end to end": (end_to_end, 90.0),
    "tests marked gpu": (tests, 120.0),
}


def run_part(name: str, device: str, small: bool) -> None:
    """One part, in this process: a line of JSON a row."""
    import torch

    from scripts.bench import protocol, roofline

    protocol.SECONDS = 0.001 if small else 0.3
    if small:
        roofline.DEVICES.add("cpu")
        protocol.SIZES["cpu"] = (64, 64)
    torch.manual_seed(0)
    for row in PARTS[name][0](device, small):
        row = replace(row, aim="", met=None) if small else row
        print(json.dumps(asdict(row)), flush=True)


# ---------------------------------------------------------------------------------------------------- all of them


def check(device: str, small: bool, longest: float = LONGEST) -> list[Row]:
    """Every part, each in a process of its own."""
    rows: list[Row] = []
    started = time.monotonic()
    for name, (_, budget) in PARTS.items():
        # Toy sizes try the parts, on however busy a machine.
        seconds = 20 * budget if small else min(budget, longest - (time.monotonic() - started))
        command = [sys.executable, "-m", "scripts.bench.gpu_check", "--part", name, "--device", device]
        begun = time.monotonic()
        rows += run_in_time(name, [*command, *(["--small"] if small else [])], seconds)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return rows


def run_in_time(name: str, command: list[str], seconds: float) -> list[Row]:
    """The rows that a part printed, and one more where it failed, or ran out of time."""
    if seconds <= 0:
        return [Row(name, "left out: the nine minutes were over", met=False)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, text=True, start_new_session=True)
        end = ""
        try:
            if process.wait(seconds):
                end = "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            end = f"ended after its {seconds:.0f} s"
        out.seek(0), err.seek(0)
        printed, said = out.read(), err.read()
    print(said, file=sys.stderr)
    names = {field.name for field in fields(Row)}
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    rows = [Row(**row) for row in found if set(row) == names]
    if end or not rows:
        missing = _PACKAGE.findall(said)
        why = (said.strip().splitlines() or ["without a word"])[-1].replace("|", "/")
        if missing:
            rows.append(Row(name, f"left out: {missing[-1]} is not installed here"))
        else:
            rows.append(Row(name, f"{end or 'printed nothing'}: {why[:200]}", met=False))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Check a GPU. Exit status: 0 all aims are met, 1 there is no GPU, 3 something fell short."""
    parser = argparse.ArgumentParser("gpu_check.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu, with --small, tries the parts")
    parser.add_argument("--small", action="store_true", help="toy sizes, whose figures mean nothing")
    parser.add_argument("--out", type=Path, help="a file for the table too")
    parser.add_argument("--part", choices=PARTS, help="one part alone, as JSON")
    options = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("gpu_check: torch is not installed. Install torch 2.11 or newer.", file=sys.stderr)
        return NOT_STARTED
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no GPU. Run it where there is one.", file=sys.stderr)
        return NOT_STARTED
    if options.part:
        run_part(options.part, options.device, options.small)
        return DONE
    from scripts.bench.protocol import describe_machine

    started = time.monotonic()
    rows = check(options.device, options.small)
    short = [row.what for row in rows if row.met is False]
    toy = " Toy sizes: the figures mean nothing." if options.small else ""
    text = "\n".join((f"{describe_machine()}.{toy}", "", HEADING, *map(str, rows), ""))
    text += f"\nFell short: {'; '.join(short)}.\n" if short else "\nNothing fell short.\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    print(f"{time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return SHORT if short else DONE


if __name__ == "__main__":
    sys.exit(main())
