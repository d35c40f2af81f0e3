"""A canary planted wherever slides carry names is found in no output but `private/`."""

import getpass
import json
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_tile_encoder

from gigapath.cli.main import main

CANARY = "Doe,JANE_1953"
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


@pytest.fixture
def run_over_canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of runs over slides that carry the canary in folder, file name, header, label, mask and checkpoint."""
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
    monkeypatch.setattr("gigapath.runs.embedding.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
    monkeypatch.chdir(folder)  # the current folder is a path too
    out = tmp_path / "out"
    assert main(["tile", str(manifest), "--out", str(out), *SMALL[:4]]) == 3
    assert main(["embed", manifest.name, "--out", str(out), *SMALL]) == 3
    assert main(["slide-embed", str(out)]) == 0
    return out


def test_canary_is_found_in_private_alone(run_over_canaries: Path) -> None:
    found = outputs_with(run_over_canaries, CANARY)
    assert found, "the paths are recorded for their owner"
    assert {name.split("/")[0] for name in found} == {"private"}


def test_every_slide_came_out_as_it_should(run_over_canaries: Path) -> None:
    states = {
        path.stem: json.loads(path.read_text())["status"] for path in (run_over_canaries / "tiles").glob("*.json")
    }
    assert states["s1"] == states["s4"] == "done"
    assert states["s3"] == states["s5"] == states["s6"] == "failed"
    assert len(states) == 6


def test_user_and_host_names_are_private(run_over_canaries: Path) -> None:
    for name in (socket.gethostname(), getpass.getuser()):
        if len(name) > 4:  # "root" is a word of h5 files
            assert {found.split("/")[0] for found in outputs_with(run_over_canaries, name)} <= {"private"}


def test_folders_of_the_machine_are_private(run_over_canaries: Path) -> None:
    assert {found.split("/")[0] for found in outputs_with(run_over_canaries, str(run_over_canaries.parent))} == {
        "private"
    }


def test_label_is_in_no_picture(run_over_canaries: Path) -> None:
    pictures = sorted(run_over_canaries.rglob("*.jpg"))
    assert len(pictures) >= 3
    for path in pictures:
        pixels = cv2.imread(str(path))[..., ::-1].astype(int)
        assert (np.abs(pixels - LABEL_COLOUR).sum(-1) < 60).mean() < 1e-4, path.name


def test_private_files_are_their_owners(run_over_canaries: Path) -> None:
    files = list((run_over_canaries / "private").iterdir())
    assert len(files) == 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
