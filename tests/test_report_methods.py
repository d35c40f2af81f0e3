"""`gigapath methods`: what a paper must say, from the status files and run records; nothing is made up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from feature_files import make_features, make_tiles

from gigapath.cli.main import main
from gigapath.cohort.status import Status, write_status
from gigapath.features import TileEmbeddingsWriter
from gigapath.releases import RELEASES
from gigapath.report.methods import methods

TILING = {
    "mpp": 0.5, "mpp_tolerance": 0.02, "tile_size": 256, "tissue": "otsu", "min_tissue": 0.1, "max_tiles": None,
    "numerics_version": 1,
}  # fmt: skip
FACTS = {
    "vendor": "aperio", "mpp_x": 0.2525, "mpp_source": "openslide.mpp", "read_width": 507, "read_height": 507,
    "tile_size": 256, "mpp": 0.5, "tissue_method": "otsu", "tissue_threshold": 14.0,
}  # fmt: skip
EMBEDDING = {
    "encoder": "gigapath", "weights_sha256": RELEASES["gigapath"].tile_sha256, "transform": "resize 256",
    "precision": "fp16", "device": "cuda", "batch_size": 128, "numerics_version": 1,
}  # fmt: skip


def status(folder: Path, slide_id: str, stage: str, state: str = "done", **fields: Any) -> None:
    identity = {"tiles": TILING, "features": EMBEDDING, "slides": {"slide_encoder": "gigapath", "precision": "fp16"}}
    given = {"tiles": 100, "identity": identity[stage], "facts": FACTS if stage == "tiles" else {}, **fields}
    write_status(folder, Status(slide_id=slide_id, stage=stage, status=state, **given))


def write_run(out: Path, *, encoder: str = "gigapath", slide_encoder: str = "gigapath", **changes: Any) -> Path:
    """Three slides through all stages, one without tissue, two that failed for the same reason."""
    for number in range(3):
        status(out / "tiles", f"s{number}", "tiles", tiles=100 * (number + 1))
        status(out / f"features_{encoder}", f"s{number}", "features")
        status(out / f"slides_{slide_encoder}__{encoder}", f"s{number}", "slides")
    status(out / "tiles", "blank", "tiles", "no_tissue", tiles=0)
    for name in ("b1", "b2"):
        error = f"slide '{name}': expected microns per pixel in the file, got none. State them with --slide-mpp."
        status(out / "tiles", name, "tiles", "failed", tiles=0, error=error)
    record = {
        "versions": {"gigapath": "0.1.0", "openslide-library": "4.0.1", "torch": "2.14.1"},
        "facts": {"tile_encoder": {"name": encoder, "trained": True, "description": f"the encoder {encoder}"}},
        **changes,
    }
    (out / "runs").mkdir(parents=True, exist_ok=True)
    (out / "runs" / "20260101T000000Z_aaaaaa.json").write_text(json.dumps(record))
    return out


def test_everything_that_a_paper_needs_is_said(tmp_path: Path) -> None:
    found = methods(write_run(tmp_path))
    text = " ".join(found.paragraphs)
    for part in (
        "6 slides (aperio)", "0.2525 microns", "openslide.mpp", "3 slides were excluded", "600 tiles", "256 x 256",
        "[otsu1979threshold]", "threshold 14", "10 %", "revision eba85dd46097", "[ding2023longnet] (fp16)",
        RELEASES["gigapath"].tile_sha256[:16], "OpenSlide [goode2013openslide] 4.0.1", "PyTorch 2.14.1",
    ):  # fmt: skip
        assert part in text, part
    assert "no resolution was stated (2)" in text and "no tissue was found (1)" in text
    assert "--slide-mpp" not in text and "expected" not in text  # clauses, not messages
    assert found.cautions == []
    assert [entry.split("{")[1].split(",")[0] for entry in found.bibtex] == [
        "xu2024gigapath",
        "gigapath_open",
        "goode2013openslide",
        "otsu1979threshold",
        "ding2023longnet",
    ]


def test_mixed_settings_are_said_with_their_slides(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    status(out / "tiles", "s2", "tiles", identity={**TILING, "mpp": 0.25, "tissue": "published"})
    status(out / "features_gigapath", "s2", "features", identity={**EMBEDDING, "weights_sha256": "ab" * 32})
    found = methods(out)
    assert "0.5 (2 slides), 0.25 (1 slide) microns per pixel" in " ".join(found.paragraphs)
    said = " ".join(found.cautions)
    assert "Slides differ in their resolution" in said and "Slides differ in their tissue rule" in said
    assert "weights of gigapath are mixed" in said


@pytest.mark.parametrize(("encoder", "words"), [("standin", "STAND-IN"), ("gigapath-random", "RANDOM WEIGHTS")])
def test_what_is_no_gigapath_embedding_is_said_plainly(
    encoder: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, encoder=encoder, slide_encoder="mean")
    assert main(["methods", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert words in said.out.splitlines()[0] and words in said.err
    assert "plain mean of its tile embeddings" in " ".join(said.out.split()) and "ding2023longnet" not in said.out


def test_warnings_of_tiling_become_cautions(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    for name in ("s0", "s1"):
        warning = "--slide-mpp says 0.25 microns per pixel, the slide itself 0.499 (openslide.mpp)."
        status(out / "tiles", name, "tiles", warnings=(warning,))
    assert f"2 slides (s0, ...): {warning}" in methods(out).cautions


def test_unfinished_runs_and_foreign_records_are_no_obstacle(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    status(out / "features_gigapath", "s9", "features", "stopped")
    (out / "runs" / "20260102T000000Z_bbbbbb.json").write_text("{")
    (out / "runs" / "20260103T000000Z_cccccc.json").write_text("[]")
    assert methods(out).cautions == ["1 slide not finished: run it to the end."]
    with pytest.raises(FileNotFoundError, match="found no status file"):
        methods(tmp_path / "runs")
    assert main(["methods", str(tmp_path / "none")]) == 1


def test_tiles_of_another_folder_are_told_from_the_features_themselves(tmp_path: Path) -> None:
    status(tmp_path / "features_gigapath", "slide-1", "features", tiles=8)
    tiles = make_tiles()
    attrs = {**tiles.attrs, "mpp_target": 0.5, "mpp_tolerance": 0.02, "min_tissue": 0.1, "mpp_level0": (0.25, 0.25)}
    tiles = dataclasses.replace(tiles, attrs=attrs)
    with TileEmbeddingsWriter(tmp_path / "features_gigapath" / "slide-1.h5", tiles, embed_dim=6) as writer:
        writer.write(0, make_features())
    text = " ".join(methods(tmp_path).paragraphs)
    assert "1 slide remained, with 8 tiles." in text and "at 0.5 microns per pixel" in text
    assert "read pixel for pixel (1 slide)" in text


def test_methods_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert main(["methods", "--json", str(tmp_path)]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"paragraphs", "cautions", "bibtex"}
