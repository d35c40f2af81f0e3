"""`gigapath doctor`: finds what is broken, says the mend, and never says the token."""

import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from gigapath.cli.main import main
from gigapath.doctor import diagnose as run
from gigapath.doctor import selftest
from gigapath.doctor.diagnose import diagnose
from gigapath.doctor.selftest import paint, write_slide
from gigapath.findings import NOTE, OK, WRONG, Finding
from gigapath.preprocessing.slide import open_slide

CANARY = "hf_canaryCANARYcanary0123456789"


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    """One whole run, offline."""
    return {f"{d.area}/{d.name}": d for d in diagnose(offline=True)}


def test_a_run_looks_at_everything_and_the_self_test_passes(found: dict[str, Finding]) -> None:
    assert {d.area for d in found.values()} == {
        "versions", "machine", "devices", "attention", "slides", "hub", "disk", "self-test",
    }  # fmt: skip
    assert {d.state for d in found.values()} <= {OK, NOTE, WRONG}
    assert found["self-test/whole-way"].state == "ok", found["self-test/whole-way"]
    assert found["slides/openslide"].facts["path"] and found["slides/codec-none"].state == "ok"
    assert all(d.advice for d in found.values() if d.state == "wrong")
    assert {d.facts["kernel"] for d in found.values() if d.area == "attention"} <= {"cpu-flash", "plain"}
    assert all("\n" not in d.text and "\n" not in d.advice for d in found.values())


def test_the_users_home_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path(__file__).parent.parent.parent)
    said = json.dumps(run.discreet({"a": [str(Path(__file__)), 3]}))
    assert str(Path(__file__).parent.parent.parent) not in said and "~" in said


def test_no_token_is_ever_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(url: str, **options: Any) -> None:
        raise RuntimeError(f"401 for Bearer {CANARY} at {url}")

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(run, "check_whole_way", lambda: [])
    monkeypatch.setattr(run, "check_kernels", lambda: [Finding("x", "x", state=OK, facts=[CANARY])])
    for words in (["doctor"], ["doctor", "--json"]):
        main(words)
        said = "".join(capsys.readouterr())
        assert CANARY not in said and "<token>" in said
    monkeypatch.setenv("HF_TOKEN", f' "{CANARY}"\n')
    assert main(["doctor", "--json"]) == 3
    said = capsys.readouterr().out
    assert CANARY not in said and "has not the form of a token" in said


def test_access_is_told_from_no_access_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **b: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **options: object())
    assert [d.facts for d in run.check_weights(offline=False)] == ["accessible", "accessible"]
    monkeypatch.setattr(run, "_SECONDS", -0.95)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **options: time.sleep(2))
    assert all("no answer in" in d.text for d in run.check_weights(offline=False))
    assert [d.facts for d in run.check_weights(offline=True)] == ["not asked", "not asked"]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **b: "a file")
    assert [d.state for d in run.check_weights(offline=True)] == ["ok", "ok"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EACCES])
def test_folders_that_take_nothing_are_found(code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none" / "hub"))

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    cache, *_ = run.check_disk()
    assert cache.state == "wrong" and os.strerror(code) in cache.text and "HF_HOME" in cache.advice
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "none" / "hub" / "models").mkdir(parents=True)
    cache, *_ = run.check_disk()
    assert cache.state == "note" and "what is in it serves" in cache.text


def test_little_room_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_ROOM_FOR_WEIGHTS", float("inf"))
    cache, *_ = run.check_disk()
    assert cache.state == "note" and "GB free" in cache.text and "6 GB" in cache.advice


def test_a_driver_without_a_gpu_in_sight_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run.torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(run.shutil, "which", lambda name: "somewhere")
    (device,) = run.check_devices()
    assert device.state == "wrong" and "NVIDIA driver" in device.text and device.advice


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 6), ["sm_75", "sm_80"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_80", "compute_90"], True),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((10, 0), ["compute_90a"], False),
        ((9, 0), ["gfx90a"], True),
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_wrong(
    capability: tuple[int, int], built_for: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = SimpleNamespace(name="A GPU", total_memory=16e9, major=capability[0], minor=capability[1])
    cuda = run.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(cuda, "get_arch_list", lambda: built_for)
    (device,) = run.check_devices()
    assert (device.state == "ok") is runs and "A GPU" in device.text


def test_a_refused_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_fault", lambda *a: "the short case gives dq wrong by 1")
    kernels = run.check_kernels()
    assert all(d.state == "note" and "dq wrong by 1" in d.text and d.facts["kernel"] == "plain" for d in kernels)


def test_a_wrong_number_a_broken_step_and_a_broken_codec_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "whole_way", lambda device: (selftest.TILES, np.zeros(8, np.float32)))
    assert "differs from the stored one" in selftest.check_whole_way()[0].text
    monkeypatch.setattr(selftest, "whole_way", lambda device: (3, np.asarray(selftest.VECTOR, np.float32)))
    assert "3 tiles were found" in selftest.check_whole_way()[0].text

    def fail(device: torch.device) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(selftest, "whole_way", fail)
    assert "failed with RuntimeError: no such operator" in selftest.check_whole_way()[0].text
    monkeypatch.setattr(selftest, "_LARGEST_MEAN_ERROR", -1.0)
    assert {d.state for d in selftest.check_codecs()} <= {"wrong", "note"}


def test_what_a_look_stumbles_over_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Finding]:
        raise KeyError("x")

    for name in ("check_versions", "check_kernels", "check_whole_way", "check_codecs"):
        monkeypatch.setattr(run, name, fail)
    found = list(diagnose(offline=True))
    assert sum("could not be checked (KeyError" in d.text for d in found) == 4


@pytest.mark.parametrize("compression", ["none", "jpeg", "jpeg2000"])
def test_the_made_slide_is_one_for_openslide(compression: str, tmp_path: Path) -> None:
    image = paint(700, 530)
    path = tmp_path / "made.svs"
    write_slide(path, image, mpp=0.25, compression=compression)
    with open_slide(path) as slide:
        assert slide.dimensions == (700, 530) and slide.mpp.mean == pytest.approx(0.25, rel=1e-4)
        assert slide.vendor == ("aperio" if compression == "jpeg2000" else "generic-tiff")
        pixels = slide.read(0, 0, 0, 700, 530)
    assert np.abs(pixels.astype(int) - image).max() <= (40 if compression == "jpeg" else 0)
