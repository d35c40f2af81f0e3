"""`gigapath plan`: what a cohort is made of, from headers alone; suspects among files and ids; the pilot."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from made_slides import paint_tissue, write_pyramid

from gigapath.cli.main import main
from gigapath.cohort.manifest import SlideEntry
from gigapath.embedding.preflight import identical_files, missing_bytes, odd_id, read_headers, stratified
from gigapath.preprocessing.slide import Slide
from gigapath.preprocessing.tiling import TileOptions


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of nine slides: two scales, no scale, contradictions, a broken one, one cut short, the same twice."""
    folder = tmp_path_factory.mktemp("cohort")
    image = paint_tissue(700, 500)
    write_pyramid(folder / "half.tif", image, mpp=(0.5, 0.5), steps=(1, 2))
    write_pyramid(folder / "quarter.svs", image, mpp=(0.25, 0.25), steps=(1,), aperio=True, objective=40)
    write_pyramid(folder / "none.tif", image, mpp=None, steps=(1,))
    write_pyramid(folder / "wrong.svs", image, mpp=(0.5, 0.5), steps=(1,), aperio=True, objective=40)
    write_pyramid(folder / "apart.tif", image, mpp=(0.5, 0.6), steps=(1,))
    (folder / "broken.svs").write_text("no slide")
    shutil.copy(folder / "half.tif", folder / "again.tif")
    rows = [
        "half.tif,half,,n",
        "quarter.svs,quarter,,n",
        "none.tif,scaleless,,s",
        "wrong.svs,wrong,,s",
        "apart.tif,apart,,s",
    ]
    rows += ["apart.tif,apart,,s", "broken.svs,broken,,s", "again.tif,again,,s", "gone.svs,gone,,s"]
    rows += ["half.tif,Doe_Jane 2021-03-04,0.4,s"]
    (folder / "cohort.csv").write_text("\n".join(["path,slide_id,mpp,site", *rows]) + "\n")
    return folder / "cohort.csv"


def test_survey_tells_what_the_headers_say(cohort: Path) -> None:
    found, entries = read_headers([cohort], TileOptions(tile_size=64))
    headers = {header.slide_id: header for header in found.headers}
    assert len(entries) == 9
    assert found.native_mpp() == {0.25: 1, 0.4: 1, 0.5: 2, 0.55: 1}
    assert headers["quarter"].vendor == "aperio"
    assert headers["half"].places == 10 * 7, "whole tiles of 64 px on 700 x 500"
    problems = {slide_id: header.mpp_problem for slide_id, header in headers.items() if header.mpp_problem}
    assert problems == {
        "scaleless": "missing",
        "wrong": "implausible",
        "apart": "x 0.5 and y 0.6 differ",
        "Doe_Jane 2021-03-04": "manifest says 0.4, the file 0.5",
    }
    assert {slide_id for slide_id, header in headers.items() if header.error} == {
        "scaleless",
        "wrong",
        "broken",
        "gone",
    }
    assert "expected a slide that OpenSlide reads" in headers["broken"].error
    assert found.duplicates == (("Doe_Jane 2021-03-04", "again", "half"),)
    assert found.odd_ids == {"Doe_Jane 2021-03-04": "a date"}
    assert found.id_problems == ()


def test_survey_says_what_is_missing_in_words_and_waits_for_no_pipe(cohort: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        os.mkfifo(tmp_path / f"{name}.tif")
    found, entries = read_headers([cohort, tmp_path], TileOptions(tile_size=64))
    errors = {header.slide_id: header.error for header in found.headers}
    assert errors["gone"] == "expected a slide file, got none of the name 'gone'."
    assert errors["one"].startswith("expected a slide file, got a pipe")
    assert identical_files(entries) == list(found.duplicates)


def test_survey_lists_every_collision_of_ids(cohort: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for slide in ("half.tif", "apart.tif"):
            shutil.copy(cohort.parent / slide, tmp_path / name / slide)
    found, _ = read_headers([tmp_path], TileOptions())
    assert len(found.id_problems) == 2
    assert all("two slides have the id" in problem for problem in found.id_problems)


def test_odd_id_sees_names_and_dates() -> None:
    for kind, ids in {
        "a date": ("2021-03-04 scan", "A_04.03.2021", "x20210304"),
        "a name": ("Doe, Jane", "MUELLER_Anna_3", "maria lopez"),
        None: ("CMU-1-Small-Region", "TCGA-CR-7395-01A-01-TS1.0f1e2021", "PROV-000-000001", "20211399", "lung tumor 3"),
    }.items():
        assert [odd_id(slide_id) for slide_id in ids] == [kind] * len(ids)


def test_identical_files_are_compared_to_the_last_byte(tmp_path: Path) -> None:
    content = bytes(np.random.default_rng(0).integers(0, 256, 400_000, np.uint8))
    other = bytearray(content)
    other[150_000] ^= 1  # between the pieces of the cheap look
    for name, data in {"a": content, "b": content, "c": bytes(other), "d": content[:-1]}.items():
        (tmp_path / name).write_bytes(data)
    entries = [SlideEntry(name, tmp_path / name) for name in ("d", "c", "b", "a", "gone")]
    assert identical_files(entries) == [("a", "b")]


@pytest.mark.parametrize("bigtiff", [False, True])
def test_missing_bytes_knows_a_tiff_that_was_cut_short(tmp_path: Path, bigtiff: bool) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as file:  # directory first, pixels behind it
        for side in (300, 150):  # the smaller one in a SubIFD, as OME-TIFFs keep their levels
            level = np.zeros((side, side + 10, 3), np.uint8)
            file.write(level, tile=(48, 48), photometric="rgb", subifds=int(side == 300), metadata=None)
    whole = path.read_bytes()
    assert missing_bytes(path) == 0
    for lacking in (1, 100, 40_000):
        path.write_bytes(whole[:-lacking])
        assert missing_bytes(path) == lacking
    for length in (0, 3, 8, 15, 30, 100):  # nothing that can be followed
        path.write_bytes(whole[:length])
        assert missing_bytes(path) >= 0
    path.write_bytes(whole[:8] + b"\xff" * 200)
    assert missing_bytes(path) == 0


def test_broken_tags_are_not_quoted_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as where nobody set up logging
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(32, 32), photometric="rgb", software="Jane Doe")
    path.write_bytes(path.read_bytes().replace(b"Jane Doe", b"Jane D\x90\x81"))  # which no code page holds
    assert missing_bytes(path) == 0
    assert capsys.readouterr().err == ""


def test_stratified_takes_every_kind_and_then_in_proportion() -> None:
    strata = ["a"] * 80 + ["b"] * 15 + ["c"] * 4 + ["d"]
    chosen = stratified(strata, 20)
    counts = {name: sum(strata[index] == name for index in chosen) for name in "abcd"}
    assert len(set(chosen)) == 20 and counts == {"a": 16, "b": 2, "c": 1, "d": 1}
    assert [strata[index] for index in stratified(strata, 2)] == ["a", "b"]
    assert stratified(["a", "b"], 9) == [0, 1]


def test_plan_prints_json_and_the_pilot_tiles_one_slide_of_each_kind(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", str(cohort), "--tile-size", "64", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Slide, "_read_rgba", lambda *_, **__: pytest.fail("pixels were read"))
        assert main(words) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["slides"], found["refused"], found["hours"]) == (9, 4, None)
    assert found["duplicates"] == [["Doe_Jane 2021-03-04", "again", "half"]]
    assert str(cohort.parent) not in json.dumps(found)
    assert main([*words, "--pilot", "3", "--out", str(tmp_path)]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["piloted"] == 3 and 0.1 < found["tissue_share"] < 0.9
    assert len(list((tmp_path / "previews").glob("*.jpg"))) == len(list((tmp_path / "tiles").glob("*.h5"))) == 3
    assert (tmp_path / "contact_sheet.jpg").is_file()
