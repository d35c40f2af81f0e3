"""Small pyramids for tests: real files that OpenSlide opens, never square, tissue off the diagonal, mpp stated."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from gigapath.features import Tiles
from gigapath.preprocessing.slide import Slide
from gigapath.preprocessing.tiling import plan_grid

UInt8Array = npt.NDArray[np.uint8]

_LEICA = "http://www.leica-microsystems.com/scn/2010/10/01"


def paint_tissue(width: int, height: int, *, mpp: float = 0.5, seed: int = 0) -> UInt8Array:
    """A white field with two pieces of pink and purple tissue, left of the middle and at the lower right; (H, W, 3).

    The picture is drawn in shares of the field, with texture down to single pixels: the same field at another `mpp`
    shows the same tissue. No two tiles look alike.
    """
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), (243, 241, 244), np.uint8)
    pieces = np.zeros((height, width), np.uint8)
    for centre, axes, angle in (((0.30, 0.42), (0.20, 0.30), 15), ((0.76, 0.68), (0.14, 0.20), -25)):
        middle = round(centre[0] * width), round(centre[1] * height)
        cv2.ellipse(pieces, middle, (round(axes[0] * width), round(axes[1] * height)), angle, 0, 360, 1, -1)
    coarse = rng.random((max(2, round(height * mpp / 20)), max(2, round(width * mpp / 20))), np.float32)
    density = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    tissue = (1 - density) * np.float32((226, 160, 196)) + density * np.float32((120, 70, 150))
    tissue += 6 * rng.standard_normal((height, width, 1), np.float32)
    inside = pieces.astype(bool)
    image[inside] = np.clip(tissue, 0, 255).astype(np.uint8)[inside]
    return np.where(rng.integers(0, 2, (height, width, 1), np.uint8), image, image - 2).astype(np.uint8)


def write_pyramid(
    path: Path,
    image: UInt8Array,
    *,
    mpp: tuple[float, float] | None,
    steps: Sequence[int] = (1, 2, 4),
    tile: int = 240,
    compression: str = "jpeg",
    aperio: bool = False,
    objective: float | None = None,
    description: str = "",
    label: UInt8Array | None = None,
) -> Path:
    """Write `image` (H, W, 3) as a tiled TIFF with one level per downsample in `steps`.

    Args:
        path: .tif, or .svs with `aperio`.
        image: level 0.
        mpp: microns per pixel along x and y, in the resolution tags; None leaves them out. With `aperio` the header
            takes the mean.
        steps: downsample of each level, first 1; the levels' sizes are rounded down, as scanners do.
        tile: side of the TIFF's own tiles, a multiple of 16.
        compression: "jpeg", or "deflate" for pixels kept to the last bit.
        aperio: write an Aperio header, which also holds `objective`.
        objective: objective power for the Aperio header.
        description: text put into the ImageDescription, for tests of what must not leak.
        label: (h, w, 3) picture of the paper label, with `aperio`.
    """
    height, width = image.shape[:2]
    text = description
    if aperio:
        fields = [f"Aperio Image Library v12.0\r\n{width}x{height} (240x240) JPEG/RGB Q=90 {description}"]
        fields += [] if objective is None else [f"AppMag = {objective:g}"]
        fields += [] if mpp is None else [f"MPP = {sum(mpp) / 2:.6f}"]
        text = "|".join(fields)
    with tifffile.TiffWriter(path) as file:
        for index, step in enumerate(steps):
            kind = 0 if index == 0 or aperio else 1
            _write_level(file, image, step, mpp, text, tile=tile, compression=compression, subfiletype=kind)
        if label is not None:
            text = f"Aperio Image Library v12.0\r\nlabel {label.shape[1]}x{label.shape[0]} {description}"
            file.write(label, photometric="rgb", subfiletype=1, description=text, metadata=None, software=False)
    return path


def write_scn(
    path: Path,
    image: UInt8Array,
    *,
    canvas: tuple[int, int],
    offset: tuple[int, int],
    mpp: float,
    steps: Sequence[int] = (1, 2, 4),
    objective: float = 20,
    tile: int = 240,
) -> Path:
    """Write `image` as a Leica slide: it lies at `offset` (x, y) on a transparent `canvas` (w, h), in level-0 pixels.

    OpenSlide gives the scanned area as its bounds. The sides of `image` should divide by every step.
    """
    height, width = image.shape[:2]
    nm = round(mpp * 1000)
    dimensions = "".join(
        f'<dimension sizeX="{width // step}" sizeY="{height // step}" r="{index}" ifd="{index}"/>'
        for index, step in enumerate(steps)
    )
    text = (
        f'<?xml version="1.0"?><scn xmlns="{_LEICA}"><collection sizeX="{canvas[0] * nm}" sizeY="{canvas[1] * nm}">'
        f'<image><device model="Leica SCN400" version="1"/><pixels>{dimensions}</pixels>'
        f'<view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{offset[0] * nm}" offsetY="{offset[1] * nm}"/>'
        f"<scanSettings><objectiveSettings><objective>{objective:g}</objective></objectiveSettings>"
        "<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        "</scanSettings></image></collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for index, step in enumerate(steps):
            _write_level(file, image, step, (mpp, mpp), text if index == 0 else "", tile=tile, compression="jpeg")
    return path


def _write_level(
    file: tifffile.TiffWriter,
    image: UInt8Array,
    step: int,
    mpp: tuple[float, float] | None,
    text: str,
    *,
    tile: int,
    **how: object,
) -> None:
    """Write `image`, made `step` times smaller, as a page of tiles."""
    if step > 1:
        height, width = image.shape[:2]
        image = cv2.resize(image, (width // step, height // step), interpolation=cv2.INTER_AREA)
    resolution = (1, 1) if mpp is None else (1e4 / (mpp[0] * step), 1e4 / (mpp[1] * step))
    unit = "NONE" if mpp is None else "CENTIMETER"
    plain = {"photometric": "rgb", "description": text or None, "metadata": None, "software": False}
    file.write(image, tile=(tile, tile), resolution=resolution, resolutionunit=unit, **plain, **how)


def all_tiles(slide: Slide, *, mpp: float = 0.5, tile_size: int = 64) -> Tiles:
    """Every tile of a slide's grid, tissue or not."""
    grid = plan_grid(slide, mpp=mpp, tile_size=tile_size, allow_upsampling=True)
    cells = np.stack(np.meshgrid(np.arange(grid.columns), np.arange(grid.rows)), axis=-1).reshape(-1, 2)
    n = len(cells)
    return Tiles(
        slide_id=slide.slide_id,
        coords_level0=grid.corners(cells),
        cells=cells,
        tissue_fraction=np.ones(n),
        section=np.ones(n, int),
        qc=np.zeros((n, 0)),
        qc_names=(),
        level=grid.level,
        read_size=grid.read_size,
        tile_size=tile_size,
        tile_size_level0=grid.pitch,
        mpp=float(np.mean(grid.mpp)),
    )


def make_slides(folder: Path, count: int, side: int = 340) -> Path:
    """Small slides with tissue, no two alike, every ninth of them blank."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = paint_tissue(side + 40 * (number % 5), side - 60, seed=number)
        if number % 9 == 8:
            image = np.full_like(image, 242)
        write_pyramid(folder / f"s{number:02d}.tif", image, mpp=(0.5, 0.5), steps=(1,), tile=128)
    return folder
