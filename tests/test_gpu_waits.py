"""What makes the host wait for a GPU, counted on CUDA tensors that exist in name only: nothing within a layer or a
batch may."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigapath.longnet.attention import use_kernel
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.encoder import EncoderLayer, drop_path
from gigapath.tile_transform import RELEASED_TRANSFORM

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


pytestmark = pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")


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


def waits(run: Callable[[], object]) -> dict[str, int]:
    with Waits() as counted:
        run()
    return dict(counted.found)


def on_cuda(module: nn.Module) -> nn.Module:
    """The module with parameters that exist in name only."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                part._parameters[name] = nn.Parameter(there, requires_grad=False)
    return module


def test_the_counter_sees_what_waits() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, device="cuda")
        assert waits(lambda: x.new_tensor(1.0)) and waits(lambda: torch.tensor([1, 2], device="cuda"))
        assert waits(lambda: x.cpu()) and not waits(lambda: torch.full((), 1.0, device="cuda"))
        assert not waits(lambda: torch.empty(3).to("cuda", non_blocking=True))


@pytest.mark.parametrize("lengths", [(10_001,), (4_001,) * 8, tuple(count + 1 for count in PANDA)])
def test_a_layer_never_waits(lengths: tuple[int, ...]) -> None:
    config = LongNetConfig(depth=1)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_kernel("cuda-flash"):
        layer = on_cuda(EncoderLayer(config, 0)).eval()
        x = torch.empty(1, sum(lengths), 768, dtype=torch.bfloat16, device="cuda")
        assert waits(lambda: layer(x, lengths)) == {}


def test_drop_path_never_waits() -> None:
    lengths = tuple(count + 1 for count in PANDA)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, sum(lengths), 8, device="cuda")
        assert waits(lambda: drop_path(x, 0.1, lengths)) == {}


def test_the_tile_transform_waits_for_its_first_batch_alone() -> None:
    from gigapath import tile_transform

    tile_transform._constants.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(4, 256, 256, 3, dtype=torch.uint8, device="cuda")
        RELEASED_TRANSFORM.normalise(pixels)
        assert waits(lambda: RELEASED_TRANSFORM.normalise(pixels)) == {}
    tile_transform._constants.cache_clear()  # tensors of that mode mean nothing outside of it
