"""LongNet: a transformer encoder with dilated attention. Needs torch alone.

`encoder` holds the layers; `dilated` cuts slides into segments and head groups, `varlen` does so for a GPU; `attention`
and `kernels` compute each block; `linear` and `norm` are the products and norms of inference; `readout` gives the
attention weights.
"""
