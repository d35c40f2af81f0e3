"""Files of the model hub and of a few other public addresses: pinned, checked, one sentence where they can't be had.

The hub's own client fetches what is on the hub, and goes on where a download broke off; pooch fetches the small files
from elsewhere, whole or not at all. No torch in here.
"""

import contextlib
import errno
import logging
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils

from gigapath.files import atomic_file, check_sha256, digest_of, output_error, remembered_sha256
from gigapath.releases import DOWNLOADS, HUB_PREFIXES, RELEASES, SLIDE_FILE, TILE_FILE, RemoteFile

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("data")
_TIMEOUT_SECONDS = 30.0
_SILENT_SECONDS = 40.0


@dataclass(frozen=True)
class Collected:
    """A file that was asked for: what its content was checked against (None where nothing is published), whether it was
    there already, and for an optional file that could not be had the reason."""

    path: Path
    digest: str | None = None
    was_there: bool = False
    missing: str | None = None


def download(name: str, to: str | Path | None = None) -> list[Collected]:
    """Fetch what `name` stands for in the table into a folder, by default the hub's own cache (a released pair) or
    `data` (everything else); what is there already is checked and not fetched again.

    Raises:
        ValueError: an unknown name, or a file that is not the recorded one.
        OSError: a file can't be had or written; the message says why and what to do.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"download: expected one of {', '.join(DOWNLOADS)}, got {name!r}.")
    folder = Path(to).expanduser() if to is not None else None
    collected = []
    for file in DOWNLOADS[name].files:
        try:
            on_hub = file.source.startswith(HUB_PREFIXES)
            collected.append(_from_hub(file, folder) if on_hub else _from_web(file, folder or DEFAULT_FOLDER))
        except (OSError, ValueError) as error:
            if not file.optional or getattr(error, "stops_run", False):
                raise
            collected.append(Collected((folder or DEFAULT_FOLDER) / file.file, missing=str(error)))
    return collected


def _from_web(file: RemoteFile, folder: Path) -> Collected:
    """A small file over HTTP: checked, and only then given its name."""
    import pooch
    import requests

    assert file.digest is not None, f"{file.file}: a file from elsewhere than the hub needs a digest"
    path, host = folder / file.file, urlsplit(file.source).netloc
    if path.exists():
        _check(path, file.digest)
        return Collected(path, file.digest, was_there=True)
    with atomic_file(path) as temporary:
        try:
            # With the proxies of the environment; the bar is the terminal's alone.
            pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT_SECONDS)(
                file.source, str(temporary), None
            )
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            raise _of_status(status, path.name, host) from error
        except requests.RequestException as error:
            raise ConnectionError(
                f"{path.name}: {host} can't be reached, or broke off ({type(error).__name__}). Check the network, or "
                "HTTPS_PROXY, and run the same command again."
            ) from error
        found = digest_of(temporary, file.digest.partition(":")[0])
        if found != file.digest:
            raise ValueError(
                f"{path.name}: expected {file.digest} from {file.source}, got {found}. Nothing was kept; it may have "
                "changed there, or been altered on the way."
            )
    return Collected(path, file.digest)


def _from_hub(file: RemoteFile, folder: Path | None) -> Collected:
    pinned = file.digest is not None
    if folder is None and not pinned:
        folder = DEFAULT_FOLDER
    if folder is not None and pinned and (folder / file.file).exists():
        # Both releases use the same file names: never write one over the other.
        _check(folder / file.file, str(file.digest))
        return Collected(folder / file.file, file.digest, was_there=True)
    # The table's revision is the pin that `hub_file` finds by itself, and only then checks.
    address = file.source.partition("@")[0] if pinned else file.source
    path = hub_file(address, file.file, local_dir=folder, strict=True)
    digest = file.digest or _stated_by_hub(file.source, file.file)
    if digest and not pinned:
        _check(path, digest)
    return Collected(path, digest)


def _check(path: Path, digest: str) -> None:
    kind = digest.partition(":")[0]
    found = f"sha256:{remembered_sha256(path)}" if kind == "sha256" else digest_of(path, kind)
    if found != digest:
        raise FileExistsError(
            f"{path}: expected {digest}, and the file that is there has {found}. Move it away, or name another folder "
            "with --to."
        )


def _stated_by_hub(address: str, file: str) -> str | None:
    """The sha256 that the hub states for a large file, or None where it can't be asked."""
    repo, _, revision = address.partition(":")[2].partition("@")
    kind = "dataset" if repo.startswith("datasets/") else "model"
    url = huggingface_hub.hf_hub_url(repo.removeprefix("datasets/"), file, repo_type=kind, revision=revision or None)
    try:
        etag = huggingface_hub.get_hf_file_metadata(url).etag
    except Exception as error:  # of the hub's client and of the network; the file itself is there
        logger.info("%s: the hub does not state its sha256 (%s)", file, type(error).__name__)
        return None
    return f"sha256:{etag}" if etag and re.fullmatch(r"[0-9a-f]{64}", etag) else None


def hub_file(
    address: str,
    filename: str,
    *,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    strict: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Fetch one file of the hub, or find it in the cache, and check it against the recorded sha256.

    The two released repositories are taken at their pinned revision, unless the address names another. The hub's
    own client does the work, so that `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` and proxies hold; a file
    that is there already is not fetched again.

    Args:
        address: `hf_hub:REPO`, `hf_hub:REPO@REVISION` or, of a dataset, `hf_hub:datasets/REPO`.
        filename: the file's path in the repository.
        local_dir: a folder to put the file in, or None for the hub's cache.
        cache_dir: another folder for the hub's cache.
        strict: whether a sha256 other than the recorded one is an error; else it is a RuntimeWarning.
        options: of `hf_hub_download` besides, such as its token.

    Returns:
        The local file.

    Raises:
        PermissionError: the repository is gated, and the token is missing or has no access.
        FileNotFoundError: the repository or the file does not exist, or it is in no cache and the hub is off.
        OSError: the hub can't be reached, or the disk is full.
        ValueError: the file is not the recorded one, with `strict`.
    """
    repo, _, named = address[len(HUB_PREFIXES[0]) :].partition("@")
    revision, recorded = (named, None) if named else _pin(repo, filename)
    arguments: dict[str, Any] = {"local_dir": local_dir, **(options or {})}
    if repo.startswith("datasets/"):
        repo, arguments["repo_type"] = repo.removeprefix("datasets/"), "dataset"
    if revision:
        arguments["revision"] = revision
    if cache_dir is not None:
        arguments["cache_dir"] = cache_dir
    if recorded and local_dir is not None:
        there = Path(local_dir) / filename
        if there.is_file() and remembered_sha256(there) == recorded:
            return there

    folder = Path(local_dir or cache_dir or huggingface_hub.constants.HF_HUB_CACHE)

    def fetch() -> Path:
        _check_that_it_answers(repo, filename, revision, arguments)
        try:
            with _quietly():
                return Path(huggingface_hub.hf_hub_download(repo, filename=filename, **arguments))
        except Exception as error:
            cached = _other_revision(repo, filename) if recorded else None
            if cached is None or remembered_sha256(cached) != recorded:
                raise hub_error(error, repo, filename, folder) from error
            return cached

    path = fetch()
    if recorded and strict and folder in path.parents and remembered_sha256(path) != recorded:
        # Cut short or altered on the disk: it is taken away, and fetched anew once.
        logger.warning("%s is not the recorded file: it is fetched anew", path)
        for name in {path, path.resolve()}:
            name.unlink()
        path = fetch()
    if recorded:
        check_sha256(path, recorded, f"hf_hub:{repo}/{filename}", strict=strict)
    return path


def _check_that_it_answers(repo: str, filename: str, revision: str | None, arguments: dict[str, Any]) -> None:
    """Refuse a hub that says nothing at all: its client would try again for minutes.

    Raises:
        ConnectionError: no answer of any kind in `_SILENT_SECONDS`.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    kind, cache = arguments.get("repo_type"), arguments.get("cache_dir")
    cached = huggingface_hub.try_to_load_from_cache(repo, filename, cache_dir=cache, revision=revision, repo_type=kind)
    if isinstance(cached, str):
        return
    url = huggingface_hub.hf_hub_url(repo, filename, repo_type=kind, revision=revision)
    if isinstance(ask_in_time(url, _SILENT_SECONDS), TimeoutError):
        raise ConnectionError(
            f"hf_hub:{repo}/{filename}: the hub did not answer in {_SILENT_SECONDS:g} s. Check the network and its "
            "proxy (HTTPS_PROXY)."
        )


def ask_in_time(url: str, seconds: float) -> Exception | None:
    """The error that asking the hub ended with, TimeoutError where it did not end in time, None where it went well.

    The resolver of names, and the client's own tries, may take longer than any time limit that they are given.
    """
    outcome: list[Exception | None] = []

    def work() -> None:
        try:
            huggingface_hub.get_hf_file_metadata(url, timeout=seconds)
            outcome.append(None)
        except Exception as error:  # of the hub's client and of the network, named to the user
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return outcome[0] if outcome else TimeoutError()


def _pin(repo: str, filename: str) -> tuple[str | None, str | None]:
    """(revision, sha256) recorded for a file of the released repositories, else (None, None)."""
    for release in RELEASES.values():
        if repo == release.repo:
            return release.revision, {TILE_FILE: release.tile_sha256, SLIDE_FILE: release.slide_sha256}.get(filename)
    return None, None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the hub's client from writing of its retries; what comes of them is said in one sentence."""
    client: Any = huggingface_hub.utils.logging
    before = client.get_verbosity()
    client.set_verbosity_error()
    try:
        yield
    finally:
        client.set_verbosity(before)


def _other_revision(repo: str, filename: str) -> Path | None:
    """The file as the cache has it under the branch `main`: other tools fetch it so, mostly with the same content."""
    cached = huggingface_hub.try_to_load_from_cache(repo, filename)
    return Path(cached) if isinstance(cached, str) else None


def hub_error(error: Exception, repo: str, filename: str, folder: Path) -> OSError:
    """The one sentence for what the hub's client raised."""
    who = f"hf_hub:{repo}/{filename}"
    hub: Any = huggingface_hub.utils  # where old and new versions of the client have the errors
    release = next((release for release in RELEASES.values() if release.repo == repo), None)
    without = ""
    if release:
        instead = "--tile-encoder standin"
        if filename == SLIDE_FILE:
            instead = "--random-weights or --slide-encoder mean (finetune: --pretrained '')"
        without = f" To try things without these weights: {instead}."
    response = _response_of(error)
    status = getattr(response, "status_code", None)
    answer = " ".join(str(getattr(response, "headers", {}).get("X-Error-Message", "")).split())
    if status == 401 and "invalid" in answer.lower():
        return PermissionError(
            f"{who}: the hub does not know the token ({answer}). Set HF_TOKEN to a valid read token."
        )
    if isinstance(error, hub.GatedRepoError) or status == 403 or (status == 401 and release):
        have = (
            "the account of your token has no access to this gated repository"
            if huggingface_hub.get_token()
            else "this repository is gated and HF_TOKEN is not set"
        )
        return PermissionError(
            f"{who}: {have}. Ask for access at https://huggingface.co/{repo}, then set HF_TOKEN to a read token of "
            f"that account.{without}"
        )
    if isinstance(error, (hub.RepositoryNotFoundError, hub.RevisionNotFoundError)):
        return FileNotFoundError(
            f"{who}: the hub has no such repository or revision, or it is private. Check the name, and HF_TOKEN."
        )
    absent = isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError)
    if isinstance(status, int) and status >= 400 and not absent:
        return _of_status(status, who, "the hub")
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        why = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub can't be reached"
        by = f" by `gigapath download {release.name}`" if release else ""
        return FileNotFoundError(
            f"{who}: not in the hub's cache, and {why}. Fetch it{by} where there is a network, HF_HUB_OFFLINE is not "
            f"set and HF_HOME names the same cache; a local file will do as well.{without}"
        )
    if isinstance(error, hub.EntryNotFoundError):
        return FileNotFoundError(f"{who}: the repository has no such file. Check the name.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return output_error(folder / filename, error)
    reason = " ".join(str(error).split())[:200]
    return ConnectionError(f"{who}: could not be fetched ({type(error).__name__}: {reason}). Try again later.{without}")


def _response_of(error: BaseException | None) -> Any:
    """The hub's answer behind an error; the client wraps what it got into an error without it."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response
        error = error.__cause__ or error.__context__
    return None


def _of_status(status: int, who: str, host: str) -> OSError:
    """The one sentence for what a server answered."""
    if status in (401, 403):
        return PermissionError(f"{who}: {host} refuses access ({status}). A proxy may be in the way.")
    if status in (404, 410):
        return FileNotFoundError(f"{who}: {host} has no such file ({status}). Check the name; it may have moved.")
    if status == 429:
        return ConnectionError(f"{who}: {host} limits requests ({status}). Run this again in a few minutes.")
    if status >= 500:
        return ConnectionError(f"{who}: {host} has a server error ({status}). Run this again later.")
    return ConnectionError(f"{who}: {host} answered {status}. Check the address and the proxy.")
