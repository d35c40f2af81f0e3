"""The published functions, for notebooks that exist, and the runs that the command line makes.

The published functions keep their names, arguments and what they give; underneath is the same machinery. They run on
any device: CUDA where it is, as published, else where the model is. N tiles of a slide, D width of a tile embedding.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gigapath import slide_encoder, tile_encoder
from gigapath.embedding.options import EmbedOptions, RunOptions, SlideEmbedOptions
from gigapath.embedding.run import run_embed
from gigapath.embedding.slide_embedding import run_slide_embed
from gigapath.embedding.tiling import run_tile
from gigapath.preprocessing.data.create_tiles_dataset import process_slide
from gigapath.preprocessing.tiling import TileOptions
from gigapath.releases import RELEASES, TILE_FILE
from gigapath.tile_transform import RELEASED_TRANSFORM
from gigapath.weights import find_weights, load_state_dict, tell_architecture

__all__ = [
    "EmbedOptions",
    "RunOptions",
    "SlideEmbedOptions",
    "TileEncodingDataset",
    "TileOptions",
    "load_tile_encoder_transforms",
    "load_tile_slide_encoder",
    "run_embed",
    "run_inference_with_slide_encoder",
    "run_inference_with_tile_encoder",
    "run_slide_embed",
    "run_tile",
    "tile_one_slide",
]


def __dir__() -> list[str]:
    """Tab completion shows the public names alone."""
    return __all__


# A hyphen that joins the corner to a word is no sign.
_CORNER = re.compile(r"((?<![0-9A-Za-z])-?\d+|\d+)x_(-?\d+)y\.\w+$")


class TileEncodingDataset(Dataset[dict[str, Any]]):
    """Tile images whose names carry their corners, such as `00256x_00512y.png`."""

    def __init__(
        self, image_paths: Sequence[str | Path], transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        """Name the images.

        Args:
            image_paths: files of tiles; the names end in `<x>x_<y>y.<suffix>`.
            transform: applied to each RGB image; without one the images come as they are.
        """
        self.image_paths = list(image_paths)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`img`, the (transformed) image, and `coords`, (2,) float32 (x, y)."""
        path = Path(self.image_paths[index])
        found = _CORNER.search(path.name)
        if found is None:
            raise ValueError(f"{path.name}: expected a tile's name that ends in <x>x_<y>y, such as 00256x_00512y.png.")
        with Image.open(path) as file:
            image: Any = file.convert("RGB")
        if self.transform is not None:
            image = self.transform(image)
        return {"img": image, "coords": torch.tensor([float(found[1]), float(found[2])])}


def tile_one_slide(
    slide_file: str | Path = "", save_dir: str | Path = "", level: int = 0, tile_size: int = 256
) -> Path:
    """Cut a slide into PNG tiles, as the published function of this name does, with right coordinates.

    Args:
        slide_file: the slide.
        save_dir: gets `output/<file name>/` with the tiles, `dataset.csv` and `failed_tiles.csv`, and `thumbnails/`.
        level: the level that tiles are cut from.
        tile_size: side of a tile in pixels of that level.

    Returns:
        The folder of the tiles.
    """
    slide_file, save_dir = Path(slide_file), Path(save_dir)
    return process_slide(
        {"image": slide_file, "slide_id": slide_file.name, "metadata": {}},
        level=level,
        margin=0,
        tile_size=tile_size,
        foreground_threshold=None,
        occupancy_threshold=0.1,
        output_dir=save_dir / "output",
        thumbnail_dir=save_dir / "thumbnails",
    )


def load_tile_encoder_transforms() -> transforms.Compose:
    """The transform of both released tile encoders, for one PIL image; gives float32 (3, 224, 224)."""
    return RELEASED_TRANSFORM.compose()


def load_tile_slide_encoder(
    local_tile_encoder_path: str = "", local_slide_encoder_path: str = "", global_pool: bool = False
) -> tuple[nn.Module, slide_encoder.LongNetViT]:
    """Load a tile encoder and a slide encoder, ready to use.

    Args:
        local_tile_encoder_path: a checkpoint of either release, told by its keys; "" fetches Prov-GigaPath's.
        local_slide_encoder_path: likewise for the slide encoder.
        global_pool: True for the mean over the tiles, False for the class token.

    Returns:
        The tile encoder and the slide encoder.
    """
    release = RELEASES["gigapath"]
    tile_arch, slide_arch = release.tile_arch, release.slide_arch
    if local_tile_encoder_path:
        path = find_weights(local_tile_encoder_path, TILE_FILE)
        tile_arch = tell_architecture(load_state_dict(path), "tile", path)
    if local_slide_encoder_path:
        path = find_weights(local_slide_encoder_path, slide_encoder.WEIGHTS_FILE)
        slide_arch = tell_architecture(load_state_dict(path), "slide", path)
    in_chans = next(known.tile_dim for known in RELEASES.values() if known.slide_arch == slide_arch)
    hub = f"hf_hub:{release.repo}"
    tiles = tile_encoder.create_model(local_tile_encoder_path or hub, tile_arch)
    slides = slide_encoder.create_model(local_slide_encoder_path or hub, slide_arch, in_chans, global_pool=global_pool)
    return tiles.eval(), slides.eval()


@torch.no_grad()
def run_inference_with_tile_encoder(
    image_paths: Sequence[str | Path], tile_encoder: nn.Module, batch_size: int = 128
) -> dict[str, Tensor]:
    """Embed tile images, in their order.

    Args:
        image_paths: see `TileEncodingDataset`.
        tile_encoder: takes float32 (B, 3, 224, 224).
        batch_size: B; every batch has it, the last is padded and cut.

    Returns:
        `tile_embeds` (N, D) and `coords` (N, 2) float32, on the CPU.
    """
    device, autocast = _device_and_autocast(tile_encoder)
    dataset = TileEncodingDataset(image_paths, transform=load_tile_encoder_transforms())
    embeddings, coords = [], []
    for batch in DataLoader(dataset, batch_size=batch_size, shuffle=False):
        images = batch["img"]
        padding = images.new_zeros((batch_size - len(images), *images.shape[1:]))
        with autocast:
            embedded = tile_encoder(torch.cat([images, padding]).to(device))
        embeddings.append(embedded[: len(images)].float().cpu())
        coords.append(batch["coords"])
    if not embeddings:
        raise ValueError("run_inference_with_tile_encoder: expected paths of tiles, got none. Tile a slide first.")
    return {"tile_embeds": torch.cat(embeddings), "coords": torch.cat(coords)}


@torch.no_grad()
def run_inference_with_slide_encoder(
    tile_embeds: Tensor, coords: Tensor, slide_encoder_model: nn.Module
) -> dict[str, Tensor]:
    """Embed a slide.

    Args:
        tile_embeds: (N, D), or (B, N, D).
        coords: (N, 2), or (B, N, 2), (x, y) of the tiles' corners at the tiles' level.
        slide_encoder_model: the slide encoder.

    Returns:
        `layer_0_embed` ... `layer_12_embed`, the states, and `last_layer_embed`, the last of them (not the default
        output); each (B, E), on the CPU.
    """
    if tile_embeds.ndim == 2:
        tile_embeds, coords = tile_embeds[None], coords[None]
    device, autocast = _device_and_autocast(slide_encoder_model)
    with autocast:
        states = slide_encoder_model(tile_embeds.to(device), coords.to(device), all_layer_embed=True)
    named = {f"layer_{i}_embed": state.cpu() for i, state in enumerate(states)}
    return {**named, "last_layer_embed": states[-1].cpu()}


def _device_and_autocast(model: nn.Module) -> tuple[torch.device, contextlib.AbstractContextManager[Any]]:
    """The model's device after a move to CUDA where there is one, and the published precision there: fp16 autocast."""
    if torch.cuda.is_available():
        model.cuda()
    model.eval()
    device = next(model.parameters()).device
    if device.type != "cuda":
        return device, contextlib.nullcontext()
    return device, torch.autocast("cuda", dtype=torch.float16)
