"""What is looked at: map, report with the methods paragraph."""

import dataclasses
import json
import sys
import textwrap
from typing import Annotated

from cyclopts import Parameter

from gigapath.cli.arguments import EXIT_FAILED_SLIDES, Folder, GivenFolder, Json, verb
from gigapath.maps.options import MapOptions
from gigapath.report.write import ReportOptions


@verb
def draw_maps(features: tuple[str, ...], /, *, out: Folder, maps: MapOptions) -> int:
    """Print a line a slide; the status is 3 where a slide failed.

    Args:
        features: the folder of a run, or files of tile embeddings
        out: the folder of the maps, one below it a slide
    """
    from gigapath.cli.progress import Terminal
    from gigapath.devices import at_most_threads
    from gigapath.machine import available_cores
    from gigapath.maps import make_maps

    with at_most_threads(available_cores()), Terminal() as watch:
        result = make_maps(features, out, maps, watch=watch)
    return EXIT_FAILED_SLIDES if result.failed else 0


@verb
def report(
    folder: GivenFolder,
    /,
    *,
    slides: Folder | None = None,
    maps: Folder | None = None,
    to: Folder | None = None,
    methods: bool = False,
    as_json: Annotated[Json, Parameter(help="with --methods: print one JSON document, for machines")] = False,
    page: ReportOptions,
) -> int:
    """Write the report, telling how far it is.

    Args:
        folder: the output folder of tile, embed, slide-embed, finetune, predict, probe or compare
        slides: of a fine-tuning or probe run: the output folder of embed that has its slides
        maps: the folder of gigapath map (default: maps beside the slides)
        to: where report.html goes (default: DIR itself)
        methods: print the methods paragraph of a paper instead, from the records of tile or embed, with BibTeX
    """
    if methods and (slides or maps or to):
        raise ValueError(
            "--methods: expected DIR alone, got --slides, --maps or --to. A text is printed: leave them out."
        )
    if as_json and not methods:
        raise ValueError("--json: expected --methods beside it. Leave it out for a page.")
    if methods:
        return _methods(folder, as_json)
    from gigapath.cli.progress import Terminal
    from gigapath.report.write import write_report

    with Terminal() as watch:
        written = write_report(folder, slides=slides, maps=maps, to=to, options=page, watch=watch)
    for note in written.notes:
        print(f"note: {note}")
    if written.without_picture:
        shown = ", ".join(written.without_picture[:5]) + (" ..." if len(written.without_picture) > 5 else "")
        print(f"note: {len(written.without_picture):,} slides have no picture: {shown}")
    print(f"see {written.page}")
    return 0


def _methods(folder: str, as_json: bool) -> int:
    """Print the paragraphs and the BibTeX entries; cautions go to stderr too where stdout is no terminal."""
    from gigapath.report.methods import methods

    found = methods(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
        return 0
    for caution in found.cautions:
        print(f"CAUTION: {caution}")
        if not sys.stdout.isatty():
            print(f"gigapath report: {caution}", file=sys.stderr)
    print("\n\n".join(textwrap.fill(paragraph, 100) for paragraph in found.paragraphs))
    print()
    print("\n\n".join(found.bibtex))
    return 0
