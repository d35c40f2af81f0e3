"""Cohorts: finding slides and their ids, status files and slides.csv, reuse, run records, privacy of paths."""

import csv
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from feature_files import make_tiles

from gigapath.cohort.manifest import SlideEntry, find_slides, read_manifest, series_uid
from gigapath.cohort.record import RunRecord, record_run, recorded_paths, redact, without_paths
from gigapath.cohort.stage import StageOptions, digest, finished
from gigapath.cohort.status import Status, read_status, read_statuses, write_slides_csv, write_status
from gigapath.features import write_tiles
from gigapath.progress import StopFlag, Stopped


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def ids_in(*inputs: Path) -> list[str]:
    return [entry.slide_id for entry in find_slides(list(inputs))]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (("b/two.SVS", "a/one.ome.tiff", "three.ndpi", "notes.txt", ".hidden/four.svs", ".five.svs", "p.jpeg"),
         ["one", "two", "p", "three"]),
        (("case.mrxs", "case/Data0000.tif", "other/b.svs"), ["case", "b"]),
        (("case.vms", "case-0.jpg"), ["case"]),
    ],
    ids=["in order of paths", "data folders of mrxs slides", "JPEGs of a vms slide"],
)  # fmt: skip
def test_find_slides_takes_slides_alone(tmp_path: Path, files: tuple[str, ...], ids: list[str]) -> None:
    for name in files:
        touch(tmp_path / name)
    assert ids_in(tmp_path) == ids


def test_find_slides_stops_on_two_slides_of_one_id_and_names_both(tmp_path: Path) -> None:
    first, second = touch(tmp_path / "x" / "a.svs"), touch(tmp_path / "y" / "a.tif")
    with pytest.raises(ValueError, match="two slides have the id 'a'") as error:
        find_slides([tmp_path])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_find_slides_takes_a_slide_named_twice_once(tmp_path: Path) -> None:
    slide = touch(tmp_path / "a.svs")
    assert ids_in(slide, tmp_path, slide) == ["a"]


def test_find_slides_ends_in_a_loop_of_links_and_skips_outputs(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "one.svs")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    out = tmp_path / "out"
    touch(out / "previews" / "one.jpg")
    assert [entry.slide_id for entry in find_slides([tmp_path], exclude=out)] == ["one"]
    touch(out / "slides.csv")
    (out / "runs").mkdir()
    (out / "private").mkdir()
    assert ids_in(tmp_path) == ["one"], "a folder that an earlier run wrote"


def test_find_slides_knows_slides_from_results_in_one_folder(tmp_path: Path) -> None:
    for name in ("one.svs", "more/two.svs", "previews/one.jpg", "contact_sheet.jpg", "features_x/one.h5"):
        touch(tmp_path / name)
    assert [entry.slide_id for entry in find_slides([tmp_path], exclude=tmp_path)] == ["two", "one"]


def test_find_slides_says_how_many_pngs_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one.svs", "masks/one.PNG", "two.png", ".hidden.png", "case.mrxs", "case/Data.png"):
        touch(tmp_path / name)
    assert ids_in(tmp_path) == ["case", "one"]
    assert caplog.messages == [
        f"{tmp_path}: 2 PNG files are passed over. To take one for a slide, name the file itself."
    ]
    assert ids_in(tmp_path / "one.svs", tmp_path / "two.png") == ["one", "two"]
    assert len(caplog.messages) == 1


def test_find_slides_names_what_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.svs"):
        find_slides([tmp_path / "nothing.svs"])
    with pytest.raises(ValueError, match="expected a folder with slides, found none"):
        find_slides([tmp_path])


def test_read_manifest_carries_columns_and_resolves_paths_beside_it(tmp_path: Path) -> None:
    touch(tmp_path / "slides" / "a.svs")
    text = (
        "\ufeffpath, slide_id,mpp,mask,patient_id,site\n"
        "slides/a.svs,A1,0.25,masks/a.geojson,P7,north\n"
        "\n"
        "gone.svs,,,,P8,\n"
    )
    manifest = touch(tmp_path / "cohort.csv", text.encode())
    first, second = find_slides([manifest])
    assert first == SlideEntry(
        "A1",
        tmp_path / "slides/a.svs",
        0.25,
        tmp_path / "masks/a.geojson",
        columns={"patient_id": "P7", "site": "north"},
    )
    assert (second.slide_id, second.path, second.mpp, second.mask) == ("gone", tmp_path / "gone.svs", None, None)


def test_dicom_files_without_a_suffix_are_found_by_what_they_hold(tmp_path: Path) -> None:
    touch(tmp_path / "1.2.840.7", dicom("1.2.3"))
    touch(tmp_path / "1.2.840.8", dicom("1.2.3", extra=100))
    touch(tmp_path / "IM0001", dicom("4.5.6"))
    touch(tmp_path / "README", b"words")
    touch(tmp_path / "data.17", bytes(200))
    touch(tmp_path / "notes.txt", dicom("7.8.9"))
    touch(tmp_path / ".hidden", dicom("7.8.9"))
    os.mkfifo(tmp_path / "pipe")
    assert ids_in(tmp_path) == ["1.2.840.8", "IM0001"]


def test_read_manifest_takes_a_folder_that_holds_one_slide(tmp_path: Path) -> None:
    touch(tmp_path / "series" / "1.dcm", dicom("1.2.3"))
    touch(tmp_path / "series" / "2.dcm", dicom("1.2.3", extra=100))
    manifest = touch(tmp_path / "cohort.csv", b"path,slide_id\nseries,case\n")
    (entry,) = read_manifest(manifest)
    assert (entry.slide_id, entry.path.name) == ("case", "2.dcm")
    touch(tmp_path / "series" / "3.dcm", dicom("9.9"))
    with pytest.raises(ValueError, match=r"row 2: expected one slide in the folder .*, found 2"):
        read_manifest(manifest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "header"),
        ("slide,mpp\na,1\n", "`path`.*slide, mpp"),
        ("path;mpp\na;1\n", "semicolons"),
        ("path\n", "rows"),
        ("path,mpp\na.svs,zero\n", "row 2.*mpp.*'zero'"),
        ("path,mpp\nb.svs,1\n\na.svs,-1\n", "row 4.*mpp"),
        ("path,mpp_x,mpp_y\na.svs,0.25,0.5\n", "row 2.*mpp_x and mpp_y"),
        ("path,mpp_x\na.svs,0.25\n", "row 2.*mpp_x and mpp_y"),
        ("path,mpp\n,1\n", "row 2 has no path"),
        ("path,mpp\nNA,1\n", "row 2 has no path"),
        ("path\na,b\n", "row 2"),
        ("path,mpp,mpp\na.svs,1,2\n", "'mpp'.*twice"),
        (",".join(f"column {n}" for n in range(100_000)) + "\n" + "1," * 99_999 + "\n", "`path`"),
    ],
)
def test_read_manifest_names_the_row_that_is_off(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_manifest(touch(tmp_path / "cohort.csv", text.encode()))
    assert len(str(caught.value)) < 1000


def test_read_manifest_takes_missing_words_scales_and_composed_names(tmp_path: Path) -> None:
    text = (
        "path,slide_id,mpp,mpp_x,mpp_y,mask,patient_id,stain\n"
        "a.svs,Mu\u0308ller,NA,0.25,0.252,None,nan,NA\n"
        "b.svs,,0.5,,,,P1,+H&E\n"
    )
    first, second = read_manifest(touch(tmp_path / "cohort.csv", text.encode()))
    assert (first.slide_id, first.mpp, first.mask) == ("M\u00fcller", pytest.approx(0.251), None)
    assert first.columns == {"patient_id": "", "stain": "NA"}  # no patient called nan; the rest is the user's own
    assert (second.slide_id, second.mpp, second.columns) == ("b", 0.5, {"patient_id": "P1", "stain": "+H&E"})


def test_read_manifest_takes_windows_paths_or_says_what_they_are(tmp_path: Path) -> None:
    touch(tmp_path / "sub dir" / "a.tif")
    manifest = touch(tmp_path / "win.csv", b"path\nsub dir\\a.tif\nC:\\slides\\b.tif\n")
    found, absent = read_manifest(manifest)
    assert (found.slide_id, found.path, found.problem) == ("a", tmp_path / "sub dir" / "a.tif", "")
    assert absent.slide_id == "b" and "backslashes" in absent.problem


def element(tag: tuple[int, int], vr: bytes, value: bytes, *, explicit: bool = True) -> bytes:
    value += b"\0" * (len(value) % 2)
    if not explicit:
        return struct.pack("<HHI", *tag, len(value)) + value
    return struct.pack("<HH", *tag) + vr + struct.pack("<H", len(value)) + value


def dicom(uid: str, *, explicit: bool = True, extra: int = 0) -> bytes:
    """A DICOM header whose series comes after a sequence of undefined length that names another series."""
    syntax = b"1.2.840.10008.1.2.1" if explicit else b"1.2.840.10008.1.2"
    other = element((0x20, 0xE), b"UI", b"6.6.6", explicit=explicit)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + other + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    sequence = item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    head = struct.pack("<HH", 0x8, 0x1115) + (b"SQ\0\0" if explicit else b"") + struct.pack("<I", 0xFFFFFFFF)
    return (
        b"\0" * 128
        + b"DICM"
        + element((0x2, 0x10), b"UI", syntax)
        + element((0x8, 0x60), b"CS", b"SM", explicit=explicit)
        + head
        + sequence
        + element((0x20, 0xE), b"UI", uid.encode(), explicit=explicit)
        + b"\0" * extra
    )


@pytest.mark.parametrize("explicit", [True, False])
def test_series_uid_walks_past_sequences(tmp_path: Path, explicit: bool) -> None:
    assert series_uid(touch(tmp_path / "a.dcm", dicom("1.2.34", explicit=explicit))) == "1.2.34"


def test_series_uid_is_none_where_the_header_does_not_say(tmp_path: Path) -> None:
    whole = dicom("1.2.34")
    assert series_uid(tmp_path / "missing.dcm") is None
    for stop in (0, 50, 131, 140, 160, 200, 230):
        assert series_uid(touch(tmp_path / "cut.dcm", whole[:stop])) is None


def test_find_slides_takes_a_dicom_series_as_one_slide(tmp_path: Path) -> None:
    touch(tmp_path / "1.dcm", dicom("1.1"))
    touch(tmp_path / "2.dcm", dicom("1.1", extra=500))
    touch(tmp_path / "3.dcm", dicom("2.2"))
    touch(tmp_path / "4.dcm", b"no header")
    assert ids_in(tmp_path) == ["2", "3", "4"]
    assert ids_in(tmp_path / "1.dcm", tmp_path / "2.dcm") == ["2"]


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "[]", "{}", '{"slide_id": "b", "stage": "tiles", "status": "done"}', '{"slide_id": "a"'),
        *({"tiles": "many"}, {"warnings": 3}, {"warnings": [3]}, {"facts": []}, {"ended": None}, {"error": {}}),
    ],
)
def test_status_round_trips_and_one_of_another_form_counts_as_none(tmp_path: Path, wrong: str | dict[str, Any]) -> None:
    status = Status("a", "tiles", "done", tiles=3, seconds=0.5, warnings=("look",), identity={"mpp": 0.5})
    write_status(tmp_path, status)
    assert read_status(tmp_path, "a") == status and read_statuses(tmp_path) == {"a": status}
    path = tmp_path / "a.json"
    path.write_text(wrong if isinstance(wrong, str) else json.dumps({**json.loads(path.read_text()), **wrong}))
    assert read_status(tmp_path, "a") is None and read_statuses(tmp_path) == {}


def test_pipes_and_folders_among_statuses_are_passed_over(tmp_path: Path) -> None:
    write_status(tmp_path, Status("a", "tiles", "done"))
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    assert list(read_statuses(tmp_path)) == ["a"] and read_statuses(tmp_path / "nowhere") == {}


def test_slides_csv_says_how_each_slide_stands(tmp_path: Path) -> None:
    tiles, features = tmp_path / "tiles", tmp_path / "features_x"
    write_status(tiles, Status("a", "tiles", "done", 10, 1.0, facts={"vendor": "aperio"}, columns={"site": "n"}))
    write_status(features, Status("a", "features", "done", 10, 4.0, warnings=("slow",)))
    write_status(tiles, Status("b", "tiles", "failed", error="it broke, badly"))
    write_status(tiles, Status("c", "tiles", "no_tissue"))
    write_status(features, Status("c", "features", "no_tissue"))
    write_status(tiles, Status("d", "tiles", "done", 5, 1.0))
    write_status(features, Status("d", "features", "stopped"))
    write_slides_csv(tmp_path, [tiles, features], ["e"])
    with (tmp_path / "slides.csv").open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a": "done",
        "b": "failed",
        "c": "no_tissue",
        "d": "stopped",
        "e": "todo",
    }
    a = rows["a"]
    assert (a["tiles"], a["seconds"], a["tiles/s"], a["site"], a["vendor"]) == ("10", "5.0", "2.5", "n", "aperio")
    assert (a["warnings"], a["seconds_tile"], a["seconds_embed"]) == ("slow", "1.0", "4.0")
    assert rows["b"]["error"] == "it broke, badly"
    assert list(a)[:6] == ["slide_id", "status", "tiles", "seconds", "tiles/s", "error"]


def test_slides_csv_keeps_the_manifests_columns_beside_its_own_and_holds_no_formula(tmp_path: Path) -> None:
    columns = {"status": "frozen", "level": "3", "scanner": "S9", "note": "=HYPERLINK(1)", "delta": "-0.5"}
    for folder, slide_id in ((tmp_path / "tiles", "a"), (tmp_path / "tiles", "b")):
        folder.mkdir(exist_ok=True)
        facts = {"level": 0, "scanner": "X1"} if slide_id == "a" else {}
        write_status(folder, Status(slide_id, "tiles", "done" if facts else "failed", facts=facts, columns=columns))
    write_slides_csv(tmp_path, [tmp_path / "tiles"])
    with (tmp_path / "slides.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "failed"] and [row["level"] for row in rows] == ["0", ""]
    for row in rows:
        assert [row[f"manifest_{name}"] for name in ("status", "level", "scanner")] == ["frozen", "3", "S9"]
        assert (row["note"], row["delta"]) == ("'=HYPERLINK(1)", "-0.5")


def test_finished_wants_equal_identity_and_a_whole_file(tmp_path: Path) -> None:
    identity = {"mpp": 0.5, "precision": "fp32"}
    write_status(tmp_path, Status("a", "tiles", "done", 2, identity=identity))
    assert finished(tmp_path, "a", identity) is None, "there is no result"
    write_tiles(tmp_path / "a.h5", make_tiles("a", attrs={"identity": digest({"mpp": 0.5, "precision": "bf16"})}))
    assert finished(tmp_path, "a", identity) is None, "the result is another run's, killed before its status"
    write_tiles(tmp_path / "a.h5", make_tiles("a", attrs={"identity": digest(identity)}))
    assert finished(tmp_path, "a", identity) is not None
    assert finished(tmp_path, "a", {**identity, "mpp": 0.25}) is None
    assert finished(tmp_path, "a", {**identity, "precision": "fp16"}) is None
    assert finished(tmp_path, "a", {**identity, "precision": "fp16"}, allow_mixed=True) is not None
    assert finished(tmp_path, "a", {**identity, "mpp": 0.25}, allow_mixed=True) is None
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: len(content) // 2])
    assert finished(tmp_path, "a", identity) is None, "the result is cut off"


def test_finished_takes_no_failed_slide_and_no_tissue_without_a_slide_file(tmp_path: Path) -> None:
    write_status(tmp_path, Status("a", "slides", "failed"))
    assert finished(tmp_path, "a", {}) is None
    write_status(tmp_path, Status("a", "slides", "no_tissue"))
    assert finished(tmp_path, "a", {}) is not None


def test_results_of_other_options_are_refused(tmp_path: Path) -> None:
    write_status(tmp_path, Status("a", "features", "done", identity={"precision": "fp16", "mpp": 1, "tiles": "x"}))

    def check(identity: dict[str, Any], own: str, cohort: str = "", **more: Any) -> None:
        StageOptions(tmp_path, identity, dict.fromkeys(own, identity), cohort or own, **more).check()

    check({"precision": "fp16", "mpp": 1, "tiles": "y"}, "a")
    check({"precision": "fp16", "mpp": 2}, "b")
    check({"precision": "fp32"}, "b", "ab")  # another job of the array makes it
    check({"precision": "fp32", "mpp": 2}, "a", overwrite=True)
    check({"precision": "fp32", "mpp": 1}, "a", allow_mixed=True)
    with pytest.raises(ValueError, match=r"--precision fp16 -> fp32 \(1 slide\).*'a'.*--allow-mixed"):
        check({"precision": "fp32"}, "b")
    with pytest.raises(ValueError, match=r"--mpp 1 -> 2 .*--overwrite"):
        check({"precision": "fp32", "mpp": 2}, "a", allow_mixed=True)


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_paths_are_recorded_for_their_owner_only_and_merged(tmp_path: Path) -> None:
    record_run(tmp_path, "1", {}, [SlideEntry("a", Path("/x/a.svs"), 0.5), SlideEntry("b", Path("/x/b.svs"))])
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    (tmp_path / "private").chmod(0o755)  # as version 0.1.0 made it
    record_run(tmp_path, "2", {}, [SlideEntry("b", Path("/y/b.svs"), mask=Path("/y/b.png"))])
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "private" / "paths.csv").stat().st_mode & 0o777 == 0o600
    assert recorded_paths(tmp_path) == [
        SlideEntry("a", Path("/x/a.svs"), 0.5),
        SlideEntry("b", Path("/y/b.svs"), mask=Path("/y/b.png")),
    ]


def test_run_records_are_added_never_overwritten_and_hold_no_path(tmp_path: Path) -> None:
    slide = touch(tmp_path / "CANARY" / "a.svs")
    out = tmp_path / "out"
    for verb in ("tile", "embed"):
        record = RunRecord(out, verb, {"tissue": str(slide), "mpp": 0.5}, [str(slide), f"--out={out}"])
        record.start([SlideEntry("a", slide)])
        record.facts["device"] = "cpu"
        record.end("done", {"done": 1})
    files = sorted((out / "runs").glob("*.json"))
    assert len(files) == 2
    for file in files:
        content = json.loads(file.read_text())
        assert "CANARY" not in file.read_text()
        assert content["command"] == ["gigapath", content["verb"], "<path>", "--out=<path>"]
        assert content["options"] == {"tissue": "<path>", "mpp": 0.5}
        assert (content["outcome"], content["counts"], content["facts"]) == ("done", {"done": 1}, {"device": "cpu"})
        assert content["versions"]["implementation"] == "gigapath-open"
        private = out / "private" / file.name
        assert "CANARY" in private.read_text()
        assert private.stat().st_mode & 0o777 == 0o600


def test_without_paths_leaves_ids_and_words(tmp_path: Path) -> None:
    entry = SlideEntry("s1", tmp_path / "JANE DOE" / "scan 7.svs", mask=tmp_path / "m" / "mask.png")
    text = (
        f"{entry.path}: broken; scan 7.svs at 3 tiles/s, {entry.mask} and {entry.path.parent}/x, /etc/secret/file; "
        "see https://example.org/a/b"
    )
    cleaned = without_paths(text, entry)
    assert cleaned == ("s1: broken; s1 at 3 tiles/s, s1 and <folder>/x, <path>; see https://example.org/a/b")
    short = SlideEntry("0f3e", Path("12.svs"), original_id="12")  # a part of other words
    assert without_paths("12.svs: tile 3 of 512, as of 12_b", short) == "0f3e: tile 3 of 512, as of 0f3e_b"


def test_redact_hides_paths_and_addresses_alone(tmp_path: Path) -> None:
    weights = str(touch(tmp_path / "w.pth"))
    for given, shown in (
        (["a", "--ray-address", "host:1", "b"], ["a", "--ray-address", "<address>", "b"]),
        (["--ray-address=host:1"], ["--ray-address=<address>"]),
        ({"ray_address": "host:1", "other": None}, {"ray_address": "<address>", "other": None}),
        ({"ray_address": None}, {"ray_address": None}),
        (["hf_hub:a/b", "timm:resnet18", weights, 0.5], ["hf_hub:a/b", "timm:resnet18", "<path>", 0.5]),
        ({"x": "../up"}, {"x": "<path>"}),
    ):
        assert redact(given) == shown


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_stop_flag_turns_signals_into_a_stop_between_batches(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with StopFlag() as stop:
        stop.check()
        os.kill(os.getpid(), getattr(signal, name))
        with pytest.raises(Stopped, match=name):
            stop.check()
    assert signal.getsignal(getattr(signal, name)) is before
