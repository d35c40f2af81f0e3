"""Readers of files from elsewhere, under fuzzing: whatever the bytes are, either they are read or one of our sentences
comes out; never another exception, never an allocation far beyond the file.

50 examples a property; GIGAPATH_FUZZ=5000 asks for more.
"""

import csv
import gzip
import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_inputs as broken
import numpy as np
import pytest
import torch
from feature_files import make_features, make_tiles, write_stamp, write_trident
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_embeddings import pt_bytes

from gigapath.cohort.manifest import read_manifest
from gigapath.evaluation.labels import Task, load_task, read_labels
from gigapath.features import TileEmbeddingsWriter, read_features, read_tiles
from gigapath.features.arrays import read_npz
from gigapath.features.check import check_file
from gigapath.finetune.data import look_at
from gigapath.linear_probe.data import rows_of_table
from gigapath.linear_probe.embeddings import read_embeddings
from gigapath.preprocessing.masks import read_outlines
from gigapath.tables import parse_table

EXAMPLES = int(os.environ.get("GIGAPATH_FUZZ", "50"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MOST_BYTES = 96 << 20  # far more than any of these files of a few kB needs


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def reads_or_says(read: Callable[[], Any], errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> None:
    """Run a reader; any error but ours goes through, and so does a large allocation."""
    tracemalloc.start()
    try:
        read()
    except errors as error:
        assert str(error) and not isinstance(error, UnicodeError | MemoryError), repr(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_BYTES, peak


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """A good file with bytes overwritten, cut out, put in, or its end gone."""
    places = st.integers(0, max(0, len(good) - 1))
    values = st.one_of(
        st.binary(min_size=1, max_size=16), st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7])
    )
    edits = st.lists(st.tuples(st.sampled_from(["over", "out", "in", "cut"]), places, values), min_size=1, max_size=6)

    def apply(changes: list[tuple[str, int, bytes]]) -> bytes:
        data = good
        for kind, at, value in changes:
            if kind == "over":
                data = data[:at] + value + data[at + len(value) :]
            elif kind == "out":
                data = data[:at] + data[at + len(value) :]
            elif kind == "in":
                data = data[:at] + value + data[at:]
            else:
                data = data[: max(1, at)]
        return data

    return edits.map(apply)


def good_h5(folder: Path) -> dict[str, bytes]:
    tiles, features = make_tiles(), make_features()
    with TileEmbeddingsWriter(folder / "ours.h5", tiles, embed_dim=6, attrs={"encoder": "gigapath"}) as writer:
        writer.write(0, features)
    paths = {
        "ours": folder / "ours.h5",
        "trident": write_trident(folder / "t", features),
        "stamp": write_stamp(folder / "s", features),
    }
    return {name: path.read_bytes() for name, path in paths.items()}


@pytest.fixture(scope="module")
def h5_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return good_h5(tmp_path_factory.mktemp("good"))


@FUZZ
@given(data=st.data(), name=st.sampled_from(["ours", "trident", "stamp"]))
def test_h5_files(data: st.DataObject, name: str, h5_files: dict[str, bytes], place: Path) -> None:
    path = place / "a.h5"
    path.write_bytes(data.draw(damaged(h5_files[name])))
    reads_or_says(lambda: read_features(path))
    reads_or_says(lambda: read_tiles(path))
    reads_or_says(lambda: look_at(path))
    for finding in check_file(path).findings:
        assert finding.text and "\n" not in finding.text


@FUZZ
@given(content=damaged(broken.npz_bytes(features=np.ones((4, 3), np.float32), tile_index=np.arange(4))))
def test_npz_files(content: bytes, place: Path) -> None:
    (place / "a.npz").write_bytes(content)
    reads_or_says(lambda: read_npz(place / "a.npz"))


CSV_TEXT = st.text(st.sampled_from('ab01 ,;"\n\r\t\0é.-/\\:%='), max_size=200)
CSV_BYTES = st.one_of(
    st.binary(max_size=200),
    CSV_TEXT.map(lambda text: text.encode()),
    CSV_TEXT.map(lambda text: ("slide_id,label,path,mpp,input,split,patient_id\n" + text).encode()),
    st.lists(st.lists(st.text(max_size=12), min_size=7, max_size=7), min_size=1, max_size=4).map(
        lambda rows: _as_csv([["slide_id", "label", "path", "mpp", "input", "split", "mask"], *rows])
    ),
)


def _as_csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([[cell.encode("utf-8", "replace").decode() for cell in row] for row in rows])
    return text.getvalue().encode()


@FUZZ
@given(content=CSV_BYTES)
def test_csv_files(content: bytes, place: Path) -> None:
    path = place / "a.csv"
    path.write_bytes(content)
    task = Task("made", "multi_class", ("0", "1"))
    genes = Task("made", "multi_label", ("label", "split"))
    reads_or_says(lambda: read_manifest(path))
    reads_or_says(lambda: read_labels(path, task))
    reads_or_says(lambda: read_labels(path, genes, id_rule="tcga"))
    reads_or_says(lambda: rows_of_table(parse_table(content, "a.csv"), label="label", split=None, group=None))


WORDS = st.sampled_from(
    [
        "name",
        "setting",
        "label_dict",
        "binary",
        "multi_class",
        "max_tiles",
        "qwk",
        "add_metrics",
        "0",
        "1",
        "true",
        "null",
    ]
)
YAML_BYTES = st.one_of(
    st.binary(max_size=150),
    st.text(st.sampled_from("ab:-{}[]&*!|>'\"#%@` \n\t0129.~?,<="), max_size=150).map(lambda text: text.encode()),
    st.recursive(WORDS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)))
    .map(str)
    .map(lambda text: f"name: x\nsetting: binary\nlabel_dict: {text}\n".encode()),
    st.dictionaries(WORDS, st.one_of(WORDS, st.integers(), st.floats(), st.lists(WORDS)), max_size=5).map(
        lambda value: str(value).encode()
    ),
)


@FUZZ
@given(content=YAML_BYTES)
def test_yaml_tasks(content: bytes, place: Path) -> None:
    (place / "task.yaml").write_bytes(content)
    reads_or_says(lambda: load_task(place / "task.yaml"))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=12,
)
GEOMETRIES = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["Polygon", "MultiPolygon", "GeometryCollection", "Point"])},
        optional={"coordinates": JSON_VALUES, "geometries": st.lists(JSON_VALUES, max_size=2)},
    ),
    st.lists(st.lists(st.floats(-10, 1e9), min_size=2, max_size=3), min_size=3, max_size=5).map(
        lambda ring: {"type": "Polygon", "coordinates": [ring]}
    ),
)
DOCUMENTS = st.one_of(
    JSON_VALUES,
    st.lists(
        st.fixed_dictionaries(
            {"type": st.just("Feature"), "geometry": GEOMETRIES}, optional={"properties": JSON_VALUES}
        ),
        max_size=3,
    ).map(lambda features: {"type": "FeatureCollection", "features": features}),
)


@FUZZ
@given(document=DOCUMENTS, noise=st.binary(max_size=100), kind=st.sampled_from(["json", "noise", "cut", "gz"]))
def test_geojson_files(document: Any, noise: bytes, kind: str, place: Path) -> None:
    text = json.dumps(document).encode()
    packed = gzip.compress(text)[:-3] + noise
    content = {"json": text, "noise": noise, "cut": text[: len(text) // 2], "gz": packed}[kind]
    (place / "a.geojson").write_bytes(content)
    reads_or_says(lambda: read_outlines(place / "a.geojson"))


def made_zip(method: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for number in range(3):
            archive.writestr(f"emb/train/t{number}.pt", pt_bytes(torch.arange(6.0) + number))
    return content.getvalue()


ZIPS = {method: made_zip(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)}


@FUZZ
@given(content=st.one_of(*(damaged(good) for good in ZIPS.values()), st.binary(max_size=300)))
def test_zips_of_embeddings(content: bytes, place: Path) -> None:
    (place / "a.zip").write_bytes(content)
    reads_or_says(lambda: read_embeddings(place / "a.zip", cache=False))
