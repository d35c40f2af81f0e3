"""How other tools compute a slide embedding with GigaPath's slide encoder: one table, from their sources.

Places are what becomes of a tile's coordinates before the encoder divides by 256. "As stored" means in the order of the
file of tile embeddings; which order a tool's own files have is in `own_order`.
"""

from dataclasses import dataclass

ORDERS = ("file", "row-major", "column-major")
# What becomes the tile's cell (column, row) in the encoder's grid.
PLACES = {
    "cells": "its place in the grid of tiles",
    "pitch": "floor(level-0 pixels / level-0 pixels of a tile)",
    "level0": "floor(level-0 pixels / 256), whatever the slide's scale",
    "unit": "its place as a share of the slide's extent, of 1000, divided by 256: a grid of 4 x 4",
    "swapped": "its place with x and y exchanged",
    "none": "one cell for all tiles",
}
PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16 autocast",
    "bf16": "bfloat16 autocast",
    "half": "weights, sums and inputs in float16",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tool (and the version that was read) gets from tile embeddings to a slide embedding.

    `readout` is the embedding that it takes, by the name that `parse_embedding` knows; `order` of the tiles, of ORDERS,
    and `places`, of PLACES; with `half_places` coordinates go through float16; `precision` on a CPU and on CUDA, of
    PRECISIONS; a model that is not `evaluated` is left in training mode: dropout makes every run another. `own_order`
    is that of the tool's own files, `tiles` its tiles by default (pixels, scale, what reaches the encoder), `remedy`
    how to get the mean-pooled default output at the right places from it.
    """

    tool: str
    readout: str
    order: str = "file"
    places: str = "pitch"
    half_places: bool = False
    precision: tuple[str, str] = ("fp32", "fp16")
    evaluated: bool = True
    own_order: str
    tiles: str
    remedy: str

    @property
    def plain_places(self) -> bool:
        """Whether tiles come to stand where our files have them, so that our states serve."""
        return self.places in ("cells", "pitch") and self.evaluated


_POOL = "pass `global_pool=True` to `create_model`"
_OFFICIAL = "256 px at 0.5 mpp, resized to 256, centre 224"
DEFAULT = Recipe(
    tool="gigapath",
    readout="default:mean",
    order="row-major",
    places="cells",
    own_order="row-major",
    tiles=_OFFICIAL,
    remedy="",
)
RECIPES = {
    "slide2vec": Recipe(
        tool="slide2vec 7.1.4",
        readout="default:class",
        own_order="column-major within a contour",
        tiles="224 px at 0.5 mpp, read as they are",
        remedy=_POOL,
    ),
    "slide2vec-5": Recipe(
        tool="slide2vec 5.7.0",
        readout="default:class",
        evaluated=False,
        own_order="column-major within a contour",
        tiles=_OFFICIAL,
        remedy=f"call `.eval()`; {_POOL}",
    ),
    "mussel": Recipe(
        tool="mussel-pathology 1.5.0",
        readout="default:class",
        places="level0",
        precision=("fp16", "fp16"),
        own_order="column-major",
        tiles="256 px at 0.5 mpp, the whole tile resized to 224",
        remedy=f"{_POOL}; divide coordinates by the tile's level-0 size, or set `model.tile_size` to it",
    ),
    "lazyslide": Recipe(
        tool="lazyslide 0.13.0 with lazyslide-models 0.1.0",
        readout="default:class",
        places="level0",
        precision=("fp32", "bf16"),
        own_order="column-major",
        tiles="as `tile_tissues` is asked for; resized to 256, centre 224",
        remedy=f"{_POOL}; divide coordinates by `tile_spec`'s level-0 stride, or set `model.tile_size` to it",
    ),
    "stamp": Recipe(
        tool="STAMP 2 (`encoding/encoder/gigapath.py`)",
        readout="default:class",
        places="unit",
        half_places=True,
        precision=("half", "half"),
        own_order="supertile by supertile, as threads finish",
        tiles="256 micrometres in 224 px (1.14 mpp), resized to 256, centre 224",
        remedy=f"{_POOL}; give coordinates at 0.5 mpp in float32, and autocast in place of `.half()`",
    ),
    "raw2features": Recipe(
        tool="raw2features 0.2.1",
        readout="last-state:mean",
        own_order="row-major",
        tiles=_OFFICIAL,
        remedy="leave out `all_layer_embed=True`",
    ),
    "trident": Recipe(
        tool="TRIDENT (`slide_encoder_models/load.py`)",
        readout="state:11:mean",
        own_order="column-major",
        tiles=_OFFICIAL,
        remedy="leave out `all_layer_embed=True`, and take entry 0; sort tiles by row",
    ),
    "published-demo": Recipe(
        tool="the published `pipeline.py`, called with its defaults",
        readout="last-state:class",
        places="cells",
        own_order="as the file system lists them",
        tiles="256 px at the level nearest to 0.5 mpp, resized to 256, centre 224",
        remedy="`load_tile_slide_encoder(global_pool=True)`, as the published notebook does; sort tiles by row",
    ),
}
