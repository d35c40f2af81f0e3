"""The whole way once, small: a made slide, its tiles, narrow encoders, a slide embedding, against stored numbers."""

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gigapath.doctor.findings import Diagnosis
from gigapath.doctor.made_slide import paint, write_slide
from gigapath.features import TileEmbeddingsWriter, read_features
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.slide_encoder import LongNetViT
from gigapath.tile_encoder import TileEncoder
from gigapath.tile_transform import TileTransform

WIDTH = 24
# What the code gave when it was written, and how far another machine's rounding may be from it.
TILES = 10
VECTOR = (-1.19745, -0.06018, 0.29548, 1.1177, -0.9915, -1.3764, 1.25273, -0.46126)
TOLERANCE = 1e-3


def check_whole_way() -> list[Diagnosis]:
    """Run it; seconds, no weights, no network."""
    started = time.monotonic()
    try:
        tiles, vector = whole_way()
    except Exception as error:  # whatever is broken is what the doctor is asked for
        text = f"failed with {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return [Diagnosis("self-test", "whole-way", "wrong", text, "GIGAPATH_DEBUG=1 gigapath doctor shows where.")]
    seconds = time.monotonic() - started
    facts = {"tiles": tiles, "vector": [round(float(value), 6) for value in vector], "seconds": round(seconds, 2)}
    difference = float(np.abs(vector - np.asarray(VECTOR)).max())
    if tiles != TILES:
        text = f"{tiles} tiles were found, expected {TILES}"
        return [
            Diagnosis("self-test", "whole-way", "wrong", text, "look at the versions of OpenCV and OpenSlide.", facts)
        ]
    if not difference <= TOLERANCE:
        text = f"the slide embedding differs from the stored one by {difference:.2g}, where {TOLERANCE} is allowed"
        mend = "look at the attention kernels above, and at the versions of torch and OpenCV."
        return [Diagnosis("self-test", "whole-way", "wrong", text, mend, facts)]
    text = f"slide to slide embedding in {seconds:.1f} s: {tiles} tiles, within {difference:.0e} of the stored numbers"
    return [Diagnosis("self-test", "whole-way", "ok", text, facts=facts)]


def whole_way() -> tuple[int, npt.NDArray[np.float32]]:
    """How many tiles there are, and the first eight numbers of the slide embedding."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, result = Path(folder) / "made.tif", Path(folder) / "made.h5"
        write_slide(path, paint(2300, 1900), mpp=0.25)
        encoder = narrow_tile_encoder()
        with open_slide(path) as slide:
            tiles = plan_tiles(slide, TileOptions()).tiles
            with TileEmbeddingsWriter(result, tiles, embed_dim=WIDTH) as writer:
                for first, pixels in iter_tiles(slide, tiles, batch_size=4, workers=1):
                    writer.write(first, encoder.encode(pixels))
        held = read_features(result)
        features, coords = torch.from_numpy(held.features), torch.from_numpy(held.encoder_coords())
        with torch.inference_mode():
            (vector,) = narrow_slide_encoder()(features[None], coords[None])
    return len(tiles), vector[0, :8].float().numpy()


def narrow_tile_encoder() -> TileEncoder:
    """A convolution and a pooling whose weights are sines: the same on every machine."""
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 16, stride=16), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    _fill(model)
    return TileEncoder(
        name="narrow",
        embed_dim=WIDTH,
        trained=False,
        weights_sha256=None,
        transform=TileTransform(64, 64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        description="a narrow encoder for the self-test",
        device=torch.device("cpu"),
        precision="fp32",
        model=model.eval().requires_grad_(False),
    )


def narrow_slide_encoder() -> LongNetViT:
    """A LongNet of two layers whose weights are sines."""
    model = LongNetViT(in_chans=WIDTH, embed_dim=32, depth=2, global_pool=True)
    _fill(model)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module) -> None:
    """Fill every parameter with sines of its own phase, norms' weights about one."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + number)
            wave = 1 + 0.1 * wave if parameter.ndim == 1 and name.endswith("weight") else 0.2 * wave
            parameter.copy_(wave.reshape(parameter.shape))
