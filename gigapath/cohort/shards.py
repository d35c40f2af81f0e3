"""`--shard I/N`: a cohort cut into N shares of about equal work, the same cut for every job of an array.

The jobs of an array start at different times, and what is known of the slides grows while they run. So the first job
writes the cut down, and the others take it from there: together they do every slide once.
"""

import contextlib
import csv
import hashlib
import heapq
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.status import read_statuses
from gigapath.files import discard, open_temporary, output_error
from gigapath.tables import csv_text

FOLDER = "shards"
_COLUMNS = ("slide_id", "shard", "weight")


def take_shard(
    out: Path, verb: str, entries: Sequence[SlideEntry], shard: tuple[int, int], *, tiles: Path, keep: bool = True
) -> list[SlideEntry]:
    """The slides of one share (I, N), in their order.

    The cut is read from `out/shards/`, or made and (with `keep`) written there by the first job that asks. It holds for
    these slides, this verb and this N; `embed` weighs slides by the tiles that `tile` has found meanwhile. OutputError
    where it can't be written, ValueError where the one that is there has been tampered with.
    """
    number, count = shard
    ids = [entry.slide_id for entry in entries]
    key = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:8]
    path = out / FOLDER / f"{verb}-{count}-{key}.csv"
    if path.exists():
        cut = _read(path)
    else:
        weights = weigh(entries, tiles)
        cut = cut_by_weight(weights, count)
        if keep:
            _write_first(path, cut, weights)
            cut = _read(path)  # another job may have been quicker
    if not cut.keys() >= set(ids):
        raise ValueError(f"{FOLDER}/{path.name}: expected every slide of the cohort. Remove it while no job runs.")
    return [entry for entry in entries if cut[entry.slide_id] == number]


def weigh(entries: Sequence[SlideEntry], tiles: Path) -> dict[str, float]:
    """About how many tiles each slide has: as counted by `tile`, else by the size of its file in the proportion of the
    counted ones, else like the mean of the others."""
    counted = {slide_id: status.tiles for slide_id, status in read_statuses(tiles).items() if status.finished}
    sizes: dict[str, int] = {}
    for entry in entries:
        with contextlib.suppress(OSError):
            sizes[entry.slide_id] = entry.path.stat().st_size
    both = [slide_id for slide_id in sizes if slide_id in counted]
    known_bytes = sum(sizes[slide_id] for slide_id in both)
    per_byte = sum(counted[slide_id] for slide_id in both) / known_bytes if known_bytes else 1.0
    weights = {slide_id: size * per_byte for slide_id, size in sizes.items()}
    weights.update({entry.slide_id: counted[entry.slide_id] for entry in entries if entry.slide_id in counted})
    mean = sum(weights.values()) / len(weights) if weights else 1.0
    return {entry.slide_id: float(weights.get(entry.slide_id, mean)) for entry in entries}


def largest_first(entries: Sequence[SlideEntry], tiles: Path) -> list[SlideEntry]:
    """Slides in the order in which workers that take one after the other end at about the same time."""
    weights = weigh(entries, tiles)
    return sorted(entries, key=lambda entry: (-weights[entry.slide_id], entry.slide_id))


def cut_by_weight(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """slide_id -> share (1 to `count`): the heaviest first, each to the share that has least so far.

    The heaviest share exceeds the mean by less than one slide. Depends on nothing but the arguments, not their order.
    """
    shares = [(0.0, 0, number) for number in range(1, count + 1)]  # (weight, slides, share)
    cut = {}
    for slide_id in sorted(weights, key=lambda name: (-weights[name], name)):
        weight, slides, number = heapq.heappop(shares)
        cut[slide_id] = number
        heapq.heappush(shares, (weight + weights[slide_id], slides + 1, number))
    return cut


def _read(path: Path) -> dict[str, int]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["slide_id"]: int(row["shard"]) for row in csv.DictReader(file)}


def _write_first(path: Path, cut: Mapping[str, int], weights: Mapping[str, float]) -> None:
    """Write the cut unless another job has been quicker: then its cut is the one that holds."""
    rows = ([slide_id, cut[slide_id], round(weights[slide_id], 1)] for slide_id in sorted(cut))
    temporary, descriptor = open_temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(csv_text([_COLUMNS, *rows]).encode())
            file.flush()
            os.fsync(descriptor)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        except OSError:  # no hard links here: two jobs that start in the same instant cut equally anyway
            if not path.exists():
                temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        discard(temporary)
