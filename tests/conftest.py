"""Fixtures that every test can ask for, and what many read of a run."""

import csv
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest

from gigapath.progress import Progress

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():  # no GPU: Triton, once imported, interprets its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden numbers."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real slides and tiles beside the checkout (or in $GIGAPATH_SHARED); tests that ask for them are skipped
    where they are absent."""
    folder = Path(os.environ.get("GIGAPATH_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("real slides are not beside this checkout")
    return folder


def table(out: Path) -> dict[str, dict[str, str]]:
    """slide id -> its row of a run's slides.csv."""
    with (out / "slides.csv").open(newline="", encoding="utf-8") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


@pytest.fixture(autouse=True)
def no_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine no test finds lines on its standard error that say how long it took."""
    if not importlib.util.find_spec("cyclopts"):
        return  # a GPU's machine that has torch, and not all that the command line needs
    monkeypatch.setattr("gigapath.cli.main.SILENT_SECONDS", 3600.0)
    monkeypatch.setattr("gigapath.cli.progress.SILENT_SECONDS", 3600.0)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiling draws no previews and no contact sheet."""
    monkeypatch.setattr("gigapath.embedding.tiling.preview_picture", lambda _, overview: overview)
    monkeypatch.setattr("gigapath.embedding.tiling.write_preview", lambda *_, **__: None)
    monkeypatch.setattr("gigapath.preprocessing.preview.contact_sheet", lambda *_, **__: None)


@pytest.fixture
def summary_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's writer, which writes its (name, value, step) as JSON into a file that names the machine."""

    class Writer:
        def __init__(self, folder: str) -> None:
            self.lines: list[tuple[str, float, int]] = []
            self.path = Path(folder) / "events.out.tfevents.1700000000.the-machine.42.0"

        def __enter__(self) -> "Writer":
            return self

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.lines.append((name, value, step))

        def __exit__(self, *error: object) -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.lines))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)


class Lines(Progress):
    """Keeps the lines and the steps of long work."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def step(self, what: str, done: int, total: int) -> None:
        self.steps.append((what, done, total))
