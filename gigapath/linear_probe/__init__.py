"""Probes of frozen embeddings: a linear layer on tiles by the published recipe, logistic regression, nearest
neighbours; and the same question asked of slide embeddings. Nothing heavy is imported before it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigapath.linear_probe.options import ProbeOptions as ProbeOptions
    from gigapath.linear_probe.options import SlideProbeOptions as SlideProbeOptions
    from gigapath.linear_probe.options import TileProbeOptions as TileProbeOptions
    from gigapath.linear_probe.table import EmbeddingTable as EmbeddingTable
    from gigapath.linear_probe.table import read_table as read_table
    from gigapath.linear_probe.table import write_table as write_table
    from gigapath.linear_probe.tiles import TileProbe as TileProbe
    from gigapath.linear_probe.tiles import probe_tiles as probe_tiles

_WHERE = {
    "EmbeddingTable": "table",
    "ProbeOptions": "options",
    "SlideProbeOptions": "options",
    "TileProbe": "tiles",
    "TileProbeOptions": "options",
    "probe_tiles": "tiles",
    "read_table": "table",
    "write_table": "table",
}


def __getattr__(name: str) -> Any:
    """Load a public name at first use (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module 'gigapath.linear_probe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gigapath.linear_probe.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
