"""What makes the host wait for a GPU, counted on CUDA tensors that exist in name only: nothing within a layer or a
batch may."""

from collections.abc import Callable

import pytest
import torch
from named_tensors import PANDA, Waits, named_tensors_work, on_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from gigapath.longnet.attention import use_kernel
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.encoder import EncoderLayer, drop_path
from gigapath.tile_transform import RELEASED_TRANSFORM

pytestmark = pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")


def waits(run: Callable[[], object]) -> dict[str, int]:
    with Waits() as counted:
        run()
    return dict(counted.found)


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
        assert waits(lambda: layer(x, lengths=lengths)) == {}


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
