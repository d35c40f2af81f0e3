"""What a look at files, a machine or a release finds: `check`, `doctor` and `verify` say it in one form."""

from dataclasses import dataclass
from typing import Any

OK, SKIPPED, NOTE, WRONG = "ok", "skipped", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: a short name, the same in every release.
        text: what is so, one sentence.
        advice: what it does to the results, or what to do about it; "" where the text says all.
        state: OK, SKIPPED for what could not be looked at, NOTE for what one should know, WRONG.
        facts: the same for machines, plain JSON values.
        area: what it belongs to, such as "disk"; "" where findings have no areas.
    """

    name: str
    text: str
    advice: str = ""
    state: str = WRONG
    facts: Any = None
    area: str = ""

    @property
    def wrong(self) -> bool:
        """Whether something is wrong."""
        return self.state == WRONG
