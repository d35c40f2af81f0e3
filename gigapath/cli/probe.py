"""`gigapath probe`: how well a linear layer (or its relatives) tells classes from frozen embeddings."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gigapath.cli.arguments import add_options, options_from
from gigapath.cohort.owner import Ownership
from gigapath.cohort.reuse import differences
from gigapath.linear_probe.options import ProbeOptions, SlideProbeOptions, TileProbeOptions
from gigapath.options import to_dict

# Where the published PCam embeddings and labels lie once downloaded.
PUBLISHED = "GigaPath_PCam_embeddings.zip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gigapath probe`."""
    parser.add_argument(
        "embeddings",
        nargs="?",
        metavar="EMBEDDINGS",
        help="tiles: a zip or folder of one .pt per tile, or one .h5, .npz, .safetensors of features and names; "
        "slides: the output folder of `gigapath embed`",
    )
    parser.add_argument(
        "--labels", metavar="CSV", help="columns input (or file), label, split; not needed where EMBEDDINGS carry them"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results")
    parser.add_argument("--overwrite", action="store_true", help="probe again where DIR holds results of other options")
    parser.add_argument("--demo", action="store_true", help="try it on made embeddings (a planted rule), no download")
    add_options(parser, ProbeOptions)
    add_options(parser, TileProbeOptions, title="tiles")
    add_options(parser, SlideProbeOptions, title="slides")


def run(namespace: argparse.Namespace) -> int:
    """Probe tiles or slides, write the files, print the summary."""
    options = options_from(namespace, ProbeOptions)
    slide_options = options_from(namespace, SlideProbeOptions)
    out = Path(namespace.out)
    if namespace.demo == (namespace.embeddings is not None):
        raise ValueError("expected either EMBEDDINGS or --demo. Name a zip, folder or file of embeddings.")
    on_slides = slide_options.embedding is not None
    given = {**to_dict(options), **to_dict(slide_options if on_slides else options_from(namespace, TileProbeOptions))}
    with Ownership({out: given}):
        if not namespace.overwrite:
            _check_same(out, given)
        return _probe(namespace, options, slide_options, out)


def _check_same(out: Path, given: dict[str, Any]) -> None:
    """Refuse to put results of other options in place of those that are there."""
    try:
        before = json.loads((out / "results.json").read_text(encoding="utf-8"))["options"]
        changed = differences(before, json.loads(json.dumps(given)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if changed:
        raise ValueError(
            f"{out}: expected the options of the results that it holds, got others: {'; '.join(changed[:5])}. Give "
            "those of before, or use another --out; --overwrite probes again."
        )


def _probe(namespace: argparse.Namespace, options: ProbeOptions, slide_options: SlideProbeOptions, out: Path) -> int:
    if slide_options.embedding is not None:
        return _slides(namespace, options, slide_options, out)
    if namespace.embeddings and any(Path(namespace.embeddings).glob("slides_*/*.h5")):
        raise ValueError(
            f"{namespace.embeddings}: expected embeddings of tiles with a label each, got the output of a run. "
            "To probe its slides name their embedding, such as --embedding tile-mean."
        )
    return _tiles(namespace, options, out)


def _tiles(namespace: argparse.Namespace, options: ProbeOptions, out: Path) -> int:
    from gigapath.linear_probe.planted import bayes_accuracy, write_planted
    from gigapath.linear_probe.report import summary_lines, write_tile_report
    from gigapath.linear_probe.tiles import probe_tiles

    embeddings, labels = namespace.embeddings, namespace.labels
    if namespace.demo:
        print("DEMO: embeddings made on the spot from a planted rule; the figures say nothing about any encoder.")
        embeddings, labels = write_planted(out / "demo")
    elif Path(embeddings).name == PUBLISHED and not Path(embeddings).exists():
        raise FileNotFoundError(
            f"{embeddings}: no such file. Get it (2 GB) with `gigapath download pcam`, or try without: --demo."
        )
    probe = probe_tiles(
        embeddings, labels, options, options_from(namespace, TileProbeOptions), report=_reading if _terminal() else None
    )
    written = write_tile_report(out, probe)
    print("\n".join(summary_lines(probe)))
    if namespace.demo:
        print(f"DEMO: no rule can be more accurate than {bayes_accuracy():.4f} on these data.")
    seconds = probe.seconds
    print(f"read from {probe.data.facts['read_from']} in {seconds['read']:.1f} s, fitted in {seconds['fit']:.1f} s")
    print(f"written to {out}: {', '.join(written)}")
    return 0


def _slides(namespace: argparse.Namespace, options: ProbeOptions, slide_options: SlideProbeOptions, out: Path) -> int:
    from gigapath.linear_probe.slide_report import slide_summary_lines, write_slide_report
    from gigapath.linear_probe.slides import probe_slides

    if namespace.demo:
        raise ValueError("--demo: expected a probe of tiles. Leave out --embedding.")
    probe = probe_slides(namespace.embeddings, namespace.labels, options, slide_options)
    written = write_slide_report(out, probe)
    print("\n".join(slide_summary_lines(probe)))
    print(f"written to {out}: {', '.join(written)}")
    return 0


def _terminal() -> bool:
    return sys.stderr.isatty()


def _reading(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rreading {done:,} of {total:,} tiles", end=end, file=sys.stderr, flush=True)
