"""What `gigapath verify` found: one row a check, as JSON and as a table to paste."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        what: what was compared, as "demo tile, fp32".
        status: PASSED, FAILED or SKIPPED.
        said: one sentence: the figure, or what is wrong and what to do.
        facts: numbers behind it, plain JSON values.
    """

    what: str
    status: str
    said: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def verdict(checks: Sequence[Check]) -> str:
    """ "failed" where any check did; "passed" where any did and none failed; else "skipped"."""
    states = {check.status for check in checks}
    return FAILED if FAILED in states else PASSED if PASSED in states else SKIPPED


def as_table(title: str, checks: Sequence[Check]) -> str:
    """A Markdown table, fit for pasting: no paths, no names of people or machines."""
    lines = [f"**{title}: {verdict(checks)}**", "", "| check | result | |", "|---|---|---|"]
    lines += [f"| {check.what} | {check.status} | {check.said.replace('|', '/')} |" for check in checks]
    return "\n".join(lines)


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as plain JSON values."""
    return [dataclasses.asdict(check) for check in checks]


def cosine(a: Array, b: Array) -> float:
    """Cosine of two arrays taken as vectors, in float64; 0 where one is zero or not finite."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if 0 < length < np.inf else 0.0


def distance(a: Array, b: Array) -> float:
    """Length of the difference of two arrays relative to the second's."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
