"""Digests of files: computed once, remembered by size and time, and compared with what is recorded."""

import hashlib
import json
import logging
import os
from pathlib import Path

import huggingface_hub.constants

from gigapath.files import hex_digest, sha256_of, write_json_atomic

logger = logging.getLogger(__name__)


def digest_of(path: Path, kind: str) -> str:
    """The file's digest as `KIND:HEX`.

    Args:
        path: the file.
        kind: "sha256", "md5", or "git" for the id that git gives the file's content as a blob.
    """
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
    memory = Path(huggingface_hub.constants.HF_HOME) / "gigapath" / "sha256" / f"{name}.json"
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
