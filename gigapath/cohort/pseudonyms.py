"""`--pseudonymise KEYFILE`: ids that say nothing without the key; who is who stands in `private/` alone."""

import hmac
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from gigapath.cohort.manifest import SlideEntry

# Of the manifest's other columns these are carried through as they are; free text could name somebody.
KEPT_COLUMNS = ("site", "stain")
_PATIENT = "patient_id"
_KEY_BYTES = 16
_DIGITS = 20  # hex: a collision among a million slides has the odds of one in a trillion


def read_key(path: str | Path) -> bytes:
    """The key of pseudonyms, from a file that holds nothing else.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is too short to keep a secret.
    """
    path = Path(path)
    way = "Make one with `head -c 32 /dev/urandom | base64 > KEYFILE`, and keep it apart from the results"
    if not path.is_file():
        raise FileNotFoundError(f"--pseudonymise: expected a file with a key, got no {path.name!r}. {way}.")
    key = path.read_bytes().strip()
    if len(key) < _KEY_BYTES:
        raise ValueError(f"--pseudonymise: expected a key of at least {_KEY_BYTES} bytes, got {len(key)}. {way}.")
    return key


def pseudonym(key: bytes, kind: str, name: str) -> str:
    """The pseudonym of a name: HMAC-SHA256 (RFC 2104), cut; the same for the same key, kind and name."""
    return hmac.new(key, f"{kind}:{name}".encode(), sha256).hexdigest()[:_DIGITS]


def pseudonymised(entries: Sequence[SlideEntry], key: bytes) -> list[SlideEntry]:
    """The slides under pseudonyms, patients too. Every other column but `KEPT_COLUMNS` is left out."""
    found = []
    for entry in entries:
        columns = {name: entry.columns[name] for name in KEPT_COLUMNS if name in entry.columns}
        if entry.columns.get(_PATIENT):
            columns[_PATIENT] = pseudonym(key, "patient", entry.columns[_PATIENT])
        slide_id = pseudonym(key, "slide", entry.slide_id)
        found.append(replace(entry, slide_id=slide_id, original_id=entry.slide_id, columns=columns))
    return found
