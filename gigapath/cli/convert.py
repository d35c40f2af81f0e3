"""`gigapath convert FEATURES --to TOOL --out DIR`: tile embeddings as another tool's files."""

import argparse
import sys
from pathlib import Path

from gigapath.cli.main import EXIT_FAILED_SLIDES
from gigapath.features import read_features
from gigapath.features.other_tools import FORMATS, Scale, convert
from gigapath.features.reading import find_feature_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gigapath convert`."""
    parser.add_argument(
        "features",
        nargs="+",
        metavar="FEATURES",
        help="files of tile embeddings or folders of them: ours, TRIDENT's, CLAM's, Mussel's, STAMP's, slide2vec's, "
        "the published",
    )
    parser.add_argument("--to", required=True, choices=tuple(FORMATS), help="whose files to write; gigapath is ours")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder that takes the tool's own folders")
    parser.add_argument(
        "--tile-size-level0",
        type=float,
        metavar="PIXELS",
        help="distance between neighbouring tiles, in the unit of the files' coordinates, where a file does not say",
    )
    parser.add_argument(
        "--coordinates",
        metavar="DIR",
        help="the folder of CLAM's or slide2vec's coordinates, where they lie in files of their own elsewhere",
    )
    parser.add_argument("--slide-mpp", type=float, metavar="MPP", help="microns per level-0 pixel of the slides")
    parser.add_argument(
        "--coords-mpp",
        type=float,
        metavar="MPP",
        help="microns per pixel of the level that the coordinates of published files count in (0.5)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Convert each file; one that fails is named on stderr and the others go on."""
    for name in ("tile_size_level0", "slide_mpp", "coords_mpp"):
        value = getattr(namespace, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a value above 0, got {value!r}.")
    if namespace.coordinates is not None and not Path(namespace.coordinates).exists():
        raise FileNotFoundError(f"--coordinates: expected a folder, got {namespace.coordinates!r}.")
    scale = Scale(namespace.slide_mpp, namespace.coords_mpp)
    paths = find_feature_files(namespace.features)
    failed, done = 0, set[str]()
    for path in paths:
        try:
            found = read_features(path, tile_size_level0=namespace.tile_size_level0, coordinates=namespace.coordinates)
            if found.slide_id in done:
                raise ValueError(f"{path}: a second file of slide {found.slide_id!r}. Convert it into another folder.")
            written = convert(found, namespace.to, namespace.out, scale=scale)
        except (ValueError, FileNotFoundError) as error:
            print(f"gigapath convert: {error}", file=sys.stderr)
            failed += 1
            continue
        done.add(found.slide_id)
        print(f"{path.name}: {len(found):,} tiles, {found.source} to {namespace.to}: {written[0]}")
    print(f"{len(paths) - failed} of {len(paths)} files converted.")
    return EXIT_FAILED_SLIDES if failed else 0
