"""`--engine ray` on two nodes of one core each, with real processes: shares, equal bytes, lost workers and nodes."""

import contextlib
import errno
import importlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_slides import make_slides, paint_tissue, write_pyramid
from mean_colour import run_mean_colours

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.ray_tasks import RayTasks
from gigapath.cohort.run import CohortRun, RunResult
from gigapath.cohort.stage import Outcome
from gigapath.cohort.status import Status
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.embedding.tiling import run_tile
from gigapath.files import OutputError
from gigapath.preprocessing.tiling import TileOptions
from gigapath.progress import Plan, Progress

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'gigapath[ray]'"),
]
ROOT = Path(__file__).parent.parent
SEEDS = [int(word) for word in os.environ.get("GIGAPATH_RAY_SEEDS", "1 2 3").split()]
TILING = TileOptions(tile_size=64)
# Written anew by every run, or of the run itself.
_ITS_OWN = ("seconds", "ended", "seconds_tile", "tiles/s")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 slides of different sizes, one that can't be read, and one whose name can't be an id."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(40):
        image = paint_tissue(600 + 40 * (number % 7), 500, seed=number)
        write_pyramid(folder / f"s{number:02d}.tif", image, mpp=(0.5, 0.5), steps=(1, 4))
    (folder / "broken.tif").write_bytes(b"II*\0" + bytes(200))
    (folder / "line\nend.tif").write_bytes(b"never opened")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 slides for runs that are killed, four of them blank, and one that can't be read."""
    folder = make_slides(tmp_path_factory.mktemp("small"), 40)
    (folder / "broken.tif").write_bytes(b"II*\0" + bytes(200))
    return folder


@pytest.fixture(scope="module")
def small_unbroken(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small-local")
    assert run_mean_colours(small, out, RunOptions(workers=0)).counts["no_tissue"] == 4
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each; the first holds Ray's own services."""
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "5e" * 32,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        # A node that is gone is noticed within a second or two.
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80_000_000}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.node_args = node
        made.second = made.add_node(**node)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def unbroken(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    assert run_tile([slides], out, tiling=TILING, options=RunOptions(workers=0)).counts["done"] == 40
    return out


def over_ray(cluster: Any, slides: Path, out: Path, watch: Progress | None = None) -> RunResult:
    options = RunOptions(engine="ray", ray_address=cluster.address)
    return run_tile([slides], out, tiling=TILING, options=options, watch=watch)


def colours_over_ray(cluster: Any, slides: Path, out: Path, watch: Progress) -> RunResult:
    """Tiles, tile embeddings and slide embeddings, by workers that start within a second: none imports torch."""
    result = run_mean_colours(slides, out, RunOptions(engine="ray", ray_address=cluster.address), watch)
    assert (result.counts["done"], result.counts["no_tissue"], result.counts["failed"]) == (36, 4, 1)
    return result


def content(out: Path) -> dict[str, object]:
    """Every file of a run by its name; statuses without times, of slides.csv its name alone."""
    found: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name.startswith(("runs/", "private/2")):
            continue
        if path.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in _ITS_OWN}
        else:
            found[name] = None if name == "slides.csv" else path.read_bytes()
    return found


def engine_facts(out: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(next((out / "runs").glob("*.json")).read_text())["facts"]["engine"]
    return facts


def check_equal(out: Path, unbroken: Path) -> None:
    found, expected = content(out), content(unbroken)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


# ------------------------------------------------------------------------------------------------------- shares


def test_each_of_two_nodes_does_its_share_and_the_files_are_equal(
    cluster: Any, slides: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = over_ray(cluster, slides, tmp_path)
    assert (result.outcome, result.counts["done"], result.counts["failed"]) == ("some slides failed", 40, 2)
    check_equal(tmp_path, unbroken)
    facts = engine_facts(tmp_path)
    first, second = facts["machines"]
    assert first["slides"] + second["slides"] == 42
    assert 0.35 <= first["tiles"] / (first["tiles"] + second["tiles"]) <= 0.65, facts
    said = capfd.readouterr()
    assert (said.out + said.err).count("\n") < 5, "Ray keeps quiet"


# ------------------------------------------------------------------------------------- what is lost on the way


class Striking(Progress):
    """Strikes once so many slides are through."""

    def __init__(self, after: int, strike: Any) -> None:
        self._after, self._strike, self._struck = after, strike, False

    def slide(self, row: Any, number: int, slides: int) -> None:
        if number == self._after and not self._struck:  # numbers begin anew with the slides that failed
            self._struck = True
            # From beside the run, a moment later: at any point of a worker's writing.
            threading.Timer(random.uniform(0.0, 0.2), self._strike).start()


def workers() -> list[int]:
    """Process numbers of the tasks that are at work."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "ray::gigapath_slides" in line]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_killed_at_any_moment_leaves_exactly_the_files_of_an_unbroken_run(
    cluster: Any, small: Path, small_unbroken: Path, tmp_path: Path, seed: int
) -> None:
    random.seed(seed)
    killed: list[int] = []

    def kill() -> None:
        while not (found := workers()):  # between two tasks
            time.sleep(0.01)
        killed.append(random.choice(found))
        with contextlib.suppress(ProcessLookupError):
            os.kill(killed[0], signal.SIGKILL)

    colours_over_ray(cluster, small, tmp_path, Striking(random.randint(1, 22), kill))
    assert killed
    assert engine_facts(tmp_path)["lost_workers"] <= 1, "none where its task had just ended"
    check_equal(tmp_path, small_unbroken)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_is_gone_leaves_exactly_the_files_of_an_unbroken_run(
    cluster: Any, small: Path, small_unbroken: Path, tmp_path: Path, seed: int
) -> None:
    random.seed(seed)
    gone = threading.Event()

    def remove() -> None:
        cluster.remove_node(cluster.second, allow_graceful=False)
        gone.set()

    try:
        colours_over_ray(cluster, small, tmp_path, Striking(random.randint(1, 22), remove))
    finally:
        gone.wait(20)
        cluster.second = cluster.add_node(**cluster.node_args)
        cluster.wait_for_nodes()
    assert gone.is_set()
    check_equal(tmp_path, small_unbroken)


@dataclass(frozen=True)
class Deadly:
    """A job of which some slides end the process that does them, or raise what is no slide's fault."""

    run: CohortRun

    def announce(self, entries: Sequence[SlideEntry]) -> None:
        pass

    def work(self, entry: SlideEntry) -> list[Status]:
        if entry.slide_id == "deadly":
            os._exit(9)
        if entry.slide_id.startswith("waits"):
            node = importlib.import_module("ray").get_runtime_context().get_node_id()
            (self.run.out / f"{os.getpid()} {node}").touch()
            while not (self.run.out / f"go-on-{node}").exists():
                time.sleep(0.05)
        if entry.slide_id == "full":
            raise OutputError("tiles/full.h5 could not be written: the disk is full.", errno.ENOSPC)
        if entry.slide_id == "encoder fails":
            raise ArithmeticError("the encoder fails")
        if entry.slide_id == "encoder fails once" and not (self.run.out / "failed").exists():
            (self.run.out / "failed").touch()
            raise ArithmeticError("the encoder fails")
        return [self.run.attempt(self.run.out / "tiles", entry, "tiles", {}, lambda: Outcome(tiles=1))]


def deadly_job(run: CohortRun, found: None) -> tuple[Deadly, None]:
    return Deadly(run), None


def run_job(cluster: Any, out: Path, names: Sequence[str], make_job: Any = deadly_job) -> RunResult:
    entries = [SlideEntry(name, out / f"{name}.tif") for name in names]
    out.mkdir(exist_ok=True)
    for entry in entries:
        entry.path.touch()
    run = CohortRun(out, "tile", entries, [out / "tiles"], {})
    with RayTasks(run, address=cluster.address, cores=None, device="none") as workers:
        workers.start(make_job)
        return run.over_slides(entries, workers.process, lambda: Plan((), len(entries), 0))


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_what_is_lost_in_the_midst_of_a_slide_is_done_elsewhere(cluster: Any, tmp_path: Path, lost: str) -> None:
    second = cluster.second.node_id

    def strike() -> None:
        """Once each of the two nodes is in the midst of a slide."""
        while len(at_work := dict(reversed(path.name.split()) for path in tmp_path.glob("* *"))) < 2:
            time.sleep(0.05)
        if lost == "node":
            cluster.remove_node(cluster.second, allow_graceful=False)
            del at_work[second]  # its worker lives on for a moment, and could still hand over its slide
        else:
            os.kill(int(at_work[second]), signal.SIGKILL)
        for node in at_work:
            (tmp_path / f"go-on-{node}").touch()

    striking = threading.Thread(target=strike, daemon=True)
    striking.start()
    try:
        result = run_job(cluster, tmp_path, ["waits-a", "waits-b", "c", "d"])
    finally:
        striking.join(60)
        if lost == "node":
            cluster.second = cluster.add_node(**cluster.node_args)
            cluster.wait_for_nodes()
    assert (result.outcome, result.counts["done"]) == ("done", 4)
    assert engine_facts(tmp_path)["lost_workers"] == 1


def test_a_slide_that_kills_its_workers_fails_with_that_reason_and_the_others_go_on(
    cluster: Any, tmp_path: Path
) -> None:
    result = run_job(cluster, tmp_path, ["a", "b", "c", "deadly", "d", "e", "f", "g"])
    assert result.counts["done"] == 7 and result.counts["failed"] == 1
    assert "its worker was lost" in next(row["error"] for row in result.rows if row["slide_id"] == "deadly")
    assert engine_facts(tmp_path)["lost_workers"] in (2, 3), "in company perhaps, twice alone"


def test_a_full_disk_ends_the_run(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full") as raised:
        run_job(cluster, tmp_path, ["a", "full", "b", "c"])
    assert raised.value.errno == errno.ENOSPC


def test_an_encoder_that_fails_everywhere_ends_the_run_and_one_that_fails_once_does_not(
    cluster: Any, tmp_path: Path
) -> None:
    assert run_job(cluster, tmp_path / "once", ["a", "encoder fails once", "b", "c"]).counts["done"] == 4
    with pytest.raises(ArithmeticError, match="the encoder fails"):
        run_job(cluster, tmp_path / "always", ["a", "encoder fails", "b", "c"])


def test_a_signal_stops_the_run_and_the_next_one_goes_on(
    cluster: Any, slides: Path, unbroken: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "gigapath.cli.main", "tile", str(slides), "--out", str(tmp_path / "out")]
    words += ["--tile-size", "64", "--engine", "ray", "--ray-address", cluster.address]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    until = time.monotonic() + 60
    while "2/42" not in (tmp_path / "log").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("\n") < 100, "Ray keeps quiet"
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "tiles").glob("*.h5")}
    assert 2 <= len(done) < 40
    record = next((tmp_path / "out" / "runs").glob("*.json")).read_text()
    assert cluster.address not in record and '"stopped"' in record
    over_ray(cluster, slides, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in done} == done, "nothing done is done again"
    check_equal(tmp_path / "out", unbroken)


def test_the_standin_s_embeddings_are_equal_to_the_last_bit(cluster: Any, tmp_path: Path) -> None:
    from gigapath.embedding.run import run_embed
    from gigapath.features import read_features

    (tmp_path / "slides").mkdir()
    for number in range(4):
        image = paint_tissue(700 + 200 * number, 700, seed=number)
        write_pyramid(tmp_path / "slides" / f"s{number}.tif", image, mpp=(0.5, 0.5), steps=(1, 4))
    chosen = EmbedOptions(tile_encoder="standin", device="cpu", batch_size=8)
    tiling = TileOptions(max_tiles=9)
    results = {}
    for engine, options in (
        ("local", RunOptions(workers=0)),
        ("ray", RunOptions(engine="ray", ray_address=cluster.address, worker_cores=1)),
    ):
        result = run_embed([tmp_path / "slides"], tmp_path / engine, tiling=tiling, embedding=chosen, options=options)
        assert (result.outcome, result.counts["done"]) == ("done", 4)
        results[engine] = content(tmp_path / engine)
    assert results["ray"].keys() == results["local"].keys()
    assert [name for name, found in results["ray"].items() if found != results["local"][name]] == []
    features = read_features(next((tmp_path / "ray").glob("features_*/s0.h5"))).features
    assert np.abs(features[0] - features[-1]).max() > 1e-3, "two different tiles differ"
    assert {machine["machine"] for machine in engine_facts(tmp_path / "ray")["machines"]} <= {1, 2}


def test_a_worker_that_no_machine_holds_is_one_sentence_at_once(cluster: Any, slides: Path, tmp_path: Path) -> None:
    options = RunOptions(engine="ray", ray_address=cluster.address, worker_cores=9)
    with pytest.raises(ValueError, match="expected a machine with 9 cores for a worker, got 1 at the most"):
        run_tile([slides], tmp_path, tiling=TILING, options=options)


def test_a_machine_without_the_package_says_what_it_lacks(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def make_job(run, found):\n    raise AssertionError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OSError, match=r"a worker could not start: .*No module named 'only_here'"):
        run_job(cluster, tmp_path / "out", ["a"], importlib.import_module("only_here").make_job)


def test_an_address_where_nothing_answers_is_refused_at_once(slides: Path, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"  # bound, but nobody listens
        for wrong in (address, "127.0.0.1", "ray://127.0.0.1:x"):
            with pytest.raises(OSError, match="--ray-address"):
                run_tile([slides], tmp_path, tiling=TILING, options=RunOptions(engine="ray", ray_address=wrong))


def test_a_run_over_processes_of_this_machine_gives_equal_files(slides: Path, unbroken: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "gigapath.cli.main", "tile", str(slides), "--out", str(tmp_path / "out")]
    words += ["--tile-size", "64", "--engine", "ray", "--ray-address", "local"]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 3, ran.stderr
    assert "ray: room for" in ran.stdout and ran.stderr == ""
    check_equal(tmp_path / "out", unbroken)
