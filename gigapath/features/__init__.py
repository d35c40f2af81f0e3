"""What travels between the stages, and the h5 files that hold it: ours, written whole or not at all, and other
tools', read into the same dataclasses."""

from gigapath.features.data import (
    NUMERICS_VERSION,
    FeatureFileError,
    SlideEmbeddings,
    TileEmbeddings,
    Tiles,
)
from gigapath.features.ours import TileEmbeddingsWriter, read_slide, read_tiles, write_slide, write_tiles

__all__ = [
    "NUMERICS_VERSION",
    "FeatureFileError",
    "SlideEmbeddings",
    "TileEmbeddings",
    "TileEmbeddingsWriter",
    "Tiles",
    "read_slide",
    "read_tiles",
    "write_slide",
    "write_tiles",
]
