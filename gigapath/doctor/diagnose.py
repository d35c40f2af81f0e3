"""`diagnose`: everything that is looked at on this machine, in order; an error while looking is a finding too."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gigapath.doctor.installation import check_devices, check_disk, check_kernels, check_machine, check_versions
from gigapath.doctor.selftest import check_codecs, check_library, check_whole_way
from gigapath.doctor.weights import check_token, check_weights, without_token
from gigapath.findings import Finding


def diagnose(*, offline: bool = False) -> Iterator[Finding]:
    """Look at the machine and the installation, and yield what is found, each as soon as it is known.

    The user's home is written `~`, and no token is in it; other paths are as they are.

    Args:
        offline: do not ask the model hub.
    """
    looks: list[tuple[str, Callable[[], list[Finding]]]] = [
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
            message = " ".join(str(error).split())[:200]
            found = [Finding("look", f"could not be looked at ({type(error).__name__}: {message})")]
        for finding in found:
            yield Finding(**discreet({**dataclasses.asdict(finding), "area": area}))


def discreet(value: Any) -> Any:
    """JSON values with `~` in place of the user's home, and no token."""
    if isinstance(value, dict):
        return {name: discreet(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [discreet(item) for item in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return without_token(value).replace(home, "~") if len(home) > 1 else without_token(value)
