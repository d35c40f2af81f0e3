"""What the doctor says."""

from dataclasses import dataclass
from typing import Any

STATES = ("ok", "note", "wrong")


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at.

    Attributes:
        area: "versions", "machine", "devices", "attention", "slides", "hub", "disk" or "self-test".
        name: a short name, the same in every release.
        state: "ok", "note" for what one should know, "wrong" for what stands in the way.
        text: what was found, one line.
        mend: what to do about it, one line; "" where there is nothing to do.
        facts: the same for machines, plain JSON values.
    """

    area: str
    name: str
    state: str
    text: str
    mend: str = ""
    facts: Any = None
