"""Files are whole or absent, whatever the disk or the process does."""

import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigapath import files
from gigapath.cohort.status import Status, write_status
from gigapath.file_names import safe_name
from gigapath.files import (
    OutputError,
    atomic_file,
    sha256_of,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES]


def failing(code: int, path_index: int | None = None) -> Callable[..., int]:
    """A system call that the disk refuses; with `path_index`, naming the file as the system does."""

    def call(*args: object, **options: object) -> int:
        named = () if path_index is None else (os.fspath(args[path_index]),)  # type: ignore[call-overload]
        raise OSError(code, os.strerror(code), *named)

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_file_shows_nothing_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith("table.csv.")
        assert temporary.suffix == ".partial"
        temporary.write_text("a")
        assert not path.exists()
    assert path.read_text() == "a" and names(path.parent) == ["table.csv"]


def test_atomic_file_keeps_the_old_content_on_any_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="mine"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("mine")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["open", "fsync", "close", "replace", "write"])
def test_refused_system_call_gives_one_sentence_and_leaves_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "a.json"
    write_json_atomic(path, {"old": 1})
    if call == "write":
        monkeypatch.setattr(Path, "write_bytes", failing(code))
    elif call == "replace":  # pathlib calls this one
        monkeypatch.setattr(os, "replace", failing(code))
    else:
        monkeypatch.setattr(files.os, call, failing(code, 0 if call == "open" else None))
    with pytest.raises(OutputError) as caught:
        write_json_atomic(path, {"new": 2})
    monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith("out/a.json could not be written: ") and message.endswith(".") and "\n" not in message
    assert str(tmp_path) not in message
    assert caught.value.errno == code
    assert caught.value.stops_run == (code != errno.EACCES)
    assert json.loads(path.read_text()) == {"old": 1} and names(path.parent) == ["a.json"]


def test_folder_that_cannot_be_made_gives_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"folder taken could not be made: a file of that name is there"):
        write_text_atomic(tmp_path / "taken" / "sub" / "a.txt", "a")


def test_errors_of_the_callers_own_reading_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        (tmp_path / "slide.svs").read_bytes()
    error = PermissionError(errno.EACCES, "denied", "slide.svs")
    with pytest.raises(PermissionError) as caught, atomic_file(tmp_path / "a"):
        raise error
    assert caught.value is error and names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_in_the_callers_own_writing_is_told(code: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a could not be written: the disk"), atomic_file(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []


def test_output_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(OutputError("out/a could not be written.", errno.EDQUOT)))
    assert (str(error), error.errno, error.stops_run) == ("out/a could not be written.", errno.EDQUOT, True)


@pytest.mark.parametrize(("umask", "expected"), [(0o007, 0o660), (0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(umask: int, expected: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text_atomic(tmp_path / "a", "a")
        write_text_atomic(tmp_path / "private", "a", mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == expected
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600 & ~umask


def test_files_take_the_group_of_a_setgid_folder(tmp_path: Path) -> None:
    group = next((group for group in os.getgroups() if group != os.getgid()), None)
    if group is None and os.geteuid() != 0:
        pytest.skip("this user has one group only")
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, 12345 if group is None else group)
    shared.chmod(0o2770)
    write_text_atomic(shared / "a", "a")
    assert (shared / "a").stat().st_gid == shared.stat().st_gid


def partial_of(path: Path, machine: str, pid: int, age: float = 0.0) -> Path:
    left = path.with_name(f"{path.name}.{machine}-{pid}-abcdef.partial")
    left.write_text("left")
    stamp = left.stat().st_mtime - age
    os.utime(left, (stamp, stamp))
    return left


def test_partials_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = files.writer_name().rpartition("-")[0]
    gone = [
        partial_of(path, here, dead.pid),
        partial_of(path, here, os.getpid()),  # of an earlier process with our number
        partial_of(path, "0" * 8, 1, age=2 * files.ABANDONED_SECONDS),
        partial_of(tmp_path / "other.h5", here, dead.pid),
    ]
    kept = [
        partial_of(path, here, os.getppid()),
        partial_of(path, "0" * 8, 1, age=60.0).rename(tmp_path / "a.h5.00000000-2-abcdef.partial"),
        tmp_path / "model.bin.partial",  # a download that can be resumed
    ]
    kept[-1].write_text("not ours")
    with atomic_file(path) as first, atomic_file(path) as second:
        assert first.exists() and second.exists() and first != second
        assert not any(left.exists() for left in gone)
        assert all(left.exists() for left in kept)
        second.write_text("2")
        first.write_text("1")
    assert path.read_text() == "1"  # the outer one was renamed last
    assert names(tmp_path) == sorted(["a.h5", *(left.name for left in kept)])


def test_living_partials_stay_however_their_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_file(tmp_path / "a") as temporary:
        files.remove_abandoned(".")
        files.remove_abandoned(str(tmp_path) + "/")
        assert temporary.exists()
        temporary.write_text("a")
    assert names(tmp_path) == ["a"]


def test_partials_of_writers_known_to_be_gone_go_and_others_stay(tmp_path: Path) -> None:
    for name in ("a.h5.01234567-1-abcdef.partial", "b.h5.01234567-2-abcdef.partial"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "c.h5") as mine:
        files.remove_abandoned(tmp_path, gone=["01234567-1", files.writer_name()])
        assert names(tmp_path) == sorted(["b.h5.01234567-2-abcdef.partial", mine.name])


def test_large_folders_are_not_listed_for_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, listed = [100.0], []

    def listing(folder: Path) -> None:
        listed.append(clock[0])
        clock[0] += 0.2  # what 100,000 files take

    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(files, "remove_abandoned", listing)
    for _ in range(300):
        write_text_atomic(tmp_path / "a", "a")
        clock[0] += 0.1
    assert 2 <= len(listed) <= 4


def test_killed_writer_leaves_a_partial_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    code = f"""
        import os
        from gigapath.files import atomic_file
        with atomic_file({str(path)!r}) as temporary:
            temporary.write_text("half")
            os._exit(9)
    """
    root = Path(files.__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, check=False)
    assert child.returncode == 9
    assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
    write_text_atomic(path, "whole")
    assert names(tmp_path) == ["a.txt"] and path.read_text() == "whole"


def test_write_json_is_readable_and_strict(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"name": "Präparat", "values": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Präparat" in text and text.endswith("}\n") and json.loads(text) == {"name": "Präparat", "values": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"value": float("nan")})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text


@settings(derandomize=True, deadline=None, max_examples=200)
@given(name=st.text(max_size=40))
def test_safe_name_either_refuses_or_stays_in_the_folder(name: str) -> None:
    try:
        path = Path("out") / f"{safe_name(name)}.h5"
    except ValueError:
        return
    assert path.parent == Path("out") and Path(os.path.normpath(path)).parent == Path("out")


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_large_content_goes_through_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000
    write_bytes_atomic(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize(
    "words",
    [
        ["tile", "SLIDE"],
        ["embed", "SLIDE", "--tile-encoder", "standin"],
        ["slide-embed", "FEATURES"],
        ["map", "FEATURES", "--kind", "pca"],
        ["report", "RUN", "--to", "OUT"],
        ["convert", "FEATURES", "--to", "trident"],
        ["probe", "--demo"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_folder_that_is_a_file_is_one_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from feature_files import make_tiles
    from made_slides import paint_tissue, write_pyramid
    from tiny_encoders import tiny_tile_encoder

    from gigapath.cli.main import main
    from gigapath.features import TileEmbeddingsWriter

    monkeypatch.setattr("gigapath.embedding.run.load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
    run, out = tmp_path / "run", tmp_path / "taken"
    out.write_text("a file of the user's")
    write_pyramid(tmp_path / "s.tif", paint_tissue(700, 500), mpp=(0.5, 0.5), steps=(1,))
    tiles = make_tiles("s")
    with TileEmbeddingsWriter(run / "features_made" / "s.h5", tiles, embed_dim=4, attrs={"encoder": "made"}) as writer:
        writer.write(0, np.ones((len(tiles), 4), np.float32))
    write_status(run / "features_made", Status("s", "features", "done"))
    given = {"SLIDE": tmp_path / "s.tif", "FEATURES": run / "features_made", "RUN": run, "OUT": out}
    aimed = [str(given.get(word, word)) for word in words]
    if str(out) not in aimed:
        aimed += ["--out", str(out)]
    assert main(aimed) == 1
    said = capsys.readouterr().err
    sentence = "the output folder taken could not be made: a file of that name is there. Choose another output folder."
    assert said == f"gigapath {words[0]}: {sentence}\n"
    assert out.read_text() == "a file of the user's"
