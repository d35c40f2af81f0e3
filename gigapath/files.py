"""Files that are whole or absent: a temporary name in the same folder, flushed, renamed; one sentence when the disk
says no; checksums.

A killed process leaves at most a `<name>.<token>.partial` beside the file it was writing. A later writer in that folder
removes it once its process is known to be gone.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"

# A partial file of another machine is taken for abandoned after this long without a write.
ABANDONED_SECONDS = 24 * 3600.0

_REMEDIES = {
    errno.ENOSPC: "the disk is full. Free some space and run the same command again: finished files are kept",
    errno.EDQUOT: "the disk quota is used up. Free some space and run the same command again: finished files are kept",
    errno.EFBIG: "it would grow past the largest file allowed here. Raise the limit (`ulimit -f`) or write elsewhere",
    errno.EROFS: "the file system is read-only. Choose another output folder",
    errno.EACCES: "permission denied. Choose another output folder, or ask its owner for the right to write",
    errno.EPERM: "permission denied. Choose another output folder, or ask its owner for the right to write",
    errno.EIO: "the disk reports an input/output error. Check the disk, then run the same command again",
}
_STOPS_RUN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

_PARTIAL = re.compile(r".+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{6}" + re.escape(PARTIAL_SUFFIX), re.DOTALL)

_MOST_JSON_BYTES = 1 << 22

# When each folder may be searched for abandoned files again.
_NEXT_TIDY: dict[str, float] = {}

# Names of temporary files that this process is writing now (one folder may have several paths): never abandoned.
_LIVE: set[str] = set()


class OutputError(OSError):
    """An output could not be written; the message is one sentence that names the file and what to do.

    `errno` holds the system's code. `stops_run` is True where the next file would meet the same end (a full disk, a
    used-up quota, a read-only file system), so that a run over many slides stops there.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code

    def __reduce__(self) -> tuple[Any, ...]:  # an OSError forgets `errno` on its way between processes
        return type(self), (str(self), self.errno)

    @property
    def stops_run(self) -> bool:
        """True where going on with other files is pointless."""
        return self.errno in _STOPS_RUN


def output_error(path: Path, error: OSError) -> OutputError:
    """The one sentence for a failed write of `path`; folders above its own are left out of it, since errors are
    stored beside the results and paths are private."""
    words = f"{path.parent.name}/{path.name} could not be written: {_reason(error)}."
    return _taken(path.parent, error) or OutputError(words, error.errno)


def folder_error(folder: Path, error: OSError) -> OutputError:
    """The one sentence for an output folder in which nothing can be made."""
    words = f"the output folder {folder.name} could not be written: {_reason(error)}."
    return _taken(folder, error) or OutputError(words, error.errno)


def _taken(folder: Path, error: OSError) -> OutputError | None:
    """The sentence where a file stands in the way of a folder or of one above it."""
    for taken in (folder, *folder.parents):
        if taken.is_file():
            words = f"the output folder {taken.name} could not be made: a file of that name is there."
            return OutputError(f"{words} Choose another output folder.", error.errno)
    return None


def _reason(error: OSError) -> str:
    known = _REMEDIES.get(error.errno) if error.errno is not None else None
    return known or f"{error.strerror or error}. Check the output folder"


def check_writable(folder: Path | str) -> None:
    """Make the folder where it is missing, and a file in it that goes again; OutputError names the folder alone."""
    folder = Path(folder)
    temporary = folder / _temporary_name("writable")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise folder_error(folder, error) from error


def is_write_error(error: OSError, temporary: Path) -> bool:
    """True for an error of writing `temporary`, False for one of whatever else was read meanwhile: what only a write
    can raise, or a refusal that names our file or none."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return True
    named = error.filename is None or error.filename == os.fspath(temporary)
    return named and error.errno in (errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def atomic_file(path: Path | str, *, mode: int = 0o666, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success it is flushed to disk and takes the name `path`, on any
    error it is removed and whatever `path` was before stays.

    The folder is made where it is missing. The temporary file exists (empty) on entry and ends in `.partial`: a library
    that goes by the suffix needs the format named. `mode` are permissions before the umask, 0o600 for what only the
    user may read; without `durable` the flush is left out, milliseconds a file, where a power cut that takes the file
    costs a redo.

    Raises:
        OutputError: the file could not be made, written, flushed or renamed.
    """
    path = Path(path)
    temporary, descriptor = open_temporary(path, mode=mode)
    try:
        try:
            os.close(descriptor)
            yield temporary
        except OutputError:
            raise
        except OSError as error:
            if is_write_error(error, temporary):
                raise output_error(path, error) from error
            raise
        if durable:
            try:
                descriptor = os.open(temporary, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise output_error(path, error) from error
        publish(temporary, path, durable=durable)
    finally:
        discard(temporary)


def write_bytes_atomic(path: Path | str, content: bytes, *, mode: int = 0o666, durable: bool = True) -> None:
    """Write a whole file at once, or not at all."""
    with atomic_file(path, mode=mode, durable=durable) as temporary:
        try:
            temporary.write_bytes(content)
        except OSError as error:
            raise output_error(Path(path), error) from error


def write_text_atomic(path: Path | str, text: str, *, mode: int = 0o666, durable: bool = True) -> None:
    """Write a whole UTF-8 text at once, or not at all; line ends stay as they are."""
    write_bytes_atomic(path, text.encode("utf-8"), mode=mode, durable=durable)


def write_json_atomic(path: Path | str, value: Any, *, mode: int = 0o666, durable: bool = True) -> None:
    """Write JSON, readable (two spaces, keys in the order given), with a final line end. NaN and infinity raise
    ValueError: they are not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(path, text, mode=mode, durable=durable)


def check_replaceable(path: Path | str, content: str, overwrite: bool) -> None:
    """Refuse to put a text in place of another that is there, unless told to; the same text may be written again.

    Raises:
        ValueError: it names `--overwrite`.
    """
    path = Path(path)
    if not overwrite and path.is_file() and path.read_bytes() != content.encode("utf-8"):
        raise ValueError(
            f"{path}: it is there with other content. Write to another place, or over it with --overwrite."
        )


def read_json(path: Path, *, keys: Sequence[str], mend: str) -> dict[str, Any]:
    """The mapping with these keys that a JSON file of ours, which is there, holds; ValueError that names the file, and
    ends with `mend`, where it is no JSON, no mapping, or lacks a key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        content = None
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"{path}: expected the JSON that gigapath wrote, got a damaged file. {mend}")
    return content


def small_json(path: Path) -> Any:
    """What a small JSON file beside results holds, ours or another tool's; None where there is none that can be read: a
    pipe, larger than such files are, no JSON."""
    try:
        if path.is_file() and path.stat().st_size <= _MOST_JSON_BYTES:
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        pass
    return None


def open_temporary(path: Path, *, mode: int = 0o666) -> tuple[Path, int]:
    """Make the temporary file of `path` and open it for reading and writing: its path, and a descriptor, which the
    caller closes. For a writer that flushes by itself; it ends with `publish` on success, and always with `discard`.
    The folder is made where it is missing."""
    temporary = path.with_name(_temporary_name(path.name))
    _LIVE.add(temporary.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Plain open: the umask and a setgid folder apply, as they would not with tempfile's mode 0600.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        discard(temporary)
        raise output_error(path, error) from error
    _tidy(path.parent)
    return temporary, descriptor


def open_own(path: Path, flags: int) -> int:
    """Open a file whose name others can foresee, for what is ours alone: a link, pipe or device is never followed or
    waited for. OSError where there is no such file, or it is no plain one."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ELOOP, "expected a plain file", str(path))
    return descriptor


def publish(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Give the finished, flushed temporary file its name, and make the name itself durable."""
    try:
        temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    if not durable:
        return
    # Not every file system can flush a folder; the file itself is safe already.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def discard(temporary: Path) -> None:
    """Remove a temporary file if it is still there."""
    _LIVE.discard(temporary.name)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _temporary_name(name: str) -> str:
    return f"{name}.{writer_name()}-{secrets.token_hex(3)}{PARTIAL_SUFFIX}"


@contextlib.contextmanager
def own_folder(folder: Path, what: str) -> Iterator[Path]:
    """A hidden folder in another, for what is made there before it takes its place; gone at the end, and with it those
    that killed processes of this machine left."""
    for left in folder.glob(f".{what}-*"):
        if is_running_here(left.name.removeprefix(f".{what}-").rpartition("-")[0]) is False:
            shutil.rmtree(left, ignore_errors=True)
    own, new = folder / f".{what}-{writer_name()}-{secrets.token_hex(3)}", not folder.exists()
    try:
        own.mkdir(parents=True)
    except OSError as error:
        raise folder_error(folder, error) from error
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # it holds something now
                folder.rmdir()


def writer_name() -> str:
    """What the temporary files of this process have in their names; says nothing about whose they are."""
    return f"{_machine()}-{os.getpid()}"


def remove_abandoned(folder: Path | str, *, gone: Collection[str] = ()) -> None:
    """Remove what killed writers left behind in a folder, never what a living one is writing.

    A partial file of this machine goes when its process is gone, one of another machine after a day without a write,
    and those of `gone` (as `writer_name` says it) at once.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _PARTIAL.fullmatch(entry.name)
            if match is None or entry.name in _LIVE:
                continue
            with contextlib.suppress(OSError):
                if f"{match[1]}-{match[2]}" in gone:
                    over = True
                elif (running := is_running_here(f"{match[1]}-{match[2]}")) is not None:
                    over = int(match[2]) == os.getpid() or not running
                else:
                    over = time.time() - entry.stat().st_mtime > ABANDONED_SECONDS
                if over:
                    os.unlink(entry.path)  # noqa: PTH108


def _tidy(folder: Path) -> None:
    """`remove_abandoned`, but so seldom that listing a folder of 100,000 files costs 2 % of the time at the most."""
    name, now = os.fspath(folder), time.monotonic()
    if now < _NEXT_TIDY.get(name, 0.0):
        return
    remove_abandoned(folder)
    done = time.monotonic()
    _NEXT_TIDY[name] = done + 50 * (done - now)


def is_running_here(writer: str) -> bool | None:
    """Whether the process of a `writer_name` runs; None for one of another machine."""
    machine, _, pid = writer.partition("-")
    if machine != _machine():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but belongs to somebody else
        return True
    return True


_machine_token: str | None = None


def _machine() -> str:
    """Eight hex digits for this machine and process-number space; no name can be read from them."""
    global _machine_token
    if _machine_token is None:
        try:
            space = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
        except OSError:  # no /proc: the host alone
            space = 0
        _machine_token = hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]
    return _machine_token


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's: hidden (`._a.h5`, `.ipynb_checkpoints`), or a
    temporary or system one of another tool."""
    return name.startswith((".", "~$")) or Path(name).stem.endswith(".tmp") or name in ("__MACOSX", "@eaDir")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted, without hidden ones."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))


def real_path(path: Path) -> Path:
    """The path without links, as `Path.resolve`, which raises for a link to itself where this gives the path."""
    return Path(os.path.realpath(path))


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hex_digest(Path(path), hashlib.sha256())


def hex_digest(path: Path, digest: Any) -> str:
    """The digest of `hashlib`, which may have been fed already, over a file's bytes, in hex; read in pieces."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def digest_of(path: Path, kind: str) -> str:
    """The file's digest as `KIND:HEX`: "sha256", "md5", or "git" for the id that git gives the file's content as a
    blob."""
    if kind == "sha256":
        return f"sha256:{sha256_of(path)}"
    if kind == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        return f"git:{hex_digest(path, digest)}"
    return f"md5:{hex_digest(path, hashlib.md5(usedforsecurity=False))}"


def remembered_sha256(path: Path) -> str:
    """The file's sha256 in hex, computed at most once while path, inode, size and time of change stay the same.

    What was computed is remembered in one small file each under `HF_HOME/gigapath/sha256`; where that folder can't
    be written, the digest is computed again the next time, which is slower and nothing else.
    """
    real = path.resolve()
    before = _fingerprint(real)
    name = hashlib.sha256(os.fsencode(real)).hexdigest()
    from huggingface_hub.constants import HF_HOME

    memory = Path(HF_HOME) / "gigapath" / "sha256" / f"{name}.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = None
    if isinstance(known, dict) and known.get("fingerprint") == before and isinstance(known.get("sha256"), str):
        logger.debug("%s: the sha256 was computed before, and its size and time are unchanged", path.name)
        return str(known["sha256"])
    sha256 = sha256_of(real)
    if _fingerprint(real) == before:
        try:
            write_json_atomic(memory, {"fingerprint": before, "sha256": sha256})
        except OSError:
            logger.info("%s: its sha256 can't be remembered under HF_HOME, so it is computed each time", path.name)
    return sha256


def _fingerprint(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def check_sha256(path: Path, recorded: str, name: str, *, strict: bool) -> None:
    """Compare the file with the recorded sha256; another one raises ValueError, or warns where not `strict`."""
    found = remembered_sha256(path)
    if found == recorded:
        logger.info("%s: sha256 is the recorded one", name)
        return
    message = (
        f"{name}: expected the file with sha256 {recorded}, got {found}. "
        f"It is damaged or not the release: remove {path} and fetch it again."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)
