"""Tiles of one slide after the other through the tile encoder, with reading, encoding and writing side by side."""
