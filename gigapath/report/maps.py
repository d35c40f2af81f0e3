"""The maps of a slide, as `gigapath map` writes them (`gigapath.maps.run`), for laying over the slide in the page."""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from gigapath.cohort.record import hide_paths
from gigapath.files import write_bytes_atomic
from gigapath.text import slides_in_words

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
    said = json.loads(path.read_text(encoding="utf-8"))
    if said["format"] != FORMAT:
        raise ValueError(f"{path.name}: expected a map of format {FORMAT}, got {said['format']!r}.")
    x, y, width, height = (round(value) for value in said["overlay"]["level0"])
    overlay = (path.parent / said["files"]["overlay"]).read_bytes()
    name = f"map_{hashlib.sha256(said['name'].encode() + overlay).hexdigest()[:10]}.png"
    with Image.open(io.BytesIO(overlay)) as cells:  # one pixel a cell: the page draws them larger without smoothing
        size = cells.size
    if not (target / name).is_file():
        write_bytes_atomic(target / name, overlay, durable=False)
    title = said["title"] + (" (a heuristic)" if said["heuristic"] and "heuristic" not in said["title"] else "")
    facts = {key: said.get(key) for key in STATED}
    made_from = said.get("made_from") or {}
    return {
        "title": hide_paths(title[:1].upper() + title[1:]),
        **{"file": name, "x": x, "y": y, "w": width, "h": height, "pixels": list(size)},
        "legend": _legend(said["colour"]),
        "facts": {key: _plain(value) for key, value in facts.items() if value not in (None, "")},
        "stale": sources.stale(made_from),
        "cohort": "" if said["colour"]["scope"] == OWN_RANGE else str(made_from.get("cohort_sha256") or ""),
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
