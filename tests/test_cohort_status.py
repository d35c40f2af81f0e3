"""`gigapath status`: counts, rates and failures by kind, from the status files alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gigapath.cli.main import main
from gigapath.cohort.status import Status, failures_by_kind, read_progress, write_slides_csv, write_status

FACTS = {"vendor": "aperio", "scanner": "GT450", "width": 98_000, "height": 67_000, "mpp_source": "openslide.mpp"}
IDENTITY = {"tile_size": 256, "mpp": 0.5, "tissue": "otsu", "precision": "fp16", "weights_sha256": "5e" * 32}


def put(folder: Path, slide_id: str, status: str = "done", tiles: int = 0, **more: Any) -> None:
    stage = folder.name.split("_")[0]
    write_status(folder, Status(slide_id, stage, status, tiles, facts=FACTS, identity=IDENTITY, **more))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Ten slides, tiled but for one; four embedded at 100 tiles/s by two jobs; two failed."""
    for number in range(9):
        put(tmp_path / "tiles", f"s{number}", tiles=1000, seconds=1.0, ended=100.0 + number)
    put(tmp_path / "tiles", "s9", "failed", error="slide 's9': expected microns per pixel in the file, got none.")
    for number in range(4):
        put(tmp_path / "features_tiny", f"s{number}", tiles=1000, seconds=20.0, ended=7020.0 + 20 * (number // 2))
    put(tmp_path / "features_tiny", "s4", tiles=1000, seconds=1.0, ended=10.0)  # long ago
    error = "slide 's5': tile 7 of 1000 (x 512, y 0, level 1) can't be decoded."
    put(tmp_path / "features_tiny", "s5", "failed", error=error)
    put(tmp_path / "features_tiny", "s6", "failed", error=error.replace("s5", "s6").replace("7 of 1000", "12 of 900"))
    put(tmp_path / "features_tiny", "s7", "stopped")
    write_slides_csv(tmp_path, [tmp_path / "tiles", tmp_path / "features_tiny"], ["s10"])
    return tmp_path


def test_read_progress_counts_by_stage_and_state(out: Path) -> None:
    slides, (tiles, features) = read_progress(out)
    assert slides == 11
    assert tiles.counts == {"done": 9, "no_tissue": 0, "failed": 1, "stopped": 0, "todo": 1}
    assert features.counts == {"done": 5, "no_tissue": 0, "failed": 3, "stopped": 1, "todo": 2}, "s9 never comes here"
    assert (tiles.left, features.left) == (1, 3), "what failed is not left to do"
    assert (tiles.folder, tiles.tiles, features.tiles) == ("tiles", 9000, 5000)


def test_read_progress_takes_the_rate_of_the_last_hour_by_the_clock(out: Path) -> None:
    _, (tiles, features) = read_progress(out)
    assert features.tiles_per_second == pytest.approx(4000 / 40)
    assert features.slides_per_second == pytest.approx(4 / 40)
    assert features.tiles_left == 3000, "a slide without a count is taken for the mean"
    assert features.seconds_left == pytest.approx(30.0)
    assert tiles.seconds_left == pytest.approx(1 / 1.0)
    assert features.last == 7040.0


def test_read_progress_groups_failures_by_kind(out: Path) -> None:
    _, (tiles, features) = read_progress(out)
    assert features.failures == {"tile 7 of 1000 (x 512, y 0, level 1) can't be decoded.": ("s5", "s6")}
    assert tiles.failures == {"expected microns per pixel in the file, got none.": ("s9",)}
    errors = {"s1": "slide 's1': 2 of 'p' and s1", "s2": "slide 's2': 31 of 'q' and s2", "s3": "other"}
    assert failures_by_kind(errors) == {"2 of 'p' and s1": ("s1", "s2"), "other": ("s3",)}


def test_a_slide_that_is_called_like_a_word_leaves_the_words_of_its_error() -> None:
    errors = {
        "grey": "slide 'grey': got grey pixels.",
        "8": "slide '8': got no 8-bit colours.",
        "a": "a.h5: got 'a.tif'.",
    }
    words = {"got grey pixels.": ("grey",), "got no 8-bit colours.": ("8",), "....h5: got '....tif'.": ("a",)}
    assert failures_by_kind(errors) == words
    pipes = {"pipe": "slide 'pipe': got a pipe or a device.", "other": "slide 'other': got a pipe or a device."}
    assert failures_by_kind(pipes) == {"got a pipe or a device.": ("other", "pipe")}


def test_read_progress_passes_over_broken_files_and_needs_no_table(out: Path) -> None:
    (out / "slides.csv").unlink()
    (out / "tiles/s0.json").write_text('{"status": ')
    (out / "tiles/s1.json").write_text("[]")
    (out / "features_tiny/s8.json").write_text('{"status": "done", "tiles": "many", "ended": null, "error": 3}')
    slides, (tiles, _) = read_progress(out)
    assert (slides, tiles.counts["done"], tiles.counts["todo"]) == (10, 7, 2)


def test_slide_that_failed_in_a_stage_before_has_failed_in_its_own_encoders_stages_alone(tmp_path: Path) -> None:
    put(tmp_path / "features_tiny", "s0", "failed", error="no.")
    put(tmp_path / "features_other", "s0", tiles=4, ended=1.0)
    put(tmp_path / "slides_mean__tiny", "s1", tiles=4, ended=1.0)
    put(tmp_path / "slides_mean__other", "s1", tiles=4, ended=1.0)
    states = {stage.folder: (stage.counts["failed"], stage.left) for stage in read_progress(tmp_path)[1]}
    assert states["slides_mean__tiny"] == (1, 0) and states["slides_mean__other"] == (0, 1)


def test_status_prints_stages_and_reasons_and_refuses_other_folders(
    out: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "11 slides" in said and "100 tiles/s" in said and "(s5, s6)" in said
    assert ["features_tiny", "5", "0", "3", "1", "2", "5,000"] in [line.split() for line in said.splitlines()]
    assert main(["status", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slides"] == 11 and found["stages"][1]["counts"]["done"] == 5
    assert main(["status", str(tmp_path_factory.mktemp("empty"))]) == 1
    assert main(["status", str(out / "nothing")]) == 1
    errors = capsys.readouterr().err
    assert "expected the output folder of a run" in errors and "no such folder" in errors


def test_status_imports_nothing_heavy_and_ctrl_c_at_its_end_says_nothing(out: Path) -> None:
    code = (
        "import atexit, os, signal, sys\nfrom gigapath.cli.main import command\n"
        "heavy = {'torch', 'numpy', 'h5py', 'cv2', 'openslide', 'PIL'}\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"  # the last to be called
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['gigapath', 'status', {str(out)!r}]\ncommand()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert run.stderr == ""
