"""Slides whose names can't be ids: each fails with a sentence, under its name with escapes, and the others are done."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from broken_inputs import good_slide
from conftest import table
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import mean_colour_encoder

from gigapath.cli.main import main
from gigapath.cohort.manifest import find_slides
from gigapath.cohort.record import recorded_paths
from gigapath.cohort.status import read_status
from gigapath.file_names import MAX_NAME_BYTES, name_problem, quoted_name
from gigapath.files import is_hidden

# The file's name -> the slide's id and some words of its reason.
BAD = {
    "line\nend.tif": (r"line\nend", "without control characters such as line ends"),
    "tab\t and \x07.tif": (r"tab\t and \x07", "without control characters"),
    "back\\slash.tif": (r"back\\slash", "without slashes"),
    " first.tif": (r"\x20first", "no space at its ends"),
    "last .tif": (r"last\x20", "no space at its ends"),
    f"{'ä' * 100}.tif": (None, "at most 180 bytes"),
}
SMALL = ["--tile-size", "64", "--workers", "0"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: mean_colour_encoder())


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good slides, and good slides under bad names."""
    folder = tmp_path_factory.mktemp("slides")
    content = good_slide(folder, "good.tif").read_bytes()
    for name in (*BAD, "also.tif"):
        (folder / name).write_bytes(content)
    if sys.platform == "linux":
        Path(os.fsdecode(bytes(folder) + b"/not-\xff-utf8.tif")).write_bytes(content)
    return folder


def expected() -> set[str]:
    names = {slide_id or quoted_name(name.removesuffix(".tif")) for name, (slide_id, _) in BAD.items()}
    return names | ({r"not-\udcff-utf8"} if sys.platform == "linux" else set())


def test_slides_with_bad_names_fail_each_with_a_sentence_and_the_others_are_done(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["embed", str(slides), "--out", str(out), *SMALL, "--tile-encoder", "standin", "--device", "cpu"]
    assert main(words) == 3
    said = capsys.readouterr()
    rows = table(out)
    assert {name for name, row in rows.items() if row["status"] == "done"} == {"good", "also"}
    assert {name for name, row in rows.items() if row["status"] == "failed"} == expected()
    for name, (slide_id, reason) in BAD.items():
        row = rows[slide_id or quoted_name(name.removesuffix(".tif"))]
        assert reason in row["error"] and row["error"].endswith("Rename the file, or give it a slide_id in a manifest.")
    for line in (said.out + said.err).splitlines():
        assert line.isprintable(), line
    assert {path.name for path in (out / "tiles").iterdir()} == {
        *(f"{name}.json" for name in rows), "good.h5", "also.h5",
    }  # fmt: skip
    for file in [*out.rglob("*.json"), *out.rglob("*.csv")]:
        assert file.read_text(encoding="utf-8").replace("\n", "").isprintable(), file
    listed = (out / "private/paths.csv").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 1 + len(rows)
    assert {entry.slide_id: entry.path for entry in recorded_paths(out)}[r"line\nend"] == slides / "line\nend.tif"

    # Nothing done is done again, and these fail anew.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
    assert main(words) == 3 and main([*words, "--only", "failed"]) == 3
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")} == before
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr()
    assert r"line\nend" in said.out and "without control characters" in said.out

    assert main(["remove", r"line\nend", str(out)]) == 0
    assert r"line\nend" not in table(out) and read_status(out / "tiles", r"line\nend") is None
    assert not any(r"line\nend" in path.read_text() for path in out.rglob("*.csv"))
    assert not any(r"line\\nend" in path.read_text() for path in out.rglob("*.json"))
    assert table(out).keys() == {"good", "also"} | expected() - {r"line\nend"}


def test_a_manifest_s_bad_ids_and_paths_fail_their_rows_alone(tmp_path: Path) -> None:
    good_slide(tmp_path, "good.tif")
    ids = ["a/b", "../up", "..", "/abs", "a\\b", "line\nend", "z\0ero", "y" * 300]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "slide_id", "site"])
        rows.writerows([["good.tif", name, "north"] for name in (*ids, "good")])
        rows.writerows([["zero\0.tif", "", ""], ["z" * 5000 + ".tif", "long", ""], ["d/" * 3000 + "x.tif", "", ""]])
    out = tmp_path / "out"
    before = set(tmp_path.rglob("*"))
    assert main(["tile", str(tmp_path / "m.csv"), "--out", str(out), *SMALL]) == 3
    found = table(out)
    names = {*map(quoted_name, ids), r"zero\x00", "long", "x"}
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(names, "failed") | {"good": "done"}
    for name in ids:
        row = found[quoted_name(name)]
        assert row["error"].endswith("Give it another slide_id in the manifest.") and row["site"] == "north"
    assert "one with a zero byte" in found[r"zero\x00"]["error"]
    assert "one that is too long" in found["long"]["error"] and "one that is too long" in found["x"]["error"]
    assert all(path.is_relative_to(out) for path in set(tmp_path.rglob("*")) - before)


def test_two_slides_of_one_bad_name_still_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "line\nend.tif").write_bytes(b"x")
    assert main(["tile", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and r"two slides have the id 'line\nend'" in said and r"x/line\nend.tif" in said


def test_shards_pseudonyms_and_plan_know_slides_with_bad_names(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tile = ["tile", str(slides), *SMALL]
    assert main([*tile, "--out", str(tmp_path / "out"), "--shard", "1/2"]) in (0, 3)
    assert main([*tile, "--out", str(tmp_path / "out"), "--shard", "2/2"]) in (0, 3)
    found = table(tmp_path / "out")
    assert {name for name, row in found.items() if row["status"] == "failed"} == expected()
    assert {name for name, row in found.items() if row["status"] == "done"} == {"good", "also"}

    (tmp_path / "key").write_bytes(b"0123456789abcdef")
    out = tmp_path / "keyed"
    assert main([*tile, "--out", str(out), "--pseudonymise", str(tmp_path / "key")]) == 3
    rows = table(out)
    assert sorted(row["status"] for row in rows.values()) == ["done"] * 2 + ["failed"] * len(expected())
    assert all(name.isalnum() for name in rows)
    originals = {entry.original_id for entry in recorded_paths(out)}
    assert originals == {"good", "also"} | expected()
    embed = ["embed", "--tiles", str(out), "--out", str(out), "--tile-encoder", "standin", "--device", "cpu"]
    assert main([*embed, *SMALL]) == 3
    failed = [status for name in rows if (status := read_status(out / "features_mean-colour", name)).status == "failed"]
    assert len(failed) == len(expected()) and all("slide id: expected" in status.error for status in failed)

    capsys.readouterr()
    assert main(["plan", str(slides), "--json"]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert plan["unreadable"].keys() == expected() and plan["id_problems"] == []
    assert main(["plan", str(slides)]) == 3
    assert r"line\nend" in (said := capsys.readouterr().out) and said.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", [".a", "._a", "~$a", "a.tmp", ".tmp"])
def test_an_id_under_which_files_would_be_hidden_is_none(name: str) -> None:
    assert is_hidden(f"{name}.h5") and "hides no file" in str(name_problem(name))
    assert not is_hidden(f"{quoted_name(name)}.h5")


@settings(derandomize=True, deadline=None, max_examples=300)
@given(name=st.text(st.characters(max_codepoint=0x3000) | st.sampled_from("\\/.\n\udc80 "), max_size=120))
def test_quoted_names_are_fit_for_files_and_lines_and_never_one_that_is_taken(name: str) -> None:
    if name_problem(name) is None:
        return
    quoted = quoted_name(name)
    assert "/" not in quoted and quoted not in (".", "..") and len(quoted.encode()) <= MAX_NAME_BYTES
    assert not any(ord(character) < 32 or ord(character) == 127 for character in quoted)
    assert quoted == quoted.strip() and "\\" in quoted and name_problem(quoted) == "a name without slashes"


@settings(derandomize=True, deadline=None, max_examples=300)
@given(names=st.lists(st.text(st.sampled_from("\\n/x2e.\n u"), max_size=6), min_size=2, max_size=30, unique=True))
def test_different_bad_names_stay_different(names: list[str]) -> None:
    bad = [name for name in names if name_problem(name) is not None]
    assert len({quoted_name(name) for name in bad}) == len(bad)


def test_long_names_that_begin_alike_stay_different() -> None:
    assert quoted_name("x" * 181) != quoted_name("x" * 182)
    assert quoted_name("x" * 181).startswith("xxx") and quoted_name("") == r"\empty"


def test_a_bad_name_given_an_id_in_a_manifest_is_a_slide_like_others(tmp_path: Path) -> None:
    good_slide(tmp_path, "line\nend.tif")
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "slide_id"], ["line\nend.tif", "mended"]])
    (entry,) = find_slides([tmp_path / "m.csv"])
    assert (entry.slide_id, entry.problem) == ("mended", "")
    out = tmp_path / "out"
    assert main(["tile", str(tmp_path / "m.csv"), "--out", str(out), *SMALL]) == 0
    assert len((out / "private/paths.csv").read_text().splitlines()) == 2
