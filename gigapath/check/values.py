"""The embeddings themselves: finite, written, different from tile to tile."""

import hashlib
from collections import Counter

import numpy as np

from gigapath.check.contents import Contents
from gigapath.check.findings import share
from gigapath.features.data import Array
from gigapath.findings import NOTE, WRONG, Finding

# Rows that are looked at at once, so that a check needs no second copy of a large array.
_ROWS = 4096
# Blank tiles of a slide with a constant background can be equal to the last bit; more of them than this share can't.
_DUPLICATES = 0.01
# Below this many tiles a column that stays the same says nothing; a few of them are the encoder's own dead units.
_FEW_TILES = 16
_DEAD_COLUMNS = 0.05


def check_values(held: Contents) -> tuple[list[Finding], str]:
    """Look at every embedding of a file.

    Returns:
        the findings, and a digest that is equal for equal embeddings in any order ("" where there are none).
    """
    if held.kind == "slide embeddings":
        return _check_vectors(held)
    features = held.features
    if features is None:
        return [], ""
    if features.ndim != 2 or features.dtype.kind != "f":
        text = f"expected embeddings (N, D) of floats, got {features.shape} of {features.dtype}."
        return [Finding("shapes", text, "No reader can take them for embeddings of tiles.")], ""
    count = len(features)
    if count == 0:
        return [Finding("no-tiles", "it has no tiles.", "The slide gets no embedding.", state=NOTE)], ""
    rows: list[bytes] = []
    infinite, zero = np.zeros(count, bool), np.zeros(count, bool)
    varies = np.zeros(features.shape[1], bool)
    for start in range(0, count, _ROWS):
        block = np.ascontiguousarray(features[start : start + _ROWS])
        infinite[start : start + _ROWS] = ~np.isfinite(block).all(axis=1)
        zero[start : start + _ROWS] = ~block.any(axis=1)
        varies |= (block != features[0]).any(axis=0)
        rows += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in block]
    digest = hashlib.sha256(b"".join(sorted(rows))).hexdigest()
    findings = []
    if infinite.any():
        findings.append(
            Finding(
                "not-finite",
                f"{share(int(infinite.sum()), count)} have NaN or infinity in their embedding, "
                f"the first in row {int(np.argmax(infinite))}.",
                "Attention carries one NaN to every tile: the slide embedding becomes NaN.",
            )
        )
    if zero.any():
        findings.append(
            Finding(
                "zero-rows",
                f"{share(int(zero.sum()), count)} have an embedding of zeros alone, "
                f"the first in row {int(np.argmax(zero))}.",
                "Such rows were reserved and never written; the slide embedding takes them for tissue.",
            )
        )
    return [*findings, *_check_variety(rows, varies, count)], digest


def _check_variety(rows: list[bytes], varies: Array, count: int) -> list[Finding]:
    alike = Counter(rows)
    if len(alike) == 1 and count > 1:
        return [
            Finding(
                "constant",
                f"all {count:,} tiles have the same embedding.",
                "The encoder saw nothing of the tiles (random weights with a small layer scale do this): the slide "
                "embedding says nothing about the slide.",
            )
        ]
    findings = []
    repeated = count - len(alike)
    if repeated:
        findings.append(
            Finding(
                "duplicated-rows",
                f"{share(repeated, count)} repeat the embedding of another tile to the last bit.",
                "A batch written twice does this, and so do blank tiles: the slide embedding counts one place several "
                "times.",
                state=WRONG if repeated > _DUPLICATES * count else NOTE,
            )
        )
    still = int((~varies).sum())
    if still > _DEAD_COLUMNS * len(varies) and count >= _FEW_TILES:
        findings.append(
            Finding(
                "dead-columns",
                f"{share(still, len(varies), 'columns')} have one value for all tiles.",
                "They add nothing to the slide embedding; an encoder that was cut off or padded does this.",
                state=NOTE,
            )
        )
    return findings


def _check_vectors(held: Contents) -> tuple[list[Finding], str]:
    """A slide's file: each matrix finite, the states as many as the poolings say, one width."""
    if not held.vectors:
        return [Finding("shapes", "it holds no embedding of the slide.", "There is nothing to use.")], ""
    findings = []
    for name, value in held.vectors.items():
        if value.ndim != 2 or value.dtype.kind != "f" or 0 in value.shape:
            findings.append(Finding("shapes", f"expected {name} (rows, D) of floats, got {value.shape}."))
        elif not np.isfinite(value).all():
            findings.append(Finding("not-finite", f"its {name} holds NaN or infinity.", "Nothing can be fitted on it."))
        elif not value.any(axis=1).all():
            findings.append(Finding("zero-rows", f"its {name} has rows of zeros alone.", "They were never written."))
    shapes = {name: value.shape for name, value in held.vectors.items() if name != "tile_mean"}
    states = {shape for name, shape in shapes.items() if name.startswith("states_")}
    widths = {shape[-1] for shape in shapes.values() if shape}
    if len(states) > 1 or len(widths) > 1:
        findings.append(Finding("shapes", f"its states and its default output do not fit together: {shapes}."))
    first = held.vectors.get("tile_mean", next(iter(held.vectors.values())))
    return findings, hashlib.sha256(np.ascontiguousarray(first).tobytes()).hexdigest()
