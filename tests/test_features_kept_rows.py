"""A large slide goes on behind its last rows that are safe, and its file is that of an unbroken run."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import make_features, make_tiles

from gigapath.features import TileEmbeddingsWriter, gigapath_file
from gigapath.features.gigapath_file import KeptRows
from gigapath.files import OutputError, open_own

CELLS = np.stack([np.arange(60) % 9, np.arange(60) // 9], axis=1)
TILES = make_tiles(cells=CELLS)
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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_two_writers_of_one_file_leave_rows_that_hold(tmp_path: Path) -> None:
    one, other = kept(tmp_path / "a.h5"), kept(tmp_path / "a.h5")
    one.keep(ROWS[:20])
    other.keep(ROWS[:10])
    one.commit()
    other.commit()
    assert kept(tmp_path / "a.h5").find() == 10
    one.keep(ROWS[20:30])
    one.commit()
    other.discard()
    assert kept(tmp_path / "a.h5").find() == 0
    one.close()


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
