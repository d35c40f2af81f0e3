"""LongNet: a transformer encoder with dilated attention. Needs torch alone."""
