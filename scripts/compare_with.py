"""Runs an earlier commit and the working tree over the same made inputs, and compares everything that they write.

    python scripts/compare_with.py                          against 6d49ed4, from before the rooms
    python scripts/compare_with.py --base HEAD~1 --slides FOLDER --allow '*.json:*/low'

Both run on this machine: bytes differ between processors. Arrays must be equal to the last bit, numbers in JSON and CSV
too; what a file says of times, versions and paths is left out, and keys that only one of them has are listed. The
stand-in encodes; GigaPath-Flash with random weights stands for the models. Exit status 1 where something differs, or is
missing, that no --allow names.
"""

import argparse
import csv
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import tifffile
import torch

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("low", "high")
# Of no result: when, how fast, where, by what version; and digests, which follow from all of these.
PASSED_OVER = (
    "second",
    "time",
    "tiles/s",
    "rate",
    "version",
    "path",
    "waiting",
    "ended",
    "started",
    "digest",
    "sha256",
    "command",
)
LEFT_OUT = ("runs", "private", "previews")  # folders of records and pictures


_MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(status, time.perf_counter() - start, peak / 1024)
"""


def make_inputs(folder: Path) -> None:
    """Slides, labels, splits, a task and tile vectors."""
    random = np.random.default_rng(0)
    (folder / "slides").mkdir(parents=True)
    rows = []
    for number in range(12):
        high = number % 2
        shape, mpp = ((2900, 4100), 0.25) if number == 0 else ((1100 + 40 * number, 1700), 0.5)
        image = np.full((*shape, 3), 243, np.uint8)
        centre, axes = (shape[1] // 3, shape[0] // 2), (shape[1] // 4, shape[0] // 3)
        cv2.ellipse(image, centre, axes, 10.0, 0, 360, (205 - 60 * high, 120, 170), -1)
        tissue = image[..., 1] < 200
        grain = cv2.resize(random.normal(0, 20, (shape[0] // 4, shape[1] // 4)), shape[::-1])
        image[tissue] = np.clip(image + grain[..., None], 0, 255).astype(np.uint8)[tissue]
        with tifffile.TiffWriter(folder / "slides" / f"s{number:02}.tif") as file:
            for step in (1, 4):
                resolution = (1e4 / (mpp * step),) * 2
                level = np.ascontiguousarray(image[::step, ::step])
                how: dict[str, Any] = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb"}
                file.write(level, resolution=resolution, resolutionunit="CENTIMETER", subfiletype=int(step > 1), **how)
        rows.append([f"s{number:02}", CLASSES[high], f"p{number // 2}", ("train", "val", "test")[number // 2 % 3]])
    header = ["slide_id", "label", "patient_id", "split"]
    write_rows(folder / "labels.csv", [header, *rows])
    (folder / "splits").mkdir()
    for name in ("train", "val", "test"):
        write_rows(folder / "splits" / f"{name}_0.csv", [["slide_id"], *([row[0]] for row in rows if row[3] == name)])
    names = ", ".join(f"{name}: {index}" for index, name in enumerate(CLASSES))
    (folder / "task.yaml").write_text(f"name: made\nsetting: multi_class\nlabel_dict: {{{names}}}\n")
    tiles = [["input", "label", "split"]]
    with zipfile.ZipFile(folder / "vectors.zip", "w") as archive:
        for number in range(600):
            split, name = ("train", "val", "test")[number // 200], f"t{number:03}"
            vector = torch.from_numpy(random.normal(number % 2, 2, 64).astype(np.float32))
            buffer = BytesIO()
            torch.save(vector, buffer)
            archive.writestr(f"{split}/{name}.pt", buffer.getvalue())
            tiles.append([name, str(number % 2), split])
    write_rows(folder / "tiles.csv", tiles)


def write_rows(path: Path, rows: list[list[str]]) -> None:
    """Rows as a CSV."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def commands(inputs: Path, out: Path, slides: Path) -> Iterator[tuple[str, list[str]]]:
    """(what it is called, words of the command line), in order."""
    cohort = str(out / "cohort")
    features, labels = str(out / "cohort" / "features_standin"), str(inputs / "labels.csv")
    yield "tile", ["tile", str(slides), "--out", cohort]
    words = ["--tile-encoder", "standin", "--batch-size", "32", "--device", "cpu"]
    yield "embed", ["embed", str(slides), "--out", cohort, *words]
    flash = ["--tile-encoder", "gigapath-flash", "--random-weights", "--max-tiles", "6", "--device", "cpu"]
    yield "embed by the models", ["embed", str(slides), "--out", str(out / "flash"), *flash]
    again = [str(out / "flash" / "features_gigapath-flash-random"), "--random-weights", "--device", "cpu"]
    yield "slide-embed", ["slide-embed", *again, "--out", str(out / "slides"), "--slide-encoder", "gigapath-flash"]
    short = ["--replicates", "50"]
    at = ["--labels", labels, "--out", str(out / "probe_slides"), "--split", "split", "--repeats", "1"]
    at += ["--embedding", "tile-mean"]
    yield "probe of slides", ["probe", cohort, *at, *short]
    of_tiles = ["--labels", str(inputs / "tiles.csv"), "--out", str(out / "probe_tiles"), "--steps", "200"]
    yield "probe of tiles", ["probe", str(inputs / "vectors.zip"), *of_tiles, "--no-cache", *short]
    task = ["--task", str(inputs / "task.yaml"), "--features", features, "--labels", labels, "--epochs", "1"]
    model = ["--pretrained", "", "--model-arch", "gigapath_slide_enc12l384d", "--device", "cpu"]
    splits = ["--splits", str(inputs / "splits"), "--out", str(out / "finetune"), "--gradient-accumulation", "2"]
    yield "finetune", ["finetune", *task, *model, *splits, *short]
    yield "map", ["map", features, "--kind", "pca", "clusters", "--slides", str(slides), "--out", str(out / "maps")]
    for tool in ("trident", "clam", "stamp", "slide2vec", "published"):
        yield f"convert to {tool}", ["convert", features, "--to", tool, "--out", str(out / f"as_{tool}")]


def run(tree: Path, words: list[str]) -> tuple[float, float]:
    """Seconds, and the peak of memory in MB, of a verb of this tree; SystemExit with its last words where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    verb = [sys.executable, "-m", "gigapath.cli.main", *words]
    # A process of its own starts it: the peak of a child begins at what its parent held.
    done = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *verb], cwd=tree, env=environment, capture_output=True)
    status, seconds, memory = done.stdout.decode().split()[-3:]
    if status not in ("0", "3"):  # 3: some slides failed, which the statuses tell
        said = done.stderr.decode(errors="replace")[-2000:]
        raise SystemExit(f"{tree}: gigapath {words[0]} ended with {status}:\n{said}")
    return float(seconds), float(memory)


def values(path: Path) -> dict[str, Any]:
    """Everything in a file that is a result, by name: arrays, and the cells and leaves of tables and JSON."""
    found: dict[str, Any] = {}
    if path.suffix == ".h5":
        with h5py.File(path, locking=False) as file:
            file.visititems(lambda name, item: found.update({name: item[:]}) if hasattr(item, "shape") else None)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as held:
            found = {name: held[name] for name in held.files}
    elif path.suffix in (".pt", ".pth"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {"": state.numpy()} if isinstance(state, torch.Tensor) else flat(state)
    elif path.suffix == ".json":
        found = flat(json.loads(path.read_text()))
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            found = flat(dict(enumerate(csv.DictReader(file))))
    return {name: value for name, value in found.items() if not any(word in name.lower() for word in PASSED_OVER)}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, by their way."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {name: value}
    return {key: leaf for part, inner in pairs for key, leaf in flat(inner, f"{name}/{part}").items()}


def difference(a: Any, b: Any) -> str:
    """How two values differ, or "" where they are equal to the last bit."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{list(a.shape)} -> {b.dtype}{list(b.shape)}"
        if a.tobytes() == b.tobytes():
            return ""
        if a.dtype.kind not in "fiub":
            return "other values"
        return f"largest difference {np.nanmax(np.abs(a.astype(float) - b.astype(float))):.3g}"
    return "" if a == b or (a != a and b != b) else f"{str(a)[:60]} -> {str(b)[:60]}"


def compare(before: Path, after: Path, allowed: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """(file, what differs but for what is allowed, keys that only one side has) for all results in two folders."""

    def is_allowed(what: str) -> bool:
        return any(fnmatch.fnmatch(what, pattern) for pattern in allowed)

    def results(folder: Path) -> set[str]:
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in paths if not set(path.parts) & set(LEFT_OUT)}

    old, new = results(before), results(after)
    for name in sorted(old | new):
        if name not in old or name not in new:
            missing = "missing before" if name not in old else "missing now"
            yield name, [] if is_allowed(name) else [missing], []
            continue
        a, b = values(before / name), values(after / name)
        same = [key for key in a if key in b and not is_allowed(f"{name}:{key}")]
        found = [f"{key}: {what}" for key in same if (what := difference(a[key], b[key]))]
        yield name, found, sorted(a.keys() ^ b.keys())


def main() -> int:
    """Run and compare; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="6d49ed4", help="the commit to compare with")
    parser.add_argument(
        "--slides", type=Path, help="a folder of slides beside the made ones, which are tiled and embedded"
    )
    parser.add_argument("--allow", nargs="*", default=[], metavar="PATTERN", help="files, or FILE:KEY, that may differ")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        work = Path(name)
        clone = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(work / "base")]
        subprocess.run(clone, check=True)
        subprocess.run(["git", "-C", str(work / "base"), "checkout", "--quiet", words.base], check=True)
        make_inputs(work / "inputs")
        costs: dict[str, list[tuple[float, float]]] = {}
        for tree, out in ((work / "base", work / "before"), (ROOT, work / "after")):
            for what, verb in commands(work / "inputs", out, work / "inputs" / "slides"):
                costs.setdefault(what, []).append(run(tree, verb))
            if words.slides is not None:
                real = list(commands(work / "inputs", out / "real", words.slides.resolve()))[:2]
                for what, verb in real:
                    costs.setdefault(f"{what}, --slides", []).append(run(tree, verb))
        failed = equal = 0
        for file, found, keys in compare(work / "before", work / "after", words.allow):
            equal, failed = equal + (not found), failed + bool(found)
            for what in found[:3]:
                print(f"{file}:{what}")
            if len(found) > 3:
                print(f"{file}: and {len(found) - 3} more")
            if keys:
                print(f"{file}: only on one side: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}")
        print(f"{equal} files equal, {failed} not\n\nverb: seconds before, now; MB before, now")
        for what, ((seconds, memory), (seconds_now, memory_now)) in costs.items():
            print(f"{what}: {seconds:.1f}, {seconds_now:.1f}; {memory:.0f}, {memory_now:.0f}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
