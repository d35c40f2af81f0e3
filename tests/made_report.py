"""A small cohort as `gigapath embed` leaves it, for reports: tissue, a planted region, odd names, failures."""

import csv
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_slides import UInt8Array, paint_tissue, write_pyramid
from tiny_encoders import tiny_slide_encoder, tiny_tile_encoder

from gigapath.embedding import run as embedding
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.preprocessing.tiling import TileOptions

SCRIPT = "<script>alert(1)<_script>"  # a slide's id; an id can't hold a slash
MARKUP = "</script><img src=x onerror=alert(2)>"  # a cell of the manifest
PLANTED = "planted"
# The planted region, (x, y, w, h) in level-0 pixels: dark, fine-grained, off the diagonal.
REGION = (448, 640, 192, 128)


def planted_tissue(width: int = 1900, height: int = 1400) -> UInt8Array:
    """`paint_tissue` with one small region of different tissue at REGION."""
    image = paint_tissue(width, height, seed=3)
    x, y, w, h = REGION
    nuclei = np.random.default_rng(5).random((h // 4, w // 4), np.float32)
    grain = cv2.resize(nuclei, (w, h), interpolation=cv2.INTER_NEAREST)[..., None]
    region = grain * np.float32((40, 30, 110)) + (1 - grain) * np.float32((150, 200, 120))
    image[y : y + h, x : x + w] = region.astype(np.uint8)
    return image


def write_cohort_slides(folder: Path, names: Sequence[str] = ("first", "second", SCRIPT, PLANTED)) -> Path:
    """A manifest with the named slides, a blank one, one that is no slide and one whose file is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    for seed, name in enumerate(names):
        path = folder / f"{seed}.tif"
        image = planted_tissue() if name == PLANTED else paint_tissue(1100 + 90 * seed, 800, seed=seed)
        write_pyramid(path, image, mpp=(0.5, 0.5), steps=(1, 2))
        rows.append([path.name, name, f"p{seed // 2}", "ab"[seed % 2], MARKUP if seed == 1 else "H&E"])
    write_pyramid(folder / "blank.tif", np.full((600, 900, 3), 244, np.uint8), mpp=(0.5, 0.5), steps=(1,))
    (folder / "broken.svs").write_text("no slide")
    rows += [["blank.tif", "blank", "p8", "a", "H&E"], ["broken.svs", "broken", "p9", "b", "IHC"]]
    rows.append(["gone.svs", "gone", "p9", "b", ""])
    manifest = folder / "cohort.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "slide_id", "patient_id", "site", "stain"], *rows])
    return manifest


def make_run(folder: Path) -> Path:
    """Embed the slides of `write_cohort_slides` with tiny encoders; the output folder."""
    manifest = write_cohort_slides(folder / "slides")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "load_tile_encoder", lambda *_, **__: tiny_tile_encoder())
        patch.setattr(embedding, "load_slide_encoder", lambda *_, **__: tiny_slide_encoder())
        embedding.run_embed(
            [manifest],
            folder / "out",
            tiling=TileOptions(tile_size=64),
            embedding=EmbedOptions(tile_encoder="standin", slide_encoder="gigapath-flash", device="cpu"),
            options=RunOptions(workers=0),
            command=["slides", "--out", str(folder / "out")],
        )
    return folder / "out"
