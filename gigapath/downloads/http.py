"""One file over HTTP: resumed where it broke off, checked, and only then given its name."""

import http.client
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

import gigapath
from gigapath.downloads.digests import digest_of
from gigapath.files import PARTIAL_SUFFIX, discard, output_error, publish

try:
    import fcntl
except ImportError:  # Windows; two downloads of one file at a time are then the user's business
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Called with (bytes there, bytes in all or None) as a file grows.
Progress = Callable[[int, int | None], None]

_BLOCK = 1 << 18
_TIMEOUT_SECONDS = 30.0
_WAITS_SECONDS = (1.0, 4.0, 15.0)  # before each further try after a break that brought nothing new


class _Broken(Exception):
    """The connection ended early, or the server was busy; what has arrived is kept."""


def fetch(address: str, path: Path, *, digest: str, progress: Progress | None = None) -> None:
    """Download a file, going on from `<path>.partial` where an earlier try left one.

    Redirects and the proxies of the environment are followed. A connection that breaks is taken up again; what is
    there stays for the next run.

    Args:
        address: http or https.
        path: the file to make; its folder is made where it is missing.
        digest: what the content must have, `sha256:...`, `git:...` or `md5:...`.
        progress: told of each block.

    Raises:
        ConnectionError: no network, or the server breaks off again and again.
        PermissionError, FileNotFoundError: the server refuses the file (401, 403), or has none (404, 410).
        ValueError: the content is another one; nothing of it is kept.
        OutputError: the disk is full, or the folder can't be written.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("ab")
    except OSError as error:
        raise output_error(path, error) from error
    with file:
        _lock(file, path, partial)
        try:
            _fill_checked(file, address, path, digest, progress)
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise output_error(path, error) from error
            publish(partial, path)
        finally:
            if os.fstat(file.fileno()).st_size == 0:  # nothing to go on from
                discard(partial)


def _fill_checked(file: IO[bytes], address: str, path: Path, digest: str, progress: Progress | None) -> None:
    kind, partial = digest.partition(":")[0], Path(file.name)
    resumed = file.tell() > 0
    _fill(file, address, path, progress)
    found = digest_of(partial, kind)
    if found != digest and resumed:  # what the earlier try left may be of another file
        logger.info("%s: the resumed file is not the recorded one, starting again", path.name)
        file.truncate(0)
        _fill(file, address, path, progress)
        found = digest_of(partial, kind)
    if found != digest:
        file.truncate(0)
        raise ValueError(
            f"{path.name}: expected {digest} from {address}, got {found}. Nothing was kept; it may have changed there, "
            "or been altered on the way."
        )


def _fill(file: IO[bytes], address: str, path: Path, progress: Progress | None) -> None:
    """Read until the server has no more; breaks are taken up again as long as each try brings something."""
    waits = iter(_WAITS_SECONDS)
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _read(file, address, path, progress)
            return
        except _Broken as error:
            if file.seek(0, os.SEEK_END) > before:
                waits = iter(_WAITS_SECONDS)
            wait = next(waits, None)
            if wait is None:
                raise ConnectionError(
                    f"{path.name}: the connection to {_host(address)} broke at {file.tell():,} bytes ({error}). Run "
                    "the same command again to go on from there."
                ) from error
            logger.info("%s: broke off (%s), going on in %g s", path.name, error, wait)
            time.sleep(wait)


def _read(file: IO[bytes], address: str, path: Path, progress: Progress | None) -> None:
    """One request for what is missing, appended to `file`."""
    start = file.tell()
    request = urllib.request.Request(address, headers={"User-Agent": f"gigapath/{gigapath.__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # nothing beyond what is there: the digest decides
                return
            raise _refused(error.code, address, path) from error
    except (OSError, http.client.HTTPException) as error:
        if start:
            raise _Broken(_reason(error)) from error
        raise ConnectionError(
            f"{path.name}: {_host(address)} can't be reached ({_reason(error)}). Check the network, or HTTPS_PROXY."
        ) from error
    with response:
        if response.status != 206:  # the server gives the file from its beginning, whatever was asked for
            file.truncate(0)
            file.seek(0)
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        done = start
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(_reason(error)) from error
            if not block:
                break
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                raise output_error(path, error) from error
            done += len(block)
            if progress:
                progress(done, total)
    if total is not None and done < total:
        raise _Broken(f"{total - done:,} bytes are missing")


def _refused(code: int, address: str, path: Path) -> Exception:
    if code in (401, 403):
        return PermissionError(f"{path.name}: {_host(address)} refuses access ({code}). A proxy may be in the way.")
    if code in (404, 410):
        return FileNotFoundError(f"{path.name}: {_host(address)} has no such file any more ({code}): {address}.")
    if code == 429 or code >= 500:
        return _Broken(f"the server answers {code}")
    return ConnectionError(f"{path.name}: {_host(address)} answers {code} to {address}.")


def _lock(file: IO[bytes], path: Path, partial: Path) -> None:
    """Hold the partial file alone: two writers of one file would spoil it."""
    busy = f"{path.name}: another process is downloading it to this folder. Wait for it, then run this again."
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConnectionError(busy) from error
        except OSError:
            logger.debug("%s: this file system has no locks", path.name)
    # The other process may have finished in between: then this handle leads to its finished file.
    if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
        raise ConnectionError(busy)


def _host(address: str) -> str:
    return urllib.parse.urlsplit(address).netloc


def _reason(error: BaseException) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(cause).split())[:120] or type(cause).__name__
