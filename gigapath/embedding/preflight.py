"""`read_headers`: what a cohort is made of and will cost, from the slides' headers alone; `run_pilot` tiles a few.

Also what is odd about a list of slides before any is opened (the same file twice, ids that may name people), and
whether a TIFF file is as long as its own directories say (no tile is read).
"""

import contextlib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gigapath.cohort.manifest import SlideEntry, find_slides, id_problems
from gigapath.cohort.record import without_paths
from gigapath.cohort.run import RunResult
from gigapath.cohort.status import FINISHED
from gigapath.embedding.options import RunOptions
from gigapath.embedding.slides import TISSUE_SHARE, open_entry
from gigapath.embedding.tiling import tile_cohort
from gigapath.files import sha256_of
from gigapath.machine import available_cores
from gigapath.options import DeviceOptions, option
from gigapath.preprocessing.fast import open_tiff
from gigapath.preprocessing.slide import SAME_SCALE, Slide, SlideError
from gigapath.preprocessing.tiling import TileOptions, plan_grid
from gigapath.progress import Progress
from gigapath.releases import RELEASES

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
    """Indices, ascending, of `count` members (fewer where there are fewer), spread over the strata: each gets one, the
    largest first, then in proportion; within a stratum evenly over its members."""
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


def missing_bytes(path: Path) -> int:
    """How many bytes a TIFF lacks at its end, by the tiles and strips that it lists; 0 where it is whole, or no TIFF. A
    directory that can't be read ends the search: what opens the slide says more about that."""
    try:
        with open_tiff(path) as file:
            pages = [one for page in file.pages for one in (page, *(page.pages or ()))]  # levels in SubIFDs too
            listed = [zip(page.dataoffsets, page.databytecounts, strict=True) for page in pages]
            end = max((start + length for parts in listed for start, length in parts if length), default=0)
            return max(0, int(end) - path.stat().st_size)
    except Exception:  # a broken file ends in a dozen types
        return 0


# Headers wait for the disk more than they compute.
_THREADS_PER_CORE = 4


@dataclass(frozen=True)
class PlanOptions(DeviceOptions):
    """What is wanted beside the headers."""

    tiles_per_second: float | None = option(
        None, "rate of the tile encoder, for hours (default: measured with --tile-encoder)", metavar="X", above=0
    )
    tile_encoder: str | None = option(None, "measure this tile encoder here, by one batch", metavar="NAME")
    pilot: int | None = option(
        None, "tile N slides of all kinds into --out, previews included, and count by them", metavar="N", at_least=1
    )


@dataclass(frozen=True)
class Header:
    """What one slide's header says.

    Attributes:
        bytes: size of its file, and `missing_bytes` what that lacks at its end, by its own directory.
        vendor: OpenSlide's word for the format, or "".
        scanner: the model, where it is given in a known form.
        mpp: microns per level-0 pixel that a run would take (x and y averaged), or None.
        mpp_problem: "missing", "implausible", or what contradicts the figure in words; "" where all is well.
        places: tiles that would fit, tissue or not.
        error: why the slide can't be opened or tiled, or "".
    """

    slide_id: str
    bytes: int = 0
    vendor: str = ""
    scanner: str | None = None
    mpp: float | None = None
    mpp_problem: str = ""
    places: int = 0
    error: str = ""
    missing_bytes: int = 0


@dataclass(frozen=True)
class CohortHeaders:
    """A cohort by its headers: `id_problems` are sentences on ids that a run would refuse, `odd_ids` slide_id -> "a
    name" or "a date", `duplicates` ids of slides whose files are identical; `tissue_share` of the places became tiles
    in the pilot of `piloted` slides, or does as is usual; `max_tiles` the most of a slide, or None."""

    headers: tuple[Header, ...]
    id_problems: tuple[str, ...]
    odd_ids: dict[str, str]
    duplicates: tuple[tuple[str, ...], ...]
    tissue_share: float = TISSUE_SHARE
    piloted: int = 0
    max_tiles: int | None = None

    @property
    def tiles(self) -> int:
        """About how many tiles the cohort has."""
        most = math.inf if self.max_tiles is None else self.max_tiles
        return round(sum(min(most, header.places * self.tissue_share) for header in self.headers))

    @property
    def refused(self) -> int:
        """Slides that a run would refuse as they are."""
        return sum(bool(header.error or header.missing_bytes) for header in self.headers)

    def as_dict(self, tiles_per_second: float | None, seconds: float | None) -> dict[str, Any]:
        """Everything as plain values, for machines."""
        return {
            "slides": len(self.headers),
            "bytes": sum(header.bytes for header in self.headers),
            "refused": self.refused,
            "vendors": dict(Counter(header.vendor or "unknown" for header in self.headers).most_common()),
            "scanners": dict(Counter(header.scanner or "unknown" for header in self.headers).most_common()),
            "native_mpp": {f"{mpp:.2f}": count for mpp, count in self.native_mpp().items()},
            "mpp_problems": {h.slide_id: h.mpp_problem for h in self.headers if h.mpp_problem},
            "unreadable": {h.slide_id: h.error for h in self.headers if h.error},
            "truncated": {h.slide_id: h.missing_bytes for h in self.headers if h.missing_bytes},
            "id_problems": list(self.id_problems),
            "odd_ids": self.odd_ids,
            "duplicates": [list(group) for group in self.duplicates],
            "tiles": self.tiles,
            "tissue_share": self.tissue_share,
            "piloted": self.piloted,
            "tile_embeddings_bytes": {name: self.tiles * release.tile_dim * 4 for name, release in RELEASES.items()},
            "tiles_per_second": tiles_per_second,
            "hours": None if seconds is None else seconds / 3600,
            "headers": [asdict(header) for header in self.headers],
        }

    def native_mpp(self) -> dict[float, int]:
        """mpp of level 0, to two digits -> slides, ascending."""
        counts = Counter(round(header.mpp, 2) for header in self.headers if header.mpp is not None)
        return dict(sorted(counts.items()))


def read_headers(
    inputs: Sequence[str | Path], tiling: TileOptions, *, exclude: Path | None = None
) -> tuple[CohortHeaders, list[SlideEntry]]:
    """Open every header, in parallel; no tile is read. What was found (what is wrong with single slides is part of it),
    and the slides; ValueError or FileNotFoundError where there is none, or a manifest is off."""
    entries = find_slides(inputs, exclude=exclude, check_ids=False)
    with ThreadPoolExecutor(_THREADS_PER_CORE * available_cores(), thread_name_prefix="header") as pool:
        headers = tuple(pool.map(lambda entry: read_header(entry, tiling), entries))
    odd = {entry.slide_id: kind for entry in entries if (kind := odd_id(entry.slide_id))}
    problems, duplicates = tuple(id_problems(entries)), tuple(identical_files(entries))
    return CohortHeaders(headers, problems, odd, duplicates, max_tiles=tiling.max_tiles), entries


def read_header(entry: SlideEntry, tiling: TileOptions) -> Header:
    """What a slide's header says; what is wrong with it becomes part of the answer."""
    header = Header(entry.slide_id)
    with contextlib.suppress(OSError):  # opening it says better what is wrong
        if entry.path.is_file():  # reading a pipe would wait for ever
            header = replace(header, bytes=entry.path.stat().st_size, missing_bytes=missing_bytes(entry.path))
    try:
        with open_entry(entry, tiling) as slide:
            header = replace(header, vendor=slide.vendor, scanner=slide.scanner, mpp_problem=_no_scale(slide))
            header = replace(header, mpp=slide.mpp.mean, mpp_problem=_contradiction(slide))
            grid = plan_grid(
                slide,
                mpp=tiling.mpp,
                tile_size=tiling.tile_size,
                tolerance=tiling.mpp_tolerance,
                allow_upsampling=tiling.allow_upsampling,
            )
        return replace(header, places=grid.columns * grid.rows)
    except (SlideError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"slide {entry.slide_id!r}: ")
        return replace(header, error=without_paths(reason, entry))


def _no_scale(slide: Slide) -> str:
    """The kind of what is wrong where the slide's scale can't be told."""
    try:
        slide.mpp  # noqa: B018
    except SlideError:
        return "missing" if slide.stated_mpp is None else "implausible"
    return ""


def _contradiction(slide: Slide) -> str:
    """What contradicts the scale that is taken, in words."""
    own, stated = slide.mpp, slide.stated_mpp
    if stated is not None and abs(own.mean / stated.mean - 1) > SAME_SCALE:
        return f"{own.source} says {own.mean:.4g}, the file {stated.mean:.4g}"
    if abs(own.x - own.y) > SAME_SCALE * own.mean:
        return f"x {own.x:.4g} and y {own.y:.4g} differ"
    return ""


def run_pilot(
    found: CohortHeaders,
    entries: Sequence[SlideEntry],
    out: Path,
    count: int,
    tiling: TileOptions,
    *,
    watch: Progress | None = None,
    command: Sequence[str] = (),
) -> tuple[CohortHeaders, RunResult]:
    """Tile `count` slides up to their previews, spread over vendors, scales and sites; the headers, which count by the
    share of tissue found then, and how the tiling ended.

    Raises:
        ValueError: no slide can be tiled, ids collide.
        OutputError: the output folder can't be written.
    """
    if found.id_problems:
        raise ValueError(found.id_problems[0])
    pairs = [pair for pair in zip(entries, found.headers, strict=True) if not pair[1].error]
    if not pairs:
        raise ValueError("--pilot: expected slides that can be opened, got none.")
    strata = [f"{h.vendor}|{h.mpp or 0:.2f}|{entry.columns.get('site', '')}" for entry, h in pairs]
    chosen = [pairs[index] for index in stratified(strata, count)]
    result = tile_cohort([entry for entry, _ in chosen], out, tiling, RunOptions(), watch or Progress(), command)
    made = {row["slide_id"]: row for row in result.rows if row["status"] in FINISHED}
    tiles = sum(made[header.slide_id]["tiles"] for _, header in chosen if header.slide_id in made)
    places = sum(header.places for _, header in chosen if header.slide_id in made)
    if not places:
        return found, result
    return replace(found, tissue_share=tiles / places, piloted=len(made)), result
