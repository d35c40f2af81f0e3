"""Prov-GigaPath in the open: a slide becomes tiles, tile embeddings and a slide embedding.

Four verbs, one direction: **tile** a slide, **embed** its tiles, **embed** the slide, **fit** a head:

    result = gigapath.embed("slides", out="out", tile_encoder="gigapath")
    ids, vectors = gigapath.read_slides("out")

Importing this package imports nothing heavy; functions and submodules are loaded when they are first touched.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigapath.api import embed, pretrain, probe, read_features, slide_embed, tile
    from gigapath.features import read_slides
    from gigapath.features.tables import to_anndata
    from gigapath.finetune.dataset import BagDataset

__version__ = "0.1.0"

# The published package bears the same name; callers who must know which one they have can ask.
__implementation__ = "gigapath-open"

__all__ = [
    "BagDataset",
    "classification_head",
    "embed",
    "finetune",
    "maps",
    "pipeline",
    "preprocessing",
    "pretrain",
    "probe",
    "read_features",
    "read_slides",
    "slide_embed",
    "slide_encoder",
    "tile",
    "tile_encoder",
    "to_anndata",
]

_FUNCTIONS = {
    **dict.fromkeys(("embed", "pretrain", "probe", "read_features", "slide_embed", "tile"), "gigapath.api"),
    "read_slides": "gigapath.features",
    "to_anndata": "gigapath.features.tables",
    "BagDataset": "gigapath.finetune.dataset",
}
# Looked up as attributes though no statement imported them: the public ones, and those that callers reach for.
_SUBMODULES = {*__all__, "api", "features", "linear_probe", "pos_embed", "torchscale", "weights"} - {*_FUNCTIONS}


def __getattr__(name: str) -> Any:
    """Load a submodule or a function at first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"gigapath.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'gigapath' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))})


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: its full name.
        homes: module of the package, or the full name of another's -> the public names that it holds.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = home_of[name]
        return getattr(importlib.import_module(home if "." in home else f"{package}.{home}"), name)

    return load, lambda: sorted(home_of)
