"""One draw of folds for every command: groups stay together, classes stay even, the same cohort gets the same folds."""

from pathlib import Path

import numpy as np
import pytest
from made_cohort import made_bag, write_csv, write_slide

from gigapath.evaluation.labels import Labels
from gigapath.evaluation.splits import check_classes, draw_folds, draw_parts
from gigapath.features import SlideEmbeddings
from gigapath.features import write_slide as write_slide_embedding
from gigapath.finetune.data import Inputs, Settings, prepare
from gigapath.finetune.options import JoinOptions, SplitOptions, TrainingOptions
from gigapath.linear_probe import ProbeOptions, SlideProbeOptions
from gigapath.linear_probe.slides import probe_slides
from gigapath.options import LEAVE_SITE_OUT

TASK = "name: made\nsetting: binary\nlabel_dict: {wild: 0, mutant: 1}\n"


def test_parts_keep_groups_together_and_classes_even() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 60, 300)
    truth = (groups % 4 == 0).astype(np.int64)  # a quarter of the groups
    part = draw_parts(truth, groups.tolist(), 5, seed=1)
    assert all(len(set(part[groups == group])) == 1 for group in set(groups.tolist()))
    for label in (0, 1):
        shares = np.bincount(part[truth == label], minlength=5) / (truth == label).sum()
        assert shares.min() > 0.15 and shares.max() < 0.25
    assert np.array_equal(part, draw_parts(truth, groups.tolist(), 5, seed=1))
    assert not np.array_equal(part, draw_parts(truth, groups.tolist(), 5, seed=2))


def test_the_order_of_the_rows_has_no_say() -> None:
    generator = np.random.default_rng(1)
    groups = generator.integers(0, 30, 80)
    truth = generator.integers(0, 3, 80)
    order = generator.permutation(80)
    part = draw_parts(truth, groups.tolist(), 4, seed=0)
    assert np.array_equal(draw_parts(truth[order], groups[order].tolist(), 4, seed=0), part[order])


@pytest.mark.parametrize(("seed", "patients_known"), [(0, True), (7, True), (3, False)])
def test_probe_and_finetune_hold_out_the_same_slides(tmp_path: Path, seed: int, patients_known: bool) -> None:
    """Rows in a drawn order, patients of one to three slides, classes in another order than the alphabet's; or no
    patients, and names in the rows that sort otherwise than those of the files."""
    generator = np.random.default_rng(seed)
    patients = [f"P{patient:02d}" for patient in range(30) for _ in range(1 + patient % 3)]
    rows = []
    for number, patient in enumerate(patients):
        place = (number * 7) % len(patients)
        slide_id = f"slide{place // 2:02d}" + "-x" * (place % 2)
        rows.append([slide_id + ".svs", "mutant" if int(patient[1:]) % 3 == 0 else "wild", patient])
        write_slide(tmp_path / "features" / f"{slide_id}.h5", *made_bag(number % 3, generator))
        vector = generator.normal(size=(1, 8))
        states = np.concatenate([vector, -vector])
        write_slide_embedding(
            tmp_path / "run" / "slides_made" / f"{slide_id}.h5",
            SlideEmbeddings(
                slide_id=slide_id,
                tile_mean=vector,
                states_mean=states,
                states_class=states,
                default_mean=vector,
                default_class=vector,
                attrs={"trained": True},
            ),
        )
    labels = write_csv(
        tmp_path / "labels.csv",
        ["slide_id", "label", "patient_id" if patients_known else "remark"],
        [rows[row] for row in generator.permutation(len(rows))],
    )
    (tmp_path / "task.yaml").write_text(TASK)

    cohort = prepare(
        Inputs(str(tmp_path / "task.yaml"), str(tmp_path / "features"), str(labels)),
        Settings(join=JoinOptions(id_rule="tcga"), split=SplitOptions(folds=4), training=TrainingOptions(seed=seed)),
    )
    finetuned = [{cohort.joined.files[row].stem for row in fold.test} for fold in cohort.folds]
    found = probe_slides(
        tmp_path / "run",
        labels,
        ProbeOptions(seed=seed, replicates=0),
        SlideProbeOptions(embedding="default", folds=4, repeats=1, id_rule="tcga"),
    )
    fold_of_row = np.asarray(found.scores["default"].predictions.folds)
    probed = [{found.data.ids[row] for row in found.rows[fold_of_row == fold]} for fold in range(4)]
    assert probed == finetuned
    assert sorted(slide_id for held_out in probed for slide_id in held_out) == sorted(
        row[0].removesuffix(".svs") for row in rows
    )
    if patients_known:
        patient_of = {row[0].removesuffix(".svs"): row[2] for row in rows}
        held = [{patient_of[slide_id] for slide_id in slides} for slides in probed]
        assert not any(held[one] & held[other] for one in range(4) for other in range(one))


def of_sites(sites: list[str] | None, truth: list[int], patients: list[str]) -> Labels:
    names = tuple(f"S{number}" for number in range(len(truth)))
    return Labels(names, np.array(truth), tuple(patients), sites and tuple(sites), "labels.csv", "digest")


def test_leaving_a_site_out_tests_it_whole_and_validates_on_patients_of_the_others() -> None:
    sites = [place for place in "bca" for _ in range(20)]
    patients = [f"P{number // 2}" for number in range(60)]
    labels = of_sites(sites, [number // 2 % 2 for number in range(60)], patients)
    folds = draw_folds(labels, LEAVE_SITE_OUT, seed=3)
    assert [fold.site for fold in folds] == ["a", "b", "c"]
    for fold in folds:
        assert {sites[row] for row in fold.test} == {fold.site} and len(fold.test) == 20
        assert fold.site not in {sites[row] for row in (*fold.train, *fold.val)}
        assert sorted([*fold.train, *fold.val, *fold.test]) == list(range(60))
        assert len(fold.val) == 8  # a fifth of the others
        assert not {patients[row] for row in fold.train} & {patients[row] for row in fold.val}
    again, other = (draw_folds(labels, LEAVE_SITE_OUT, seed=seed) for seed in (3, 4))
    assert all(np.array_equal(one.val, two.val) for one, two in zip(folds, again, strict=True))
    assert not all(np.array_equal(one.val, two.val) for one, two in zip(folds, other, strict=True))


@pytest.mark.parametrize(
    ("sites", "truth", "said"),
    [
        (None, [0, 1, 0, 1], "column of the site"),
        (["a", "a", "b", ""], [0, 1, 0, 1], "1 slides have no site"),
        (["a"] * 4, [0, 1, 0, 1], "two sites"),
        (["a", "b", "b", "b"], [0, 1, 0, 1], r"patients.*\(P0\)"),
    ],
)
def test_sites_that_cannot_be_left_out_are_refused(sites: list[str] | None, truth: list[int], said: str) -> None:
    labels = of_sites(sites, truth, ["P0", "P0", "P1", "P1"])
    with pytest.raises(ValueError, match=said):
        draw_folds(labels, LEAVE_SITE_OUT, seed=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_site_that_lacks_a_class_is_named(classes: int) -> None:
    """A note where others are left to tell apart, an error where none is."""
    truth = [number % classes for number in range(36)] + [number % (classes - 1) for number in range(12)]
    labels = of_sites([place for place in "abcd" for _ in range(12)], truth, [f"P{number}" for number in range(48)])
    folds, names = draw_folds(labels, LEAVE_SITE_OUT, seed=0), ("x", "y", "z")[:classes]
    if classes == 2:
        with pytest.raises(ValueError, match=r"site d.*one class only"):
            check_classes(folds, labels.truth, names)
    else:
        assert check_classes(folds, labels.truth, names) == ["fold 3 (site d): no test slide of z"]


def test_a_word_that_is_no_way_of_drawing_folds_is_refused() -> None:
    with pytest.raises(ValueError, match="--folds"):
        SplitOptions(folds="leave-sites-out")
