"""Size and scale of the tiles, against each other and against what the named tile encoder was trained on."""

from typing import Any

import numpy as np

from gigapath.check.contents import Contents
from gigapath.downloads import RELEASES, release_of
from gigapath.features.scale import all_facts, tile_mpp, tile_pixels
from gigapath.findings import NOTE, Finding

# The released tile encoders were trained on these.
_TILE_SIZE = 256
_MPP = 0.5
# A tile of this much other scale is no longer what the encoder knows; scanners called "20x" lie within it.
_SCALE = 0.1
# A pitch is a whole number of pixels and mpp are stated with few digits: more than this is a contradiction.
_SAME = 0.02
# Magnifications are names, not measures: a "40x" scan has 0.2265 to 0.2628 microns a pixel.
_SAME_BY_POWER = 0.15


def check_scale(held: Contents) -> list[Finding]:
    """Look at what a file says of its encoder, its tiles' size, their scale and their distance."""
    if held.kind not in ("tile embeddings", "tiles"):
        return []
    findings = _check_encoder(held) if held.kind == "tile embeddings" else []
    return findings + _check_distance(held)


def _check_encoder(held: Contents) -> list[Finding]:
    if held.encoder is None:
        text = "it does not name its tile encoder."
        effect = "GigaPath, UNI2-h and H-optimus are all 1536 wide: of another one the slide encoder makes noise."
        return [Finding("no-encoder", text, effect, state=NOTE)]
    findings = []
    if held.attrs.get("trained") is False:
        text = f"its tile encoder {held.encoder} has random weights."
        findings.append(Finding("untrained", text, "The embeddings are for trying things.", state=NOTE))
    release = RELEASES.get(release_of(held.encoder.removesuffix("-random")))
    if release is None:
        return findings
    width = None if held.features is None or held.features.ndim != 2 else held.features.shape[1]
    if width not in (None, release.tile_dim):
        text = f"it names {held.encoder}, whose embeddings have {release.tile_dim} values; these have {width}."
        findings.append(Finding("width", text, "They are another encoder's: the slide encoder refuses them."))
    pixels, mpp = tile_pixels(held.attrs, held.tool), _stated_mpp(held)
    if pixels is not None and pixels != _TILE_SIZE:
        text = f"its tiles are {pixels} pixels wide, where {held.encoder} was trained on {_TILE_SIZE}."
        effect = "Each embedding sees another piece of tissue than in training, and neighbours lie at another distance."
        findings.append(Finding("tile-size", text, effect))
    if mpp is not None and abs(mpp - _MPP) > _SCALE * _MPP:
        text = f"its tiles have {mpp:.4g} microns a pixel, where {held.encoder} was trained on {_MPP}."
        effect = "Cells look larger or smaller than in training: the embeddings drift, and so does the slide embedding."
        findings.append(Finding("mpp", text, effect))
    return findings


def _stated_mpp(held: Contents) -> float | None:
    """Microns per pixel of a tile; by the magnification where that is all the file says."""
    mpp = tile_mpp(held.attrs)
    power = _positive(all_facts(held.attrs).get("target_magnification"))
    return 10 / power if mpp is None and power is not None else mpp


def _check_distance(held: Contents) -> list[Finding]:
    """Whether the pitch is what tile size and scale make of it."""
    facts, pixels, mpp = all_facts(held.attrs), tile_pixels(held.attrs, held.tool), tile_mpp(held.attrs)
    if held.step is None or held.frame != "level0" or pixels is None:
        return []
    level0 = facts.get("mpp_level0") or facts.get("native_mpp")
    source, target = (_positive(facts.get(f"{name}_magnification")) for name in ("level0", "target"))
    tolerance = _SAME
    if mpp is not None and level0 is not None:
        try:
            expected = pixels * mpp / np.broadcast_to(np.asarray(level0, dtype=np.float64), (2,))
        except (TypeError, ValueError):
            return []
        by = f"{pixels} pixels of {mpp:.4g} microns on a slide of {float(np.mean(level0)):.4g}"
    elif source is not None and target is not None:
        expected, tolerance = np.full(2, pixels * source / target), _SAME_BY_POWER
        by = f"{pixels} pixels at {target:g}x on a slide of {source:g}x"
    else:
        return []
    step = np.asarray(held.step)
    if not np.isfinite(expected).all() or (np.abs(step - expected) <= tolerance * expected).all():
        return []
    text = f"its tiles lie {step[0]:g} level-0 pixels apart, where {by} make {expected[0]:.4g}."
    effect = "Tiles overlap or leave gaps, or the scale is wrong: the encoder saw another magnification than is stated."
    return [Finding("distance", text, effect)]


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None
