"""`gigapath report DIR`: one page on a run or a cohort."""

import argparse
import sys

from tqdm import tqdm

from gigapath.cli.arguments import add_options, options_from
from gigapath.report.options import ReportOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath report`."""
    parser.add_argument(
        "folder", metavar="DIR", help="the output folder of tile, embed, slide-embed, finetune, evaluate or probe"
    )
    parser.add_argument(
        "--slides", metavar="DIR", help="of a fine-tuning or probe run: the output folder of embed that has its slides"
    )
    parser.add_argument("--maps", metavar="DIR", help="the folder of gigapath map (default: maps beside the slides)")
    parser.add_argument("--to", metavar="DIR", help="where report.html goes (default: DIR itself)")
    add_options(parser, ReportOptions, title="report")


def run(namespace: argparse.Namespace) -> int:
    """Write the report, telling how far it is."""
    from gigapath.report.write import write_report

    bar: tqdm[None] | None = None

    def on_slide(slide_id: str, number: int, slides: int) -> None:
        nonlocal bar
        if not sys.stderr.isatty():
            print(f"{number}/{slides} {slide_id}", flush=True)
            return
        bar = bar or tqdm(total=slides, unit=" slides", file=sys.stderr, dynamic_ncols=True)
        bar.update(1)

    try:
        report = write_report(
            namespace.folder,
            slides=namespace.slides,
            maps=namespace.maps,
            to=namespace.to,
            options=options_from(namespace, ReportOptions),
            on_slide=on_slide,
        )
    finally:
        if bar is not None:
            bar.close()
    for note in report.notes:
        print(f"note: {note}")
    if report.without_picture:
        shown = ", ".join(report.without_picture[:5]) + (" ..." if len(report.without_picture) > 5 else "")
        print(f"note: {len(report.without_picture):,} slides have no picture: {shown}")
    print(f"see {report.page}")
    return 0
