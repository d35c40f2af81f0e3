"""Frozen embeddings: embed-tiles, and probe, how well a linear layer (or its relatives) tells classes from them."""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gigapath.cli.arguments import Csv, File, Folder, verb
from gigapath.linear_probe import EmbedTilesOptions, ProbeOptions, SlideProbeOptions, TileProbeOptions


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
    if Path(out).suffix != ".h5":
        raise ValueError(f"--out: expected a file ending in .h5, got {Path(out).name!r}.")
    from gigapath.cli.progress import Terminal
    from gigapath.devices import at_most_threads
    from gigapath.linear_probe.embed_tiles import embed_tiles, open_tile_set
    from gigapath.machine import available_cores
    from gigapath.progress import StopFlag
    from gigapath.tile_encoder import load_tile_encoder

    tile_set = open_tile_set(tiles)
    encoder = load_tile_encoder(
        tile_encoder.tile_encoder,
        device=tile_encoder.device,
        precision=tile_encoder.precision,
        random_weights=tile_encoder.random_weights,
    )
    started = time.perf_counter()
    with Terminal("tile") as watch, StopFlag(watch.stopping) as stop, at_most_threads(available_cores()):
        watch.line(f"{len(tile_set):,} tiles, {encoder.description}")
        resumed = embed_tiles(
            tile_set,
            encoder,
            Path(out),
            batch_size=tile_encoder.batch_size,
            overwrite=overwrite,
            watch=watch,
            check_stop=stop.check,
        )
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
    from gigapath.cli.progress import Terminal
    from gigapath.linear_probe import run_probe

    if demo:
        print("DEMO: embeddings made on the spot from a planted rule; the figures say nothing about any encoder.")
    with Terminal() as watch:
        found, written = run_probe(
            embeddings,
            out,
            labels=labels,
            overwrite=overwrite,
            options=options,
            tiles=tiles,
            slides=slides,
            watch=watch,
        )
    print(found)
    if demo:
        from gigapath.linear_probe import bayes_accuracy

        print(f"DEMO: no rule can be more accurate than {bayes_accuracy():.4f} on these data.")
    from gigapath.linear_probe.tiles import TileProbe

    if isinstance(found, TileProbe):
        seconds = found.seconds
        print(f"read from {found.data.facts['read_from']} in {seconds['read']:.1f} s, fitted in {seconds['fit']:.1f} s")
    print(f"written to {out}: {', '.join(written)}")
    return 0


@verb
def compare(
    runs: tuple[str, ...],
    /,
    *,
    out: Folder,
    models: str = "",
    score: str | None = None,
    difference: float = 0.1,
    overwrite: bool = False,
) -> int:
    """Print the table of paired differences, each model minus the first, and write it with a picture.

    Args:
        runs: folders of probes of slides or fine-tunings over the same folds; one alone for all its models
        out: folder for differences.csv, .json and .png
        models: names of embeddings or models to compare, with commas (default: what each run is about)
        score: the first of the table, which is drawn (default: auroc, r2 or harrell_c, by the task)
        difference: the true difference for which the power is given
        overwrite: compare again where the folder holds another comparison
    """
    from gigapath.evaluation.compare import compare, write_comparison

    found = compare(
        runs, models=[each.strip() for each in models.split(",") if each.strip()], score=score, difference=difference
    )
    print(found)
    written = write_comparison(Path(out), found, overwrite=overwrite)
    print(f"written to {out}: {', '.join(written)}")
    return 0
