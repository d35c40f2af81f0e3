"""Fine-tuning from the command line: runs, what they leave, how they go on, and fitted heads on other cohorts."""

import csv
import errno
import json
import os
import resource
import stat
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Lines
from made_cohort import NARROW, made_bag, write_cohort, write_csv, write_slide, write_splits, write_task

from gigapath.cli.main import main
from gigapath.files import OutputError
from gigapath.finetune import (
    Inputs,
    JoinOptions,
    ModelOptions,
    Settings,
    TrainingOptions,
    finetune,
    load_head,
    predict,
    training,
)
from gigapath.finetune.data import prepare
from gigapath.report.results import collect_results
from gigapath.slide_encoder import create_model

FAST = ["--model-arch", NARROW, "--feat-layer", "2", "--dropout", "0", "--pretrained", "", "--replicates", "20"]
RECIPE = ["--epochs", "3", "--gradient-accumulation", "4", "--base-lr", "0.1", "--device", "cpu"]


def nine_slides(folder: Path, **how: int) -> Inputs:
    """Three slides of three classes each to train, to validate and to test on."""
    features, labels = write_cohort(folder, [n % 3 for n in range(9)], **how)
    splits = write_splits(folder / "splits", (range(3), range(3, 6), range(6, 9)))
    return Inputs(str(write_task(folder / "t.yaml")), str(features), str(labels), str(splits), "")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A finished run with controls over two folds: 24 slides of 12 patients, two sites."""
    folder = tmp_path_factory.mktemp("run")
    truth = [number // 2 % 3 for number in range(24)]
    patients = [f"p{number // 2}" for number in range(24)]
    features, labels = write_cohort(folder, truth, patients=patients, encoder="made", mpp=0.5, numerics_version=1)
    task = write_task(folder / "task.yaml", add_metrics="[qwk]")
    words = ["finetune", "--task", task, "--features", features, "--labels", labels, "--out", folder / "out"]
    parts = [range(start, start + 6) for start in (0, 6, 12, 18)]
    both = [*parts[0], *parts[1]], [*parts[2], *parts[3]]
    splits = write_splits(folder / "splits", (both[0], parts[2], parts[3]), (both[1], parts[0], parts[1]))
    assert main([*map(str, words), "--splits", str(splits), "--controls", "--calibrate", *FAST, *RECIPE]) == 0
    return folder


def test_run_leaves_what_it_promises(fitted) -> None:
    out = fitted / "out"
    assert {path.name for path in out.iterdir()} == {
        "finetune.json", "splits.csv", "splits.json", "summary.csv", "results.json", "fold_0", "fold_1",
    }  # fmt: skip
    names = {path.name for path in (out / "fold_0").iterdir()}
    wanted = {"head.json", "head.safetensors", "predictions.csv", "results.json", "confusion.png", "curves.png"}
    assert wanted | {"controls", "checkpoint.json"} <= names
    assert not list(out.rglob("*.partial"))
    results = json.loads((out / "fold_0" / "results.json").read_text())
    assert list(results["scores"]) == ["from random weights", "tile mean + linear", "ABMIL on tiles", "site alone"]
    test = results["scores"]["from random weights"]
    patients, slides = test["by_unit"]["patients"], test["by_unit"]["slides"]
    assert test["unit"] == "patients" and patients["units"] == 3 and slides["rows"] == 6
    assert set(test["leads"]) == set(results["scores"]) - {"from random weights"}
    named = {"accuracy", "balanced_accuracy", "auroc", "auprc", "kappa_quadratic", "auroc:0", "auprc:2"}
    assert named <= set(slides["scores"])
    alone = results["scores"]["site alone"]["by_unit"]["patients"]
    assert set(test["by_site"]) == {"a", "b"} and alone["rows"] == patients["rows"] == 3
    assert "bootstrap over patients" in slides["intervals"]
    assert np.sum(test["confusion"]) == 6 and results["chosen"]["calibration"] == "val"
    assert len(results["history"]) == 3 and "research use only" in results["terms"]
    assert {row["model"] for row in rows_of(out / "summary.csv")} == set(results["scores"])
    whole = json.loads((out / "results.json").read_text())["scores"]["from random weights"]["by_unit"]["patients"]
    assert len(whole["by_fold"]["auroc"]) == 2 and whole["by_fold"]["auroc"][0] == patients["scores"]["auroc"]["value"]
    # Over folds patients are pooled, on each model's own scale, and counted once.
    assert whole["units"] == 6 and "6 patients" in whole["intervals"] and "brier" in whole["uncalibrated"]
    assert np.shape(results["scale"]) == (3, 2) and "uncalibrated" in (out / "results.json").read_text()
    kept = json.loads((out / "finetune.json").read_text())
    assert kept["options"]["training"]["epochs"] == 3 and str(fitted) not in (out / "finetune.json").read_text()
    first = rows_of(out / "fold_0" / "predictions.csv")[0]
    assert list(first) == ["slide_id", "patient_id", "site", "label", "predicted", "p_0", "p_1", "p_2"]
    assert sum(float(first[f"p_{c}"]) for c in range(3)) == pytest.approx(1, abs=1e-4)


def test_a_finished_run_is_told_again_and_not_trained_again(fitted, capsys) -> None:
    names = {"task": "task.yaml", "features": "features", "labels": "labels.csv", "out": "out", "splits": "splits"}
    given = [word for option, name in names.items() for word in (f"--{option}", str(fitted / name))]
    words = ["finetune", *given, "--controls", "--calibrate", *FAST, *RECIPE]
    before = (fitted / "out" / "fold_1" / "head.safetensors").read_bytes()
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "slides: 24" in told and "AUROC" in told and "tile mean" in told and "epoch 1/3" not in told
    assert (fitted / "out" / "fold_1" / "head.safetensors").read_bytes() == before
    assert main([*words, "--epochs", "4"]) == 1
    assert "epochs 3 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("free", "more", "ways"),
    [
        (3_500_000, {}, None),  # activations are computed again then
        (2_480_000, {}, r"max_tiles of the task to \d+ or less, or .*--allow-low-m"),
        (3_000_000, {"batch_size": 8}, r"or less, or a smaller --batch-size, or "),
        (1000, {"checkpoint_activations": True}, "--device"),
    ],
)
def test_plan_refuses_a_slide_that_does_not_fit_and_says_what_would(tmp_path, monkeypatch, free, more, ways) -> None:
    monkeypatch.setattr("gigapath.finetune.plan.free_bytes", lambda device: free)
    inputs = nine_slides(tmp_path, tiles=60)
    model = {name: value for name, value in more.items() if name == "checkpoint_activations"}
    recipe = {name: value for name, value in more.items() if name not in model}

    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    chosen = settings(**recipe)
    with pytest.raises(Enough if ways is None else ValueError, match=ways):
        finetune(inputs, tmp_path / "out", replace(chosen, model=replace(chosen.model, **model)), check_stop=stop)
    assert not (tmp_path / "out").exists()


def test_a_deterministic_run_is_one_from_its_plan_to_its_end(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    inputs, recipe = nine_slides(tmp_path, tiles=20), {"epochs": 1, "deterministic": True}
    seen: list[bool] = []

    def look() -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    for out in ("one", "two"):
        finetune(inputs, tmp_path / out, settings(**recipe), check_stop=look)
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()
    heads = [(tmp_path / out / "fold_0" / "head.safetensors").read_bytes() for out in ("one", "two")]
    assert heads[0] == heads[1]

    def refuse(*_: object) -> None:
        raise ValueError("--deterministic: expected training to repeat itself.")

    monkeypatch.setattr("gigapath.finetune.plan.check_deterministic", refuse)
    with pytest.raises(ValueError, match="--deterministic"):
        finetune(inputs, tmp_path / "three", settings(**recipe))
    assert not (tmp_path / "three").exists() and not torch.are_deterministic_algorithms_enabled()


def test_predict_gives_what_the_run_said(fitted, tmp_path, capsys) -> None:
    said = {row["slide_id"]: row for row in rows_of(fitted / "out" / "fold_0" / "predictions.csv")}
    some, broken, out = sorted(said)[:3], tmp_path / "broken.h5", tmp_path / "p.csv"
    files = [fitted / "features" / f"{name}.h5" for name in some]
    broken.write_bytes(files[0].read_bytes()[:-50])
    words = ["predict", fitted / "out" / "fold_0", *files, broken, "--out", out, "--device", "cpu"]
    assert main([*map(str, words)]) == 3
    assert "broken.h5" in capsys.readouterr().err
    rows = rows_of(out)
    assert [row["slide_id"] for row in rows] == some
    for row in rows:
        assert row["predicted"] == said[row["slide_id"]]["predicted"]
        assert float(row["p_1"]) == pytest.approx(float(said[row["slide_id"]]["p_1"]), abs=1e-5)


def test_what_another_head_said_is_written_over_only_when_told_to(fitted, tmp_path, capsys) -> None:
    features, labels = write_cohort(tmp_path / "new", [n % 3 for n in range(6)], seed=9, encoder="made", mpp=0.5)
    for out, more in (("p.csv", []), ("scores", ["--labels", str(labels), "--allow-leakage", "--replicates", "0"])):
        words = [str(features), "--out", str(tmp_path / out), "--device", "cpu", *more]
        assert main(["predict", str(fitted / "out" / "fold_0"), *words]) == 0
        file = tmp_path / out if out == "p.csv" else tmp_path / out / "predictions.csv"
        before = file.read_bytes()
        assert main(["predict", str(fitted / "out" / "fold_0"), *words]) == 0, "the same again is no matter"
        assert file.read_bytes() == before
        capsys.readouterr()
        assert main(["predict", str(fitted / "out" / "fold_1"), *words]) == 1
        assert "--overwrite" in capsys.readouterr().err and file.read_bytes() == before
        assert main(["predict", str(fitted / "out" / "fold_1"), *words, "--overwrite"]) == 0
        assert file.read_bytes() != before


def test_locked_test_set_counts_its_evaluations_and_refuses_another(fitted, tmp_path, capsys) -> None:
    features, labels = write_cohort(tmp_path / "new", [n % 3 for n in range(12)], seed=9, encoder="made", mpp=0.5)
    lock, before = labels.with_name("labels.csv.lock"), labels.read_text()

    def test(head: str, out: str, *more: str) -> tuple[int, str]:
        words = ["predict", str(fitted / "out" / head), str(features), "--labels", str(labels), "--allow-leakage"]
        status = main([*words, "--out", str(tmp_path / out), "--replicates", "0", "--device", "cpu", *more])
        said = capsys.readouterr()
        return status, said.out + said.err

    assert test("fold_0", "free")[0] == 0 and not lock.exists()
    free = json.loads((tmp_path / "free" / "results.json").read_text())
    slides = free["scores"]["frozen head"]["by_unit"]["slides"]
    assert slides["rows"] == 12 and slides["scores"]["auroc"]["value"] > 0.8 and "locked_test_set" not in free
    assert load_head(fitted / "out" / "fold_0").calibration.temperature != 1
    status, said = test("fold_0", "first", "--lock")
    assert status == 0 and "locked test set" in said and "first" in said
    assert test("fold_0", "second")[0] == 0  # without being asked
    status, said = test("fold_1", "third", "--lock")
    results = json.loads((tmp_path / "third" / "results.json").read_text())
    assert (results["locked_test_set"]["evaluation"], results["locked_test_set"]["heads"]) == (3, 2)
    assert "evaluation 3 on it, of 2 heads" in said
    (collected,) = collect_results(tmp_path / "third")
    assert any("evaluation 3" in text for block in collected.blocks for text in block.get("sentences", ()))
    kept = lock.read_text()
    assert str(tmp_path) not in kept
    labels.write_text(before.replace("slide-000,0", "slide-000,1"))
    status, said = test("fold_0", "changed")
    assert status == 1 and "labels are not those that were locked" in said and not (tmp_path / "changed").exists()
    labels.write_text(before)
    write_slide(features / "slide-003.h5", *made_bag(0, np.random.default_rng(1)), encoder="made", mpp=0.5)
    status, said = test("fold_0", "changed")
    assert status == 1 and "features are not those that were locked" in said
    assert lock.read_text() == kept
    lock.write_text(kept[:-20])
    status, said = test("fold_0", "changed")
    assert status == 1 and "damaged" in said


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": 3},
        {"thresholds": [0.5]},  # of three classes: none
        {"precision": "fp8"},
        {"tensors": 3},
        {"sha256": "0" * 64},
        {"input_dim": 10**9},
        {"input_dim": 10**30},
        {"model": {"feat_layer": "-".join(["2"] * 100_000)}},
        {"model": {"max_wsi_size": 10**400}},
        {"task": {"label_dict": {str(index): index for index in range(9_000)}}},
        {"task": {"label_dict": {str(index): index for index in range(20_000)}}},
    ],
    ids=lambda change: f"{next(iter(change))}-{len(str(change))}",
)
def test_a_head_that_is_damaged_or_claims_other_sizes_is_refused_before_it_is_built(fitted, tmp_path, change) -> None:
    held = json.loads((fitted / "out" / "fold_0" / "head.json").read_text())
    for key, value in change.items():
        held[key] = {**held[key], **value} if isinstance(value, dict) else value
    (tmp_path / "head.json").write_text(json.dumps(held))
    (tmp_path / "head.safetensors").symlink_to(fitted / "out" / "fold_0" / "head.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        load_head(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_what_a_head_cannot_be_applied_to_is_one_sentence(fitted, tmp_path, capsys) -> None:
    head, features, labels = fitted / "out" / "fold_0", fitted / "features", fitted / "labels.csv"
    (tmp_path / "head.json").write_text('{"format": 1}')
    test, out = ["predict", head, features, "--labels", labels, "--out"], tmp_path / "out"
    seen = "18 of the slides trained or chose this head"
    cases = [
        (["predict", head, tmp_path / "nowhere"], "nowhere: expected a file or folder of tile embeddings"),
        (["predict", fitted / "out", features], "expected a fitted head"),
        (["predict", tmp_path, features], "one without features"),
        (["predict", head, features, "--device", "gpu"], "--device: expected one of"),
        ([*test, out, "--replicates", -5], "--replicates: expected at least 0, got -5"),
        ([*test, out, "--seed", -1], "--seed: expected at least 0, got -1"),
        ([*test, labels], "--out: expected a folder"),
        (["predict", head, features, "--labels", labels], "--labels: expected --out DIR"),
        (["predict", head, features, "--lock"], "--lock: expected --labels CSV"),
        ([*test, out], seen),
        (["predict", head / "head.json", *test[2:], out], seen),
        (["predict", head / "controls" / "abmil_tiles", *test[2:], out], seen),
    ]
    for key, value in {"encoder": "other", "mpp": 0.25, "numerics_version": 2}.items():
        others, rows = write_cohort(tmp_path / key, [0, 1, 2, 0], **{"encoder": "made", "mpp": 0.5, key: value})
        words = ["predict", head, others, "--labels", rows, "--allow-leakage", "--out", out]
        cases.append((words, f"its {key} is {value}"))
    for words, said in cases:
        assert main([str(word) for word in words]) in (1, 2)
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not out.exists(), err


def settings(**training) -> Settings:
    recipe = {"epochs": 2, "gradient_accumulation": 4, "base_lr": 0.05, "replicates": 5, "device": "cpu", **training}
    return Settings(model=ModelOptions(model_arch=NARROW, feat_layer="2"), training=TrainingOptions(**recipe))


def test_whole_run_killed_and_continued_equals_an_unbroken_one(tmp_path) -> None:
    features, labels = write_cohort(tmp_path, [n % 3 for n in range(18)])
    thirds = [range(start, start + 6) for start in (0, 6, 12)]
    splits = write_splits(tmp_path / "splits", (thirds[0], thirds[1], thirds[2]), (thirds[2], thirds[0], thirds[1]))
    inputs = Inputs(str(write_task(tmp_path / "t.yaml")), str(features), str(labels), str(splits), "")
    whole = finetune(inputs, tmp_path / "whole", settings())

    class Killed(Exception):
        pass

    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls == 18 + 36:  # in the second fold: 18 files are checked, then a fold makes 2 * (2 + 6) + 6 calls
            raise Killed

    with pytest.raises(Killed):
        finetune(inputs, tmp_path / "broken", settings(), check_stop=kill)
    assert (tmp_path / "broken" / "fold_0" / "results.json").exists()
    assert not (tmp_path / "broken" / "fold_1" / "results.json").exists()
    finetune(inputs, tmp_path / "broken", settings())
    for fold in range(2):
        for name in ("head.safetensors", "predictions.csv"):
            ours, theirs = (tmp_path / run / f"fold_{fold}" / name for run in ("whole", "broken"))
            assert ours.read_bytes() == theirs.read_bytes(), (fold, name)
    assert len(whole.evaluations["from random weights"]) == 2


def test_disk_that_is_full_at_any_write_is_one_sentence_and_the_run_goes_on(tmp_path, monkeypatch) -> None:
    """Attempt n fails at its n-th file, when it is flushed; the first that needs fewer ends as an unbroken run does."""
    inputs = nine_slides(tmp_path)
    finetune(inputs, tmp_path / "whole", settings())
    out, flush, left = tmp_path / "out", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= stat.S_ISREG(os.fstat(descriptor).st_mode)
        if left == 0:
            left = -1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr("gigapath.files.os.fsync", full)
    refused = 0
    for attempt in range(1, 40):
        left = attempt
        try:
            finetune(inputs, out, settings())
        except OutputError as error:
            assert error.stops_run and "the disk is full" in str(error) and "\n" not in str(error)
            assert all(json.loads(path.read_text()) for path in out.rglob("*.json"))
            assert {path.suffix for path in out.rglob("*.*")} <= {".json", ".csv", ".png", ".safetensors"}
            refused += 1
        else:
            break
    assert refused > 10 and left > 0
    for name in ("fold_0/head.safetensors", "fold_0/predictions.csv", "fold_0/confusion.png", "summary.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_run_from_weights_has_random_ones_as_a_control_and_names_the_file_alone(tmp_path) -> None:
    place = tmp_path / "a-private-place"
    place.mkdir()
    start = create_model("", NARROW, 8).state_dict()
    torch.save({"model": start}, place / "start.pth")
    inputs = replace(nine_slides(tmp_path), pretrained=str(place / "start.pth"))
    still = settings(base_lr=1e-12, min_lr=0.0, epochs=1)
    result = finetune(inputs, tmp_path / "out", replace(still, controls=True))
    assert set(result.evaluations) == {"fine-tuned", *(training.MEAN, training.ATTENTION, training.RANDOM)}
    folder = tmp_path / "out" / "fold_0"
    ends = [load_head(where).model.state_dict() for where in (folder, folder / "controls" / "random_weights")]
    name = "encoder.layers.1.ffn.fc1.weight"
    from_start = [float((end[f"slide_encoder.{name}"] - start[name]).abs().max()) for end in ends]
    assert from_start[0] < 1e-6 < 1e-2 < from_start[1]
    kept = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert kept["weights"]["name"] == "start.pth" and kept["versions"]["torch"] and kept["device"] == "cpu"
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".csv")]
    assert len(texts) > 10 and not any("a-private-place" in text or str(tmp_path) in text for text in texts)
    torch.save({"model": create_model("", NARROW, 8).state_dict()}, place / "start.pth")
    with pytest.raises(ValueError, match="differs in weights"):
        finetune(inputs, tmp_path / "out", replace(still, controls=True))
    frozen = finetune(inputs, tmp_path / "frozen", replace(still, model=replace(still.model, freeze=True)))
    assert list(frozen.evaluations) == ["frozen encoder"]


def test_frozen_encoder_is_cached_and_its_head_applies_to_tiles(tmp_path) -> None:
    features, labels = write_cohort(tmp_path, [n % 3 for n in range(18)])
    options = settings(epochs=3)
    frozen = Settings(model=ModelOptions(model_arch=NARROW, feat_layer="1-3", freeze=True), training=options.training)
    splits = write_splits(tmp_path / "splits", (range(9), [], range(9, 18)))
    inputs = Inputs(str(write_task(tmp_path / "t.yaml")), str(features), str(labels), str(splits), "")
    finetune(inputs, tmp_path / "out", frozen)
    said = {row["slide_id"]: float(row["p_1"]) for row in rows_of(tmp_path / "out" / "fold_0" / "predictions.csv")}
    found = predict(tmp_path / "out" / "fold_0", [features], device="cpu")
    assert len(found.rows) == 18 and not found.failed
    again = {row["slide_id"]: row["p_1"] for row in found.rows if row["slide_id"] in said}
    assert again == pytest.approx(said, abs=1e-5)

    # As a version before adapters recorded it: the run goes on, and its head is read.
    for name, key in (("finetune.json", "identity"), ("fold_0/checkpoint.json", "tag"), ("fold_0/head.json", "")):
        held = json.loads((tmp_path / "out" / name).read_text())
        record = held[key] if key else held
        record["model"] = {
            option: value
            for option, value in record["model"].items()
            if option not in ("adapt", "last_blocks") and not option.startswith("lora")
        } | {"freeze": True}
        record.get("training", {}).pop("deterministic", None)
        (tmp_path / "out" / name).write_text(json.dumps(held))
    again = predict(tmp_path / "out" / "fold_0", [features], device="cpu")
    assert again.rows == found.rows
    trained = (tmp_path / "out" / "fold_0" / "head.safetensors").read_bytes()
    finetune(inputs, tmp_path / "out", frozen)
    assert (tmp_path / "out" / "fold_0" / "head.safetensors").read_bytes() == trained


@pytest.mark.usefixtures("summary_writer")
def test_tensorboard_gets_every_epoch_where_it_is_installed(tmp_path) -> None:
    """A second run of the command leaves one file of events, and none names the machine."""
    inputs = nine_slides(tmp_path)
    for _ in range(2):
        finetune(inputs, tmp_path / "out", settings())
        (events,) = (tmp_path / "out" / "fold_0" / "tensorboard").iterdir()
        assert "tfevents" in events.name and "the-machine" not in events.name
    told = json.loads(events.read_text())
    history = json.loads((tmp_path / "out" / "fold_0" / "results.json").read_text())["history"]
    for name in ("train_loss", "val_loss", "learning_rate"):
        assert [line[1:] for line in told if line[0] == name] == [[entry[name], entry["epoch"]] for entry in history]


def test_several_labels_train_and_report_micro_and_macro(tmp_path, capsys) -> None:
    random = np.random.default_rng(0)
    rows = []
    for number in range(24):
        flags = [number % 2, number // 2 % 2]
        bag, cells = made_bag(0, random)
        bag[:, 4:6] += 1.5 * np.array(flags)
        name = f"TCGA-05-{number // 2:04d}-01Z-00-DX{number % 2}"
        write_slide(tmp_path / "f" / f"{name}.0a1b-{number}.h5", bag, cells)
        rows.append([name, *[bool(flag) for flag in flags], f"pat{number // 2}"])
    labels = write_csv(tmp_path / "l.csv", ["slide_id", "X", "Y", "pat_id"], rows)
    (tmp_path / "t.yaml").write_text("name: two\nsetting: multi_label\nlabel_dict: {X: 0, Y: 1}\n")
    words = ["finetune", "--task", tmp_path / "t.yaml", "--features", tmp_path / "f", "--labels", labels]
    words += ["--out", tmp_path / "o"]
    assert main([*map(str, words), "--id-rule", "tcga", "--folds", "3", *FAST, *RECIPE, "--epochs", "1"]) == 0
    told = capsys.readouterr().out
    assert "micro AUROC" in told
    (test,) = json.loads((tmp_path / "o" / "fold_0" / "results.json").read_text())["scores"].values()
    assert {"auroc", "auroc_micro", "auprc_micro", "auroc:X"} <= set(test["by_unit"]["slides"]["scores"])
    assert test["unit"] == "slides" and any("slides of several labels" in note for note in test["notes"])


def test_nothing_is_written_when_the_input_is_off(tmp_path, capsys) -> None:
    """One sentence each; the output folder does not even appear."""
    features, labels = write_cohort(tmp_path, [0, 1, 2] * 4)
    task = write_task(tmp_path / "t.yaml")
    base = ["finetune", "--task", task, "--features", features, "--labels", labels, "--out", tmp_path / "out", *FAST]

    def refused(*more: object) -> str:
        assert main([*map(str, [*base, *more])]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "out").exists(), said
        return said

    write_splits(tmp_path / "splits", (range(6), [], range(6, 12)))
    assert "validation slides" in refused("--select", "val", "--splits", tmp_path / "splits")
    assert "states 0 to 3" in refused("--feat-layer", "9")
    assert "--model-arch" in refused("--model-arch", "nonesuch")
    assert "--device" in refused("--device", "cuda:7")
    weights = tmp_path / "slide_encoder.pth"
    torch.save({"model": create_model("", NARROW, 16).state_dict()}, weights)
    assert "--features: expected embeddings of width 16" in refused("--pretrained", weights)
    assert main([*map(str, base), "--out", str(task)]) == 1 and "expected a folder" in capsys.readouterr().err
    assert main([*map(str, base), "--folds", "3", "--device", "cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "slides: 12" in said and "nothing was written" in said and not (tmp_path / "out").exists()
    slide = features / "slide-003.h5"
    for word, value in (("NaN", np.nan), ("inf", np.inf)):
        with h5py.File(slide, "r+") as file:
            file["features"][5, 2] = value
        said = refused()
        assert "slide-003.h5" in said and "row 5" in said, (word, said)


def test_damaged_files_of_a_run_are_one_sentence(tmp_path) -> None:
    inputs, out = nine_slides(tmp_path), tmp_path / "out"
    finetune(inputs, out, settings(epochs=1, replicates=0))
    for name in ("finetune.json", "splits.json", "fold_0/checkpoint.json"):
        whole = (out / name).read_text()
        for damaged in (whole[: len(whole) // 2], "[]", "{}"):
            (out / name).write_text(damaged)
            with pytest.raises(ValueError, match=r"got a damaged file\. Choose another --out") as refused:
                finetune(inputs, out, settings(epochs=1, replicates=0))
            assert Path(name).name in str(refused.value) and "\n" not in str(refused.value)
        (out / name).write_text(whole)


def test_every_file_is_read_before_the_first_is_written_and_not_again(tmp_path, monkeypatch) -> None:
    """A small cohort is read once: checked, then kept. A run that goes on does not check again."""
    from gigapath.finetune import data

    reads: list[str] = []
    read = data.read_features

    def counted(path: Path, **how: object):
        reads.append(path.name)
        written = [name for name in (tmp_path / "out").rglob("*") if not name.name.startswith(".run-")]  # its mark
        assert len(reads) > 9 or not written
        return read(path, **how)

    monkeypatch.setattr(data, "read_features", counted)
    inputs = nine_slides(tmp_path)
    watch = Lines()
    finetune(inputs, tmp_path / "out", settings(), watch=watch)
    assert sorted(reads) == [f"slide-{number:03d}.h5" for number in range(9)]
    assert any(line.startswith("files: 9 read and checked") for line in watch.lines)
    assert any(what.startswith("fold 0, epoch 1 of ") and done == total for what, done, total in watch.steps)
    again = Lines()
    finetune(inputs, tmp_path / "out", settings(), watch=again)
    assert not any(line.startswith("files:") for line in again.lines)


def test_prepare_leaves_out_slides_that_no_split_names(tmp_path) -> None:
    features, labels = write_cohort(tmp_path, [0, 1, 2] * 4)
    splits = write_splits(tmp_path / "splits", (range(5), [11], range(6, 9)))
    inputs = Inputs(str(write_task(tmp_path / "t.yaml")), str(features), str(labels), str(splits), "")
    cohort = prepare(inputs, Settings())
    ids = cohort.joined.labels.slide_ids
    assert [ids[row] for row in cohort.folds[0].test] == ["slide-006", "slide-007", "slide-008"]
    assert [cohort.joined.files[row].stem for row in cohort.folds[0].val] == ["slide-011"] and len(cohort.facts) == 9
    assert cohort.notes == ["labelled slides in no split file, left out: 3 (slide-005, slide-009, slide-010)"]
    table = splits / "train_0.csv"
    table.write_text(table.read_text() + "slide-404\n")
    for number in (1, 7):
        (features / f"slide-{number:03d}.h5").unlink()
    notes = prepare(inputs, Settings(join=JoinOptions(allow_missing=True))).notes
    assert "slides of the split files without a row in labels.csv: 1 (slide-404)" in notes
    assert "2 labelled slides have no features (slide-001, slide-007)" in notes


@pytest.mark.parametrize("work", ["train", "predict"])
def test_torch_computes_with_the_cores_that_were_granted(fitted, tmp_path, monkeypatch, work) -> None:
    seen: list[int] = []

    class Enough(Exception):
        pass

    def look(*_: object, **__: object) -> None:
        seen.append(torch.get_num_threads())
        raise Enough

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    room, called = ("run", "make_plan") if work == "train" else ("fitted", "pack")
    monkeypatch.setattr(f"gigapath.finetune.{room}.available_cores", lambda: 3)
    monkeypatch.setattr(f"gigapath.finetune.{room}.{called}", look)
    try:
        with pytest.raises(Enough):
            if work == "train":
                inputs = Inputs(*(str(fitted / name) for name in ("task.yaml", "features", "labels.csv", "splits")), "")
                finetune(inputs, tmp_path / "out", settings())
            else:
                predict(fitted / "out" / "fold_0", [fitted / "features" / "slide-000.h5"], device="cpu")
        assert seen == [3] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
