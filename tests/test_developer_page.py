"""docs/develop/architecture.md: its diffs apply to the tree as it is, its files exist, its picture has all rooms."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts.draw_rooms import PICTURE, RANK

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "develop" / "architecture.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: re.findall(r"\+\+\+ b/(\S+)", diff)[-1])
def test_what_the_page_adds_applies(diff: str) -> None:
    command = ["git", "apply", "--check", "--ignore-whitespace", "-"]
    applied = subprocess.run(command, cwd=ROOT, input=diff, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr


def test_all_five_are_shown_files_are_there_and_the_picture_has_every_room() -> None:
    assert len(DIFFS) == 5 and all(f">{room}<" in PICTURE.read_text() for room in RANK)
    for name in re.findall(r"`([a-z_]+/[a-z_]+\.py)`", PAGE):
        assert (ROOT / "gigapath" / name).is_file() or (ROOT / name).is_file(), name
