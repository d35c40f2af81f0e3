"""Slides handed to workers: the largest first, two to a worker, what a lost worker had in hand is done elsewhere."""

import errno
import importlib.util
import json
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gigapath.cli.main import main
from gigapath.cohort import crew
from gigapath.cohort import ray as ray_engine
from gigapath.cohort.crew import Lost, News, Ready, Report, Spread
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.privacy import redact
from gigapath.cohort.run import CohortRun
from gigapath.cohort.status import Status, read_status
from gigapath.cohort.worker import Agenda, WorkerProcess
from gigapath.embedding import spreading
from gigapath.embedding.options import RunOptions
from gigapath.embedding.slide_encoding import EncoderError
from gigapath.files import OutputError, atomic_file, remove_abandoned, writer_name
from gigapath.signals import StopFlag, Stopped


class StandIn:
    """A worker without a process: it is through with its slide when the crew is asked for news."""

    def __init__(self, crew: "MadeCrew", node: int) -> None:
        self.crew, self.node, self.ready, self.gone = crew, node, False, False
        self.hand: list[str] = []
        self.stopped = ""

    def work(self, entries: Sequence[SlideEntry]) -> None:
        names = [entry.slide_id for entry in entries]
        assert not self.gone and 1 <= len(names) <= 2, "one slide in work and one announced at the most"
        assert not self.hand or names[0] == self.hand[0], "what was announced comes next"
        self.hand = names
        self.crew.handed.append((self.node, *names))

    def stop(self, why: str) -> None:
        self.stopped = why

    def end(self) -> None:
        self.gone = True


class MadeCrew:
    """A crew of stand-ins; `fate` says what becomes of a worker with these slides in hand."""

    def __init__(self, places: int, fate: Callable[[StandIn], News | None] = lambda worker: None) -> None:
        self.places, self.fate = places, fate
        self.workers: list[StandIn] = []
        self.handed: list[tuple[Any, ...]] = []

    def room(self) -> int:
        return self.places

    def hire(self) -> StandIn:
        self.workers.append(StandIn(self, len(self.workers) + 1))
        return self.workers[-1]

    def news(self, seconds: float) -> list[tuple[StandIn, News]]:
        found: list[tuple[StandIn, News]] = []
        for worker in [worker for worker in self.workers if not worker.gone]:
            news = self.fate(worker)
            if news is None and not worker.ready:
                news = Ready()
            elif news is None and worker.stopped and worker.hand:
                news = Report(stopped=True)
            elif news is None and worker.hand:
                news = Report((done(worker.hand.pop(0)),), tiles=3, seconds=0.5)
            worker.ready = worker.ready or isinstance(news, Ready)
            if news is not None:
                found.append((worker, news))
        return found


def done(name: str) -> Status:
    return Status(name, "tiles", "done", 3)


def entries(*names: str) -> list[SlideEntry]:
    return [SlideEntry(name, Path(name)) for name in names]


def spread_over(made: MadeCrew, weights: dict[str, float], stop: StopFlag | None = None) -> Spread:
    time = iter(range(0, 10**9, 5))
    return Spread(
        made,
        weights,
        stop or StopFlag(),
        lambda entry, why: Status(entry.slide_id, "tiles", "failed", error=why),
        clock=lambda: float(next(time)),
    )


def bring_through(made: MadeCrew, names: str) -> dict[str, str]:
    """slide -> its status; each comes once."""
    found = list(spread_over(made, {name: 100.0 - ord(name) for name in names})(entries(*names)))
    assert len({entry.slide_id for entry, _ in found}) == len(found)
    return {entry.slide_id: statuses[0].status for entry, statuses in found}


# --------------------------------------------------------------------------------------------- handing out


def test_the_largest_slides_are_first_and_a_worker_knows_one_more() -> None:
    made = MadeCrew(2)
    spread = spread_over(made, {"a": 1, "b": 9, "c": 5, "d": 7, "e": 3, "f": 2})
    assert {entry.slide_id for entry, _ in spread(entries(*"abcdef"))} == set("abcdef")
    assert made.handed[:2] == [(1, "b", "d"), (2, "c", "e")]
    assert made.handed[2:4] == [(1, "d", "f"), (2, "e")], "of the last slides none waits behind another"
    assert len(made.workers) == 2 and not any(worker.gone for worker in made.workers)
    shares = spread.shares
    assert sum(share.slides for share in shares.values()) == 6 and sum(share.tiles for share in shares.values()) == 18
    assert sum(share.busy for share in shares.values()) == pytest.approx(3.0)


def test_no_more_workers_are_hired_than_there_are_slides() -> None:
    made = MadeCrew(64)
    assert bring_through(made, "ab") == {"a": "done", "b": "done"}
    assert len(made.workers) == 2


def test_workers_take_part_as_machines_come() -> None:
    made = MadeCrew(1)
    made.fate = lambda worker: setattr(made, "places", 3) if len(made.handed) > 2 else None
    bring_through(made, "abcdefghijkl")
    assert len(made.workers) == 3 and {row[0] for row in made.handed} == {1, 2, 3}


def test_slides_of_a_second_pass_go_to_the_workers_that_are_there() -> None:
    made = MadeCrew(2)
    spread = spread_over(made, {})
    assert len(list(spread(entries(*"abc")))) == 3 and len(list(spread(entries("a")))) == 1
    assert len(made.workers) == 2


# --------------------------------------------------------------------------------------------- lost workers


def test_what_a_lost_worker_had_in_hand_is_done_elsewhere_by_itself() -> None:
    made = MadeCrew(2, lambda worker: Lost() if worker.node == 1 and worker.hand else None)
    assert set(bring_through(made, "abcdef").values()) == {"done"}
    assert made.handed[0] == (1, "a", "b")
    assert [row for row in made.handed if row[0] > 1 and {"a", "b"} & set(row)] in (
        [(2, "a"), (3, "b")],
        [(3, "a"), (2, "b")],
        [(2, "a"), (2, "b")],
        [(3, "a"), (3, "b")],
    )
    assert made.workers[0].gone and len(made.workers) == 3, "the lost one is replaced"


def test_a_slide_that_ends_its_workers_fails_and_the_others_go_on() -> None:
    made = MadeCrew(2, lambda worker: Lost() if "c" in worker.hand else None)
    found = bring_through(made, "abcdefgh")
    assert found == {name: "failed" if name == "c" else "done" for name in "abcdefgh"}
    assert len([worker for worker in made.workers if worker.gone]) == 3, "once in company, twice by itself"


def test_workers_lost_as_they_start_end_the_run() -> None:
    made = MadeCrew(1, lambda worker: Lost())
    with pytest.raises(OSError, match="4 workers were lost one after the other as they started"):
        bring_through(made, "ab")


def test_a_machine_where_workers_cannot_start_is_left_alone_while_others_work() -> None:
    made = MadeCrew(3, lambda worker: Lost() if worker.node > 1 else None)
    assert set(bring_through(made, "abcdefghijklmnop").values()) == {"done"}
    assert len(made.workers) < 3 * 16


def test_a_run_without_any_machine_ends_after_a_while() -> None:
    with pytest.raises(OSError, match="expected a worker within 600 s, got none"):
        bring_through(MadeCrew(0), "ab")


def test_an_encoder_that_fails_everywhere_ends_the_run_and_one_that_fails_once_does_not() -> None:
    broken = Report(error=EncoderError("out of memory"))
    once = MadeCrew(2, lambda worker: broken if worker.node == 1 and worker.hand else None)
    assert set(bring_through(once, "abcd").values()) == {"done"}
    with pytest.raises(EncoderError, match="out of memory"):
        bring_through(MadeCrew(2, lambda worker: broken if worker.hand else None), "abcd")


def test_a_full_disk_ends_the_run_at_once() -> None:
    full = Report(error=OutputError("tiles/a.h5 could not be written: the disk is full.", errno.ENOSPC))
    made = MadeCrew(2, lambda worker: full if worker.node == 1 and worker.hand else None)
    with pytest.raises(OutputError, match="the disk is full"):
        bring_through(made, "abcd")
    assert len(made.workers) == 2 and made.workers[1].stopped


def test_a_signal_stops_what_is_in_work() -> None:
    stop, made = StopFlag(), MadeCrew(2)
    spread = spread_over(made, {}, stop)
    through = spread(entries(*"abcdefgh"))
    next(through)
    stop.set("SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM"):
        list(through)
    assert any(worker.stopped == "SIGTERM" for worker in made.workers)
    assert all(worker.gone or not worker.hand for worker in made.workers)


# --------------------------------------------------------------------------------- within a run, and a worker


def test_a_run_counts_retries_and_ends_by_what_its_crew_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has each machine's share; the slide that no worker survives has its reason in its status."""
    made = MadeCrew(2, lambda worker: Lost() if "c" in worker.hand else None)
    made.close = lambda: None  # type: ignore[attr-defined]
    made.tidy = lambda folders: None  # type: ignore[attr-defined]
    made.facts = lambda: {"name": "made"}  # type: ignore[attr-defined]
    made.in_words = lambda: "two stand-ins."  # type: ignore[attr-defined]
    monkeypatch.setattr(crew, "_STAFF_SECONDS", 0.0)
    slides = [SlideEntry(name, tmp_path / name) for name in "abcdef"]
    run = CohortRun(tmp_path / "out", "tile", slides, [tmp_path / "out" / "tiles"], {})
    result = spreading._over_slides(run, made, slides, {}, lambda: crew_plan(6))  # type: ignore[arg-type]
    assert result.outcome == "some slides failed"
    status = read_status(tmp_path / "out" / "tiles", "c")
    assert status is not None and status.status == "failed" and "its worker was lost, 2 times" in status.error
    record = json.loads(next((tmp_path / "out" / "runs").glob("*.json")).read_text())
    engine = record["facts"]["engine"]
    assert engine["lost_workers"] == 4, "three times, and once more in the second pass"
    assert sum(machine["slides"] for machine in engine["machines"]) == 5


def crew_plan(slides: int) -> Any:
    from gigapath.cohort.run import Plan

    return Plan(("made",), slides, 0)


class MadeWork:
    """A job that notes what it is told and does."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def agenda(self, run: CohortRun) -> tuple[Any, Agenda]:
        raise ValueError("no such encoder")

    def join(self, run: CohortRun, agenda: Agenda | None) -> "MadeWork":
        return self

    def announce(self, slides: Sequence[SlideEntry]) -> None:
        self.seen.append(("announce", *(slide.slide_id for slide in slides)))

    def work(self, entry: SlideEntry) -> list[Status]:
        self.seen.append(("work", entry.slide_id))
        if entry.slide_id == "c":
            raise Stopped("SIGTERM")
        return [done(entry.slide_id)]


def test_a_worker_announces_each_slide_once_and_says_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a worker changes the current folder: it is set back afterwards
    work = MadeWork()
    worker = WorkerProcess(work, "tile", tmp_path, str(tmp_path), lambda: "here")
    assert str(worker.start(None, first=True).error) == "no such encoder"
    hello = worker.start(None, first=False)
    assert (hello.error, hello.machine, hello.writer) == (None, "here", writer_name())
    a, b, c = entries(*"abc")
    assert [worker.work(pair).tiles for pair in ((a, b), (b, c))] == [3, 3]
    assert worker.work((c,)).stopped
    assert work.seen == [
        *[("announce", "a", "b"), ("work", "a"), ("announce", "c"), ("work", "b"), ("announce",), ("work", "c")]
    ]
    elsewhere = WorkerProcess(work, "tile", tmp_path / "not here", "/nowhere", lambda: "here")
    assert "expected the output folder not here on every machine" in str(elsewhere.start(None, first=False).error)


# ----------------------------------------------------------------------------------------------- the engine


def test_a_missing_ray_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    (tmp_path / "a.tif").touch()
    words = ["tile", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out"), "--engine", "ray"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'gigapath[ray]'" in said


def test_options_of_ray_want_its_engine() -> None:
    with pytest.raises(ValueError, match="expected --engine ray beside them, got --engine local"):
        RunOptions(ray_address="auto")


def test_an_address_where_nothing_answers_as_ray_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"expected HOST:PORT, auto or local, got 'ray://a:1'"):
        ray_engine.check_address("ray://a:1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"expected a Ray cluster at '127.0.0.1:{port}', got Connection refused"):
            ray_engine.check_address(f"127.0.0.1:{port}")
        server.listen(1)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="got something else"):
            ray_engine.check_address(f"127.0.0.1:{port}")
        thread.join()


def test_addresses_stay_out_of_records() -> None:
    assert redact(["a", "--ray-address", "host:1", "b"]) == ["a", "--ray-address", "<address>", "b"]
    assert redact(["--ray-address=host:1"]) == ["--ray-address=<address>"]
    assert redact({"ray_address": "host:1"}) == {"ray_address": "<address>"}
    assert redact({"ray_address": None}) == {"ray_address": None}


def test_unfinished_files_of_lost_workers_go_and_others_stay(tmp_path: Path) -> None:
    for name in ("a.h5.01234567-1-abcdef.partial", "b.h5.01234567-2-abcdef.partial"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "c.h5") as mine:
        remove_abandoned(tmp_path, gone=["01234567-1", writer_name()])
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["b.h5.01234567-2-abcdef.partial", mine.name])
