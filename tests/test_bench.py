"""python -m scripts.bench: the protocol's arithmetic on made times, and each measurement's rows. No time is judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_tile_encoder

from scripts.bench import coverage, probe, protocol, target_coverage
from scripts.bench.__main__ import main
from scripts.bench.protocol import Work, compare

CPU = torch.device("cpu")


def test_compare_gives_the_median_of_the_ratios_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    pace = iter([1, 1, 1, 1, *(2, 1), *(4, 8), *(1, 4)])  # two calls each to warm up, then three pairs

    def call() -> None:
        now[0] += next(pace)

    ratio = compare(Work(call, 6.0), Work(call, 2.0), 3, CPU, seconds=0.5)
    assert (ratio.median, ratio.least, ratio.most) == (6.0, 1.5, 12.0)
    assert (ratio.ours, ratio.theirs) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["slide-encoder", "--slide-encoder", "gigapath-flash", "--tokens", "40", "--depth", "1"], 2),
        (["tile-encoder", "--tile-encoder", "gigapath-flash", "--batch-size", "1"], 1),
        (["embed", "--slide", "SLIDE", "--slides", "2", "--tiles", "3", "--workers", "0"], 2),
        (["read", "--slide", "SLIDE", "--tiles", "4"], 1),
        (["probe", "--tiles", "200"], 3),
        (["finetuning", "--slide-encoder", "gigapath-flash", "--tiles", "9", "7", "--depth", "1", "--files", "2"], 1),
        (["pretraining", "--tiles", "64", "--depth", "1", "--slides", "30", "--epochs", "1"], 13),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_each_measurement_prints_its_rows(
    words: list[str], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "SECONDS", 0.001)
    monkeypatch.setitem(protocol.SIZES, "cpu", (64, 64))
    monkeypatch.setattr("scripts.bench.embedding.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
    monkeypatch.setattr(probe, "STEPS", 200)
    monkeypatch.setattr(probe, "WIDTH", 64)
    monkeypatch.setattr(probe, "_memory", lambda *_: {"what": "memory", "value": 1})
    slide = write_pyramid(tmp_path / "a.tif", paint_tissue(1100, 900), mpp=(0.5, 0.5), steps=(1, 2))
    words = [str(slide) if word == "SLIDE" else word for word in words]
    device = [] if words[0] in ("read", "probe") else ["--device", "cpu"]
    assert main([*words, *device, "--pairs", "1", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == rows and all(value > 0 for row in found for name, value in row.items() if "ratio" in name)


@pytest.mark.parametrize(
    "words",
    [["slide-encoder", "--tokens", "0"], ["tile-encoder", "--batch-size", "0"], ["read", "--slide", "none.tif"]],
)
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == (1 if words[2] == "none.tif" else 2)
    said = capsys.readouterr()
    assert (said.out == "" and words[1] in said.err) or words[2] in said.err


def test_coverage_goes_on_with_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coverage, "BATCH", 1)
    words = ["coverage", "--tuned", "0", "--sizes", "20", "--json"]
    assert main([*words, "--cohorts", "4"]) == 0
    whole = capsys.readouterr().out
    for cohorts in ("2", "4"):
        assert main([*words, "--cohorts", cohorts, "--out", str(tmp_path)]) == 0
        rows = capsys.readouterr().out
    assert rows == whole and len(rows.splitlines()) == 8  # 2 shares, 4 AUROCs
    first = json.loads(rows.splitlines()[3])
    assert first["cohorts"] == 4 and first["auroc"] == 0.95 and 0.5 < first["scores"]["auroc"]["truth"] < 0.95


@pytest.mark.slow
def test_intervals_over_folds_hold_the_truth_where_the_old_bootstrap_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 cohorts of 40: three standard errors below 0.93 are 0.876; the old bootstrap held AUPRC in hardly any."""
    cell = coverage.Cell(40, 0.5, 0.8, 1, 0.1)
    row = coverage.row_of(
        cell, np.concatenate([coverage.studies_of(cell, first, seed=11) for first in range(0, 100, coverage.BATCH)])
    )
    for name, each in row["scores"].items():
        assert each["coverage"] >= 0.876 and each["type_1"] <= 0.12, (name, each)
    assert row["scores"]["auprc"]["old"] < 0.6 and row["scores"]["auroc"]["old"] < 0.876


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["regression", "survival"])
def test_scores_of_times_and_amounts_have_a_truth_and_an_interval(setting: str) -> None:
    cell = target_coverage.Cell(setting, 20, target_coverage.STRENGTHS[setting][-1])
    cohorts = [target_coverage.cohort_of(cell, number, seed=5) for number in range(2)]
    for cohort in cohorts:
        for name, (truth, value, low, high) in cohort.items():
            assert np.isfinite(truth) and (np.isnan(low) or (low < high and low <= value <= high)), name
    row = target_coverage.row_of(cohorts)
    first = next(iter(row["scores"].values()))
    assert row["cohorts"] == 2 and first["coverage"] in (0, 0.5, 1) and first["width"] > 0
