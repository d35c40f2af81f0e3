"""The official PANDA tile embeddings against slides: tiles per slide, places, and cosines of tiles embedded again.

The published tiling records x and y with the tissue box's y and x added to them (a slip), so each way of reading the
coordinates is tried, and the one under which the embeddings agree is named.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gigapath.downloads import release_of
from gigapath.embedding.slide_encoding import encode_padded
from gigapath.features import Tiles, read_features
from gigapath.preprocessing.slide import Slide, SlideError, open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.tile_encoder import TileEncoder
from gigapath.verify.report import FAILED, PASSED, SKIPPED, Array, Check, cosine

# Tiles of the official files whose counts are published, by the first letters of the slide's id.
OFFICIAL_COUNTS = {"0005f7aa": 459, "000920ad": 212, "001d865e": 1018, "00412139": 249, "006f4d8d": 396}

# Least median cosine; another tool reached 0.954 against these files with tiles of its own.
LEAST_COSINE = 0.9
AS_RECORDED = "as recorded"
BOX = "with the published offset by the tissue box undone"
SWAPPED = "with x and y swapped"

# As published: the level within 0.1 mpp of 0.5 pixel for pixel, a tile kept above a tenth of foreground.
_TILING = TileOptions(tissue="published", mpp_tolerance=0.2)
_SUFFIXES = (".tiff", ".tif", ".svs", ".png")
_BATCH = 16


def check_panda(pairs: Sequence[tuple[Path, Path]], encoder: TileEncoder, release: str, tiles: int) -> Iterator[Check]:
    """One check a slide.

    Args:
        pairs: official file and slide of each, from `find_pairs`.
        encoder: the release's tile encoder.
        release: name of the released pair.
        tiles: most tiles of a slide that are embedded again.
    """
    for features, slide in pairs:
        try:
            yield _check_slide(features, slide, encoder, release, tiles)
        except (ValueError, OSError) as error:
            yield Check(f"PANDA {features.stem[:8]}", FAILED, " ".join(str(error).split()))


def find_pairs(h5_folder: Path, slide_folder: Path, most: int) -> list[tuple[Path, Path]]:
    """The official files `<slide_id>.h5` and their slides that both folders hold, those with published counts first."""
    for folder in (h5_folder, slide_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"--panda: no such folder: {folder}")
    by_id = {path.stem: path for path in sorted(slide_folder.rglob("*")) if path.suffix.lower() in _SUFFIXES}
    pairs = [(file, by_id[file.stem]) for file in sorted(h5_folder.rglob("*.h5")) if file.stem in by_id]
    if not pairs:
        raise ValueError(
            f"--panda: expected slides ({', '.join(_SUFFIXES)}) with the names of the h5 files, found none in common."
        )
    return sorted(pairs, key=lambda pair: pair[0].stem[:8] not in OFFICIAL_COUNTS)[:most]


def _check_slide(features: Path, path: Path, encoder: TileEncoder, release: str, most: int) -> Check:
    what = f"PANDA {features.stem[:8]}"
    held = read_features(features, cells=False)
    known = OFFICIAL_COUNTS.get(features.stem[:8])
    named = held.encoder or held.attrs.get("encoder")
    if named is not None and release_of(str(named)) not in (release, encoder.name):
        said = f"expected features of {release}, got those of {named!r}, whatever their width."
        return Check(what, FAILED, said)
    if held.embed_dim != encoder.embed_dim:
        return Check(what, FAILED, f"expected features of width {encoder.embed_dim}, got {held.embed_dim}.")
    if known is not None and len(held) != known:
        return Check(what, FAILED, f"expected {known} tiles in the official file, got {len(held)}.")
    if not len(held):
        return Check(what, SKIPPED, "no tiles in the official file.")
    with open_slide(path) as slide:
        plan = plan_tiles(slide, _TILING)
        pitch, box = plan.grid.pitch, plan.mask.box_level0
        readings = {AS_RECORDED: held.coords.astype(np.float64)}
        if box is not None and box[0] != box[1]:
            readings[BOX] = readings[AS_RECORDED] + (box[0] - box[1], box[1] - box[0])
        readings[SWAPPED] = readings[AS_RECORDED][:, ::-1]
        rows = np.unique(np.linspace(0, len(held) - 1, most).astype(int))
        medians = {
            name: _median_cosine(slide, coords[rows], held.features[rows], encoder, plan.tiles)
            for name, coords in readings.items()
        }
    best = max(medians, key=lambda name: medians[name])
    share = {name: _share_at_ours(coords, plan.tiles.coords_level0, pitch) for name, coords in readings.items()}
    facts = {
        "official tiles": len(held),
        "our tiles": len(plan.tiles),
        **{f"median cosine {name}": value for name, value in medians.items()},
        **{f"share of centres on our tiles {name}": value for name, value in share.items()},
    }
    figures = (
        f"{len(held)} official tiles, {len(plan.tiles)} of ours; {share[best]:.0%} of them lie on ours, median cosine "
        f"{medians[best]:.4f} at coordinates {best}"
    )
    if medians[best] < LEAST_COSINE:
        where = "the places agree, so these" if max(share.values()) > 0.5 else "these"
        said = f"{figures}, expected {LEAST_COSINE} or more: {where} are features of another encoder than {release}"
        return Check(what, FAILED, f"{said}, or of other slides.", facts)
    if best == SWAPPED:
        return Check(what, FAILED, f"{figures}: x and y are swapped in the file, or here.", facts)
    return Check(what, PASSED, f"{figures}.", facts)


def _median_cosine(slide: Slide, coords: Array, features: Array, encoder: TileEncoder, ours: Tiles) -> float:
    """Median cosine of features with those of the tiles that are read at these level-0 corners (n, 2); 0 for places
    outside of the slide."""
    level, size = ours.level, ours.read_size
    found = np.zeros(len(coords))
    pixels, at = [], []
    for i, (x, y) in enumerate(np.rint(coords).astype(int).tolist()):
        if 0 <= x < slide.dimensions[0] and 0 <= y < slide.dimensions[1]:
            try:
                pixels.append(slide.read(x, y, level, *size))
            except SlideError:
                continue
            at.append(i)
    for first in range(0, len(pixels), _BATCH):
        vectors = encode_padded(np.stack(pixels[first : first + _BATCH]), encoder, _BATCH)
        for i, vector in zip(at[first : first + _BATCH], vectors, strict=True):
            found[i] = cosine(vector, features[i])
    return float(np.median(found))


def _share_at_ours(coords: Array, ours: Array, pitch: tuple[int, int]) -> float:
    """Share of tiles (corners (n, 2)) whose centre lies on one of our tiles."""
    if not len(ours):
        return 0.0
    size = np.asarray(pitch)
    taken = {tuple(cell) for cell in ((ours - ours[0]) // size).tolist()}
    centres = np.floor((coords + size / 2 - ours[0]) / size).astype(int)
    return float(np.mean([tuple(cell) in taken for cell in centres.tolist()]))
