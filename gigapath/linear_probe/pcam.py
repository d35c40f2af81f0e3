"""PCam's own tables of the slide that each tile was cut from, joined to tiles only where that can be verified."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from gigapath.linear_probe.table import SPLIT_WORDS

META = "camelyonpatch_level_2_split_{}_meta.csv"
# Columns that hold the label: tumour in the centre of the tile is what PCam's `y` says, tumour anywhere is the other.
_LABELS = ("center_tumor_patch", "tumor_patch")
_NUMBER = re.compile(r"(\d+)$")


def read_meta(path: Path) -> tuple[list[str], list[list[str]]]:
    """(slide of each row, the label columns of each row as "0" and "1") of one of PCam's meta files."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    slides = [row.get("wsi") or "" for row in rows]
    if not rows or "" in slides:
        raise ValueError(f"{path.name}: expected PCam's columns, wsi among them. Fetch it anew.")
    truth = {"true": "1", "false": "0"}
    labels = [[truth.get((row.get(name) or "").lower(), row.get(name) or "") for name in _LABELS] for row in rows]
    return slides, labels


def slides_of_tiles(
    folder: Path, names: Sequence[str], splits: Sequence[str], classes: Sequence[int]
) -> list[str] | None:
    """The slide of each tile, where the tiles' numbers are PCam's own; None where that can't be told for sure.

    The number at the end of a name must count the rows of its split's meta file from 0, each once, and the labels of
    all tiles must be those of the rows: thousands of agreements don't happen by chance.

    Args:
        folder: with PCam's three meta files.
        names: the tiles, without suffix.
        splits: their splits.
        classes: their classes, 1 = tumour.
    """
    found = [""] * len(names)
    for word in ("train", "valid", "test"):
        path = folder / META.format(word)
        members = [row for row, split in enumerate(splits) if split == SPLIT_WORDS[word]]
        if not path.is_file():
            return None
        slides, labels = read_meta(path)
        numbers = [int(match[1]) if (match := _NUMBER.search(names[row])) else -1 for row in members]
        if sorted(numbers) != list(range(len(slides))):
            return None
        truth = [labels[number] for number in numbers]
        if not any(
            all(row[column] == str(classes[member]) for row, member in zip(truth, members, strict=True))
            for column in range(len(_LABELS))
        ):
            return None
        for member, number in zip(members, numbers, strict=True):
            found[member] = slides[number]
    return found
