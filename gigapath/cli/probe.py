"""Frozen embeddings: embed-tiles, and probe, how well a linear layer (or its relatives) tells classes from them."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gigapath.cli.arguments import EXIT_STOPPED, Csv, File, Folder, verb
from gigapath.cohort.owner import Ownership
from gigapath.cohort.reuse import differences
from gigapath.linear_probe.options import EmbedTilesOptions, ProbeOptions, SlideProbeOptions, TileProbeOptions
from gigapath.options import to_dict

# Where the published PCam embeddings and labels lie once downloaded.
PUBLISHED = "GigaPath_PCam_embeddings.zip"


@verb
def embed_tiles(
    tiles: Annotated[str, Parameter(name="FOLDER_OR_ZIP_OR_H5")],
    /,
    *,
    out: File,
    overwrite: bool = False,
    tile_encoder: EmbedTilesOptions,
) -> int:
    """Embed all tiles; 75 when a signal came, and the same command goes on from there.

    Args:
        tiles: folders by split and class; a zip or folder with a CSV (file, label, split); PCam's own HDF5 files
        out: the embeddings' file, ending in .h5
        overwrite: embed again where FILE is there, or holds others' embeddings
    """
    from gigapath.devices import at_most_threads
    from gigapath.linear_probe.embed_tiles import embed_tiles, open_tile_set
    from gigapath.machine import available_cores
    from gigapath.signals import StopFlag, Stopped
    from gigapath.tile_encoder import load_tile_encoder

    if Path(out).suffix != ".h5":
        raise ValueError(f"--out: expected a file ending in .h5, got {Path(out).name!r}.")
    tile_set = open_tile_set(tiles)
    encoder = load_tile_encoder(
        tile_encoder.tile_encoder,
        device=tile_encoder.device,
        precision=tile_encoder.precision,
        random_weights=tile_encoder.random_weights,
    )
    print(f"{len(tile_set):,} tiles, {encoder.description}")
    started = time.perf_counter()
    with StopFlag() as stop, at_most_threads(available_cores()):
        try:
            resumed = embed_tiles(
                tile_set,
                encoder,
                Path(out),
                batch_size=tile_encoder.batch_size,
                overwrite=overwrite,
                report=_count("") if sys.stderr.isatty() else lambda done, total: None,
                check_stop=stop.check,
            )
        except Stopped as stopped:
            print(f"stopped by {stopped}; the same command goes on from here.", file=sys.stderr)
            return EXIT_STOPPED
    seconds = time.perf_counter() - started
    before = f" ({resumed:,} of them by the run before)" if resumed else ""
    print(f"{len(tile_set):,} tiles embedded{before} in {seconds:.1f} s, written to {out}")
    print(f"next: gigapath probe {out} --out DIR" + ("" if tile_set.labels else " --labels CSV"))
    return 0


@verb
def probe(
    embeddings: str | None = None,
    /,
    *,
    labels: Csv | None = None,
    out: Folder,
    overwrite: bool = False,
    demo: bool = False,
    options: ProbeOptions,
    tiles: TileProbeOptions,
    slides: SlideProbeOptions,
) -> int:
    """Probe tiles or slides, write the files, print the summary.

    Args:
        embeddings: tiles: a zip or folder of one .pt per tile, or one .h5, .npz, .safetensors of features and names;
            slides: the output folder of gigapath embed
        labels: columns input (or file), label, split; not needed where EMBEDDINGS carry them
        out: folder for results
        overwrite: probe again where DIR holds results of other options
        demo: try it on made embeddings (a planted rule), no download
    """
    if demo == (embeddings is not None):
        raise ValueError("expected either EMBEDDINGS or --demo. Name a zip, folder or file of embeddings.")
    given = {**to_dict(options), **to_dict(tiles if slides.embedding is None else slides)}
    with Ownership({Path(out): given}):
        if not overwrite:
            _check_same(Path(out), given)
        return _probe(embeddings, labels, Path(out), options, tiles, slides)


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


def _probe(
    embeddings: str | None,
    labels: str | None,
    out: Path,
    options: ProbeOptions,
    tiles: TileProbeOptions,
    slides: SlideProbeOptions,
) -> int:
    if slides.embedding is not None:
        if embeddings is None:
            raise ValueError("--demo: expected a probe of tiles. Leave out --embedding.")
        return _probe_slides(embeddings, labels, out, options, slides)
    if embeddings and any(Path(embeddings).glob("slides_*/*.h5")):
        raise ValueError(
            f"{embeddings}: expected embeddings of tiles with a label each, got the output of a run. "
            "To probe its slides name their embedding, such as --embedding tile-mean."
        )
    return _probe_tiles(embeddings, labels, out, options, tiles)


def _probe_tiles(
    embeddings: str | Path | None, labels: str | Path | None, out: Path, options: ProbeOptions, tiles: TileProbeOptions
) -> int:
    from gigapath.linear_probe.planted import bayes_accuracy, write_planted
    from gigapath.linear_probe.tiles import probe_tiles, summary_lines, write_tile_report

    demo = embeddings is None
    if embeddings is None:
        print("DEMO: embeddings made on the spot from a planted rule; the figures say nothing about any encoder.")
        embeddings, labels = write_planted(out / "demo")
    elif Path(embeddings).name == PUBLISHED and not Path(embeddings).exists():
        raise FileNotFoundError(
            f"{embeddings}: no such file. Get it (2 GB) with `gigapath download pcam`, or try without: --demo."
        )
    probe = probe_tiles(embeddings, labels, options, tiles, report=_count("reading ") if sys.stderr.isatty() else None)
    written = write_tile_report(out, probe)
    print("\n".join(summary_lines(probe)))
    if demo:
        print(f"DEMO: no rule can be more accurate than {bayes_accuracy():.4f} on these data.")
    seconds = probe.seconds
    print(f"read from {probe.data.facts['read_from']} in {seconds['read']:.1f} s, fitted in {seconds['fit']:.1f} s")
    print(f"written to {out}: {', '.join(written)}")
    return 0


def _probe_slides(
    embeddings: str, labels: str | None, out: Path, options: ProbeOptions, slides: SlideProbeOptions
) -> int:
    from gigapath.linear_probe.slides import probe_slides, slide_summary_lines, write_slide_report

    probe = probe_slides(embeddings, labels, options, slides)
    written = write_slide_report(out, probe)
    print("\n".join(slide_summary_lines(probe)))
    print(f"written to {out}: {', '.join(written)}")
    return 0


def _count(what: str) -> Callable[[int, int], None]:
    """A counter of tiles on one line of standard error."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{what}{done:,} of {total:,} tiles", end=end, file=sys.stderr, flush=True)

    return show
