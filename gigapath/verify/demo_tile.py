"""The released demo tile against the released tile encoder's vector for it, in each precision.

The forms in which a tile may reach the encoder are written out here with Pillow and NumPy alone, the right one and the
slips that are seen in practice: so a fault of the transform is told from one of the weights, and named.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gigapath.downloads import DOWNLOADS
from gigapath.downloads.digests import digest_of
from gigapath.tile_encoder import TileEncoder
from gigapath.verify.report import FAILED, PASSED, SKIPPED, Array, Check, cosine

# The pair of files belongs to this release; none was published for the other one.
HAS_DEMO = "gigapath"

# Least cosine with the released vector, of which it is not said in which precision it was made.
LEAST_COSINE = {"fp32": 0.9995, "fp16": 0.9995, "bf16": 0.998}

RIGHT = "shorter side to 256 bicubic, centre crop 224"
_MEAN, _STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
_SAME_INPUT = 1e-4  # normalised pixel values; a step of one in 255 is 0.017
_LARGE = 512  # side of the second tile that the transform is tried on


def forms_of(tile: Array) -> dict[str, Array]:
    """A tile uint8 (T, T, 3) as an encoder might get it, float32 (3, 224, 224) each; the right form first."""

    def resized(side: int, filtered: Image.Resampling) -> Array:
        return np.asarray(Image.fromarray(tile).resize((side, side), filtered))

    def normalised(pixels: Array, mean: Array = _MEAN, std: Array = _STD) -> Array:
        return np.asarray(((_centre(pixels).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1))

    right = resized(256, Image.Resampling.BICUBIC)
    half = np.full(3, 0.5, np.float32)
    return {
        RIGHT: normalised(right),
        "a centre crop without the resize": normalised(tile),
        "a bilinear resize for the bicubic one": normalised(resized(256, Image.Resampling.BILINEAR)),
        "a resize to 224 without the crop (crop_pct 1.0)": normalised(resized(224, Image.Resampling.BICUBIC)),
        "red and blue exchanged": normalised(right[..., ::-1]),
        "mean and standard deviation of 0.5": normalised(right, half, half),
        "no normalisation": normalised(right, np.zeros(3, np.float32), np.ones(3, np.float32)),
    }


def _centre(pixels: Array, side: int = 224) -> Array:
    """The centre of a square; black around it where it is smaller."""
    size = len(pixels)
    if size < side:
        before = (side - size) // 2
        pad = (before, side - size - before)
        pixels = np.pad(pixels, (pad, pad, (0, 0)))
        size = side
    start = round((size - side) / 2)
    return pixels[start : start + side, start : start + side]


def check_demo_tile(release: str, encoder: TileEncoder | None, folder: Path) -> Iterator[Check]:
    """Checks of the two files, of the transform, and of the vector in each precision.

    Args:
        release: name of the released pair.
        encoder: its tile encoder, in fp32; None where it is not to be had.
        folder: holds `images/prov_normal_000_1.png` and `.pt`, or the two files themselves.
    """
    if release != HAS_DEMO:
        yield Check("demo tile", SKIPPED, f"no vector was released for {release}.")
        return
    if encoder is None:
        yield Check("demo tile", SKIPPED, "no tile encoder.")
        return
    found: list[Path] = []
    for file in DOWNLOADS["demo-tile"].files:
        places = [folder / file.file, folder / Path(file.file).name]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            names = " and ".join(file.file for file in DOWNLOADS["demo-tile"].files)
            said = f"its files are not at hand: {names} of the published repository. Run gigapath download demo-tile."
            yield Check("demo tile", SKIPPED, said)
            return
        digest = digest_of(path, str(file.digest).partition(":")[0])
        if digest != file.digest:
            said = f"{path.name}: expected {file.digest}, got {digest}. It is not the released file: fetch it again."
            yield Check("demo tile's files", FAILED, said)
            return
        found.append(path)
    tile = np.asarray(Image.open(found[0]).convert("RGB"))
    released = torch.load(found[1], map_location="cpu", weights_only=True).float().numpy().ravel()
    transform = check_transform(encoder, tile)
    yield transform
    yield from _check_vectors(encoder, tile, released, transform.status == FAILED)


def check_transform(encoder: TileEncoder, tile: Array) -> Check:
    """Whether tiles reach the encoder in the right form, tried on the demo tile and on a larger one."""
    what = "tile transform"
    large = np.asarray(Image.fromarray(tile).resize((_LARGE, _LARGE), Image.Resampling.BICUBIC))
    for pixels in (tile, large):
        forms = forms_of(pixels)
        try:
            ours = encoder.transform.batch(pixels[None]).numpy()[0]
        except (ValueError, RuntimeError) as error:
            return Check(what, FAILED, f"it fails on a tile of {len(pixels)} px: {' '.join(str(error).split())}")
        off = {
            name: float(np.abs(ours - form).max()) if ours.shape == form.shape else 9.9 for name, form in forms.items()
        }
        if off[RIGHT] > _SAME_INPUT:
            same = next((name for name, value in off.items() if value <= _SAME_INPUT), None)
            said = f"expected {RIGHT}, got {same or 'something else'} on a tile of {len(pixels)} px."
            return Check(what, FAILED, said, {"largest difference": off[RIGHT]})
    return Check(what, PASSED, f"{RIGHT}: equal to Pillow's, on tiles of {len(tile)} and {_LARGE} px.")


def _check_vectors(encoder: TileEncoder, tile: Array, released: Array, wrong_transform: bool) -> Iterator[Check]:
    if len(released) != encoder.embed_dim:
        said = f"expected a released vector of {encoder.embed_dim}, got one of {len(released)}."
        yield Check("demo tile", FAILED, said)
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
            yield Check(what, FAILED, f"the tile can't be embedded: {' '.join(str(error).split())}")
            continue
        found = cosine(vector, released)
        facts = {"cosine": found, "largest difference": float(np.abs(vector - released).max())}
        facts |= {f"cosine with {name}": value for name, value in likeness.items()}
        if nearest != RIGHT and likeness[nearest] >= LEAST_COSINE["fp32"] > likeness[RIGHT]:
            yield Check(what, FAILED, f"cosine {found:.6f}: the released vector is that of {nearest}.", facts)
        elif likeness[RIGHT] >= LEAST_COSINE["fp32"] and wrong_transform:
            said = f"cosine {found:.6f}; given the pixels as {RIGHT} the encoder has {likeness[RIGHT]:.6f}: the "
            yield Check(what, FAILED, f"{said}transform is at fault, not the weights.", facts)
        elif found < least:
            said = f"cosine {found:.6f} with the released vector, expected {least} or more; no known slip of the "
            yield Check(what, FAILED, f"{said}transform explains it: the weights or the encoder differ.", facts)
        else:
            yield Check(what, PASSED, f"cosine {found:.6f} with the released vector.", facts)
