"""What is odd about a list of slides before any is opened: the same file twice, ids that may name people."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gigapath.cohort.manifest import SlideEntry
from gigapath.files import sha256_of

_PIECE_BYTES = 1 << 16
_YEAR = r"(?:19|20)\d\d"
_MONTH, _DAY = r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
_DATES = (
    rf"(?<!\d){_YEAR}[-._ /]{_MONTH}[-._ /]{_DAY}(?!\d)",
    rf"(?<!\d){_DAY}[-._ /]{_MONTH}[-._ /]{_YEAR}(?!\d)",
    rf"(?<!\d){_MONTH}[-._ /]{_DAY}[-._ /]{_YEAR}(?!\d)",
    r"(?<!\d)(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)",
)
# Two words of three letters or more, with a comma, space or underscore between: "Doe, Jane", "DOE_JANE", "jane doe".
_TWO_WORDS = re.compile(r"(?<![^\W_])([^\W\d_]{3,})(?:, ?|[ _]|, )([^\W\d_]{3,})(?![^\W_])")
_NO_NAMES = frozenset(
    word
    for line in (
        "slide slides scan image img case sample specimen section block level left right top bottom region small large",
        "tumor tumour normal benign malignant cancer carcinoma biopsy resection core tissue stain stained hematoxylin",
        "eosin test train val demo copy new old final original patient series batch site center centre set control",
        "positive negative lung liver breast colon skin brain kidney prostate lymph node gastric and with plain ink",
        "mpp low power high part piece page label macro whole mount frozen diagnostic",
    )
    for word in line.split()
)


def odd_id(slide_id: str) -> str | None:
    """ "a date" or "a name" where an id looks like one, else None; a guess, for a person to judge."""
    if any(re.search(form, slide_id) for form in _DATES):
        return "a date"
    for first, second in _TWO_WORDS.findall(slide_id):
        if not {first.lower(), second.lower()} & _NO_NAMES:
            return "a name"
    return None


def identical_files(entries: Iterable[SlideEntry]) -> list[tuple[str, ...]]:
    """Ids of slides whose files are the same to the last byte, sorted; each group once.

    Sizes are compared first, then three pieces of the files of equal size, and only then whole files.
    """
    groups: list[tuple[str, ...]] = []
    regular = (entry for entry in entries if entry.path.is_file())  # reading a pipe would wait for ever
    for of_size in _alike(regular, lambda path: path.stat().st_size):
        for of_pieces in _alike(of_size, _pieces):
            real = {entry.path.resolve() for entry in of_pieces}
            same = [of_pieces] if len(real) == 1 else _alike(of_pieces, sha256_of)
            groups += [tuple(sorted(entry.slide_id for entry in group)) for group in same]
    return sorted(groups)


def _alike(entries: Iterable[SlideEntry], key: Callable[[Path], object]) -> list[list[SlideEntry]]:
    """Entries whose files have the same key, in groups of two or more; files that can't be read are in none."""
    found: dict[object, list[SlideEntry]] = {}
    for entry in entries:
        try:
            found.setdefault(key(entry.path), []).append(entry)
        except OSError:
            continue
    return [group for group in found.values() if len(group) > 1]


def _pieces(path: Path) -> str:
    """Names the start, the middle and the end of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for start in (0, size // 2, max(0, size - _PIECE_BYTES)):
            file.seek(start)
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def stratified(strata: Sequence[str], count: int) -> list[int]:
    """Indices of `count` members, spread over the strata: each gets one, the largest first, then in proportion.

    Args:
        strata: the stratum of each member.
        count: how many are wanted; fewer come where there are fewer.

    Returns:
        indices, ascending; within a stratum evenly spread over its members.
    """
    members: dict[str, list[int]] = {}
    for index, name in enumerate(strata):
        members.setdefault(name, []).append(index)
    seats = dict.fromkeys(members, 0)
    for _ in range(min(count, len(strata))):
        free = [name for name in members if seats[name] < len(members[name])]
        # A stratum without a seat goes before all others; then the highest quotient (D'Hondt).
        chosen = min(free, key=lambda name: (seats[name] > 0, -len(members[name]) / (seats[name] + 1), name))
        seats[chosen] += 1
    return sorted(
        members[name][(2 * k + 1) * len(members[name]) // (2 * n)] for name, n in seats.items() for k in range(n)
    )
