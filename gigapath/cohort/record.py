"""What a run leaves of itself: `runs/<time>_<id>.json` for everybody; in `private/`, for its owner, who ran what and
where the slides lie. Names (paths, users, hosts, with `--pseudonymise KEYFILE` ids too) are kept out of all else.
"""

import contextlib
import getpass
import hashlib
import hmac
import importlib.metadata
import json
import os
import platform
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openslide

import gigapath
from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.status import derive
from gigapath.file_names import one_line
from gigapath.files import check_writable, real_path, write_json_atomic, write_text_atomic
from gigapath.tables import csv_text
from gigapath.text import without_name

RUNS = "runs"
_PACKAGES = (
    *("numpy", "h5py", "opencv-python-headless", "openslide-python", "openslide-bin", "tifffile"),
    *("simplejpeg", "imagecodecs", "pillow", "torch", "timm"),
)


@dataclass
class RunRecord:
    """One run's record (`verb` as "embed", resolved `options`, the words of the `command` or () from Python, the
    `facts` that it finds out): written when it starts, filled in when it ends, never touched by another run. `run_id`
    is time (UTC) and a random part."""

    out: Path
    verb: str
    options: Mapping[str, Any]
    command: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: f"{_now():%Y%m%dT%H%M%SZ}_{secrets.token_hex(3)}")
    _started: float = field(default_factory=time.monotonic)
    _content: dict[str, Any] = field(default_factory=dict)

    def start(self, entries: Sequence[SlideEntry], *, keep_paths: bool = True) -> None:
        """Write the record of a run that has begun; OutputError where the folder can't be written: nothing has been
        done then."""
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
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
        with contextlib.suppress(KeyError, OSError):  # a container without an entry for the user
            user = getpass.getuser()
        owner = {
            "run_id": self.run_id,
            "command": list(self.command),
            "folder": str(Path.cwd()),
            "host": socket.gethostname(),
            "user": user,
            "options": dict(self.options),
        }
        record_run(self.out, self.run_id, owner, entries if keep_paths else ())
        self._write()

    def end(self, outcome: str, counts: Mapping[str, int]) -> None:
        """Complete the record with its outcome: "done", "some slides failed", "stopped" or "error"."""
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
    rows = [{**vars(entry), **private, "mask": entry.mask is not None} for entry in entries]
    for row in rows:
        del row["problem"]  # follows from the others
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


PRIVATE = "private"
_PATHS = "paths.csv"
_COLUMNS = ("slide_id", "path", "mpp", "mask", "original_id", "problem")
_SLIDES = "slides"
# An absolute path of two parts or more; what stands before keeps "tiles/s" and addresses of the web whole.
_ABSOLUTE = re.compile(r"(?<![\w.:/<>])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+[^\s:'\",;]*")
_ADDRESS = "--ray-address"  # of a machine, which is nobody's business
_NOT_A_PATH = ("hf_hub:", "hf-hub:", "http://", "https://")


def without_paths(text: str, entry: SlideEntry) -> str:
    """A message about a slide with its id in place of its file name, folders and mask."""
    for path in filter(None, (entry.path, entry.mask)):
        forms = (real_path(path), path.absolute(), path) if os.sep in text else ()  # else no path can be in it
        for form in forms:
            text = text.replace(str(form), entry.slide_id)
        for folder in (form.parent for form in forms):
            if len(folder.parts) > 1:  # "." and "/" would hit every other word
                text = text.replace(str(folder), "<folder>")
        text = text.replace(path.name, entry.slide_id)
    return hide_paths(without_name(text, entry.original_id, entry.slide_id))


def hide_paths(text: str) -> str:
    """A text with "<path>" in place of every absolute path in it."""
    return _ABSOLUTE.sub("<path>", text)


def redact(value: Any) -> Any:
    """An option's value, or a word of the command line, with "<path>" in place of everything that names a file,
    and "<address>" of a machine."""
    if isinstance(value, dict):
        return {name: "<address>" if item and name == "ray_address" else redact(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        before = ["", *value]
        return ["<address>" if word == _ADDRESS else redact(item) for word, item in zip(before, value, strict=False)]
    if not isinstance(value, str) or value.startswith(_NOT_A_PATH):
        return value
    if value.startswith("--") and "=" in value:
        name, _, rest = value.partition("=")
        return f"{name}={'<address>' if name == _ADDRESS else redact(rest)}"
    named = value.removeprefix("timm:")
    if named != value and not Path(named).exists():
        return value
    names_file = os.sep in value or "\\" in value or value in (".", "..")
    return "<path>" if names_file or Path(value).exists() else value


def write_private(out: Path, name: str, text: str) -> None:
    """Write `private/<name>`; only its owner may read it, or look into the folder."""
    folder = out / PRIVATE
    with contextlib.suppress(OSError):  # writing the file says what is wrong
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(folder.stat().st_mode & ~0o077)
    write_text_atomic(folder / name, text, mode=0o600)


def record_run(out: Path, run_id: str, owner: Mapping[str, Any], entries: Iterable[SlideEntry] = ()) -> None:
    """Write `private/<run_id>.json`: who ran what, and where the slides lie that no earlier run's file has there.

    Every run writes a file of its own, so that two at once lose nothing; `private/paths.csv` is derived from all of
    them, for people.
    """
    known = {entry.slide_id: _row(entry) for entry in recorded_paths(out)}
    rows = (_row(replace(each, path=real_path(each.path), mask=each.mask and real_path(each.mask))) for each in entries)
    new = [row for row in rows if known.get(row[0]) != row]
    write_private(out, f"{run_id}.json", json.dumps({**owner, _SLIDES: new}, indent=2, default=str) + "\n")

    def write() -> None:
        rows = (_row(entry) for entry in recorded_paths(out))
        shown = (["" if cell is None else one_line(str(cell)) for cell in row] for row in rows)
        write_private(out, _PATHS, csv_text([_COLUMNS, *shown]))

    if new or not (out / PRIVATE / _PATHS).exists():
        derive(write, lambda: sorted(path.name for path in (out / PRIVATE).glob("*.json")))


def recorded_paths(out: Path) -> list[SlideEntry]:
    """The slides that earlier runs on this folder saw, each where the last of them found it; empty where there is no
    record that may be read."""
    found: dict[str, SlideEntry] = {}
    for file in sorted((out / PRIVATE).glob("*.json")):  # by time: a run's id begins with it
        # Another user's, or no record of ours.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            rows = json.loads(file.read_text(encoding="utf-8")).get(_SLIDES, [])
            for slide_id, path, mpp, mask, original_id, *problem in rows:  # the problem is younger
                outline = None if mask is None else Path(mask)
                names = {"original_id": original_id, "problem": "".join(problem)}
                found[slide_id] = SlideEntry(slide_id, Path(path), mpp, outline, **names)
    return list(found.values())


def _row(entry: SlideEntry) -> list[Any]:
    mask = None if entry.mask is None else str(entry.mask)
    return [entry.slide_id, str(entry.path), entry.mpp, mask, entry.original_id, entry.problem]


# Of the manifest's other columns these are carried through as they are; free text could name somebody.
KEPT_COLUMNS = ("site", "stain")
_PATIENT = "patient_id"
_KEY_BYTES = 16
_DIGITS = 20  # hex: a collision among a million slides has the odds of one in a trillion


def read_key(path: str | Path) -> bytes:
    """The key of pseudonyms, from a file that holds nothing else; FileNotFoundError, or ValueError for one too short to
    keep a secret."""
    path = Path(path)
    way = "Make one with `head -c 32 /dev/urandom | base64 > KEYFILE`, and keep it apart from the results"
    if not path.is_file():
        raise FileNotFoundError(f"--pseudonymise: expected a file with a key, got no {path.name!r}. {way}.")
    key = path.read_bytes().strip()
    if len(key) < _KEY_BYTES:
        raise ValueError(f"--pseudonymise: expected a key of at least {_KEY_BYTES} bytes, got {len(key)}. {way}.")
    return key


def pseudonym(key: bytes, kind: str, name: str) -> str:
    """The pseudonym of a name: HMAC-SHA256 (RFC 2104), cut; the same for the same key, kind and name."""
    return hmac.new(key, f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()[:_DIGITS]


def pseudonymised(entries: Sequence[SlideEntry], key: bytes) -> list[SlideEntry]:
    """The slides under pseudonyms, patients too. Every other column but `KEPT_COLUMNS` is left out."""
    found = []
    for entry in entries:
        columns = {name: entry.columns[name] for name in KEPT_COLUMNS if name in entry.columns}
        if entry.columns.get(_PATIENT):
            columns[_PATIENT] = pseudonym(key, "patient", entry.columns[_PATIENT])
        slide_id = pseudonym(key, "slide", entry.slide_id)
        found.append(replace(entry, slide_id=slide_id, original_id=entry.slide_id, columns=columns))
    return found
