"""`diagnose`: everything that is looked at, in order; what one look stumbles over is a finding too."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gigapath.doctor.disk import check_disk
from gigapath.doctor.findings import Diagnosis
from gigapath.doctor.hub import check_token, check_weights, without_token
from gigapath.doctor.machine import check_devices, check_kernels, check_machine, check_versions
from gigapath.doctor.selftest import check_whole_way
from gigapath.doctor.slides import check_codecs, check_library


def diagnose(*, offline: bool = False) -> Iterator[Diagnosis]:
    """Look at the machine and the installation, and yield what is found, each as soon as it is known.

    The user's home is written `~`, and no token is in it; other paths are as they are.

    Args:
        offline: do not ask the model hub.
    """
    looks: list[tuple[str, Callable[[], list[Diagnosis]]]] = [
        ("versions", check_versions),
        ("machine", check_machine),
        ("devices", check_devices),
        ("attention", check_kernels),
        ("slides", check_library),
        ("slides", check_codecs),
        ("hub", check_token),
        ("hub", lambda: check_weights(offline=offline)),
        ("disk", check_disk),
        ("self-test", check_whole_way),
    ]
    for area, look in looks:
        try:
            found = look()
        except Exception as error:  # a doctor that dies of what it finds is no use
            if os.environ.get("GIGAPATH_DEBUG"):
                raise
            said = " ".join(str(error).split())[:200]
            found = [Diagnosis(area, "look", "wrong", f"could not be looked at ({type(error).__name__}: {said})")]
        for diagnosis in found:
            yield _discreet(diagnosis)


def _discreet(diagnosis: Diagnosis) -> Diagnosis:
    return dataclasses.replace(
        diagnosis, text=_said(diagnosis.text), mend=_said(diagnosis.mend), facts=_all_said(diagnosis.facts)
    )


def _all_said(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _all_said(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_all_said(item) for item in value]
    return _said(value) if isinstance(value, str) else value


def _said(text: str) -> str:
    home = str(Path.home())
    text = without_token(text)
    return text.replace(home, "~") if len(home) > 1 else text
