"""What was computed before and still holds: results are told apart by everything that their numbers depend on."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gigapath.cohort.status import Status, read_status, read_statuses
from gigapath.features import FeatureFileError
from gigapath.features.h5 import is_complete, open_h5, read_attr
from gigapath.text import slides_in_words

# What must be one within a folder, or the results can't be compared with each other.
# `fast_transform` stands in folders of version 0.1.0 that were read by approximations, which are no more.
NUMERICS = ("weights_sha256", "precision", "device", "batch_size", "reader", "fast_transform", "numerics_version")

# What the tiles' identity names beside what somebody chose.
_NOT_CHOSEN = ("slide_bytes", "numerics_version")


def digest(identity: Mapping[str, Any]) -> str:
    """A short name for an identity: what a result's file records of itself, and a later stage of an earlier one."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finished(
    folder: Path,
    slide_id: str,
    identity: Mapping[str, Any],
    *,
    allow_mixed: bool = False,
    files: Callable[[Status], Collection[str]] | None = None,
) -> Status | None:
    """The status of a finished result that equals what this run would compute, or None.

    The result's own file is opened and asked for its identity: a status beside a file that is missing, cut off or
    made by another run, which was killed before it wrote its status, counts for nothing.

    Args:
        folder: the stage's folder.
        slide_id: the slide.
        identity: what the result would depend on in this run.
        allow_mixed: take results that differ in `NUMERICS` alone.
        files: names of the result's files by its status, where it is not the one `<slide_id>.h5`.
    """
    status = read_status(folder, slide_id)
    if status is None or not status.finished:
        return None
    ignored = NUMERICS if allow_mixed else ()
    if _without(status.identity, ignored) != _without(identity, ignored):
        return None
    without_file = status.stage == "slides" and status.status == "no_tissue"
    names = files(status) if files else [f"{slide_id}.h5"]
    named = digest(status.identity)
    return status if without_file or all(_is_whole(folder / name, named) for name in names) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, as "precision fp16 -> fp32"."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return [f"{name} {_show(before.get(name))} -> {_show(now.get(name))}" for name in names]


def redone(folder: Path, identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on the finished results that are going to be made again, and why.

    Args:
        folder: the stage's folder.
        identities: by slide, what its result is going to depend on; only what is named here is compared.
    """
    reasons: Counter[str] = Counter()
    for slide_id, identity in identities.items():
        before = read_status(folder, slide_id)
        if before is not None and before.finished:
            named = {*identity, *(name for name in NUMERICS if name in before.identity)}
            reasons.update(differences({name: before.identity.get(name) for name in named}, identity))
    return [f"{folder.name}: {count} made before in other numbers, now again: {why}." for why, count in reasons.items()]


def check_same_tiles(folder: Path, identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to make tiles anew, which somebody may have looked at, because another run has other options of tiling.

    Only slides that are named in `identities` are looked at. Tiles of a slide whose file has changed, or of other
    numerics of this package, are made anew all the same.

    Args:
        folder: the stage's folder.
        identities: by slide, what its tiles would depend on.

    Raises:
        ValueError: names what differs and the ways to go on.
    """
    changed: Counter[str] = Counter()
    for slide_id, identity in identities.items():
        before = read_status(folder, slide_id)
        if before is not None and before.finished:
            changed.update(differences(*(_without(each, _NOT_CHOSEN) for each in (before.identity, identity))))
    if changed:
        found = "; ".join(f"{what} ({slides_in_words(count)})" for what, count in changed.most_common(3))
        raise ValueError(
            f"{folder.name}: expected the options with which the slides were tiled before, got others: {found}. Give "
            f"those again, or --tiles {folder.parent} to take the tiles as they are, or --overwrite tiles."
        )


def check_unmixed(folder: Path, identity: Mapping[str, Any], slide_ids: Collection[str]) -> None:
    """Refuse a folder that would hold results of different numerics after this run.

    Results of this run's own slides don't count: they are redone where they differ.

    Raises:
        ValueError: names what differs and the ways to go on.
    """
    for slide_id, status in read_statuses(folder).items():
        if slide_id in slide_ids or not status.finished:
            continue
        changed = differences(_only(status.identity), _only(identity))
        if changed:
            raise ValueError(
                f"{folder.name}: expected results of one kind, but those of {slide_id!r} differ from this run's: "
                f"{'; '.join(changed)}. Name those slides too, which makes them again, or use another --out, the "
                "same settings, or --allow-mixed."
            )


def _is_whole(path: Path, identity: str) -> bool:
    try:
        with open_h5(path) as file:
            return is_complete(file) and read_attr(file, "identity") == identity
    except (FeatureFileError, OSError):
        return False


def _only(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: identity[name] for name in NUMERICS if name in identity}


def _without(identity: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in names}


def _show(value: Any) -> str:
    return str(value)[:12] if value is not None else "none"
