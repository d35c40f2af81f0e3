"""From what a user names (slide files, folders, manifests) to the list of slides, each with one id; and `--shard I/N`,
one of N shares of about equal work, the same cut for every job of an array."""

import contextlib
import csv
import hashlib
import heapq
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

from gigapath.cohort.status import read_statuses
from gigapath.file_names import name_problem, one_line, quoted_name
from gigapath.files import discard, open_temporary, output_error, real_path
from gigapath.preprocessing.slide import SLIDE_SUFFIXES, slide_id_of
from gigapath.tables import csv_text, plain_number, read_table, separator_hint, some_names

logger = logging.getLogger(__name__)

# A PNG in a folder of slides is a mask or a preview more often than a slide: it is taken when named, not when found.
_FOUND_SUFFIXES = tuple(suffix for suffix in SLIDE_SUFFIXES if suffix != ".png")
_JPEG_SUFFIXES = (".jpeg", ".jpg")
_MANIFEST_SUFFIXES = (".csv", ".tsv")
# What a run leaves in its output folder.
_OUTPUT_FOLDERS = ("tiles", "previews", "features_", "slides_", "runs", "private", "report_files", "maps")
_CONTACT_SHEET = "contact_sheet"
# Bytes of a path and of one name in it on common file systems.
_MAX_PATH, _MAX_PART = 4000, 255
_KNOWN_COLUMNS = ("path", "slide_id", "mpp", "mpp_x", "mpp_y", "mask", "md5")
_SERIES = "SeriesInstanceUID"
_DICOM_HEAD = 1 << 20  # bytes; it stands ahead of everything big (ICC profiles, tables of frames, pixels)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_IDENTITIES = ("patient_id", "site")
_SAME_SCALE = 0.02  # x and y that differ by less are averaged


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a cohort.

    `slide_id` is the name of everything that is written about it, with escapes where `problem` is about it; `path` its
    file, of a DICOM series the largest; `mpp` (microns per level-0 pixel), `mask` and `md5` are what the manifest
    states; `columns` its other columns (patient_id, site, stain, ...) as they are; `original_id` what it was called
    before it took a pseudonym, for `private/` alone; `problem` why it can't be worked on, whatever is in its file: it
    fails with this sentence.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    mask: Path | None = None
    md5: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    original_id: str = ""
    problem: str = ""


def find_slides(
    inputs: Sequence[str | Path], *, exclude: Path | None = None, check_ids: bool = True
) -> list[SlideEntry]:
    """The slides that `inputs` name (files, folders, manifests with a column `path`), in that order; within a folder by
    path.

    A folder is searched with its subfolders; data folders of .mrxs slides, hidden folders and folders that this package
    wrote are not entered. The files of one DICOM series are one slide; archives name them by number alone, so files
    without a suffix are looked into. A slide that two inputs name is taken once. One whose id can't be a file name is
    found with that `problem`, for the run to record. Without `check_ids` ids that collide are not refused:
    `id_problems` tells all of them.

    Raises:
        FileNotFoundError: an input doesn't exist.
        ValueError: there is no slide, a manifest is off, or two slides share an id (both are named).
    """
    entries: list[SlideEntry] = []
    paths = [Path(name) for name in inputs]
    absent = next((path for path in paths if not path.exists()), None)
    if absent is not None:
        raise FileNotFoundError(f"no such slide, folder or manifest: {absent}")
    named = set(_one_of_each_series(path for path in paths if path.is_file()))
    for path in paths:
        if path.is_dir():
            files, pictures = _slides_in(path, exclude)
            found = [_found(file) for file in files]
            if found and pictures:
                words = "1 PNG file is" if pictures == 1 else f"{pictures} PNG files are"
                logger.warning("%s: %s passed over. To take one for a slide, name the file itself.", path, words)
            if not found:
                known = " ".join(suffix[1:] for suffix in _FOUND_SUFFIXES)
                raise ValueError(
                    f"{path}: expected a folder with slides, found none. Recognised: {known}; png where the file "
                    "itself is named."
                )
            entries += found
        elif path.suffix.lower() in _MANIFEST_SUFFIXES:
            entries += read_manifest(path)
        elif path in named:
            entries.append(_found(path))
        elif not path.is_file():
            raise ValueError(f"{path}: expected a slide, a folder or a manifest, got a pipe or a device.")
    once: dict[tuple[Path, str], SlideEntry] = {}
    for entry in entries:  # a folder and a file in it, both named: what repeats an earlier one's file and id is dropped
        once.setdefault((real_path(entry.path), entry.slide_id), entry)
    entries = list(once.values())
    problems = id_problems(entries) if check_ids else []
    if problems:
        raise ValueError(problems[0])
    return entries


def _found(file: Path) -> SlideEntry:
    return _named(SlideEntry(slide_id_of(file), file), "Rename the file, or give it a slide_id in a manifest.")


def _named(entry: SlideEntry, remedy: str) -> SlideEntry:
    """The entry as it is, or with its problem where its id can't be a file name."""
    wanted = name_problem(entry.slide_id)
    if wanted is None:
        return entry
    problem = entry.problem or f"slide id: expected {wanted}. {remedy}"
    return replace(entry, slide_id=quoted_name(entry.slide_id), problem=problem)


def read_manifest(path: Path) -> list[SlideEntry]:
    """The rows of a manifest: `path`, optional `slide_id, mpp` (or `mpp_x, mpp_y`), `mask, md5`; others are kept.

    Relative paths are relative to the manifest. A path may be a folder that holds one slide (a DICOM series). A file
    that doesn't exist is left to the run. ValueError names the row that has no path or an mpp that is no positive
    number.
    """
    table = read_table(path)
    if "path" not in table.columns:
        raise ValueError(
            f"{path.name}: expected a column `path`, got {some_names(table.header)}." + separator_hint(table.header)
        )
    table.filled("path")
    kept = [name for name in table.columns if name not in _KNOWN_COLUMNS and name]
    entries = []
    for index, number in enumerate(table.numbers):
        row = {name: table.columns[name][index] for name in _KNOWN_COLUMNS if name in table.columns}
        for name in ("path", "mask"):  # as the file system has it, which may tell forms of Unicode apart
            if row.get(name):
                row[name] = table.written[name][index]
        # A patient that is written as missing is none; all else is the user's own.
        columns = {name: (table.columns if name in _IDENTITIES else table.written)[name][index] for name in kept}
        where, folder, problem = f"{path.name}: row {number}", path.parent, ""
        for name in ("mask", "path"):
            if row.get(name):
                row[name], wrong = _path_here(name, row[name], folder)
                problem = wrong or problem
        # What no file system takes is looked for nowhere: the name that stands for it is that of no file.
        slide, mask = (folder / (quoted_name(cell) if problem else cell) for cell in (row["path"], row.get("mask", "")))
        if not problem and slide.is_dir():
            found, _ = _slides_in(slide, None)
            if len(found) != 1:
                raise ValueError(f"{where}: expected one slide in the folder {slide}, found {len(found)}.")
            slide = found[0]
        entry = SlideEntry(
            slide_id=row.get("slide_id") or slide_id_of(PureWindowsPath(row["path"]).name if problem else slide),
            path=slide,
            mpp=_scale_of(row, where),
            mask=mask if row.get("mask") else None,
            md5=row.get("md5", "").lower(),
            columns=columns,
            problem=problem,
        )
        entries.append(_named(entry, "Give it another slide_id in the manifest."))
    return entries


def _path_here(name: str, cell: str, folder: Path) -> tuple[str, str]:
    """A path as this system has it, also where Windows' backslashes are in it, and what is wrong with one that no file
    system takes, or that is another system's."""
    got = ""
    if "\0" in cell:
        got = "one with a zero byte"
    elif len(os.fsencode(cell)) > _MAX_PATH or max(map(len, os.fsencode(cell).split(b"/"))) > _MAX_PART:
        got = "one that is too long"
    elif "\\" in cell and not (folder / cell).exists():
        other = PureWindowsPath(cell).as_posix()
        if (folder / other).exists():
            return other, ""
        got = "one with backslashes, as Windows writes it, that leads to no file here"
    problem = f"{name}: expected the path of a file, got {got}. Correct its row in the manifest."
    return cell, problem * bool(got)


def _scale_of(row: Mapping[str, str], where: str) -> float | None:
    """The row's microns per pixel: `mpp`, or the mean of `mpp_x` and `mpp_y` where these agree."""
    given: dict[str, float] = {}
    for name in ("mpp", "mpp_x", "mpp_y"):
        if row.get(name):
            given[name] = plain_number(row[name])
            if not 0 < given[name] < math.inf:
                raise ValueError(
                    f"{where}: expected {name} in microns per pixel, got {row[name][:40]!r}. Write it as a number such "
                    "as 0.5."
                )
    if "mpp" in given or not given:
        return given.get("mpp")
    x, y = given.get("mpp_x"), given.get("mpp_y")
    if x is None or y is None or abs(x - y) > _SAME_SCALE * max(x, y):
        raise ValueError(
            f"{where}: expected mpp_x and mpp_y within {_SAME_SCALE:.0%} of each other, got {x} and {y}. Give one mpp."
        )
    return (x + y) / 2


def _slides_in(folder: Path, exclude: Path | None) -> tuple[list[Path], int]:
    """Slide files below `folder`, sorted, one file for each DICOM series; and how many PNG files there are beside."""
    found = []
    pictures = 0
    seen = set()
    top_folder = real_path(folder)
    excluded = real_path(exclude) if exclude is not None and exclude.exists() else None
    for top, subfolders, files in os.walk(folder, followlinks=True):
        here = real_path(Path(top))
        # What this package wrote: its previews are no slides.
        written = here == excluded or ("slides.csv" in files and {"runs", "private"} <= set(subfolders))
        if here in seen or (written and here != top_folder):  # a link back up ends here too
            subfolders.clear()
            continue
        seen.add(here)
        if written:  # slides and results share the folder
            subfolders[:] = [name for name in subfolders if not name.startswith(_OUTPUT_FOLDERS)]
            files = [name for name in files if not name.startswith(_CONTACT_SHEET)]
        names = {name.lower() for name in files}
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and f"{name.lower()}.mrxs" not in names
        )
        # A .vms slide keeps its pixels in JPEG files beside it.
        keeps_jpegs = any(name.endswith((".vms", ".vmu")) for name in names)
        for name in files:
            part = keeps_jpegs and name.lower().endswith(_JPEG_SUFFIXES)
            pictures += name.lower().endswith(".png") and not name.startswith(".")
            known = name.lower().endswith(_FOUND_SUFFIXES) or _is_dicom(Path(top, name))
            if known and not part and not name.startswith("."):
                found.append(Path(top, name))
    return sorted(_one_of_each_series(found)), pictures


def _one_of_each_series(paths: Iterable[Path]) -> Iterator[Path]:
    """DICOM files of one series become its largest file, which is the full resolution and never a label."""
    series: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        uid = series_uid(path) if path.suffix.lower() == ".dcm" or _is_dicom(path) else None
        if uid is None:
            yield path
        else:
            series.setdefault((path.parent, uid), []).append(path)
    for files in series.values():
        yield min(files, key=lambda file: (-file.stat().st_size, file.name))


def _is_dicom(path: Path) -> bool:
    """Whether a file whose name has no suffix, or ends as a UID does, begins as DICOM's files do."""
    if (path.suffix and not path.suffix[1:].isdigit()) or not path.is_file():  # opening a pipe would wait
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def series_uid(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file, the only value that is taken from it; None where it doesn't say."""
    import pydicom  # where there is a DICOM file
    from pydicom.dataelem import RawDataElement

    try:
        with path.open("rb") as file:
            head = file.read(_DICOM_HEAD)
        if _DEFLATED in head[:1024]:  # unpacking it is not bounded
            return None
        header = pydicom.dcmread(io.BytesIO(head), stop_before_pixels=True, specific_tags=[_SERIES])
        found = header.get_item(_SERIES)  # as it is in the file: converting checks it, and warns with the value
        if not isinstance(found, RawDataElement) or not found.value or len(found.value) < found.length:
            return None
        return found.value.decode("ascii").strip("\0 ") or None
    except Exception:  # a header cut short or broken ends in a dozen types
        return None


def id_problems(entries: Iterable[SlideEntry]) -> list[str]:
    """A sentence for each id that a run would refuse, since two slides have it."""
    owners: dict[str, SlideEntry] = {}
    problems = []
    for entry in entries:
        if entry.slide_id in owners:
            both = f"{one_line(str(owners[entry.slide_id].path))} and {one_line(str(entry.path))}"
            problems.append(
                f"two slides have the id '{entry.slide_id}': {both}. "
                "Give them different ones in a manifest (columns path, slide_id)."
            )
        owners.setdefault(entry.slide_id, entry)
    return problems


SHARDS = "shards"


def take_shard(
    out: Path, verb: str, entries: Sequence[SlideEntry], shard: tuple[int, int], *, tiles: Path, keep: bool = True
) -> list[SlideEntry]:
    """The slides of one share (I, N), in their order.

    The jobs of an array start at different times, and what is known of the slides grows while they run: the cut is read
    from `out/shards/`, or made and (with `keep`) written there by the first job that asks. It holds for these slides,
    this verb and this N; `embed` weighs slides by the tiles that `tile` has found meanwhile. OutputError where it can't
    be written, ValueError where the one that is there has been tampered with.
    """
    number, count = shard
    ids = [entry.slide_id for entry in entries]
    key = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:8]
    path = out / SHARDS / f"{verb}-{count}-{key}.csv"
    if path.exists():
        cut = _read_cut(path)
    else:
        weights = weigh(entries, tiles)
        cut = cut_by_weight(weights, count)
        if keep:
            _write_first(path, cut, weights)
            cut = _read_cut(path)  # another job may have been quicker
    if not cut.keys() >= set(ids):
        raise ValueError(f"{SHARDS}/{path.name}: expected every slide of the cohort. Remove it while no job runs.")
    return [entry for entry in entries if cut[entry.slide_id] == number]


def weigh(entries: Sequence[SlideEntry], tiles: Path) -> dict[str, float]:
    """About how many tiles each slide has: as counted by `tile`, else by the size of its file in the proportion of the
    counted ones, else like the mean of the others."""
    ids = [entry.slide_id for entry in entries]
    statuses = read_statuses(tiles)
    counted = {name: statuses[name].tiles for name in ids if name in statuses and statuses[name].finished}
    sizes: dict[str, int] = {}
    for entry in entries:
        with contextlib.suppress(OSError):
            sizes[entry.slide_id] = entry.path.stat().st_size
    known_bytes = sum(size for name, size in sizes.items() if name in counted)
    per_byte = sum(counted[name] for name in sizes if name in counted) / known_bytes if known_bytes else 1.0
    weights = {name: size * per_byte for name, size in sizes.items()} | counted
    mean = sum(weights.values()) / len(weights) if weights else 1.0
    return {name: float(weights.get(name, mean)) for name in ids}


def largest_first(entries: Sequence[SlideEntry], tiles: Path) -> list[SlideEntry]:
    """Slides in the order in which workers that take one after the other end at about the same time."""
    weights = weigh(entries, tiles)
    return sorted(entries, key=lambda entry: (-weights[entry.slide_id], entry.slide_id))


def cut_by_weight(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """slide_id -> share (1 to `count`): the heaviest first, each to the share that has least so far.

    The heaviest share exceeds the mean by less than one slide. Depends on nothing but the arguments, not their order.
    """
    shares = [(0.0, 0, number) for number in range(1, count + 1)]  # (weight, slides, share)
    cut = {}
    for slide_id in sorted(weights, key=lambda name: (-weights[name], name)):
        weight, slides, number = heapq.heappop(shares)
        cut[slide_id] = number
        heapq.heappush(shares, (weight + weights[slide_id], slides + 1, number))
    return cut


def _read_cut(path: Path) -> dict[str, int]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["slide_id"]: int(row["shard"]) for row in csv.DictReader(file)}


def _write_first(path: Path, cut: Mapping[str, int], weights: Mapping[str, float]) -> None:
    """Write the cut unless another job has been quicker: then its cut is the one that holds."""
    rows = ([slide_id, cut[slide_id], round(weights[slide_id], 1)] for slide_id in sorted(cut))
    temporary, descriptor = open_temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(csv_text([("slide_id", "shard", "weight"), *rows]).encode())
            file.flush()
            os.fsync(descriptor)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        except OSError:  # no hard links here: two jobs that start in the same instant cut equally anyway
            if not path.exists():
                temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        discard(temporary)
