"""From slides to tiles, tile vectors and slide embeddings."""
