"""Folders that are written to: the hub's cache, the temporary folder, the working folder; room in them."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import huggingface_hub.constants

from gigapath.doctor.findings import Diagnosis

# The original pair takes 4.9 GB, and a download lies beside it until it is whole.
_ROOM_FOR_WEIGHTS = 6e9
_LITTLE_ROOM = 1e9
# Enough that a quota which is nearly used up shows.
_PROBE_BYTES = 1 << 20


def check_disk() -> list[Diagnosis]:
    """Write into each folder, and count its room."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return [
        _folder("cache", "the hub's cache", cache, _ROOM_FOR_WEIGHTS, "export HF_HOME to a folder with room for 6 GB."),
        _folder(
            "temporary", "the temporary folder", Path(tempfile.gettempdir()), _LITTLE_ROOM, "export TMPDIR elsewhere."
        ),
        _folder("here", "the working folder", Path.cwd(), _LITTLE_ROOM, "write results elsewhere: --out."),
    ]


def _folder(name: str, what: str, path: Path, room: float, mend: str) -> Diagnosis:
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    fault = write_fault(there)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = 0
    facts = {"path": str(path), "free": free, "writable": fault is None}
    if fault is not None:
        if name == "cache" and path.is_dir() and any(path.iterdir()):
            text = f"{what} {path} can't be written ({fault}); what is in it serves"
            return Diagnosis("disk", name, "note", text, mend, facts)
        return Diagnosis("disk", name, "wrong" if name != "here" else "note", f"{what} {path}: {fault}", mend, facts)
    text = f"{what} {path}: writable, {free / 1e9:.1f} GB free"
    if free < room:
        return Diagnosis("disk", name, "note", text, mend, facts)
    return Diagnosis("disk", name, "ok", text, facts=facts)


def write_fault(folder: Path) -> str | None:
    """Why a file of a megabyte can't be written into a folder, in words; None where it can."""
    path = folder / f".gigapath-{secrets.token_hex(4)}"
    words = {
        errno.EROFS: "it is read-only",
        errno.EACCES: "no permission to write",
        errno.EPERM: "no permission to write",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
    }
    try:
        with path.open("xb") as file:
            file.write(os.urandom(_PROBE_BYTES))  # a file system that packs zeros would not count them
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return words.get(error.errno or 0, error.strerror or str(error))
    finally:
        with contextlib.suppress(OSError):  # the folder itself refuses; the fault above says so
            path.unlink(missing_ok=True)
    return None
