"""Our files: what is written comes back, other tools read it as it is, and a failing disk leaves nothing."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from feature_files import CELLS, make_features, make_tiles, write_gigapath

import gigapath
from gigapath.features import (
    TILES_NUMERICS_VERSION,
    FeatureFileError,
    SlideEmbeddings,
    TileEmbeddingsWriter,
    Tiles,
    export_table,
    gigapath_file,
    parse_embedding,
    read_features,
    read_slide,
    read_slides,
    read_tiles,
    write_slide,
    write_tiles,
)
from gigapath.features.gigapath_file import KeptRows
from gigapath.files import OutputError, open_own

FEATURES = make_features()
ATTRS = {
    "encoder": "standin",
    "weights_sha256": "0" * 64,
    "precision": "fp32",
    "batch_shape": (32, 3, 224, 224),
    "device": "cpu",
}
EMPTY = np.zeros((0, 2), np.int32)


def write_ours(path: Path, tiles: Tiles | None = None, features: np.ndarray = FEATURES, **options: Any) -> Path:
    return write_gigapath(path, features, tiles, **{"attrs": ATTRS, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written comes back


@pytest.mark.parametrize("changes", [{}, {"cells": EMPTY, "qc": np.zeros((0, 0)), "qc_names": ()}])
def test_tiles_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    tiles = make_tiles(**changes)
    write_tiles(tmp_path / "a.h5", tiles)
    found = read_tiles(tmp_path / "a.h5")
    for field in dataclasses.fields(Tiles):
        expected, value = getattr(tiles, field.name), getattr(found, field.name)
        if isinstance(expected, np.ndarray):
            assert np.array_equal(value, expected) and value.dtype == expected.dtype, field.name
        elif field.name != "attrs":
            assert value == expected and type(value) is type(expected), field.name
    assert found.attrs == {**tiles.attrs, "numerics_version": TILES_NUMERICS_VERSION}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_round_trip(dtype: str, tmp_path: Path) -> None:
    tiles = make_tiles()
    found = read_features(write_ours(tmp_path / "a.h5", tiles, dtype=dtype))
    assert found.features.dtype == dtype
    assert np.array_equal(found.features, FEATURES.astype(dtype))
    assert found.source == "gigapath" and found.encoder == "standin" and found.slide_id == "slide-1"
    assert np.array_equal(found.coords_level0, tiles.coords_level0) and found.coords.dtype == np.int64
    assert found.cells is not None and np.array_equal(found.cells, CELLS)
    assert found.tissue_fraction is not None and np.array_equal(found.tissue_fraction, tiles.tissue_fraction)
    assert found.section is not None and np.array_equal(found.section, tiles.section)
    assert found.qc is not None and np.array_equal(found.qc, tiles.qc) and found.qc_names == ("focus", "pen_hue")
    assert found.tile_size_level0 == 512
    assert found.attrs["batch_shape"] == (32, 3, 224, 224) and found.attrs["tissue_threshold"] is None


def test_slide_embeddings_round_trip(tmp_path: Path) -> None:
    slide = make_slide("s")
    write_slide(tmp_path / "s.h5", slide)
    found = read_slide(tmp_path / "s.h5")
    for name in ("states_mean", "states_class", "default_mean", "default_class", "tile_mean"):
        assert np.array_equal(getattr(found, name), getattr(slide, name))
    assert found.attrs["trained"] is True and found.attrs["slide_encoder"] == "gigapath"
    write_slide(tmp_path / "m.h5", SlideEmbeddings(slide_id="m", tile_mean=np.ones((1, 4))))
    mean = read_slide(tmp_path / "m.h5")
    assert mean.states_mean is None and mean.default_class is None and mean.tile_mean.shape == (1, 4)


def test_equal_input_gives_equal_bytes_whatever_the_blocks(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    first = digest(write_ours(tmp_path / "a.h5"))
    with TileEmbeddingsWriter(tmp_path / "b.h5", make_tiles(), embed_dim=6, attrs=ATTRS) as writer:
        writer.write(5, FEATURES[5:])
        writer.write(0, FEATURES[:5])
    assert digest(tmp_path / "b.h5") == first
    assert digest(write_ours(tmp_path / "c.h5", features=FEATURES + 1)) != first


# Other tools read it as it is


def test_published_script_and_trident_read_it_as_it_is(tmp_path: Path) -> None:
    for tiles, features in ((make_tiles(), FEATURES), (make_tiles(cells=EMPTY), FEATURES[:0])):
        with h5py.File(write_ours(tmp_path / "a.h5", tiles, features), "r") as file:
            assets = {name: file[name][:] for name in file}  # as the published dataset does, on every top-level name
            assert file["features"].chunks is None and file["features"].compression is None
        assert set(assets) == {"features", "coords", "cells", "tissue_fraction", "section", "qc"}
        assert np.array_equal(assets["features"], features) and assets["coords"].shape == (len(features), 2)
    with h5py.File(write_ours(tmp_path / "a.h5"), "r") as file:
        coords, features = dict(file["coords"].attrs), dict(file["features"].attrs)
        assert file["coords"].dtype == np.int64
    expected = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "name": "slide-1", "savetodir": "None", "level0_width": 6000, "level0_height": 4000,
    }  # fmt: skip
    assert {name: coords[name] for name in expected} == expected
    assert features == {"name": "slide-1", "savetodir": "None", "encoder": "standin"}
    # Its slide encoder divides level-0 coordinates by patch_size_level0.
    assert np.array_equal(make_tiles().coords_level0 // coords["patch_size_level0"], CELLS)
    bare = make_tiles(attrs={}, mpp=0.499, tile_size_level0=(256, 256), coords_level0=CELLS * 256)
    with h5py.File(write_ours(tmp_path / "b.h5", bare), "r") as file:
        unknown = [file["coords"].attrs[name] for name in ("level0_width", "level0_height", "level0_magnification")]
    assert unknown == ["None", "None", 20]


def test_clam_reads_the_level_that_was_read_and_no_other(tmp_path: Path) -> None:
    with h5py.File(write_ours(tmp_path / "a.h5"), "r") as file:
        attrs = dict(file["coords"].attrs)
    # CLAM reads patch_size pixels of patch_level at each coordinate.
    assert (attrs["patch_level"], attrs["patch_size"]) == (1, 256)
    assert np.array_equal(attrs["downsample"] * attrs["patch_size"], [512, 512])
    assert list(attrs["level_dim"]) == [3000, 2000]
    resampled = make_tiles(level=0, read_size=(512, 512))
    with h5py.File(write_ours(tmp_path / "b.h5", resampled), "r") as file:
        assert not {"patch_level", "downsample", "level_dim"} & set(file["coords"].attrs)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coords_level0": CELLS[::-1] * 512, "cells": CELLS[::-1]}, "sorted by"),
        ({"coords_level0": CELLS * 512 + np.arange(8)[:, None]}, "anchor"),
        ({"section": np.ones(7, int)}, "section"),
        ({"tile_size_level0": (512.5, 512)}, "whole, positive"),
        ({"tile_size_level0": (0, 512)}, "whole, positive"),
        ({"coords_level0": CELLS * 512 + 0.5}, "whole int64"),
        ({"qc_names": ("focus",)}, "qc"),
        ({"slide_id": "../x"}, "without slashes"),
        ({"slide_id": "."}, "other than . and .., which mean folders, got '.'"),
    ],
)
def test_tiles_that_contradict_themselves_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_tiles(**change)


@pytest.mark.parametrize(
    ("block", "start", "options", "words"),
    [
        (FEATURES[:, :5], 0, {}, r"expected a block \(n, 6\)"),
        (FEATURES[0], 0, {}, r"expected a block"),
        (FEATURES, 1, {}, "within 8 tiles"),
        (FEATURES[:1], -1, {}, "within 8 tiles"),
        (np.where(np.isin(FEATURES, FEATURES[2, 3]), np.nan, FEATURES), 0, {}, "NaN or infinity in tile 2"),
        (FEATURES * 1e6, 0, {"dtype": "float16"}, "as float16"),
        (FEATURES, 0, {"dtype": "float64"}, "expected dtype float32 or float16"),
        (FEATURES[:7], 0, {}, "expected 8 tiles, got 7"),
        (FEATURES, 0, {"attrs": {"where": Path("/secret")}}, "attribute where"),
    ],
)
def test_writer_refuses_what_does_not_belong_and_leaves_no_file(
    block: np.ndarray, start: int, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match=words),
        TileEmbeddingsWriter(tmp_path / "a.h5", make_tiles(), embed_dim=6, **options) as writer,
    ):
        writer.write(start, block)
    assert names(tmp_path) == []


def test_unfinished_disordered_and_other_files_are_not_read(tmp_path: Path) -> None:
    path, other = write_ours(tmp_path / "a.h5"), tmp_path / "b.h5"
    with pytest.raises(FeatureFileError, match="expected a file of our stage 'tiles', got one of stage 'features'"):
        read_tiles(path)
    with h5py.File(other, "w") as file:
        file["coords"] = CELLS
    with pytest.raises(FeatureFileError, match="got another tool's"):
        read_slide(other)
    with h5py.File(path, "r+") as file:
        file["cells"][0] = CELLS[1]
    with pytest.raises(FeatureFileError, match="row-major"):
        read_features(path)
    write_tiles(other, make_tiles())
    for read, file in ((read_features, path), (read_tiles, other)):
        with h5py.File(file, "r+") as changed:
            changed.attrs["complete"] = False
        with pytest.raises(FeatureFileError, match=rf"{file.stem}\.h5: it was never finished"):
            read(file)


# Files that are open elsewhere


@pytest.mark.parametrize("locking", [None, False, True, "best-effort"])
def test_file_that_this_process_has_open_is_read_as_it_is_or_said_to_be_open(tmp_path: Path, locking: Any) -> None:
    path = write_ours(tmp_path / "a.h5")
    options = {} if locking is None else {"locking": locking}
    with h5py.File(path, "r", **options) as file:
        held = file["features"]
        assert np.array_equal(read_features(path).features, FEATURES)
        assert np.array_equal(held[()], FEATURES), "theirs stays open"
    for mode in ("r+", "a", "w"):
        with h5py.File(path, mode, **options), pytest.raises(FeatureFileError, match="open for writing"):
            read_features(path)


def test_file_that_another_program_is_making_is_said_to_be_open(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    code = (
        "import sys, h5py\nwith h5py.File(sys.argv[1], 'w', locking=True) as file:\n"
        " file['features'] = [[0.0]]\n print('made', flush=True)\n sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(FeatureFileError, match=r"open for writing|still being written"):
            read_features(path)
        other.communicate()


# A failing disk


def at_call(number: int, code: int, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, refused from its `number`-th call on."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise OSError(code, os.strerror(code))
        return plain(*args, **options)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(
    ("call", "number"),
    [
        *(("pwrite", number) for number in (1, 2, 4)),
        *((call, 1) for call in ("ftruncate", "fsync", "close", "replace")),
    ],
)
def test_failing_disk_gives_one_sentence_and_leaves_nothing(
    call: str, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features_standin"
    write_ours(folder / "old.h5")
    before = (folder / "old.h5").read_bytes()
    monkeypatch.setattr(os, call, at_call(number, code, getattr(os, call)))
    with pytest.raises(OutputError) as caught:
        write_ours(folder / "old.h5", features=FEATURES + 1)
    monkeypatch.undo()
    assert str(caught.value).startswith("features_standin/old.h5 could not be written: ")
    assert caught.value.errno == code
    assert names(folder) == ["old.h5"] and (folder / "old.h5").read_bytes() == before
    write_ours(folder / "old.h5", features=FEATURES + 1)  # nothing of the failure lingers
    assert np.array_equal(read_features(folder / "old.h5").features, FEATURES + 1)


CHILD = """
    import resource, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import numpy as np
    from feature_files import make_tiles
    from gigapath.features import TileEmbeddingsWriter
    cells = np.stack(np.divmod(np.arange(4000), 50)[::-1], axis=1)
    tiles = make_tiles(cells=cells)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    sentences = []
    for attempt in range(2):
        try:
            with TileEmbeddingsWriter({path!r}, tiles, embed_dim=64) as writer:
                for start in range(0, 4000, 500):
                    writer.write(start, np.ones((500, 64), np.float32))
        except OSError as error:
            sentences.append(f"{{type(error).__name__}}: {{error}}")
    print(len(sentences), sentences[0])
"""


@pytest.mark.parametrize("limit", [1000, 300_000])
def test_file_size_limit_gives_one_sentence_and_a_clean_exit(limit: int, tmp_path: Path) -> None:
    """HDF5 by itself crashes the process at exit after such a failure."""
    tests, path = Path(__file__).parent, str(tmp_path / "out" / "a.h5")
    code = textwrap.dedent(CHILD).format(tests=str(tests), limit=limit, path=path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tests.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 OutputError: out/a.h5 could not be written: it would grow past the largest file")
    assert names(tmp_path / "out") == []


# Names of embeddings, tables


def make_slide(slide_id: str, depth: int = 12, width: int = 3, **changes: Any) -> SlideEmbeddings:
    states = np.arange((depth + 1) * width, dtype=np.float32).reshape(depth + 1, width)
    fields: dict[str, Any] = {
        "slide_id": slide_id,
        "tile_mean": np.full((1, 4), 0.5),
        "states_mean": states,
        "states_class": -states,
        "default_mean": np.full((1, width), 7.0),
        "default_class": np.full((1, width), -7.0),
        "attrs": {"trained": True, "slide_encoder": "gigapath", "encoder": "gigapath", "precision": "fp32"},
    }
    return SlideEmbeddings(**{**fields, **changes})


@pytest.mark.parametrize(
    ("name", "canonical", "expected"),
    [
        ("default", "default:mean", [7, 7, 7]),
        ("state:11:class", "state:11:class", [-33, -34, -35]),
        ("last-state", "last-state:mean", [36, 37, 38]),
        ("tile-mean", "tile-mean", [0.5] * 4),
        ("trident", "state:11:mean", [33, 34, 35]),
        ("all-states", "all-states:mean", list(range(39))),
    ],
)
def test_named_embedding_is_selected(name: str, canonical: str, expected: list[float]) -> None:
    assert str(parse_embedding(name)) == canonical
    assert parse_embedding(canonical) == parse_embedding(name)
    assert make_slide("s").select(name).tolist() == expected
    bare = SlideEmbeddings(slide_id="s", tile_mean=np.full((1, 4), 0.5))
    if name == "tile-mean":
        assert bare.select(name).tolist() == expected
    else:
        with pytest.raises(ValueError, match="without a slide encoder take tile-mean"):
            bare.select(name)


WRONG_NAMES = ("", "mean", "state", "state:", "state:x", "state:-1", "state:1:max", "state:1:mean:x", "default:")


@pytest.mark.parametrize("name", [*WRONG_NAMES, "tile-mean:mean", "last-state:3", "STATE:1", "state:²"])
def test_unknown_names_are_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ValueError, match="expected default, state:I, last-state or all-states"):
        parse_embedding(name)
    with pytest.raises(ValueError, match=r"expected a state of 0 to 12, got state:13:mean"):
        make_slide("s").select("state:13")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for number, slide_id in enumerate(["b", "a", "c,d"]):
        slide = make_slide(slide_id, default_mean=np.full((1, 3), number / 3))
        write_slide(folder / "slides_gigapath__gigapath" / f"{slide_id}.h5", slide)
    return folder


def test_read_slides_gives_ids_and_vectors_in_order(run: Path) -> None:
    for folder in (run, run / "slides_gigapath__gigapath"):
        ids, vectors = gigapath.read_slides(folder)
        assert ids == ["a", "b", "c,d"]
        assert vectors.dtype == np.float32 and np.array_equal(vectors, np.float32([[1 / 3] * 3, [0] * 3, [2 / 3] * 3]))
    assert read_slides(run, "all-states:class")[1].shape == (3, 39)


def test_read_slides_refuses_mixed_runs_unless_told(run: Path, tmp_path: Path) -> None:
    odd = {"trained": False, "slide_encoder": "gigapath", "encoder": "gigapath", "precision": "bf16"}
    write_slide(run / "slides_gigapath__gigapath" / "z.h5", make_slide("z", attrs=odd))
    with pytest.raises(ValueError, match=r"differ in precision: fp32 \(a\), bf16 \(z\)\..*--allow-mixed"):
        read_slides(run)
    with pytest.warns(UserWarning) as warned:
        ids, _ = read_slides(run, allow_mixed=True)
    assert ids == ["a", "b", "c,d", "z"]
    said = " ".join(str(warning.message) for warning in warned)
    assert "differ in precision" in said and "untrained slide encoder" in said
    export_table(run, tmp_path / "t.csv", allow_mixed=True)
    assert (tmp_path / "t.csv").read_text().splitlines()[-1].startswith("z,default:mean,False,")


def test_read_slides_says_what_it_did_not_find(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_slides(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no slide embeddings"):
        read_slides(tmp_path / "empty")
    write_slide(run / "slides_mean__gigapath" / "a.h5", make_slide("a"))
    with pytest.raises(ValueError, match="got slides_gigapath__gigapath, slides_mean__gigapath"):
        read_slides(run)
    write_slide(run / "slides_mean__gigapath" / "copy.h5", make_slide("a"))
    with pytest.raises(ValueError, match="two files of slide 'a'"):
        read_slides(run / "slides_mean__gigapath")


def test_read_slides_keeps_the_vectors_that_are_asked_for_alone(tmp_path: Path) -> None:
    states = np.zeros((50, 2000), np.float32)  # 400 kB
    for number in range(30):
        slide = SlideEmbeddings(slide_id=f"s{number}", tile_mean=states[:1], states_mean=states)
        write_slide(tmp_path / "slides_x" / f"s{number}.h5", slide)
    tracemalloc.start()
    try:
        read_slides(tmp_path, "state:3")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".parquet"])
def test_exported_tables_hold_the_same_vectors(suffix: str, run: Path, tmp_path: Path) -> None:
    ids, vectors = read_slides(run)
    to = tmp_path / "new" / f"table{suffix}"
    assert export_table(run, to) == (3, 3)
    if suffix == ".npz":
        with np.load(to, allow_pickle=False) as table:
            assert table["slide_ids"].tolist() == ids and np.array_equal(table["vectors"], vectors)
            attrs = json.loads(str(table["attrs"]))
        assert attrs["embedding"] == "default:mean" and attrs["trained"] is True
        return
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(to) if suffix == ".csv" else pandas.read_parquet(to)
    assert list(table.columns) == ["slide_id", "embedding", "trained", "e0", "e1", "e2"]
    assert table["slide_id"].tolist() == ids
    assert set(table["embedding"]) == {"default:mean"} and table["trained"].all()
    assert np.array_equal(table[["e0", "e1", "e2"]].to_numpy(np.float32), vectors)
    assert names(to.parent) == [to.name]


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".parquet"])
def test_exported_table_gains_slides_and_loses_none_unasked(suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pandas")
    folder, to = tmp_path / "slides_x", tmp_path / f"table{suffix}"
    for slide in "ab":
        write_slide(folder / f"{slide}.h5", make_slide(slide))
    export_table(tmp_path, to)
    write_slide(folder / "c.h5", make_slide("c"))
    assert export_table(tmp_path, to)[0] == 3
    before = to.read_bytes()
    (folder / "a.h5").unlink()
    with pytest.raises(ValueError, match=r"1 slide \(a\).*--overwrite"):
        export_table(tmp_path, to)
    write_slide(folder / "a.h5", make_slide("a"))
    write_slide(folder / "b.h5", make_slide("b", default_mean=np.full((1, 3), -7.0)))
    with pytest.raises(ValueError, match=r"1 slide \(b\).*--overwrite"):
        export_table(tmp_path, to)
    with pytest.raises(ValueError, match=r"--embedding default:mean -> tile-mean.*--overwrite"):
        export_table(tmp_path, to, embedding="tile-mean")
    assert to.read_bytes() == before
    assert export_table(tmp_path, to, embedding="tile-mean", overwrite=True) == (3, 4)
    to.write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match=r"no table.*--overwrite"):
        export_table(tmp_path, to)
    assert to.read_bytes() == b"of somebody else"


def test_export_says_what_parquet_needs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pandas and pyarrow.*gigapath\[train\]"):
        export_table(run, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="--to"):
        export_table(run, tmp_path / "t.xls")
    assert names(tmp_path) == ["run"]
    (tmp_path / "t.parquet").write_bytes(b"perhaps a table")
    with pytest.raises(ImportError, match="needs pandas and pyarrow"):
        export_table(run, tmp_path / "t.parquet")


# A large slide goes on behind its last rows that are safe


MANY = np.stack([np.arange(60) % 9, np.arange(60) // 9], axis=1)
TILES = make_tiles(cells=MANY)
ROWS = make_features(60)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are made safe after every block, however quick it was."""
    monkeypatch.setattr(gigapath_file, "KEEP_SECONDS", -1.0)
    monkeypatch.setattr(gigapath_file, "WORTH_SECONDS", -1.0)


def kept(path: Path, identity: str = "one", dtype: str = "float32", step: int = 1) -> KeptRows:
    return KeptRows(path, identity, ROWS.shape, np.dtype(dtype), step)


def write(path: Path, *, start: int = 0, stop: int = 60, fail: bool = False, rows: KeptRows | None = None) -> None:
    """Write rows in blocks of 7; with `fail` the writer is left by an error."""
    with TileEmbeddingsWriter(path, TILES, embed_dim=ROWS.shape[1], attrs={"encoder": "x"}, kept=rows) as writer:
        for first in range(start, stop, 7):
            writer.write(first, ROWS[first : min(stop, first + 7)])
        if fail:
            raise KeyError("stopped")


@pytest.mark.parametrize("step", [1, 8])
def test_writer_goes_on_behind_the_rows_of_a_broken_one(tmp_path: Path, step: int) -> None:
    write(tmp_path / "whole.h5")
    path = tmp_path / "a.h5"
    with pytest.raises(KeyError):
        write(path, stop=40, fail=True, rows=kept(path, step=step))
    assert names(tmp_path) == ["a.h5.rows.partial", "whole.h5"]
    start = kept(path, step=step).find()
    assert start == 40 // step * step
    with pytest.raises(KeyError):  # broken a second time
        write(path, start=start, stop=54, fail=True, rows=kept(path, step=step))
    start = kept(path, step=step).find()
    assert start == 54 // step * step
    write(path, start=start, rows=kept(path, step=step))
    assert names(tmp_path) == ["a.h5", "whole.h5"]
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_rows_of_another_identity_type_or_size_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(KeyError):
        write(path, stop=40, fail=True, rows=kept(path))
    assert kept(path).find() == 40
    assert kept(path, "other").find() == 0
    assert kept(path, dtype="float16").find() == 0
    assert KeptRows(path, "one", (61, ROWS.shape[1]), np.dtype("float32")).find() == 0
    write(path, rows=kept(path, "other"))
    assert names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("damage", ["row", "header", "short", "empty", "count"])
def test_damaged_rows_count_for_nothing_and_the_run_begins_anew(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "whole.h5")
    path = tmp_path / "a.h5"
    with pytest.raises(KeyError):
        write(path, stop=40, fail=True, rows=kept(path))
    file = kept(path).file
    content = bytearray(file.read_bytes())
    if damage in ("row", "header", "count"):
        content[{"row": 4096 + 500, "header": 20, "count": 64}[damage]] ^= 1
    else:
        del content[{"short": -3, "empty": 0}[damage] :]
    file.write_bytes(content)
    assert kept(path).find() == 0
    with pytest.raises(ValueError, match=r"expected 60 tiles, got 20"):  # they were there when looked for
        write(path, start=40, rows=kept(path))
    file.write_bytes(content)
    write(path, rows=kept(path))
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert names(tmp_path) == ["a.h5", "whole.h5"]


def test_blocks_in_any_order_are_kept_up_to_the_first_gap(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with (
        pytest.raises(KeyError),
        TileEmbeddingsWriter(path, TILES, embed_dim=ROWS.shape[1], kept=kept(path)) as writer,
    ):
        for first in (0, 20, 40, 10):
            writer.write(first, ROWS[first : first + 10])
        raise KeyError
    assert kept(path).find() == 30


def test_disk_that_refuses_kept_rows_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("open_own", "pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(gigapath_file, "open_own", refuse if call == "open_own" else open_own)
            patch.setattr(gigapath_file, "os", type("os", (), {**vars(os), call: refuse, "strerror": os.strerror}))
            rows = kept(tmp_path / "b.h5")
            rows.keep(ROWS[:20])
            rows.commit()
            rows.close()
        assert kept(tmp_path / "b.h5").find() == 0 and names(tmp_path) == []


@pytest.mark.parametrize("plant", ["link", "hard link", "pipe"])
def test_what_somebody_planted_under_the_name_of_kept_rows_is_left_alone(tmp_path: Path, plant: str) -> None:
    victim = tmp_path / "victim"
    other = kept(victim)
    other.keep(ROWS[:10])
    other.commit()
    other.close()
    before = other.file.read_bytes()
    rows = kept(tmp_path / "a.h5")
    if plant == "link":
        rows.file.symlink_to(other.file)
    elif plant == "hard link":
        other.file.write_bytes(before[:-1])  # rows that nobody can go on with
        before = before[:-1]
        rows.file.hardlink_to(other.file)
    else:
        os.mkfifo(rows.file)
    assert rows.find() == 0
    rows.keep(ROWS[:20])
    rows.commit()
    rows.close()
    assert other.file.read_bytes() == before and kept(tmp_path / "a.h5").find() == 20


def test_quick_slides_and_full_disks_leave_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    monkeypatch.setattr(gigapath_file, "KEEP_SECONDS", 30.0)
    with pytest.raises(OutputError), TileEmbeddingsWriter(path, TILES, embed_dim=6, kept=kept(path)) as writer:
        writer.write(0, ROWS[:20])
        raise OutputError("a.h5 could not be written", errno.ENOSPC)
    monkeypatch.setattr(gigapath_file, "WORTH_SECONDS", 10.0)
    with pytest.raises(KeyError):
        write(path, stop=40, fail=True, rows=kept(path))
    assert names(tmp_path) == []
