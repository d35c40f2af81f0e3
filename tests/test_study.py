"""`gigapath study`: one file, one command, one folder; it goes on where it was killed, and gives the same again."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_cohort import write_cohort, write_task

from gigapath.cli import study as module
from gigapath.cli.main import main
from gigapath.evaluation.compare import compare
from gigapath.evaluation.labels import Task
from gigapath.evaluation.labels import write_task as write_task_file
from gigapath.report.results import collect_results
from gigapath.report.study import ITEMS

TUNE = {"head": "abmil-tiles", "pretrained": "", "epochs": 2, "base-lr": 0.1, "gradient-accumulation": 4}
STUDY: dict[str, Any] = {
    "title": "Made",
    "labels": "here/labels.csv",
    "embeddings": "vectors",
    "features": "here/features",
    "task": "task.yaml",
    "splits": "leave-site-out",
    "seed": 1,
    "replicates": 20,
    "models": {
        "mean": {"probe": {"embedding": "tile-mean"}},
        "attention": {"finetune": {**TUNE, "warmup_epochs": 0, "device": "cpu"}},
    },
    "compare": [["attention", "mean"]],
    "outside": {"elsewhere": {"labels": "there/labels.csv", "features": "there/features"}},
}
Write = Callable[..., Path]


def cohort(folder: Path, slides: int, seed: int) -> None:
    """Two slides a patient, three sites with patients of both classes."""
    patients = [f"{folder.name}{number // 2}" for number in range(slides)]
    labels = [number // 2 % 2 for number in range(slides)]
    features, table = write_cohort(folder, labels, patients=patients, seed=seed, encoder="made", mpp=0.5)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["site"] = "ABC"[number // 4 % 3]
        file = features / f"{row['slide_id']}.h5"
        row["slide_id"] = f"{folder.name}-{number:02d}"
        file.rename(features / f"{row['slide_id']}.h5")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with slide embeddings, another one to test on, and a study that was run."""
    folder = tmp_path_factory.mktemp("study")
    cohort(folder / "here", 36, 0)
    cohort(folder / "there", 12, 1)
    write_task(folder / "task.yaml", classes=2)
    words = [
        "slide-embed",
        str(folder / "here" / "features"),
        "--slide-encoder",
        "mean",
        "--out",
        str(folder / "vectors"),
    ]
    assert main(words) == 0
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    assert main(["study", str(folder / "study.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def test_study_leaves_everything_in_one_folder(made: Path) -> None:
    out = made / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["kind"] == "study" and list(results["scores"]) == ["mean", "attention", "chance", "site alone"]
    alone = json.loads((out / "models" / "attention" / "results.json").read_text())["scores"]["from random weights"]
    assert results["scores"]["attention"]["by_unit"] == alone["by_unit"]
    assert list(results["scores"]["attention"]["by_site"]) == [*"ABC"]
    assert results["scores"]["site alone"]["by_unit"]["patients"]["scores"]["auroc"]["value"] == 0.5  # of new sites
    found = compare([out / "models" / name for name in ("mean", "attention")])
    lead = found.differences["attention: from random weights"]["auroc"]
    (row,) = results["comparisons"]
    assert (row["value"], row["low"]) == (lead.value, lead.low) and row["p_holm"] == row["p"]
    assert list(results["outside"]) == [f"attention on elsewhere, fold_{fold}" for fold in range(3)]
    assert any("mean is not tested on elsewhere" in note for note in results["notes"])
    with (out / "study.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {*results["scores"], *results["outside"]}
    checklist = (out / "tripod.md").read_text()
    assert all(f"**{item}**" in checklist for item in ITEMS)
    for item, said in (("6a", "3 sites (A, B, C)"), ("12a", "leave-site-out"), ("21", "18 patients"), ("23b", "A ")):
        (line,) = (line for line in checklist.splitlines() if f"**{item}**" in line)
        assert line.startswith("- [x]") and said in line
    assert "- [ ] **17** ethical approval: not known to the program" in checklist
    (page,) = collect_results(out)
    titles = {block.get("title") for block in page.blocks}
    assert page.title == "Study: Made"
    assert {"Scores on outside test sets", "TRIPOD+AI checklist", "Scores by site: attention"} <= titles


def test_a_study_that_was_stopped_goes_on_and_gives_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = module._run, ["study", str(made / "study.yaml"), "--out", str(tmp_path / "out")]

    def killed(place: Path, part: str, command: list[str]) -> int:
        if part == "outside/elsewhere/attention/fold_1":
            raise KeyboardInterrupt
        return run(place, part, command)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_run", killed)
        assert main(words) == 75
    assert not (tmp_path / "out" / "results.json").exists()
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("done before") == 3 and "epoch" not in said
    same = ("results.json", "study.csv", "comparisons.csv", "tripod.md", "study.json", "models/mean/results.json")
    fold = ("head.safetensors", "predictions.csv")
    for name in (*same, *(f"models/attention/fold_{number}/{each}" for number in range(3) for each in fold)):
        assert (tmp_path / "out" / name).read_bytes() == (made / "out" / name).read_bytes(), name
    changed = made / "changed.yaml"
    changed.write_text(yaml.safe_dump({**STUDY, "seed": 2}))
    assert main(["study", str(changed), "--out", str(tmp_path / "out")]) == 1
    assert "seed 1 -> 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"primry": "auroc"}, "unknown key 'primry'; did you mean primary?"),
        ({"primary": "aurocs"}, "primary: unknown key 'aurocs'; did you mean auroc?"),
        ({"labels": ""}, "expected the key labels"),
        ({"task": ""}, "expected the key task, which the model attention needs"),
        ({"splits": 2}, "models, attention: --folds: expected at least 3, got 2."),
        ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
        ({"compare": [["attention", "means"]]}, "compare: unknown key 'means'; did you mean mean?"),
        ({"models": {"mean": {"prob": {}}}}, "models, mean: unknown key 'prob'; did you mean probe?"),
        ({"models": {"../mean": {"probe": {"embedding": "tile-mean"}}}}, "expected a plain name"),
        ({"models": {"mean": {"probe": {}}}}, "expected embedding and one name"),
        (
            {"models": {"mean": {"probe": {"embedding": "tile-mean", "repeat": 2}}}, "compare": []},
            "--repeat; did you mean --repeats?",
        ),
        ({"models": {"mean": {"probe": {"embedding": "tile-mean", "seed": 2}}}}, "seed is the same for all models"),
        ({"outside": {"elsewhere": {"labels": "there/labels.csv"}}}, "expected labels and features"),
        (
            {"models": {"mean": {"probe": {"embedding": "tile-mean"}}}, "compare": []},
            "outside, elsewhere: expected labels and features (to test what is fine-tuned) or embeddings",
        ),
        ({"compare": [["mean", "mean"]]}, "compare: expected two models, got mean twice"),
        ({"primary": "harrell_c"}, "primary: unknown key 'harrell_c'; known: accuracy"),
        ({"splits": True}, "splits: expected a number of folds, leave-site-out or a folder, got True"),
        ({"outside": {"elsewhere": {"labels": "nowhere.csv", "features": "x"}}}, "nowhere.csv does not exist"),
        ([], "expected keys and values"),
    ],
)
def test_a_study_file_is_checked_before_anything_runs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    file = made / "other.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **change} if isinstance(change, dict) else change))
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_dry_run_shows_commands_that_parse(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(made / "study.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "models/mean: gigapath probe" in said and "--folds leave-site-out" in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_stands_twice_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML alone would keep the last of the two without a word."""
    file = made / "twice.yaml"
    model = "  mean: {probe: {embedding: tile-mean}}\n"
    file.write_text(f"labels: here/labels.csv\nembeddings: vectors\nmodels:\n{model}{model}")
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "expected YAML without the key mean twice" in capsys.readouterr().err


def test_a_study_of_survival_tests_its_probe_outside(made: Path, tmp_path: Path) -> None:
    for number, place in enumerate(("here", "there")):
        assert (
            main(
                [
                    "slide-embed",
                    str(made / place / "features"),
                    "--slide-encoder",
                    "mean",
                    "--out",
                    str(tmp_path / place),
                ]
            )
            == 0
        )
        with (made / place / "labels.csv").open() as file:
            rows = list(csv.DictReader(file))
        random = np.random.default_rng(number)
        followed = {row["patient_id"]: f"{random.exponential(10 + 20 * int(row['label'])):.2f}" for row in rows}
        for index, row in enumerate(rows):
            row |= {"days": followed[row["patient_id"]], "dead": str(int(index // 2 % 3 > 0))}
        with (tmp_path / f"{place}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    task = Task(
        "made", "survival", ("risk",), time_column="days", event_column="dead", horizons=(5.0, 12.0), loss="cox"
    )
    write_task_file(tmp_path / "task.yaml", task)
    study = {
        "labels": "here.csv",
        "embeddings": "here",
        "task": "task.yaml",
        "splits": 3,
        "replicates": 20,
        "models": {"mean": {"probe": {"embedding": "tile-mean", "repeats": 1}}},
        "primary": "auroc_at_12",
        "outside": {"elsewhere": {"labels": "there.csv", "embeddings": "there"}},
        "lock": True,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (tested,) = results["outside"].values()
    assert list(results["outside"]) == ["mean on elsewhere, all"]
    assert tested["by_unit"]["patients"]["scores"]["auroc_at_12"]["value"] > 0
    assert any("first evaluation" in note for note in results["notes"]) and (tmp_path / "there.csv.lock").is_file()
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert len((tmp_path / "there.csv.lock").read_text().splitlines()) == 2  # what is done is not tested again
