"""Public names (PEP 562): those of a package are loaded when they are first used, so that its options alone need no
torch; tab completion shows no others."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


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
