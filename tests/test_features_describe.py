"""`gigapath check --describe` and tables of `gigapath convert`: what a file is, in words and as JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import (
    CELLS,
    CLAM_COORDS,
    make_features,
    make_tiles,
    shuffled,
    write_clam,
    write_gigapath,
    write_h5,
    write_mussel,
    write_published,
    write_slide2vec,
    write_stamp,
    write_trident,
)

from gigapath.cli.main import main
from gigapath.cohort.status import Status, write_status
from gigapath.features import (
    SlideEmbeddings,
    TileEmbeddingsWriter,
    write_slide,
    write_tiles,
)
from gigapath.features.arrays import read_tensor
from gigapath.features.check import describe, description_in_words

FEATURES = make_features()


def write_ours(path: Path, **options: Any) -> Path:
    attrs = {"encoder": "standin", "weights_sha256": "ab" * 32, "precision": "fp32"}
    return write_gigapath(path, FEATURES, attrs=attrs, **options)


def test_describe_says_what_our_file_is(tmp_path: Path) -> None:
    found = describe(write_ours(tmp_path / "a.h5", dtype="float16"))
    assert json.loads(json.dumps(found)) == found  # plain JSON values, attributes too
    expected = {
        "file": "a.h5", "kind": "tile embeddings", "tool": "gigapath", "slide_id": "slide-1", "tiles": 8, "width": 6,
        "dtype": "float16", "encoder": "standin", "precision": "fp32", "numerics_version": 1, "mpp": 0.5,
        "frame": "level0", "step": 512.0, "closest": 512.0, "columns": [3, 7], "rows": [1, 4], "order": "row-major",
        "complete": True, "warnings": [],
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("write", "facts"),
    [
        (write_trident, {"tool": "trident", "step": 512.0, "encoder": "gigapath", "mpp": None, "complete": None}),
        (write_clam, {"tool": "clam", "step": 512.0, "encoder": None}),
        (write_stamp, {"tool": "stamp", "frame": "um", "step": 256.0, "mpp": 256 / 224, "dtype": "float16"}),
        (write_mussel, {"tool": "mussel", "step": 509.0, "mpp": 0.5, "slide_id": "slide-1"}),
        (
            lambda *a: write_slide2vec(*a, order=shuffled(8)),
            {"tool": "slide2vec", "mpp": 0.5, "encoder": "prov-gigapath"},
        ),
    ],
)
def test_describe_knows_other_tools(write: Any, facts: dict[str, Any], tmp_path: Path) -> None:
    found = describe(write(tmp_path, FEATURES))
    assert {name: found[name] for name in facts} == facts
    assert found["kind"] == "tile embeddings" and found["tiles"] == 8 and found["columns"] is not None
    assert all(line.endswith(".") for line in description_in_words(found))


def test_describe_goes_on_where_the_step_is_unknown(tmp_path: Path) -> None:
    path = write_published(tmp_path, FEATURES)
    found = describe(path)
    assert found["step"] is None and found["columns"] is None and found["closest"] == 256
    assert any("--tile-size-level0" in warning for warning in found["warnings"])
    assert describe(path, tile_size_level0=256)["columns"] == [3, 7]


def test_describe_warns_where_neighbours_lie_two_cells_apart(tmp_path: Path) -> None:
    path = write_trident(tmp_path, FEATURES, patch_size_level0=256)  # level 0 of a 40x slide divided by 256
    assert any("neighbours are two cells apart" in warning for warning in describe(path)["warnings"])
    far = write_trident(tmp_path, FEATURES, CELLS + np.array([1000, 0], np.int32))
    assert any("beyond the slide encoder's 0 to 999" in warning for warning in describe(far)["warnings"])


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (np.lexsort((CELLS[:, 1], CELLS[:, 0])), "column-major"),
        (shuffled(8), "neither by row nor by column"),
    ],
)
def test_describe_tells_the_order_of_the_file(order: np.ndarray, words: str, tmp_path: Path) -> None:
    assert describe(write_trident(tmp_path, FEATURES, CELLS[order]))["order"] == words


def test_describe_tiles_coordinates_and_slides(tmp_path: Path) -> None:
    write_tiles(tmp_path / "t.h5", make_tiles())
    assert describe(tmp_path / "t.h5")["kind"] == "tiles"
    coords = write_h5(tmp_path / "c.h5", {"coords": CELLS * 512}, {"coords": CLAM_COORDS})
    found = describe(coords)
    assert (found["kind"], found["tool"], found["step"], found["tiles"]) == ("tile coordinates", "clam", 512.0, 8)
    write_slide(
        tmp_path / "s.h5",
        SlideEmbeddings(
            slide_id="s",
            tile_mean=np.ones((1, 4)),
            states_mean=np.ones((13, 5)),
            default_mean=np.ones((1, 5)),
            attrs={"trained": False, "slide_encoder": "gigapath", "encoder": "standin"},
        ),
    )
    found = describe(tmp_path / "s.h5")
    assert found["width"] == 5 and found["trained"] is False
    assert found["embeddings"] == ["tile-mean", "default:mean", "state:0:mean to state:12:mean"]
    text = "\n".join(description_in_words(found))
    assert "slide encoder: gigapath, untrained" in text and "Warning: the slide encoder's weights are random" in text


def test_describe_an_empty_slide(tmp_path: Path) -> None:
    with TileEmbeddingsWriter(tmp_path / "e.h5", make_tiles(cells=np.zeros((0, 2), int)), embed_dim=6):
        pass
    found = describe(tmp_path / "e.h5")
    assert found["tiles"] == 0 and "it has no tiles." in found["warnings"]
    assert "0 tiles; 6 values each" in "\n".join(description_in_words(found))


def test_inspect_prints_words_or_json_and_goes_on_past_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_ours(tmp_path / folder / "a.h5") for folder in ("one", "two"))
    assert main(["inspect", str(one)]) == 0
    assert capsys.readouterr().out.startswith("a.h5: tile embeddings of slide slide-1")
    assert main(["inspect", str(one), str(two)]) == 0
    said = capsys.readouterr().out
    assert f"{one}: " in said and f"{two}: " in said, "several are told by their paths"
    assert main(["inspect", str(one), str(one), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["attrs"]["tissue_method"] == "otsu"
    (tmp_path / "text.h5").write_text("slide_id,label\n")
    assert main(["inspect", str(tmp_path / "text.h5"), str(tmp_path / "none.h5"), str(one.parent), str(one)]) == 1
    captured = capsys.readouterr()
    assert "a.h5: tile embeddings" in captured.out
    assert [name in line for name, line in zip(("text.h5", "none.h5", "one"), captured.err.splitlines(), strict=True)]


def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    for content in ({"code": print}, torch.arange(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"a\.pt"):
            read_tensor(path)
    torch.save(torch.ones(2, 3, dtype=torch.bfloat16), path)
    assert read_tensor(path).dtype == np.float32


def test_convert_writes_the_table_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for slide_id in ("a", "b"):
        slide = SlideEmbeddings(slide_id=slide_id, tile_mean=np.ones((1, 4)))
        write_slide(tmp_path / "run" / "slides_mean__standin" / f"{slide_id}.h5", slide)
    to = tmp_path / "table.csv"
    assert main(["convert", str(tmp_path / "run"), "--embedding", "tile-mean", "--to", str(to)]) == 0
    assert "2 slides, 4 values each (tile-mean)" in capsys.readouterr().out
    assert to.read_text().splitlines()[0] == "slide_id,embedding,trained,e0,e1,e2,e3"
    assert main(["export", str(tmp_path / "run"), "--to", str(to)]) == 1, "its former name"
    assert "tile-mean" in capsys.readouterr().err
    table, run = to.read_bytes(), str(tmp_path / "run")
    for more in (["--to", str(to), "--out", str(tmp_path)], ["--to", "clam"], ["--to", "t.xls"], ["--to", "CLAM"]):
        assert main(["convert", run, "--embedding", "tile-mean", *more]) in (1, 2)
        assert "--to" in capsys.readouterr().err
    assert to.read_bytes() == table


def test_export_counts_the_slides_that_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "slides_mean__standin"
    for number, state in enumerate(("done", "failed", "stopped", "no_tissue")):
        write_status(folder, Status(f"s{number}", "slides", state))
    write_status(tmp_path / "run" / "tiles", Status("s4", "tiles", "done", tiles=3))
    write_slide(folder / "s0.h5", SlideEmbeddings(slide_id="s0", tile_mean=np.ones((1, 4))))
    for given in (tmp_path / "run", folder):
        assert main(["export", str(given), "--embedding", "tile-mean", "--to", str(tmp_path / "t.csv")]) == 0
        assert "3 slides" in capsys.readouterr().out
