"""Reading embeddings and labels: the same table from every container, one sentence for everything that is wrong."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_embeddings import made_vectors, pt_bytes, write_csv, write_folder, write_zip

from gigapath.files import OutputError
from gigapath.linear_probe import ProbeOptions, embeddings
from gigapath.linear_probe.data import ProbeData, load_data
from gigapath.linear_probe.embeddings import (
    CACHE_SUFFIX,
    EmbeddingTable,
    VectorReader,
    ZipFiles,
    read_embeddings,
    read_table,
    split_of_path,
    write_table,
)

COUNTS = {"train": 40, "valid": 20, "test": 30}


def load(folder: Path, vectors: dict[str, np.ndarray], rows: list[dict[str, str]], **options: object) -> ProbeData:
    zipped, table = write_zip(folder / "made.zip", vectors), write_csv(folder / "labels.csv", rows)
    return load_data(zipped, table, ProbeOptions(**options))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A zip of embeddings and the CSV of its labels."""
    vectors, rows = made_vectors(COUNTS)
    return write_zip(tmp_path / "made.zip", vectors), write_csv(tmp_path / "labels.csv", rows)


# ------------------------------------------------------------------------------------------------------ containers


def test_all_containers_give_one_table(tmp_path: Path) -> None:
    vectors, _ = made_vectors(COUNTS)
    shuffled = dict(sorted(vectors.items(), key=lambda item: item[0][::-1]))
    names = [name.removesuffix(".pt") for name in shuffled]
    matrix = np.stack(list(shuffled.values()))
    paths = [
        write_zip(tmp_path / "stored.zip", shuffled),
        write_zip(tmp_path / "deflated.zip", shuffled, method=zipfile.ZIP_DEFLATED),
        write_folder(tmp_path / "folder", shuffled),
        tmp_path / "table.npz",
        tmp_path / "table.safetensors",
        tmp_path / "table.h5",
        tmp_path / "plain.h5",
    ]
    np.savez(paths[3], features=matrix, names=np.array(names))
    safetensors.numpy.save_file({"features": matrix}, paths[4], metadata={"names": json.dumps(names)})
    write_table(paths[5], EmbeddingTable(tuple(names), matrix, tuple(split_of_path(name) for name in names)))
    with h5py.File(paths[6], "w") as file:
        file["features"] = matrix
        file["names"] = names
    expected = sorted((split_of_path(name), name) for name in names)
    for path in paths:
        table, _ = read_embeddings(path, cache=False)
        assert list(zip(table.splits, table.names, strict=True)) == expected, path
        assert table.features.dtype == np.float32
        for name, row in zip(table.names, table.features, strict=True):
            assert np.array_equal(row, vectors[name + ".pt"]), path
    assert not list(tmp_path.glob("*" + CACHE_SUFFIX))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.float16),
        torch.arange(6, dtype=torch.bfloat16),
        torch.arange(6, dtype=torch.float64),
        torch.arange(6, dtype=torch.float32)[None],
        torch.arange(20, dtype=torch.float32)[7:13],  # the storage holds more than the vector
        torch.arange(12, dtype=torch.float32)[::2],
        torch.arange(6, dtype=torch.float32).requires_grad_(),
    ],
    ids=["half", "bfloat16", "double", "row", "slice", "strided", "with gradient"],
)
def test_vectors_of_any_layout_are_read_as_torch_reads_them(tensor: torch.Tensor) -> None:
    reader = VectorReader()
    expected = tensor.detach().flatten().float().numpy()
    other = pt_bytes((tensor * 3).detach().clone() if tensor.is_contiguous() else tensor)
    for _ in range(3):  # the second time without torch, where the layout allows it
        assert np.array_equal(reader.read(pt_bytes(tensor), "x.pt"), expected)
    assert len(reader.read(other, "y.pt")) == 6


def test_equal_pickles_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = made_vectors({"train": 50})
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(kwargs) or load(*args, **kwargs))
    reader = VectorReader()
    for name, vector in vectors.items():
        assert np.array_equal(reader.read(pt_bytes(torch.from_numpy(vector)), name), vector)
    assert len(calls) == 1 and calls[0]["weights_only"] is True


def test_files_of_one_size_that_differ_in_more_than_the_vector_are_read_right() -> None:
    """What the quick way takes must be what torch reads, whatever it has seen before."""
    random = np.random.default_rng(0)
    reader = VectorReader()
    wide = torch.from_numpy(random.normal(size=64).astype(np.float32))
    slices = (wide[:32], wide[32:], wide[1:33], wide[::2], wide[:32].clone(), wide[:16].double(), wide[:32].clone())
    for tensor in slices:
        assert np.array_equal(reader.read(pt_bytes(tensor), "x.pt"), tensor.float().numpy())
    old = io.BytesIO()
    torch.save(torch.arange(5.0), old, _use_new_zipfile_serialization=False)
    assert reader.read(old.getvalue(), "x").tolist() == [0, 1, 2, 3, 4]
    content = pt_bytes(wide.clone())
    assert reader.read(content, "x.pt") is not None
    for at in range(0, len(content), 7):  # whatever is flipped: the vector, another one of this width, or one sentence
        flipped = bytearray(content)
        flipped[at] ^= 1
        try:
            assert reader.read(bytes(flipped), "x.pt").shape == (64,)
        except ValueError as error:
            assert "x.pt" in str(error) and "\n" not in str(error)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text("abcü/0", min_size=1, max_size=20).filter(lambda name: name.strip("/")), st.binary(max_size=60)
    ),
    st.binary(max_size=30).filter(lambda comment: b"PK" not in comment),  # zipfile takes it for the end
    st.booleans(),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
)
def test_members_are_what_zipfile_wrote(members: dict[str, bytes], comment: bytes, zip64: bool, method: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.zip"
        with zipfile.ZipFile(path, "w", method, allowZip64=True) as archive:
            archive.comment = comment
            for name, data in members.items():
                with archive.open(name, "w", force_zip64=zip64) as member:
                    member.write(data)
        files = ZipFiles(path, lambda name: True)
        assert {files.names[index]: content for index, content in files.read_all()} == members
        table = zipfile.ZipFile(path).start_dir, path.stat().st_size - 22 - len(comment)
        digest = hashlib.sha256(path.read_bytes()[slice(*table)]).hexdigest()
        assert files.identity().endswith(digest)  # as caches of earlier versions have it


def test_a_zip_without_its_beginning_is_no_whole_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "made.zip", made_vectors({"train": 3, "test": 3})[0])
    content = path.read_bytes()
    for missing in (1, 100, len(content) // 2):
        path.write_bytes(content[missing:])
        with pytest.raises(ValueError, match=r"made\.zip"):
            read_embeddings(path, cache=False)


def test_mac_shadows_and_hidden_files_are_no_embeddings(tmp_path: Path) -> None:
    vectors, _ = made_vectors({"train": 2, "test": 2})
    path = write_zip(tmp_path / "made.zip", vectors)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/emb/train/._train_0000.pt", b"shadow")
        archive.writestr("emb/train/._train_0000.pt", b"shadow")
        archive.writestr("emb/readme.txt", b"words")
    assert len(read_embeddings(path, cache=False)[0]) == 4


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/x.pt", "train"),
        ("a/Valid/x", "val"),
        ("a/validation/b/x", "val"),
        ("training_data/test/x", "test"),
        ("testing_train_x.pt", ""),
        ("contest/x", ""),
        ("train.pt", ""),
    ],
)
def test_split_comes_from_whole_parts_of_the_path(path: str, split: str) -> None:
    assert split_of_path(path) == split


# ----------------------------------------------------------------------------------------------------------- cache


def test_cache_gives_the_same_table_and_reads_no_member(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, how = read_embeddings(made[0])
    assert how["read_from"] == "files" and made[0].with_name("made.zip" + CACHE_SUFFIX).is_file()
    monkeypatch.setattr(ZipFiles, "read_all", lambda self: pytest.fail("a member was read"))
    second, how = read_embeddings(made[0])
    assert how["read_from"] == "cache"
    assert second.names == first.names and second.splits == first.splits
    assert np.array_equal(first.features, second.features)


def test_folder_cache_notices_a_changed_file(tmp_path: Path) -> None:
    vectors, _ = made_vectors({"train": 5, "test": 5})
    folder = write_folder(tmp_path / "folder", vectors)
    read_embeddings(folder)
    assert read_embeddings(folder)[1]["read_from"] == "cache"
    name = next(iter(vectors))
    (folder / name).write_bytes(pt_bytes(torch.zeros(12)))
    table, how = read_embeddings(folder)
    assert how["read_from"] == "files"
    assert not table.features[table.names.index(name.removesuffix(".pt"))].any()


def test_cache_of_another_zip_is_not_taken(made: tuple[Path, Path]) -> None:
    read_embeddings(made[0])
    status = made[0].stat()
    vectors, _ = made_vectors(COUNTS, seed=1)
    write_zip(made[0], vectors)
    # Even where size and time of change are those of the old zip: its table of members tells them apart.
    os.utime(made[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert made[0].stat().st_size == status.st_size
    table, how = read_embeddings(made[0])
    assert how["read_from"] == "files"
    assert np.array_equal(table.features[0], vectors[table.names[0] + ".pt"])


@pytest.mark.parametrize("damage", ["cut", "flipped", "unfinished", "empty", "another version"])
def test_damaged_cache_is_never_taken_for_whole(made: tuple[Path, Path], damage: str) -> None:
    first, _ = read_embeddings(made[0])
    cache = made[0].with_name("made.zip" + CACHE_SUFFIX)
    content = bytearray(cache.read_bytes())
    if damage == "cut":
        cache.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[content.find(first.features[3].tobytes()) + 5] ^= 1
        cache.write_bytes(content)
    elif damage == "empty":
        cache.write_bytes(b"")
    else:
        with h5py.File(cache, "r+") as file:
            if damage == "unfinished":
                del file.attrs["complete"]
            else:
                file.attrs["cache_version"] = 0
    table, how = read_embeddings(made[0])
    assert how["read_from"] == "files" and np.array_equal(table.features, first.features)
    assert read_embeddings(made[0])[1]["read_from"] == "cache"  # and a whole one stands in its place


def test_killed_while_the_cache_is_written_starts_clean(made: tuple[Path, Path]) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom gigapath.linear_probe import embeddings\n"
        "from gigapath.features import h5\n"
        "h5.publish = lambda *paths: os.kill(os.getpid(), 9)\n"
        "embeddings.read_embeddings(Path(sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(made[0])], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -9
    assert len(list(made[0].parent.glob("*.partial"))) == 1
    assert read_embeddings(made[0])[1]["read_from"] == "files"
    assert not list(made[0].parent.glob("*.partial"))
    assert read_embeddings(made[0])[1]["read_from"] == "cache"


def test_cache_that_can_not_be_written_is_a_warning(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, table: EmbeddingTable) -> None:
        raise OutputError("no space", 28)

    monkeypatch.setattr(embeddings, "write_table", refuse)
    assert len(read_embeddings(made[0])[0]) == 90
    assert "no cache was written: no space" in caplog.text


# ---------------------------------------------------------------------------------------------------------- labels


def test_data_maps_labels_once_and_knows_the_splits(made: tuple[Path, Path]) -> None:
    data = load_data(*made, ProbeOptions())
    assert data.classes == ("a", "b")
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 40, "val": 20, "test": 30}
    for split, rows in data.rows.items():
        for row in rows:
            number = int(data.names[row][-4:])
            assert data.labels[row] == number % 2
            assert data.groups is not None
            assert data.groups[row] == f"{'valid' if split == 'val' else split}-{number // 10}"


def test_split_comes_from_the_csv_or_from_the_path(tmp_path: Path) -> None:
    vectors, rows = made_vectors(COUNTS)
    flat = {name.rpartition("/")[2]: vector for name, vector in vectors.items()}
    said = [{**row, "split": row["split"].replace("valid", "validation")} for row in rows]
    unsaid = [{"file": row["input"], "label": row["label"]} for row in rows]
    for data in (load(tmp_path, flat, said), load(tmp_path, vectors, unsaid)):
        assert {split: len(found) for split, found in data.rows.items()} == {"train": 40, "val": 20, "test": 30}


def test_one_name_in_two_splits_is_two_tiles_when_they_differ(tmp_path: Path) -> None:
    vectors, rows = made_vectors(COUNTS)
    renamed = {re.sub(r"(train|valid|test)_", "", name): vector for name, vector in vectors.items()}
    data = load(tmp_path, renamed, [{**row, "input": row["input"].partition("_")[2]} for row in rows])
    assert sum(map(len, data.rows.values())) == 90


def test_missing_ones_are_counted_and_named_and_can_be_allowed(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, rows = made_vectors(COUNTS)
    table = write_csv(tmp_path / "other.csv", [*rows[2:], {**rows[0], "input": "nowhere.pt"}])
    message = (
        r"rows without embedding: 1 \(nowhere\.pt\), embeddings without a row: 2 \(emb/train/train_0000, .*"
        r", of 89 rows and 90 embeddings.*"
    )
    with pytest.raises(ValueError, match=message + r"--allow-missing"):
        load_data(made[0], table, ProbeOptions())
    data = load_data(made[0], table, ProbeOptions(allow_missing=True))
    assert len(data.rows["train"]) == 38
    assert data.facts["labels_without_embedding"] == 1 and data.facts["embeddings_without_label"] == 2
    assert any("left out" in warning for warning in data.warnings)


Change = Callable[[list[dict[str, str]]], list[dict[str, str]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**row, "split": "train"} for row in rows], r"50 splits contradict the paths of the embeddings"),
        (lambda rows: [*rows, {**rows[0], "split": "test"}], r"splits contradict the paths.*\(test against train\)"),
        (lambda rows: [*rows, rows[0]], r"train_0000\.pt has two rows \(2 and 92\)"),
        (lambda rows: [row for row in rows if row["split"] != "valid"], r"csv: embeddings without a row: "),
        (lambda rows: [{**row, "label": "a"} for row in rows], r"all tiles are of one class \(a\)"),
        (
            lambda rows: [
                {**row, "label": "c"} if row["split"] == "test" and row["label"] == "b" else row for row in rows
            ],
            r"the class c never occurs in training",
        ),
        (lambda rows: [{**rows[0], "split": "dev"}, *rows[1:]], r"row 2: expected a split .* got 'dev'"),
        (lambda rows: [{**rows[0], "label": ""}, *rows[1:]], r"row 2 has no label"),
        (lambda rows: [{key: row[key] for key in ("input", "split")} for row in rows], r"expected a column label"),
        (lambda rows: [{key: row[key] for key in ("label", "split")} for row in rows], r"expected a column input"),
        (
            lambda rows: [{**row, "slide": "s1"} for row in rows],
            r"1 groups \(slide\) in both sets, train and test \(s1\).*--allow-leakage",
        ),
    ],
)
def test_labels_that_make_no_sense_are_one_sentence(
    made: tuple[Path, Path], tmp_path: Path, change: Change, message: str
) -> None:
    _, rows = made_vectors(COUNTS)
    table = write_csv(tmp_path / "changed.csv", change(rows))
    with pytest.raises(ValueError, match=message) as caught:
        load_data(made[0], table, ProbeOptions())
    assert "\n" not in str(caught.value)


def test_a_tile_in_two_splits_is_refused_and_twins_of_two_splits_are_counted(tmp_path: Path) -> None:
    vectors, rows = made_vectors(COUNTS)
    flat = {name.rpartition("/")[2]: vector for name, vector in vectors.items()}
    again = [*rows, {**rows[0], "split": "test", "slide": "test-0"}]
    with pytest.raises(ValueError, match=r"train_0000\.pt stands in two splits \(train and test\)"):
        load(tmp_path, flat, again)
    twice = vectors | {"emb/test/train_0000.pt": vectors["emb/train/train_0000.pt"]}
    with pytest.raises(ValueError, match=r"are one tile in two splits"):
        load(tmp_path, twice, again)
    twins = ("emb/train/train_0003.pt", "emb/test/test_0004.pt", "emb/test/test_0005.pt")
    data = load(tmp_path, vectors | dict.fromkeys(twins, vectors["emb/train/train_0000.pt"]), rows)
    assert data.facts["identical_across_splits"] == 4
    with pytest.raises(ValueError, match="the split val is empty"):
        load(tmp_path, *made_vectors({"train": 10, "test": 10}))
    leaking = [{**row, "label": "01"[row["label"] == "a"], "slide": "s1"} for row in rows]
    data = load(tmp_path, vectors, leaking, allow_leakage=True, positive="0")
    assert data.groups is not None and data.classes == ("1", "0")


def write_meta(folder: Path, counts: dict[str, int], *, flip: int | None = None) -> Path:
    """PCam's meta files for the made vectors: slides of ten tiles, label = number % 2."""
    folder.mkdir()
    for split, count in counts.items():
        lines = [",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi"]
        for row in range(count):
            label = bool(row % 2) != (row == flip and split == "test")
            lines.append(f"{row},0,0,True,{label},camelyon16_{split}_{row // 10:03d}")
        (folder / f"camelyonpatch_level_2_split_{split}_meta.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_pcams_own_slides_become_groups_where_every_label_agrees(tmp_path: Path) -> None:
    vectors, rows = made_vectors(COUNTS)
    zipped = write_zip(tmp_path / "made.zip", vectors)
    table = write_csv(tmp_path / "l.csv", [{key: row[key] for key in ("input", "label", "split")} for row in rows])
    data = load_data(zipped, table, ProbeOptions(), pcam_meta=write_meta(tmp_path / "right", COUNTS))
    assert data.group_column == "wsi" and data.groups is not None
    assert data.groups[data.names.index("emb/valid/valid_0013")] == "camelyon16_valid_001"
    wrong = [
        write_meta(tmp_path / "label", COUNTS, flip=7),
        write_meta(tmp_path / "count", {**COUNTS, "train": 41}),
        write_meta(tmp_path / "lacking", {"train": 40, "valid": 20}),
    ]
    for folder in wrong:
        data = load_data(zipped, table, ProbeOptions(), pcam_meta=folder)
        assert data.groups is None and data.group_column is None
        assert any("don't fit these tiles" in warning for warning in data.warnings)


# ------------------------------------------------------------------------------------------------------ bad inputs


def test_flipped_byte_in_a_member_is_noticed(made: tuple[Path, Path]) -> None:
    vectors, _ = made_vectors(COUNTS)
    content = bytearray(made[0].read_bytes())
    content[content.find(vectors["emb/valid/valid_0007.pt"].tobytes()) + 4] ^= 1
    made[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"emb/valid/valid_0007\.pt is damaged"):
        read_embeddings(made[0])


def test_missing_container_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zip"):
        read_embeddings(tmp_path / "nowhere.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected \.pt files, got none"):
        read_embeddings(tmp_path / "empty")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.zip, a folder, \.h5, \.npz or \.safetensors"):
        read_embeddings(tmp_path / "x.tar")


def test_table_with_nan_or_repeated_names_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", features=np.array([[1.0], [np.inf]]), names=np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"1 of 2 embeddings hold NaN or infinity, the first is b"):
        read_table(tmp_path / "nan.npz")
    np.savez(tmp_path / "twice.npz", features=np.zeros((2, 3)), names=np.array(["a.pt", "a"]))
    with pytest.raises(ValueError, match="two embeddings are named a"):
        read_table(tmp_path / "twice.npz")
