"""From a slide file to tiles: open, find tissue, lay the grid, read. No torch in here."""
