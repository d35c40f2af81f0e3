"""Broken inputs through every verb, in process: one sentence each, no traceback, no hang, and the others are done."""

import csv
import errno
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import broken_inputs as broken
import h5py
import numpy as np
import pytest
import torch
from conftest import table
from made_cohort import NARROW, write_cohort, write_splits, write_task
from made_embeddings import made_vectors, pt_bytes, write_zip
from made_embeddings import write_csv as write_rows
from tiny_encoders import mean_colour_encoder, tiny_slide_encoder

from gigapath.cli.main import main
from gigapath.file_names import quoted_name
from gigapath.linear_probe.embeddings import EmbeddingTable, write_table

SECONDS = 30  # for what takes a fraction of one


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A hang is an error that names its line."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    """Tiny encoders under every name, no pictures."""
    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda name, **_: mean_colour_encoder())
    load = lambda name, **given: tiny_slide_encoder(given["in_chans"])  # noqa: E731
    monkeypatch.setattr("gigapath.embedding.run.load_slide_encoder", load)
    monkeypatch.setattr("gigapath.embedding.slide_embedding.load_slide_encoder", load)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return status, said.out, said.err


def one_sentence(said: str, verb: str) -> str:
    """What a verb that can't start says: one line, and of a kind that somebody foresaw."""
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(f"gigapath {verb}: "), said[:2000]
    sentence = lines[0].removeprefix(f"gigapath {verb}: ")
    check_words(sentence)
    return sentence


def check_words(sentence: str) -> None:
    assert sentence and "\n" not in sentence and len(sentence) < 900, sentence[:2000]
    assert "unexpected " not in sentence and not sentence.startswith("[Errno"), sentence


# ------------------------------------------------------------------------------------------------- slides

# What is broken but can still be tiled: the tissue is found, and only some pixels are wrong.
TILEABLE = {
    "levels-cut-off", "tiles-zeroed", "tiles-overwritten", "one-sample-a-pixel", "mpp-nan", "mpp-0", "mpp-negative",
    "mpp-word",
}  # fmt: skip


@pytest.mark.parametrize("verb", ["tile", "embed"])
def test_broken_slides_fail_with_a_sentence_each_and_the_others_are_done(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = broken.write_slides(tmp_path / "slides")
    assert len(slides) >= 60
    for seed, name in enumerate(("good one", "good-two")):
        slides[name] = broken.good_slide(tmp_path / "slides", f"{name}.tif", seed)
    slides["forbidden"] = broken.good_slide(tmp_path / "slides", "forbidden.tif", 2)
    real = Path.open

    def guarded(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "forbidden.tif":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "slide_id"])
        rows.writerows([f"slides/{path.name}", name] for name, path in slides.items() if name != "a-folder")
    more = ["--batch-size", 4] if verb == "embed" else []
    status, _, _ = run(capsys, verb, manifest, "--out", tmp_path / "out", "--workers", 0, "--tile-size", 64, *more)
    assert status == 3
    found = table(tmp_path / "out")
    assert set(found) == {quoted_name(name) if name in broken.BAD_NAMES else name for name in slides} - {"a-folder"}
    for name in ("good one", "good-two"):
        assert found[name]["status"] == "done" and int(found[name]["tiles"]) > 10, found[name]
    for name, row in found.items():
        if row["status"] == "failed":
            check_words(row["error"])
            assert str(tmp_path) not in row["error"], row["error"]
        else:
            assert name in TILEABLE or name.startswith("good"), (name, row)
    assert found["forbidden"]["status"] == "failed" and "readable" in found["forbidden"]["error"]
    assert not list((tmp_path / "out").rglob("*.partial"))
    for path in (tmp_path / "out").glob("features_*/*.h5"):
        assert found[path.stem]["status"] == "done", path
    for name, words in broken.BAD_NAMES.items():
        assert words in found[quoted_name(name)]["error"]


def test_plan_names_a_picture_that_the_library_refuses_and_counts_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = broken.write_slides(tmp_path / "slides")
    good = broken.good_slide(tmp_path / "slides")
    words = ["png-text-too-long", "png-cut", "jpeg-cut"]
    status, out, err = run(capsys, "plan", *(slides[word] for word in words), good, "--json")
    assert status == 3, err
    planned = json.loads(out)
    assert planned["slides"] == 4 and planned["tiles"] > 0
    assert any("another format" in reason for reason in map(str, planned["unreadable"].values()))


def test_a_folder_with_loops_links_and_strange_names_is_searched_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "slides"
    (folder / "in side").mkdir(parents=True)
    broken.good_slide(folder / "in side", "good one.tif")
    broken.good_slide(folder, "ünï-切片.tif", 1)
    (folder / "in side" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "in side")
    (folder / "self.tif").symlink_to("self.tif")
    (folder / "gone.svs").symlink_to("nothing")
    status, _, _ = run(capsys, "tile", folder, "--out", tmp_path / "out", "--workers", 0, "--tile-size", 64)
    found = table(tmp_path / "out")
    assert status == 3
    assert {name: row["status"] for name, row in found.items()} == {
        "good one": "done", "ünï-切片": "done", "self": "failed", "gone": "failed",
    }  # fmt: skip
    for row in found.values():
        if row["error"]:
            check_words(row["error"])
    (folder / "line\nend.tif").write_bytes(b"x")
    assert run(capsys, "tile", folder, "--out", tmp_path / "out", "--workers", 0, "--tile-size", 64)[0] == 3
    row = table(tmp_path / "out")[r"line\nend"]
    assert row["status"] == "failed" and "control characters" in row["error"]


@pytest.mark.parametrize("name", broken.BROKEN_CSV)
def test_broken_manifests_are_refused_with_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "manifest.csv"
    path.write_bytes(broken.BROKEN_CSV[name])
    status, _, err = run(capsys, "tile", path, "--out", tmp_path / "out", "--workers", 0)
    if status == 3:  # the manifest can be read; its slides are not there
        assert all(row["status"] == "failed" for row in table(tmp_path / "out").values())
        return
    assert status == 1
    one_sentence(err, "tile")


@pytest.mark.parametrize("name", broken.BROKEN_GEOJSON)
def test_broken_outlines_fail_their_slide_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, slide in enumerate(("a", "b")):
        broken.good_slide(tmp_path, f"{slide}.tif", seed)
    suffix = ".geojson.gz" if name.startswith("gz") else ".geojson"
    (tmp_path / f"mask{suffix}").write_bytes(broken.BROKEN_GEOJSON[name])
    (tmp_path / "m.csv").write_text(f"path,mask\na.tif,mask{suffix}\nb.tif,\n")
    status, _, _ = run(capsys, "tile", tmp_path / "m.csv", "--out", tmp_path / "out", "--workers", 0, "--tile-size", 64)
    found = table(tmp_path / "out")
    assert found["b"]["status"] == "done"
    if found["a"]["status"] == "failed":
        assert status == 3
        check_words(found["a"]["error"])
    else:  # the file holds no area, or its class is odd
        assert found["a"]["status"] in ("no_tissue", "done")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mask.npz", b""),
        ("mask.npz", broken.noise(500)),
        ("mask.npz", broken.npz_bytes(x=np.arange(4), y=np.arange(4))[:200]),
        ("mask.npz", broken.huge_npz("x")),
        ("mask.npz", broken.npz_bytes(x=np.array(["a", "b"]), y=np.array(["c", "d"]), tile_size_lv0=np.int64(64))),
        ("mask.npz", broken.npz_bytes(x=np.array([np.nan, np.inf]), y=np.arange(2.0), tile_size_lv0=np.int64(64))),
        ("mask.npy", broken.noise(500)),
        ("mask.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"),
        ("mask.h5", broken.noise(500)),
        ("mask.png", broken.png_header(100_000, 100_000)),
        ("mask.png", broken.picture("PNG")[:60]),
        ("mask.tif", broken.noise(500)),
        ("mask.tif", b"II*\0\x08\0\0\0\xff\xff"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_broken_masks_fail_their_slide_alone(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, slide in enumerate(("a", "b")):
        broken.good_slide(tmp_path, f"{slide}.tif", seed)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "m.csv").write_text(f"path,mask\na.tif,{name}\nb.tif,\n")
    status, _, _ = run(capsys, "tile", tmp_path / "m.csv", "--out", tmp_path / "out", "--workers", 0, "--tile-size", 64)
    found = table(tmp_path / "out")
    assert status == 3 and found["b"]["status"] == "done" and found["a"]["status"] == "failed"
    check_words(found["a"]["error"])


# ------------------------------------------------------------------------------------------ feature files


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(features, labels, task) of 8 labelled slides."""
    folder = tmp_path_factory.mktemp("cohort")
    features, labels = write_cohort(folder, [0, 1] * 4, tiles=6, encoder="made", mpp=0.5)
    write_splits(folder / "splits", ([2, 3, 4, 5], [0, 1], [6, 7]))
    return features, labels, write_task(folder / "task.yaml", classes=2)


def odd_h5(path: Path) -> dict[str, Any]:
    """name -> writes an h5 file that HDF5 reads, and that is no feature file."""
    huge = {"shape": (10**12, 8), "dtype": "f4", "chunks": (64, 8)}

    def make(**datasets: Any) -> None:
        with h5py.File(path, "w") as file:
            for name, value in datasets.items():
                if isinstance(value, dict):
                    file.create_dataset(name, **value)
                elif callable(value):
                    value(file, name)
                else:
                    file[name] = value
            if "coords" in file and isinstance(file["coords"], h5py.Dataset):
                file["coords"].attrs.update({"patch_size_level0": 512, "patch_size": 256})

    cells = np.arange(8)[:, None] * [512, 0]
    rows = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    return {
        "no-datasets": lambda: make(),
        "groups": lambda: make(features=lambda f, n: f.create_group(n), coords=cells),
        "scalars": lambda: make(features=np.float32(3), coords=np.int64(3)),
        "text": lambda: make(features=np.array([b"a"] * 8), coords=cells),
        "objects": lambda: make(features={"shape": (8,), "dtype": h5py.vlen_dtype(np.float32)}, coords=cells),
        "references": lambda: make(features={"shape": (8, 2), "dtype": h5py.ref_dtype}, coords=cells),
        "compounds": lambda: make(features=np.zeros(8, [("a", "f4"), ("b", "i8")]), coords=cells),
        "complex": lambda: make(features=rows.astype(np.complex64), coords=cells),
        "a-petabyte": lambda: make(features=huge, coords={**huge, "shape": (10**12, 2), "chunks": (64, 2)}),
        "a-petabyte-compressed": lambda: make(features={**huge, "compression": "gzip"}, coords=cells),
        "null-space": lambda: make(features=h5py.Empty("f4"), coords=cells),
        "link-to-nothing": lambda: make(features=lambda f, n: f.__setitem__(n, h5py.SoftLink("/x")), coords=cells),
        "link-to-itself": lambda: make(features=lambda f, n: f.__setitem__(n, h5py.SoftLink(f"/{n}")), coords=cells),
        "link-to-a-file": lambda: make(
            features=lambda f, n: f.__setitem__(n, h5py.ExternalLink("/etc/passwd", "/x")), coords=cells
        ),
        "external-bytes": lambda: make(
            features={"shape": (8, 8), "dtype": "f4", "external": [("/etc/passwd", 0, 256)]}, coords=cells
        ),
        "nan": lambda: make(features=rows * np.nan, coords=cells),
        "coords-nan": lambda: make(features=rows, coords=cells * np.nan),
        "coords-absurd": lambda: make(features=rows, coords=cells + 2**62),
        "coords-short": lambda: make(features=rows, coords=cells[:3]),
        "one-cell": lambda: make(features=rows, coords=cells * 0),
        "no-tiles": lambda: make(features=rows[:0], coords=cells[:0]),
        "no-width": lambda: make(features=rows[:, :0], coords=cells),
    }


NAMES = [*(f"bytes-{name}" for name in broken.broken_h5(bytes(9000))), *odd_h5(Path()), "a-folder", "npz-huge"]


@pytest.fixture(scope="module")
def broken_features(cohort: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """name -> a folder in which slide-003 is broken, the others are good."""
    features, _, _ = cohort
    good = (features / "slide-003.h5").read_bytes()
    contents = {f"bytes-{name}": content for name, content in broken.broken_h5(good).items()}
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("broken") / "features"
        shutil.copytree(features, folder)
        path = folder / "slide-003.h5"
        path.unlink()
        if name in contents:
            path.write_bytes(contents[name])
        elif name == "a-folder":
            path.mkdir()
        elif name == "npz-huge":
            (folder / "slide-003.npz").write_bytes(broken.huge_npz())
        else:
            odd_h5(path)[name]()
        found[name] = folder
    return found


@pytest.mark.parametrize("name", NAMES)
def test_broken_feature_files_through_check_and_slide_embed(
    name: str,
    broken_features: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = broken_features[name]
    status, out, err = run(capsys, "check", folder)
    assert err == "" and status in (0, 3)
    if name not in ("no-tiles", "a-folder", "bytes-last-byte-gone", "bytes-middle-overwritten"):
        assert status == 3 and "slide-003" in out
    for line in out.splitlines():
        check_words(line.strip())
    monkeypatch.chdir(tmp_path)
    Path("tinynet").touch()  # a checkpoint by its name
    words = ("--slide-encoder", "tinynet", "--device", "cpu")
    some = [path for path in sorted(folder.glob("slide-00[234].*")) if path.is_file()]
    status, _, err = run(capsys, "slide-embed", *some, "--out", tmp_path / "out", *words)
    found = table(tmp_path / "out")
    assert sum(row["status"] == "done" for row in found.values()) >= 2, (found, err)
    if "slide-003" in found and found["slide-003"]["status"] == "failed":
        assert status == 3
        check_words(found["slide-003"]["error"])


@pytest.mark.parametrize("name", NAMES)
def test_broken_feature_files_end_finetune_with_the_files_name(
    name: str,
    broken_features: dict[str, Path],
    cohort: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, labels, task = cohort
    splits = ["--splits", task.parent / "splits"]
    status, _, err = run(capsys, *finetune(broken_features[name], labels, task, tmp_path / "out"), *splits)
    if name in ("bytes-last-byte-gone", "bytes-middle-overwritten") and status == 0:
        return  # HDF5 pads the end of its files; nothing of ours lies there
    assert status == 1
    assert "slide-003" in one_sentence(err, "finetune")


def finetune(features: Path, labels: Path, task: Path, out: Path) -> list[object]:
    return [
        "finetune", "--task", task, "--features", features, "--labels", labels, "--out", out, "--model-arch", NARROW,
        "--feat-layer", "1", "--pretrained", "", "--epochs", 1, "--device", "cpu", "--replicates", 5,
    ]  # fmt: skip


@pytest.mark.parametrize("name", broken.BROKEN_CSV)
def test_broken_labels_end_finetune_with_a_sentence(
    name: str, cohort: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, _, task = cohort
    (tmp_path / "labels.csv").write_bytes(broken.BROKEN_CSV[name])
    status, _, err = run(capsys, *finetune(features, tmp_path / "labels.csv", task, tmp_path / "out"))
    assert status == 1
    one_sentence(err, "finetune")


@pytest.mark.parametrize("name", broken.BROKEN_YAML)
def test_broken_tasks_end_finetune_with_a_sentence(
    name: str, cohort: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, labels, _ = cohort
    (tmp_path / "task.yaml").write_bytes(broken.BROKEN_YAML[name])
    status, _, err = run(capsys, *finetune(features, labels, tmp_path / "task.yaml", tmp_path / "out"))
    assert status == 1
    one_sentence(err, "finetune")


# -------------------------------------------------------------------------------------------------- probe


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(zip, labels) of a few embeddings."""
    folder = tmp_path_factory.mktemp("probed")
    vectors, rows = made_vectors({"train": 20, "valid": 10, "test": 10})
    return write_zip(folder / "made.zip", vectors), write_rows(folder / "labels.csv", rows)


def members(value: bytes) -> dict[str, bytes]:
    return {"emb/train/train_0000.pt": value}


class _Evil:
    """What a hostile pickle would call; the test is that nothing calls it."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('run')",))


def broken_zips(good: bytes) -> dict[str, bytes]:
    vector = pt_bytes(torch.zeros(12))
    huge = bytearray(good)
    at = huge.rfind(b"PK\x01\x02")
    huge[at + 20 : at + 28] = b"\xf0\xff\xff\x7f" * 2  # sizes, packed and not
    far = bytearray(good)
    far[at + 42 : at + 46] = b"\xf0\xff\xff\x7f"  # offset
    return {
        **{f"cut-{int(share * 1000)}": broken.cut(share)(good) for share in broken.CUTS},
        "zeros": bytes(500),
        "noise": broken.noise(5000),
        "table-overwritten": broken.over(0.9, 200, b"\xff")(good),
        "member-overwritten": broken.over(0.3, 300, b"\xff")(good),
        "size-huge": bytes(huge),
        "offset-huge": bytes(far),
        "no-members": broken.zip_bytes({}),
        "no-vectors": broken.zip_bytes({"a.txt": b"x"}),
        "members-of-noise": broken.zip_bytes(members(broken.noise(900))),
        "members-empty": broken.zip_bytes(members(b"")),
        "bomb": broken.zip_bomb("emb/train/train_0000.pt"),
        "a-pickle-of-code": broken.zip_bytes(members(pt_bytes(_Evil()))),
        "a-dict": broken.zip_bytes(members(pt_bytes({"a": torch.zeros(3)}))),
        "a-matrix": broken.zip_bytes(members(pt_bytes(torch.zeros(3, 4)))),
        "whole-numbers": broken.zip_bytes(members(pt_bytes(torch.zeros(3, dtype=torch.int64)))),
        "nan": broken.zip_bytes(members(pt_bytes(torch.full((12,), float("nan"))))),
        "widths-differ": broken.zip_bytes({**members(vector), "emb/train/b.pt": pt_bytes(torch.zeros(5))}),
        "same-name-twice": broken.zip_bytes({**members(vector), "emb/valid/train_0000.pt": vector}),
        "paths-upwards": broken.zip_bytes({"../../emb/train/train_0000.pt": vector[:50]}),
    }


@pytest.fixture(scope="module")
def zips(probed: tuple[Path, Path]) -> dict[str, bytes]:
    return broken_zips(probed[0].read_bytes())


@pytest.mark.parametrize("name", broken_zips(broken.zip_bytes(members(b"x" * 300))))
def test_broken_zips_end_probe_with_a_sentence(
    name: str, zips: dict[str, bytes], probed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, labels = probed
    path = tmp_path / "made.zip"
    path.write_bytes(zips[name])
    status, _, err = run(capsys, "probe", path, "--labels", labels, "--out", tmp_path / "out", "--steps", 5)
    assert status == 1
    one_sentence(err, "probe")
    assert {entry.name for entry in tmp_path.iterdir()} <= {"made.zip", "out", "made.zip.cache.h5"}


@pytest.mark.parametrize("name", broken.BROKEN_CSV)
def test_broken_labels_end_probe_with_a_sentence(
    name: str, probed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = probed
    (tmp_path / "labels.csv").write_bytes(broken.BROKEN_CSV[name])
    words = ("--labels", tmp_path / "labels.csv", "--out", tmp_path / "out", "--steps", 5)
    status, _, err = run(capsys, "probe", made, *words)
    assert status == 1
    one_sentence(err, "probe")


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".safetensors"])
def test_broken_tables_end_probe_with_a_sentence(
    suffix: str, probed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, labels = probed
    write_table(tmp_path / "good.h5", EmbeddingTable(("a", "b"), np.eye(2, 12, dtype=np.float32), ("train", "test")))
    good = (tmp_path / "good.h5").read_bytes()
    contents = broken.broken_h5(good) if suffix == ".h5" else {
        "empty": b"", "noise": broken.noise(999), "huge": broken.huge_npz(),
        "header-huge": b"\xff" * 8 + b"{}", "object": broken.npz_bytes(features=np.zeros(2), names=np.zeros(2)),
    }  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        status, _, err = run(capsys, "probe", path, "--labels", labels, "--out", tmp_path / "out", "--steps", 5)
        assert status == 1, name
        one_sentence(err, "probe")


def test_a_folder_that_holds_itself_is_read_once(
    probed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, labels = probed
    folder = tmp_path / "emb"
    for split, name in (("train", "train_0000"), ("valid", "valid_0000"), ("test", "test_0000")):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{name}.pt").write_bytes(pt_bytes(torch.rand(12)))
    (folder / "train" / "up").symlink_to(folder)
    (folder / "self.pt").symlink_to("self.pt")
    _, _, err = run(capsys, "probe", folder, "--labels", labels, "--out", tmp_path / "out", "--steps", 5)
    assert "up/" not in err
    one_sentence(err, "probe")
