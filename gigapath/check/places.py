"""Where the tiles lie: inside the slide, each on a cell of its own, on one grid, neighbours together, in order."""

import numpy as np

from gigapath.check.contents import Contents
from gigapath.check.findings import share
from gigapath.features.cells import first_cell, observed_step, row_major
from gigapath.features.data import CELL, FRAMES, GRID, Array
from gigapath.features.scale import all_facts
from gigapath.findings import NOTE, WRONG, Finding

# Fewer gaps between columns and rows than this say nothing about the grid: a few tiles picked from it may all be far
# from each other.
_FEW_GAPS = 4

_MOVED = "The slide encoder gets these tiles at other places: its attention windows and positions are wrong."


def check_places(held: Contents) -> list[Finding]:
    """Look at every coordinate of a file."""
    coords = held.coords
    if coords is None:
        return []
    if coords.ndim == 0 or (held.features is not None and held.features.ndim == 0):
        return [Finding("shapes", "it holds single numbers where embeddings and coordinates should be.")]
    count = len(coords) if held.features is None else len(held.features)
    if coords.shape != (count, 2) or coords.dtype.kind not in "iuf":
        text = f"expected coords {(count, 2)}, got {coords.shape} of {coords.dtype}."
        return [Finding("shapes", text, "Which tile lies where can't be told.")]
    if held.cells is not None and (held.cells.shape != coords.shape or held.cells.dtype.kind not in "iu"):
        text = f"expected whole cells {coords.shape}, got {held.cells.shape} of {held.cells.dtype}."
        return [Finding("shapes", text, "Which tile lies where can't be told.")]
    if count == 0:
        return []
    finite = np.isfinite(coords.astype(np.float64)).all(axis=1)
    if not finite.all():
        text = (
            f"{share(int((~finite).sum()), count)} have coordinates that are not finite, the first in row "
            f"{int(np.argmin(finite))}."
        )
        return [Finding("coords-not-finite", text, "They have no place: the slide encoder refuses the file.")]
    findings = _check_type(coords)
    places = coords.astype(np.float64)
    findings += _check_inside(held, places)
    pitch = _pitch(held)
    if pitch is None:
        seen = observed_step(places)
        hint = "" if seen is None else f"; the closest lie {seen:g} apart"
        text = f"it does not say how far apart its tiles lie{hint}. State it with --tile-size-level0."
        findings.append(Finding("no-step", text, "Without it no tile has a cell.", state=NOTE))
        return findings
    off = _off_grid(places, pitch)
    # A few tiles off the grid are those tiles' fault, many are the distance's; CLAM starts a grid at each contour.
    spaced = _check_spacing(held, places, pitch) if not off.any() or (off.mean() > 0.5 and held.tool != "clam") else []
    if off.any() and not spaced:
        findings.append(_grid_finding(held, off, pitch))
    findings += spaced
    findings += _check_cells(held, places, pitch, on_grid=not off.any())
    fractions = held.tissue_fraction
    if fractions is not None and (fractions.shape != (count,) or (fractions < 0).any() or (fractions > 1).any()):
        findings.append(Finding("tissue-fraction", "its tissue fractions are not one number of 0 to 1 a tile."))
    return findings


def _pitch(held: Contents) -> tuple[float, float] | None:
    """What the file's coordinates are divided by: as it states, else as the published code does."""
    if held.step is None and held.tool == "published":
        return float(CELL), float(CELL)
    return held.step


def _check_type(coords: Array) -> list[Finding]:
    if coords.dtype != np.float16:
        return []
    text = "its coordinates are in half precision, which holds no odd pixel above 2048 and nothing above 65504."
    return [Finding("coords-type", text, "Tiles move by up to 16 pixels, and neighbours fall on one cell.")]


def _check_inside(held: Contents, places: Array) -> list[Finding]:
    facts = all_facts(held.attrs)
    size = facts.get("slide_size") or (facts.get("level0_width"), facts.get("level0_height"))
    negative = (places < 0).any(axis=1)
    if negative.any():
        row = int(np.argmax(negative))
        text = (
            f"{share(int(negative.sum()), len(places))} lie left of or above the slide, the first in row {row} "
            f"at {places[row].tolist()}."
        )
        return [Finding("outside-slide", text, _MOVED)]
    known = isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int | float) for side in size)
    if held.frame != "level0" or not known:
        return []
    # Our tiles lie inside whole; other tools let the last ones hang over.
    room = np.asarray(held.step if held.tool == "gigapath" and held.step else (1, 1), dtype=np.float64)
    beyond = (places + room > np.asarray(size, dtype=np.float64)).any(axis=1)
    if not beyond.any():
        return []
    row = int(np.argmax(beyond))
    swapped = not (places[:, ::-1] + room > np.asarray(size, dtype=np.float64)).any()
    hint = " With x and y exchanged all would lie inside." if swapped else ""
    text = (
        f"{share(int(beyond.sum()), len(places))} lie beyond the slide of {size[0]:g} x {size[1]:g} pixels, the first "
        f"in row {row} at {places[row].tolist()}.{hint}"
    )
    return [Finding("outside-slide", text, _MOVED)]


def _gaps(places: Array, axis: int) -> Array:
    """The distances between neighbouring columns (axis 0) or rows (1) that hold tiles; rounding is no distance."""
    gaps = np.diff(np.unique(places[:, axis]))
    return np.asarray(gaps[gaps > 1])


def _check_spacing(held: Contents, places: Array, pitch: tuple[float, float]) -> list[Finding]:
    """Whether the tiles lie as far apart as the file, or the tool that would read it, takes them to lie."""
    gaps = [_gaps(places, axis) / pitch[axis] for axis in (0, 1)]
    both = np.concatenate(gaps)
    if len(both) < _FEW_GAPS:
        return []
    cells = np.rint(both)
    if (np.abs(both - cells) < 0.02).all() and (cells >= 1).all():
        apart = float(np.gcd.reduce(cells.astype(np.int64)))
    else:
        apart = float(both.min())
    if abs(apart - 1) < 0.02:
        return []
    seen = f"its closest tiles lie {apart * pitch[0]:g} apart, taken as {pitch[0]:g}"
    if apart < 1.5:
        way = "overlap" if apart < 1 else "leave gaps"
        text = f"{seen}: its tiles {way}, or the distance is wrong."
        effect = "Neighbours share a cell or skip one: positions drift by a cell every few tiles."
        return [Finding("pitch", text, effect)]
    stated = held.step is not None
    power = "" if held.frame == "um" else f"level 0 of a {20 * apart:g}x slide used with tile size {pitch[0]:g}"
    looks = f"coordinates look like {power}: " if power and not stated else f"{seen}: "
    text = f"{looks}neighbours are {_number(apart)} cells apart."
    effect = (
        "The slide encoder takes neighbours for strangers: on random weights the cosine with the right embedding was "
        "0.58 at two cells. State the distance with --tile-size-level0, or convert the file."
    )
    return [Finding("neighbours", text, effect)]


def _number(value: float) -> str:
    words = {2.0: "two", 3.0: "three", 4.0: "four"}
    return words.get(value, f"{value:.3g}")


def _off_grid(places: Array, pitch: tuple[float, float]) -> Array:
    """(N,) bool: tiles that are not a whole number of steps from the first column and row; a pixel is rounding."""
    steps = (places - places.min(axis=0)) / pitch
    return np.asarray((np.abs(steps - np.rint(steps)) * pitch > np.maximum(1.0, 1e-3 * np.asarray(pitch))).any(axis=1))


def _grid_finding(held: Contents, off: Array, pitch: tuple[float, float]) -> Finding:
    clam = held.tool == "clam"
    unit = FRAMES.get(held.frame, held.frame)
    text = f"{share(int(off.sum()), len(off))} do not lie on one grid of {pitch[0]:g} x {pitch[1]:g} {unit} with the "
    text += "others (CLAM starts one at each contour)." if clam else "others."
    effect = "Each goes to the nearest cell: up to half a cell off, and two may meet in one."
    return Finding("off-grid", text, effect, NOTE if clam else WRONG)


def _check_cells(held: Contents, places: Array, pitch: tuple[float, float], *, on_grid: bool) -> list[Finding]:
    findings = []
    origin = places.min(axis=0)
    first = first_cell(origin, np.asarray(pitch))
    cells = np.rint((places - origin) / pitch) + first if on_grid else np.floor(places / pitch + 0.5)
    if held.cells is not None:
        stored = held.cells.astype(np.int64)
        moved = (stored - stored[0] != np.rint((places - places[0]) / pitch)).any(axis=1)
        if moved.any():
            text = f"{share(int(moved.sum()), len(places))} have a cell that is not where their coordinates lie."
            findings.append(Finding("cells", text, _MOVED))
        cells = held.cells.astype(np.float64)
    if np.abs(cells).max() >= 2**31:
        return [*findings, Finding("beyond-grid", "its coordinates are absurdly far out.", "No cell is that far.")]
    whole = cells.astype(np.int64)
    unique = len(np.unique(whole, axis=0))
    if unique < len(whole):
        text = f"{share(len(whole) - unique, len(whole))} share a cell with another one at a step of {pitch[0]:g}."
        effect = "Two tiles of one position: the slide encoder can't tell them apart, and readers refuse the file."
        findings.append(Finding("cells-shared", text, effect))
    low, high = int(whole.min()), int(whole.max())
    if low < -1 or high >= GRID:
        text = f"its cells run from {low} to {high}, beyond the slide encoder's 0 to {GRID - 1}."
        findings.append(Finding("beyond-grid", text, "The slide encoder refuses it; the published one wraps around."))
    return [*findings, *_check_order(held, whole)]


def _check_order(held: Contents, cells: Array) -> list[Finding]:
    if len(np.unique(cells, axis=0)) < len(cells) or row_major(cells) is None:
        return []
    by_column = row_major(cells[:, ::-1]) is None
    stored = "column by column" if by_column else "neither by row nor by column"
    ours = held.tool == "gigapath"
    effect = "The slide encoder was trained row by row, and its result depends on the order. "
    effect += "Our readers refuse such a file." if ours else "Ours sorts the tiles first; other readers do not."
    return [Finding("order", f"its tiles are stored {stored}.", effect, WRONG if ours else NOTE)]
