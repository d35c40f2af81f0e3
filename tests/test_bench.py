"""python -m scripts.bench: the protocol's arithmetic on made times, and that a row comes out whole."""

import json
import re

import numpy as np
import pytest
import torch
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_tile_encoder

from scripts.bench import protocol, slide_encoder, tile_encoder
from scripts.bench.__main__ import main
from scripts.bench.protocol import Work, compare

CPU = torch.device("cpu")


def test_compare_gives_the_median_of_the_ratios_of_neighbours(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    pace = iter([1, 1, 1, 1, *(2, 1), *(4, 8), *(1, 4)])  # two calls each to warm up, then three pairs

    def call() -> None:
        now[0] += next(pace)

    ratio = compare(Work(call, 6.0), Work(call, 2.0), 3, CPU, seconds=0.5)
    assert (ratio.median, ratio.least, ratio.most) == (6.0, 1.5, 12.0)
    assert (ratio.ours, ratio.theirs) == (3.0, 0.5)


def test_compare_repeats_short_work_until_a_turn_is_long_enough(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    calls = {"short": 0, "long": 0}

    def short() -> None:
        calls["short"] += 1
        now[0] += 0.3

    def long() -> None:
        calls["long"] += 1
        now[0] += 2.0

    ratio = compare(Work(short, 3.0), Work(long, 40.0), 2, CPU, seconds=1.0)
    assert calls == {"short": 2 + 2 * 4, "long": 2 + 2}
    assert ratio.median == pytest.approx(10 / 20)


def test_compare_gives_finite_rates_where_the_clock_does_not_move(monkeypatch) -> None:
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: 0.0)
    ratio = compare(Work(lambda: None, 6.0), Work(lambda: None, 2.0), 2, CPU, seconds=0.0)
    assert ratio.median == pytest.approx(3) and 0 < ratio.theirs < ratio.ours < np.inf


def test_bench_slide_encoder_prints_a_row_for_each_precision(monkeypatch, capsys) -> None:
    words = ["slide-encoder", "--slide-encoder", "gigapath-flash", "--tokens", "40", "--depth", "1"]
    monkeypatch.setattr(protocol, "SECONDS", 0.0)
    monkeypatch.setattr(slide_encoder, "product", lambda device, dtype: protocol.product(device, dtype, 64, 64))
    assert main([*words, "--pairs", "1", "--device", "cpu", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["tokens"], row["precision"]) for row in rows] == [(40, "fp32"), (40, "bf16")]
    assert all(row["share"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert all(row["operations"] > 2 * 40 * 384 * (384 + 12 * 384) for row in rows)
    assert "time_of_fp32" in rows[1] and rows[0]["kernel"] == "cpu-flash"
    assert main([*words, "--pairs", "1", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| 40 | bf16 |" in printed
    assert re.search(r"; torch .* threads, .*, \d{4}-\d\d-\d\d$", printed.splitlines()[0])  # fit for a README


def test_bench_refuses_no_tokens(capsys) -> None:
    assert main(["slide-encoder", "--tokens", "0"]) == 1
    assert "--tokens" in capsys.readouterr().err


def test_bench_tile_encoder_counts_the_operations_of_a_tile(monkeypatch, capsys) -> None:
    words = ["tile-encoder", "--tile-encoder", "gigapath-flash", "--batch-size", "1", "2", "--pairs", "1"]
    monkeypatch.setattr(protocol, "SECONDS", 0.0)
    monkeypatch.setattr(tile_encoder, "product", lambda device, dtype: protocol.product(device, dtype, 64, 64))
    assert main([*words, "--device", "cpu", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert all(row["share"] > 0 and row["tiles_per_second"] > 0 for row in rows)
    # Per layer: the four projections of attention, the three of SwiGLU, and two products of attention.
    tokens, width, hidden = 197, 384, 1024
    layer = 2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width
    patches = 2 * 196 * (3 * 16 * 16) * width
    assert rows[0]["operations"] == 12 * layer + patches
    assert main(["tile-encoder", "--batch-size", "0"]) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_bench_embed_compares_a_turn_of_slides_with_its_parts(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(protocol, "SECONDS", 0.0)
    monkeypatch.setattr("scripts.bench.embedding.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
    slide = write_pyramid(tmp_path / "a.tif", paint_tissue(1100, 900), mpp=(0.5, 0.5), steps=(1, 2))
    words = ["embed", "--slide", str(slide), "--pairs", "1", "--slides", "2", "--tiles", "3", "--workers", "0"]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["what"], row["bar"]) for row in rows] == [("encoder", 0.93), ("reader", 0.85)]
    assert rows[0]["tiles"] == 6 and rows[1]["tiles"] > 6
    for row in rows:
        assert row["ratio"] > 0 and row["met"] == (row["ratio"] >= row["bar"])
        assert row["waited_for"] in row["busy"]
    blank = write_pyramid(tmp_path / "b.tif", np.full((500, 640, 3), 240, np.uint8), mpp=(0.5, 0.5), steps=(1,))
    assert main(["embed", "--slide", str(blank), "--device", "cpu"]) == 1
    assert "expected a slide with tissue, got none in b.tif" in capsys.readouterr().err
