"""The pictures of one slide: a thumbnail, the slide at a few levels, its tiles laid over it, crops of some tiles.

They lie in `report_files/<slide>/`, and `pictures.json` beside them says what they are and what they were made of:
where that still holds, nothing is drawn again. Pixels come from the slide's own levels, never from label or macro. What
lies over a slide has a few pixels for each cell of its grid, clear where there is no tile.

Crops are of the most typical and the most unusual tiles, by the Euclidean distance between a tile's embedding and the
mean of all embeddings of its slide. Rare tissue, folds, ink and blur all lie far away; which of them it is, a person
sees.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.record import hide_paths
from gigapath.features import Tiles
from gigapath.files import output_error, write_bytes_atomic, write_json_atomic
from gigapath.preprocessing.preview import LEAST_WIDTH, PANEL
from gigapath.preprocessing.preview import SIDE as PREVIEW_SIDE
from gigapath.preprocessing.reading import read_tile
from gigapath.preprocessing.slide import Overview, Slide, SlideError, open_slide
from gigapath.report.collecting import Cohort, SlideRow
from gigapath.text import slides_in_words

LARGEST = 2048  # pixels of a side, where cells keep at least LEAST_CELL
LEAST_CELL, MOST_CELL = 3, 32  # pixels of a cell's side
LINE = (37, 92, 235)
FILL_ALPHA = 46


def draw_tiles(tiles: Tiles) -> tuple[bytes, dict[str, Any]]:
    """The outlines of the tiles, faintly filled: a PNG, and where it lies as the page has it."""
    cells = tiles.cells.astype(np.int64)
    cells = cells - cells.min(axis=0)
    columns, rows = (int(value) + 1 for value in cells.max(axis=0))
    side = max(LEAST_CELL, min(MOST_CELL, LARGEST // max(columns, rows)))
    kept = np.zeros((rows + 1, columns + 1), bool)  # with a column and a row of nothing at the end
    kept[cells[:, 1], cells[:, 0]] = True
    inside = kept[:-1, :-1]
    shades = np.kron(inside, np.ones((side, side), np.uint8)).astype(np.uint8)
    shades[::side][np.repeat(inside, side, axis=1)] = 2
    shades[:, ::side][np.repeat(inside, side, axis=0)] = 2
    shades[:, side - 1 :: side][np.repeat(inside & ~kept[:-1, 1:], side, axis=0)] = 2
    shades[side - 1 :: side][np.repeat(inside & ~kept[1:, :-1], side, axis=1)] = 2
    image = Image.fromarray(shades).convert("P")
    image.putpalette(bytes(LINE * 3))
    pitch = tiles.tile_size_level0
    left, top = (int(value) for value in tiles.coords_level0[0] - cells[0] * pitch)
    place = {
        "x": left,
        "y": top,
        "w": columns * pitch[0],
        "h": rows * pitch[1],
        "pixels": [columns * side, rows * side],
    }
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, transparency=bytes((0, FILL_ALPHA, 255)))
    return buffer.getvalue(), place


METHOD = (
    "By the distance of a tile's embedding from the mean of its slide's: typical tiles lie nearest, unusual ones "
    "farthest. The figure is the distance over the slide's median distance."
)
EACH = 6  # typical tiles, and as many unusual ones
CROP_SIDE = 192  # pixels of a crop in the picture of all of them
_ROWS = 4096  # embeddings that are widened at once

FloatArray = npt.NDArray[np.float64]
RGBImage = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pick:
    """One tile to look at.

    Attributes:
        index: its row in the slide's tiles.
        distance: from the slide's mean, in units of the slide's median distance.
    """

    index: int
    distance: float


def distances(features: npt.NDArray[Any]) -> FloatArray:
    """(N,) Euclidean distance of each embedding (N, D) from their mean."""
    mean = features.mean(axis=0, dtype=np.float64)
    out = np.empty(len(features))
    for start in range(0, len(features), _ROWS):
        part = features[start : start + _ROWS].astype(np.float64) - mean
        out[start : start + _ROWS] = np.sqrt(np.einsum("nd,nd->n", part, part))
    return out


def pick_tiles(features: npt.NDArray[Any]) -> tuple[list[Pick], list[Pick]]:
    """(typical, unusual) tiles of embeddings (N, D), no tile in both, the clearest cases first."""
    if len(features) == 0:
        return [], []
    away = distances(features)
    order = np.argsort(away, kind="stable")
    median = float(np.median(away)) or 1.0  # all tiles alike: every distance is 0
    typical = order[: min(EACH, (len(order) + 1) // 2)]
    unusual = order[max(len(order) - EACH, len(typical)) :][::-1]
    typical_picks = [Pick(int(index), float(away[index]) / median) for index in typical]
    return typical_picks, [Pick(int(index), float(away[index]) / median) for index in unusual]


RECORD = "pictures.json"
DRAWN_BY = 2  # raised when what is drawn changes, so that older pictures are drawn again
THUMBNAIL_SIDE = 320
LEAST_LEVEL = 640  # the longer side of the smallest level
QUALITY = 82
_MADE = re.compile(r"level_\d+\.jpg|thumbnail\.jpg|crops\.jpg|tiles\.png|map_[0-9a-f]{10}\.png")
FROM_PREVIEW = "Drawn from the preview: {why}."


@dataclass(frozen=True)
class Base:
    """What a slide looks like, and where that lies.

    Attributes:
        image: (h, w, 3) RGB.
        rectangle_level0: (x, y, w, h) that it covers.
        mpp: microns per level-0 pixel, or None where nobody stated it.
        note: a sentence on where it is from, or "".
    """

    image: RGBImage
    rectangle_level0: tuple[float, float, float, float]
    mpp: float | None
    note: str = ""


def remove_unshown(files: Path, shown: Mapping[str, Collection[str]]) -> None:
    """Remove the pictures of earlier reports that the page does not show any more, and folders that are empty then.

    Only files go whose names this package gives, in folders that hold its record; what else lies there stays.

    Args:
        files: the folder `report_files`.
        shown: folder of a slide -> names of the files that the page shows of it.

    Raises:
        OutputError: a file can't be removed.
    """
    for record in sorted(files.glob(f"*/{RECORD}")):
        folder = record.parent
        if folder.is_symlink() or not _is_ours(record):
            continue
        keep = shown.get(folder.name)
        old = [path for path in folder.iterdir() if _MADE.fullmatch(path.name) and path.name not in (keep or ())]
        try:
            for path in [*old, *([record] if keep is None else [])]:
                path.unlink()
        except OSError as error:
            raise output_error(folder, error) from error
        if keep is None:
            with contextlib.suppress(OSError):  # something of the user's lies in it
                folder.rmdir()


def _is_ours(record: Path) -> bool:
    try:
        return bool({"identity", "pictures"} <= json.loads(record.read_text(encoding="utf-8")).keys())
    except (OSError, ValueError, AttributeError):
        return False


def write_pictures(folder: Path, cohort: Cohort, slide: SlideRow, *, side: int, workers: int = 0) -> dict[str, Any]:
    """Draw what can be drawn of a slide, unless it is there already.

    Args:
        folder: where the pictures go.
        cohort: where the slide's tiles and embeddings are.
        slide: the slide.
        side: the longer side of the largest level, in pixels.
        workers: threads that read the slide.

    Returns:
        plain JSON values: `frame` {x, y, w, h, mpp} in level-0 pixels, `levels` [{file, w, h}] from small to large,
        `thumbnail` {file, w, h}, `tiles` {file, x, y, w, h, pixels}, `crops` {file, typical, unusual} with [x, y, w, h,
        distance] of each, `note`; what could not be drawn is left out.

    Raises:
        OutputError: the folder can't be written.
    """
    entry = cohort.entries.get(slide.slide_id)
    identity = _identity(cohort, slide, entry, side)
    before = _read_record(folder)
    if before is not None and before["identity"] == identity:
        return dict(before["pictures"])
    tiles = cohort.read_tiles(slide.slide_id)
    tiles = tiles if tiles is not None and len(tiles) else None
    held = cohort.read_embeddings(slide.slide_id) if tiles is not None else None
    typical, unusual = pick_tiles(held.features) if held is not None and len(held) == len(tiles or ()) else ([], [])
    opened, why = _open(entry, tiles)
    pictures: dict[str, Any] = {"note": ""}
    try:
        base = None
        if opened is not None:
            try:
                base = _from_slide(opened, side, workers)
            except SlideError:
                why = "its pixels can't be read"
        if base is None:
            base = _from_preview(cohort.folder / "previews" / f"{slide.slide_id}.jpg", tiles, why)
        if base is not None:
            pictures.update(_write_base(folder, base))
        if tiles is not None and base is not None:
            outlines, place = draw_tiles(tiles)
            write_bytes_atomic(folder / "tiles.png", outlines, durable=False)
            pictures["tiles"] = {"file": "tiles.png", **place}
        if tiles is not None and typical:
            drawn = _write_crops(folder, opened, tiles, [*typical, *unusual])
            pictures["crops"] = {
                "file": "crops.jpg" if drawn else None,
                "typical": _places(tiles, typical),
                "unusual": _places(tiles, unusual),
            }
    finally:
        if opened is not None:
            opened.close()
    write_json_atomic(folder / RECORD, {"identity": identity, "pictures": pictures}, durable=False)
    return pictures


def _identity(cohort: Cohort, slide: SlideRow, entry: SlideEntry | None, side: int) -> dict[str, Any]:
    """What the pictures depend on."""
    size = None
    if entry is not None:
        with contextlib.suppress(OSError):
            size = entry.path.stat().st_size
    features = None if cohort.features is None else cohort.features.name
    return {
        "slide": slide.slide_id,
        "status": slide.status,
        "digests": list(slide.digests),
        "features": features,
        "slide_bytes": size,
        "side": side,
        "drawn_by": DRAWN_BY,
    }


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What stands in a slide's folder, where all of it is there; what a power cut takes is drawn again."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        pictures = record["pictures"]
        files = [level["file"] for level in pictures.get("levels", ())]
        files += [pictures[name]["file"] for name in ("thumbnail", "tiles", "crops") if name in pictures]
        whole = all(name is None or (folder / name).stat().st_size for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _open(entry: SlideEntry | None, tiles: Tiles | None) -> tuple[Slide | None, str]:
    """The slide, opened with the scale that its tiles were cut at; None and why it can't be."""
    if entry is None:
        return None, "where the slide lies is not recorded"
    stated = entry.mpp
    if tiles is not None:
        mpp = tiles.attrs.get("mpp_level0")
        stated = float(mpp[0]) if mpp is not None and mpp[0] == mpp[1] else stated
    try:
        slide = open_slide(entry.path, slide_id=entry.slide_id, slide_mpp=stated)
    except FileNotFoundError:
        return None, "the slide's file is not where it was"
    except (ValueError, OSError):
        return None, "the slide's file can't be opened"
    size = None if tiles is None else tiles.attrs.get("slide_size")
    if size is not None and tuple(size) != slide.dimensions:
        slide.close()
        return None, "the slide's file is another than the one that was tiled"
    return slide, ""


def _from_slide(slide: Slide, side: int, workers: int) -> Base:
    """The slide within its bounds, its longer side at most `side` pixels.

    Raises:
        SlideError: its pixels can't be read.
    """
    mpp: float | None
    try:
        mpp_x, mpp_y, mpp = slide.mpp.x, slide.mpp.y, slide.mpp.mean
    except SlideError:  # nobody stated its scale: a picture needs none
        with open_slide(slide.path, slide_id=slide.slide_id, slide_mpp=1.0) as again:
            found = _from_slide(again, side, workers)
        return Base(found.image, found.rectangle_level0, None)
    width, height = slide.bounds[2:]
    overview: Overview = slide.overview(max(width * mpp_x, height * mpp_y) / side, workers=workers)
    h, w = overview.image.shape[:2]
    x, y = overview.origin_level0
    return Base(overview.image, (x, y, w * overview.scale[0], h * overview.scale[1]), mpp)


def _from_preview(path: Path, tiles: Tiles | None, why: str) -> Base | None:
    """The picture in a preview, its caption and margins cut off; None where there is none or its frame is not known."""
    bounds = None if tiles is None else tiles.attrs.get("bounds")
    try:
        pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    if pixels is None or pixels.shape[0] <= PANEL or bounds is None or tiles is None:
        return None
    image = np.asarray(cv2.cvtColor(pixels[:-PANEL], cv2.COLOR_BGR2RGB), np.uint8)
    mpp_x, mpp_y = tiles.attrs.get("mpp_level0") or (1.0, 1.0)
    if image.shape[0] == PREVIEW_SIDE and image.shape[1] == LEAST_WIDTH:  # a narrow slide stands in the middle
        width = max(1, round(PREVIEW_SIDE * bounds[2] * mpp_x / (bounds[3] * mpp_y)))
        left = max(0, (LEAST_WIDTH - width) // 2)
        image = image[:, left : left + width]
    mpp = (float(mpp_x) + float(mpp_y)) / 2 if tiles.attrs.get("mpp_level0") else None
    x, y, w, h = (float(value) for value in bounds)
    return Base(np.ascontiguousarray(image), (x, y, w, h), mpp, FROM_PREVIEW.format(why=why))


def _write_base(folder: Path, base: Base) -> dict[str, Any]:
    """Write a picture at several sizes, each half of the next, and a thumbnail."""
    height, width = base.image.shape[:2]
    steps = [1]
    while max(height, width) / steps[-1] / 2 >= LEAST_LEVEL:
        steps.append(steps[-1] * 2)
    levels = []
    for number, step in enumerate(reversed(steps)):
        size = max(1, round(width / step)), max(1, round(height / step))
        name = f"level_{number}.jpg"
        write_bytes_atomic(folder / name, _jpeg(_shrunk(base.image, size)), durable=False)
        levels.append({"file": name, "w": size[0], "h": size[1]})
    factor = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    write_bytes_atomic(folder / "thumbnail.jpg", _jpeg(_shrunk(base.image, size)), durable=False)
    return {
        "frame": {
            **{side: round(float(value), 2) for side, value in zip("xywh", base.rectangle_level0, strict=True)},
            "mpp": base.mpp,
        },
        "levels": levels,
        "thumbnail": {"file": "thumbnail.jpg", "w": size[0], "h": size[1]},
        "note": base.note,
    }


def _write_crops(folder: Path, slide: Slide | None, tiles: Tiles, picks: Sequence[Pick]) -> bool:
    """Write the picked tiles side by side; False where the slide is not at hand or can't be read."""
    if slide is None:
        return False
    out = np.empty((CROP_SIDE, CROP_SIDE * len(picks), 3), np.uint8)
    for place, pick in enumerate(picks):
        try:
            pixels = read_tile(slide, tiles, pick.index)
        except SlideError:
            return False
        how = cv2.INTER_AREA if pixels.shape[0] > CROP_SIDE else cv2.INTER_CUBIC
        crop = cv2.resize(pixels, (CROP_SIDE, CROP_SIDE), interpolation=how)
        out[:, place * CROP_SIDE : (place + 1) * CROP_SIDE] = crop
    write_bytes_atomic(folder / "crops.jpg", _jpeg(out), durable=False)
    return True


def _places(tiles: Tiles, picks: Sequence[Pick]) -> list[list[float]]:
    """[x, y, w, h, distance] of each tile, in level-0 pixels."""
    width, height = tiles.tile_size_level0
    corners = [tiles.coords_level0[pick.index].tolist() for pick in picks]
    return [[x, y, width, height, round(pick.distance, 2)] for (x, y), pick in zip(corners, picks, strict=True)]


def _shrunk(image: RGBImage, size: tuple[int, int]) -> RGBImage:
    if image.shape[1::-1] == size:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _jpeg(image: RGBImage) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise ValueError(f"report: expected a picture that JPEG can hold, got {image.shape}.")
    return bytes(content.tobytes())


FORMAT = 1
# Stated of a map beside its title, in this order.
STATED = ("check", "model", "trained", "layer", "head", "query", "target", "weight", "normalisation", "note")
OWN_RANGE = "range of this slide"
AGAIN = "Run gigapath map again."
# Nine steps of matplotlib's color maps, for the color bar.
RAMPS = {
    "viridis": (*("#440154", "#472c7b", "#3a528b", "#2c728e", "#20908c", "#28ae7f", "#5ec961", "#addc30", "#fde724"),),
    "PuOr_r": (*("#2d004b", "#5f3a91", "#998fbf", "#cfcee5", "#f7f6f5", "#fdd59f", "#ed9b39", "#bc6109", "#7f3b08"),),
}


@dataclass(frozen=True)
class Sources:
    """What maps of a slide can have been made from, as it is now.

    Attributes:
        slide_id: the slide.
        embedded: name of a folder of tile embeddings -> slide_id -> digest of what is there and whole.
        heads: SHA-256 of the fitted heads at hand; none where the report is of no fine-tuning run.
    """

    slide_id: str
    embedded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()

    def stale(self, made_from: Mapping[str, Any]) -> str:
        """A sentence on why a map is out of date, or "" where it is not or nobody can tell.

        Args:
            made_from: what the map's JSON says of it.
        """
        folder, digest, head = (made_from.get(key) for key in ("features_folder", "features_digest", "head_sha256"))
        if folder is not None and folder in self.embedded:
            now = self.embedded[folder].get(self.slide_id)
            if now is None:
                return f"Out of date: the slide's tile embeddings are no longer there. {AGAIN}"
            if now != digest:
                return f"Out of date: the slide's tiles or embeddings were made anew after this map. {AGAIN}"
        if head is not None and self.heads and head not in self.heads:
            return f"Of another head: none of this run's fitted heads made this map. {AGAIN}"
        return ""


def write_maps(target: Path, source: Path, sources: Sources) -> list[dict[str, Any]]:
    """Put a slide's maps beside its pictures.

    Args:
        target: the slide's folder in `report_files`.
        source: the slide's folder of maps; it may be missing.
        sources: what they can have been made from.

    Returns:
        plain JSON values of each map, those that are out of date last: `title`, `file`, x, y, w, h in level-0 pixels,
        `pixels`, `legend`, `facts`, `stale` (a sentence, or ""), `cohort` (names the slides that share its colors, ""
        where it has its own). A map that is not whole, or whose tiles have no place in level-0 pixels, is left out.
    """
    found = []
    for path in sorted(source.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found.append(_write_map(target, path, sources))
    return sorted(found, key=lambda layer: bool(layer["stale"]))


def notes_on_maps(slides: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Sentences on maps of slides that are out of date, or whose colors can't be compared."""
    notes = []
    stale = [sum(bool(layer["stale"]) for layer in layers) for layers in slides]
    if any(stale):
        count = sum(stale)
        words = "1 map is" if count == 1 else f"{count:,} maps of {slides_in_words(sum(map(bool, stale)))} are"
        notes.append(f"{words} out of date: tiles, embeddings or heads are others now. {AGAIN}")
    shared: dict[str, set[str]] = {}
    for layer in (layer for layers in slides for layer in layers):
        if layer["cohort"] and not layer["stale"]:
            shared.setdefault(layer["title"], set()).add(layer["cohort"])
    for title in sorted(title for title, cohorts in shared.items() if len(cohorts) > 1):
        notes.append(
            f"{title}: these maps come from {len(shared[title])} runs of gigapath map, so a color does not mean the "
            "same on all slides. Give gigapath map all slides at once."
        )
    return notes


def _write_map(target: Path, path: Path, sources: Sources) -> dict[str, Any]:
    stated = json.loads(path.read_text(encoding="utf-8"))
    if stated["format"] != FORMAT:
        raise ValueError(f"{path.name}: expected a map of format {FORMAT}, got {stated['format']!r}.")
    x, y, width, height = (round(value) for value in stated["overlay"]["level0"])
    overlay = (path.parent / stated["files"]["overlay"]).read_bytes()
    name = f"map_{hashlib.sha256(stated['name'].encode() + overlay).hexdigest()[:10]}.png"
    with Image.open(io.BytesIO(overlay)) as cells:  # one pixel a cell: the page draws them larger without smoothing
        size = cells.size
    if not (target / name).is_file():
        write_bytes_atomic(target / name, overlay, durable=False)
    title = stated["title"] + (" (a heuristic)" if stated["heuristic"] and "heuristic" not in stated["title"] else "")
    facts = {key.replace("isation", "ization"): stated.get(key) for key in STATED}
    made_from = stated.get("made_from") or {}
    return {
        "title": hide_paths(title[:1].upper() + title[1:]),
        **{"file": name, "x": x, "y": y, "w": width, "h": height, "pixels": list(size)},
        "legend": _legend(stated["colour"]),
        "facts": {key: _plain(value) for key, value in facts.items() if value not in (None, "")},
        "stale": sources.stale(made_from),
        "cohort": "" if stated["colour"]["scope"] == OWN_RANGE else str(made_from.get("cohort_sha256") or ""),
    }


def _legend(color: Mapping[str, Any]) -> dict[str, Any]:
    legend: dict[str, Any] = {"label": f"{color['label']} ({color['scope']})"}
    if "categories" in color:
        legend["label"] = f"{color['label']}: tiles on this slide"
        legend["items"] = [each for each in color["categories"] if each.get("tiles") != 0]
    elif color.get("colormap") in RAMPS:
        legend |= {"stops": RAMPS[color["colormap"]], "low": color["low"], "high": color["high"]}
    return legend


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else hide_paths(str(value))
