"""A stage of the work on slides: what its result for a slide depends on, how it is made, when one that is there still
holds, and who works on its folder. The loop over a cohort (`gigapath.cohort.run`) knows no more of it.

Runs with the same options share a folder, one with others keeps off while they live: each run leaves a mark in every
folder that it writes, `.run-<options>-<machine>-<process>-<random>`, and then looks for marks of other options. Of two
runs that begin in the same instant at least one sees the other; no locks are needed, and a client of a network file
system that has just made a file in a folder reads that folder anew.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigapath.cohort.status import Status, read_status, read_statuses
from gigapath.features import FeatureFileError
from gigapath.features.h5 import is_complete, open_h5, read_attr
from gigapath.files import folder_error, is_running_here, open_own, writer_name
from gigapath.options import KeepOptions
from gigapath.text import slides_in_words

if TYPE_CHECKING:
    from gigapath.cohort.manifest import SlideEntry


@dataclass(frozen=True)
class Outcome:
    """What a stage found out about a slide; becomes its status.

    `since` says when (time.monotonic) work on it began, where that was before the attempt; `files` names what it wrote,
    where that is not the one `<slide_id>.h5`.
    """

    status: str = "done"
    tiles: int = 0
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    since: float | None = None
    files: tuple[str, ...] = ()


class Stage:
    """One step (`name`: "tiles", "features" or "slides") from a slide to its embedding; its results are files
    `<slide_id>.h5` in a `folder` of its own; `options` say what becomes of results that are there."""

    name: str
    folder: Path
    options: KeepOptions

    def identity(self, entry: "SlideEntry") -> dict[str, Any]:
        """Everything that a slide's result depends on: options, encoders, what the stage before it made. OSError or
        ValueError where it can't be found out; `make` fails of the same."""
        raise NotImplementedError

    def make(self, entry: "SlideEntry", identity: Mapping[str, Any]) -> Outcome:
        """Make a slide's result of this identity and write it; an error is the slide's, unless it `stops_run`."""
        raise NotImplementedError

    def path(self, entry: "SlideEntry") -> Path:
        """Where a slide's result lies."""
        return self.folder / f"{entry.slide_id}.h5"

    def done(self, entry: "SlideEntry") -> Status | None:
        """The status of a result that is there and equals what this run would make, or None."""
        if self.options.overwrites(self.name):
            return None
        try:
            identity = self.identity(entry)
        except (OSError, ValueError):  # `make` says so
            return None
        return finished(self.folder, entry.slide_id, identity, allow_mixed=self.options.allow_mixed)

    def _made_with(
        self, shared: Mapping[str, Any], own: Mapping[str, Any], cohort: Collection[str], **more: Any
    ) -> "StageOptions":
        """What the results of a run in the stage's folder are made with, by the stage's options."""
        overwrite, allow_mixed = self.options.overwrites(self.name), self.options.allow_mixed
        return StageOptions(self.folder, shared, own, cohort, overwrite, allow_mixed, **more)

    def digest(self, entry: "SlideEntry") -> str:
        """Names a slide's result, for the identity of the stage that follows; ValueError where there is none."""
        status = read_status(self.folder, entry.slide_id)
        if status is None or not status.finished:
            raise ValueError(f"slide {entry.slide_id!r}: expected its {self.name}, got none.")
        return status.digest


# What must be one within a folder, or the results can't be compared with each other.
# `fast_transform` stands in folders of version 0.1.0 that were read by approximations, which are no more.
NUMERICS = ("weights_sha256", "precision", "device", "batch_size", "reader", "fast_transform", "numerics_version")
# Of these, and whatever else an identity names, those that are no option by their name.
_NO_OPTIONS = {
    *("reader", "fast_transform", "numerics_version", "transform", "slide_bytes", "tiles", "features", "form"),
    *("weights_sha256", "encoder", "slide_encoder"),
}


def digest(identity: Mapping[str, Any]) -> str:
    """A short name for an identity: what a result's file records of itself, and a later stage of an earlier one."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finished(folder: Path, slide_id: str, identity: Mapping[str, Any], *, allow_mixed: bool = False) -> Status | None:
    """The status of a finished result that equals what this run would compute, or None.

    The result's own file is opened and asked for its identity: a status beside a file that is missing, cut off or
    made by another run, which was killed before it wrote its status, counts for nothing.
    """
    status = read_status(folder, slide_id)
    if status is None or not status.finished:
        return None
    ignored = NUMERICS if allow_mixed else ()
    if _without(status.identity, ignored) != _without(identity, ignored):
        return None
    return status if holds(folder, status) else None


def holds(folder: Path, status: Status) -> bool:
    """Whether the files of a finished result are there, whole, and those that its status is about."""
    if status.stage == "slides" and status.status == "no_tissue":
        return True
    pieces = str(status.facts.get("section_numbers", "")).split()
    names = [section_name(status.slide_id, int(piece)) for piece in pieces] or [status.slide_id]
    named = digest(status.identity)
    return all(_is_whole(folder / f"{name}.h5", named) for name in names)


def section_name(slide_id: str, section: int) -> str:
    """What a piece of a slide's tissue is called in files and tables."""
    return f"{slide_id}.section-{section}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, as "--precision fp16 -> fp32"."""
    return [f"{_as_option(name)} {_show(before.get(name))} -> {_show(now.get(name))}" for name in _differ(before, now)]


def check_same(who: object, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where what `who` holds was made with other options."""
    changed = differences(before, now)
    if changed:
        raise ValueError(
            f"{who}: expected the options with which it was made, got others: {'; '.join(changed[:5])}. Give those of "
            "before, or use another --out; --overwrite makes it again."
        )


def _differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _as_option(name: str) -> str:
    return name if name in _NO_OPTIONS or " " in name else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class StageOptions:
    """What the results of a run in a stage's folder are made with: no others are to be there.

    `shared` is what all its results depend on, `own` by slide of this run what its result does; `cohort` are the ids of
    all slides that runs with these options make. With `overwrite` finished ones are made again, with `allow_mixed` they
    may differ in NUMERICS. `given` are names in an identity that no option chose (the slide's file, the results of
    stages before), `instead` another way to go on, for the message.
    """

    folder: Path
    shared: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    cohort: Collection[str]
    overwrite: bool = False
    allow_mixed: bool = False
    given: Collection[str] = ("slide_bytes", "tiles", "features")
    instead: str = ""

    @property
    def owned(self) -> Mapping[str, Any]:
        """What runs that share the folder agree on."""
        return _without(self.shared, NUMERICS if self.allow_mixed else ())

    def check(self, *, overwrite: bool | None = None) -> None:
        """Refuse finished results of other options: none is made anew, and none is joined by others, unasked.
        ValueError names what differs and the ways to go on."""
        ignored = {*self.given, *(NUMERICS if self.allow_mixed else ())}
        overwrite = self.overwrite if overwrite is None else overwrite
        changed: Counter[str] = Counter()
        names: set[str] = set()
        strange = ""  # a slide that is none of this run's
        for slide_id, status in read_statuses(self.folder).items():
            before, now = ({name: of[name] for name in NUMERICS if name in of} for of in (status.identity, self.shared))
            if slide_id in self.own:
                before, now = _without(status.identity, ignored), _without(self.own[slide_id], ignored)
            passed_over = overwrite if slide_id in self.own else self.allow_mixed or slide_id in self.cohort
            if not status.finished or passed_over or before == now:
                continue
            changed.update(differences(before, now))
            names.update(_differ(before, now))
            strange = strange if slide_id in self.own else strange or slide_id
        if not changed:
            return
        found = [f"{what} ({slides_in_words(count)})" for what, count in changed.most_common(3)]
        stage = {"contextual": "slides"}.get(name := self.folder.name.partition("_")[0], name)
        again = f"--overwrite {stage} makes them again" + f", {strange!r} too where it is named" * bool(strange)
        mixed = names <= set(NUMERICS)
        raise ValueError(
            f"{self.folder.name}: expected the options that its slides were made with, got others: "
            f"{'; '.join(found)}. Use the earlier options, or another --out; {again}"
            f"{', --allow-mixed takes both together' * mixed}{self.instead}."
        )


def mixed_options(statuses: Iterable[Status]) -> list[str]:
    """In what finished results of one folder differ, as "--store float32 (7 slides), float16 (1 slide)"; what a
    manifest states slide by slide may."""
    values: dict[str, Counter[str]] = {}
    for status in statuses:
        for name, value in status.identity.items() if status.finished else ():
            masked = name == "tissue" and str(value).startswith("sha256:")
            if name not in ("slide_bytes", "tiles", "features", "slide_mpp", "seed") and not masked:
                values.setdefault(name, Counter())[_show(value)] += 1
    return [
        f"{_as_option(name)} "
        + ", ".join(f"{value} ({slides_in_words(count)})" for value, count in found.most_common(3))
        for name, found in values.items()
        if len(found) > 1
    ]


def _is_whole(path: Path, identity: str) -> bool:
    try:
        with open_h5(path) as file:
            return is_complete(file) and read_attr(file, "identity") == identity
    except (FeatureFileError, OSError):
        return False


def _without(identity: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in names}


def _show(value: Any) -> str:
    return str(value)[:12] if value is not None else "none"


_MARK = re.compile(r"\.run-([0-9a-f]{16})-([0-9a-f]{8}-\d+)-[0-9a-f]{6}")
_BEAT_SECONDS = 20.0
# A mark that nobody has touched for so long is a dead run's, or that of a machine that sleeps.
_GONE_SECONDS = 300.0
_TRIES = 4


class FolderTaken(ValueError):
    """Another run with other options works on the folder."""

    stops_run = True


class Ownership:
    """The folders that a run writes, each with the options of its results (JSON values); use as a context manager. On
    entry FolderTaken where a run with other options is at work, OutputError where a folder can't be written."""

    def __init__(self, folders: Mapping[Path, Mapping[str, Any]]) -> None:
        self._folders = dict(folders)
        self._marks: dict[Path, Path] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ownership", daemon=True)

    def __enter__(self) -> "Ownership":
        for left in reversed(range(_TRIES)):
            try:
                for folder, options in self._folders.items():
                    self._marks[folder] = folder / f".run-{digest(options)}-{writer_name()}-{secrets.token_hex(3)}"
                    try:
                        folder.mkdir(parents=True, exist_ok=True)
                        mark = open_own(self._marks[folder], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                        with os.fdopen(mark, "w", encoding="utf-8") as file:
                            json.dump(dict(options), file)
                    except OSError as error:
                        raise folder_error(folder, error) from error
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

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._remove()

    def check(self) -> None:
        """Show that this run lives; FolderTaken where another run took it for dead, and the folder for itself."""
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
                running, silent = is_running_here(match[2]), now - path.stat().st_mtime
                if running is False or silent > _GONE_SECONDS:
                    path.unlink()
                elif match[1] != digest(self._folders[folder]):
                    # Nobody can tell from here whether a process of another machine lives; it can be heard of late.
                    elsewhere = (
                        f" It runs on another machine and gave its last sign of life {max(0, round(silent))} s ago; if "
                        f"it was killed, the folder is free {_GONE_SECONDS:.0f} s after that."
                    )
                    raise FolderTaken(
                        f"{folder.name}: a run with other options is active there"
                        f"{_other(path, self._folders[folder])}. Wait until it ends, use the same options, or use "
                        f"another --out.{'' if running else elsewhere}"
                    )

    def _remove(self) -> None:
        for folder, mark in self._marks.items():
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # of a run that came to nothing
        self._marks.clear()


def _other(mark: Path, options: Mapping[str, Any]) -> str:
    """What the options of another run's mark are beside these, in brackets; nothing where it can't be read."""
    try:
        with os.fdopen(open_own(mark, os.O_RDONLY), encoding="utf-8") as file:
            found = differences(json.load(file), json.loads(json.dumps(dict(options))))
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({'; '.join(found[:3])})" if found else ""
