"""Measurements of this machine, side by side with plain ways of doing the same work: `python -m scripts.bench WHAT`."""
