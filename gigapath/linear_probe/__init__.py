"""Probes of frozen embeddings: a linear layer on tiles by the published recipe, logistic regression, nearest
neighbours; and the same question asked of slide embeddings."""

from gigapath.linear_probe.data import ProbeData, load_data
from gigapath.linear_probe.options import ProbeOptions, SlideProbeOptions, TileProbeOptions
from gigapath.linear_probe.table import EmbeddingTable, read_table, write_table
from gigapath.linear_probe.tiles import TileProbe, probe_tiles

__all__ = [
    "EmbeddingTable",
    "ProbeData",
    "ProbeOptions",
    "SlideProbeOptions",
    "TileProbe",
    "TileProbeOptions",
    "load_data",
    "probe_tiles",
    "read_table",
    "write_table",
]
