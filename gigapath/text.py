"""Counts, sizes, times and tables as people read them, and sentences without the slide that they are about."""

import re
from collections.abc import Sequence


def slides_in_words(count: int) -> str:
    """A number of slides."""
    return "1 slide" if count == 1 else f"{count:,} slides"


def tiles_in_words(count: int, *, exact: bool = True) -> str:
    """A number of tiles that says whether it is counted."""
    if exact:
        return "1 tile" if count == 1 else f"{count:,} tiles"
    return f"about {rounded(count):,} tiles (estimated from slide sizes; may be off by a factor of three)"


def rounded(count: int) -> int:
    """A count to two digits, as befits a guess."""
    if count < 10:
        return count
    step = int(10 ** (len(str(count)) - 2))
    return round(count / step) * step


def in_words(seconds: float) -> str:
    """A time to read at a glance."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86_400:.1f} days"


def in_bytes(count: float) -> str:
    """A size to read at a glance."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def without_name(text: str, name: str, instead: str) -> str:
    """A text with another word in place of a name, where it stands by itself: the slide called "a" or "12" leaves
    other words and numbers as they are."""
    if not name or name not in text:  # a cohort's ids are many: a pattern of each would take its time
        return text
    return re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", lambda _: instead, text)


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the columns one below the other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
