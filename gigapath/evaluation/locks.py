"""Locked test sets: beside their labels lies a file with the digest of what was locked, and a line an evaluation.

It is text with a JSON value a line, only ever appended to. Whoever wants to cheat can delete it; who does not is told
how often the set was looked at, which is what a reader of the score has to know.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SUFFIX = ".lock"
FORMAT = 1
LOCKED = "locked test set"


@dataclass(frozen=True)
class TestSet:
    """Labels and features that may be locked.

    Attributes:
        labels: the CSV, beside which the lock lies.
        digest: of the labels.
        encoder: that made the features; each encoder's are locked when it is first tested.
        features: digest of the features.
    """

    __test__ = False  # no class of tests, for all its name

    labels: Path
    digest: str
    encoder: str
    features: str

    @property
    def file(self) -> Path:
        """Where the lock lies."""
        return self.labels.with_name(self.labels.name + SUFFIX)

    def evaluations(self) -> list[Mapping[str, Any]]:
        """The evaluations so far; none where nothing is locked.

        Raises:
            ValueError: other labels, or other features of this encoder, than were locked; a damaged lock.
        """
        if not self.file.is_file():
            return []
        try:
            first, *tested = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
            held, known = first["labels"], {each["encoder"]: each["features"] for each in reversed(tested)}
            if first["format"] != FORMAT or any("head" not in each for each in tested):
                raise KeyError("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.file.name}: expected a lock of a test set, got a damaged one. Restore it."
            ) from error
        for what, before, now in (("labels", held, self.digest), ("features", known.get(self.encoder), self.features)):
            if before not in (None, now):
                raise ValueError(
                    f"{self.labels.name}: its {what} are not those that were locked ({self.file.name}). Restore them, "
                    "or name the new test set otherwise."
                )
        return tested

    def count(self, head: str) -> dict[str, Any]:
        """Lock what is not locked yet, and write that a head was evaluated.

        Args:
            head: SHA-256 of its tensors.

        Returns:
            for results: which evaluation this is, of how many heads, and the digests.
        """
        before, now = self.evaluations(), datetime.now(UTC).isoformat(timespec="seconds")
        if not self.file.exists():
            self._append({"format": FORMAT, "labels": self.digest, "locked": now})
        self._append({"head": head, "encoder": self.encoder, "features": self.features, "time": now})
        heads = {each["head"] for each in before} | {head}
        digests = {"labels": self.digest, "features": self.features}
        return {"evaluation": len(before) + 1, "heads": len(heads), **digests}

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:  # one write, so that two at once do not mix
            file.write(json.dumps(line) + "\n")


def in_words(counted: Mapping[str, Any]) -> str:
    """What `TestSet.count` found, in a sentence."""
    number, heads = counted["evaluation"], counted["heads"]
    if number == 1:
        return f"{LOCKED}: this is the first evaluation on it"
    return f"{LOCKED}: evaluation {number:,} on it, of {heads:,} head{'s' * (heads > 1)}"
