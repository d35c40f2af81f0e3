"""Published names of networks that treat parts of a sequence in several ways; LongNet treats all in one."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["MultiwayWrapper", "set_split_position"]


def MultiwayWrapper(args: Any, module: nn.Module, dim: int = 1) -> nn.Module:
    """The module itself, as in every encoder without `args.multiway`."""
    if getattr(args, "multiway", False):
        raise ValueError("MultiwayWrapper: expected multiway False, got True. LongNet has one way.")
    return module


def set_split_position(position: int) -> Callable[[nn.Module], None]:
    """What `Module.apply` takes to set `split_position` where a module has one; none of ours does."""

    def set_on(module: nn.Module) -> None:
        if hasattr(module, "split_position"):
            module.split_position = position  # type: ignore[assignment]

    return set_on
