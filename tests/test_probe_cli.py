"""`gigapath probe` on tiles: what it writes, what it says, that it says the same twice, and the script on it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_embeddings import made_vectors, write_csv, write_zip

from gigapath.cli.main import main
from gigapath.evaluation.intervals import evaluate
from gigapath.evaluation.scores import Predictions, f1_weighted
from gigapath.linear_probe import ProbeOptions, TileProbeOptions, bayes_accuracy
from gigapath.linear_probe.embeddings import EmbeddingTable, write_table
from gigapath.linear_probe.tiles import probe_tiles

REPOSITORY = Path(__file__).parent.parent
COUNTS = {"train": 200, "valid": 60, "test": 80}
QUICK = ["--steps", "300", "--replicates", "100"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("made")
    vectors, rows = made_vectors(COUNTS, separation=3.0)
    return str(write_zip(folder / "made.zip", vectors)), str(write_csv(folder / "labels.csv", rows))


def probe(made: tuple[str, str], out: Path, *more: str) -> int:
    return main(["probe", made[0], "--labels", made[1], "--out", str(out), *QUICK, *more])


def tiles_of(results: dict[str, Any], model: str = "probe") -> dict[str, Any]:
    found: dict[str, Any] = results["scores"][model]["by_unit"]["tiles"]
    return found


def test_a_probe_is_fitted_in_true_float32_whatever_the_process_has_set(
    made: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*args: Any) -> float:
        seen.append(torch.get_float32_matmul_precision())
        return f1_weighted(*args)

    monkeypatch.setattr("gigapath.linear_probe.heads.f1_weighted", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        probe_tiles(*made, ProbeOptions(replicates=0), TileProbeOptions(steps=100))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


def test_probe_writes_the_published_lines_and_the_rest(made: tuple[str, str], tmp_path: Path) -> None:
    assert probe(made, tmp_path / "out") == 0
    out = tmp_path / "out"
    assert {entry.name for entry in out.iterdir()} - {"tensorboard"} == {
        "results.txt", "results.json", "predictions.csv", "confusion.png", "curve.png", "head.json", "head.safetensors",
    }  # fmt: skip
    lines = (out / "results.txt").read_text().splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"Val f1: \d\.\d{4}", lines[0])
    assert re.fullmatch(r"Test f1: \d\.\d{4} Test AUROC: \d\.\d{4} Test AUPRC: \d\.\d{4}", lines[1])
    assert re.fullmatch(r"Test AUROC \(logits, macro\): \d\.\d{4} Test AUPRC \(logits, macro\): \d\.\d{4}", lines[2])
    results = json.loads((out / "results.json").read_text())
    published = results["published_definitions"]["test"]
    assert f"AUROC (logits, macro): {published['auroc_logits_macro']:.4f}" in lines[2]
    assert published["f1_weighted"] == tiles_of(results)["scores"]["f1_weighted"]["value"]
    for score in ("accuracy", "balanced_accuracy", "f1_weighted", "precision_macro", "recall_macro", "auroc", "auprc"):
        estimate = tiles_of(results)["scores"][score]
        assert estimate["low"] <= estimate["value"] <= estimate["high"], score
    test = tiles_of(results)
    assert test["units"] == 8 and "over groups" in test["intervals"]
    assert tiles_of(results, "chance")["scores"]["auroc"]["value"] == 0.5
    assert results["chosen"]["on"] == "validation"
    assert results["options"]["lr"] == 0.02 and results["data"]["tiles"] == {"train": 200, "val": 60, "test": 80}
    assert str(tmp_path) not in json.dumps(results)
    for picture in ("confusion.png", "curve.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    with (out / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    said = np.array([[float(row["p_a"]), float(row["p_b"])] for row in rows])
    truth = np.array(["ab".index(row["label"]) for row in rows])
    again = evaluate(Predictions(truth, said, ("a", "b")), replicates=0)
    assert again["auroc"].value == pytest.approx(test["scores"]["auroc"]["value"], abs=1e-6)
    assert {row["slide"] for row in rows} == {f"test-{number}" for number in range(8)}
    assert all(row["predicted"] == "ab"[int(float(row["p_b"]) > 0.5)] for row in rows)


@pytest.mark.parametrize("solver", ["sgd", "lbfgs", "knn"])
def test_same_seed_gives_the_same_files(made: tuple[str, str], tmp_path: Path, solver: str) -> None:
    for name in ("first", "second"):
        probe(made, tmp_path / name, "--solver", solver)
    for file in ("results.txt", "predictions.csv", "confusion.png", "curve.png"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert tiles_of(results)["scores"]["auroc"]["value"] > 0.9


def test_seeds_are_repeated_and_their_spread_stands_apart(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe(made, tmp_path, "--seeds", "3", "--seed", "5")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"]["seeds"] == [5, 6, 7]
    spread = results["seeds"]["test"]["auroc"]
    assert len(set(spread["values"])) > 1 and spread["sd"] > 0
    assert tiles_of(results)["scores"]["auroc"]["value"] == spread["values"][0]
    assert "mean and SD of 3 seeds" in capsys.readouterr().out
    alone = probe_tiles(made[0], made[1], ProbeOptions(seed=6, replicates=0), TileProbeOptions(steps=300))
    assert alone.scores["probe"]["auroc"].value == spread["values"][1]


def test_many_classes_are_probed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 5
    features = generator.normal(size=(300, 8)).astype(np.float32)
    features[np.arange(300), labels] += 4
    splits = tuple(("train", "val", "test")[number // 5 % 3] for number in range(300))
    table = EmbeddingTable(
        tuple(f"t{number:03d}" for number in range(300)), features, splits, labels=tuple(map(str, labels.tolist()))
    )
    write_table(tmp_path / "five.h5", table)
    assert main(["probe", str(tmp_path / "five.h5"), "--out", str(tmp_path / "out"), *QUICK]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["task"]["classes"] == ["0", "1", "2", "3", "4"]
    assert tiles_of(results)["scores"]["auroc"]["value"] > 0.95
    assert {f"auroc:{name}" for name in "01234"} <= set(tiles_of(results)["scores"])


def test_colour_control_is_fitted_where_pixels_were_at_hand(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 2
    colours = generator.normal(size=(300, 6)).astype(np.float32) * 10 + 120
    colours[:, 2] += 15 * labels
    features = generator.normal(size=(300, 8)).astype(np.float32)
    features[:, 0] += 4 * labels
    table = EmbeddingTable(
        tuple(f"t{number:03d}" for number in range(300)),
        features,
        tuple(("train", "val", "test")[number // 2 % 3] for number in range(300)),
        labels=tuple(map(str, labels.tolist())),
        colours=colours,
    )
    write_table(tmp_path / "table.h5", table)
    found = probe_tiles(tmp_path / "table.h5", None, ProbeOptions(replicates=200), TileProbeOptions(steps=300))
    assert 0.75 < found.scores["colour"]["auroc"].value < 0.95  # Phi(1.5 / sqrt 2) = 0.856
    assert found.scores["probe"].leads["colour"]["auroc"].low > 0


def test_demo_needs_no_file_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--demo", "--out", str(tmp_path), "--replicates", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("DEMO: embeddings made on the spot") and f"{bayes_accuracy():.4f}" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert tiles_of(results)["scores"]["accuracy"]["value"] == pytest.approx(bayes_accuracy(), abs=0.035)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data/GigaPath_PCam_embeddings.zip"], "gigapath download pcam"),
        ([], "expected either EMBEDDINGS or --demo"),
        (["x.zip", "--demo"], "expected either EMBEDDINGS or --demo"),
        (["--demo", "--lr", "0"], "--lr: expected a value above 0"),
        (["--demo", "--device", "gpu"], "--device: expected"),
        (["--demo", "--embedding", "default"], "--demo: expected a probe of tiles"),
    ],
)
def test_what_can_not_start_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["probe", *arguments, "--out", str(tmp_path / "out")]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_other_options_over_results_are_refused(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(made, tmp_path) == 0
    before = (tmp_path / "results.json").read_bytes()
    assert probe(made, tmp_path, "--solver", "lbfgs") == 1
    assert "--solver sgd -> lbfgs" in (said := capsys.readouterr().err) and "--overwrite" in said
    assert (tmp_path / "results.json").read_bytes() == before
    assert probe(made, tmp_path, "--solver", "lbfgs", "--overwrite") == 0


def test_results_of_an_earlier_run_never_stand_beside_new_ones(
    made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(made, tmp_path)

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("gigapath.linear_probe.tiles.predictions_csv", fail)
        assert probe(made, tmp_path) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr("gigapath.evaluation.results.write_bytes_atomic", fail)
    assert probe(made, tmp_path) == 1
    assert not (tmp_path / "results.json").exists()


def test_pictures_are_left_out_without_matplotlib(
    made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert probe(made, tmp_path) == 0
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "results.json").exists()
    assert "pip install 'gigapath[train]'" in caplog.text


@pytest.mark.usefixtures("summary_writer")
def test_tensorboard_gets_the_looks_where_it_is_installed(made: tuple[str, str], tmp_path: Path) -> None:
    probe(made, tmp_path)
    (line,) = json.loads((tmp_path / "results.json").read_text())["curves"]["panels"][1]["lines"]
    ((seed, events),) = [(path.parent.name, path) for path in (tmp_path / "tensorboard").glob("*/*")]
    assert (seed, events.name) == ("seed_0", "events.out.tfevents")
    assert [line[1:] for line in json.loads(events.read_text()) if line[0] == "validation/f1_weighted"] == [
        [f1, step] for step, f1 in zip(line["x"], line["y"], strict=True)
    ]


def test_script_runs_the_recipe_from_any_folder(made: tuple[str, str], tmp_path: Path) -> None:
    command = tmp_path / "bin" / "gigapath"
    command.parent.mkdir()
    command.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m gigapath.cli.main "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = ["bash", str(REPOSITORY / "scripts" / "run_pcam.sh"), *arguments]
        return subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)

    missing = run()
    assert missing.returncode == 1
    assert "data/GigaPath_PCam_embeddings.zip: no such file" in missing.stderr and "--demo" in missing.stderr
    (tmp_path / "data" / "dataset_csv" / "pcam").mkdir(parents=True)
    shutil.copy(made[0], tmp_path / "data" / "GigaPath_PCam_embeddings.zip")
    unlabelled = run()
    assert unlabelled.returncode == 2 and "gigapath download pcam --to data" in unlabelled.stderr
    shutil.copy(made[1], tmp_path / "data" / "dataset_csv" / "pcam" / "pcam.csv")
    done = run("--replicates", "50")
    assert done.returncode == 0, done.stderr
    options = json.loads((tmp_path / "outputs" / "pcam" / "results.json").read_text())["options"]
    recipe = {"solver": "sgd", "steps": 4000, "batch_size": 128, "lr": 0.02, "weight_decay": 0.01, "eval_every": 100}
    assert {name: options[name] for name in recipe} == recipe


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(made: tuple[str, str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_cpu, on_gpu = (
        probe_tiles(made[0], made[1], ProbeOptions(replicates=0), TileProbeOptions(steps=300, device=device))
        for device in ("cpu", "cuda")
    )
    assert np.abs(on_cpu.heads[0].probabilities["test"] - on_gpu.heads[0].probabilities["test"]).max() < 1e-4
