"""The README's estimate for a whole cohort: its arithmetic holds."""

import re

import pytest
from conftest import REPOSITORY

SLIDES, TILES = 171_189, 1_300_000_000
READ_20X, READ_40X = 3_531, 659  # tiles/s a core, measured: the README's table on reading
TILE_BYTES = 25_000


@pytest.fixture(scope="module")
def section() -> str:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return " ".join(text[text.index("### What 171,189 slides cost") : text.index("## Numbers, privacy")].split())


def test_the_table_of_gpus_follows_from_the_rates_above_it(section: str) -> None:
    rows = re.findall(r"\| ([\d,]+) \([^|]*\) \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|", section)
    rates = [float(row[0].replace(",", "")) for row in rows]
    assert rates == [108, *(round(peak * 1e12 / 2 / 460e9) for peak in (312, 989))]
    for rate, row in zip(rates, rows, strict=True):
        days = [TILES / rate / 86_400 / gpus for gpus in (1, 8, 64)]
        assert [float(cell) for cell in row[1:4]] == pytest.approx(days, abs=0.051)
        cores = [float(cell) for cell in row[4].split("/")]
        assert cores == pytest.approx([rate / READ_20X, rate / READ_40X], abs=0.006)
        stream = 64 * rate * TILE_BYTES / 1e9
        assert [float(cell) for cell in row[5].split("/")] == pytest.approx([stream, 4 * stream], abs=0.006)


def test_the_sentences_below_follow_too(section: str) -> None:
    assert f"{SLIDES:,} slides, {TILES:,} tiles" in section
    assert f"{READ_20X:,} tiles/s where a level of 0.5 is read pixel for pixel" in section
    assert f"of slides scanned at 20x, and {READ_40X} for 40x" in section
    assert f"{0.3 * SLIDES / 3_600:.0f} to {9.1 * SLIDES / 3_600:.0f} core hours" in section
    assert f"an H100 would want {1_075 / 117:.0f} cores" in section
    assert 64 * 1_075 * 4 * TILE_BYTES > 2 * 25e9 / 8
    hours = [TILES / (16 * rate) / 3_600 for rate in (READ_20X, READ_40X)]
    assert f"in {hours[0]:.1f} hours at 20x, and in {hours[1]:.1f} hours at 40x" in section
    assert f"{0.3e12 / 1_000 / 460e9:.2%}".replace("%", " %") in section
    assert f"fill {TILES * 1536 * 4 / 1e12:.1f} TB as float32, {TILES * 1536 * 2 / 1e12:.1f} TB" in section
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for rate in (f"| {READ_20X:,} | 723 |", f"| {READ_40X} | 117 |"):
        assert rate in text, "the measured table that the estimate rests on has changed"
