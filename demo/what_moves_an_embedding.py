"""How much order, pitch, coordinate type, pooling and state move the embedding of a slide; half precision
that of a tile.

    python demo/what_moves_an_embedding.py
    python demo/what_moves_an_embedding.py --weights hf_hub:prov-gigapath/prov-gigapath-flash --features SLIDE.h5
    python demo/what_moves_an_embedding.py --slide SLIDE.svs --tile-encoder gigapath

Prints a table: each row changes one thing that tools do differently, and says how far the slide's vector moves from
`default`. Without --weights the encoder has random weights, and without --features the tiles are made: then the numbers
show the machinery, not pathology. With --slide the rows are of the slide's tiles: how far each tile's vector moves from
the one in float32.
"""

import argparse
import copy
from dataclasses import replace

import numpy as np
import torch

import gigapath
from gigapath.preprocessing.reading import filter_name, iter_tiles
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.tile_encoder import load_tile_encoder

WIDTHS = {"gigapath_slide_enc12l768d": 1536, "gigapath_slide_enc12l384d": 384}


def made_tiles(count, width):
    """Tiles of a round piece of tissue, row by row: embeddings (N, D) that change smoothly, and cells (N, 2)."""
    random = np.random.default_rng(0)
    radius = int(np.ceil((count / np.pi) ** 0.5)) + 1
    row, column = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    near = np.sort(np.argsort(row**2 + column**2, kind="stable")[:count])
    cells = np.stack([column[near] + 2 * radius, row[near] + 30], axis=1) + 17
    waves = np.sin(cells @ random.normal(0, 0.3, (2, 64)) + random.uniform(0, 6, 64))
    return (waves @ random.normal(0, 0.15, (64, width)) + random.normal(0, 0.5, (count, width))).astype(
        np.float32
    ), cells


def embed(model, features, coords, *, mean=True, states=False):
    """The default output (D,), or all states (S, D)."""
    model.global_pool = mean
    with torch.inference_mode():
        found = model(torch.as_tensor(features)[None], torch.as_tensor(coords)[None], all_layer_embed=states)
    return torch.cat(found).float().numpy() if states else found[0][0].float().numpy()


def rows(model, features, cells):
    """(what changes, its vector, the vector that it is compared with)."""
    coords = cells.astype(np.int64) * 256 + 128
    default = embed(model, features, coords)
    columns = np.lexsort((cells[:, 1], cells[:, 0]))
    shuffled = np.random.default_rng(1).permutation(len(cells))
    yield "order: column by column instead of row by row", embed(model, features[columns], coords[columns]), default
    yield "order: shuffled", embed(model, features[shuffled], coords[shuffled]), default
    yield "pitch: coordinates of a 40x slide not scaled (two cells a tile)", embed(model, features, coords * 2), default
    yield "pitch: tiles 224 pixels apart, taken as 256", embed(model, features, cells * 224 + 112), default
    yield "place: the whole slide ten cells to the right", embed(model, features, coords + np.array([2560, 0])), default
    yield "coordinates: x and y exchanged", embed(model, features, coords[:, ::-1].copy()), default
    model.tile_size = 507  # a tile's side in level-0 pixels of a 40x slide, as TRIDENT assigns it
    half = (cells * 507).astype(np.float16).astype(np.float32)
    if np.isfinite(half).all():
        yield "coordinates: level-0 corners, pitch 507, in half precision", embed(model, features, half), default
    model.tile_size = 256
    yield "pooling: class token instead of the mean", embed(model, features, coords, mean=False), default
    states = embed(model, features, coords, states=True)
    yield "state: last-state instead of default", states[-1], default
    yield "state: state:11 instead of last-state", states[-2], states[-1]
    yield (
        "state: state:11:class instead of state:11",
        embed(model, features, coords, mean=False, states=True)[-2],
        states[-2],
    )
    double = model.double()
    yield "precision: float64 instead of float32", embed(double, features.astype(np.float64), coords), default
    model.float()


def slide_table(words):
    """The lines of the table of a slide's embedding."""
    width = WIDTHS[words.arch]
    if words.features:
        tiles = gigapath.read_features(words.features, embed_dim=width)
        features, cells = tiles.features.astype(np.float32), tiles.cells
    else:
        features, cells = made_tiles(words.tiles, width)
    torch.manual_seed(0)
    model = gigapath.slide_encoder.create_model(words.weights, words.arch, width, global_pool=True).eval()
    if not words.weights:
        for name, values in model.named_parameters():
            if name.endswith("weight") and values.ndim == 1:  # norms begin as ones, and two in a row as one
                values.data.mul_(1 + 0.1 * torch.randn(values.shape))
    weights = f"weights of {words.weights}" if words.weights else "RANDOM weights (never trained)"
    of = "a slide's tiles" if words.features else "made tiles"
    lines = [f"{words.arch}, {weights}, {len(features)} {of}", ""]
    lines += ["| what changes | cosine | relative difference |", "|---|---|---|"]
    for what, changed, before in rows(model, features, cells):
        (cosine,), (relative,) = apart(changed[None], before[None])
        lines.append(f"| {what} | {cosine:.4f} | {relative:.2g} |")
    return lines


def apart(changed, before):
    """Cosines and relative differences of vectors (N, D), row by row."""
    a, b = changed.astype(np.float64), before.astype(np.float64)
    norm = np.linalg.norm
    return (a * b).sum(1) / norm(a, axis=1) / norm(b, axis=1), norm(a - b, axis=1) / norm(b, axis=1)


def tile_encoder(name, precision):
    """A tile encoder; NAME-random has random weights."""
    encoder = load_tile_encoder(
        name.removesuffix("-random"), device="auto", precision=precision, random_weights=name.endswith("-random")
    )
    if not encoder.trained:
        for weight, values in encoder.model.named_parameters():
            if weight.endswith("gamma"):  # timm's 1e-5 would make all tiles one
                values.fill_(1)
    return encoder


def read(path, words):
    """Pixels (N, T, T, 3) of a slide's tiles, and what filter made them."""
    with open_slide(path, slide_mpp=words.slide_mpp) as slide:
        tiles = plan_tiles(slide, TileOptions(mpp=words.mpp, max_tiles=words.tiles)).tiles
        if not len(tiles):
            raise ValueError(f"--slide: expected a slide with tissue, got none in {path}. Name another.")
        pixels = np.concatenate([pixels for _, pixels in iter_tiles(slide, tiles, batch_size=32)])
        return pixels, filter_name(tiles.read_size, tiles.tile_size), tiles.read_size[0]


def tile_rows(name, ordinary):
    """(what changes, the tiles' vectors)."""

    def vectors(encoder, pixels=ordinary):
        return np.concatenate([encoder.encode(pixels[first : first + 32]) for first in range(0, len(pixels), 32)])

    encoder = tile_encoder(name, "fp32")
    default = vectors(encoder)
    yield "nothing", default
    yield "precision: fp16 autocast", vectors(tile_encoder(name, "fp16"))
    yield "precision: bf16 autocast", vectors(tile_encoder(name, "bf16"))
    half = copy.deepcopy(encoder.model)
    for values in half.parameters():
        values.copy_(values.half().float())
    yield "precision: weights rounded to fp16", vectors(replace(encoder, model=half))
    yield "another tile of the slide", np.roll(default, 1, axis=0)


def tile_table(words):
    """The lines of the table of the tiles' embeddings."""
    ordinary, way, side = read(words.slide, words)
    weights = "RANDOM weights (never trained)" if words.tile_encoder.endswith("-random") else "trained weights"
    lines = [f"{words.tile_encoder}, {weights}, {len(ordinary)} tiles of {side} pixels"]
    lines += [f"filter: {way}", ""]
    lines += ["| what changes | cosine (least) | relative difference (largest) |", "|---|---|---|"]
    changes = tile_rows(words.tile_encoder, ordinary)
    _, default = next(changes)
    for what, changed in changes:
        cosine, relative = apart(changed, default)
        cosines = f"{np.median(cosine):.5f} ({cosine.min():.5f})"
        lines.append(f"| {what} | {cosines} | {np.median(relative):.2g} ({relative.max():.2g}) |")
    return lines


def main(argv=None):
    """Read the command line, print the table; returns it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--weights", default="", help="hf_hub:REPO or slide_encoder.pth (default: random weights)")
    parser.add_argument("--arch", choices=sorted(WIDTHS), default="gigapath_slide_enc12l384d")
    parser.add_argument("--features", help="tile embeddings of a slide (default: made ones)")
    parser.add_argument("--tiles", type=int, default=1500, help="tiles, at most where they are a slide's")
    parser.add_argument("--slide", help="a slide: what moves the embeddings of its tiles")
    parser.add_argument("--slide-mpp", type=float, help="microns per level-0 pixel, instead of what the slide says")
    parser.add_argument("--mpp", type=float, default=0.5, help="microns per pixel of a tile")
    parser.add_argument(
        "--tile-encoder", default="standin", help="as for gigapath embed, or gigapath-flash-random (with --slide)"
    )
    words = parser.parse_args(argv)
    lines = tile_table(words) if words.slide else slide_table(words)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
