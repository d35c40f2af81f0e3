"""docs/develop/architecture.md: its diffs apply to the tree as it is, its files exist, its picture has all rooms."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts.draw_rooms import PICTURE, RANK, imports_between_rooms

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "develop" / "architecture.md"
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: re.findall(r"\+\+\+ b/(\S+)", diff)[-1])
def test_what_the_page_adds_applies(diff: str) -> None:
    command = ["git", "apply", "--check", "--ignore-whitespace", "-"]
    applied = subprocess.run(command, cwd=ROOT, input=diff, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stderr


def test_all_five_are_shown_and_files_are_there() -> None:
    assert len(DIFFS) == 5
    for name in re.findall(r"`([a-z_]+/[a-z_]+\.py)`", PAGE.read_text()):
        assert (ROOT / "gigapath" / name).is_file() or (ROOT / name).is_file(), name


def test_picture_shows_every_room() -> None:
    drawn = PICTURE.read_text()
    assert all(f">{room}<" in drawn for room in RANK)
    assert all(RANK[other] < RANK[room] for room, others in imports_between_rooms().items() for other in others)
