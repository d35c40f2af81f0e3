"""Tables of slides, tiles and labels in CSV: one way to read them, one to write them.

What counts as a missing value, which names print alike, and what a spreadsheet would take for a formula is said here
once for manifests, labels, splits and results.
"""

import csv
import io
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# How pandas, R, spreadsheets and databases write that a value is not there.
MISSING_VALUES = frozenset(
    {"", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "NAN", "-NaN", "-nan", "NaT", "None", "null", "NULL", "Null"}
    # What spreadsheets show for a formula that failed.
    | {"#N/A", "#NA", "#VALUE!", "#REF!", "#DIV/0!", "#NUM!", "#NAME?", "#NULL!"}
)
_MOST_NAMES = 8  # of columns in a message
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|nan)")


@dataclass(frozen=True)
class Table:
    """A table as it was read from `source`; at least one row, of which `numbers` are those in the file, the header
    being 1.

    `columns` has the cells of each name trimmed, in Unicode's composed form (NFC), "" where a value is missing;
    `written` has them trimmed and else as they stand there: paths, and what is carried through.
    """

    source: str
    columns: dict[str, list[str]]
    written: dict[str, list[str]] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    @property
    def header(self) -> list[str]:
        """The names of the columns."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def filled(self, column: str) -> list[str]:
        """The cells of a column in which no value may be missing; ValueError names the row."""
        cells = self.columns[column]
        if "" in cells:
            number = self.numbers[cells.index("")]
            raise ValueError(f"{self.source}: row {number} has no {column}. Fill it in or leave the row out.")
        return cells


def read_table(path: Path | str) -> Table:
    """Read a CSV, or a TSV by its suffix; FileNotFoundError, or ValueError as `parse_table`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return parse_table(path.read_bytes(), path.name, separator="\t" if path.suffix.lower() == ".tsv" else ",")


def parse_table(content: bytes, source: str, *, separator: str = ",") -> Table:
    """Read the bytes of a table in UTF-8. Rows without any value are left out. ValueError where it is no table, has no
    rows, a row of another length, or a column that stands in it twice."""
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text.partition("\n")[0]:  # UTF-16 without its mark; in a row it spoils that row alone
            raise csv.Error("its header holds zero bytes")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(number, row) for number, row in enumerate(reader, start=1)]
        rows = list(
            itertools.dropwhile(lambda each: not "".join(each[1]).strip(), rows)
        )  # blank lines above the header
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{source}: expected a CSV in UTF-8, got something else ({error}). Save it as CSV UTF-8."
        ) from error
    if not rows:
        raise ValueError(f"{source}: expected a CSV with a header, got an empty file.")
    header = [composed(name.strip()) for name in rows[0][1]]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise ValueError(f"{source}: the column {twice[0][:60]!r} stands in it twice. Keep one.")
    body = [(number, row) for number, row in rows[1:] if "".join(row).strip()]
    for number, row in body:
        if len(row) != len(header):
            raise ValueError(
                f"{source}: expected {len(header)} values in row {number}, as in the header, got {len(row)}. Correct "
                "the row: a cell that holds commas stands between two quotes."
            )
    if not body:
        raise ValueError(f"{source}: expected rows below the header, got none.")
    written = {
        name: [cell.strip() for cell in cells]
        for name, cells in zip(header, zip(*(row for _, row in body), strict=True), strict=True)
    }
    columns = {
        name: ["" if (each := composed(cell)) in MISSING_VALUES else each for cell in cells]
        for name, cells in written.items()
    }
    return Table(source, columns, written, tuple(number for number, _ in body))


def plain_number(cell: str) -> float:
    """The number that a cell holds, NaN where it is none: Python would also take 0_5, which only resembles one."""
    return float(cell) if cell.isascii() and _NUMBER.fullmatch(cell) else math.nan


def composed(text: str) -> str:
    """A text in Unicode's composed form (NFC): what prints alike is alike."""
    return unicodedata.normalize("NFC", text)


def some_names(header: Sequence[str]) -> str:
    """The first names of a header, each cut to a length that can be read, for a message."""
    names = [name if len(name) <= 40 else name[:40] + "..." for name in header[:_MOST_NAMES]]
    return ", ".join(names) + (f" and {len(header) - _MOST_NAMES:,} more" if len(header) > _MOST_NAMES else "")


def separator_hint(header: Sequence[str]) -> str:
    """What to do about a table whose columns came as one, as spreadsheets in many countries write it; else ""."""
    for mark, marks in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            return f" Its columns stand between {marks}: save it with commas."
    if len(header) == 1 and "," in header[0]:
        return " Its columns stand between commas: name the file .csv."
    return ""


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as a CSV. A text that a spreadsheet would take for a formula gets an apostrophe before it (OWASP's rule for
    CSV injection); numbers stay as they are."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_plain(cell) for cell in row] for row in rows)
    return text.getvalue()


def _plain(cell: object) -> object:
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return "'" + cell
    return cell


def data_frame(table: str | Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Any:
    """A `pandas.DataFrame` of a CSV's text, of rows, or of columns; ImportError without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_frame: expected pandas, which is not installed. Install it: pip install 'gigapath[train]'."
        ) from error
    return pandas.read_csv(io.StringIO(table)) if isinstance(table, str) else pandas.DataFrame(table)
