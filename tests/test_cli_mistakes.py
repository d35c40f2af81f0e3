"""Mistakes on the command line are told by their option, before torch or timm is imported."""

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gigapath import machine
from gigapath.machine import check_device
from gigapath.releases import check_encoder

# command -> what the sentence names; exit status 2 where the words themselves are off, else 1
MISTAKES = {
    "download uni": "uni",
    "doctor --verify --weights nowhere": "--weights",
    "plan a.svs --tile-encoder uni": "--tile-encoder",
    "tile a.svs --out o --config nowhere.yaml": "--config",
    "tile a.svs --out o --tissue otsuu": "--tissue",
    "tile a.svs --out o --tile-size 3": "--tile-size",
    "embed a.svs --out o --tile-encoder uni": "--tile-encoder",
    "embed a.svs --out o --tile-encoder standin --slide-encoder titan": "--slide-encoder",
    "embed a.svs --out o --tile-encoder standin --device cuda": "--device",
    "embed a.svs --out o --tile-encoder standin --devices cuda:0,cuda:1": "--devices",
    "embed a.svs.gz --out o --tile-encoder standin": "gunzip",
    "embed nothing --out o --tile-encoder standin": "SLIDES",
    "embed empty --out o --tile-encoder standin": "empty",
    "embed --out o --tile-encoder standin": "SLIDES",
    "embed a.svs --out o --tile-encoder standin --tiles nowhere": "--tiles",
    "embed a.svs --out o --hlp": "unknown option --hlp; did you mean --help?",
    "slide-embed empty --out o": "empty",
    "slide-embed a.h5 --out o --slide-encoder titan": "--slide-encoder",
    "slide-embed a.h5 --out o --embedding nope": "embedding",
    "status nowhere": "nowhere",
    "check a.h5 --slides nowhere": "--slides",
    "convert nowhere --to clam --out o": "nowhere",
    "convert nowhere --to t.csv": "nowhere",
    "map empty --out o": "empty",
    "map a.h5 --out o --kind gradient --checkpoint nowhere": "--checkpoint",
    "report nowhere": "nowhere",
    "report empty --methods --to o": "--methods",
    "report empty --json": "--json",
    "plan a.svs --out o": "--pilot",
    "remove x nowhere": "nowhere",
    "embed-tiles empty --out o.txt --tile-encoder standin": "--out",
    "embed-tiles empty --out o.h5 --tile-encoder uni": "--tile-encoder",
    "probe empty --labels none.csv --out o": "--labels",
    "probe empty --labels labels.csv --out o --device gpu": "--device",
    "pretrain empty --out o": "empty",
    "pretrain feats --out o --init none.pth": "--init",
    "pretrain feats --out o --patients none.csv": "--patients",
    "pretrain feats --out o --mask-ratio 1": "--mask-ratio",
    "init-task none.csv": "none.csv",
    "finetune --task panda --features feats --labels none.csv --out o": "--labels",
    "finetune --task panda --features empty --labels labels.csv --out o": "empty",
    "finetune --task panda --features feats --labels labels.csv --out o": "labels.csv",
    "finetune --task nothing --features feats --labels labels.csv --out o": "--task",
    "finetune --task panda --features feats --labels labels.csv --out o --folds 2": "--folds",
    "finetune --task panda --features feats --labels labels.csv --out o --pretrained none.pth": "--pretrained",
    "predict nowhere feats --labels labels.csv --out o": "CHECKPOINT",
    "predict nowhere feats": "CHECKPOINT",
}

RUN_ALL = """
import contextlib, io, json, sys
from gigapath.cli.main import main

found = {}
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(words.split())
    found[words] = status, said.getvalue(), sorted({"torch", "timm"} & set(sys.modules))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """command -> (exit status, standard error, heavy libraries so far), all in one process without a GPU."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "feats"):
        (folder / name).mkdir()
    for name in ("a.svs", "a.h5", "feats/a.h5"):
        (folder / name).write_text("no slide")
    (folder / "labels.csv").write_text("name,grade\na,1\n")
    ran = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        cwd=folder,
        input=json.dumps(list(MISTAKES)),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert not (folder / "o").exists()
    return {words: tuple(result) for words, result in json.loads(ran.stdout).items()}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_before_torch_is_imported(words: str, told: dict[str, tuple[int, str, list[str]]]) -> None:
    status, said, heavy = told[words]
    assert status in (1, 2) and said.count("\n") == 1, said
    assert said.startswith(f"gigapath {words.split()[0]}: ") and MISTAKES[words] in said
    assert heavy == []


def test_a_device_is_refused_only_where_it_certainly_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "cpu"):
        check_device(name)
    with pytest.raises(ValueError, match="--devices"):
        check_device("gpu", "--devices")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ValueError, match="CUDA"):
        check_device("cuda:0")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    check_device("mps")


class Library:
    """NVML as a machine with two GPUs has it, or with `status` 1 one that can't say."""

    def __init__(self, status: int) -> None:
        self.status = status

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0


@pytest.mark.parametrize(("status", "index", "refused"), [(0, 1, False), (0, 2, True), (1, 2, False)])
def test_gpus_are_counted_by_the_driver(
    status: int, index: int, refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(status))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="finds 2 GPUs") if refused else contextlib.nullcontext():
        check_device(f"cuda:{index}")


def test_names_of_encoders_and_paths_of_checkpoints_pass(tmp_path: Path) -> None:
    for kind, names in {"tile": ("gigapath", "standin", "timm:x", "hf_hub:a/b"), "slide": ("mean", "none")}.items():
        for name in (*names, str(tmp_path)):
            check_encoder(kind, name)
    with pytest.raises(ValueError, match="gigapath-flash, standin, timm:NAME"):
        check_encoder("tile", "uni")
