"""What a check finds, of a file or of a folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigapath.findings import Finding


@dataclass
class FileReport:
    """What was found about one file, and what its folder is compared by.

    Attributes:
        path: the file.
        kind: "tile embeddings", "tiles", "tile coordinates", "slide embeddings", "vectors", or "" where it could not
            be told.
        tool: who wrote it.
        slide_id: the slide.
        tiles: how many tiles it holds, or None.
        compared: what must be equal throughout a folder, by name; what the file does not say is left out.
        digest: equal where two files hold the same embeddings; "" where there is nothing to compare.
        findings: in the order of the checks.
    """

    path: Path
    kind: str = ""
    tool: str = ""
    slide_id: str = ""
    tiles: int | None = None
    compared: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether something is wrong with it."""
        return any(finding.wrong for finding in self.findings)


@dataclass
class FolderReport:
    """What was found about the files of one folder together."""

    path: Path
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether something is wrong with it."""
        return any(finding.wrong for finding in self.findings)


def some(names: list[str], limit: int = 3) -> str:
    """The first of some names, and how many there are beside."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def share(count: int, total: int, what: str = "tiles") -> str:
    """A part of a whole in words, such as "3 of 40 tiles"."""
    return f"{count:,} of {total:,} {what}"
