"""Tasks, labels, splits and bags of fine-tuning: what is read, what is refused, in one sentence each."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from feature_files import write_clam, write_published, write_stamp, write_trident
from made_cohort import made_bag, write_cohort, write_csv, write_slide, write_task

from gigapath.evaluation.labels import Labels, join_labels, load_task, new_task, read_labels
from gigapath.evaluation.splits import Fold, audit, check_classes, draw_folds, keep_manifest, read_splits
from gigapath.features import FeatureFileError
from gigapath.finetune.data import FileBags, Inputs, Settings, look_at_all, prepare
from gigapath.finetune.dataset import BagDataset
from gigapath.finetune.options import JoinOptions

MUTATION_HEADER = ["id", "file_name", "slide_id", "case_id", "EGFR", "KRAS", "TP53", "FAT1", "LRP1B", "pat_id"]


SURVIVAL = (
    ("survival\ntime_column: a\nevent_column: b", "horizons, which is not there"),
    ("survival\ntime_column: a\nevent_column: b\nhorizons: [3, 2]", "rising times above 0"),
    ("survival\ntime_column: a\nevent_column: b\nhorizons: [3]\nloss: mse", "loss cox or discrete"),
    ("regression\nlabel_column: [a]", "label_column to name a column"),
    ("regression", "label_column, which is not there"),
)


def labels_of(folder: Path, header: list[str], rows: list, task: object = "panda", **how: str) -> Labels:
    return read_labels(write_csv(folder / "l.csv", header, rows), load_task(task), **how)


def mutation_rows(patients: int = 24, each: int = 3) -> list[list[object]]:
    """Rows like those of the published table: several slides a patient, True and False under the genes."""
    random = np.random.default_rng(0)
    rows = []
    for patient in range(patients):
        genes = [bool(flag) for flag in random.random(5) < 0.5]
        for slide in range(each):
            name = f"TCGA-55-{patient:04d}-01A-0{slide}-TS1"
            rows.append([f"uuid-{patient}-{slide}", f"{name}.f6baa937-{slide}.svs", name, "c", *genes, f"pat{patient}"])
    return rows


def test_tasks_are_the_published_ones_or_written_by_init_task(tmp_path) -> None:
    panda, mutation = load_task("panda"), load_task("mutation_5_gene")
    assert (panda.setting, panda.classes, panda.ordinal) == ("multi_class", tuple("012345"), True)
    assert (mutation.setting, mutation.classes) == ("multi_label", ("EGFR", "FAT1", "KRAS", "LRP1B", "TP53"))
    labels = write_csv(tmp_path / "grades.csv", ["image_id", "isup_grade"], [[f"s{n}", n % 11] for n in range(44)])
    task, counts = new_task(labels, tmp_path / "task.yaml", ordinal=True)
    assert task == load_task(tmp_path / "task.yaml")
    assert task.classes == tuple(map(str, range(11))) and task.ordinal and counts["10"] == 4
    with pytest.raises(ValueError, match="already"):
        new_task(labels, tmp_path / "task.yaml")
    several = write_csv(tmp_path / "genes.csv", MUTATION_HEADER, mutation_rows())
    task, _ = new_task(several, tmp_path / "genes.yaml", columns=["TP53", "KRAS"])
    assert (task.setting, task.classes) == ("multi_label", ("TP53", "KRAS"))


def test_labels_of_kaggle_and_of_the_published_table_read_alike(tmp_path) -> None:
    rows = [["s1", "karolinska", 3], ["s2", "radboud", 0]]
    published = labels_of(tmp_path, ["slide_id", "data_provider", "label"], rows)
    kaggle = ["image_id", "data_provider", "isup_grade", "gleason_score"]
    read = labels_of(tmp_path, kaggle, [[*row, "3+4"] for row in rows])
    assert read.slide_ids == published.slide_ids == ("s1", "s2") and read.truth.tolist() == [3, 0]
    assert read.sites == ("karolinska", "radboud") and read.digest == published.digest


def test_rows_meet_files_by_barcode_or_pattern_and_missing_slides_are_named(tmp_path) -> None:
    rows = mutation_rows()
    labels = labels_of(tmp_path, MUTATION_HEADER, rows, "mutation_5_gene")
    files = [tmp_path / (str(row[1]).removesuffix(".svs") + ".h5") for row in rows]
    for how in ({"id_rule": "tcga"}, {"id_regex": r"^(TCGA-[\w-]+?-TS1)"}):
        joined = join_labels(labels, files, **how)
        assert joined.files == tuple(files) and not joined.missing and not joined.unlabelled
    assert labels.patients is not None and len(set(labels.patients)) == 24
    with pytest.raises(ValueError, match="none of its 72 slides"):
        join_labels(labels, files)
    bare = [[*row[:3], "c", *row[4:9]] for row in rows]
    assert labels_of(tmp_path, MUTATION_HEADER[:-1], bare, "mutation_5_gene", id_rule="tcga").patients is not None
    labels = labels_of(tmp_path, ["slide_id", "label"], [["a", 0], ["b", 1]])
    with pytest.raises(ValueError, match=r"1 of 2 slides have no features \(b\).*--allow-missing"):
        join_labels(labels, [tmp_path / "a.h5"])
    joined = join_labels(labels, [tmp_path / "a.h5", tmp_path / "z.h5"], allow_missing=True)
    assert (joined.missing, joined.unlabelled, joined.labels.slide_ids) == (("b",), ("z.h5",), ("a",))


def test_slides_without_tiles_count_as_slides_without_features(tmp_path) -> None:
    features, labels = write_cohort(tmp_path, [0, 1] * 6)
    write_slide(features / "slide-003.h5", *(part[:0] for part in made_bag(0, np.random.default_rng(0))))
    inputs = Inputs(str(write_task(tmp_path / "t.yaml", classes=2)), str(features), str(labels), pretrained="")
    with pytest.raises(ValueError, match=r"slides without tiles.*1 \(slide-003\).*--allow-missing"):
        prepare(inputs, Settings())
    joined = prepare(inputs, Settings(join=JoinOptions(allow_missing=True))).joined
    assert len(joined.files) == 11 and joined.missing == ("slide-003",)
    assert len(BagDataset(features, labels, allow_missing=True)) == 11


def read_folds(folder: Path, labels: Labels, **sets) -> list[Fold]:
    """The folds of split files of rows."""
    (folder / "splits").mkdir(exist_ok=True)
    for path in (folder / "splits").iterdir():
        path.unlink()
    for name, rows in sets.items():
        write_csv(folder / "splits" / f"{name}_0.csv", ["slide_id"], [[labels.slide_ids[row]] for row in rows])
    return read_splits(folder / "splits", labels)


def test_patients_slides_and_twins_in_two_sets_are_found(tmp_path) -> None:
    def leaks(folds, prints, *, drawn: bool = False, allow_leakage: bool = False) -> list[str]:
        how = {"patients": labels.patients, "drawn": drawn, "allow_leakage": allow_leakage}
        return audit(folds, labels.slide_ids, fingerprints=prints, **how)

    labels = labels_of(tmp_path, MUTATION_HEADER, mutation_rows(), "mutation_5_gene")
    random, prints = np.random.default_rng(1).permutation(len(labels)), list(map(str, range(len(labels))))
    folds = read_folds(tmp_path, labels, train=random[:48], test=random[48:])
    with pytest.raises(ValueError, match="patients in both sets"):
        leaks(folds, prints)
    assert "patients in both sets" in leaks(folds, prints, allow_leakage=True)[0]
    grouped = draw_folds(labels, 4, seed=0)
    assert leaks(grouped, prints, drawn=True) == []
    twins = [prints[0], prints[1], prints[0], prints[0], *prints[4:]]  # rows 0 to 2 are of one patient, row 3 is not
    with pytest.raises(ValueError, match="identical slides"):
        leaks(grouped, twins, drawn=True)
    assert check_classes(grouped, labels.truth, load_task("mutation_5_gene").classes) == []
    labels = labels_of(tmp_path, ["slide_id", "label"], [[f"s{n}", n % 6] for n in range(12)])
    with pytest.raises(ValueError, match=r"1 slides in both sets, train and test \(s11\)"):
        leaks(read_folds(tmp_path, labels, train=[*range(8), 11], test=range(8, 12)), list("abcdefghijkl"))
    with pytest.raises(ValueError, match=r"identical slides in both sets, train and test \(s0, s9\)"):
        leaks(read_folds(tmp_path, labels, train=range(8), test=range(8, 12)), list("abcdefghiaxy"))


def test_folds_are_stratified_grouped_seeded_and_kept_for_the_same_labels(tmp_path) -> None:
    header, task = ["slide_id", "label", "patient_id"], write_task(tmp_path / "t.yaml")
    rows = [[f"s{n}", [0, 0, 0, 1, 2][n // 2 % 5], f"p{n // 2}"] for n in range(60)]
    labels = labels_of(tmp_path, header, rows, task)
    folds, again, other = (draw_folds(labels, 3, seed=seed) for seed in (4, 4, 5))
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(60))
    for fold in folds:
        counts = np.bincount(labels.truth[fold.test], minlength=3)
        assert (np.abs(counts - [12, 4, 4]) <= 2).all(), counts
        patients = [{labels.patients[row] for row in part} for part in fold.sets().values()]
        assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])
        assert len(fold.train) + len(fold.val) + len(fold.test) == 60
    assert all(np.array_equal(a.test, b.test) for a, b in zip(folds, again, strict=True))
    assert not all(np.array_equal(a.test, b.test) for a, b in zip(folds, other, strict=True))
    digest = keep_manifest(tmp_path / "out", folds, labels, {"seed": 0})
    assert keep_manifest(tmp_path / "out", folds, labels, {"seed": 0}) == digest
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["slides"] == 60
    with pytest.raises(ValueError, match="another split"):
        keep_manifest(tmp_path / "out", draw_folds(labels, 4, seed=0), labels, {"seed": 0})
    rows[0][1] = 2
    with pytest.raises(ValueError, match="have changed"):
        keep_manifest(tmp_path / "out", folds, labels_of(tmp_path, header, rows, task), {"seed": 0})


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({"train": [0, 1, 2]}, "no test split"),
        ({"test": [0, 1]}, "no train_0.csv"),
        ({"train": [0, 1, 3, 4], "test": [2, 5]}, "no training slide teaches 2"),
        ({"train": [0, 1, 2], "test": [3, 6]}, "one class only"),
        ({"train": [0, 1, 2], "test": []}, "rows below|none of its"),
    ],
)
def test_splits_that_cannot_be_learned_or_tested_are_refused(tmp_path, sets, match) -> None:
    task = write_task(tmp_path / "t.yaml")
    labels = labels_of(tmp_path, ["slide_id", "label"], [[f"s{n}", n % 3] for n in range(9)], task)
    with pytest.raises(ValueError, match=match):
        check_classes(read_folds(tmp_path, labels, **sets), labels.truth, load_task(task).classes)


def test_options_need_no_torch() -> None:
    code = "import sys, gigapath.finetune.options, gigapath.finetune.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: x\nsetting: multi_class\nlabel_dict: {a: 0, b: 1}\nlabel_dic: 1", "unknown key label_dic"),
        ("name: x\nsetting: multi_klass\nlabel_dict: {a: 0, b: 1}", "setting"),
        ("name: x\nsetting: binary\nlabel_dict: {a: 0, b: 1, c: 2}", "two labels"),
        ("name: x\nsetting: multi_class\nlabel_dict: {a: 0, b: 2}", "0 to 1"),
        ("name: x\nsetting: multi_class", "label_dict"),
        ("name: x\nsetting: multi_class\nlabel_dict: {a: 0, b: 1}\nmax_tiles: 0", "max_tiles"),
        ("- a\n- b", "keys and values"),
        (
            "name: x\nsetting: multi_class\nlabel_dict: {" + ", ".join(f"c{n}: {n}" for n in range(10_001)) + "}",
            "at most 10,000 labels",
        ),
        (
            "a0: &a0 {x: 1}\n"
            + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)),
            "expected YAML",
        ),
        ("name: " + "x" * 2_000_000, "at most 2,000,000 bytes"),
        *((f"name: x\nsetting: {more}", match) for more, match in SURVIVAL),
        ("name: [", r"^task.yaml: expected YAML, got something else in line 1\. Correct it, or write"),
    ],
)
def test_task_files_that_are_off_are_refused(tmp_path, text, match) -> None:
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(ValueError, match=match):
        load_task(tmp_path / "task.yaml")


def test_bags_of_every_tool_come_to_one_frame(tmp_path) -> None:
    features, cells = made_bag(1, np.random.default_rng(0))
    for number, write in enumerate((write_trident, write_clam, write_stamp, write_published)):
        folder = tmp_path / str(number)
        path = write(folder, features, cells)
        facts = look_at_all([path], JoinOptions())
        assert (facts[0].tiles, facts[0].width) == (12, 8)
        # Only the published form needs what is stated; CLAM's step stands in a second file.
        bag = FileBags([path], facts, 512 if write is write_clam else 256)[0]
        assert np.array_equal(bag.coords, cells * 256), write.__name__
        assert np.abs(bag.features - features).max() < 2e-3
    with pytest.raises(FeatureFileError, match="tile-size-level0"):
        FileBags([path], facts, None)[0]


def test_bad_feature_files_are_named_and_never_replaced(tmp_path) -> None:
    features, cells = made_bag(0, np.random.default_rng(0))
    good = write_slide(tmp_path / "good.h5", features, cells)
    wide = write_slide(tmp_path / "wide.h5", np.pad(features, ((0, 0), (0, 3))), cells)
    with pytest.raises(FeatureFileError, match=r"wide\.h5"):
        look_at_all([good, wide], JoinOptions())
    empty = write_slide(tmp_path / "empty.h5", features[:0], cells[:0])
    with pytest.raises(FeatureFileError, match=r"empty\.h5"):
        look_at_all([good, empty], JoinOptions())
    features[3, 2] = np.nan
    nan = write_slide(tmp_path / "nan.h5", features, cells)
    bags = FileBags([good, nan], look_at_all([good, nan], JoinOptions()), None)
    with pytest.raises(FeatureFileError, match=r"nan.h5: .*row 3"):
        [bags[row] for row in (0, 1, 0)]
    far = write_slide(tmp_path / "far.h5", np.nan_to_num(features), cells + 2000)
    with pytest.raises(FeatureFileError, match=r"far\.h5"):
        FileBags([far], look_at_all([far], JoinOptions()), None)[0]


def test_features_of_another_make_are_refused(tmp_path) -> None:
    bag = made_bag(0, np.random.default_rng(0))
    paths = [
        write_slide(tmp_path / f"{n}.h5", *bag, encoder=name, mpp=0.5) for n, name in enumerate(["gigapath", "uni"])
    ]
    with pytest.raises(FeatureFileError, match="its encoder is uni"):
        look_at_all(paths, JoinOptions())
    assert len(look_at_all(paths, JoinOptions(allow_mixed=True))) == 2
    near = [write_slide(tmp_path / f"m{n}.h5", *bag, mpp=mpp) for n, mpp in enumerate([0.5, 0.502, 0.25])]
    assert len(look_at_all(near[:2], JoinOptions())) == 2
    with pytest.raises(FeatureFileError, match=r"its mpp is 0\.25"):
        look_at_all(near, JoinOptions())


def test_scanners_are_those_of_the_table_then_of_the_run_then_of_the_files(tmp_path) -> None:
    features, labels = write_cohort(tmp_path / "c", [n % 2 for n in range(24)], scanner="of the file")
    inputs = Inputs(str(write_task(tmp_path / "t.yaml", classes=2)), str(features), str(labels))

    def scanners() -> tuple[str, ...]:
        return prepare(inputs, Settings()).joined.labels.strata["scanner"]

    assert set(scanners()) == {"of the file"}
    write_csv(tmp_path / "c" / "slides.csv", ["slide_id", "scanner"], [["slide-003", "of the run"]])
    assert scanners()[3] == "of the run" and set(scanners()) == {"of the run", ""}
    header, *lines = labels.read_text().splitlines()
    labels.write_text("\n".join([header + ",scanner", *(line + ",of the table" for line in lines)]))
    assert set(scanners()) == {"of the table"}
