"""What was computed before and still holds: results are told apart by everything that their numbers depend on."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.cohort.status import Status, read_status, read_statuses
from gigapath.features import FeatureFileError
from gigapath.features.h5 import is_complete, open_h5, read_attr
from gigapath.text import slides_in_words

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

    Attributes:
        folder: the stage's folder.
        shared: what all its results depend on.
        own: by slide of this run, what its result depends on.
        cohort: ids of all slides that runs with these options make.
        overwrite: whether what is finished is made again.
        allow_mixed: whether results may differ in `NUMERICS`.
        given: names in an identity that no option chose: the slide's file, the results of stages before.
        instead: another way to go on, for the message.
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

        Raises:
            ValueError: names what differs and the ways to go on.
        """
        ignored = {*self.given, *(NUMERICS if self.allow_mixed else ())}
        overwrite = self.overwrite if overwrite is None else overwrite
        changed: Counter[str] = Counter()
        names: set[str] = set()
        strange = ""  # a slide that is none of this run's
        for slide_id, status in read_statuses(self.folder).items():
            before, now = _only(status.identity), _only(self.shared)
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


def _only(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: identity[name] for name in NUMERICS if name in identity}


def _without(identity: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in names}


def _show(value: Any) -> str:
    return str(value)[:12] if value is not None else "none"
