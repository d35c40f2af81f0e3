"""A probe of tiles on whole slides: what it says of each tile, counts a slide, and a map."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from feature_files import make_tiles, write_gigapath

from gigapath.cli.main import main
from gigapath.finetune import load_head
from gigapath.linear_probe.embeddings import EmbeddingTable, write_table
from gigapath.linear_probe.heads import TileHead, load_tile_head, save_tile_head

CLASSES = ("blood", "fat", "tumour")
WIDTH, MADE = 6, {"encoder": "made", "weights_sha256": "ab" * 32}
CELLS = np.array([(x, y) for y in range(4) for x in range(7)], np.int64)  # not square
TRUTH = np.array([0] * 5 + [2] * 14 + [1] * 9)


def vectors(labels: np.ndarray, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(len(labels), WIDTH)).astype(np.float32)
    found[np.arange(len(labels)), labels] += 9.0
    return found


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe of 300 made tiles of three classes, and two slides of which the truth is known."""
    folder = tmp_path_factory.mktemp("probed")
    labels = np.arange(300) % 3
    table = EmbeddingTable(
        names=tuple(f"t{n}" for n in range(300)),
        features=vectors(labels, 0),
        splits=tuple(np.repeat(["train", "val", "test"], 100)),
        labels=tuple(CLASSES[label] for label in labels),
        attrs=MADE,
    )
    write_table(folder / "tiles.h5", table)
    words = ["probe", str(folder / "tiles.h5"), "--out", str(folder / "probe"), "--solver", "lbfgs"]
    assert main([*words, "--replicates", "0"]) == 0
    (folder / "slides").mkdir()
    for name, truth in (("one", TRUTH), ("two", np.roll(TRUTH, 3))):
        tiles = make_tiles(name, cells=CELLS)
        write_gigapath(folder / "slides" / f"{name}.h5", vectors(truth, 7), tiles, attrs=MADE)
    return folder


def test_tiles_of_each_class_are_counted(probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "counts.csv"
    assert main(["predict", str(probed / "probe"), str(probed / "slides"), "--out", str(out)]) == 0
    assert "one: 28 tiles (blood 5, fat 9, tumour 14)" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == ["one", "two"]
    assert [rows[0][f"n_{name}"] for name in CLASSES] == ["5", "9", "14"] and rows[0]["predicted"] == "tumour"
    assert sum(float(rows[0][f"p_{name}"]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


def test_probabilities_are_those_of_the_probe(probed: Path) -> None:
    head = load_tile_head(probed / "probe")
    with (probed / "probe" / "predictions.csv").open() as file:
        said = [[float(row[f"p_{name}"]) for name in CLASSES] for row in csv.DictReader(file) if row["split"] == "test"]
    logits = vectors(np.arange(300) % 3, 0)[200:] @ head.weight.T + head.bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert np.abs(shares / shares.sum(axis=1, keepdims=True) - said).max() < 1e-5


def test_the_map_has_the_class_of_each_tile(probed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["predict", str(probed / "probe"), str(probed / "slides"), "--draw", str(tmp_path / "maps")]
    assert main([*words, "--device", "cpu"]) == 0
    facts = json.loads((tmp_path / "maps" / "one" / "classes.json").read_text())
    assert [(each["name"], each["tiles"]) for each in facts["colour"]["categories"]] == [
        ("blood", 5),
        ("fat", 9),
        ("tumour", 14),
    ]
    held = np.load(tmp_path / "maps" / "one" / "classes.npz")
    assert held["values"].tolist() == TRUTH.tolist() and held["probabilities"].shape == (28, 3)
    assert {path.suffix for path in (tmp_path / "maps" / "two").iterdir()} >= {".png", ".geojson", ".npz"}


def test_what_the_head_cannot_be_applied_to_is_one_sentence(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, slides = str(probed / "probe"), str(probed / "slides")
    other = write_gigapath(tmp_path / "o.h5", vectors(TRUTH, 1), make_tiles("o", cells=CELLS), attrs={"encoder": "b"})
    (tmp_path / "labels.csv").write_text("slide_id,label\none,1\n")
    for words, status, said in (
        ([head, str(other)], 3, "its encoder is b"),
        (
            [head, slides, "--labels", str(tmp_path / "labels.csv"), "--out", "o"],
            1,
            "a head of slides, got one of tiles",
        ),
    ):
        assert main(["predict", *words]) == status
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="a head of slides"):
        load_head(head)
    for kind in ("gradient", "classes gradient"):
        words = ["map", slides, "--kind", *kind.split(), "--checkpoint", head, "--out", str(tmp_path / "m")]
        assert main(words) == 1
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "head.json").write_bytes((probed / "probe" / "head.json").read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        load_tile_head(tmp_path / "copy")
    for weight in (np.zeros(8), np.zeros((3, 8)), np.full((2, 8), np.nan)):
        wrong = TileHead(weight.astype(np.float32), np.zeros(2, np.float32), ("a", "b"), {})
        (tmp_path / "wrong").mkdir(exist_ok=True)
        save_tile_head(tmp_path / "wrong", wrong)
        with pytest.raises(ValueError, match="damaged"):
            load_tile_head(tmp_path / "wrong")
