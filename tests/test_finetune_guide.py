"""The commands of the guides to fine-tuning and probes, run on made cohorts as they stand there, but for sizes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from made_cohort import NARROW, write_cohort

from gigapath.cli.main import main
from gigapath.evaluation.results import RESULTS, read_results

ROOT = Path(__file__).parent.parent
SMALL = ["--model-arch", NARROW, "--feat-layer", "2", "--pretrained", "", "--epochs", "2", "--replicates", "10"]


def commands_of_the_guide() -> list[list[str]]:
    page = (ROOT / "docs" / "guides" / "finetuning.md").read_text()
    block = re.search(r"^```text\n(gigapath init-task.*?)^```$", page, re.M | re.S)
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


def test_commands_of_the_guide_run_one_after_the_other(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cohorts = {"out": ("labels.csv", "slide-"), "new": ("unused.csv", "new-"), "other": ("other.csv", "other-")}
    for seed, (folder, (labels, prefix)) in enumerate(cohorts.items()):
        features, table = write_cohort(tmp_path / folder, [n % 3 for n in range(18)], seed=seed, tiles=6)
        for path in list(features.iterdir()):
            path.rename(path.with_name(path.name.replace("slide-", prefix)))
        features.rename(features.with_name("features_gigapath"))
        Path(labels).write_text(table.read_text().replace("slide-", prefix))
    commands = commands_of_the_guide()
    assert [words[1] for words in commands] == ["init-task", "finetune", "predict", "predict"]
    for words in commands:
        more = {"finetune": [*SMALL, "--folds", "3"], "predict": ["--replicates", "10"]}.get(words[1], [])
        if words[1] == "finetune":  # the controls are another test's
            words.remove("--controls")
        device = [] if words[1] == "init-task" else ["--device", "cpu"]
        assert main([*words[1:], *more, *device]) == 0, words
    assert {Path("predictions.csv"), Path("tested/results.json")} <= set(Path().rglob("*.csv")) | set(
        Path("tested").iterdir()
    )


def test_heads_on_a_folder_of_features_and_a_table(tmp_path, monkeypatch) -> None:
    """What the guides say to those who have no slides and no weights."""
    monkeypatch.chdir(tmp_path)
    features, table = write_cohort(
        tmp_path / "cohort", [n % 2 for n in range(18)], patients=[f"p{n}" for n in range(18)], tiles=6
    )
    features.rename("features")
    table.rename("labels.csv")
    text = "".join((ROOT / "docs" / "guides" / f"{name}.md").read_text() for name in ("probes", "finetuning"))
    commands = [
        *re.findall(r"^gigapath slide-embed features .*", text, re.M),
        *re.findall(r"^gigapath probe vectors .*", text, re.M),
        "gigapath init-task labels.csv --to task.yaml",
        *re.findall(r"^gigapath finetune .* --features features .*", text, re.M),
        *re.findall(r"^gigapath predict attention/fold_0 features .*", text, re.M),
    ]
    assert len(commands) == 5
    labels = (ROOT / "README.md").read_text().partition("## Labels")[2]
    assert labels.split("```")[1].splitlines()[1:] == commands
    for command in commands:
        words = shlex.split(command)[1:]
        more = {"finetune": ["--device", "cpu", "--epochs", "1"], "predict": ["--device", "cpu"]}.get(words[0], [])
        assert main([*words, *more, *(["--replicates", "10"] if words[0] in ("probe", "finetune") else [])]) == 0, (
            command
        )
    assert Path("probed", RESULTS).is_file() and Path("attention", RESULTS).is_file()


@pytest.mark.slow
def test_demo_learns_what_the_means_cannot(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "demo" / "finetune_planted.py"), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    tuned, means, *_ = [found["auroc"].value for found in read_results(tmp_path / "run" / RESULTS).scores.values()]
    assert tuned > 0.9 and means < 0.7
