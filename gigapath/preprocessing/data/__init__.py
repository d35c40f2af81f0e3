"""The published names for cutting a slide into PNG tiles, on this package's own reader and grid.

Notebooks that import them keep running. New work streams tiles (`gigapath.preprocessing.tiling`) and writes no PNG.
"""
