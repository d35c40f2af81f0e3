"""The released tile encoder: the transform and the vector of the released demo tile, and the official PANDA embeddings.

The forms in which a tile may reach the encoder are written out here with Pillow and NumPy alone, the right one and the
slips that are seen in practice: so a fault of the transform is told from one of the weights, and named.

The published tiling records x and y of PANDA's tiles with the tissue box's y and x added to them (a slip), so each way
of reading the coordinates is tried, and the one under which the embeddings agree is named.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from gigapath.embedding.forward import encode_padded
from gigapath.features import Tiles, read_features
from gigapath.files import digest_of
from gigapath.findings import OK, SKIPPED, Finding
from gigapath.preprocessing.slide import Slide, SlideError, open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.releases import DOWNLOADS, release_of
from gigapath.tile_encoder import TileEncoder

Array = npt.NDArray[Any]

# The pair of files belongs to this release; none was published for the other one.
HAS_DEMO = "gigapath"

# Least cosine with the released vector, of which it is not said in which precision it was made.
LEAST_COSINE = {"fp32": 0.9995, "fp16": 0.9995, "bf16": 0.998}

RIGHT = "shorter side to 256 bicubic, center crop 224"
_MEAN, _STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
_SAME_INPUT = 1e-4  # normalized pixel values; a step of one in 255 is 0.017
_LARGE = 512  # side of the second tile that the transform is tried on

# Tiles of the official files whose counts are published, by the first letters of the slide's id.
OFFICIAL_COUNTS = {"0005f7aa": 459, "000920ad": 212, "001d865e": 1018, "00412139": 249, "006f4d8d": 396}

# Least median cosine; another tool reached 0.954 against these files with tiles of its own.
LEAST_PANDA_COSINE = 0.9
AS_RECORDED = "as recorded"
BOX = "with the published offset by the tissue box undone"
SWAPPED = "with x and y swapped"

# As published: the level within 0.1 mpp of 0.5 pixel for pixel, a tile kept above a tenth of foreground.
_TILING = TileOptions(tissue="published", mpp_tolerance=0.2)
_SUFFIXES = (".tiff", ".tif", ".svs", ".png")
_BATCH = 16


def forms_of(tile: Array) -> dict[str, Array]:
    """A tile uint8 (T, T, 3) as an encoder might get it, float32 (3, 224, 224) each; the right form first."""

    def resized(side: int, filtered: Image.Resampling) -> Array:
        return np.asarray(Image.fromarray(tile).resize((side, side), filtered))

    def normalized(pixels: Array, mean: Array = _MEAN, std: Array = _STD) -> Array:
        return np.asarray(((_center(pixels).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1))

    right = resized(256, Image.Resampling.BICUBIC)
    half = np.full(3, 0.5, np.float32)
    return {
        RIGHT: normalized(right),
        "a center crop without the resize": normalized(tile),
        "a bilinear resize for the bicubic one": normalized(resized(256, Image.Resampling.BILINEAR)),
        "a resize to 224 without the crop (crop_pct 1.0)": normalized(resized(224, Image.Resampling.BICUBIC)),
        "red and blue exchanged": normalized(right[..., ::-1]),
        "mean and standard deviation of 0.5": normalized(right, half, half),
        "no normalization": normalized(right, np.zeros(3, np.float32), np.ones(3, np.float32)),
    }


def _center(pixels: Array, side: int = 224) -> Array:
    """The center of a square; black around it where it is smaller."""
    size = len(pixels)
    if size < side:
        before = (side - size) // 2
        pad = (before, side - size - before)
        pixels = np.pad(pixels, (pad, pad, (0, 0)))
        size = side
    start = round((size - side) / 2)
    return pixels[start : start + side, start : start + side]


def check_demo_tile(release: str, encoder: TileEncoder | None, folder: Path) -> Iterator[Finding]:
    """Checks of the two files, of the transform, and of the vector in each precision.

    Args:
        encoder: its tile encoder, in fp32; None where it is not to be had.
        folder: holds `images/prov_normal_000_1.png` and `.pt`, or the two files themselves.
    """
    if release != HAS_DEMO:
        yield Finding("demo tile", f"no vector was released for {release}.", state=SKIPPED)
        return
    if encoder is None:
        yield Finding("demo tile", "no tile encoder.", state=SKIPPED)
        return
    found: list[Path] = []
    for file in DOWNLOADS["demo-tile"].files:
        places = [folder / file.file, folder / Path(file.file).name]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            names = " and ".join(file.file for file in DOWNLOADS["demo-tile"].files)
            text = f"its files are not at hand: {names} of the published repository. Run gigapath download demo-tile."
            yield Finding("demo tile", text, state=SKIPPED)
            return
        digest = digest_of(path, str(file.digest).partition(":")[0])
        if digest != file.digest:
            text = f"{path.name}: expected {file.digest}, got {digest}. It is not the released file: fetch it again."
            yield Finding("demo tile's files", text)
            return
        found.append(path)
    tile = np.asarray(Image.open(found[0]).convert("RGB"))
    released = torch.load(found[1], map_location="cpu", weights_only=True).float().numpy().ravel()
    transform = check_transform(encoder, tile)
    yield transform
    yield from _check_vectors(encoder, tile, released, transform.wrong)


def check_transform(encoder: TileEncoder, tile: Array) -> Finding:
    """Whether tiles reach the encoder in the right form, tried on the demo tile and on a larger one."""
    what = "tile transform"
    large = np.asarray(Image.fromarray(tile).resize((_LARGE, _LARGE), Image.Resampling.BICUBIC))
    for pixels in (tile, large):
        forms = forms_of(pixels)
        try:
            ours = encoder.transform.batch(pixels[None]).numpy()[0]
        except (ValueError, RuntimeError) as error:
            return Finding(what, f"it fails on a tile of {len(pixels)} px: {' '.join(str(error).split())}")
        off = {
            name: float(np.abs(ours - form).max()) if ours.shape == form.shape else 9.9 for name, form in forms.items()
        }
        if off[RIGHT] > _SAME_INPUT:
            same = next((name for name, value in off.items() if value <= _SAME_INPUT), None)
            text = f"expected {RIGHT}, got {same or 'something else'} on a tile of {len(pixels)} px."
            return Finding(what, text, facts={"largest difference": off[RIGHT]})
    return Finding(what, f"{RIGHT}: equal to Pillow's, on tiles of {len(tile)} and {_LARGE} px.", state=OK)


def _check_vectors(encoder: TileEncoder, tile: Array, released: Array, wrong_transform: bool) -> Iterator[Finding]:
    if len(released) != encoder.embed_dim:
        text = f"expected a released vector of {encoder.embed_dim}, got one of {len(released)}."
        yield Finding("demo tile", text)
        return
    forms = forms_of(tile)
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack(list(forms.values()))).to(encoder.device)
        by_form = dict(zip(forms, encoder.model(batch).float().cpu().numpy(), strict=True))
    likeness = {name: cosine(vector, released) for name, vector in by_form.items()}
    nearest = max(likeness, key=lambda name: likeness[name])
    precisions = ("fp32", "fp16", "bf16") if encoder.device.type == "cuda" else ("fp32", "bf16")
    for precision in precisions:
        what, least = f"demo tile, {precision}", LEAST_COSINE[precision]
        try:
            vector = dataclasses.replace(encoder, precision=precision).encode(tile[None])[0]
        except (ValueError, RuntimeError) as error:
            yield Finding(what, f"the tile can't be embedded: {' '.join(str(error).split())}")
            continue
        found = cosine(vector, released)
        facts = {"cosine": found, "largest difference": float(np.abs(vector - released).max())}
        facts |= {f"cosine with {name}": value for name, value in likeness.items()}
        if nearest != RIGHT and likeness[nearest] >= LEAST_COSINE["fp32"] > likeness[RIGHT]:
            yield Finding(what, f"cosine {found:.6f}: the released vector is that of {nearest}.", facts=facts)
        elif likeness[RIGHT] >= LEAST_COSINE["fp32"] and wrong_transform:
            text = f"cosine {found:.6f}; given the pixels as {RIGHT} the encoder has {likeness[RIGHT]:.6f}: the "
            yield Finding(what, f"{text}transform is at fault, not the weights.", facts=facts)
        elif found < least:
            text = f"cosine {found:.6f} with the released vector, expected {least} or more; no known slip of the "
            yield Finding(what, f"{text}transform explains it: the weights or the encoder differ.", facts=facts)
        else:
            yield Finding(what, f"cosine {found:.6f} with the released vector.", state=OK, facts=facts)


def check_panda(
    pairs: Sequence[tuple[Path, Path]], encoder: TileEncoder, release: str, tiles: int
) -> Iterator[Finding]:
    """One check a slide."""
    for features, slide in pairs:
        try:
            yield _check_slide(features, slide, encoder, release, tiles)
        except (ValueError, OSError) as error:
            yield Finding(f"PANDA {features.stem[:8]}", " ".join(str(error).split()))


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


def _check_slide(features: Path, path: Path, encoder: TileEncoder, release: str, most: int) -> Finding:
    what = f"PANDA {features.stem[:8]}"
    held = read_features(features, cells=False)
    known = OFFICIAL_COUNTS.get(features.stem[:8])
    named = held.encoder or held.attrs.get("encoder")
    if named is not None and release_of(str(named)) not in (release, encoder.name):
        text = f"expected features of {release}, got those of {named!r}, whatever their width."
        return Finding(what, text)
    if held.embed_dim != encoder.embed_dim:
        return Finding(what, f"expected features of width {encoder.embed_dim}, got {held.embed_dim}.")
    if known is not None and len(held) != known:
        return Finding(what, f"expected {known} tiles in the official file, got {len(held)}.")
    if not len(held):
        return Finding(what, "no tiles in the official file.", state=SKIPPED)
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
        **{f"share of centers on our tiles {name}": value for name, value in share.items()},
    }
    figures = (
        f"{len(held)} official tiles, {len(plan.tiles)} of ours; {share[best]:.0%} of them lie on ours, median cosine "
        f"{medians[best]:.4f} at coordinates {best}"
    )
    if medians[best] < LEAST_PANDA_COSINE:
        where = "the places agree, so these" if max(share.values()) > 0.5 else "these"
        text = (
            f"{figures}, expected {LEAST_PANDA_COSINE} or more: {where} are features of another encoder than {release}"
        )
        return Finding(what, f"{text}, or of other slides.", facts=facts)
    if best == SWAPPED:
        return Finding(what, f"{figures}: x and y are swapped in the file, or here.", facts=facts)
    return Finding(what, f"{figures}.", state=OK, facts=facts)


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
    """Share of tiles (corners (n, 2)) whose center lies on one of our tiles."""
    if not len(ours):
        return 0.0
    size = np.asarray(pitch)
    taken = {tuple(cell) for cell in ((ours - ours[0]) // size).tolist()}
    centers = np.floor((coords + size / 2 - ours[0]) / size).astype(int)
    return float(np.mean([tuple(cell) in taken for cell in centers.tolist()]))


def cosine(a: Array, b: Array) -> float:
    """Cosine of two arrays taken as vectors, in float64; 0 where one is zero or not finite."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if 0 < length < np.inf else 0.0
