"""A slide to tiles: where the tissue is, which tiles lie on it, and a picture to judge them by.

    python demo/2_tiling_demo.py [SLIDE [--slide-mpp MPP]]

`gigapath tile` is the command of this step; this is the Python of it, and the published function beside it.
"""

import argparse
import json

from at_hand import OUTPUTS, slide_at_hand

from gigapath.features import read_tiles
from gigapath.pipeline import TileOptions, run_tile, tile_one_slide


def main(argv=None):
    """Read the command line, tile, print what there is; returns the tiles."""
    parser = argparse.ArgumentParser(description="Tiles of one slide.")
    parser.add_argument("slide", nargs="?", help="a slide file (default: the demo slide)")
    parser.add_argument("--slide-mpp", type=float, help="microns per level-0 pixel, instead of what the slide says")
    parser.add_argument(
        "--png", action="store_true", help="also cut the tiles as PNG files, as the published code does"
    )
    words = parser.parse_args(argv)
    slide, mpp = slide_at_hand(words.slide, words.slide_mpp)
    out = OUTPUTS / "demo" / "tiling"
    result = run_tile([slide], out, tiling=TileOptions(slide_mpp=mpp))
    row = result.rows[0]
    if row["status"] not in ("done", "no_tissue"):
        raise SystemExit(f"{row['slide_id']}: {row['status']}. {row.get('reason') or ''}")
    tiles = read_tiles(out / "tiles" / f"{row['slide_id']}.h5")
    print(f"{tiles.slide_id}: {len(tiles)} tiles of {tiles.tile_size} px at {tiles.mpp:.4f} microns a pixel")
    print(f"  tissue by {tiles.attrs['tissue_method']}, {tiles.attrs['tissue_area_mm2']:.2f} mm²; left out:")
    for reason, count in json.loads(tiles.attrs["dropped"]).items():
        print(f"    {reason}: {count}")
    print("  first tiles: (x, y) in level-0 pixels, cell (column, row), share of tissue")
    for index in range(min(3, len(tiles))):
        print(f"    {tiles.coords_level0[index]}  {tiles.cells[index]}  {tiles.tissue_fraction[index]:.2f}")
    print(f"Look at the picture: {out / 'previews' / tiles.slide_id}.jpg")
    if words.png:
        print(f"Tiles as PNG files, and their table: {tile_one_slide(slide, save_dir=out / 'png', level=tiles.level)}")
    return tiles


if __name__ == "__main__":
    main()
