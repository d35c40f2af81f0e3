"""The array jobs: run with SLURM's variables and commands that only pretend, signals and requeueing included."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAKE_GIGAPATH = """#!/usr/bin/env bash
echo "$HF_HUB_OFFLINE|$*" >>"$LOG"
if [ -n "${DEAF:-}" ]; then
  echo started >>"$LOG"
  exec sleep 60
fi
stop() { echo "heard $1" >>"$LOG"; sleep 0.3; exit 75; }
trap 'stop USR1' USR1
trap 'stop TERM' TERM
if [ -n "${ENDS_WITH:-}" ]; then exit "$ENDS_WITH"; fi
echo started >>"$LOG"
while :; do sleep 0.05; done
"""
FAKE_SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >>"$LOG"\n'


class Cluster:
    """Fake commands first on the PATH, and what they were told."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.out = str(folder / "out")
        self.result = folder / "out" / "tiles" / "a.h5"  # of an earlier run
        self.result.parent.mkdir(parents=True)
        self.result.touch()
        os.utime(self.result, (1, 1))
        for name, text in {"gigapath": FAKE_GIGAPATH, "scontrol": FAKE_SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "HF_HUB_OFFLINE": "",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_ARRAY_TASK_MAX": "16",
            "SLURM_JOB_ID": "4711",
        }

    def start(self, script: str, *words: str, **variables: str) -> "subprocess.Popen[bytes]":
        command = ["bash", str(ROOT / "scripts" / script), *words]
        return subprocess.Popen(command, env={**self.environment, **variables})

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + 20
        while words not in self.said():
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_array_task_does_its_share_and_gives_the_status_on(cluster: Cluster) -> None:
    assert cluster.start("slurm_tile.sh", "a cohort.csv", "--out", "o", ENDS_WITH="3").wait(20) == 3
    assert cluster.start("slurm_embed.sh", "c.csv", "--out", "o", ENDS_WITH="0", SHARDS="40").wait(20) == 0
    assert cluster.said() == [
        "|tile a cohort.csv --out o --shard 3/16",
        "1|embed --device cuda c.csv --out o --shard 3/40",
    ], "and nothing is put into the queue again"


@pytest.mark.parametrize("script", ["slurm_tile.sh", "slurm_embed.sh"])
def test_signal_before_the_limit_reaches_the_run_and_the_job_is_requeued(cluster: Cluster, script: str) -> None:
    job = cluster.start(script, "c.csv", "--out", cluster.out, GIGAPATH="env gigapath")
    cluster.wait_for("started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 75
    assert cluster.said()[-2:] == ["heard USR1", "scontrol requeue 4711"], "the script waited for the run to end"


@pytest.mark.parametrize("script", ["slurm_tile.sh", "slurm_embed.sh"])
def test_a_run_that_does_not_listen_yet_is_requeued_before_the_limit(cluster: Cluster, script: str) -> None:
    job = cluster.start(script, "c.csv", "--out", cluster.out, DEAF="1")
    cluster.wait_for("started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 128 + signal.SIGUSR1
    assert cluster.said()[-1] == "scontrol requeue 4711"


@pytest.mark.parametrize("script", ["slurm_tile.sh", "slurm_embed.sh"])
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, script: str) -> None:
    job = cluster.start(script, "c.csv", "--out", cluster.out)
    cluster.wait_for("started")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert cluster.said()[-1] == "heard TERM", "the run is told, and nothing is put into the queue again"


@pytest.mark.parametrize("out", ["--out {}", "--out={}"])
def test_tries_that_bring_nothing_before_their_limit_are_bounded(cluster: Cluster, out: str) -> None:
    def limited() -> bool:
        cluster.log.write_text("")
        job = cluster.start("slurm_tile.sh", "c.csv", *out.format(cluster.out).split())
        cluster.wait_for("started")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 75
        return cluster.said()[-1] == "scontrol requeue 4711"

    assert [limited(), limited(), limited()] == [True, True, False]
    assert limited()  # submitted again by hand
    os.utime(cluster.result, (time.time() + 60,) * 2)  # a tile file comes during the next try
    assert [limited(), limited(), limited()] == [True, True, True]


def test_outside_of_slurm_it_is_one_sentence(cluster: Cluster) -> None:
    command = ["bash", str(ROOT / "scripts" / "slurm_tile.sh"), "c.csv", "--out", "o"]
    environment = {**cluster.environment, "SLURM_ARRAY_TASK_ID": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2 and "sbatch" in done.stderr and done.stderr.count("\n") == 1
