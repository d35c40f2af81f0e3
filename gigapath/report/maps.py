"""The maps of a slide, as `gigapath map` writes them (`gigapath.maps.files`), for laying over the slide in the page."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from gigapath.cohort.privacy import hide_paths
from gigapath.files import write_bytes_atomic
from gigapath.report.overlays import Placed, enlarge

FORMAT = 1
# Stated of a map beside its title, in this order.
STATED = ("model", "trained", "layer", "head", "query", "target", "normalisation", "note")
# Nine steps of matplotlib's colour maps, for the colour bar.
RAMPS = {
    "viridis": (*("#440154", "#472c7b", "#3a528b", "#2c728e", "#20908c", "#28ae7f", "#5ec961", "#addc30", "#fde724"),),
    "PuOr_r": (*("#2d004b", "#5f3a91", "#998fbf", "#cfcee5", "#f7f6f5", "#fdd59f", "#ed9b39", "#bc6109", "#7f3b08"),),
}


def write_maps(target: Path, source: Path) -> list[dict[str, Any]]:
    """Put a slide's maps beside its pictures.

    Args:
        target: the slide's folder in `report_files`.
        source: the slide's folder of maps; it may be missing.

    Returns:
        plain JSON values of each map: `title`, `file`, x, y, w, h in level-0 pixels, `pixels`, `legend`, `facts`. A map
        that is not whole, or whose tiles have no place in level-0 pixels, is left out.
    """
    found = []
    for path in sorted(source.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(_write_map(target, path))
    return found


def _write_map(target: Path, path: Path) -> dict[str, Any]:
    said = json.loads(path.read_text(encoding="utf-8"))
    if said["format"] != FORMAT:
        raise ValueError(f"{path.name}: expected a map of format {FORMAT}, got {said['format']!r}.")
    x, y, width, height = (round(value) for value in said["overlay"]["level0"])
    name = f"map_{hashlib.sha256(said['name'].encode()).hexdigest()[:10]}.png"
    with Image.open(path.parent / said["files"]["overlay"]) as cells:
        placed: Placed = enlarge(cells, (x, y, width, height))
    write_bytes_atomic(target / name, placed.png)
    title = said["title"] + (" (a heuristic)" if said["heuristic"] and "heuristic" not in said["title"] else "")
    facts = {key: said.get(key) for key in STATED}
    return {
        "title": hide_paths(title[:1].upper() + title[1:]),
        **placed.to_dict(name),
        "legend": _legend(said["colour"]),
        "facts": {key: _plain(value) for key, value in facts.items() if value not in (None, "")},
    }


def _legend(colour: Mapping[str, Any]) -> dict[str, Any]:
    legend: dict[str, Any] = {"label": f"{colour['label']} (range: {colour['scope']})"}
    if "categories" in colour:
        legend["label"] = colour["label"]
        legend["items"] = colour["categories"]
    elif colour.get("colormap") in RAMPS:
        legend |= {"stops": RAMPS[colour["colormap"]], "low": colour["low"], "high": colour["high"]}
    return legend


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else hide_paths(str(value))
