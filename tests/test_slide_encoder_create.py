"""create_model: weights from the hub or a file, what it ignores, what it costs."""

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from fake_weights import slide_checkpoint
from narrow_longnet import NarrowLongNet
from torch.utils._python_dispatch import TorchDispatchMode
from weights_recipe import fill

import gigapath
from gigapath import slide_encoder
from gigapath.longnet.linear import bfloat16_pays
from gigapath.slide_encoder import ARCHITECTURES, LongNetViT, create_model

FLASH = "gigapath_slide_enc12l384d"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of two layers of the Flash architecture, as released: {"model": state dict}."""
    path = tmp_path_factory.mktemp("weights") / "slide_encoder.pth"
    torch.save({"model": fill(create_model("", FLASH, 12, depth=2)).state_dict()}, path)
    return path


def load(checkpoint: Path, **kwargs) -> LongNetViT:
    return create_model(str(checkpoint), FLASH, 12, depth=2, **kwargs).eval()


def test_create_model_downloads_into_the_cache_or_a_folder(monkeypatch, checkpoint) -> None:
    calls = []

    def fake(repo_id, filename=None, **options):
        calls.append((repo_id, filename, options))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    model = create_model("hf_hub:someone/somewhere", FLASH, 12, depth=2)
    assert torch.equal(model.cls_token, torch.load(checkpoint, weights_only=True)["model"]["cls_token"])
    create_model(pretrained="hf_hub:someone/somewhere", model_arch=FLASH, in_chans=12, local_dir="/to", depth=2)
    assert [call[:2] for call in calls] == [("someone/somewhere", "slide_encoder.pth")] * 2
    assert calls[0][2].get("local_dir") is None and str(calls[1][2]["local_dir"]) == "/to"
    assert not any(options.get("force_download") for _, _, options in calls)


def test_create_model_takes_the_name_of_a_release(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(slide_checkpoint()))
    with pytest.warns(RuntimeWarning, match="sha256"):
        model = create_model("gigapath-flash")
    assert (model.embed_dim, model.in_chans) == (384, 384)
    with pytest.raises(ValueError, match="in_chans"):
        create_model("hf_hub:someone/somewhere", FLASH)


def test_create_model_raises_where_the_file_is_missing() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        create_model("nowhere.pth", FLASH, 12)
    with pytest.raises(ValueError, match="random weights"):
        create_model(None, FLASH, 12)


def test_create_model_reads_wrapped_and_bare_checkpoints(checkpoint, tmp_path) -> None:
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.save(state, tmp_path / "bare.pth")
    for path in (checkpoint, tmp_path / "bare.pth"):
        model = load(path)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_create_model_warns_of_unexpected_and_raises_for_missing_weights(checkpoint, tmp_path, capsys) -> None:
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({**state, "decoder.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.warns(UserWarning, match=r"decoder\.weight"):
        load(tmp_path / "more.pth")
    del state["encoder.layers.1.ffn.fc2.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.ffn\.fc2\.weight"):
        load(tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight"):
        create_model(str(checkpoint), FLASH, 13, depth=2)
    assert capsys.readouterr().out == ""


def test_create_model_ignores_what_it_does_not_know_with_one_warning() -> None:
    given = argparse.Namespace(global_pool=True, dropout=0.1, device="cuda:0", lr=None, epochs=5, drop_path_rate=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = create_model("", FLASH, 12, depth=2, **vars(given))
    assert [str(warning.message).count(word) for warning in caught for word in ("device", "lr", "epochs")] == [1, 1, 1]
    assert model.global_pool and model.encoder.config.dropout == 0.1
    with pytest.warns(UserWarning, match="colour"):
        NarrowLongNet(in_chans=12, embed_dim=32, depth=1, colour="blue")


def test_create_model_names_the_architectures_for_an_unknown_one() -> None:
    with pytest.raises(ValueError, match=r"gigapath_slide_enc12l768d.*'longnet'"):
        create_model("", "longnet", 12)


@pytest.mark.parametrize(
    ("arch", "depth", "width"),
    [(ARCHITECTURES[0], 12, 768), (ARCHITECTURES[1], 24, 1024), (ARCHITECTURES[2], 12, 1536)],
)
def test_architectures_are_in_timms_registry_and_functions(arch, depth, width) -> None:
    with torch.device("meta"):
        model = timm.create_model(
            arch, pretrained=False, in_chans=9, global_pool=True, slide_ngrids=500, max_wsi_size=250000, dropout=0.1,
            drop_path_rate=0.2,
        )  # fmt: skip
        same = getattr(slide_encoder, arch)(in_chans=9, pretrained_cfg=None, cache_dir="x", pretrained_model_args={})
    assert isinstance(model, LongNetViT) and isinstance(same, LongNetViT)
    assert (model.encoder.num_layers, model.cls_token.shape[-1], model.slide_ngrids) == (depth, width, 500)
    assert model.encoder.config.segment_lengths == (1024, 4870, 23170, 110217, 524288)
    assert model.norm.eps == 1e-6 and model.encoder.layer_norm.eps == 1e-5
    assert [model.encoder.layers[i].drop_path.drop_prob for i in (0, depth - 1)] == [0, 0.2]


def test_timms_registry_gives_no_random_weights_for_pretrained_ones() -> None:
    with pytest.raises(ValueError, match=r"gigapath\.slide_encoder\.create_model"):
        timm.create_model(FLASH, pretrained=True, in_chans=12, depth=1)


def test_auto_precision_is_measured_on_the_cpu_also_where_a_checkpoint_is_loaded(monkeypatch, checkpoint) -> None:
    measured = []

    def record(a, b):
        measured.append(a.device.type)
        return product(a, b)

    product = torch.mm
    monkeypatch.setattr(torch, "mm", record)
    bfloat16_pays.cache_clear()
    load(checkpoint, linear_precision="auto")
    assert set(measured) == {"cpu"}
    bfloat16_pays.cache_clear()


def test_building_draws_each_weight_once_and_loading_draws_none(checkpoint) -> None:
    class Drawn(TorchDispatchMode):
        """Counts the elements that random operations write outside of the meta device, and the largest tensor."""

        elements = 0
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type != "meta":
                self.largest = max(self.largest, out.numel())
                if func.overloadpacket.__name__ in ("uniform_", "normal_"):
                    self.elements += out.numel()
            return out

    with Drawn() as drawn:
        model = create_model("", FLASH, 12, depth=2)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert drawn.elements == matrices
    assert drawn.largest == max(parameter.numel() for parameter in model.parameters())
    with Drawn() as drawn:
        load(checkpoint)
    assert drawn.elements == 0


@pytest.mark.slow
def test_memory_of_inference_is_linear_with_a_small_constant() -> None:
    code = """
import torch
from gigapath.longnet.linear import bfloat16_pays
from gigapath.slide_encoder import create_model
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
tiles = 100_000
model = create_model("", "gigapath_slide_enc12l768d", 1536, depth=1, global_pool=True).eval()
x = torch.randn(1, tiles, 1536)
coords = torch.stack([torch.arange(tiles) % 400, torch.arange(tiles) // 400], -1)[None] * 256
with torch.inference_mode():
    model(x[:, :50], coords[:, :50])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    model(x, coords, all_layer_embed=True)
print(status("VmHWM") - before)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak is read from Linux's /proc")
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(gigapath.__file__).parents[1]
    )
    assert float(out.stdout) <= 2.2e9
