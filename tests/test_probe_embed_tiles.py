"""From tile images to a table: what each kind of tile set says, full batches, a run in pieces, errors."""

import csv
import io
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import killed_runs
import numpy as np
import pytest
from PIL import Image

from gigapath.cli.main import main
from gigapath.linear_probe.embed_tiles import colour_statistics, embed_tiles, open_tile_set
from gigapath.linear_probe.embeddings import read_table


class MeanEncoder(SimpleNamespace):
    """Stands for a tile encoder: a tile's vector is the mean of its quadrants; remembers the shapes of its batches."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(
            name="mean", embed_dim=12, weights_sha256="0" * 64, trained=True, transform_name="none", precision="fp32",
            device=SimpleNamespace(type="cpu"), batches=[], description="means", **changes,
        )  # fmt: skip

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        self.batches.append(tiles.shape)
        half = tiles.shape[1] // 2
        quadrants = [tiles[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        return np.concatenate([quadrant.mean(axis=(1, 2)) for quadrant in quadrants], axis=1).astype(np.float32)


def picture(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`<split>/<class>/<number>.png`, numbers that repeat between the classes."""
    seed = 0
    for split in ("train", "valid", "test"):
        for label in ("normal", "tumour"):
            for number in range(5):
                path = tmp_path / "tiles" / split / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(picture(seed)))
                seed += 1
    return tmp_path / "tiles"


def test_folders_say_split_and_class(folder: Path, tmp_path: Path) -> None:
    tiles = open_tile_set(folder)
    assert len(tiles) == 30 and tiles.names[0] == "test/normal/0" and tiles.splits[:10] == ("test",) * 10
    assert tiles.labels is not None and tiles.labels[3:7] == ("normal", "normal", "tumour", "tumour")
    embed_tiles(tiles, MeanEncoder(), tmp_path / "out.h5", batch_size=8)
    table = read_table(tmp_path / "out.h5")
    assert table.names == tiles.names and table.labels == tiles.labels
    assert set(table.splits) == {"train", "val", "test"}
    row = table.names.index("valid/tumour/2")
    pixels = np.asarray(Image.open(folder / "valid" / "tumour" / "2.png"))
    assert np.allclose(table.features[row], MeanEncoder().encode(pixels[None])[0])
    assert table.colours is not None
    assert np.allclose(table.colours[row], [*pixels.reshape(-1, 3).mean(0), *pixels.reshape(-1, 3).std(0)], atol=1e-3)
    assert table.attrs["encoder"] == "mean" and table.attrs["trained"]


def test_csv_in_a_zip_goes_before_folders(tmp_path: Path) -> None:
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["file", "split", "label", "slide"])
    with zipfile.ZipFile(tmp_path / "tiles.zip", "w") as archive:
        for number in range(12):
            name = f"all/{number:02d}.png"
            archive.writestr(name, png(picture(number)))
            writer.writerow([name, ("train", "valid", "test")[number % 3], number % 2, f"s{number % 3}"])
        archive.writestr("labels.csv", rows.getvalue())
        archive.writestr("README.txt", "words")
    tiles = open_tile_set(tmp_path / "tiles.zip")
    assert tiles.names[:4] == ("all/02", "all/05", "all/08", "all/11")  # test before train before val
    assert tiles.splits == ("test",) * 4 + ("train",) * 4 + ("val",) * 4
    assert tiles.labels == ("0", "1") * 2 + ("0", "1") * 2 + ("1", "0") * 2
    assert tiles.groups == ("s2",) * 4 + ("s0",) * 4 + ("s1",) * 4 and tiles.group_column == "slide"
    assert np.array_equal(tiles.read([5])[0], picture(3))


def write_pcam(folder: Path) -> None:
    for split, count in (("train", 6), ("valid", 4), ("test", 4)):
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack([picture(count * 100 + row) for row in range(count)])
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(count) % 2).astype(np.uint8).reshape(count, 1, 1, 1)
        lines = [f"{row},{row % 2},camelyon16_{split}_{row // 2}" for row in range(count)]
        (folder / f"{stem}_meta.csv").write_text("index,tumor_patch,wsi\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize("below", [".", "pcam"])
def test_pcams_own_files_say_split_label_and_slide(tmp_path: Path, below: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    write_pcam(tmp_path / below)
    tiles = open_tile_set(tmp_path)
    assert len(tiles) == 14 and tiles.names[0] == "test/test_000000" and tiles.splits[-1] == "val"
    assert tiles.labels is not None and tiles.labels[:4] == ("0", "1", "0", "1")
    assert tiles.groups is not None and tiles.groups[4:6] == ("camelyon16_train_0",) * 2
    assert np.array_equal(np.stack(tiles.read([4, 9, 0])), np.stack([picture(600), picture(605), picture(400)]))
    alone = open_tile_set(tmp_path / below / "camelyonpatch_level_2_split_test_x.h5")
    assert len(alone) == 4 and alone.splits == ("test",) * 4
    for meta in (tmp_path / below).glob("*_meta.csv"):
        meta.unlink()
    assert open_tile_set(tmp_path).groups is None


def test_encoder_sees_full_batches_only_and_neighbours_change_nothing(folder: Path, tmp_path: Path) -> None:
    encoder = MeanEncoder()
    embed_tiles(open_tile_set(folder), encoder, tmp_path / "a.h5", batch_size=8)
    assert set(encoder.batches) == {(8, 16, 16, 3)} and len(encoder.batches) == 4
    embed_tiles(open_tile_set(folder), MeanEncoder(), tmp_path / "b.h5", batch_size=30)
    assert np.array_equal(read_table(tmp_path / "a.h5").features, read_table(tmp_path / "b.h5").features)


def test_run_in_pieces_gives_the_bytes_of_a_run_in_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigapath.linear_probe.embed_tiles.FLUSH_EVERY", 2)
    tiles = open_tile_set(folder)
    embed_tiles(tiles, MeanEncoder(), tmp_path / "whole.h5", batch_size=4)

    stops = iter([None, None, None, KeyboardInterrupt()])

    def stop() -> None:
        if (error := next(stops)) is not None:
            raise error

    out = tmp_path / "pieces.h5"
    with pytest.raises(KeyboardInterrupt):
        embed_tiles(tiles, MeanEncoder(), out, batch_size=4, check_stop=stop)
    assert not out.exists() and (tmp_path / "pieces.h5.rows.partial").is_file()
    encoder = MeanEncoder()
    assert embed_tiles(tiles, encoder, out, batch_size=4) == 12
    assert len(encoder.batches) == 5
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not (tmp_path / "pieces.h5.rows.partial").exists()


@pytest.mark.parametrize("change", ["encoder", "batch", "tiles", "rows lost"])
def test_progress_of_another_run_is_not_continued(folder: Path, tmp_path: Path, change: str) -> None:
    def stop_after(batches: int) -> Any:
        left = iter(range(batches))

        def stop() -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        return stop

    out = tmp_path / "out.h5"
    with pytest.raises(KeyboardInterrupt):
        embed_tiles(open_tile_set(folder), MeanEncoder(), out, batch_size=4, check_stop=stop_after(3))
    encoder, batch_size = MeanEncoder(), 4
    if change == "encoder":
        encoder.weights_sha256 = "1" * 64
    elif change == "batch":
        batch_size = 5
    elif change == "tiles":
        (folder / "train" / "normal" / "0.png").write_bytes(png(picture(99)))
    else:
        rows = out.with_name("out.h5.rows.partial")
        rows.write_bytes(rows.read_bytes()[:-3])
    assert embed_tiles(open_tile_set(folder), encoder, out, batch_size=batch_size) == 0
    whole = embed_tiles(open_tile_set(folder), encoder, tmp_path / "w.h5", batch_size=batch_size)
    assert whole == 0
    assert np.array_equal(read_table(out).features, read_table(tmp_path / "w.h5").features)


def test_table_that_is_finished_is_kept_and_one_of_other_options_refused(folder: Path, tmp_path: Path) -> None:
    out, tiles = tmp_path / "out.h5", open_tile_set(folder)
    embed_tiles(tiles, MeanEncoder(), out, batch_size=4)
    before, encoder = out.stat().st_mtime_ns, MeanEncoder()
    assert embed_tiles(tiles, encoder, out, batch_size=4) == 30
    with pytest.raises(ValueError, match=r"--batch-size 4 -> 5.*--overwrite"):
        embed_tiles(tiles, encoder, out, batch_size=5)
    assert encoder.batches == [] and out.stat().st_mtime_ns == before

    def stop() -> None:
        if encoder.batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_tiles(tiles, encoder, out, batch_size=5, overwrite=True, check_stop=stop)
    assert embed_tiles(tiles, MeanEncoder(), out, batch_size=4) == 30
    assert embed_tiles(tiles, MeanEncoder(), out, batch_size=5, overwrite=True) == 5
    assert read_table(out).attrs["batch_size"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "tiles"]


def test_colour_statistics_are_means_and_deviations() -> None:
    tiles = np.zeros((2, 4, 4, 3), np.uint8)
    tiles[0, :2] = (10, 20, 30)
    assert colour_statistics(tiles)[0].tolist() == pytest.approx([5, 10, 15, 5, 10, 15])
    assert not colour_statistics(tiles)[1].any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train/normal/x.png",
            png(picture(0, 20)),
            "train/normal/x: expected a tile of 16 x 16 like the others, got 20 x 20",
        ),
        ("train/normal/x.png", png(picture(0))[:60], r"train/normal/x\.png: can't be read as an image"),
        ("train/normal/x.png", png(picture(0)[:8]), r"train/normal/x\.png: expected a square tile, got 16 x 8"),
        ("labels.csv", b"file,label\nnowhere.png,1\n", r"1 of its rows have no tile, the first is nowhere\.png"),
        ("labels.csv", b"file,label,split\ntrain/normal/0.png,1,test\n", r"splits contradict the paths of the tiles"),
        ("train/normal/0.jpg", png(picture(0)), "two embeddings are named train/normal/0"),
    ],
    ids=["size", "truncated", "not square", "row without tile", "contradiction", "name twice"],
)
def test_bad_tile_set_is_one_sentence(folder: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        embed_tiles(open_tile_set(folder), MeanEncoder(), tmp_path / "out.h5", batch_size=4)
    assert not (tmp_path / "out.h5").exists()


def test_paths_without_tiles_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").write_bytes(b"")
    for path, message in (
        ("nowhere", "TILES: expected"),
        ("empty", "expected tile images (png, jpg, tif), got none"),
        ("x.tar", "expected a folder, a .zip or PCam's .h5 files"),
    ):
        status = main(
            ["embed-tiles", str(tmp_path / path), "--out", str(tmp_path / "o.h5"), "--tile-encoder", "standin"]
        )
        assert status == 1 and message in capsys.readouterr().err
    assert main(["embed-tiles", str(tmp_path / "empty"), "--out", str(tmp_path / "o.npz")]) == 1
    assert "--out: expected a file ending in .h5" in capsys.readouterr().err


def test_tiles_to_scores_on_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gigapath.tile_encoder

    monkeypatch.setattr(gigapath.tile_encoder, "load_tile_encoder", lambda name, **options: MeanEncoder())
    out = tmp_path / "e.h5"
    assert main(["embed-tiles", str(folder), "--out", str(out), "--tile-encoder", "standin"]) == 0
    assert "30 tiles embedded" in capsys.readouterr().out
    assert main(["probe", str(out), "--out", str(tmp_path / "probe"), "--steps", "20", "--replicates", "50"]) == 0
    assert "colour" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGTERM ends with 75 and SIGKILL at once; both runs go on to the bytes of a run in one piece."""
    tiles = tmp_path / "tiles"
    (tiles / "train").mkdir(parents=True)
    for number in range(100):
        (tiles / "train" / f"{number:03d}.png").write_bytes(png(picture(number, 64)))
    ctx = killed_runs.context()

    def run(out: Path, **given: int) -> int | None:
        process = ctx.Process(target=killed_runs.embed_tiles, args=(tiles, out), kwargs=given)
        process.start()
        return killed_runs.finish(process)

    assert run(tmp_path / "whole.h5") == 0
    for sent, status, kept in ((signal.SIGTERM, 75, 80), (signal.SIGKILL, -9, 64)):
        out = tmp_path / f"{status}.h5"
        assert run(out, number=sent, at=20) == status
        assert not out.exists()
        assert run(out) == 0
        assert f"({kept} of them by the run before)" in out.with_suffix(".log").read_text()
        assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
