"""Load a tile encoder and embed a few tiles of a slide.

    python demo/3_load_tile_encoder.py [SLIDE [--slide-mpp MPP]]

`encode` takes pixels and does the encoder's own transform. The released encoders can be loaded as the published code
does it, too: `timm.create_model("hf_hub:prov-gigapath/prov-gigapath", pretrained=True)`.
"""

import argparse

import numpy as np
from at_hand import encoder_at_hand, slide_at_hand

from gigapath.pipeline import TileOptions
from gigapath.preprocessing.reading import read_tile
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import plan_tiles
from gigapath.tile_encoder import load_tile_encoder

TILES = 6


def main(argv=None):
    """Read the command line, embed, print how alike the tiles are; returns the vectors (N, D)."""
    parser = argparse.ArgumentParser(description="A tile encoder, and a few tiles through it.")
    parser.add_argument("slide", nargs="?", help="a slide file (default: the demo slide)")
    parser.add_argument("--slide-mpp", type=float, help="microns per level-0 pixel, instead of what the slide says")
    words = parser.parse_args(argv)
    path, mpp = slide_at_hand(words.slide, words.slide_mpp)
    encoder = load_tile_encoder(encoder_at_hand(), device="auto", precision="auto")
    parameters = sum(weights.numel() for weights in encoder.model.parameters())
    print(f"{encoder.name}: {encoder.description}")
    print(f"  {parameters:,} parameters, vectors of {encoder.embed_dim}, {encoder.precision} on {encoder.device.type}")
    print(f"  transform: {encoder.transform_name}")
    with open_slide(path, slide_mpp=mpp) as slide:
        tiles = plan_tiles(slide, TileOptions(max_tiles=TILES)).tiles
        pixels = np.stack([read_tile(slide, tiles, index) for index in range(len(tiles))])  # (N, 256, 256, 3) uint8
    vectors = encoder.encode(pixels)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    print(f"{len(tiles)} tiles {pixels.shape} -> {vectors.shape}; cosine similarity of each to each:")
    print(np.round(directions @ directions.T, 2))
    return vectors


if __name__ == "__main__":
    main()
