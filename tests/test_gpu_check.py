"""scripts/gpu_check.sh: every part runs at toy sizes on a CPU; what fails, or takes too long, is a row."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.bench import gpu_check, roofline
from scripts.bench.gpu_check import PARTS, Row, check, main, run_in_time
from scripts.bench.protocol import Ratio, Work

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == gpu_check.NOT_STARTED
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "no GPU" in said.err


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_keeps_its_rows_and_says_why() -> None:
    printed = json.dumps(asdict(Row("made", "7 tiles/s")))
    first, failed = run_in_time("a part", python(f"print({printed!r}); raise ValueError('too | bad')"), 60)
    assert first == Row("made", "7 tiles/s") and failed.met is False and "too / bad" in failed.found
    (silent,) = run_in_time("a part", python(""), 60)
    assert silent.met is False


def test_what_is_not_installed_leaves_a_part_out_without_a_fault() -> None:
    (row,) = run_in_time("a part", python("import nowhere_to_be_found.at_all"), 60)
    assert row.met is None and "nowhere_to_be_found" in row.found


def test_a_part_out_of_time_is_ended_with_all_that_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    (row,) = run_in_time("a part", python(code), 1.0)
    assert row.met is False and "ended" in row.found
    (row,) = run_in_time("a part", python(code), 0.0)
    assert row.met is False


def test_the_budgets_end_within_nine_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [0.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])

    def spend(name: str, command: list[str], seconds: float) -> list[Row]:
        given.append(max(0.0, seconds))
        now[0] += given[-1]
        return [Row(name, "")]

    monkeypatch.setattr(gpu_check, "run_in_time", spend)
    assert [row.what for row in check("cuda", False)] == list(PARTS)
    assert sum(given) <= gpu_check.LONGEST < 9 * 60


def test_the_table_says_what_fell_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [Row("good", "1", 0.5, 0.25, 2e9, "0.4", True), Row("poor", "2", aim="3", met=False), Row("none", "")]
    monkeypatch.setattr(gpu_check, "check", lambda *_: rows)
    assert main(["--device", "cpu", "--out", str(tmp_path / "table.md")]) == gpu_check.SHORT
    text = capsys.readouterr().out
    assert "| good | 1 | 0.50 | 0.25 | 2.0 GB | 0.4: met |" in text and "Fell short: poor." in text
    assert (tmp_path / "table.md").read_text() == text.removesuffix("\n")
    rows.pop(1)
    assert main(["--device", "cpu"]) == gpu_check.DONE


def test_the_roofline_counts_products_at_their_rate_and_the_rest_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = torch.ones(64, 32), nn.Linear(32, 16, bias=False).requires_grad_(False)
    products, bytes_of_relu = 2 * 64 * 32 * 16, 2 * 4 * 64 * 16
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), roofline.Floor(rate=1.0, bandwidth=1e12) as floor:
            torch.relu(layer(x)).t()
        assert floor.seconds == pytest.approx(products, rel=1e-6)
        with mode(), roofline.Floor(rate=1e12, bandwidth=1.0) as floor:
            torch.relu(x @ layer.weight.t()).t()
        assert floor.seconds == pytest.approx(4 * (64 * 32 + 32 * 16 + 64 * 16) + bytes_of_relu, rel=1e-6)
    work, measured = Work(lambda: layer(x), float(products)), Ratio(0.5, 0.5, 0.5, products / 2, 1.0)
    assert roofline.limits(work, measured, CPU) == {}
    monkeypatch.setattr(roofline, "DEVICES", {"cpu"})
    monkeypatch.setattr(roofline, "bandwidth", lambda device: 1e12)
    # The product's rate is 1, so that the floor is as many seconds as operations; the work took two.
    assert roofline.limits(work, measured, CPU)["of_roofline"] == pytest.approx(products / 2, rel=1e-6)


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes_on_a_cpu(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    run = subprocess.run(
        ["bash", "scripts/gpu_check.sh", "--device", "cpu", "--small", "--out", str(table)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == gpu_check.DONE, run.stdout + run.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10 and "Nothing fell short" in table.read_text()
