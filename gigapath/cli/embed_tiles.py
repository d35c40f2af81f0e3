"""`gigapath embed-tiles`: tile images through a tile encoder into one file that `gigapath probe` reads."""

import argparse
import sys
import time
from pathlib import Path

from gigapath.cli.arguments import add_options, options_from
from gigapath.cli.main import EXIT_STOPPED
from gigapath.linear_probe.options import EmbedTilesOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gigapath embed-tiles`."""
    parser.add_argument(
        "tiles",
        metavar="FOLDER_OR_ZIP_OR_H5",
        help="folders by split and class; a zip or folder with a CSV (file, label, split); PCam's own HDF5 files",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the embeddings' file, ending in .h5")
    parser.add_argument(
        "--overwrite", action="store_true", help="embed again where FILE is there, or holds others' embeddings"
    )
    add_options(parser, EmbedTilesOptions)


def run(namespace: argparse.Namespace) -> int:
    """Embed all tiles; 75 when a signal came, and the same command goes on from there."""
    from gigapath.devices import at_most_threads
    from gigapath.linear_probe.embedding import embed_tiles
    from gigapath.linear_probe.tile_sets import open_tile_set
    from gigapath.machine import available_cores
    from gigapath.signals import StopFlag, Stopped
    from gigapath.tile_encoder import load_tile_encoder

    options = options_from(namespace, EmbedTilesOptions)
    out = Path(namespace.out)
    if out.suffix != ".h5":
        raise ValueError(f"--out: expected a file ending in .h5, got {out.name!r}.")
    tiles = open_tile_set(namespace.tiles)
    encoder = load_tile_encoder(
        options.tile_encoder,
        device=options.device,
        precision=options.precision,
        random_weights=options.random_weights,
    )
    print(f"{len(tiles):,} tiles, {encoder.description}")
    started = time.perf_counter()
    with StopFlag() as stop, at_most_threads(available_cores()):
        try:
            resumed = embed_tiles(
                tiles,
                encoder,
                out,
                batch_size=options.batch_size,
                overwrite=namespace.overwrite,
                report=_progress if sys.stderr.isatty() else lambda done, total: None,
                check_stop=stop.check,
            )
        except Stopped as stopped:
            print(f"stopped by {stopped}; the same command goes on from here.", file=sys.stderr)
            return EXIT_STOPPED
    seconds = time.perf_counter() - started
    before = f" ({resumed:,} of them by the run before)" if resumed else ""
    print(f"{len(tiles):,} tiles embedded{before} in {seconds:.1f} s, written to {out}")
    print(f"next: gigapath probe {out} --out DIR" + ("" if tiles.labels else " --labels CSV"))
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} tiles", end="\n" if done == total else "", file=sys.stderr, flush=True)
