"""Measurements: what this machine makes of the work, beside what its plain products or readers make of it."""
