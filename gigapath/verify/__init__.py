"""Proof with the released weights, by whoever has them: `gigapath verify`."""
