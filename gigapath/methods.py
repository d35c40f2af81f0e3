"""The methods paragraph of a paper, from the status files and run records of an output folder, with BibTeX.

Everything that is said comes from what was recorded beside the results; where slides differ, every value is said with
the number of its slides.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gigapath.cohort.progress import failures_by_kind
from gigapath.cohort.record import RUNS
from gigapath.cohort.status import Status, read_statuses
from gigapath.downloads import RELEASES
from gigapath.features.h5 import open_h5, read_attrs
from gigapath.preprocessing.masks import METHODS
from gigapath.preprocessing.reading import filter_name
from gigapath.text import without_name

PAPER = """@article{xu2024gigapath,
  title={A whole-slide foundation model for digital pathology from real-world data},
  author={Xu, Hanwen and Usuyama, Naoto and Bagga, Jaspreet and Zhang, Sheng and Rao, Rajesh and Naumann, Tristan and \
Wong, Cliff and Gero, Zelalem and González, Javier and Gu, Yu and Xu, Yanbo and Wei, Mu and Wang, Wenhui and \
Ma, Shuming and Wei, Furu and Yang, Jianwei and Li, Chunyuan and Gao, Jianfeng and Rosemon, Jaylen and Bower, Tucker \
and Lee, Soohee and Weerasinghe, Roshanthi and Wright, Bill J. and Robicsek, Ari and Piening, Brian and \
Bifulco, Carlo and Wang, Sheng and Poon, Hoifung},
  journal={Nature},
  year={2024},
  publisher={Nature Publishing Group UK London}
}"""
_BIBTEX = {
    "xu2024gigapath": PAPER,
    "gigapath_open": "@software{gigapath_open,\n  title={gigapath: Prov-GigaPath in the open},\n"
    "  author={{The gigapath maintainers}},\n  version={VERSION},\n  license={Apache-2.0}\n}",
    "goode2013openslide": "@article{goode2013openslide,\n"
    "  title={OpenSlide: A vendor-neutral software foundation for digital pathology},\n"
    "  author={Goode, Adam and Gilbert, Benjamin and Harkes, Jan and Jukic, Drazen and Satyanarayanan, Mahadev},\n"
    "  journal={Journal of Pathology Informatics},\n  volume={4},\n  pages={27},\n  year={2013}\n}",
    "otsu1979threshold": "@article{otsu1979threshold,\n"
    "  title={A threshold selection method from gray-level histograms},\n  author={Otsu, Nobuyuki},\n"
    "  journal={IEEE Transactions on Systems, Man, and Cybernetics},\n  volume={9},\n  number={1},\n"
    "  pages={62--66},\n  year={1979}\n}",
    "ding2023longnet": "@article{ding2023longnet,\n"
    "  title={LongNet: Scaling Transformers to 1,000,000,000 Tokens},\n"
    "  author={Ding, Jiayu and Ma, Shuming and Dong, Li and Zhang, Xingxing and Huang, Shaohan and Wang, Wenhui and "
    "Zheng, Nanning and Wei, Furu},\n  journal={arXiv preprint arXiv:2307.02486},\n  year={2023}\n}",
}
_RULES = {
    "otsu": "by Otsu's threshold [otsu1979threshold] on the stain of an overview at about 8 microns per pixel, from "
    "which transparent, pure black and pen-coloured pixels were left out",
    "published": "by the published rule (pixels of mean luminance below Otsu's threshold [otsu1979threshold] over the "
    "lowest level)",
    "none": "by no rule: every whole tile was kept",
}

Groups = list[tuple[Any, int]]


@dataclass(frozen=True)
class Methods:
    """What can be said of an output folder.

    Attributes:
        paragraphs: of the methods section; works are cited as [key].
        cautions: what a reader must be told plainly: stand-ins, random weights, mixed settings, unfinished slides.
        bibtex: the entries of the works that are cited.
    """

    paragraphs: list[str]
    cautions: list[str]
    bibtex: list[str]


def methods(folder: Path | str) -> Methods:
    """Write the methods of an output folder of `gigapath tile` or `gigapath embed`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it was made by a run.
    """
    folder = Path(folder)
    tiles = read_statuses(folder / "tiles")
    features = {path: read_statuses(path) for path in sorted(folder.glob("features_*")) if path.is_dir()}
    slides = {path: read_statuses(path) for path in sorted(folder.glob("slides_*")) if path.is_dir()}
    stages = [tiles, *features.values(), *slides.values()]
    if not any(stages):
        raise FileNotFoundError(
            f"{folder}: expected the output folder of gigapath tile or embed, found no status file."
        )
    records = _records(folder)
    cautions: list[str] = []
    facts = _tile_facts(tiles, features)
    every = [
        _cohort(stages, facts),
        _tiling(facts, cautions),
        *(_tile_encoder(path, statuses, records, cautions) for path, statuses in features.items() if statuses),
        *(_slide_encoder(path, statuses, records, cautions) for path, statuses in slides.items() if statuses),
        _software(records, cautions),
    ]
    paragraphs = list(dict.fromkeys(every))  # two encoders without a slide encoder each say so once
    warned = {slide_id: " ".join(fact.get("warnings") or ()) for slide_id, fact in facts.items()}
    for sentence, ids in failures_by_kind({slide_id: text for slide_id, text in warned.items() if text}).items():
        cautions.append(f"{_slides(len(ids))} ({ids[0]}{', ...' * (len(ids) > 1)}): {sentence}")
    unfinished = [status for stage in stages for status in stage.values() if status.status in ("stopped", "todo")]
    if unfinished:
        cautions.append(f"{_slides(len({status.slide_id for status in unfinished}))} not finished: run it to the end.")
    text = " ".join(paragraphs)
    keys = [key for key in _BIBTEX if f"[{key}]" in text]
    version = max((str(record.get("versions", {}).get("gigapath", "")) for record in records), default="")
    bibtex = [_BIBTEX[key].replace("VERSION", version) for key in keys]
    return Methods([paragraph for paragraph in paragraphs if paragraph], cautions, bibtex)


def _records(folder: Path) -> list[dict[str, Any]]:
    """The run records that can be read, oldest first."""
    found = []
    for path in sorted((folder / RUNS).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # cut short or foreign: the results speak for themselves
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _tile_facts(
    tiles: Mapping[str, Status], features: Mapping[Path, Mapping[str, Status]]
) -> dict[str, dict[str, Any]]:
    """What was recorded of each slide's tiles: from their status, else (`--tiles` of another folder) from the file."""
    if tiles:
        return {
            slide_id: {
                **status.identity,
                "target": status.identity.get("mpp"),
                **status.facts,
                "tiles": status.tiles,
                "warnings": status.warnings,
            }
            for slide_id, status in tiles.items()
            if status.status == "done"
        }
    found: dict[str, dict[str, Any]] = {}
    for folder, statuses in features.items():
        for slide_id, status in statuses.items():
            path = folder / f"{slide_id}.h5"
            if status.status == "done" and slide_id not in found and path.is_file():
                with open_h5(path) as file:
                    attrs = read_attrs(file)
                read, scale = attrs.get("read_size") or (None, None), attrs.get("mpp_level0") or (None, None)
                named = {"tissue": attrs.get("tissue_method"), "target": attrs.get("mpp_target")}
                sizes = {"read_width": read[0], "read_height": read[1], "mpp_x": scale[0], "mpp_y": scale[1]}
                found[slide_id] = {**attrs, **named, **sizes, "tiles": status.tiles}
    return found


def _cohort(stages: Sequence[Mapping[str, Status]], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """How many slides there were, of which scanners, which were left out and why."""
    latest: dict[str, Status] = {}
    for stage in stages:
        for slide_id, status in stage.items():
            if slide_id not in latest or latest[slide_id].finished:
                latest[slide_id] = status
    left_out: Counter[str] = Counter()
    for slide_id, status in latest.items():
        if status.status == "no_tissue" or any(stage.get(slide_id, status).status == "no_tissue" for stage in stages):
            left_out["no tissue was found"] += 1
        elif status.status == "failed":
            left_out[_reason(status)] += 1
    kept = {slide_id: fact for slide_id, fact in facts.items() if latest[slide_id].status == "done"}
    counts = sorted(int(fact["tiles"]) for fact in kept.values())
    text = f"We processed {_slides(len(latest))}"
    vendors = _grouped(fact.get("vendor") for fact in kept.values())
    if vendors and vendors[0][0] is not None:
        text += f" ({_listed(vendors, str)})"
    scale = [float(fact["mpp_x"]) for fact in kept.values() if fact.get("mpp_x")]
    if scale:
        text += f" with a native resolution of {_range(scale)} microns per pixel"
        sources = _grouped(fact.get("mpp_source") for fact in kept.values())
        text += f" (from {_listed(sources, str)})"
    text += "."
    if left_out:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common())
        text += f" {_slides(sum(left_out.values()))} {_were(sum(left_out.values()))} excluded: {reasons}."
    if counts:
        text += f" {_slides(len(counts))} remained, with {sum(counts):,} tiles"
        text += (
            f" (median {median(counts):,.0f}, range {counts[0]:,} to {counts[-1]:,} a slide)." if counts[1:] else "."
        )
    return text


def _reason(status: Status) -> str:
    """Why a slide failed, without its id, so that equal reasons count together."""
    text = status.error.removeprefix(f"slide {status.slide_id!r}: ")
    text = without_name(text, status.slide_id, "the slide")
    text = re.sub(r"tile \d+ of \d+ \([^)]*\)", "a tile", text)
    return text.split(". ")[0].rstrip(".") or "no reason was recorded"


def _tiling(facts: Mapping[str, Mapping[str, Any]], cautions: list[str]) -> str:
    if not facts:
        return ""
    rows = list(facts.values())
    size = _said("tile size", (fact.get("tile_size") for fact in rows), cautions, lambda v: f"{v} x {v}")
    target = _said("resolution", (fact.get("target") for fact in rows), cautions, lambda v: f"{v:g}")
    text = f"Slides were cut into non-overlapping tiles of {size} pixels at {target} microns per pixel"
    real = [float(fact["mpp"]) for fact in rows if fact.get("mpp")]
    text += f" (effective {_range(real)})" if real else ""
    text += ", on a grid anchored at the corner of the scanned area whose pitch is a whole number of level-0 pixels."
    filters = Counter(
        filter_name((int(fact["read_width"]), int(fact["read_height"])), int(fact["tile_size"]))
        for fact in rows
        if fact.get("read_width") and fact.get("read_height") and fact.get("tile_size")
    )
    tolerance = _said(
        "mpp tolerance", (fact.get("mpp_tolerance") for fact in rows), cautions, lambda v: f"{100 * float(v):g} %"
    )
    if filters["none"]:
        text += f" A level within {tolerance} of the target was read pixel for pixel ({_slides(filters.pop('none'))})."
    for name, count in filters.most_common():
        words = {"cv2-area": "averaging over areas", "cv2-cubic": "cubic interpolation"}
        how = " and ".join(words.get(part, part) for part in name.split("+"))
        text += f" Tiles of {_slides(count)} were resampled from another level by {how}."
    rule = _said("tissue rule", (fact.get("tissue") for fact in rows), cautions, _rule)
    share = _said("share of tissue", (fact.get("min_tissue") for fact in rows), cautions, lambda v: f"{100 * v:g} %")
    text += f" Tissue was found {rule}"
    limits = [float(fact["tissue_threshold"]) for fact in rows if fact.get("tissue_threshold") is not None]
    text += f" (threshold {_range(limits)} of 255)" if limits else ""
    everything = {fact.get("tissue") for fact in rows} == {"none"}
    text += "." if everything else f"; tiles with at least {share} tissue were kept."
    most = _grouped(fact.get("max_tiles") for fact in rows)
    if most and most[0][0] is not None:
        text += f" At most {_listed(most, str)} tiles a slide were taken, spread evenly over its tissue."
    return text


def _rule(value: Any) -> str:
    if value in METHODS:
        return _RULES[value]
    return "from masks or annotations" + (f" (SHA-256 {value[7:19]})" if str(value).startswith("sha256:") else "")


def _tile_encoder(
    folder: Path, statuses: Mapping[str, Status], records: Sequence[Mapping[str, Any]], cautions: list[str]
) -> str:
    name = folder.name.removeprefix("features_")
    rows = [status.identity for status in statuses.values() if status.finished]
    about = _about(records, "tile_encoder", name)
    text = f"Tiles were embedded with {_encoder(name, about, rows, cautions)}"
    steps = _said("transform", (row.get("transform") for row in rows), cautions, str)
    precision = _said("precision", (row.get("precision") for row in rows), cautions, str)
    device = _said("device", (row.get("device") for row in rows), cautions, str)
    batch = _said("batch size", (row.get("batch_size") for row in rows), cautions, str)
    text += f" (input: {steps}; {precision} on {device}, batches of {batch})."
    if name == "standin":
        cautions.append(
            "The tile encoder is a STAND-IN (EfficientNet-Lite0, ImageNet weights): these are no GigaPath embeddings."
        )
    return text


def _slide_encoder(
    folder: Path, statuses: Mapping[str, Status], records: Sequence[Mapping[str, Any]], cautions: list[str]
) -> str:
    name = folder.name.removeprefix("slides_").partition("__")[0]
    rows = [status.identity for status in statuses.values() if status.finished]
    piece = "connected piece of tissue" if folder.name.endswith("__sections") else "slide"
    if name == "mean":
        return f"The embedding of a {piece} is the plain mean of its tile embeddings; no slide encoder was used."
    about = _about(records, "slide_encoder", name)
    precision = _said("slide encoder's precision", (row.get("precision") for row in rows), cautions, str)
    return (
        f"Tile embeddings of each {piece} were encoded, in row-major order and with the tiles' grid cells as "
        f"positions, with {_encoder(name, about, rows, cautions)}, a LongNet [ding2023longnet] ({precision}). The "
        "files hold every layer's output, pooled as the mean over tiles and as the class token: say which was used "
        "(the mean of the default output, unless another was named)."
    )


def _encoder(name: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], cautions: list[str]) -> str:
    """An encoder with its release and the digest of its weights."""
    random = name.endswith("-random")
    release = RELEASES.get(name.removesuffix("-random"))
    if random or about.get("trained") is False:
        cautions.append(f"The encoder {name} had RANDOM WEIGHTS: its embeddings mean nothing.")
    text = str(about.get("description") or name)
    if release is not None:
        text = f"{'Prov-GigaPath' if release.name == 'gigapath' else 'GigaPath-Flash'} [xu2024gigapath]"
        text += "" if random else f" ({release.repo}, revision {release.revision[:12]})"
    digests = _grouped(row.get("weights_sha256") for row in rows)
    if len(digests) > 1:
        cautions.append(f"The weights of {name} are mixed: {_listed(digests, lambda v: str(v)[:12])}.")
    if digests and digests[0][0] is not None:
        text += f", weights SHA-256 {', '.join(str(value)[:16] for value, _ in digests)}"
    return text


def _about(records: Sequence[Mapping[str, Any]], kind: str, name: str) -> Mapping[str, Any]:
    """What the latest run that used this encoder recorded of it."""
    for record in reversed(records):
        about = (record.get("facts") or {}).get(kind)
        if isinstance(about, dict) and about.get("name") == name:
            return about
    return {}


def _software(records: Sequence[Mapping[str, Any]], cautions: list[str]) -> str:
    versions = [record["versions"] for record in records if isinstance(record.get("versions"), dict)]
    if not versions:
        return ""
    words = {"gigapath": "gigapath [gigapath_open]", "openslide-library": "OpenSlide [goode2013openslide]"}
    words |= {
        "torch": "PyTorch",
        "timm": "timm",
        "numpy": "NumPy",
        "opencv-python-headless": "OpenCV",
        "python": "Python",
    }
    said = []
    for name, word in words.items():
        found = sorted({str(row[name]) for row in versions if name in row})
        if found:
            said.append(f"{word} {' and '.join(found)}")
        if len(found) > 1 and name in ("gigapath", "openslide-library", "torch"):
            cautions.append(f"Runs used several versions of {name}: {', '.join(found)}.")
    return f"Software: {', '.join(said)}."


def _said(what: str, values: Iterable[Any], cautions: list[str], word: Callable[[Any], str]) -> str:
    """A setting in words; where slides differ, all of them with the number of slides, and a caution."""
    groups = [(value, count) for value, count in _grouped(values) if value is not None]
    if not groups:
        return "an unrecorded value"
    text = _listed(groups, word)
    if len(groups) > 1:
        cautions.append(f"Slides differ in their {what}: {text}.")
    return text


def _grouped(values: Iterable[Any]) -> Groups:
    """Values with how many slides have them, the most frequent first; lists count as tuples."""
    counted = Counter(tuple(value) if isinstance(value, list) else value for value in values)
    return counted.most_common()


def _listed(groups: Groups, word: Callable[[Any], str]) -> str:
    if len(groups) == 1:
        return word(groups[0][0])
    return ", ".join(f"{'not stated' if value is None else word(value)} ({_slides(count)})" for value, count in groups)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}, median {median(values):.4g}"


def _slides(count: int) -> str:
    return "1 slide" if count == 1 else f"{count:,} slides"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
