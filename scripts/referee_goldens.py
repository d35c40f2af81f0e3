"""Make `tests/goldens/other_tools.npz`: the slide vectors that other tools' own code computes through this package.

    pip install --no-deps slide2vec==7.1.4 lazyslide-models==0.1.0 mussel-pathology==1.5.0 raw2features==0.2.1
    PYTHONPATH=. python scripts/referee_goldens.py tests/goldens/other_tools.npz

In an environment of its own, with what the tools import at their top. Weights are filled by the goldens' recipe; each
tool gets them where it would download them, then tile embeddings and level-0 corners in the order of its own files.
Where a tool hands on another form of its file's coordinates than the file's, it does so itself.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from weights_recipe import fill

from gigapath.slide_encoder import create_model

ARCH, WIDTH, TILES = "gigapath_slide_enc12l768d", 1536, 40
PITCHES = {"20x": 256, "40x": 512}  # level-0 pixels of a 256-pixel tile at 0.5 mpp


def made_tiles(pitch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tile embeddings (N, 1536) float32 and level-0 corners (N, 2) int64, column by column."""
    random = np.random.RandomState(7)
    cells = np.sort(random.choice(30 * 30, TILES, replace=False))
    features = random.standard_normal((TILES, WIDTH)).astype(np.float32)
    return features, np.stack([cells // 30, cells % 30], axis=1).astype(np.int64) * pitch


def by_slide2vec(features: torch.Tensor, coords: torch.Tensor, pitch: int) -> Any:
    from slide2vec.encoders.models.gigapath import GigaPathSlideEncoder
    from slide2vec.runtime.slide_encode import encode_slide_from_tiles

    tiling = SimpleNamespace(x=coords[:, 0], y=coords[:, 1], tile_size_lv0=pitch, step_px_lv0=pitch)
    loaded: Any = SimpleNamespace(model=GigaPathSlideEncoder().to("cpu"), device=torch.device("cpu"))
    return encode_slide_from_tiles(loaded, features, tiling)


def by_mussel(features: torch.Tensor, coords: torch.Tensor, pitch: int) -> Any:
    from mussel.models.gigapath import GigapathSlideEncoderModel

    model = GigapathSlideEncoderModel("hf-hub:prov-gigapath/prov-gigapath", use_gpu=False)
    return model.get_model_fun()(features[None], coords[None])


def by_lazyslide(features: torch.Tensor, coords: torch.Tensor, pitch: int) -> Any:
    from lazyslide_models.vision.gigapath import GigaPathSlideEncoder

    with torch.inference_mode():  # as lazyslide's `_encode_slide` calls it
        return GigaPathSlideEncoder().encode_slide(features[None], coords.long()[None])["embeddings"]


def by_raw2features(features: torch.Tensor, coords: torch.Tensor, pitch: int) -> Any:
    from raw2features.slide_embedders import gigapath_slide

    gigapath_slide.download_pinned_hf_file = lambda *args: huggingface_hub.hf_hub_download()
    gigapath_slide.verify_sha256 = lambda *args, **kwargs: None
    return gigapath_slide.GigapathSlideEmbedder().load("cpu").encode(features.numpy(), coords.numpy(), pitch)


TOOLS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Any]] = {
    "slide2vec": by_slide2vec,
    "mussel": by_mussel,
    "lazyslide": by_lazyslide,
    "raw2features": by_raw2features,
}


def main() -> None:
    """Read the command line, ask each tool, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    vectors = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "slide_encoder.pth")
        torch.save({"model": fill(create_model("", ARCH, WIDTH)).state_dict()}, weights)
        huggingface_hub.hf_hub_download = lambda *args, **kwargs: str(weights)  # before a tool imports it by name
        for tool, encode in TOOLS.items():
            for scale, pitch in PITCHES.items():
                features, coords = map(torch.from_numpy, made_tiles(pitch))
                found = np.asarray(encode(features, coords, pitch), dtype=np.float32)
                vectors[f"{tool}/{scale}"] = found.reshape(-1)
                print(tool, scale, found.shape, found.reshape(-1)[:3])
    np.savez(out, **vectors)


if __name__ == "__main__":
    main()
