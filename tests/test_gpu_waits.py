"""What makes the host wait for a GPU, counted on CUDA tensors that exist in name only: nothing within a layer or a
batch may."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from named_tensors import PANDA, Waits, named_tensors_work, norms_of, on_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from gigapath.embedding.slide_encoding import load_slide_encoder
from gigapath.features.data import TileEmbeddings
from gigapath.finetune.loop import Loop, Processes
from gigapath.longnet.attention import use_kernel
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.encoder import EncoderLayer, drop_path
from gigapath.pos_embed import LazyPosEmbed
from gigapath.tile_transform import RELEASED_TRANSFORM
from scripts.bench.finetuning import made_trainer, steps
from scripts.bench.gpu_check import synchronizations

on_names = pytest.mark.skipif(not named_tensors_work(), reason="this torch asks for a driver")


def waits(run: Callable[[], object]) -> dict[str, int]:
    with Waits() as counted:
        run()
    return dict(counted.found)


@on_names
def test_the_counter_sees_what_waits() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, device="cuda")
        assert waits(lambda: x.new_tensor(1.0)) and waits(lambda: torch.tensor([1, 2], device="cuda"))
        assert waits(lambda: x.cpu()) and not waits(lambda: torch.full((), 1.0, device="cuda"))
        assert not waits(lambda: torch.empty(3).to("cuda", non_blocking=True))


@on_names
@pytest.mark.parametrize("lengths", [(10_001,), (4_001,) * 8, tuple(count + 1 for count in PANDA)])
def test_a_layer_never_waits(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    norms_of(monkeypatch, one_pass=False)
    config = LongNetConfig(depth=1)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_kernel("cuda-flash"):
        layer = on_cuda(EncoderLayer(config, 0)).eval()
        x = torch.empty(1, sum(lengths), 768, dtype=torch.bfloat16, device="cuda")
        assert waits(lambda: layer(x, lengths=lengths)) == {}


@on_names
def test_drop_path_never_waits() -> None:
    lengths = tuple(count + 1 for count in PANDA)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, sum(lengths), 8, device="cuda")
        assert waits(lambda: drop_path(x, 0.1, lengths)) == {}


@on_names
def test_the_tile_transform_waits_for_its_first_batch_alone() -> None:
    from gigapath import tile_transform

    tile_transform._constants.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(4, 256, 256, 3, dtype=torch.uint8, device="cuda")
        RELEASED_TRANSFORM.normalise(pixels)
        assert waits(lambda: RELEASED_TRANSFORM.normalise(pixels)) == {}
    tile_transform._constants.cache_clear()  # tensors of that mode mean nothing outside of it


def test_a_step_asks_for_the_loss_alone() -> None:
    """Once a batch; on a CPU, where autograd's threads need no driver."""
    model, batches = torch.nn.Linear(4, 1), [torch.ones(2, 4)] * 3
    with Waits() as counted:
        Loop(Processes(torch.device("cpu")), "fp32", 1).add_gradients(model, batches, lambda m, x: m(x).sum(), 6)
    assert counted.found == {"_local_scalar_dense": len(batches)} and model.weight.grad is not None


@pytest.mark.gpu
def test_on_a_gpu_only_results_and_the_loss_are_waited_for() -> None:
    cuda = torch.device("cuda", 0)
    encoder = load_slide_encoder("gigapath-flash", in_chans=384, device=cuda, precision="auto", random_weights=True)
    places = np.arange(3000)
    cells = np.stack([places % 60, places // 60], axis=1)
    features = np.random.default_rng(0).standard_normal((3000, 384), np.float32)
    tiles = TileEmbeddings(slide_id="made", features=features, coords=cells * 256, cells=cells)
    model, trainer = made_trainer("gigapath-flash", PANDA[:4], 12, "auto", cuda)
    step = steps(model, trainer, [np.arange(4)], 1)
    for call, most in ((lambda: encoder.embed(tiles), 1), (step, 1)):
        call()
        with synchronizations(cuda) as found:
            call()
        assert found.total() <= most, found


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 384])
def test_on_a_gpu_positions_are_those_of_the_cpu(width: int) -> None:
    table = LazyPosEmbed(width, 1000)
    rows = torch.randint(0, 1_000_001, (1, 5000), generator=torch.Generator().manual_seed(0))
    expected = table.rows(rows)
    assert torch.equal(table.rows(rows, torch.device("cuda")).cpu(), expected)
    assert torch.equal(table.rows(rows.cuda()).cpu(), expected)
