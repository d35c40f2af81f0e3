"""From slides to tiles, tile embeddings and slide embeddings.

The stages are in `tiling`, `features_stage` and `slide_stage`, the runs over many slides in `run` and
`slide_embedding`.
"""
