"""CUDA tensors that exist in name only, and what is counted on them."""

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PANDA = (459, 212, 1018, 249, 396) * 6  # tiles of five slides, six times over
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select")


def named_tensors_work() -> bool:
    """Whether CUDA tensors that exist in name only need no driver: older versions of torch ask for one."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").new_tensor(1.0)
    except RuntimeError:
        return False
    return True


def norms_of(monkeypatch: pytest.MonkeyPatch, *, one_pass: bool) -> None:
    """Decides which norms serve, as nothing can be compared on such tensors."""
    layer_norm = pytest.importorskip("gigapath.longnet.triton_norm").layer_norm if one_pass else None
    monkeypatch.setattr("gigapath.longnet.norm.find_one_pass", lambda *_: layer_norm)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait: values asked for, outputs of unknown size, copies that block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = [[leaf for leaf in tree_leaves(side) if isinstance(leaf, Tensor)] for side in ((args, kwargs), out)]
        if name in WAITS or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.found[name] += 1
        if name in ("_to_copy", "copy_", "lift_fresh_copy") and all(tensors):
            blocking = not ((kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if blocking and {tensors[0][-1].device.type, tensors[1][0].device.type} == {"cpu", "cuda"}:
                self.found["copy"] += 1
        return out


class Operations(Waits):
    """Counts all that is dispatched but views."""

    VIEWS: ClassVar = {
        "view", "_unsafe_view", "as_strided", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze",
        "squeeze", "split", "split_with_sizes", "detach", "alias", "reshape", "unbind", "empty", "empty_like",
        "_reshape_alias", "empty_strided", "new_empty", "lift_fresh", "device", "size",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in self.VIEWS:
            self.seen[name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def on_cuda(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The module with parameters that exist in name only."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                part._parameters[name] = nn.Parameter(there, requires_grad=False)
    return module
