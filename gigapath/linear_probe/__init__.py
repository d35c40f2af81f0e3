"""Probes of frozen embeddings: a linear layer on tiles by the published recipe, logistic regression, nearest
neighbours; and the same question asked of slide embeddings. Nothing heavy is imported before it is used."""

from typing import TYPE_CHECKING

from gigapath.lazy import lazy_names

if TYPE_CHECKING:
    from gigapath.linear_probe.options import ProbeOptions, SlideProbeOptions, TileProbeOptions
    from gigapath.linear_probe.table import EmbeddingTable, read_table, write_table
    from gigapath.linear_probe.tiles import TileProbe, probe_tiles

__all__ = [
    "EmbeddingTable",
    "ProbeOptions",
    "SlideProbeOptions",
    "TileProbe",
    "TileProbeOptions",
    "probe_tiles",
    "read_table",
    "write_table",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "options": ("ProbeOptions", "SlideProbeOptions", "TileProbeOptions"),
        "table": ("EmbeddingTable", "read_table", "write_table"),
        "tiles": ("TileProbe", "probe_tiles"),
    },
)
