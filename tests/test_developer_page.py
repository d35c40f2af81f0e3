"""docs/develop/architecture.md: its diffs apply to the tree as it is, its files exist, its picture has all rooms."""

import os
import re
import shutil
import subprocess
import sys
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


USED = """

from gigapath.cli.main import main
from gigapath.evaluation.labels import load_task
from gigapath.preprocessing.made_slide import made_slide
from PIL import Image

pixels = made_slide()
pixels[300:1100, 300:1100] = (90, 40, 110)  # what the rule "dark" finds
Image.fromarray(pixels).save("made.png")
verbs = [
    "embed made.png --slide-mpp 0.5 --tissue dark --tile-encoder mean-color --max-tiles 8 --out out",
    "convert out --to csv --out tables",
    "map out --kind norm --out maps",
]
assert [main(verb.split()) for verb in verbs] == [0, 0, 0]
assert load_task("crc").classes == ("MSS", "MSI-H")
"""


@pytest.mark.slow
def test_what_the_page_adds_works(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gigapath", tmp_path / "gigapath")
    subprocess.run(
        ["git", "apply", "--ignore-whitespace", "-"], cwd=tmp_path, input="".join(DIFFS), text=True, check=True
    )
    used = [sys.executable, "-c", USED]
    done = subprocess.run(
        used, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "tables" / "made.csv").read_text().splitlines()
    assert table[0] == "x,y,e0,e1,e2" and 2 <= len(table) <= 9
    assert list((tmp_path / "maps").rglob("*norm*"))


def test_all_five_are_shown_files_are_there_and_the_picture_has_every_room() -> None:
    assert len(DIFFS) == 5 and all(f">{room}<" in PICTURE.read_text() for room in RANK)
    for name in re.findall(r"`([a-z_]+/[a-z_]+\.py)`", PAGE):
        assert (ROOT / "gigapath" / name).is_file() or (ROOT / name).is_file(), name
