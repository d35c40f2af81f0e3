"""The scripts that hold the published recipe, run on a synthetic PANDA from a folder of its own."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_cohort import PANDA, write_panda

REPOSITORY = Path(__file__).parent.parent


def run_script(name: str, cwd: Path, *words: str, csv_folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The script as a user runs it, with a `gigapath` command that is this checkout's."""
    command = cwd / "bin" / "gigapath"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gigapath.cli.main "$@"\n')
    command.chmod(0o755)
    env = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    if csv_folder is not None:
        env["PANDA_CSV"] = str(csv_folder)
    script = ["bash", str(REPOSITORY / "scripts" / name), *words]
    return subprocess.run(script, cwd=cwd, env=env, capture_output=True, text=True, timeout=550)


def test_flash_recipe_runs_on_a_synthetic_panda_from_another_folder(tmp_path) -> None:
    features, csv_folder = write_panda(tmp_path / "made", None, width=384, each=2)
    fast = ["--pretrained", "", "--allow-missing", "--epochs", "1", "--replicates", "20", "--device", "cpu"]
    done = run_script("run_panda_flash.sh", tmp_path, str(features), *fast, csv_folder=csv_folder)
    assert done.returncode == 0, done.stderr
    assert "84 labelled slides have no features" in done.stdout and "quadratic-weighted kappa" in done.stdout
    out = tmp_path / "outputs" / "panda_flash"
    kept = json.loads((out / "finetune.json").read_text())
    assert kept["options"]["training"]["gradient_accumulation"] == 32
    with (out / "fold_0" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def test_script_without_features_says_so_in_one_sentence(tmp_path) -> None:
    _, csv_folder = write_panda(tmp_path / "made", None, width=8, each=1)
    done = run_script("run_panda.sh", tmp_path, "nowhere", csv_folder=csv_folder)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


@pytest.mark.slow
def test_published_recipe_runs_on_the_published_tables(tmp_path, shared) -> None:
    features, _ = write_panda(tmp_path / "made", shared / "data" / "panda", each=2)
    fast = ["--pretrained", "", "--allow-missing", "--epochs", "1", "--replicates", "50", "--device", "cpu"]
    done = run_script("run_panda.sh", tmp_path, str(features), *fast, csv_folder=shared / "data" / "panda")
    assert done.returncode == 0, done.stderr
    assert "9,519 labelled slides have no features" in done.stdout
    results = json.loads((tmp_path / "outputs" / "panda" / "fold_0" / "results.json").read_text())
    scores = results["scores"]
    assert set(next(iter(scores.values()))["by_site"]) <= {"karolinska", "radboud"} and "site alone" in scores
    assert all((shared / "data" / "panda" / name).is_file() for name in PANDA)
