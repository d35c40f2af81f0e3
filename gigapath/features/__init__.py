"""What travels between the stages, and the h5 files that hold it: ours, written whole or not at all, and other
tools', read into the same dataclasses. Names are looked up when they are used."""

from typing import TYPE_CHECKING

from gigapath import lazy_names

if TYPE_CHECKING:
    from gigapath.features.data import (
        NUMERICS_VERSION as NUMERICS_VERSION,
    )
    from gigapath.features.data import (
        SLIDE_NUMERICS_VERSION as SLIDE_NUMERICS_VERSION,
    )
    from gigapath.features.data import (
        TILES_NUMERICS_VERSION as TILES_NUMERICS_VERSION,
    )
    from gigapath.features.data import (
        EmbeddingName as EmbeddingName,
    )
    from gigapath.features.data import (
        FeatureFileError as FeatureFileError,
    )
    from gigapath.features.data import (
        SlideEmbeddings as SlideEmbeddings,
    )
    from gigapath.features.data import (
        TileEmbeddings as TileEmbeddings,
    )
    from gigapath.features.data import (
        Tiles as Tiles,
    )
    from gigapath.features.data import (
        parse_embedding as parse_embedding,
    )
    from gigapath.features.gigapath_file import (
        TileEmbeddingsWriter as TileEmbeddingsWriter,
    )
    from gigapath.features.gigapath_file import (
        read_slide as read_slide,
    )
    from gigapath.features.gigapath_file import (
        read_tiles as read_tiles,
    )
    from gigapath.features.gigapath_file import (
        write_slide as write_slide,
    )
    from gigapath.features.gigapath_file import (
        write_tile_vectors as write_tile_vectors,
    )
    from gigapath.features.gigapath_file import (
        write_tiles as write_tiles,
    )
    from gigapath.features.reading import read_features as read_features
    from gigapath.features.tables import export_table as export_table
    from gigapath.features.tables import read_slides as read_slides

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
