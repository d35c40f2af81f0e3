"""`python -m scripts.bench read`: the same tiles both ways, and every figure where it can be had. No time is judged."""

import json
from pathlib import Path

import pytest
from made_slides import paint_tissue, write_pyramid

from scripts.bench import protocol, reading
from scripts.bench.__main__ import main


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SECONDS", 0.001)


@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_reading_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str) -> None:
    path = write_pyramid(tmp_path / "a.tif", paint_tissue(1400, 1200, mpp=0.25), mpp=(0.25, 0.25), steps=(1,))
    words = ["read", "--slide", str(path), "--pairs", "1", "--tiles", "4", "--reader", reader]
    assert main([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["reader"] == ("fast-equal" if reader == "auto" else "openslide")
    assert (row["slide"], row["read_size"], 0 < row["tiles"] <= 4) == ("a.tif", 512, True)
    assert min(row["tiles_per_second"], row["plain_per_second"], row["ratio"], row["two_threads"]) > 0
    assert (row["whole"] is None) == (reader == "openslide")
    line = reading.in_words(row)
    assert line.count("|") == reading.HEADING.splitlines()[0].count("|")


def test_missing_slide_leaves_no_table_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", "--slide", str(tmp_path / "none.tif")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "none of the name 'none.tif'" in said.err


def test_sizes_that_can_not_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="--size: expected a width and a height"):
        reading.ReadBench(size=(100,))
