"""From a tile's pixels to what a tile encoder takes: one description, a form for PIL images and one for batches.

T pixels of a tile's side, B tiles of a batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class TileTransform:
    """Resize the shorter side to `resize` pixels by a filter of Pillow ("bicubic", "bilinear", "lanczos", "nearest",
    "box" or "hamming"), cut a square of `crop` out of the centre, scale to [0, 1], normalise per channel by `mean` and
    `std` on that scale."""

    resize: int
    crop: int
    mean: RGB
    std: RGB
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"TileTransform: expected 0 < crop <= resize, got {self.crop} and {self.resize}.")

    @property
    def name(self) -> str:
        """The transform in words, for provenance."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resize {self.resize} {self.interpolation}, centre crop {self.crop}, mean {mean}, std {std}"

    def compose(self) -> transforms.Compose:
        """The transform of one PIL image, as torchvision writes it; gives float32 (3, crop, crop)."""
        return transforms.Compose(
            [
                transforms.Resize(self.resize, interpolation=transforms.InterpolationMode(self.interpolation)),
                transforms.CenterCrop(self.crop),
                transforms.ToTensor(),
                transforms.Normalize(mean=self.mean, std=self.std),
            ]
        )

    def batch(self, tiles: npt.NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
        """Transform a batch of square tiles, uint8 (B, T, T, 3) RGB: the numbers of `compose`, bit for bit, on any
        device (the pixels travel as uint8); float32 (B, 3, crop, crop), channels last in memory."""
        return self.normalise(torch.from_numpy(self.fit(tiles)).to(device))

    def fits(self, tile_size: int) -> bool:
        """Whether square tiles of this side are not resampled."""
        return tile_size == self.resize

    def fit(self, tiles: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """The transform's first part, in bytes, on the host: uint8 (B, T, T, 3) RGB to (B, resize, resize, 3), in `out`
        where it is given, else an array of its own. Tiles that fit stay as they are; others go through Pillow one by
        one."""
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1] != tiles.shape[2] or tiles.shape[3] != 3:
            raise ValueError(f"TileTransform: expected uint8 tiles (B, T, T, 3), got {tiles.dtype} {tiles.shape}.")
        resized = tiles if self.fits(tiles.shape[1]) else self._resized(tiles)
        if out is None:
            return resized.copy() if resized is tiles else resized
        out[...] = resized
        return out

    def normalise(self, pixels: Tensor) -> Tensor:
        """The other parts, where the pixels are: cut the centre of uint8 (B, resize, resize, 3), scale to [0, 1] and
        normalise per channel; float32 (B, 3, crop, crop), channels last in memory."""
        start = round((self.resize - self.crop) / 2)
        inner = pixels[:, start : start + self.crop, start : start + self.crop]
        whole, mean, std = _constants(self.mean, self.std, pixels.device)
        floats = inner.to(torch.float32, memory_format=torch.contiguous_format)  # the cut costs no copy of its own
        scaled = floats.div_(whole).sub_(mean).div_(std)  # (B, crop, crop, 3)
        return scaled.permute(0, 3, 1, 2)

    def _resized(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        size, resampling = (self.resize, self.resize), Image.Resampling[self.interpolation.upper()]
        resized = np.empty((len(tiles), *size, 3), dtype=np.uint8)
        for i, tile in enumerate(tiles):
            resized[i] = np.asarray(Image.fromarray(tile).resize(size, resampling))
        return resized


@lru_cache(maxsize=32)
def _constants(mean: RGB, std: RGB, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What pixels are divided by, what is taken off and what that is divided by, (3,) each, kept on the device: a copy
    for each batch would make the host wait. Tensors, since CUDA multiplies by the reciprocal of a Python number, which
    rounds differently."""
    whole, mean_, std_ = (torch.tensor(values, device=device) for values in ((255.0,) * 3, mean, std))
    return whole, mean_, std_


# Both released tile encoders. The published config.json says crop_pct 1.0, so timm's own transform of it differs.
RELEASED_TRANSFORM = TileTransform(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
