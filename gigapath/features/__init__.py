"""What travels between the stages, and the h5 files that hold it: ours, written whole or not at all, and other
tools', read into the same dataclasses. Names are looked up when they are used."""

from typing import TYPE_CHECKING

from gigapath import lazy_names

if TYPE_CHECKING:
    from gigapath.features.data import (
        NUMERICS_VERSION,
        SLIDE_NUMERICS_VERSION,
        TILES_NUMERICS_VERSION,
        EmbeddingName,
        FeatureFileError,
        SlideEmbeddings,
        TileEmbeddings,
        Tiles,
        parse_embedding,
    )
    from gigapath.features.gigapath_file import (
        TileEmbeddingsWriter,
        read_slide,
        read_tiles,
        write_slide,
        write_tile_vectors,
        write_tiles,
    )
    from gigapath.features.reading import read_features
    from gigapath.features.tables import export_table, read_slides

__all__ = [
    "NUMERICS_VERSION",
    "SLIDE_NUMERICS_VERSION",
    "TILES_NUMERICS_VERSION",
    "EmbeddingName",
    "FeatureFileError",
    "SlideEmbeddings",
    "TileEmbeddings",
    "TileEmbeddingsWriter",
    "Tiles",
    "export_table",
    "parse_embedding",
    "read_features",
    "read_slide",
    "read_slides",
    "read_tiles",
    "write_slide",
    "write_tile_vectors",
    "write_tiles",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "data": (
            *("NUMERICS_VERSION", "SLIDE_NUMERICS_VERSION", "TILES_NUMERICS_VERSION", "EmbeddingName"),
            *("FeatureFileError", "SlideEmbeddings", "TileEmbeddings", "Tiles", "parse_embedding"),
        ),
        "gigapath_file": (
            *("TileEmbeddingsWriter", "read_slide", "read_tiles", "write_slide", "write_tile_vectors", "write_tiles"),
        ),
        "reading": ("read_features",),
        "tables": ("export_table", "read_slides"),
    },
)
