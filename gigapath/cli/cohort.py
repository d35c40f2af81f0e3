"""A cohort's output folder: status, remove. A file of its own, since neither needs what reads slides."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

from gigapath.cli.arguments import GivenFolder, Json, verb
from gigapath.cohort.status import STATES, StageProgress, failure_lines, read_progress
from gigapath.text import in_words, slides_in_words


@verb
def status(out: GivenFolder, /, *, as_json: Json = False) -> int:
    """Print how far each stage is, from the status files alone.

    Args:
        out: the output folder of tile or embed
    """
    slides, stages = read_progress(Path(out))
    if as_json:
        print(json.dumps({"slides": slides, "stages": [dataclasses.asdict(stage) for stage in stages]}, indent=2))
        return 0
    print(f"{out}: {slides_in_words(slides)}")
    width = max(len(stage.folder) for stage in stages) if stages else 0
    titles = [state.replace("_", " ") for state in STATES]
    print(f"  {'':{width}}  " + "  ".join(f"{title:>9}" for title in [*titles, "tiles"]))
    for stage in stages:
        cells = [*(stage.counts[state] for state in STATES), stage.tiles]
        print(f"  {stage.folder:{width}}  " + "  ".join(f"{cell:>9,}" for cell in cells))
    for stage in stages:
        if stage.last:
            print(_pace(stage))
    for stage in stages:
        for line in failure_lines(stage.failures):
            print(f"{stage.folder}: {line}")
    if any(stage.counts["failed"] for stage in stages):
        print("Failed slides are not counted as left. The same command retries them; --only failed retries only them.")
    return 0


def _pace(stage: StageProgress) -> str:
    def rate(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    line = f"{stage.folder}: last result {datetime.fromtimestamp(stage.last, UTC):%Y-%m-%d %H:%M} UTC"
    if stage.slides_per_second:
        line += f"; {rate(stage.slides_per_second * 60)} slides/min"
        if stage.folder != "tiles":
            line += f", {rate(stage.tiles_per_second or 0)} tiles/s"
    if stage.left and stage.seconds_left is not None:
        tiles = "" if stage.folder == "tiles" else f" with about {stage.tiles_left:,} tiles"
        line += f"; {slides_in_words(stage.left)}{tiles} left: about {in_words(stage.seconds_left)}"
    return line + "."


@verb
def remove(slide_id: str, out: GivenFolder, /, *, dry_run: bool = False, as_json: Json = False) -> int:
    """Remove a slide, and print what was removed and where its id still stands.

    Args:
        slide_id: the slide, by its whole id
        out: the output folder; no run may work on it meanwhile
        dry_run: say what would be removed, and change nothing
    """
    from gigapath.cohort.removal import remove_slide  # numpy, which status does without

    removed = remove_slide(Path(out), slide_id, dry_run=dry_run)
    if as_json:
        print(json.dumps(dataclasses.asdict(removed), indent=2, ensure_ascii=False))
    else:
        would = "would be " * dry_run
        for title, names in (
            (f"{would}removed", removed.files),
            (f"{would}taken out of", removed.edited),
            (f"{would}drawn anew", removed.redrawn),
            ("still named in, and left", removed.mentions),
        ):
            for name in names:
                print(f"{title}: {name}")
        if removed:
            print(
                "Nothing outside this folder was searched: the slide itself, manifests, exported tables, fitted models."
            )
    if not removed:
        raise ValueError(f"{out}: it holds nothing of a slide {slide_id!r}. Give its whole id.")
    return 0
