"""Runs on a shared machine: cores that are granted, GPUs that are there, rights of a group, odd and failing disks."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch
from killed_runs import differences, make_slides

from gigapath import devices, machine
from gigapath.cohort.run import RunResult
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.embedding.run import run_embed
from gigapath.files import OutputError
from gigapath.preprocessing.tiling import TileOptions


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slides(tmp_path_factory.mktemp("slides"), 2)


@pytest.fixture(autouse=True)
def mean_colours() -> Iterator[None]:
    """Mean colours and plain pictures, for this file alone."""
    undo = killed_runs.prepare()
    yield
    undo()


def embed(slides: Path, out: Path) -> RunResult:
    return run_embed(
        [slides],
        out,
        tiling=TileOptions(tile_size=64),
        embedding=EmbedOptions(tile_encoder="standin", device="cpu", batch_size=8),
        options=RunOptions(workers=0),
    )


# ------------------------------------------------------------------------------------------- cores and GPUs


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores without limits, whose control groups lie in the folder that is returned."""
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(48)), raising=False)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_cores_are_the_least_of_affinity_groups_and_slurm(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.available_cores() == 48
    put(groups / "own", "0::/slurm/job_1/step_0")
    put(groups / "cgroup/cpu.max", "max 100000")
    put(groups / "cgroup/slurm/job_1/cpu.max", "1600000 100000")
    put(groups / "cgroup/slurm/job_1/step_0/cpu.max", "max 100000")
    assert machine.available_cores() == 16, "the group around the step's own"
    put(groups / "cgroup/slurm/job_1/step_0/cpu.max", "250000 100000")
    assert machine.available_cores() == 3, "two cores and a half"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert machine.available_cores() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert machine.available_cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "nonsense")
    assert machine.available_cores() == 3


def test_cores_of_control_groups_of_version_1(groups: Path) -> None:
    put(groups / "own", "5:cpu,cpuacct:/docker/abc\n4:memory:/x\n1:name=systemd:/")
    put(groups / "cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "400000")
    put(groups / "cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000")
    put(groups / "cgroup/cpu/cpu.cfs_quota_us", "-1")
    put(groups / "cgroup/cpu/cpu.cfs_period_us", "100000")
    assert machine.available_cores() == 4


def test_memory_is_the_least_of_the_machine_and_the_groups(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MEMINFO", groups / "meminfo")
    assert machine.free_memory() is None
    put(groups / "meminfo", "MemTotal:  64000000 kB\nMemAvailable:   40000000 kB\nHugePages_Total:  0")
    whole = machine.available_memory()
    assert machine.free_memory() == 40_000_000 * 1024
    put(groups / "own", "0::/slurm/job_1/step_0")
    put(groups / "cgroup/slurm/job_1/step_0/memory.max", "max")
    put(groups / "cgroup/slurm/job_1/memory.max", "900000000")
    assert machine.free_memory() == 900_000_000, "the group around the step's own"
    assert machine.available_memory() == min(whole or 900_000_000, 900_000_000)
    put(groups / "cgroup/slurm/job_1/memory.current", "700000000")
    put(groups / "cgroup/slurm/job_1/memory.stat", "anon 300000000\ninactive_file 250000000\nactive_file 150000000")
    assert machine.free_memory() == 600_000_000, "caches of files are given back when memory is asked for"
    put(groups / "cgroup/slurm/job_1/memory.current", "2000000000")
    assert machine.free_memory() == 0


@pytest.mark.parametrize("own", [b"0::/job_\xff", b"no groups", b"0::/../../job", b""])
def test_odd_control_groups_leave_the_rest(groups: Path, own: bytes) -> None:
    put(groups / "own", "")
    (groups / "own").write_bytes(own)
    put(groups / "cgroup/memory.max", "700000000")
    put(groups / "cgroup/memory.stat", "inactive_file 9000")
    put(groups / "cgroup/memory.current", "5000")
    assert machine.available_memory() == 700_000_000
    assert machine.free_memory() == 700_000_000, "never more than all"
    assert machine.available_cores() >= 1


def test_memory_of_control_groups_of_version_1(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MEMINFO", groups / "meminfo")
    put(groups / "own", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/")
    put(groups / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    put(groups / "cgroup/memory/docker/abc/memory.limit_in_bytes", "800000000")
    put(groups / "cgroup/memory/docker/abc/memory.usage_in_bytes", "500000000")
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 100000000\ntotal_inactive_file 50000000"
    put(groups / "cgroup/memory/docker/abc/memory.stat", stat)
    assert machine.free_memory() == 450_000_000 and machine.available_memory() == 800_000_000


def test_gpu_that_was_granted_and_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "CUDA_"))]:
        monkeypatch.delenv(name)
    assert devices.resolve_device("auto").type == "cpu"
    for value in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert devices.resolve_device("auto").type == "cpu"
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(ValueError, match="--device"):
        devices.resolve_device("auto")
    assert devices.resolve_device("cpu").type == "cpu", "it was asked for"


# ------------------------------------------------------------------------------------------- rights and file systems


def test_files_under_umask_0007_in_a_setgid_folder_are_the_groups(slides: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    group = next((group for group in os.getgroups() if group != os.getgid()), 12345 if os.geteuid() == 0 else -1)
    os.chown(shared, -1, group)
    shared.chmod(0o2770)
    before = os.umask(0o007)
    try:
        assert embed(slides, shared / "out").outcome == "done"
    finally:
        os.umask(before)
    found = list((shared / "out").rglob("*"))
    assert len(found) > 15
    for path in found:
        mode, private = path.stat().st_mode, "private" in path.parts
        assert path.stat().st_gid == shared.stat().st_gid, path
        if path.is_dir():
            assert mode & stat.S_ISGID and mode & 0o070 == (0 if private else 0o070), path
        else:
            assert mode & 0o777 == (0o600 if private else 0o660), path


def test_run_needs_no_locks_and_no_home(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    embed(slides, tmp_path / "before")
    for name in ("flock", "lockf", "fcntl"):
        monkeypatch.setattr(fcntl, name, refuse)
    (tmp_path / "file").write_text("no folder")
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "file" / "none"))
    assert embed(slides, tmp_path / "out").outcome == "done"
    assert differences(tmp_path / "before", tmp_path / "out") == []


# ------------------------------------------------------------------------------------------- failing disks


@pytest.fixture(scope="module")
def unbroken(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unbroken")


class FailingDisk:
    """A system call that the disk refuses from its n-th time on, for files in the making alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, code: int, after: int) -> None:
        self.refused = 0
        self._real, self._code, self._left = getattr(os, call), code, after
        monkeypatch.setattr(os, call, self)

    def __call__(self, first: Any, *more: Any, **given: Any) -> Any:
        name = first if not isinstance(first, int) else _name_of(first)
        if ".partial" in str(name):
            self._left -= 1
            if self._left < 0:
                self.refused += 1
                if self._real.__name__ == "close":
                    self._real(first)
                raise OSError(self._code, os.strerror(self._code))
        return self._real(first, *more, **given)


def _name_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are told by /proc")
@pytest.mark.parametrize(
    "code", ["ENOSPC", "EACCES", *(pytest.param(code, marks=pytest.mark.slow) for code in ("EDQUOT", "EROFS"))]
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "close"])
def test_disk_that_refuses_ends_in_words_and_the_next_run_as_if_unbroken(
    call: str, code: str, slides: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (unbroken / "slides.csv").exists():
        embed(slides, unbroken)
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, call, getattr(errno, code), after=9)
        try:
            result = embed(slides, tmp_path)
        except OutputError as error:
            assert "\n" not in str(error) and "could not be written" in str(error)
            assert code != "EACCES" or not error.stops_run, "a refused right ends the run at its own records alone"
        else:
            assert code == "EACCES" and result.outcome == "some slides failed", "only one slide's trouble"
            assert all("could not be written" in row["error"] for row in result.rows if row["status"] == "failed")
        assert disk.refused
    assert not list(tmp_path.rglob("*-*.partial"))
    assert embed(slides, tmp_path).outcome == "done"
    assert differences(unbroken, tmp_path) == []
