"""Slide-level probes: tile-mean always beside, the same folds for all, differences paired, patients kept together."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gigapath.cli.main import main
from gigapath.evaluation.labels import Task
from gigapath.evaluation.results import read_results
from gigapath.evaluation.robustness import robustness_index
from gigapath.evaluation.scores import Scorer
from gigapath.features import SlideEmbeddings, read_slide, read_slides, write_slide
from gigapath.linear_probe import ProbeOptions, SlideProbeOptions
from gigapath.linear_probe import fits as fits_module
from gigapath.linear_probe.fits import fit_folds
from gigapath.linear_probe.heads import PENALTIES, LogisticRegression, choose_penalty
from gigapath.linear_probe.slides import SlideProbe, held_out, probe_slides, repeated_folds
from gigapath.report.results import collect_results

PATIENTS = 40
QUICK = SlideProbeOptions(embedding="default", folds=3, repeats=2)


def write_run(folder: Path, *, patients: int = PATIENTS, signal: float = 2.0, seed: int = 0) -> tuple[Path, Path]:
    """A run's slide embeddings and labels: two slides a patient; `default` knows the label, `tile-mean` hardly does,
    and every embedding knows the patient very well."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        label = patient % 2
        person = generator.normal(size=(2, 16)) * 1.5
        for slide in range(2):
            noise = generator.normal(size=(4, 16)) * 0.3
            default, tile_mean = person[0] + noise[0], person[1] + noise[1]
            default[0] = signal * (2 * label - 1) + generator.normal()
            tile_mean[0] = 0.3 * (2 * label - 1) + generator.normal()
            slide_id = f"P{patient:02d}-S{slide}"
            states = np.stack([default, -default, noise[2]])
            write_slide(
                folder / "slides_gigapath__standin" / f"{slide_id}.h5",
                SlideEmbeddings(
                    slide_id=slide_id,
                    tile_mean=tile_mean[None],
                    states_mean=states,
                    states_class=states,
                    default_mean=default[None],
                    default_class=default[None],
                    attrs={"trained": True},
                ),
            )
            rows.append(
                {
                    "slide_id": slide_id,
                    "label": ["wild", "mutant"][label],
                    "patient_id": f"P{patient:02d}",
                    "site": ["A", "B"][generator.random() < 0.3 + 0.4 * label],
                    "set": "test" if patient >= patients * 3 // 4 else "train",
                }
            )
    table = folder / "labels.csv"
    write_rows(table, rows)
    return folder, table


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def probed(made: tuple[Path, Path]) -> SlideProbe:
    return probe_slides(*made, ProbeOptions(positive="mutant", replicates=50), QUICK)


@pytest.fixture
def relabelled(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The run with labels that may be changed."""
    return made[0], Path(shutil.copy(made[1], tmp_path / "labels.csv"))


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The run once more, to be changed; copied, since writing each file to the disk takes its time."""
    return shutil.copytree(made[0], tmp_path / "copy"), tmp_path / "copy" / made[1].name


def test_slide_encoder_is_compared_with_the_mean_of_the_tiles(probed: SlideProbe) -> None:
    found = probed
    assert list(found.scores) == ["tile-mean", "default", "chance", "site alone"]
    default, baseline = found.scores["default"], found.scores["tile-mean"]
    assert default["auroc"].value > 0.85 > baseline["auroc"].value
    assert not baseline.leads
    lead = default.leads["tile-mean"]["auroc"]
    assert lead.value == pytest.approx(default["auroc"].value - baseline["auroc"].value)
    assert 0 < lead.low < lead.value < lead.high
    assert found.scores["chance"]["auroc"].value == 0.5
    assert 0.5 < found.scores["site alone"]["auroc"].value < 0.85
    assert found.data.classes == ("wild", "mutant")
    patients, slides = default.by_unit["patients"], default.by_unit["slides"]
    assert default.headline is patients
    # 2 repeats of each patient and of each slide; the units that are drawn are patients both times.
    assert (patients.rows, patients.units) == (2 * PATIENTS, PATIENTS)
    assert (slides.rows, slides.units) == (4 * PATIENTS, PATIENTS)
    assert "40 patients (20 wild, 20 mutant)" in patients.covers and "2/3 of so many" in patients.covers
    assert list(default.by_site) == ["A", "B"]
    assert sum(evaluation.rows for evaluation in default.by_site.values()) >= 2 * PATIENTS
    assert all(evaluation["auroc"].value > 0.7 for evaluation in default.by_site.values())


def test_scanners_and_stains_are_scored_apart(copied: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """The stain from the labels, which go before, the scanner from what the run says of its slides."""
    folder, table = copied
    with table.open() as file:
        rows = list(csv.DictReader(file))
    number = {row["slide_id"]: index for index, row in enumerate(rows)}
    write_rows(table, [{**row, "stain": "HI"[number[row["slide_id"]] // 2 % 3 == 0]} for row in rows])
    run = [{"slide_id": name, "scanner": f"S{index // 2 % 5}", "stain": "none"} for name, index in number.items()]
    write_rows(folder / "slides.csv", run)
    words = ["--labels", str(table), "--embedding", "default", "--folds", "3", "--repeats", "1", "--replicates", "20"]
    assert main(["probe", str(folder), *words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["default"]["by_stratum"]
    assert {name: list(of) for name, of in found.items()} == {
        "scanner": [f"S{number}" for number in range(5)], "stain": ["H", "I"]
    }  # fmt: skip
    assert found["stain"]["I"]["units"] == 14 and found["scanner"]["S3"]["units"] == PATIENTS // 5
    assert all(f"default by {stratum}" in printed for stratum in ("site", "scanner", "stain"))
    facts = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["default"]["facts"]["robustness"]
    ids, vectors = read_slides(folder, "default")
    columns = {key: np.array([rows[number[name]][key] for name in ids]) for key in ("label", "site", "patient_id")}
    labels = (columns["label"] == "wild").astype(np.int64)
    index = robustness_index(vectors.astype(np.float64), labels, columns["site"], columns["patient_id"])
    assert index is not None and "robustness index" in printed
    assert [facts[end] for end in ("index", "low", "high")] == pytest.approx([index.index, index.low, index.high])
    assert f"{index.index:.4f} [{index.low:.4f}, {index.high:.4f}]" in printed
    (collected,) = collect_results(tmp_path / "out")
    shown = {block["title"]: block for block in collected.blocks if "title" in block}
    assert {f"Scores by {stratum}: default" for stratum in ("site", "scanner", "stain")} <= set(shown)
    (robust,) = (block for title, block in shown.items() if title.startswith("Robustness"))
    (row,) = (row for row in robust["rows"] if row[0] == "default")
    assert row[1] == {"value": facts["index"], "low": facts["low"], "high": facts["high"]}


def test_each_site_is_left_out_once(relabelled: tuple[Path, Path], tmp_path: Path) -> None:
    folder, table = relabelled
    with table.open() as file:
        rows = [{**row, "site": "ABC"[int(row["patient_id"][1:]) // 14]} for row in csv.DictReader(file)]
    write_rows(table, rows)
    words = ["--labels", str(table), "--embedding", "default", "--folds", "leave-site-out", "--replicates", "50"]
    assert main(["probe", str(folder), *words, "--out", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert len(scores["default"]["facts"]["penalties"]) == 3  # as many fits as sites, whatever --repeats says
    assert list(scores["default"]["by_site"]) == ["A", "B", "C"]
    assert scores["site alone"]["by_unit"]["patients"]["scores"]["auroc"]["value"] == 0.5  # a new site tells nothing
    site_of = {row["slide_id"]: row["site"] for row in rows}
    with (tmp_path / "out" / "predictions.csv").open() as file:
        tested = {(row["fold"], site_of[row["slide_id"]]) for row in csv.DictReader(file)}
    assert tested == {("0", "A"), ("1", "B"), ("2", "C")}


def test_every_slide_is_tested_once_a_repeat_and_patients_stay_together(probed: SlideProbe) -> None:
    found = probed
    folds = np.asarray(found.scores["default"].predictions.folds)
    assert np.array_equal(folds, np.asarray(found.scores["tile-mean"].predictions.folds))
    for repeat in (range(3), range(3, 6)):
        inside = np.isin(folds, list(repeat))
        assert sorted(found.rows[inside].tolist()) == list(range(2 * PATIENTS))
        patients = found.data.groups[found.rows[inside]]
        assert all(len(set(folds[inside][patients == patient].tolist())) == 1 for patient in set(patients.tolist()))
    first, second = (found.rows[folds < 3], folds[folds < 3]), (found.rows[folds >= 3], folds[folds >= 3] - 3)
    assert not np.array_equal(first[1][np.argsort(first[0])], second[1][np.argsort(second[0])])


def people(count: int) -> np.ndarray:
    return np.array([f"p{number}" for number in range(count)])


def test_no_label_means_no_score() -> None:
    """Labels that have nothing to do with the embeddings: within three standard errors of chance (60 patients)."""
    generator = np.random.default_rng(3)
    vectors, labels = generator.normal(size=(300, 20)), np.arange(300) % 2
    generator.shuffle(labels)
    groups = np.array([f"p{number // 2}" for number in range(300)])
    said = fit_folds(vectors, labels, groups, [np.arange(200)], 0)[0][0]
    assert abs(roc_auc_score(labels[200:], said[200:, 1]) - 0.5) < 0.18


def test_test_slides_have_no_say_in_the_fit() -> None:
    generator = np.random.default_rng(4)
    vectors, labels = generator.normal(size=(80, 30)), np.arange(80) % 2
    vectors[:, 0] += labels
    said, penalties = fit_folds(vectors, labels, people(80), [np.arange(60)], 0)
    changed, flipped = vectors.copy(), 1 - labels
    changed[61:], flipped[60:] = 1e6, 1
    again, same = fit_folds(changed, flipped, people(80), [np.arange(60)], 0)
    assert penalties == same
    # The labels of the training slides were flipped too, so the probabilities change places.
    assert np.allclose(again[0, :61], said[0, :61, ::-1], atol=1e-7)


@pytest.mark.parametrize(("slides", "width", "classes"), [(40, 200, 2), (60, 12, 2), (45, 60, 4)])
@pytest.mark.parametrize("penalty", [10.0, 0.1, 1e-4])
def test_all_fits_at_once_are_those_of_one_at_a_time(
    slides: int, width: int, classes: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer slides than entries and more; L-BFGS in full width, driven further than usual, finds the same optimum."""
    monkeypatch.setattr("gigapath.linear_probe.heads.TOLERANCE", 1e-9)
    monkeypatch.setattr("gigapath.linear_probe.heads.MAX_ITERATIONS", 20_000)
    generator = np.random.default_rng(5)
    vectors, labels = generator.normal(size=(slides, width)) * 3 + 1, np.arange(slides) % classes
    vectors[:, 0] += 4 * labels
    vectors[:, 1] = 7  # never changes
    trains = [np.flatnonzero(np.arange(slides) % 5 != fold) for fold in range(5)]
    together, _ = fit_folds(vectors, labels, people(slides), trains, 0, penalty=penalty)
    monkeypatch.setattr(fits_module, "BLOCK_ENTRIES", 1)  # one fold after the other
    alone, _ = fit_folds(vectors, labels, people(slides), trains, 0, penalty=penalty)
    assert np.abs(alone - together).max() < 1e-8
    features, target = torch.from_numpy(vectors), torch.from_numpy(labels)
    for said, train in zip(together, trains, strict=True):
        head = LogisticRegression(features, target, torch.from_numpy(train), classes).fit(penalty)
        assert np.abs(head.probabilities(features, torch.arange(slides)) - said).max() < 1e-5


def test_penalties_are_those_of_inner_folds_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search with early end, over inner folds given as one validation set each, chooses the same."""
    generator = np.random.default_rng(6)
    vectors, labels = generator.normal(size=(60, 25)), np.arange(60) % 2
    vectors[:, 0] += labels
    train = np.arange(48)
    part = np.arange(48) % 3
    monkeypatch.setattr(fits_module, "draw_parts", lambda *_, **__: part)
    _, penalties = fit_folds(vectors, labels, people(60), [train], 0)
    features, target = torch.from_numpy(vectors), torch.from_numpy(labels)
    losses = dict.fromkeys(PENALTIES, 0.0)
    for number in range(3):
        rows = [torch.from_numpy(train[part != number]), torch.from_numpy(train[part == number])]
        for penalty in PENALTIES:
            losses[penalty] += choose_penalty(features, target, *rows, 2, penalties=[penalty])[1].tried[penalty]
    assert penalties[0] == min(losses, key=lambda each: losses[each])


def test_given_split_is_used_once(made: tuple[Path, Path]) -> None:
    found = probe_slides(*made, ProbeOptions(split="set", replicates=100), QUICK)
    assert len(found.rows) == 2 * (PATIENTS // 4)
    assert len(found.scores["default"].facts["penalties"]) == 1
    assert found.scores["default"]["auroc"].value > 0.8
    assert any("train and val train together" in note for note in found.notes)
    assert "bootstrap" in found.scores["default"].headline.covers  # one fitted model


def test_command_line_prints_one_table_and_writes_it(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "probe", str(made[0]), "--labels", str(made[1]), "--embedding", "default,state:1:class,all-states",
        "--group", "patient_id", "--folds", "3", "--repeats", "1", "--replicates", "100",
    ]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    for words in (
        *("80 slides of 40 groups (patient_id): 40 mutant, 40 wild", "tile-mean"),
        *("state:1:class", "AUROC against tile-mean"),
    ):
        assert words in printed
    assert {entry.name for entry in (tmp_path / "a").iterdir()} == {
        "comparison.png", "predictions.csv", "results.json", "summary.csv",
    }  # fmt: skip
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    scores = results["scores"]
    assert list(scores) == ["tile-mean", "default", "state:1:class", "all-states", "chance", "site alone"]
    assert scores["all-states"]["facts"]["width"] == 48
    assert scores["default"]["leads"]["tile-mean"]["auroc"]["value"] > 0
    with (tmp_path / "a" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == set(scores)
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    for name in ("summary.csv", "predictions.csv", "results.json", "comparison.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_patients_of_several_labels_are_scored_by_slide_and_an_untrained_encoder_is_noted(
    copied: tuple[Path, Path],
) -> None:
    folder, table = copied
    for file in (folder / "slides_gigapath__standin").glob("*.h5"):
        with h5py.File(file, "r+") as opened:
            opened.attrs["trained"] = False
    rows = list(csv.DictReader(table.open()))
    rows[0]["label"] = "mutant"
    write_rows(table, rows)
    found = probe_slides(folder, table, ProbeOptions(replicates=20), QUICK)
    assert list(found.scores["default"].by_unit) == ["slides"]
    for words in ("slides of several labels", "untrained slide encoder"):
        assert any(words in note for note in found.notes)
    json.dumps(found.results.to_dict(), allow_nan=False)


def test_tcga_ids_join_by_rule(relabelled: tuple[Path, Path]) -> None:
    folder, table = relabelled
    rows = list(csv.DictReader(table.open()))
    write_rows(table, [{**row, "slide_id": row["slide_id"] + ".01Z-00-DX1.ABC.svs"} for row in rows])
    with pytest.raises(ValueError, match="--id-rule"):
        probe_slides(folder, table, ProbeOptions(), QUICK)
    options = SlideProbeOptions(embedding="default", folds=3, repeats=1, id_rule="tcga")
    assert probe_slides(folder, table, ProbeOptions(replicates=0), options).data.facts["slides"] == 80
    by_pattern = dataclasses.replace(options, id_rule="exact", id_regex=r"^(P\d+-S\d)")
    assert probe_slides(folder, table, ProbeOptions(replicates=0), by_pattern).data.facts["slides"] == 80
    with pytest.raises(ValueError, match="--id-regex"):
        SlideProbeOptions(id_regex="(")


Change = Callable[[list[dict[str, str]]], list[dict[str, str]]]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: [{**row, "label": "wild"} for row in rows], {}, "expected slides of two classes, got wild"),
        (lambda rows: rows[:-1], {}, r"csv: embeddings without a row: 1 \(P39-S1\)\."),
        (lambda rows: [*rows, rows[0]], {}, r"P00-S0 has two rows \(2 and 82\)"),
        (lambda rows: [{**rows[0], "patient_id": ""}, *rows[1:]], {}, "row 2 has no patient_id"),
        (
            lambda rows: [{**rows[0], "set": "test"}, *rows[1:]],
            {"split": "set"},
            r"1 patients in both sets, train and test \(P00\).*--allow-leakage",
        ),
        (lambda rows: [{**row, "set": "train"} for row in rows], {"split": "set"}, "leaves no slide to test on"),
        (
            lambda rows: [
                {**row, "label": "mutant" if row["patient_id"] in ("P01", "P03") else "wild"} for row in rows
            ],
            {},
            "the class mutant occurs in 2 groups, fewer than 3 folds. Take fewer folds",
        ),
        (
            lambda rows: [
                {
                    **row,
                    "set": "test" if row["patient_id"] > "P20" else "train",
                    "label": "mutant" if row["patient_id"] in ("P01", "P03", "P30") else "wild",
                }
                for row in rows
            ],
            {"split": "set"},
            "the class mutant occurs in 2 groups, fewer than the 3 folds by which the penalty is chosen",
        ),
    ],
)
def test_labels_that_make_no_sense_are_one_sentence(
    relabelled: tuple[Path, Path], change: Change, options: dict[str, str], message: str
) -> None:
    folder, table = relabelled
    write_rows(table, change(list(csv.DictReader(table.open()))))
    with pytest.raises(ValueError, match=message):
        probe_slides(folder, table, ProbeOptions(**options), QUICK)


def test_one_slide_under_two_names_is_refused(copied: tuple[Path, Path]) -> None:
    folder, table = copied
    first = next((folder / "slides_gigapath__standin").glob("P00-S0.h5"))
    copy = dataclasses.replace(read_slide(first), slide_id="P01-S0")
    write_slide(first.with_name("P01-S0.h5"), copy)
    with pytest.raises(ValueError, match=r"2 identical slides .*\(P00-S0, P01-S0\).*--allow-leakage"):
        probe_slides(folder, table, ProbeOptions(), QUICK)
    assert probe_slides(folder, table, ProbeOptions(allow_leakage=True, replicates=0), QUICK).scores


def test_a_run_without_the_name_of_an_embedding_says_how_to_probe_its_slides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "slides_mean__standin").mkdir(parents=True)
    (tmp_path / "run" / "slides_mean__standin" / "a.h5").touch()
    (tmp_path / "labels.csv").touch()
    words = ["probe", str(tmp_path / "run"), "--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "--embedding tile-mean" in capsys.readouterr().err


def write_targets(table: Path) -> Path:
    """The labels with a follow-up and an amount of each patient, which hang on the label that `default` knows."""
    generator = np.random.default_rng(5)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    of_patient: dict[str, dict[str, str]] = {}
    for row in rows:
        score = 4.0 * (row["label"] == "mutant") - 2.0
        time, end = generator.exponential(10 * np.exp(-score)), generator.uniform(0, 100)
        amount = 2 * score + generator.normal()
        target = {"days": f"{min(time, end):.3f}", "dead": str(int(time <= end)), "amount": f"{amount:.3f}"}
        row.update(of_patient.setdefault(row["patient_id"], target))
    write_rows(table, rows)
    return table


@pytest.mark.parametrize(
    ("how", "name", "picture"),
    [
        (["--survival", "days", "dead"], "harrell_c", "survival.png"),
        (["--regression", "amount"], "r2", "scatter.png"),
    ],
)
def test_a_task_of_times_or_amounts_is_probed(tmp_path: Path, how: list[str], name: str, picture: str) -> None:
    folder, table = write_run(tmp_path / "run", patients=100)
    write_targets(table)
    task, out = tmp_path / "task.yaml", tmp_path / "out"
    assert main(["init-task", str(table), *how, "--to", str(task)]) == 0
    given = ["--labels", str(table), "--embedding", "default", "--task", str(task), "--folds", "3", "--repeats", "2"]
    assert main(["probe", str(folder), *given, "--replicates", "10", "--out", str(out)]) == 0
    found = read_results(out / "results.json")
    assert list(found.scores) == ["tile-mean", "default", "site alone"]
    default, mean = found.scores["default"], found.scores["tile-mean"]
    assert default.unit == "patients" and default.headline.units == 100
    assert default[name].value > (0.65 if name == "harrell_c" else 0.5)
    assert default[name].value > mean[name].value + 0.1
    lead = default.leads["tile-mean"][name]
    assert lead.low < lead.value == pytest.approx(default[name].value - mean[name].value)
    assert default[name].low < default[name].value < default[name].high and name in default.headline.uncalibrated
    assert (out / picture).read_bytes().startswith(b"\x89PNG")
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 100  # slides a patient, repeats, embeddings
    assert {"predicted", "fold", "value" if name == "r2" else "risk"} <= set(rows[0])
    (shown,) = collect_results(out)
    assert sum(block["kind"] == "picture" for block in shown.blocks) == 1
    assert main(["compare", str(out), "--out", str(tmp_path / "compared")]) == 0
    with (tmp_path / "compared" / "differences.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["model"] == "default")
    assert (row["score"], row["minus"]) == (name, "tile-mean")  # as the probe itself has it, but for digits of the CSV
    assert [float(row[end]) for end in ("value", "low", "high", "p")] == pytest.approx(
        [lead.value, lead.low, lead.high, lead.p], abs=1e-4
    )
    assert "uncalibrated" in json.loads((tmp_path / "compared" / "differences.json").read_text())["covers"]


def test_a_task_of_classes_says_what_the_labels_mean(relabelled: tuple[Path, Path], tmp_path: Path) -> None:
    folder, table = relabelled
    with table.open() as file:
        rows = [
            {**row, "grade": str(int(row["slide_id"][1:3]) % 3), "label2": "01"[number % 2]}
            for number, row in enumerate(csv.DictReader(file))
        ]
    write_rows(table, rows)
    for name, *words in (("label",), ("grade", "--ordinal", "--label", "grade"), ("two", "--label", "label2", "grade")):
        assert main(["init-task", str(table), *words, "--to", str(tmp_path / f"{name}.yaml")]) == (name == "two")
    by_task = dataclasses.replace(QUICK, task=str(tmp_path / "label.yaml"))
    one, other = (probe_slides(folder, table, ProbeOptions(replicates=50), each) for each in (QUICK, by_task))
    assert one.scores["default"].to_dict() == other.scores["default"].to_dict()
    graded = probe_slides(folder, table, ProbeOptions(), dataclasses.replace(QUICK, task=str(tmp_path / "grade.yaml")))
    kappa = graded.scores["default"]["kappa_quadratic"]
    assert kappa.low < kappa.value < kappa.high and "quadratic-weighted kappa" in str(graded)


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Value and limits of each score of some evaluations."""
    every = {f"{which} {name}": each for which, one in found.items() for name, each in one.estimates.items()}
    return {f"{name} {end}": getattr(each, end) for name, each in every.items() for end in ("value", "low", "high")}


def test_a_probe_fitted_on_all_slides_is_tested_on_another_cohort(made: tuple[Path, Path], tmp_path: Path) -> None:
    """As with both in one table and a column of the split; where it is locked each test is counted."""
    folder, table = made
    with table.open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.csv", [row for row in rows if row["set"] == name])
    there = str(tmp_path / "test.csv")
    how = ProbeOptions(replicates=50, allow_missing=True)
    outside = SlideProbeOptions(embedding="default", test_embeddings=str(folder), test_labels=there, lock=True)
    found = probe_slides(folder, tmp_path / "train.csv", how, outside)
    split = probe_slides(folder, table, ProbeOptions(replicates=50, split="set"), QUICK)
    for name in ("default", "tile-mean", "chance"):
        one, other = found.scores[name], split.scores[name]
        assert figures(one.by_unit) == pytest.approx(figures(other.by_unit), nan_ok=True)
        assert figures(one.by_site) == pytest.approx(figures(other.by_site), nan_ok=True)
    assert any("first evaluation" in note for note in found.scores["default"].notes)
    again = probe_slides(folder, tmp_path / "train.csv", how, dataclasses.replace(outside, lock=None))
    assert any("evaluation 2 on it, of 1 head" in note for note in again.notes)
    write_rows(tmp_path / "test.csv", [row for row in rows if row["set"] == "test"][1:])
    with pytest.raises(ValueError, match="are not those that were locked"):
        probe_slides(folder, tmp_path / "train.csv", how, outside)
    (tmp_path / "test.csv.lock").unlink()
    write_rows(tmp_path / "test.csv", rows)
    with pytest.raises(ValueError, match="60 slides are in both"):
        probe_slides(folder, tmp_path / "train.csv", how, outside)


@pytest.mark.parametrize("amounts", [False, True])
def test_a_new_site_tells_nothing(relabelled: tuple[Path, Path], tmp_path: Path, amounts: bool) -> None:
    """Other shares of the classes at each site, so that the share among the others would rank them the wrong way."""
    folder, table = relabelled
    with table.open() as file:
        rows = [{**row, "site": "ABC"[int(row["slide_id"][1:3]) % 7 % 3]} for row in csv.DictReader(file)]
    generator, options = np.random.default_rng(0), dataclasses.replace(QUICK, folds="leave-site-out")
    for row in rows:
        row["amount"] = f"{'ABC'.index(row['site']) + generator.normal():.4f}"
        if row["site"] == "A" and int(row["slide_id"][1:3]) > 15:
            row["label"] = "mutant"
    write_rows(table, rows)
    if amounts:
        assert main(["init-task", str(table), "--regression", "amount", "--to", str(tmp_path / "task.yaml")]) == 0
        options = dataclasses.replace(options, task=str(tmp_path / "task.yaml"))
    alone = probe_slides(folder, table, ProbeOptions(), options).scores["site alone"]
    if amounts:
        assert np.isnan(alone["spearman"].value) or abs(alone["spearman"].value) < 1e-6
    else:
        assert alone["auroc"].value == 0.5


def test_ridge_regression_of_a_probe_equals_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    from gigapath.linear_probe.fits import _TargetFit

    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 12))
    y = x[:, 0] + generator.normal(size=60)
    rows = np.arange(40)
    task = Task("made", "regression", ("y",), label_column="y", loss="mse")
    fit = _TargetFit(task, x, y, rows)
    said = fit.logits(0.1).numpy()[:, 0] * fit.scale[1] + fit.scale[0]
    z = (x - x[rows].mean(axis=0)) / x[rows].std(axis=0)
    target = (y[rows] - y[rows].mean()) / y[rows].std()
    expected = Ridge(alpha=0.05 * 40).fit(z[rows], target).predict(z) * y[rows].std() + y[rows].mean()
    np.testing.assert_allclose(said, expected, atol=1e-5)


def test_models_that_know_nothing_have_no_correlation_over_folds() -> None:
    """Each says the mean of its training amounts, which is high where the held-out ones are low."""
    amounts = np.random.default_rng(0).normal(size=40)
    patients = np.arange(40).astype(str)
    task = Task("made", "regression", ("y",), label_column="y", loss="mse")
    folds = repeated_folds(np.zeros(40, np.int64), patients, 5, 2, seed=0)
    said = [np.full((40, 1), amounts[fold.train].mean()) for fold in folds]
    found, _ = held_out(folds, amounts, patients, ("y",), said, task=task)
    values = Scorer(found).plain()
    assert np.isnan(values["pearson"]) or abs(values["pearson"]) < 1e-9, "none is -0.4, as of the amounts themselves"
    assert values["r2"] < 0
