"""`gigapath remove`: every file, row and mention of a slide goes, and nothing of any other."""

import json
from pathlib import Path

import pytest
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_tile_encoder

from gigapath.cli.main import main
from gigapath.cohort.record import recorded_paths
from gigapath.cohort.removal import remove_slide
from gigapath.embedding.options import RunOptions
from gigapath.embedding.tiling import run_tile

SMALL = ["--tile-size", "64", "--workers", "0"]


def named(out: Path, words: str) -> list[str]:
    """Files that hold the words, or bear them in their names."""
    return sorted(
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and (words in path.name or words.encode() in path.read_bytes())
    )


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder of three slides, one whose id begins like another's, in all stages, with sections."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for seed, name in enumerate(("QXZ7", "QXZ7-b", "other")):
        write_pyramid(slides / f"{name}.tif", paint_tissue(500, 400, seed=seed), mpp=(0.5, 0.5), steps=(1,))
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
    out = tmp_path / "out"
    embed = ["embed", str(slides), "--out", str(out), *SMALL, "--tile-encoder", "standin", "--device", "cpu"]
    assert main(embed) == 0
    assert main(["slide-embed", str(out), "--per", "section"]) == 0
    assert main(["tile", str(slides / "QXZ7.tif"), "--out", str(out), *SMALL, "--shard", "1/1"]) == 0
    (out / "features_tiny" / "QXZ7.h5.0123abcd-1-abcdef.partial").write_bytes(b"half")
    for folder, file in (("maps/QXZ7", "pca.npz"), ("maps/QXZ7-b", "pca.npz"), ("report_files/QXZ7", "crops.jpg")):
        (out / folder).mkdir(parents=True)
        (out / folder / file).write_bytes(b"pixels")
    (out / "maps" / "QXZ7" / "my_notes.txt").write_text("mine")
    (out / "notes.md").write_text("QXZ7 has a fold")
    return out


def test_remove_leaves_nothing_of_a_slide_and_everything_of_the_others(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, folder in (("QXZ", out), ("../out", out), ("QXZ7", out / "none")):
        assert main(["remove", name, str(folder)]) == 1
    assert main(["remove", "QXZ7.tif", str(out)]) == 1  # its mentions would go, and its embeddings stay
    said = capsys.readouterr().err
    assert "holds nothing of a slide 'QXZ'" in said and "a name without slashes" in said and "no such folder" in said
    assert "Its id is 'QXZ7'" in said
    planned = remove_slide(out, "QXZ7", dry_run=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == every, "nothing is changed yet"
    before = {path: content for path, content in every.items() if path.suffix == ".h5"}
    assert named(out, "QXZ7.tif"), "the paths are recorded"
    assert main(["remove", "QXZ7", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*planned.files, *planned.edited)) and not remove_slide(out, "QXZ7")
    for name in ("tiles/QXZ7.h5", "features_tiny/QXZ7.json", "previews/QXZ7.jpg", "abcdef.partial", ".section-1.h5"):
        assert f"{name}\n" in said, name
    assert "taken out of: slides.csv" in said and "drawn anew: contact_sheet.jpg" in said
    assert "still named in, and left: notes.md" in said
    assert "removed: maps/QXZ7/pca.npz" in said and not (out / "report_files/QXZ7").exists()
    assert [path.name for path in (out / "maps").rglob("*.*")] == ["my_notes.txt", "pca.npz"], "another's, and my own"
    (out / "notes.md").unlink()
    for words in ("QXZ7.", '"QXZ7"', "QXZ7,"):
        assert named(out, words) == [], words
    kept = {path: path.read_bytes() for path in out.rglob("*.h5")}
    assert {path for path in before if not path.name.startswith("QXZ7.")} == kept.keys()
    assert all(before[path] == content for path, content in kept.items())
    assert [line.split(",")[0] for line in (out / "slides.csv").read_text().splitlines()] == [
        *("slide_id", "QXZ7-b", "other")
    ]
    assert (out / "private/paths.csv").stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o777 for path in (out / "private").iterdir()} == {0o600}
    commands = [json.loads(path.read_text())["command"] for path in (out / "private").glob("*.json")]
    assert any("<removed>" in command for command in commands)


def test_remove_the_last_slide_takes_the_contact_sheet_along(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "one.tif", paint_tissue(500, 400), mpp=(0.5, 0.5), steps=(1,))
    out = tmp_path / "out"
    run_tile([tmp_path / "one.tif"], out, options=RunOptions(workers=0))
    assert (out / "contact_sheet.jpg").exists()
    mine = tmp_path / "mine" / "map.png"
    mine.parent.mkdir()
    mine.write_bytes(b"pixels")
    (out / "maps").mkdir()
    (out / "maps" / "one").symlink_to(mine.parent)
    remove_slide(out, "one")
    assert mine.exists(), "what a link leads to is somebody's own"
    assert not list(out.rglob("*.jpg")) and not list(out.rglob("*.h5"))


def test_remove_by_the_name_before_the_pseudonym_names_the_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("a key of twenty-two by")
    write_pyramid(tmp_path / "QXZ7.tif", paint_tissue(500, 400), mpp=(0.5, 0.5), steps=(1,))
    out = tmp_path / "out"
    words = ["tile", str(tmp_path / "QXZ7.tif"), "--out", str(out), "--pseudonymise", str(tmp_path / "key")]
    assert main([*words, *SMALL]) == 0
    (slide_id,) = [path.stem for path in (out / "tiles").glob("*.h5")]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["remove", "QXZ7", str(out)]) == 1
    assert f"Its id is '{slide_id}'." in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["remove", slide_id, str(out)]) == 0
    assert named(out, slide_id) == []


def test_remove_of_a_short_id_leaves_other_slides_and_times_as_they_are(tmp_path: Path) -> None:
    slides, out = tmp_path / "12", tmp_path / "out"
    slides.mkdir()
    rows = ["path,slide_id"]
    for name in ("12", "12, b"):
        (slides / f"scan {name}.svs").write_text("no slide")
        rows.append(f'"12/scan {name}.svs","{name}"')
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    assert main(["tile", str(tmp_path / "m.csv"), "--out", str(out), *SMALL]) == 3
    (record,) = (out / "runs").glob("*.json")
    content = json.loads(record.read_text())
    content |= {"started": "2026-01-01T00:12:12+00:00", "facts": {"note": "12 is odd"}}
    record.write_text(json.dumps(content))
    assert main(["remove", "12", str(out)]) == 0
    assert json.loads(record.read_text()) == {**content, "facts": {"note": "<removed> is odd"}}
    (left,) = recorded_paths(out)
    assert (left.slide_id, left.path) == ("12, b", slides / "scan 12, b.svs")
