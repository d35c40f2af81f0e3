"""Names of files: slide ids that are fit for one, and what stands for those that are not. No disk is touched here."""

import hashlib
import re

# A file name holds 255 bytes on common file systems; the slide's share leaves room for suffixes and `.partial`.
MAX_NAME_BYTES = 180
# Of a longer name so much is shown, and so many digits of its digest.
_QUOTED_BYTES, _QUOTED_DIGITS = 100, 16
FORMULA_MARKS = "=+-@"
_LINES_UP = re.compile(r"(\x1b\[A)+")
_TURNING = "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
_COMMANDS = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_TURNING}]")


def safe_name(slide_id: str) -> str:
    """Check that a slide's id can be a file name, and return it unchanged.

    Ids are never altered: what would leave the output folder, hide in it or break a table raises ValueError.
    """
    wanted = name_problem(slide_id)
    if wanted is not None:
        shown = slide_id if len(slide_id) <= 60 else slide_id[:60] + "..."
        raise ValueError(f"slide id: expected {wanted}, got {shown!r}. Give slide_id in a manifest.")
    return slide_id


def name_problem(slide_id: str) -> str | None:
    """What an id would have to be, where it can't be a file name as it is; else None."""
    if not slide_id or slide_id != slide_id.strip():
        return "a name that is not empty and has no space at its ends"
    if slide_id in (".", ".."):
        return "a name other than . and .., which mean folders"
    if "/" in slide_id or "\\" in slide_id:
        return "a name without slashes"
    if any(_is_control(character) for character in slide_id):
        return "a name without control characters such as line ends, and without marks that turn text around"
    if slide_id.startswith((".", "~$")) or slide_id.endswith(".tmp"):  # `files.is_hidden` would leave its files out
        return "a name that hides no file: one that does not begin with . or ~$ nor end in .tmp"
    if slide_id[0] in FORMULA_MARKS:
        return f"a name that does not begin with {' '.join(FORMULA_MARKS)}, which spreadsheets take for a formula"
    try:
        too_long = len(slide_id.encode("utf-8")) > MAX_NAME_BYTES
    except UnicodeEncodeError:
        return "a name in valid UTF-8"
    return f"a name of at most {MAX_NAME_BYTES} bytes" if too_long else None


def quoted_name(name: str) -> str:
    """A name that `safe_name` refuses, with escapes as Python writes them: fit for a file's name and a line of a table.

    Different names stay different, and none becomes one that `safe_name` takes: those have no backslash. A long name is
    cut, and ends in a digest of the whole.
    """
    start, stop = len(name) - len(name.lstrip()), len(name.rstrip())
    if name.startswith((".", "~$")) or name[:1] in FORMULA_MARKS:
        start = max(start, 1)
    if name.endswith(".tmp"):
        stop = min(stop, len(name) - 1)
    quoted = "".join(
        _escape(character) if not start <= index < stop or character in "/\\" or _breaks_lines(character) else character
        for index, character in enumerate(name)
    )
    if len(quoted.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_QUOTED_DIGITS]
        quoted = quoted.encode()[:_QUOTED_BYTES].decode("utf-8", "ignore").rstrip() + "\\..." + digest
    return quoted or "\\empty"


def plain_name(words: str) -> str:
    """Words such as an encoder's name as a part of a file's name; different words may give the same."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", words)


def folder_name(slide_id: str) -> str:
    """A folder name that every file system and every address takes, one for each slide id."""
    plain = plain_name(slide_id).strip(".")[:80]
    if plain == slide_id:
        return plain
    return f"{plain}-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"


def one_line(text: str) -> str:
    """A text, such as a path, with escapes in place of line ends, other control characters and what is no UTF-8."""
    return "".join(_escape(character) if _breaks_lines(character) else character for character in text)


def for_terminal(text: str) -> str:
    """A text with escapes in place of what a terminal would take for commands, or what turns text around.

    Line ends and tabs stay, and what bars of progress move about with: a carriage return in front, or nothing but the
    sequence for a line up. The escapes are JSON's, so that a document stays one.
    """
    if _LINES_UP.fullmatch(text):
        return text
    front, rest = ("\r", text[1:]) if text.startswith("\r") else ("", text)
    return front + _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", rest)


def _is_control(character: str) -> bool:
    """C0 and C1 controls, line separators, and marks by which Unicode overrides the direction of writing."""
    number = ord(character)
    return number < 32 or 127 <= number < 160 or character in _TURNING


def _breaks_lines(character: str) -> bool:
    return _is_control(character) or "\ud800" <= character <= "\udfff"  # the latter is a byte of no UTF-8


def _escape(character: str) -> str:
    known = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    number = ord(character)
    return known.get(character) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")
