"""What a look at files, a machine or a release finds: `check`, `doctor` and `verify` say it in one form."""

from dataclasses import dataclass
from typing import Any

OK, SKIPPED, NOTE, WRONG = "ok", "skipped", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: a short `name`, the same in every release; a sentence on what is so; `advice` on
    what it does to the results, or what to do about it, or ""; OK, SKIPPED (could not be looked at), NOTE (one should
    know) or WRONG; `facts` for machines, plain JSON values; the `area` it belongs to, such as "disk", or ""."""

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
