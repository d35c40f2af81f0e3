"""What a folder says of its slides: status files, tiles, embeddings, records of runs. Nothing is drawn in here.

Of `private/` only the ids of slides and, for opening them, their files are taken; neither paths nor names leave.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.record import RUNS, hide_paths, recorded_paths
from gigapath.cohort.status import STATES, Status, failures_by_kind, read_statuses, slide_row
from gigapath.features import FeatureFileError, TileEmbeddings, Tiles, read_features, read_tiles
from gigapath.features.h5 import open_h5, read_attrs
from gigapath.files import visible_files

# Facts of a run that are worth a line at the foot of the page.
_RUN_FIELDS = ("verb", "started", "outcome", "seconds", "command", "options", "versions", "counts", "facts")


@dataclass(frozen=True)
class SlideRow:
    """One slide as the status files have it.

    Attributes:
        slide_id: its name.
        status: done | no_tissue | failed | stopped | todo, of all stages together.
        tiles: how many.
        error: one sentence on what went wrong, without the slide's name, or "".
        warnings: sentences on what to look at.
        values: the other columns of slides.csv, and the manifest's.
        digests: of the results of each stage, "" where there is none; a picture made of them holds as long as they do.
    """

    slide_id: str
    status: str
    tiles: int = 0
    error: str = ""
    warnings: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """The slides of an output folder.

    Attributes:
        folder: where they lie.
        slides: sorted by id.
        tiles: the folder of tiles, or None.
        features: the folder of tile embeddings that the report goes by, or None.
        embedded: name of each folder of tile embeddings -> slide_id -> digest of what is there and whole.
        slide_folders: folders of slide embeddings.
        entries: slide_id -> the slide's file, where it is recorded.
        runs: records of what was done, oldest first.
    """

    folder: Path
    slides: tuple[SlideRow, ...]
    tiles: Path | None = None
    features: Path | None = None
    embedded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    slide_folders: tuple[Path, ...] = ()
    entries: Mapping[str, SlideEntry] = field(default_factory=dict)
    runs: tuple[Mapping[str, Any], ...] = ()

    def counts(self) -> dict[str, int]:
        """Slides by status, every status named."""
        return {state: sum(slide.status == state for slide in self.slides) for state in STATES}

    def failures(self) -> list[tuple[str, list[str]]]:
        """(reason, ids of the slides that failed alike), the commonest first; the first slide's words stand for all."""
        errors = {slide.slide_id: slide.error for slide in self.slides if slide.error}
        return [(errors[ids[0]], list(ids)) for ids in failures_by_kind(errors).values()]

    def read_tiles(self, slide_id: str) -> Tiles | None:
        """The slide's tiles, from their own file or from that of their embeddings; None where neither can be read."""
        if self.tiles is not None:
            with contextlib.suppress(FileNotFoundError, FeatureFileError):
                return read_tiles(self.tiles / f"{slide_id}.h5")
        held = self.read_embeddings(slide_id)
        return None if held is None else _tiles_of(held)

    def read_embeddings(self, slide_id: str) -> TileEmbeddings | None:
        """The slide's tile embeddings, or None where they can't be read."""
        if self.features is not None:
            with contextlib.suppress(FileNotFoundError, FeatureFileError):
                return read_features(self.features / f"{slide_id}.h5")
        return None


def _tiles_of(held: TileEmbeddings) -> Tiles | None:
    """The tiles of our file of tile embeddings; None where another tool wrote it, which knows less of them."""
    cells, fraction, section, qc = held.cells, held.tissue_fraction, held.section, held.qc
    geometry = {name: held.attrs.get(name) for name in ("level", "read_size", "tile_size", "tile_size_level0", "mpp")}
    if cells is None or fraction is None or section is None or qc is None or None in geometry.values():
        return None
    return Tiles(
        slide_id=held.slide_id,
        coords_level0=held.coords_level0,
        cells=cells,
        tissue_fraction=fraction,
        section=section,
        qc=qc,
        qc_names=held.qc_names,
        attrs=held.attrs,
        **geometry,  # type: ignore[arg-type]
    )


def collect_cohort(folder: Path) -> Cohort | None:
    """What an output folder holds of slides; None where it holds none.

    Of several folders of tile embeddings the fullest one counts, of equally full ones the first by name.
    """
    tiles = folder / "tiles" if (folder / "tiles").is_dir() else None
    of_features = {path: read_statuses(path) for path in _folders(folder, "features_*")}
    of_slides = {path: read_statuses(path) for path in _folders(folder, "slides_*")}
    features = max(of_features, key=lambda path: len(of_features[path]), default=None)
    stages: list[dict[str, Status]] = [read_statuses(tiles)] if tiles else []
    if features is not None:
        stages.append(of_features[features])
        encoder = features.name.removeprefix("features_")
        theirs = [path for path in of_slides if path.name.endswith(f"__{encoder}")]
        stages += [max((of_slides[path] for path in theirs), key=len)] if theirs else []
    elif of_slides:
        stages.append(next(iter(of_slides.values())))
    entries = {entry.slide_id: entry for entry in recorded_paths(folder)}
    ids = sorted({*entries, *(slide_id for stage in stages for slide_id in stage)})
    if not ids:
        return None
    return Cohort(
        folder=folder,
        slides=tuple(_slide(slide_id, stages) for slide_id in ids),
        tiles=tiles,
        features=features,
        embedded={
            path.name: {slide_id: status.digest for slide_id, status in statuses.items() if status.finished}
            for path, statuses in of_features.items()
        },
        slide_folders=tuple(of_slides),
        entries=entries,
        runs=read_runs(folder),
    )


def _folders(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_dir())


def _slide(slide_id: str, stages: Sequence[Mapping[str, Status]]) -> SlideRow:
    statuses = [stage.get(slide_id) for stage in stages]
    row = slide_row(slide_id, statuses)
    own = {"slide_id", "status", "tiles", "error", "warnings"}
    error = str(row["error"]).removeprefix(f"slide {slide_id!r}: ").removeprefix(f"{slide_id}: ")
    return SlideRow(
        slide_id=slide_id,
        status=row["status"],
        tiles=int(row["tiles"]),
        error=hide_paths(error[:1].upper() + error[1:]),
        warnings=tuple(
            dict.fromkeys(hide_paths(text) for status in statuses if status is not None for text in status.warnings)
        ),
        values={name: _plain(value) for name, value in row.items() if name not in own},
        digests=tuple(status.digest if status is not None and status.finished else "" for status in statuses),
    )


def _plain(value: Any) -> Any:
    """A table's cell: a number, or words without paths."""
    if value is None or value == "":
        return None
    return value if isinstance(value, bool | int | float) else hide_paths(str(value))


def read_runs(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The records of runs on a folder, oldest first; one that can't be read is left out."""
    found = []
    for path in sorted((folder / RUNS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append({name: record[name] for name in _RUN_FIELDS if name in record})
    return tuple(found)


def fitted_heads(folder: Path) -> frozenset[str]:
    """SHA-256 of the fitted heads in the output folder of a fine-tuning run, or in those right below a folder."""
    found = set()
    for path in (*folder.glob("fold_*/head.json"), *folder.glob("*/fold_*/head.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(str(json.loads(path.read_text(encoding="utf-8"))["sha256"]))
    return frozenset(found)


def is_trained(folder: Path) -> bool:
    """Whether the embeddings in a folder come from trained weights, as far as its first file says."""
    for path in visible_files(folder, "*.h5")[:1]:
        with contextlib.suppress(FeatureFileError, OSError), open_h5(path) as file:
            return read_attrs(file).get("trained") is not False
    return True
