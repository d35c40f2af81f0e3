"""Runs that share a folder or a cohort: failures are tried twice, shards do every slide once, two runs lose nothing."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import table
from made_slides import paint_tissue, write_pyramid

from gigapath.cli.main import main
from gigapath.cohort.manifest import SlideEntry, cut_by_weight, take_shard, weigh
from gigapath.cohort.record import record_run, recorded_paths
from gigapath.cohort.run import CohortRun, RunResult
from gigapath.cohort.stage import Outcome
from gigapath.cohort.status import Status, read_status, slide_row, write_slides_csv, write_status
from gigapath.embedding import tiling
from gigapath.embedding.options import RunOptions, parse_shard
from gigapath.embedding.tiling import run_tile
from gigapath.preprocessing.slide import SlideError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.progress import Progress

TILING = TileOptions(tile_size=64)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven small slides of different sizes, one of them blank."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(6):
        image = paint_tissue(260 + 90 * number, 420, seed=number)
        write_pyramid(folder / f"s{number}.tif", image, mpp=(0.5, 0.5), steps=(1,))
    write_pyramid(folder / "blank.tif", np.full((300, 420, 3), 240, np.uint8), mpp=(0.5, 0.5), steps=(1,))
    return folder


pytestmark = pytest.mark.usefixtures("no_pictures")


def tile(slides: Path, out: Path, *, watch: Progress | None = None, **run: Any) -> RunResult:
    return run_tile([slides], out, tiling=TILING, options=RunOptions(workers=0, **run), watch=watch)


class Failing:
    """Stands before `plan_tiles` and fails for some slides so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[str, int]) -> None:
        self.tried: list[str] = []
        self._left = dict(times)
        self._real = tiling.plan_tiles
        monkeypatch.setattr(tiling, "plan_tiles", self)

    def __call__(self, slide: Any, options: Any, **given: Any) -> Any:
        self.tried.append(slide.slide_id)
        if self._left.get(slide.slide_id, 0):
            self._left[slide.slide_id] -= 1
            raise OSError("the file server is away")
        return self._real(slide, options, **given)


class Retries(Progress):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def retrying(self, slides: int) -> None:
        self.counts.append(slides)


# ------------------------------------------------------------------------------------------- failures


def test_failed_slides_are_tried_once_more_when_all_others_are_through(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, watch = Failing(monkeypatch, {"s1": 1, "s2": 5}), Retries()
    result = tile(slides, tmp_path, watch=watch)
    assert failing.tried == ["blank", "s0", "s1", "s2", "s3", "s4", "s5", "s1", "s2"]
    assert watch.counts == [2]
    assert (result.outcome, result.counts["failed"], result.note) == ("some slides failed", 1, "")
    rows = table(tmp_path)
    assert (rows["s1"]["status"], rows["s2"]["status"], rows["s2"]["error"]) == (
        *("done", "failed", "the file server is away"),
    )


def test_what_cannot_change_is_not_tried_again(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, watch = tiling.plan_tiles, Retries()
    tried = []

    def plan(slide: Any, options: Any, **given: Any) -> Any:
        tried.append(slide.slide_id)
        if slide.slide_id == "s1":
            raise SlideError("slide 's1': its pixels are damaged.")
        if slide.slide_id == "s2":
            raise KeyError("s2")
        return real(slide, options, **given)

    monkeypatch.setattr(tiling, "plan_tiles", plan)
    assert tile(slides, tmp_path, watch=watch).counts["failed"] == 2
    assert watch.counts == [] and len(tried) == 7


def test_slides_that_are_missing_fail_together(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{slides}/s0.tif", *(f"nowhere/{number}.tif" for number in range(300))]
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(rows) + "\n")
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    words = ["tile", str(tmp_path / "m.csv"), "--out", str(tmp_path / "out"), "--tile-size", "64", "--workers", "0"]
    assert main(words) == 3
    said = capsys.readouterr().out
    assert said.count("expected a file, got none") == 1 and len(said) < 2000
    assert re.search(r"300 failed: expected a file, got none named .*\(0, 1, 10, 100, 101 and 295 more\)", said)
    assert len(flushed) < 30
    assert table(tmp_path / "out")["299"]["status"] == "failed" and table(tmp_path / "out")["s0"]["status"] == "done"
    assert tile(slides / "s0.tif", tmp_path / "out").outcome == "done"


def test_only_failed_leaves_everything_else_out(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, {"s1": 2, "s2": 2})
    tile(slides, tmp_path)
    write_pyramid(slides / "new.tif", paint_tissue(300, 200), mpp=(0.5, 0.5), steps=(1,))
    again = Failing(monkeypatch, {})
    try:
        result = tile(slides, tmp_path, only="failed")
    finally:
        (slides / "new.tif").unlink()
    assert again.tried == ["s1", "s2"]
    assert (result.outcome, result.counts["done"], sum(result.counts.values())) == ("done", 2, 2)
    assert table(tmp_path)["new"]["status"] == "todo"
    assert tile(slides, tmp_path, only="failed").rows == ()


def test_more_failures_than_allowed_end_the_run_with_a_sentence(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Failing(monkeypatch, dict.fromkeys(("blank", "s0", "s1", "s2", "s3"), 9))
    words = ["tile", str(slides), "--out", str(tmp_path), "--tile-size", "64", "--workers", "0", "--max-failures", "1"]
    assert main(words) == 3
    assert failing.tried == ["blank", "s0"], "nothing is tried again"
    said = capsys.readouterr().out
    assert "2 of 2 slides failed, more than --max-failures 1: ended with 5 slides to do." in said
    assert "blank: failed: the file server is away" in said
    assert table(tmp_path)["s5"]["status"] == "todo"
    assert tile(slides, tmp_path, max_failures=5).counts["failed"] == 5


# ------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4/2"])
def test_parse_shard_refuses_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match=r"--shard: expected I/N"):
        parse_shard(text)
    with pytest.raises(ValueError, match=r"--shard: expected I/N"):
        RunOptions(shard=text)


def test_cut_by_weight_is_even_complete_and_independent_of_order() -> None:
    random = np.random.default_rng(0)
    weights = {f"s{number}": float(weight) for number, weight in enumerate(random.lognormal(8, 1, 500))}
    cut = cut_by_weight(weights, 7)
    assert cut.keys() == weights.keys() and set(cut.values()) == set(range(1, 8))
    loads = [sum(weights[name] for name, share in cut.items() if share == number) for number in range(1, 8)]
    assert max(loads) - min(loads) < 0.02 * max(loads)
    backwards = dict(reversed(list(weights.items())))
    assert cut_by_weight(backwards, 7) == cut
    assert sorted(cut_by_weight({"a": 0.0, "b": 0.0, "c": 0.0}, 3).values()) == [1, 2, 3], "empty slides are shared too"
    assert cut_by_weight({"a": 1.0}, 3) == {"a": 1}


def test_weigh_takes_counts_then_sizes_then_the_mean(tmp_path: Path) -> None:
    tiles = tmp_path / "tiles"
    for name, size in {"a": 100, "b": 300, "c": 200}.items():
        (tmp_path / name).write_bytes(bytes(size))
    write_status(tiles, Status("a", "tiles", "done", 50))
    write_status(tiles, Status("b", "tiles", "done", 150))
    entries = [SlideEntry(name, tmp_path / name) for name in ("a", "b", "c", "gone")]
    assert weigh(entries, tiles) == {"a": 50, "b": 150, "c": 100, "gone": 100}


def test_shards_stay_a_partition_whatever_is_found_out_between_them(tmp_path: Path) -> None:
    entries = []
    for number in range(20):
        (tmp_path / f"s{number}").write_bytes(bytes(100 + 37 * number % 500))
        entries.append(SlideEntry(f"s{number}", tmp_path / f"s{number}"))
    out, taken = tmp_path / "out", []
    for number in range(1, 5):
        mine = take_shard(out, "embed", entries, (number, 4), tiles=out / "tiles")
        taken += [entry.slide_id for entry in mine]
        for entry in mine:  # what was found out would cut the cohort otherwise
            write_status(out / "tiles", Status(entry.slide_id, "tiles", "done", 1 + 50 * number))
    assert sorted(taken) == sorted(entry.slide_id for entry in entries)
    assert take_shard(out, "embed", entries[:10], (1, 1), tiles=out / "tiles") == entries[:10]


def test_first_job_of_an_array_makes_the_cut_also_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    entries = [SlideEntry(name, tmp_path / name) for name in "abc"]
    mine = [take_shard(tmp_path, "tile", entries, (number, 2), tiles=tmp_path) for number in (1, 2)]
    assert sorted(entry.slide_id for share in mine for entry in share) == ["a", "b", "c"]
    assert [path.name.split("-")[:2] for path in (tmp_path / "shards").iterdir()] == [["tile", "2"]]


def test_shards_together_give_the_files_of_one_run(slides: Path, tmp_path: Path) -> None:
    tile(slides, tmp_path / "whole")
    for number in (3, 1, 4, 2):
        result = tile(slides, tmp_path / "shards", shard=f"{number}/4")
        assert 1 <= len(result.rows) <= 3
    names = {path.name for path in (tmp_path / "whole/tiles").iterdir()}
    assert {path.name for path in (tmp_path / "shards/tiles").iterdir()} == names
    for name in names:
        if name.endswith(".h5"):
            assert (tmp_path / "shards/tiles" / name).read_bytes() == (tmp_path / "whole/tiles" / name).read_bytes()
    timeless = {"seconds", "seconds_tile", "tiles/s"}
    one, other = table(tmp_path / "whole"), table(tmp_path / "shards")
    assert one.keys() == other.keys()
    for name, row in one.items():
        assert {k: v for k, v in row.items() if k not in timeless} == {
            k: v for k, v in other[name].items() if k not in timeless
        }
    assert len(recorded_paths(tmp_path / "shards")) == 7


# ------------------------------------------------------------------------------------------- two runs at once


def test_paths_of_two_runs_at_once_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run writes its paths just after the first has read what is there."""
    from gigapath.cohort import record

    real, calls = record.write_private, []

    def write(out: Path, name: str, text: str) -> None:
        calls.append(name)
        if name == "paths.csv" and len(calls) == 2:
            record_run(tmp_path, "20260101_b", {}, [SlideEntry("b", Path("/x/b"))])
        real(out, name, text)

    monkeypatch.setattr(record, "write_private", write)
    record_run(tmp_path, "20260101_a", {}, [SlideEntry("a", Path("/x/a"))])
    assert [entry.slide_id for entry in recorded_paths(tmp_path)] == ["a", "b"]
    assert [line.split(",")[0] for line in (tmp_path / "private/paths.csv").read_text().splitlines()] == [
        *("slide_id", "a", "b")
    ]


def test_later_run_records_only_what_is_new(tmp_path: Path) -> None:
    for run_id in ("1", "2"):
        record_run(tmp_path, run_id, {"user": "u"}, [SlideEntry("a", Path("/x/a"), 0.5)])
    assert [len(json.loads((tmp_path / f"private/{n}.json").read_text())["slides"]) for n in (1, 2)] == [1, 0]


def test_slides_csv_is_written_again_where_another_run_has_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gigapath.cohort import status

    folder, real, written = tmp_path / "tiles", status.write_text_atomic, []
    write_status(folder, Status("a", "tiles", "done", 3))

    def write(path: Path, text: str) -> None:
        if not written:
            write_status(folder, Status("b", "tiles", "done", 5))
        written.append(text)
        real(path, text)

    monkeypatch.setattr(status, "write_text_atomic", write)
    assert [row["slide_id"] for row in write_slides_csv(tmp_path, [folder])] == ["a", "b"]
    assert len(written) == 2
    assert table(tmp_path)["b"]["tiles"] == "5"


def test_slide_that_another_run_finishes_meanwhile_is_not_marked_as_failed(tmp_path: Path) -> None:
    run, entry = CohortRun(tmp_path, "tile", [], [], {}), SlideEntry("a", tmp_path / "a")

    def fail() -> Outcome:
        raise OSError("gone")

    def work() -> Outcome:
        write_status(tmp_path, Status("a", "slides", "no_tissue", 7, identity={"mpp": 0.5}))
        raise OSError("gone")

    assert run.attempt(tmp_path, entry, "slides", {"mpp": 0.5}, fail).status == "failed", "nobody has done it"
    found = read_status(tmp_path, "a")
    assert found is not None and slide_row("a", [found])["error"] == "gone"
    assert found.ended > 1.7e9
    assert run.attempt(tmp_path, entry, "slides", {"mpp": 0.5}, work).tiles == 7
    assert run.attempt(tmp_path, entry, "slides", {"mpp": 0.25}, work).status == "failed", "with other options"
    found = read_status(tmp_path, "a")
    assert found is not None and found.finished, "what the other has done stands"


def test_columns_that_are_added_or_mended_reach_what_is_kept(slides: Path, tmp_path: Path) -> None:
    manifest, out = tmp_path / "m.csv", tmp_path / "out"
    manifest.write_text(f"path,patient_id\n{slides}/s0.tif,p1\n{slides}/s1.tif,p1\n")
    tile(manifest, out)
    made = (out / "tiles" / "s0.h5").stat().st_mtime_ns
    manifest.write_text(f"path,patient_id,grade\n{slides}/s0.tif,p2,3\n")
    tile(manifest, out)
    rows = table(out)
    assert (rows["s0"]["patient_id"], rows["s0"]["grade"]) == ("p2", "3")
    assert rows["s1"]["patient_id"] == "p1", "the manifest of today doesn't name it"
    tile(slides / "s0.tif", out)
    assert table(out)["s0"]["grade"] == "3", "without a manifest what is known stays"
    assert (out / "tiles" / "s0.h5").stat().st_mtime_ns == made, "nothing was done again"
