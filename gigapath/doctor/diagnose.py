"""`diagnose`: everything that is looked at on this machine, in order; an error while looking is a finding too. Here the
model hub: token, access to the released pairs, the cache. The token itself is never shown."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants

from gigapath.doctor.installation import check_devices, check_disk, check_kernels, check_machine, check_versions
from gigapath.doctor.selftest import check_codecs, check_library, check_whole_way
from gigapath.findings import NOTE, OK, Finding
from gigapath.hub import ask_in_time, hub_error
from gigapath.releases import RELEASES, SLIDE_FILE, TILE_FILE

# The hub gets this long to answer; the resolver of names may take longer than any time limit of the client.
_SECONDS = 4.0
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def diagnose(*, offline: bool = False) -> Iterator[Finding]:
    """Look at the machine and the installation, and yield what is found, each as soon as it is known.

    The user's home is written `~`, and no token is in it; other paths are as they are.
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
    return _without_token(value).replace(home, "~") if len(home) > 1 else _without_token(value)


def check_token() -> list[Finding]:
    """Whether a token is set, where, and whether it has the form of one."""
    stated = next(((name, os.environ[name]) for name in _TOKEN_VARIABLES if os.environ.get(name)), None)
    if stated is not None:
        name, value = stated
        if value != value.strip() or any(mark in value for mark in "\"' \n") or not value.startswith("hf_"):
            advice = f"set {name} anew, without quotes, spaces or line ends; tokens begin with hf_."
            return [Finding("token", f"{name} is set, but has not the form of a token", advice)]
        return [Finding("token", f"a token is set in {name}", state=OK)]
    if huggingface_hub.get_token():
        return [Finding("token", "a token is in the hub's token file", state=OK)]
    advice = "make a read token on huggingface.co and export HF_TOKEN, once you were given access to the weights."
    return [Finding("token", "no token is set: the gated weights can't be fetched", advice, NOTE)]


def check_weights(*, offline: bool) -> list[Finding]:
    """For each released pair: in the cache, or to be had from the hub."""
    found = []
    for release in RELEASES.values():
        cached = [
            file
            for file in (TILE_FILE, SLIDE_FILE)
            if isinstance(huggingface_hub.try_to_load_from_cache(release.repo, file, revision=release.revision), str)
            or isinstance(huggingface_hub.try_to_load_from_cache(release.repo, file), str)
        ]
        name = f"weights-{release.name}"
        if len(cached) == 2:
            found.append(Finding(name, f"{release.name}: both files are in the cache", state=OK, facts="cached"))
            continue
        if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "--offline" if offline else "HF_HUB_OFFLINE is set"
            text = f"{release.name}: {len(cached)} of 2 files in the cache, the hub was not asked ({why})"
            advice = f"fetch them where there is a network: gigapath download {release.name}."
            found.append(Finding(name, text, advice, NOTE, "not asked"))
            continue
        url = huggingface_hub.hf_hub_url(release.repo, SLIDE_FILE, revision=release.revision)
        error = ask_in_time(url, _SECONDS)
        if error is None:
            text = f"{release.name}: not in the cache; the hub gives access"
            found.append(Finding(name, text, f"gigapath download {release.name}.", NOTE, "accessible"))
            continue
        late, folder = isinstance(error, TimeoutError), Path(huggingface_hub.constants.HF_HUB_CACHE)
        why = f"no answer in {_SECONDS:g} s" if late else str(hub_error(error, release.repo, SLIDE_FILE, folder))
        text = f"{release.name}: not in the cache, and not available: {why}".rstrip(".")
        advice = "look at the network and its proxy (HTTPS_PROXY), or at the access that the page of the model grants."
        found.append(Finding(name, text, advice, NOTE, "no access"))
    return found


def _without_token(text: str) -> str:
    """A text with "<token>" where it would say a token of the user's."""
    known = [os.environ.get(name, "") for name in _TOKEN_VARIABLES]
    with contextlib.suppress(OSError):  # its file can't be read
        known.append(huggingface_hub.get_token() or "")
    for token in known:
        for form in (token, token.strip(), token.strip().strip("\"'")):
            if len(form) > 3:
                text = text.replace(form, "<token>")
    return text
