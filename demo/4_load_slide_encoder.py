"""Load a slide encoder and embed a slide from its tile embeddings and their places.

    python demo/4_load_slide_encoder.py [SLIDE [--slide-mpp MPP]]

Without access to the released weights the slide encoder is UNTRAINED: shapes and calls are right, the numbers mean
nothing.
"""

import argparse

import torch
from at_hand import OUTPUTS, encoder_at_hand, slide_at_hand

import gigapath
from gigapath.pipeline import EmbedOptions, TileOptions, run_embed
from gigapath.releases import RELEASES


def main(argv=None):
    """Read the command line, embed the tiles and the slide; returns the states, 13 times (1, E)."""
    parser = argparse.ArgumentParser(description="A slide encoder, and one slide through it.")
    parser.add_argument("slide", nargs="?", help="a slide file (default: the demo slide)")
    parser.add_argument("--slide-mpp", type=float, help="microns per level-0 pixel, instead of what the slide says")
    words = parser.parse_args(argv)
    slide, mpp = slide_at_hand(words.slide, words.slide_mpp)
    name = encoder_at_hand()
    out = OUTPUTS / "demo" / f"slide_encoder_{name}"
    options = EmbedOptions(tile_encoder=name, slide_encoder="none")
    result = run_embed([slide], out, tiling=TileOptions(slide_mpp=mpp), embedding=options)
    tiles = gigapath.read_features(out / f"features_{name}" / f"{result.rows[0]['slide_id']}.h5")
    features, coords = torch.from_numpy(tiles.features), torch.from_numpy(tiles.encoder_coords())

    if name in RELEASES:
        release = RELEASES[name]
        weights, arch = f"hf_hub:{release.repo}", release.slide_arch
    else:
        weights, arch = "", "gigapath_slide_enc12l384d"
    model = gigapath.slide_encoder.create_model(weights, arch, tiles.embed_dim, global_pool=True).eval()
    said = f"weights of {weights}" if weights else "UNTRAINED: random weights"
    print(f"{arch}, {said}, {sum(part.numel() for part in model.parameters()):,} parameters")
    with torch.no_grad():
        embedding = model(features, coords).squeeze()
        states = model(features, coords, all_layer_embed=True)
    print(f"{len(tiles)} tiles {tuple(features.shape)} at {tuple(coords.shape)} -> the slide {tuple(embedding.shape)}")
    print(f"all {len(states)} states, the input and the output of each layer: {tuple(states.squeeze().shape)}")
    return states


if __name__ == "__main__":
    main()
