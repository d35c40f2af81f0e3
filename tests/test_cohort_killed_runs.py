"""Runs that die at any point and are started again end with exactly the files of an unbroken run."""

import os
import signal
import time
from pathlib import Path

import killed_runs
import pytest
from killed_runs import DIED, POINTS, differences, finish, kill_at_random, make_slides, start, time_unbroken


@pytest.fixture(scope="module")
def ctx():
    return killed_runs.context()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, ctx) -> tuple[Path, Path]:
    """(three slides, the output of an unbroken run over them)"""
    folder = tmp_path_factory.mktemp("few")
    slides = make_slides(folder / "slides", 3)
    time_unbroken(ctx, slides, folder / "unbroken")
    return slides, folder / "unbroken"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, ctx) -> tuple[Path, Path, float]:
    """(forty slides, the output of an unbroken run over them, its seconds)"""
    folder = tmp_path_factory.mktemp("many")
    slides = make_slides(folder / "slides", 40)
    return slides, folder / "unbroken", time_unbroken(ctx, slides, folder / "unbroken")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 3, 5))])
def test_process_that_dies_on_the_write_path_is_made_good_by_the_next(
    point: str, at: int, few: tuple[Path, Path], ctx, tmp_path: Path
) -> None:
    slides, unbroken = few
    assert finish(start(ctx, slides, tmp_path, point=point, at=at)) == DIED, f"{point} was never reached"
    assert differences(unbroken, tmp_path), "something was left to do"
    assert finish(start(ctx, slides, tmp_path)) == 0
    assert differences(unbroken, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_run_killed_at_random_moments_ends_as_if_unbroken(
    seed: int, many: tuple[Path, Path, float], ctx, tmp_path: Path
) -> None:
    slides, unbroken, seconds = many
    said = kill_at_random(ctx, slides, unbroken, tmp_path, seed, seconds)
    assert said.endswith("as unbroken"), said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_ends_a_run_with_75_and_the_next_one_goes_on(
    name: str, many: tuple[Path, Path, float], ctx, tmp_path: Path
) -> None:
    slides, unbroken, _ = many
    run = start(ctx, slides, tmp_path)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("features_mean-colour/*.h5")):
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(run.pid or 0, getattr(signal, name))
    assert finish(run, 20.0) == 75
    assert not list(tmp_path.rglob("*-*.partial"))
    assert finish(start(ctx, slides, tmp_path)) == 0
    assert differences(unbroken, tmp_path) == []


@pytest.mark.slow
def test_two_runs_at_once_and_four_shards_at_once_lose_nothing(
    many: tuple[Path, Path, float], ctx, tmp_path: Path
) -> None:
    slides, unbroken, _ = many
    for folder, words in (("two", [(), ()]), ("shards", [("--shard", f"{n}/4") for n in (1, 2, 3, 4)])):
        out = tmp_path / folder
        runs = [start(ctx, slides, out, words=each) for each in words]
        assert [finish(run) for run in runs] == [0] * len(runs)
        extra = [name for name in differences(unbroken, out) if not name.startswith("has shards/")]
        assert extra == []
        paths = (out / "private/paths.csv").read_text().splitlines()
        assert len(paths) == 41


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_many_slides(tmp_path: Path) -> None:
    """The figures of 2,000 slides: `python tests/killed_runs.py 2000`."""
    rows = killed_runs.soak(120, tmp_path)
    assert rows[-1][2] <= rows[2][2], "open files"
    assert rows[-1][1] <= rows[2][1] + 30, "megabytes"
