"""One reader of labels: missing values, numbers, Unicode, columns and ids mean the same in every command."""

import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from made_cohort import write_csv

from gigapath.evaluation.labels import (
    Task,
    alike_classes,
    class_notes,
    join_labels,
    load_task,
    new_task,
    patients_of,
    read_labels,
    sorted_classes,
)
from gigapath.linear_probe import ProbeOptions
from gigapath.linear_probe.data import LabelRows, class_names, named_column, rows_of_table
from gigapath.linear_probe.data import join_labels as join_tiles
from gigapath.linear_probe.slides import load_slides
from gigapath.tables import Table, parse_table, plain_number

TASK = Task("made", "binary", ("0", "1"))
MISSING = ["", "  ", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "#N/A", "<NA>", "NaT", "-nan", "#REF!"]


def tile_rows(path: Path, group: str | None = None) -> LabelRows:
    return rows_of_table(parse_table(path.read_bytes(), path.name), label="label", split=None, group=group)


@pytest.mark.parametrize("word", MISSING)
@pytest.mark.parametrize("column", ["slide_id", "label", "patient_id"])
def test_what_table_programs_write_for_a_missing_value_is_no_class_id_or_patient(
    tmp_path: Path, word: str, column: str
) -> None:
    rows = [{"slide_id": f"s{n}", "label": str(n % 2), "patient_id": f"p{n}"} for n in range(6)]
    rows[3][column] = word
    table = write_csv(tmp_path / "labels.csv", list(rows[0]), [list(row.values()) for row in rows])
    refused = f"row 5 has no {column}"
    with pytest.raises(ValueError, match=refused):
        read_labels(table, TASK)
    with pytest.raises(ValueError, match=refused):
        load_slides(tmp_path, table, ["default"], ProbeOptions())
    if column == "label":
        with pytest.raises(ValueError, match=refused):
            new_task(table, tmp_path / "task.yaml")
    tiles = write_csv(
        tmp_path / "tiles.csv",
        ["input", "label", "patient_id"],
        [[f"t{n}", *list(row.values())[1:]] for n, row in enumerate(rows)],
    )
    if column != "slide_id":
        with pytest.raises(ValueError, match=refused):
            tile_rows(tiles)


def test_missing_genes_and_sites_are_missing(tmp_path: Path) -> None:
    genes = write_csv(tmp_path / "genes.csv", ["slide_id", "TP53", "KRAS"], [["a", "1", "0"], ["b", "NA", "1"]])
    with pytest.raises(ValueError, match="row 3 has no TP53"):
        read_labels(genes, Task("made", "multi_label", ("TP53", "KRAS")))
    sites = write_csv(tmp_path / "sites.csv", ["slide_id", "label", "site"], [["a", 0, "nan"], ["b", 1, "x"]])
    assert read_labels(sites, TASK).sites == ("", "x")


def test_whole_numbers_with_a_decimal_point_are_the_same_class(tmp_path: Path) -> None:
    written = ["0", "1", "0.0", "1.0", "0.00", "1"]
    table = write_csv(
        tmp_path / "labels.csv", ["slide_id", "label"], [[f"s{n}", word] for n, word in enumerate(written)]
    )
    assert read_labels(table, TASK).truth.tolist() == [0, 1, 0, 1, 0, 1]
    task, counts = new_task(table, tmp_path / "task.yaml")
    assert task.classes == ("0", "1") and task.setting == "binary" and counts == {"0": 3, "1": 3}
    index, classes = class_names(written, None)
    assert classes == ("0", "1") and [index[word] for word in written] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("word", ["01", "1e0", "1_0", "+1", "1.", "1.50", "0x1", "inf", "1,0", "²", "\u0661"])
def test_text_that_resembles_a_number_stays_text(tmp_path: Path, word: str) -> None:
    assert sorted_classes([word, "1", "10"]) != ["1", "10"]
    index, classes = class_names([word, "1"], None)
    assert word in classes and index[word] != index["1"]
    table = write_csv(tmp_path / "labels.csv", ["slide_id", "label"], [["a", word], ["b", "1"], ["c", "1.0"]])
    task, _ = new_task(table, tmp_path / "task.yaml")
    assert set(task.classes) == {word, "1"} and load_task(tmp_path / "task.yaml") == task
    with pytest.raises(ValueError, match="row 2 has the label"):
        read_labels(table, TASK)


def test_classes_are_ordered_alike_everywhere(tmp_path: Path) -> None:
    written = ["10", "9", "0.5", "b", "a", "9.0"]
    table = write_csv(tmp_path / "l.csv", ["slide_id", "label"], [[f"s{n}", word] for n, word in enumerate(written)])
    assert (
        new_task(table, tmp_path / "t.yaml")[0].classes == class_names(written, None)[1] == ("0.5", "9", "10", "a", "b")
    )


@pytest.mark.parametrize(
    "names", [("Tumor", "tumor"), ("lymph node", "Lymph_Node"), ("grade-1", "grade 1"), ("ER +", "er+"), ("Ä.", "ä")]
)
def test_classes_that_differ_in_form_only_are_alike(names: tuple[str, str]) -> None:
    assert alike_classes(["other", *names]) == [list(names)]


@pytest.mark.parametrize("names", [("ER+", "ER-"), ("-1", "1"), ("1.5", "15"), ("3+4", "4+3"), ("<5", ">5")])
def test_classes_that_differ_in_a_sign_or_a_number_are_not(names: tuple[str, str]) -> None:
    assert alike_classes(names) == []


def test_alike_classes_and_classes_of_one_patient_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["tumor", "tumor", "normal", "normal", "normal", "Tumor"]
    rows = [[f"s{n}", word, f"p{n // 2}"] for n, word in enumerate(words)]
    table = write_csv(tmp_path / "labels.csv", ["slide_id", "label", "patient_id"], rows)
    new_task(table, tmp_path / "task.yaml")
    told = caplog.text
    assert "'Tumor' and 'tumor'" in told and "tumor has a single patient (p0)" in told and "normal has" not in told
    truth = np.array([[1, 0], [1, 1], [0, 1]])
    assert len(notes := class_notes(("TP53", "KRAS"), truth, ["a", "a", "b"], "slide")) == 1 and "TP53" in notes[0]


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,label, label\na,1,0\nb,0,1\n")
    for read in (
        lambda: read_labels(table, TASK),
        lambda: load_slides(tmp_path, table, ["default"], ProbeOptions()),
        lambda: new_task(table, tmp_path / "task.yaml"),
        lambda: tile_rows(table),
    ):
        with pytest.raises(ValueError, match="'label' stands in it twice"):
            read()
    # Columns without a name, as spreadsheets leave behind, are no column that is asked for.
    assert parse_table(b"slide_id,label,,\na,1,,\n", "l.csv").columns["label"] == ["1"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("slide_id,label\na,1\n".encode("utf-16-le"), "zero bytes.*CSV UTF-8"),
        (b"slide_id,label\na,1,\n", "2 values in row 2.* got 3. Correct the row"),
        (b"slide_id|label\na|1\n", "between bars"),
    ],
)
def test_a_table_of_another_form_is_refused_with_the_remedy(tmp_path: Path, content: bytes, reason: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_labels(table, TASK)


def test_blank_lines_above_the_header_are_passed_over_and_names_of_columns_cut() -> None:
    assert parse_table(b"\n\n,\nslide_id,label\na,1\n", "l.csv").numbers == (5,)
    table = parse_table(b"x" * 100_000 + b",y\n1,2\n", "l.csv")
    with pytest.raises(ValueError) as told:
        named_column(table, "label", (), "--label")
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(("cell", "number"), [("0.25", 0.25), ("-1e3", -1000), ("0_5", math.nan), ("\uff10", math.nan)])
def test_a_number_is_what_all_programs_read_as_one(cell: str, number: float) -> None:
    assert plain_number(cell) == pytest.approx(number, nan_ok=True)


def test_names_that_print_alike_meet(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Präparat-é") for form in ("NFC", "NFD"))
    assert composed != apart
    for in_rows, in_files in ((composed, apart), (apart, composed)):
        table = write_csv(tmp_path / "labels.csv", ["slide_id", "label"], [[in_rows, 1]])
        labels = read_labels(table, TASK)
        assert join_labels(labels, [tmp_path / f"{in_files}.h5"]).files == (tmp_path / f"{in_files}.h5",)
        rows = LabelRows([in_rows], ["1"], ["train"], None, "labels.csv")
        assert join_tiles([f"train/{in_files}"], ["train"], rows, allow_missing=False).rows == [0]
    classes = write_csv(tmp_path / "classes.csv", ["slide_id", "label"], [["a", composed], ["b", apart], ["c", "x"]])
    assert len(new_task(classes, tmp_path / "task.yaml")[0].classes) == 2


@pytest.mark.parametrize(
    "words", [("no", "yes"), ("off", "on"), ("n", "y"), ("False", "True"), ("null", "~"), ("01", "1e3")]
)
def test_labels_of_a_task_file_are_read_as_they_are_written(tmp_path: Path, words: tuple[str, str]) -> None:
    (tmp_path / "task.yaml").write_text(f"name: t\nsetting: binary\nlabel_dict:\n  {words[0]}: 0\n  {words[1]}: 1\n")
    assert load_task(tmp_path / "task.yaml").classes == words


def test_byte_order_mark_is_no_part_of_a_column_and_semicolons_are_told(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes("\ufeffslide_id,label\na,1\n".encode())
    assert read_labels(table, TASK).slide_ids == ("a",)
    table.write_bytes(b"slide_id;label\na;1\n")
    with pytest.raises(ValueError, match="semicolons"):
        read_labels(table, TASK)
    table.write_bytes("slide_id,label\na,1\n".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_labels(table, TASK)


def test_patients_come_from_the_first_usual_column_or_from_barcodes() -> None:
    ids = ["TCGA-55-0001-01A.x", "TCGA-55-0001-02A.y", "TCGA-55-0002-01A.z"]
    table = Table("l.csv", {"slide_id": ids, "case_id": ["c", "c", "d"], "pat_id": ["p", "p", "q"]})
    assert patients_of(table, None, ids, "exact") == ("pat_id", ["p", "p", "q"])
    assert patients_of(table, "case_id", ids, "exact") == ("case_id", ["c", "c", "d"])
    bare = Table("l.csv", {"slide_id": ids})
    assert patients_of(bare, None, ids, "tcga")[1] == ["TCGA-55-0001", "TCGA-55-0001", "TCGA-55-0002"]
    assert patients_of(bare, None, ids, "exact") == patients_of(bare, None, ["a", *ids[1:]], "tcga") == (None, None)
