"""What a run was: `runs/<time>_<id>.json` for everybody, the command with its paths in `private/` for its owner."""

import dataclasses
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openslide

import gigapath
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.privacy import record_run, redact
from gigapath.files import check_writable, write_json_atomic

RUNS = "runs"
_PACKAGES = (
    *("numpy", "h5py", "opencv-python-headless", "openslide-python", "openslide-bin", "tifffile"),
    *("simplejpeg", "imagecodecs", "pillow", "torch", "timm"),
)


@dataclass
class RunRecord:
    """One run's record: written when it starts, filled in when it ends, never touched by another run.

    Attributes:
        out: the output folder.
        verb: the command, such as "embed".
        options: the resolved options.
        command: the words of the command line after the verb, or () from Python.
        facts: what the run finds out: device, weights, kernels.
        run_id: time (UTC) and a random part.
    """

    out: Path
    verb: str
    options: Mapping[str, Any]
    command: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: f"{_now():%Y%m%dT%H%M%SZ}_{secrets.token_hex(3)}")
    _started: float = field(default_factory=time.monotonic)
    _content: dict[str, Any] = field(default_factory=dict)

    def start(self, entries: Sequence[SlideEntry], *, keep_paths: bool = True) -> None:
        """Write the record of a run that has begun.

        Raises:
            OutputError: the folder can't be written; nothing has been done then.
        """
        check_writable(self.out)
        self._content = {
            "run_id": self.run_id,
            "verb": self.verb,
            "command": ["gigapath", self.verb, *redact(list(self.command))],
            "options": redact(dict(self.options)),
            "slides": len(entries),
            "slides_sha256": _cohort_digest(entries),
            "versions": versions(),
            "started": _now().isoformat(timespec="seconds"),
            "ended": None,
            "outcome": "running",
        }
        owner = {
            "run_id": self.run_id,
            "command": list(self.command),
            "folder": str(Path.cwd()),
            "host": socket.gethostname(),
            "user": _user(),
            "options": dict(self.options),
        }
        record_run(self.out, self.run_id, owner, entries if keep_paths else ())
        self._write()

    def end(self, outcome: str, counts: Mapping[str, int]) -> None:
        """Complete the record.

        Args:
            outcome: "done", "some slides failed", "stopped" or "error".
        """
        self._content.update(
            facts=redact(self.facts),
            ended=_now().isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._started, 3),
            outcome=outcome,
            counts=dict(counts),
        )
        self._write()

    def _write(self) -> None:
        write_json_atomic(self.out / RUNS / f"{self.run_id}.json", self._content)


def versions() -> dict[str, str]:
    """Versions of everything that numbers can depend on; nothing is imported for it."""
    found = {
        "gigapath": gigapath.__version__,
        "implementation": gigapath.__implementation__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "openslide-library": openslide.__library_version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cohort_digest(entries: Sequence[SlideEntry]) -> str:
    """SHA-256 over what the manifest says of the slides, without their paths."""
    private = {"path": None, "original_id": None}
    rows = [{**dataclasses.asdict(entry), **private, "mask": entry.mask is not None} for entry in entries]
    for row in rows:
        del row["problem"]  # follows from the others
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
