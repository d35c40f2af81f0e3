"""Files of the model hub: pinned, checked, and with one sentence when they are not to be had."""

import contextlib
import errno
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils

from gigapath.downloads.digests import remembered_sha256
from gigapath.downloads.table import RELEASES, SLIDE_FILE, TILE_FILE
from gigapath.files import output_error

logger = logging.getLogger(__name__)

HUB_PREFIXES = ("hf_hub:", "hf-hub:")


def hub_file(
    address: str,
    filename: str,
    *,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    strict: bool = False,
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
    arguments: dict[str, Any] = {"local_dir": local_dir}
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
    try:
        with _quietly():
            path = Path(huggingface_hub.hf_hub_download(repo, filename=filename, **arguments))
    except Exception as error:
        cached = _other_revision(repo, filename) if recorded else None
        if cached is None or remembered_sha256(cached) != recorded:
            folder = Path(local_dir or cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
            raise hub_error(error, repo, filename, folder) from error
        return cached
    if recorded:
        check_sha256(path, recorded, f"hf_hub:{repo}/{filename}", strict=strict)
    return path


def check_sha256(path: Path, recorded: str, name: str, *, strict: bool) -> None:
    """Compare the file with the recorded sha256; another one raises ValueError, or warns where not `strict`."""
    found = remembered_sha256(path)
    if found == recorded:
        logger.info("%s: sha256 is the recorded one", name)
        return
    message = (
        f"{name}: expected the file with sha256 {recorded}, got {found}. "
        "It is damaged or not the release: remove it and fetch it again."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


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
    without = " `gigapath embed --tile-encoder standin` tries things without these weights." if release else ""
    status = getattr(getattr(error, "response", None), "status_code", None)
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
