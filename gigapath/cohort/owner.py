"""Who works on a folder: runs with the same options share it, one with others keeps off while they live.

Each run leaves a mark in every folder that it writes, `.run-<options>-<machine>-<process>-<random>`, and then looks for
marks of other options: of two runs that begin in the same instant at least one sees the other. No locks are needed, and
a client of a network file system that has just made a file in a folder reads that folder anew.
"""

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gigapath.cohort.reuse import differences, digest
from gigapath.files import is_running_here, open_own, output_error, writer_name

_MARK = re.compile(r"\.run-([0-9a-f]{16})-([0-9a-f]{8}-\d+)-[0-9a-f]{6}")
_BEAT_SECONDS = 20.0
# A mark that nobody has touched for so long is a dead run's, or that of a machine that sleeps.
_GONE_SECONDS = 300.0
_TRIES = 4


class FolderTaken(ValueError):
    """Another run with other options works on the folder."""

    stops_run = True


class Ownership:
    """The folders that a run writes and what its results there depend on; use as a context manager.

    Args:
        folders: folder -> the options of its results, as JSON values.

    Raises (on entry):
        FolderTaken: a run with other options is at work.
        OutputError: a folder can't be written.
    """

    def __init__(self, folders: Mapping[Path, Mapping[str, Any]]) -> None:
        self._folders = dict(folders)
        self._marks: dict[Path, Path] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ownership", daemon=True)

    def __enter__(self) -> "Ownership":
        for left in reversed(range(_TRIES)):
            try:
                for folder, options in self._folders.items():
                    self._marks[folder] = _mark(folder, options)
                for folder in self._folders:
                    self._check_alone(folder)
                break
            except FolderTaken:  # two that began at once have both seen each other, and one of them comes back first
                self._remove()
                if not left:
                    raise
                time.sleep(secrets.randbelow(1000) / 1000)
            except BaseException:
                self._remove()
                raise
        if self._marks:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._remove()

    def check(self) -> None:
        """Show that this run lives.

        Raises:
            FolderTaken: another run took it for dead, and the folder for itself.
        """
        for folder, mark in self._marks.items():
            try:
                os.utime(mark)
            except FileNotFoundError as error:
                raise FolderTaken(
                    f"{folder.name}: a run with other options started there while this one was suspended. Check what "
                    "is there, then run the same command again."
                ) from error
            except OSError:  # the next write says so
                continue

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(FolderTaken):  # `check` says so where the run hears it
                self.check()

    def _check_alone(self, folder: Path) -> None:
        """Look for marks of other options, and remove those of runs that are gone."""
        mine = self._marks[folder]
        now = mine.stat().st_mtime  # by the clock of the file system
        for path in folder.glob(".run-*"):
            match = _MARK.fullmatch(path.name)
            if match is None or path == mine:
                continue
            with contextlib.suppress(FileNotFoundError):
                running = is_running_here(match[2])
                if running is False or now - path.stat().st_mtime > _GONE_SECONDS:
                    path.unlink()
                elif match[1] != digest(self._folders[folder]):
                    raise FolderTaken(
                        f"{folder.name}: a run with other options is active there"
                        f"{_other(path, self._folders[folder])}. Wait until it ends, use the same options, or use "
                        "another --out."
                    )

    def _remove(self) -> None:
        for folder, mark in self._marks.items():
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # of a run that came to nothing
        self._marks.clear()


def _mark(folder: Path, options: Mapping[str, Any]) -> Path:
    path = folder / f".run-{digest(options)}-{writer_name()}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
            json.dump(dict(options), file)
    except OSError as error:
        raise output_error(path, error) from error
    return path


def _other(mark: Path, options: Mapping[str, Any]) -> str:
    """What the options of another run's mark are beside these, in brackets; nothing where it can't be read."""
    try:
        with os.fdopen(open_own(mark, os.O_RDONLY), encoding="utf-8") as file:
            found = differences(json.load(file), json.loads(json.dumps(dict(options))))
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({'; '.join(found[:3])})" if found else ""
