"""Maps on slides: tile embeddings as colors and clusters, similarity, the slide encoder's exact attention, what a
fitted head makes of each tile. Arrays, matplotlib figures, GeoJSON for QuPath; `make_maps` writes them for many slides.

result = make_maps(["out"], "maps", MapOptions(kind=("attention",), layer=(1, 12)))

Names are looked up when they are used: the options alone need no torch.
"""

from typing import TYPE_CHECKING

from gigapath import lazy_names

if TYPE_CHECKING:
    from gigapath.maps.attribution import (
        LayerAttention,
        Rollout,
        deletion_and_insertion,
        encoder_attention,
        gradient_times_input,
        head_attention,
        occlusion,
        rollout,
    )
    from gigapath.maps.drawing import (
        Colors,
        Place,
        TileMap,
        draw_curve,
        draw_map,
        place_of,
        tile_rgba,
        tiles_geojson,
    )
    from gigapath.maps.embeddings import cosine_similarity, fit_clusters, fit_components, sample_tiles
    from gigapath.maps.options import MapOptions
    from gigapath.maps.run import MapsResult, look_at_slide, make_maps

__all__ = [
    "Colors",
    "LayerAttention",
    "MapOptions",
    "MapsResult",
    "Place",
    "Rollout",
    "TileMap",
    "cosine_similarity",
    "deletion_and_insertion",
    "draw_curve",
    "draw_map",
    "encoder_attention",
    "fit_clusters",
    "fit_components",
    "gradient_times_input",
    "head_attention",
    "look_at_slide",
    "make_maps",
    "occlusion",
    "place_of",
    "rollout",
    "sample_tiles",
    "tile_rgba",
    "tiles_geojson",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "attribution": (
            *("LayerAttention", "Rollout", "encoder_attention", "rollout"),
            *("deletion_and_insertion", "gradient_times_input", "head_attention", "occlusion"),
        ),
        "drawing": (
            *("Colors", "Place", "TileMap", "draw_curve", "draw_map", "place_of", "tile_rgba", "tiles_geojson"),
        ),
        "embeddings": ("cosine_similarity", "fit_clusters", "fit_components", "sample_tiles"),
        "options": ("MapOptions",),
        "run": ("MapsResult", "look_at_slide", "make_maps"),
    },
)
