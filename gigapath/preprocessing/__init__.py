"""From a slide file to tiles: open, find tissue, lay the grid, read. No torch in here.

`header` knows the scale (mpp) that a file states and `slide` which one counts; `tissue` and `masks` find the tissue,
`tiling` lays the tiles, `reading` (through `fast` where that gives the same pixels) reads them.
"""
