"""The OpenSlide library and what it decodes; and the whole way once, small, against stored numbers, on a made slide."""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide
import torch
from torch import nn

from gigapath.devices import computing
from gigapath.features import TileEmbeddingsWriter, read_features
from gigapath.findings import NOTE, OK, WRONG, Finding
from gigapath.preprocessing.reading import iter_tiles
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.slide_encoder import LongNetViT
from gigapath.tile_encoder import TileEncoder
from gigapath.tile_transform import TileTransform

UInt8Array = npt.NDArray[np.uint8]

# TIFF's numbers for how a tile is packed; Aperio's for JPEG 2000 in RGB.
COMPRESSIONS = {"none": 1, "jpeg": 7, "jpeg2000": 33005}
_TILE = 256
_MAPS = Path("/proc/self/maps")
_OLDEST = (4, 0)  # DICOM, and many mended readers
# Lossy codecs move a color by a few steps.
_LARGEST_MEAN_ERROR = 3.0
WIDTH = 24
# What the code gave when it was written, and how far another machine's rounding may be from it.
TILES = 10
VECTOR = (-1.19745, -0.06018, 0.29548, 1.1177, -0.9915, -1.3764, 1.25273, -0.46126)
TOLERANCE = 1e-3


def check_library() -> list[Finding]:
    """Version and place of the library in use."""
    version, place = str(openslide.__library_version__), loaded_from()
    text = f"OpenSlide {version} from {place or 'an unknown place'}"
    facts = {"version": version, "path": place, "python": openslide.__version__}
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST:
        advice = "pip install openslide-bin: it brings 4.0, which reads DICOM and mends other readers."
        return [Finding("openslide", text, advice, NOTE, facts)]
    return [Finding("openslide", text, state=OK, facts=facts)]


def loaded_from() -> str | None:
    """The file of the loaded library: as the system says, else that of the package which brings it."""
    try:
        mapped = [
            line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines() if "libopenslide" in line
        ]
    except OSError:  # not Linux
        mapped = []
    if mapped:
        return mapped[0]
    package = sys.modules.get("openslide_bin")
    return None if package is None else os.path.dirname(str(package.__file__))  # noqa: PTH120


def check_codecs() -> list[Finding]:
    """Write a small slide with each codec that slides use and read it back."""
    found = []
    image = paint(300, 280)
    for codec, name in (("none", "uncompressed"), ("jpeg", "JPEG"), ("jpeg2000", "JPEG 2000")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("made.svs" if codec == "jpeg2000" else "made.tif")
            write_slide(path, image, mpp=0.5, compression=codec)
            try:
                with open_slide(path) as slide:
                    pixels = slide.read(0, 0, 0, 300, 280)
                error = float(np.abs(pixels.astype(int) - image).mean())
                fault = "" if error <= _LARGEST_MEAN_ERROR else f"colors are off by {error:.1f} on average"
            except ValueError as problem:
                fault = str(problem)
        advice = "pip install --force-reinstall openslide-bin." if fault else ""
        found.append(Finding(f"codec-{codec}", f"{name}: {fault or 'read and right'}", advice, WRONG if fault else OK))
    return found


def check_whole_way() -> list[Finding]:
    """A made slide, its tiles, narrow encoders, a slide embedding; seconds, no weights, no network. On the CPU, and on
    each GPU that is there."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [_check_way(device) for device in (torch.device("cpu"), *gpus)]


def _check_way(device: torch.device) -> Finding:
    name = "whole-way" if device.type == "cpu" else f"whole-way-{device.type}-{device.index}"
    started = time.monotonic()
    try:
        tiles, vector = whole_way(device)
    except Exception as error:  # whatever is broken is what the doctor is asked for
        text = f"{device}: failed with {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return Finding(name, text, "GIGAPATH_DEBUG=1 gigapath doctor shows where.")
    seconds = time.monotonic() - started
    facts = {"tiles": tiles, "vector": [round(float(value), 6) for value in vector], "seconds": round(seconds, 2)}
    difference = float(np.abs(vector - np.asarray(VECTOR)).max())
    if tiles != TILES:
        text, advice = f"{tiles} tiles were found, expected {TILES}", "look at the versions of OpenCV and OpenSlide."
        return Finding(name, text, advice, facts=facts)
    if not difference <= TOLERANCE:
        text = f"{device}: the slide embedding differs from the stored one by {difference:.2g}, allowed is {TOLERANCE}"
        advice = "look at the attention kernels above, and at the versions of torch and OpenCV."
        return Finding(name, text, advice, facts=facts)
    text = f"slide to slide embedding on {device} in {seconds:.1f} s: {tiles} tiles, within {difference:.0e} of the "
    return Finding(name, f"{text}stored numbers", state=OK, facts=facts)


def whole_way(device: torch.device) -> tuple[int, npt.NDArray[np.float32]]:
    """How many tiles there are, and the first eight numbers of the slide embedding."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, result = Path(folder) / "made.tif", Path(folder) / "made.h5"
        write_slide(path, paint(2300, 1900), mpp=0.25)
        encoder = narrow_tile_encoder(device)
        with open_slide(path) as slide:
            tiles = plan_tiles(slide, TileOptions()).tiles
            with TileEmbeddingsWriter(result, tiles, embed_dim=WIDTH) as writer:
                for first, pixels in iter_tiles(slide, tiles, batch_size=4, workers=1):
                    writer.write(first, encoder.encode(pixels))
        held = read_features(result)
        features, coords = torch.from_numpy(held.features).to(device), torch.from_numpy(held.encoder_coords())
        with torch.inference_mode(), computing("fp32", device):
            (vector,) = narrow_slide_encoder().to(device)(features[None], coords[None].to(device))
    return len(tiles), vector[0, :8].float().cpu().numpy()


def narrow_tile_encoder(device: torch.device) -> TileEncoder:
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
        device=device,
        precision="fp32",
        model=model.eval().requires_grad_(False).to(device),
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


def paint(width: int, height: int) -> UInt8Array:
    """A pale field with two ellipses of texture, by arithmetic alone: the same bytes on every machine; (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.full((height, width, 3), (243, 241, 244), np.int64)
    grain = (x * 7 + y * 13 + (x // 16) * (y // 16) * 5) % 61
    for center, axes in (((0.30, 0.42), (0.22, 0.34)), ((0.77, 0.70), (0.15, 0.20))):
        dx, dy = (x - int(center[0] * width)), (y - int(center[1] * height))
        a, b = int(axes[0] * width), int(axes[1] * height)
        inside = dx * dx * b * b + dy * dy * a * a <= a * a * b * b
        image[inside] = (np.array((200, 120, 170)) - grain[..., None] // np.array((1, 2, 3)))[inside]
    return image.astype(np.uint8)


def write_slide(path: Path, image: UInt8Array, *, mpp: float, compression: str = "none") -> None:
    """Write `image` as a tiled TIFF of one level that OpenSlide reads.

    Args:
        image: (H, W, 3).
        mpp: microns per pixel.
        compression: a key of COMPRESSIONS; "jpeg2000" writes an Aperio header, whose reader knows it.
    """
    import tifffile  # where it is broken, the check that writes a slide says so, and the others go on

    height, width = image.shape[:2]
    aperio = f"Aperio Image Library\r\n{width}x{height} ({_TILE}x{_TILE})|AppMag = {10 / mpp:g}|MPP = {mpp}"
    codec: dict[str, dict[str, Any]] = {"jpeg": {"level": 95}, "jpeg2000": {"codecformat": "j2k"}}
    tifffile.imwrite(
        path,
        image,
        tile=(_TILE, _TILE),
        photometric="rgb",
        subsampling=(1, 1) if compression == "jpeg" else None,
        compression=COMPRESSIONS[compression],
        compressionargs=codec.get(compression),
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        description=aperio if compression == "jpeg2000" else None,
        metadata=None,
        software=False,
    )
