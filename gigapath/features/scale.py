"""What a file of tile embeddings says of its tiles as their encoder got them: pixels, and microns per pixel."""

import json
from typing import Any

from gigapath.features.data import Attrs


def all_facts(attrs: Attrs) -> dict[str, Any]:
    """What the file says of itself, and what the file that it was converted from said."""
    try:
        earlier = json.loads(attrs["converted_attrs"])
    except (KeyError, TypeError, ValueError):  # a file of the tool itself
        earlier = {}
    return {**(earlier if isinstance(earlier, dict) else {}), **attrs}


def tile_pixels(attrs: Attrs, source: str) -> int | None:
    """Side of a tile in pixels, where the file says so.

    Args:
        attrs: all attributes of the file.
        source: the tool that wrote it.
    """
    facts, origin = all_facts(attrs), attrs.get("converted_from", source)
    for name in ("tile_size", "tile_size_px", "requested_tile_size_px", "patch_size"):
        value = facts.get(name)
        # CLAM's and Mussel's patch_size counts pixels of a level, not of the encoder's input.
        if isinstance(value, int | float) and not (name == "patch_size" and origin in ("clam", "mussel")):
            return int(value)
    return None


def tile_mpp(attrs: Attrs) -> float | None:
    """Microns per pixel of a tile, where the file says so."""
    facts = all_facts(attrs)
    value = facts.get("mpp") or facts.get("requested_spacing_um")
    microns, pixels = facts.get("tile_size_um"), facts.get("tile_size_px")
    if value is None and isinstance(microns, int | float) and isinstance(pixels, int | float) and pixels > 0:
        value = microns / pixels
    return float(value) if isinstance(value, int | float) else None
