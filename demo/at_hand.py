"""What the demos run on: a public slide, and the released tile encoder where a token opens it, else the stand-in.

The notebooks and scripts in this folder take a slide of yours instead where one is named.
"""

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import torch

from gigapath.hub import download
from gigapath.preprocessing.made_slide import write_made_slide
from gigapath.releases import RELEASES

CHECKOUT = Path(__file__).resolve().parent.parent
DATA = CHECKOUT / "data"
OUTPUTS = CHECKOUT / "outputs"


def slide_at_hand(slide: str | Path | None = None, mpp: float | None = None) -> tuple[Path, float | None]:
    """A slide, and the microns per pixel to state for it, None where it states them itself.

    Args:
        slide: one of yours; without it CMU-1-Small-Region (H&E, CC0), which is fetched at the first time, or a slide
            made on the spot where it can't be had (HF_HUB_OFFLINE keeps it from trying).
        mpp: of yours, where it does not say.
    """
    if slide is not None:
        return Path(slide), mpp
    real = DATA / "CMU-1-Small-Region.svs"
    if real.exists() or not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            download("demo-slide", DATA)
            print("The slide is CMU-1-Small-Region: a real one, H&E, CC0.")
            return real, None
        except OSError as error:
            print(error)
    made = DATA / "made-slide.png"
    if not made.exists():
        write_made_slide(made)
    print("No public slide could be fetched. The slide is one made on the spot: texture, not tissue.")
    return made, 0.5


def encoder_at_hand() -> str:
    """The name of a tile encoder: a released one where its weights can be had, the small one first without a GPU."""
    names = ["gigapath", "gigapath-flash"] if torch.cuda.is_available() else ["gigapath-flash", "gigapath"]
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(
            RELEASES[name].repo, "pytorch_model.bin", revision=RELEASES[name].revision
        )
        if isinstance(cached, str) or huggingface_hub.get_token() is not None:
            try:
                download(name)
                print(f"The encoder is the released one, {name}.")
                return name
            except OSError as error:
                print(error)
    print("The encoder is the stand-in, EfficientNet-Lite0 with ImageNet weights: it shows how things work.")
    print("It is not GigaPath. With HF_TOKEN set and access granted, the same lines run the released model.")
    return "standin"
