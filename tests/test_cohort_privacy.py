"""A canary planted wherever slides carry names is found in no output but `private/`."""

import csv
import getpass
import json
import socket
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_tile_encoder

from gigapath.cli.main import main
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.record import pseudonymised, read_key, recorded_paths

CANARY = "Doe,JANE_1953"
TOKEN = "hf_CanaryOfATokenThatNobodyHas"
LABEL_COLOUR = (255, 0, 255)  # like nothing on a slide
SMALL = ["--tile-size", "64", "--workers", "0", "--device", "cpu", "--tile-encoder", "standin", "--hash", "full"]


def outputs_with(out: Path, words: str) -> list[str]:
    """Files of a run that hold the words, in bytes, in UTF-16 or in their own names."""
    forms = [words.encode(), words.encode("utf-16-le"), words.lower().encode()]
    return [
        str(path.relative_to(out))
        for path in out.rglob("*")
        if words in path.name or (path.is_file() and any(form in path.read_bytes() for form in forms))
    ]


@pytest.fixture(scope="module")
def run_over_canaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of runs over slides that carry the canary in folder, file name, header, label, mask and checkpoint."""
    tmp_path = tmp_path_factory.mktemp("canaries")
    folder = tmp_path / CANARY / f"scans of {CANARY}"
    folder.mkdir(parents=True)
    tissue = paint_tissue(700, 500)
    # A label as a scanner photographs it: the name in print, on a colour of its own.
    label = np.full((120, 200, 3), LABEL_COLOUR, np.uint8)
    cv2.putText(label, CANARY, (5, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 2)
    given = {"mpp": (0.5, 0.5), "steps": (1,), "aperio": True, "description": f"|Patient = {CANARY}", "label": label}
    write_pyramid(folder / f"{CANARY}.svs", tissue, **given)  # type: ignore[arg-type]
    write_pyramid(folder / f"{CANARY} damaged.svs", tissue, **given)  # type: ignore[arg-type]
    damaged = folder / f"{CANARY} damaged.svs"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    damaged.write_bytes(bytes(content))
    (folder / f"{CANARY} text.svs").write_text(CANARY)
    mask = folder / f"{CANARY}.geojson"
    outline = [[[0, 0], [640, 0], [640, 448], [0, 448], [0, 0]]]
    name = {"classification": {"name": "tumour"}, "name": CANARY}
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": outline}, "properties": name}
    mask.write_text(json.dumps(feature))
    manifest = folder / f"{CANARY}.csv"
    rows = [
        f'"{CANARY}.svs",s1,',
        f'"{CANARY} damaged.svs",s2,',
        f'"{CANARY} text.svs",s3,',
        f'"{CANARY}.svs",s4,"{CANARY}.geojson"',
        f'"{CANARY} gone.svs",s5,',
        f'"{CANARY}.svs",s6,"{CANARY} no such mask.geojson"',
    ]
    manifest.write_text("\n".join(["path,slide_id,mask", *rows]) + "\n")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
        patch.chdir(folder)  # the current folder is a path too
        patch.setenv("HF_TOKEN", TOKEN)
        assert main(["tile", str(manifest), "--out", str(out), *SMALL[:4]]) == 3
        assert main(["embed", manifest.name, "--out", str(out), *SMALL]) == 3
        assert main(["slide-embed", str(out)]) == 0
    return out


def test_names_and_paths_are_found_in_private_alone(run_over_canaries: Path) -> None:
    out = run_over_canaries
    states = {path.stem: json.loads(path.read_text())["status"] for path in (out / "tiles").glob("*.json")}
    assert states.pop("s2") and states == {
        **dict.fromkeys(("s1", "s4"), "done"),
        **dict.fromkeys(("s3", "s5", "s6"), "failed"),
    }
    for words in (CANARY, str(out.parent)):
        assert {name.split("/")[0] for name in outputs_with(out, words)} == {"private"}
    for name in (socket.gethostname(), getpass.getuser()):
        if len(name) > 4:  # "root" is a word of h5 files
            assert {found.split("/")[0] for found in outputs_with(out, name)} <= {"private"}
    files = list((out / "private").iterdir())
    assert len(files) == 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_label_is_in_no_picture(run_over_canaries: Path) -> None:
    pictures = sorted(run_over_canaries.rglob("*.jpg"))
    assert len(pictures) >= 3
    for path in pictures:
        pixels = cv2.imread(str(path))[..., ::-1].astype(int)
        assert (np.abs(pixels - LABEL_COLOUR).sum(-1) < 60).mean() < 1e-4, path.name


def test_token_is_neither_stored_nor_printed(
    capfd: pytest.CaptureFixture[str], run_over_canaries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["methods", str(run_over_canaries)]) == 0
    assert main(["status", str(run_over_canaries)]) == 0
    assert main(["embed", "--tile-encoder", "gigapath", "no.svs", "--out", str(run_over_canaries)]) == 1
    said = capfd.readouterr()
    assert "no.svs" in said.err and TOKEN not in said.out + said.err
    assert outputs_with(run_over_canaries, TOKEN) == []


def test_pseudonyms_leave_no_name_outside_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, masks, key = tmp_path / "scans", tmp_path / "masks", tmp_path / "key"
    folder.mkdir()
    masks.mkdir()
    key.write_text("a key of twenty-two by")
    tissue = paint_tissue(500, 400)
    write_pyramid(folder / f"{CANARY}.svs", tissue, mpp=(0.5, 0.5), steps=(1,), aperio=True)
    (folder / f"{CANARY} broken.svs").write_text(CANARY)
    outline = {"type": "Polygon", "coordinates": [[[0, 0], [320, 0], [320, 256], [0, 256], [0, 0]]]}
    (masks / f"{CANARY}.geojson").write_text(json.dumps({"type": "Feature", "geometry": outline, "properties": {}}))
    manifest = tmp_path / "cohort.csv"
    rows = [f'"scans/{CANARY}.svs",{CANARY[:3]}-7,north,"{CANARY}"', f'"scans/{CANARY} broken.svs",{CANARY[:3]}-7,,']
    manifest.write_text("\n".join(["path,patient_id,site,remark", *rows]) + "\n")
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
    out = tmp_path / "out"
    words = [str(manifest), "--out", str(out), "--pseudonymise", str(key), "--tissue", str(masks)]
    assert main(["tile", *words, *SMALL[:4]]) == 3
    assert main(["embed", *words, *SMALL]) == 3
    found = {name.split("/")[0] for name in [*outputs_with(out, CANARY), *outputs_with(out, f"{CANARY[:3]}-7")]}
    assert found == {"private"}
    assert {name.split("/")[0] for name in outputs_with(out, "a key of")} == set(), "nor is the key anywhere"
    originals = {entry.slide_id: entry.original_id for entry in recorded_paths(out)}
    assert sorted(originals.values()) == [CANARY, f"{CANARY} broken"]
    with (out / "slides.csv").open(newline="") as file:
        rows_made = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert rows_made.keys() == originals.keys() and all(len(name) == 20 for name in originals)
    patients = {row["patient_id"] for row in rows_made.values()}
    assert len(patients) == 1 and len(patients.pop()) == 20 and "remark" not in next(iter(rows_made.values()))
    states = {originals[name]: (row["status"], row["tiles"]) for name, row in rows_made.items()}
    assert states == {CANARY: ("done", "20"), f"{CANARY} broken": ("failed", "0")}, "the mask was found by the own name"


def test_pseudonyms_follow_the_key_and_want_a_good_one(tmp_path: Path) -> None:
    entry = SlideEntry("a", Path("a.svs"))
    one, same, other = (pseudonymised([entry], key)[0].slide_id for key in (b"k" * 16, b"k" * 16, b"l" * 16))
    assert one == same != other
    with pytest.raises(FileNotFoundError, match="expected a file with a key"):
        read_key(tmp_path / "none")
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(ValueError, match="at least 16 bytes, got 5"):
        read_key(tmp_path / "short")


def test_slides_take_one_name_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another key, or none where there was one: each slide would be there twice, once under its own name."""
    (tmp_path / "one").write_text("one key of some bytes")
    (tmp_path / "other").write_text("another key of some bytes")
    (tmp_path / "scan-7.svs").write_text("no slide")

    def tile(out: str, *words: str) -> int:
        return main(["tile", str(tmp_path / "scan-7.svs"), "--out", str(tmp_path / out), "--workers", "0", *words])

    one, other = (["--pseudonymise", str(tmp_path / name)] for name in ("one", "other"))
    assert tile("hidden", *one) == tile("hidden", *one) == tile("plain") == tile("plain") == 3
    before = outputs_with(tmp_path / "hidden", "")
    capsys.readouterr()
    assert tile("hidden", *other) == tile("hidden") == tile("plain", *one) == 1
    said = capsys.readouterr().err
    for words in (
        "got pseudonyms of another key",
        "got their own names",
        "the slides' own names, as before, got pseud",
    ):
        assert words in said
    assert "scan-7" not in said and outputs_with(tmp_path / "hidden", "") == before


def test_canary_in_dicom_tags_is_found_nowhere(shared: Path, tmp_path: Path) -> None:
    scan = pydicom.dcmread(shared / "data" / "slides" / "low-power.dcm")
    scan.PatientName, scan.PatientID, scan.PatientComments = CANARY, CANARY, f"F {CANARY}"
    scan.save_as(tmp_path / "scan.dcm")
    out = tmp_path / "out"
    given = ["--slide-mpp", "0.5", "--tile-size", "64", "--tissue", "none", "--workers", "0"]
    assert main(["tile", str(tmp_path / "scan.dcm"), "--out", str(out), *given]) == 0
    assert len(list((out / "tiles").glob("*.h5"))) == 1
    assert outputs_with(out, CANARY) == []
