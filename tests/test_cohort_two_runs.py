"""Two runs at once with different options on one folder: whoever says that it is done has the folder to itself."""

import json
import os
import time
from pathlib import Path

import killed_runs
import numpy as np
import pytest
from killed_runs import finish, make_slides, start

from gigapath.cli.main import main
from gigapath.cohort import stage
from gigapath.cohort.stage import FolderTaken, Ownership, digest, holds
from gigapath.cohort.status import read_statuses

OPTIONS = (("--store", "float16"), ("--batch-size", "4"), ("--max-tiles", "3"), ("--min-tissue", "0.5"))
_PAIRS = 4


@pytest.fixture(scope="module")
def ctx():
    return killed_runs.context()


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slides(tmp_path_factory.mktemp("slides"), 8)


def sorts(out: Path) -> dict[str, set[str]]:
    """By stage, the options that its finished results are of."""
    given = ("tiles", "features", "slide_bytes")
    found: dict[str, set[str]] = {}
    for folder in (out / "tiles", *out.glob("features_*"), *out.glob("slides_*")):
        for status in read_statuses(folder).values():
            assert not status.finished or holds(folder, status), f"{folder.name}/{status.slide_id}: another run's file"
            options = {name: value for name, value in status.identity.items() if name not in given}
            found.setdefault(folder.name, set()).add(digest(options))
    return found


def pair(ctx, slides: Path, out: Path, seed: int) -> tuple[list[int | None], dict[str, set[str]]]:
    """Exit statuses of two runs that begin at nearly the same time, in the order in which they end, and `sorts`."""
    random = np.random.default_rng(seed)
    words = [(), OPTIONS[seed % len(OPTIONS)]]
    words[seed // len(OPTIONS) % 2] += ("--overwrite", "all") * bool(random.integers(2))
    random.shuffle(words)
    one = start(ctx, slides, out, words=words[0])
    time.sleep(float(random.uniform(0, 0.4)) * bool(random.integers(3)))
    two = start(ctx, slides, out, words=words[1])
    ended = []
    while len(ended) < 2:
        ended += [run for run in (one, two) if run not in ended and not run.is_alive()]
        time.sleep(0.002)
    return [finish(run) for run in ended], sorts(out)


@pytest.mark.parametrize(
    "seed", [*range(_PAIRS), *(pytest.param(n, marks=pytest.mark.slow) for n in range(_PAIRS, 50))]
)
def test_no_mixed_folder_is_called_done(ctx, slides: Path, tmp_path: Path, seed: int) -> None:
    ended, found = pair(ctx, slides, tmp_path, seed)
    assert set(ended) <= {0, 1}
    if 0 in ended:
        assert all(len(each) == 1 for each in found.values()), (ended, found)
    assert not list(tmp_path.rglob(".run-*"))


def test_runs_with_the_same_options_share_a_folder_and_others_wait(tmp_path: Path) -> None:
    with Ownership({tmp_path: {"precision": "fp32"}}):
        with Ownership({tmp_path: {"precision": "fp32"}}) as second:
            second.check()
            with pytest.raises(FolderTaken, match=r"--precision fp32 -> fp16.*--out"):
                Ownership({tmp_path: {"precision": "fp16"}}).__enter__()
        with pytest.raises(FolderTaken):
            Ownership({tmp_path: {"precision": "fp16"}}).__enter__()
    with Ownership({tmp_path: {"precision": "fp16"}}):
        pass


@pytest.mark.parametrize("machine", ["this", "another"])
def test_folder_of_a_run_that_is_gone_is_taken_and_it_notices(
    tmp_path: Path, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ownership({tmp_path: {"precision": "fp32"}}) as first:
        mark = next(tmp_path.glob(".run-*"))
        if machine == "this":
            process = ctx_less_child()
            gone = mark.with_name(mark.name.replace(f"-{os.getpid()}-", f"-{process}-"))
            mark.rename(gone)
        else:
            monkeypatch.setattr(stage, "is_running_here", lambda _: None)
            os.utime(mark, (1, 1))
        with Ownership({tmp_path: {"precision": "fp16"}}) as second:
            with pytest.raises(FolderTaken, match="other options"):
                first.check()
            second.check()


def test_a_run_of_another_machine_is_told_with_its_last_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ownership({tmp_path: {"precision": "fp32"}}):
        monkeypatch.setattr(stage, "is_running_here", lambda _: None)
        with pytest.raises(FolderTaken, match=r"another machine.* 300 s"):
            Ownership({tmp_path: {"precision": "fp16"}}).__enter__()


def ctx_less_child() -> int:
    """The number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_check_reports_a_folder_of_mixed_options(
    ctx, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish(start(ctx, slides, tmp_path)) == 0
    for folder, name, value in (("features_mean-colour", "store", "float16"), ("tiles", "max_tiles", 3)):
        path = next((tmp_path / folder).glob("*.json"))
        values = json.loads(path.read_text())
        values["identity"][name] = value
        path.write_text(json.dumps(values))
        assert main(["check", str(tmp_path / folder)]) == 3
        said = capsys.readouterr().out
        assert "WRONG mixed-options" in said and "--" + name.replace("_", "-") in said
