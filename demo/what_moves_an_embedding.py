"""How much order, pitch, coordinate type, pooling and state move the embedding of a slide.

    python demo/what_moves_an_embedding.py
    python demo/what_moves_an_embedding.py --weights hf_hub:prov-gigapath/prov-gigapath-flash --features SLIDE.h5

Prints a table: each row changes one thing that tools do differently, and says how far the slide's vector moves from
`default`. Without --weights the encoder has made weights (seeded by name, as in tests/goldens), and without --features
the tiles are made too: then the numbers show the machinery, not pathology.
"""

import argparse
import hashlib

import numpy as np
import torch

import gigapath

WIDTHS = {"gigapath_slide_enc12l768d": 1536, "gigapath_slide_enc12l384d": 384}


def made_weights(model):
    """Give each weight values from its own name; returns the model."""
    state = model.state_dict()
    for name, old in state.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        new = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
        if name.endswith("weight") and new.ndim == 1:
            new = 1 + 0.1 * new
        elif name.endswith("bias"):
            new = 0.1 * new
        elif new.ndim == 2:
            new = new / new.shape[1] ** 0.5
        else:
            new = 0.02 * new
        state[name] = new
    model.load_state_dict(state)
    return model


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


def main(argv=None):
    """Read the command line, print the table; returns it."""
    parser = argparse.ArgumentParser(
        description="How much order, pitch, pooling, state, coordinates move an embedding."
    )
    parser.add_argument("--weights", default="", help="hf_hub:REPO or slide_encoder.pth (default: made weights)")
    parser.add_argument("--arch", choices=sorted(WIDTHS), default="gigapath_slide_enc12l384d")
    parser.add_argument("--features", help="tile embeddings of a slide (default: made ones)")
    parser.add_argument("--tiles", type=int, default=1500, help="made tiles")
    words = parser.parse_args(argv)
    width = WIDTHS[words.arch]
    if words.features:
        tiles = gigapath.read_features(words.features, embed_dim=width)
        features, cells = tiles.features.astype(np.float32), tiles.cells
    else:
        features, cells = made_tiles(words.tiles, width)
    model = gigapath.slide_encoder.create_model(words.weights, words.arch, width, global_pool=True).eval()
    model = model if words.weights else made_weights(model)
    weights = f"weights of {words.weights}" if words.weights else "MADE weights (seeded by name, never trained)"
    of = "a slide's tiles" if words.features else "made tiles"
    lines = [f"{words.arch}, {weights}, {len(features)} {of}", ""]
    lines += ["| what changes | cosine | relative difference |", "|---|---|---|"]
    for what, changed, before in rows(model, features, cells):
        a, b = changed.astype(np.float64), before.astype(np.float64)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        lines.append(f"| {what} | {cosine:.4f} | {np.linalg.norm(a - b) / np.linalg.norm(b):.2g} |")
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
