"""The slide encoder against numbers computed in float64 from the published model's maths."""

import json
import re
from functools import lru_cache

import numpy as np
import pytest
import timm
import torch
from weights_recipe import fill, made_slide

from gigapath.longnet.attention import use_kernel
from gigapath.slide_encoder import LongNetViT, create_model

BASE, FLASH = "gigapath_slide_enc12l768d", "gigapath_slide_enc12l384d"
FILES = {
    "slide_encoder_base": (BASE, 1536, 262144),
    "slide_encoder_panda": (BASE, 1536, 250000),
    "slide_encoder_flash": (FLASH, 384, 262144),
}
SHORT = [
    ("slide_encoder_base", "s1_b1_l7_g30"),
    ("slide_encoder_base", "s4_b2_l600_g60"),
    ("slide_encoder_panda", "s11_b1_l900_g60"),
    ("slide_encoder_flash", "s31_b1_l1030_g60"),
]
LONG = [
    ("slide_encoder_base", "s2_b1_l1023_g60"),
    ("slide_encoder_base", "s3_b1_l1500_g60"),
    ("slide_encoder_base", "s5_b1_l6100_g120"),
    ("slide_encoder_panda", "s12_b1_l1300_g60"),
    ("slide_encoder_flash", "s32_b1_l2100_g60"),
]


@lru_cache(maxsize=1)
def filled(arch: str, in_chans: int, max_wsi_size: int) -> LongNetViT:
    return fill(create_model("", arch, in_chans, max_wsi_size=max_wsi_size)).eval()


def largest_errors(goldens, file: str, case: str, dtype: torch.dtype) -> list[float]:
    """The largest error of each output that the golden file has for this case."""
    golden = np.load(goldens / f"{file}.npz")
    model = filled(*FILES[file]).to(dtype)
    seed, batch, tiles, grid = map(int, re.findall(r"[sblg](\d+)", case))
    x, coords = made_slide(seed, batch, tiles, model.in_chans, grid)
    errors = []
    for name in (name for name in golden.files if name.startswith(case)):
        model.global_pool = "_pool_" in name
        with torch.inference_mode():
            out = torch.stack(list(model(x.to(dtype), coords, all_layer_embed=name.endswith("_all"))))
        true = torch.from_numpy(golden[name])
        errors.append(float((out - (true if name.endswith("_all") else true[None])).abs().max()))
    assert errors
    return errors


@pytest.mark.parametrize(("file", "case"), SHORT)
def test_slide_encoder_meets_the_short_goldens(goldens, file, case) -> None:
    assert max(largest_errors(goldens, file, case, torch.float32)) <= 1e-5
    if case == "s1_b1_l7_g30":
        assert max(largest_errors(goldens, file, case, torch.float64)) <= 1e-6
        with use_kernel("plain"):
            assert max(largest_errors(goldens, file, case, torch.float32)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("file", "case"), LONG)
def test_slide_encoder_meets_the_long_goldens(goldens, file, case) -> None:
    assert max(largest_errors(goldens, file, case, torch.float32)) <= 1e-5


@pytest.mark.slow
def test_slide_encoder_meets_a_golden_of_several_segments_in_float64(goldens) -> None:
    assert max(largest_errors(goldens, "slide_encoder_flash", "s31_b1_l1030_g60", torch.float64)) <= 1e-6


@pytest.mark.slow
def test_slide_encoder_meets_a_golden_of_several_segments_with_the_plain_kernel(goldens) -> None:
    with use_kernel("plain"):
        assert max(largest_errors(goldens, "slide_encoder_base", "s2_b1_l1023_g60", torch.float32)) <= 1e-5


@pytest.mark.parametrize(("arch", "in_chans", "count"), [(BASE, 1536, 86_330_880), (FLASH, 384, 21_489_408)])
def test_architecture_has_the_released_keys_and_counts(goldens, arch, in_chans, count) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False, in_chans=in_chans)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = json.loads((goldens / "state_dict_keys.json").read_text())[arch]
    assert shapes == expected and len(shapes) == 247
    assert list(shapes) == list(expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    if arch == BASE:
        assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 85_148_160
