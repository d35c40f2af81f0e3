"""The pictures of the README and the documentation, from runs on the demo slide with the stand-in encoder.

    python demo/make_pictures.py [FOLDER]

Runs take place in outputs/pictures; the pictures go to docs/pictures, or to FOLDER. Those of the notebooks are their
committed outputs. The slide is CMU-1-Small-Region (CC0); what is wrong with some of its copies was painted on it here.
"""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from at_hand import OUTPUTS, slide_at_hand
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from gigapath.cli.main import main as gigapath
from gigapath.features import read_tiles
from gigapath.pipeline import RunOptions, TileOptions, run_tile
from gigapath.preprocessing.preview import PANEL
from gigapath.preprocessing.reading import read_tile
from gigapath.preprocessing.slide import open_slide, slide_id_of

HERE = Path(__file__).resolve().parent
QUALITY = 82
MAP_WIDTH = 1100  # pixels
MAP_OPACITY = 0.7

# The picture of a notebook's figure: name -> (notebook, words of the cell that draws it).
FROM_NOTEBOOKS = {
    "patch_pca": ("gigapath_pca_visualization_timm.ipynb", "figure.savefig(out"),
    "head_maps": ("finetune_your_slides.ipynb", "maps of the fitted head"),
    "patch_tokens": ("gigapath_pca_visualization_timm.ipynb", "Patch tokens of"),
}


def save(picture, path):
    """Write a figure or an image as JPEG."""
    if isinstance(picture, Figure):
        picture.savefig(path, dpi=110, pil_kwargs={"quality": QUALITY, "optimize": True})
    else:
        picture.convert("RGB").save(path, quality=QUALITY, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def preview(run, slide_id):
    """The preview of a run without its caption, (H, W, 3)."""
    with Image.open(run / "previews" / f"{slide_id}.jpg") as image:
        return np.asarray(image)[:-PANEL]


def no_axes(axes, title):
    """A picture that needs no scale of its own."""
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])


def first_screen(run, maps, slide_path, mpp, chosen):
    """Slide, tiles, and two maps of the tile embeddings, side by side with axes in millimetres."""
    with open_slide(slide_path, slide_mpp=mpp) as slide:
        overview = slide.overview(1.5)
        scale = np.array((slide.mpp.x, slide.mpp.y)) / 1000
        size = np.array(slide.bounds[2:]) * scale
        tiles = read_tiles(run / "tiles" / f"{slide.slide_id}.h5")
        start = (tiles.coords_level0.min(axis=0) - slide.bounds[:2]) * scale
        end = (tiles.coords_level0.max(axis=0) + tiles.tile_size_level0 - slide.bounds[:2]) * scale
        corner = (tiles.coords_level0[chosen] - slide.bounds[:2]) * scale
        slide_id = slide.slide_id
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    tiling = preview(run, slide_id)
    grey = overview.image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    pale = (255 - (255 - grey) * 0.45).astype(np.uint8)  # so that the stain does not mix with a map's colours
    for axes, image in zip(panels, (overview.image, tiling, pale, pale), strict=True):
        axes.imshow(image, extent=(0, size[0], size[1], 0))
        axes.set_xlabel("x (mm)")
    similar = next(maps.glob("similarity_*_overlay.png"))
    about = json.loads(Path(str(similar).replace("_overlay.png", ".json")).read_text(encoding="utf-8"))["colour"]
    shares = json.loads((maps / "pca.json").read_text(encoding="utf-8"))["details"]["variance_shares"]
    for axes, overlay in ((panels[2], maps / "pca_overlay.png"), (panels[3], similar)):
        extent = (start[0], end[0], end[1], start[1])
        axes.imshow(np.asarray(Image.open(overlay)), extent=extent, interpolation="nearest", alpha=MAP_OPACITY)
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    pitch = np.array(tiles.tile_size_level0) * scale
    panels[3].add_patch(Rectangle(corner, *pitch, fill=False, edgecolor="black", linewidth=2.5))
    shades = ScalarMappable(Normalize(about["low"], about["high"]), about["colormap"])
    bar = figure.colorbar(shades, ax=list(panels), alpha=MAP_OPACITY, extend="both", aspect=30, pad=0.01, shrink=0.8)
    bar.set_label("cosine similarity to the framed tile")
    panels[0].set_ylabel("y (mm)")
    titles = (
        "a slide",
        f"its tissue (green), {len(tiles)} tiles (blue)",
        "tile embeddings: 3 components as red,\ngreen, blue ({:.0%}, {:.0%}, {:.0%} of variance)".format(*shares),
        "tile embeddings: similarity\nto the framed tile",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10.5)
    return figure


def tissue_cases(work, image, mpp):
    """The previews of the slide and of copies with something wrong: what is found and what is left out."""
    height, width = image.shape[:2]
    pen = image.copy()
    curve = np.array([(0.62, 0.02), (0.75, 0.1), (0.9, 0.25), (0.95, 0.5), (0.9, 0.8)]) * (width, height)
    cv2.polylines(pen, [curve.astype(np.int32)], False, (35, 60, 165), width // 30, cv2.LINE_AA)
    curve = np.array([(0.05, 0.05), (0.12, 0.3), (0.08, 0.8), (0.2, 0.95)]) * (width, height)
    cv2.polylines(pen, [curve.astype(np.int32)], False, (30, 120, 70), width // 30, cv2.LINE_AA)
    dark = image.copy()
    dark[: height // 50], dark[:, : width // 40] = (60, 58, 62), (60, 58, 62)
    dark[int(0.72 * height) : int(0.9 * height), int(0.05 * width) : int(0.17 * width)] = 0
    pale = np.rint(255 - (255 - image.astype(np.float32)) * 0.5).astype(np.uint8)
    blank = np.full_like(image, 240) - np.random.default_rng(0).integers(0, 4, image.shape, np.uint8)
    cases = [
        ("good: the outline follows the tissue,\nspecks are left out (orange)", image, {}),
        ("good: pen on the glass is left out,\npen on tissue stays, flagged", pen, {}),
        ("good: a dark frame and a black block\nare left out (orange)", dark, {}),
        ("good: a stain faded to a half is found\nagainst the slide's own glass", pale, {}),
        ("bad: --tissue published takes pen for tissue,\nand pale stroma for glass", pen, {"tissue": "published"}),
        ("bad: --min-tissue 0.6 loses strand and rims", image, {"min_tissue": 0.6}),
        ("bad: --tissue none keeps glass", image, {"tissue": "none"}),
        ("blank glass: no tissue, no tiles,\nand the status says so", blank, {}),
    ]
    figure = Figure(figsize=(12, 8.9), layout="constrained")
    width_mm, height_mm = image.shape[1] * mpp / 1000, image.shape[0] * mpp / 1000
    figure.suptitle(
        f"Each picture: {width_mm:.2f} x {height_mm:.2f} mm. Green: outline of the tissue. Blue: tiles of 0.128 mm; "
        "tissue outside them is faded. Orange: left out.",
        fontsize=10,
    )
    for number, (axes, (title, pixels, given)) in enumerate(zip(figure.subplots(2, 4).flat, cases, strict=True)):
        path = work / "cases" / f"case-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)
        tiling = TileOptions(slide_mpp=mpp, **given)
        run_tile([path], work / "tiling" / path.stem, tiling=tiling, options=RunOptions())
        axes.imshow(preview(work / "tiling" / path.stem, path.stem))
        no_axes(axes, title)
    return figure


def scale_cases(work, image, mpp):
    """One place of the slide as a tile, when the stated scale is right, too small, too large, and out of focus."""
    blurred = cv2.GaussianBlur(image, (0, 0), 4)
    cases = [
        (f"right: {mpp:.3g} stated, nuclei of 5 to 10\nmicrons are 10 to 20 pixels", image, mpp, {}),
        ("wrong: 0.25 stated,\nnuclei half as large as they should be", image, 0.25, {}),
        ("wrong: 1 stated, nuclei twice as large\n(refused but for --allow-upsampling)", image, 1.0, {}),
        ("out of focus", blurred, mpp, {}),
    ]
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    centre = np.array((0.56, 0.75)) * image.shape[1::-1]
    for number, (axes, (title, pixels, stated, given)) in enumerate(zip(figure.subplots(1, 4), cases, strict=True)):
        path = work / "scales" / f"scale-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)
        tiling = TileOptions(slide_mpp=stated, allow_upsampling=True, **given)
        run_tile([path], work / "scaling" / path.stem, tiling=tiling)
        tiles = read_tiles(work / "scaling" / path.stem / "tiles" / f"{path.stem}.h5")
        middles = tiles.coords_level0 + np.array(tiles.tile_size_level0) / 2
        index = int(np.argmin(np.abs(middles - centre).max(axis=1)))
        with open_slide(path, slide_mpp=stated) as slide:
            axes.imshow(read_tile(slide, tiles, index), extent=(0, tiles.tile_size, tiles.tile_size, 0))
        focus = tiles.qc[index, tiles.qc_names.index("focus")]
        axes.set_title(f"{title}\nfocus {focus:.0f} cycles per mm", fontsize=9)
        axes.set(
            xlabel="x (pixels of the tile)",
            ylabel="y (pixels)" if number == 0 else "",
            xticks=range(0, 257, 64),
            yticks=range(0, 257, 64),
        )
    return figure


def from_notebook(name, words):
    """The first picture that the notebook's cell with these words drew."""
    for cell in json.loads((HERE / name).read_text(encoding="utf-8"))["cells"]:
        if words in "".join(cell["source"]):
            for output in cell.get("outputs", ()):
                for kind, content in output.get("data", {}).items():
                    if kind.startswith("image/"):
                        return base64.b64decode(content)
    raise SystemExit(f"{name}: no picture of a cell with {words!r}. Run the notebook first.")


def main(folder=None):
    """Make all pictures."""
    folder = Path(folder or HERE.parent / "docs" / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    slide_path, mpp = slide_at_hand()
    work = OUTPUTS / "pictures"
    shutil.rmtree(work, ignore_errors=True)
    slide_id = slide_id_of(slide_path)
    run, maps = work / "run", work / "maps"
    stated = [] if mpp is None else ["--slide-mpp", str(mpp)]
    gigapath(["embed", str(slide_path), "--out", str(run), "--tile-encoder", "standin", *stated])
    tiles = read_tiles(run / "tiles" / f"{slide_id}.h5")
    chosen = len(tiles) // 2
    kinds = ["--kind", "pca", "clusters", "similarity", "--clusters", "5", "--tile", str(chosen)]
    gigapath(["map", str(run / "features_standin"), *kinds, "--out", str(maps)])

    save(first_screen(run, maps / slide_id, slide_path, mpp, chosen), folder / "first_screen.jpg")
    with Image.open(run / "previews" / f"{slide_id}.jpg") as image:
        save(
            image.resize((700, round(700 * image.height / image.width)), Image.Resampling.LANCZOS),
            folder / "preview.jpg",
        )
    for kind in ("pca", "clusters", "similarity"):
        (path,) = [path for path in (maps / slide_id).glob(f"{kind}*.png") if not path.stem.endswith("_overlay")]
        with Image.open(path) as image:
            size = MAP_WIDTH, round(MAP_WIDTH * image.height / image.width)
            save(image.resize(size, Image.Resampling.LANCZOS), folder / f"map_{kind}.jpg")
    with open_slide(slide_path, slide_mpp=mpp) as slide:
        image, scale = slide.read(0, 0, 0, *slide.dimensions), slide.mpp.mean
    save(tissue_cases(work, image, scale), folder / "tissue.jpg")
    save(scale_cases(work, image, scale), folder / "scale.jpg")
    for name, (notebook, words) in FROM_NOTEBOOKS.items():
        path = folder / f"{name}.jpg"
        picture = from_notebook(notebook, words)
        with Image.open(io.BytesIO(picture)) as image:
            if image.format != "JPEG":
                save(image, path)
                continue
        path.write_bytes(picture)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
