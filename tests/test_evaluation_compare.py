"""compare: paired differences of runs on the same patients and folds, refused by the first thing that differs."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_cohort import NARROW, write_cohort, write_task
from test_probe_slides import write_run

from gigapath.cli.main import main
from gigapath.evaluation.compare import compare, holm
from gigapath.evaluation.results import read_results
from gigapath.linear_probe import ProbeOptions, SlideProbeOptions
from gigapath.linear_probe.slides import probe_slides, write_slide_report
from gigapath.report.results import collect_results


def probe(run: Path, out: Path, *, labels: Path | None = None, seed: int = 0, **how) -> Path:
    options = SlideProbeOptions(**{"embedding": "default,state:1", "folds": 3, "repeats": 2} | how)
    out.mkdir()
    write_slide_report(out, probe_slides(run, labels or run / "labels.csv", ProbeOptions(seed=seed), options))
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    run, _ = write_run(folder / "run")
    return {"run": run, "one": probe(run, folder / "one"), "two": probe(run, folder / "two", embedding="default")}


def test_embeddings_of_a_probe_are_compared_with_the_first(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    words = ["compare", str(made["one"]), "--out", str(tmp_path)]
    assert main([*words, "--difference", "0.2"]) == 0
    assert main([*words, "--score", "auprc"]) == 1, "another comparison is there"
    assert main([*words, "--score", "auprc", "--overwrite"]) == main([*words, "--score", "auprc"]) == 0
    printed = capsys.readouterr().out
    assert "default - tile-mean" in printed and "p by Holm" in printed and "40 patients" in printed
    assert {file.name for file in tmp_path.iterdir()} == {"differences.csv", "differences.json", "differences.png"}
    with (tmp_path / "differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows[:4]] == ["auprc", "auroc", "accuracy", "balanced_accuracy"]
    assert {row["model"] for row in rows} == {"default", "state:1"} and {row["minus"] for row in rows} == {"tile-mean"}
    # What the probe itself says of its leads, but for the digits of predictions.csv.
    leads = read_results(made["one"] / "results.json").scores["default"].leads["tile-mean"]
    for row in rows[:4]:
        lead = leads[row["score"]]
        wanted = [lead.value, lead.low, lead.high, lead.p]
        assert [float(row[end]) for end in ("value", "low", "high", "p")] == pytest.approx(wanted, abs=1e-4)
    held = json.loads((tmp_path / "differences.json").read_text())
    assert held["models"]["default"]["auroc"]["value"] > held["models"]["tile-mean"]["auroc"]["value"]
    shown = collect_results(tmp_path)[0]
    assert shown.title == "Comparison" and [block["kind"] for block in shown.blocks] == ["scores", "picture", "notes"]


def test_runs_are_compared_by_what_they_are_about(made: dict[str, Path]) -> None:
    found = compare([made["two"], made["one"]])
    assert list(found.models) == ["two: default", "one: default", "one: state:1"]
    same = found.differences["one: default"]["auroc"]
    assert same.value == 0 and same.p == 1 and same.high > 0.1  # no evidence, and no width of zero
    named = compare([made["one"]], models=["state:1", "tile-mean"])
    assert list(named.models) == ["state:1", "tile-mean"]
    # The states are the embedding's negative: nothing to tell apart, and little power at 40 patients.
    assert abs(compare([made["one"]], models=["default", "state:1"]).differences["state:1"]["auroc"].value) < 0.1
    weak = compare([made["one"]], models=["tile-mean", "default"], difference=0.02)
    assert weak.powers["default"]["auroc"] < 0.5 and "says little" in repr(weak)


def test_a_probe_is_compared_with_a_fine_tuning_of_the_same_folds(tmp_path: Path) -> None:
    truth = [number % 2 for number in range(24)]
    features, labels = write_cohort(tmp_path, truth, patients=[f"p{number}" for number in range(24)])
    task = write_task(tmp_path / "task.yaml", classes=2)
    words = ["--task", task, "--features", features, "--labels", labels, "--out", tmp_path / "tuned", "--folds", "3"]
    recipe = ["--epochs", "1", "--device", "cpu", "--model-arch", NARROW, "--feat-layer", "2", "--pretrained", ""]
    assert main(["finetune", *map(str, words), *recipe, "--controls"]) == 0
    vectors = ["slide-embed", str(features), "--slide-encoder", "mean", "--out", str(tmp_path / "vectors")]
    assert main(vectors) == 0
    labels_of = {"labels": Path(labels), "embedding": "tile-mean"}
    probed = probe(tmp_path / "vectors", tmp_path / "probed", **labels_of)
    found = compare([probed, tmp_path / "tuned"])
    assert list(found.models) == ["probed: tile-mean", "tuned: from random weights"]
    assert any("of its 6 fits only the first 3" in note for note in found.notes)
    alone = compare([tmp_path / "tuned"])
    assert list(alone.models)[:2] == ["from random weights", "ABMIL on tiles"]
    # As the run itself has it, whose lead has the other sign.
    lead = (
        read_results(tmp_path / "tuned" / "results.json").scores["from random weights"].leads["ABMIL on tiles"]["auroc"]
    )
    ours = alone.differences["ABMIL on tiles"]["auroc"]
    assert (ours.value, ours.low, ours.high) == pytest.approx((-lead.value, -lead.high, -lead.low), abs=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"seed": 1}, "fold 0 tests other slides"),
        ({"folds": 4}, "fold 0 tests other slides"),
        ({"label": ("P00", "other")}, "the classes differ"),
        ({"patient": ("P02-S1", "P99")}, "fold . tests other slides|the patient of P02-S. differs"),
    ],
)
def test_runs_that_differ_are_refused_by_the_first_difference(
    made: dict[str, Path], tmp_path: Path, how: dict, message: str
) -> None:
    rows = list(csv.DictReader((made["run"] / "labels.csv").open()))
    for row in rows:
        if "label" in how and row["label"] == "wild":
            row["label"] = "other"
        if "patient" in how and row["slide_id"].startswith("P02"):
            row["patient_id"] = "P99"
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    options = {name: value for name, value in how.items() if name in ("seed", "folds")}
    other = probe(made["run"], tmp_path / "other", labels=tmp_path / "labels.csv", embedding="default", **options)
    with pytest.raises(ValueError, match=message):
        compare([made["one"], other])


def test_what_is_no_run_over_folds_is_said(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "found no results.json" in capsys.readouterr().err
    split = probe(made["run"], tmp_path / "split", embedding="default")
    held = json.loads((split / "results.json").read_text())
    del held["scores"]["default"]["facts"]["scales"]
    (split / "results.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"'scales'.*Run it again, with folds"):
        compare([split])
    shutil.rmtree(split)
    with pytest.raises(ValueError, match="one twice"):
        compare([made["one"], made["one"]])
    for words, message in (
        (["--models", "nothing"], "The runs hold tile-mean, default"),
        (["--score", "x"], "--score"),
    ):
        assert main(["compare", str(made["two"]), *words, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    adjusted = holm([float("nan"), 0.02])
    assert np.isnan(adjusted[0]) and adjusted[1] == 0.02
