"""Prov-GigaPath in the open: a slide becomes tiles, tile embeddings and a slide embedding.

Four verbs, one direction: **tile** a slide, **embed** its tiles, **embed** the slide, **fit** a head. Importing
this package imports nothing heavy; the submodules and the readers below are loaded when they are first touched.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigapath.features import read_features as read_features
    from gigapath.features import read_slides as read_slides

__version__ = "0.1.0"

# The published package bears the same name; callers who must know which one they have can ask.
__implementation__ = "gigapath-open"

_SUBMODULES = frozenset(
    {
        "classification_head",
        "features",
        "finetune",
        "linear_probe",
        "maps",
        "metrics",
        "pipeline",
        "pos_embed",
        "preprocessing",
        "slide_encoder",
        "tile_encoder",
        "torchscale",
        "weights",
    }
)
_FUNCTIONS = {"read_features": "gigapath.features", "read_slides": "gigapath.features"}


def __getattr__(name: str) -> Any:
    """Load a submodule or one of the readers at first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"gigapath.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'gigapath' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("__") and name.endswith("__")}
    return sorted({*own, *_SUBMODULES, *_FUNCTIONS})
