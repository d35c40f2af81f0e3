"""python -m scripts.bench probe: both ways do the same work, and the rows come out whole. No test asserts a time."""

import json
from pathlib import Path

import pytest

from scripts.bench import probe, protocol
from scripts.bench.__main__ import main


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SECONDS", 0.0)
    monkeypatch.setattr(probe, "STEPS", 200)
    monkeypatch.setattr(probe, "WIDTH", 64)


def test_both_ways_learn_the_same_rule(short: None, tmp_path: Path) -> None:
    zipped, labels = probe.make_embeddings(tmp_path, 1000)
    # Means two deviations apart: Bayes' rate is 0.84; 100 validation tiles have a standard error of 0.037.
    assert probe.ours(zipped, labels, fresh=True) == pytest.approx(0.84, abs=0.12)
    assert probe.plain_loop(zipped, labels) == pytest.approx(0.84, abs=0.12)


def test_fresh_reading_leaves_the_cache_and_takes_it_away(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_from = []
    load = probe.load_data

    def remember(*arguments: object) -> object:
        data = load(*arguments)  # type: ignore[arg-type]
        read_from.append(data.facts["read_from"])
        return data

    monkeypatch.setattr(probe, "load_data", remember)
    zipped, labels = probe.make_embeddings(tmp_path, 200)
    for fresh in (True, False, True):
        probe.ours(zipped, labels, fresh=fresh)
    assert read_from == ["files", "cache", "files"]


def test_rows_come_out_whole(short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"what": "memory", "unit": "bytes", "value": 10, "least": 10, "most": 10, "bar": 20, "met": True}
    monkeypatch.setattr(probe, "_memory", lambda *arguments: row)
    words = ["probe", "--tiles", "200", "--pairs", "1"]
    assert main([*words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == [
        "reading and training, first reading", "reading and training, from the cache", "memory",
    ]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "torch" in printed[0] and printed[1:3] == probe.HEADING.splitlines()
    assert all(line.startswith("|") for line in printed[1:]) and len(printed) == 6
