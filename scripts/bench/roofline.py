"""What the dispatched operations of a call would take if nothing but the device's arithmetic and memory limited them.

A product takes its operations at the rate of a plain product, attention at a third of it (what flash attention reaches
at head widths of 48), or its bytes at the rate of a copy where that is longer; everything else takes its bytes. Views
are free, and so are launches: a floor on paper, to measure against.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scripts.bench.protocol import Ratio, Work, time_of

DEVICES = {"cuda"}  # where a row says how far it is from its floor: the passes that count cost time on a CPU
ATTENTION_RATE = 1 / 3  # of a product's
_PEAKS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear")


class Floor(TorchDispatchMode):
    """Adds up the seconds of what is dispatched."""

    def __init__(self, rate: float, bandwidth: float) -> None:
        super().__init__()
        self.rate, self.bandwidth, self.seconds = rate, bandwidth, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry and func is not torch.ops.prim.device.default:
            with self:  # an operation that is made of others counts as these
                made_of = func.decompose(*args, **kwargs)
            if made_of is not NotImplemented:
                return made_of
        out = func(*args, **kwargs)
        given, made = ([x for x in tree_leaves(side) if isinstance(x, Tensor)] for side in ((args, kwargs), out))
        if func.is_view or not made:
            return out
        name = func._schema.name.partition("::")[2]
        if name.startswith(("empty", "new_empty", "_to_copy")) and len({x.device for x in given + made}) > 1:
            return out  # between host and device, beside the computing
        seconds = 0.0 if name.startswith("empty") else sum(map(_bytes, given + made)) / self.bandwidth
        if func._overloadpacket in flop_registry:
            operations = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            seconds = max(seconds, operations / (self.rate * (1 if name in _PEAKS else ATTENTION_RATE)))
        self.seconds += seconds
        return out


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def limits(work: Work, measured: Ratio, device: torch.device) -> dict[str, float]:
    """What a row says of a work on a GPU: `of_roofline`, its floor over its time, and `peak_bytes` of one call.

    Args:
        work: as it was measured.
        measured: against a plain product, whose rate the floor is computed with.
        device: where; {} on a CPU.
    """
    if device.type not in DEVICES:
        return {}
    work.call()
    with Floor(measured.theirs, bandwidth(device)) as floor:
        work.call()
    found = {"of_roofline": floor.seconds * measured.ours / work.amount}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.call()
        torch.cuda.synchronize(device)
        found["peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return found


@cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that is far larger than the caches."""
    x = torch.ones((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = Work(lambda: y.copy_(x), 2.0 * x.numel())
    time_of(copy, 2, device)
    return copy.amount / min(time_of(copy, 1, device) for _ in range(5))
