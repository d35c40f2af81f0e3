"""Tile encoders: the released ones, the stand-in, timm's, and checkpoints on disk; pixels in, one vector a tile out.

`create_model` and the two architectures in timm's registry, from `gigapath.tile_architectures`, give bare models, as in
the published package; `load_tile_encoder` is what the command line uses. B tiles of a batch, T pixels of a tile's side,
D width.
"""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.data import resolve_model_data_config  # type: ignore[attr-defined]
from torch import Tensor, nn

from gigapath import standin
from gigapath.devices import AUTOCAST_TYPES, computing, resolve_device, resolve_precision
from gigapath.file_names import plain_name
from gigapath.files import remembered_sha256, small_json, write_bytes_atomic, write_json_atomic
from gigapath.releases import HUB_PREFIXES, RELEASES, TILE_FILE, Release, check_encoder
from gigapath.tile_architectures import (
    SIZES,
    gigapath_tile_enc_dinov2s,
    gigapath_tile_enc_vitg,
    loaded,
    vision_transformer,
    without_storage,
)
from gigapath.tile_transform import RELEASED_TRANSFORM, TileTransform
from gigapath.weights import assign_weights, find_weights, load_state_dict, tell_architecture

__all__ = [
    "RELEASED_TRANSFORM",
    "TileEncoder",
    "create_model",
    "gigapath_tile_enc_dinov2s",
    "gigapath_tile_enc_vitg",
    "load_tile_encoder",
    "save_tile_encoder",
]


def __dir__() -> list[str]:
    """Tab completion shows the public names alone."""
    return __all__


# A seed of its own for random weights, so that two runs agree and the caller's generator is left alone.
_RANDOM_SEED = 0
CONFIG_FILE = "tile_encoder.json"  # beside tuned weights: what they are of; config.json is timm's


@dataclass(frozen=True)
class TileEncoder:
    """A tile encoder on its device, ready to use.

    Attributes:
        name: short and fit for a folder's name, e.g. "gigapath-flash".
        embed_dim: width D of its vectors.
        trained: whether its weights are trained ones.
        weights_sha256: of the file of weights, or None where there is none.
        transform: from pixels to the model's input.
        description: one line that says plainly what it is.
        device: where it runs.
        precision: "fp32", or the type of autocast, "fp16" or "bf16".
        model: the model, in eval mode.
        trained_on: the images of its weights; "" where they are random or a checkpoint does not say.
    """

    name: str
    embed_dim: int
    trained: bool
    weights_sha256: str | None
    transform: TileTransform
    description: str
    device: torch.device
    precision: str
    model: nn.Module
    trained_on: str = ""

    @property
    def transform_name(self) -> str:
        """The transform in words."""
        return self.transform.name

    def encode(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed one batch of tiles.

        On one device the vector of a tile depends on the batch's shape, not on its neighbours: callers who need equal
        bytes give batches of one shape and cut off what they padded.

        Args:
            tiles: uint8 (B, T, T, 3), RGB.

        Returns:
            float32 (B, D).

        Raises:
            ValueError: the batch has another form, or a vector is not finite.
        """
        return self.checked(self.forward(torch.from_numpy(self.transform.fit(tiles)).to(self.device)).cpu().numpy())

    def forward(self, pixels: Tensor) -> Tensor:
        """One batch through what follows resizing, and the model, on the encoder's device.

        Args:
            pixels: uint8 (B, S, S, 3) on the device, S the transform's `resize`.

        Returns:
            float32 (B, D), there; a GPU may still be computing it.

        Raises:
            ValueError: the model gives vectors of another width.
        """
        with torch.inference_mode(), computing(self.precision, self.device):
            vectors: Tensor = self.model(self.transform.normalise(pixels)).float()
        if vectors.shape != (len(pixels), self.embed_dim):
            raise ValueError(
                f"{self.name}: expected vectors of {self.embed_dim}, got an output {tuple(vectors.shape)}."
            )
        return vectors

    def checked(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The vectors (n, D) as they are; ValueError where one is not finite."""
        if not np.isfinite(vectors).all():
            raise ValueError(f"{self.name}: a vector is not finite in {self.precision}. Try --precision fp32.")
        return vectors


def create_model(
    pretrained: str,
    model_arch: str = "gigapath_tile_enc_dinov2s",
    local_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a tile encoder, as the published package's function of this name does.

    Args:
        pretrained: a name as `--tile-encoder` takes it ("gigapath", "gigapath-flash", "standin", "timm:NAME"), which
            has its own architecture; `hf_hub:REPO`, a file, a folder with `pytorch_model.bin`; "" for random weights.
        model_arch: a released architecture: that of a checkpoint.
        local_dir: a folder for the hub's file; None for the hub's cache.
        **kwargs: arguments of the model; what it does not know is ignored with one warning.

    Returns:
        The model, which takes float32 (B, 3, 224, 224) and gives (B, D). `load_tile_encoder` gives it with the
        transform that belongs to it; the stand-in and timm's have their own, and come in eval mode.

    Raises:
        FileNotFoundError, PermissionError: the weights are not to be had (never random ones in their place).
        ValueError: weights that are None, an unknown architecture, or a checkpoint of another one.
    """
    if pretrained is None:  # a forgotten option must not become random weights
        raise ValueError(
            "create_model: expected weights, got None. Give hf_hub:REPO, a file, or '' for random weights."
        )
    if pretrained == "standin" or str(pretrained).startswith("timm:"):
        if kwargs:
            warnings.warn(f"create_model: {pretrained} takes no arguments, ignored {', '.join(kwargs)}", stacklevel=2)
        model: nn.Module = load_tile_encoder(pretrained).model
        return model.requires_grad_(True)
    if pretrained in RELEASES:
        model_arch = RELEASES[pretrained].tile_arch
    if model_arch not in SIZES:
        raise ValueError(f"create_model: expected model_arch {' or '.join(SIZES)}, got {model_arch!r}.")
    if pretrained == "":
        return vision_transformer(model_arch, kwargs)
    return loaded(model_arch, load_state_dict(find_weights(pretrained, TILE_FILE, local_dir)), kwargs)


def load_tile_encoder(
    name: str,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    random_weights: bool = False,
) -> TileEncoder:
    """Load a tile encoder by the name that the command line knows it by.

    Args:
        name: "gigapath", "gigapath-flash", "standin", "timm:NAME", `hf_hub:` and a released repository, or a
            checkpoint (or a folder with `pytorch_model.bin`) of one of the two released architectures.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto" (fp16 autocast on CUDA, fp32 elsewhere), "fp32", "fp16" or "bf16".
        random_weights: leave the weights untrained, for trying things; the same ones every time.

    Raises:
        ValueError: an unknown name, a checkpoint of another architecture, a device that is not there.
        FileNotFoundError, PermissionError, ConnectionError: the weights are not to be had.
        ImportError: the stand-in's package is not installed.
    """
    resolved = resolve_device(device)
    precision = resolve_precision(precision, resolved)
    release = next((r for r in RELEASES.values() if name in (r.name, *(p + r.repo for p in HUB_PREFIXES))), None)
    if release:
        parts = _released_encoder(release, random_weights)
    elif name == "standin":
        parts = _standin_encoder(random_weights)
    elif name.startswith("timm:"):
        parts = _timm_encoder(name.removeprefix("timm:"), random_weights)
    else:
        parts = _file_encoder(name, random_weights)
    model = parts.pop("model").eval().requires_grad_(False)
    if random_weights:
        parts["name"] += "-random"
        parts["description"] += ", UNTRAINED: random weights"
    # Convolutions on a CPU are three times as fast with the channels last.
    model = model.to(device=resolved, memory_format=torch.channels_last)
    encoder = TileEncoder(
        trained=not random_weights,
        device=resolved,
        precision=precision,
        model=model,
        **parts,
    )
    if resolved.type == "cuda":
        hold_half(encoder)
    return encoder


def hold_half(encoder: TileEncoder) -> bool:
    """Keep the weights of linear and convolution layers in the type that autocast converts them to at every batch.

    Weights that are loaded later are rounded once, as autocast would. Half the memory is free again.

    Args:
        encoder: in "fp16" or "bf16"; others stay as they are.

    Returns:
        whether it is done; not where a made batch has other vectors then, to the bit, or an error: there everything is
        as before.
    """
    dtype = AUTOCAST_TYPES.get(encoder.precision)
    layers: list[Any] = [part for part in encoder.model.modules() if type(part) in (nn.Linear, nn.Conv2d)]
    if dtype is None or any(part.weight.dtype != torch.float32 for part in layers):
        return False
    side = encoder.transform.resize
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    batch = torch.from_numpy(pixels).to(encoder.device)
    kept = [(part, part.weight, part.bias) for part in layers]
    with contextlib.suppress(RuntimeError):
        before = encoder.forward(batch)
        for part in layers:
            part.weight = nn.Parameter(part.weight.to(dtype), requires_grad=False)
            if part.bias is not None:
                part.bias = nn.Parameter(part.bias.to(dtype), requires_grad=False)
        if torch.equal(encoder.forward(batch), before):
            return True
    for part, weight, bias in kept:
        part.weight, part.bias = weight, bias
    return False


def save_tile_encoder(folder: Path, encoder: TileEncoder, name: str, model: nn.Module, how: str) -> None:
    """Write tuned weights of a tile encoder into a folder that `load_tile_encoder` reads.

    Args:
        encoder: the one that was tuned.
        name: by which that was loaded.
        model: the tuned model, of the same architecture.
        how: a word for the name of what is saved, such as "lora".
    """
    buffer = io.BytesIO()
    torch.save({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, buffer)
    write_bytes_atomic(folder / TILE_FILE, buffer.getvalue())
    facts: Any = encoder.model.pretrained_cfg
    write_json_atomic(
        folder / CONFIG_FILE,
        {
            "architecture": name.removeprefix("timm:") if name.startswith("timm:") else facts["architecture"],
            "tuned_from": encoder.name,
            "tuned_from_sha256": encoder.weights_sha256,
            "trained_on": encoder.trained_on,
            "how": how,
            "transform": dataclasses.asdict(encoder.transform),
        },
    )


# What each kind of name leads to: the fields of a TileEncoder that depend on it.


def _released_encoder(release: Release, random_weights: bool) -> dict[str, Any]:
    arch = release.tile_arch
    if random_weights:
        model, sha256 = _seeded(lambda: vision_transformer(arch, {})), None
    else:
        path = find_weights(f"hf_hub:{release.repo}", TILE_FILE, strict=True)
        model, sha256 = loaded(arch, load_state_dict(path), {}), remembered_sha256(path)
    return _parts(release.name, model, sha256, f"{release.repo}'s tile encoder ({arch}, {release.tile_dim}-d)")


def _standin_encoder(random_weights: bool) -> dict[str, Any]:
    def build() -> Any:
        return timm.create_model(standin.ARCHITECTURE, num_classes=0)

    if random_weights:
        model, sha256 = _seeded(build), None
    else:
        path = standin.weights_file()
        model, sha256 = without_storage(build), standin.SHA256
        assign_weights("the stand-in", model, standin.standin_state(path))
    on = "" if random_weights else standin.TRAINED_ON
    parts = _parts("standin", model, sha256, standin.DESCRIPTION)
    return parts | {"transform": _timm_transform(model), "trained_on": on}


def _file_encoder(name: str, random_weights: bool) -> dict[str, Any]:
    if random_weights:
        raise ValueError(f"--random-weights: expected the name of an encoder, got the checkpoint {name!r}. Drop one.")
    check_encoder("tile", name)
    path = find_weights(name, TILE_FILE)
    state = load_state_dict(path)
    if path.with_name(CONFIG_FILE).is_file():
        return _tuned_encoder(path, state)
    arch = tell_architecture(state, "tile", path)
    model, sha256 = loaded(arch, state, {}), remembered_sha256(path)
    release = next((release for release in RELEASES.values() if release.tile_sha256 == sha256), None)
    if release:
        return _parts(release.name, model, sha256, f"{release.repo}'s tile encoder ({arch}), from a local file")
    short = plain_name(path.stem)
    return _parts(f"{short}-{sha256[:8]}", model, sha256, f"a checkpoint of {arch} with sha256 {sha256}")


def _tuned_encoder(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `save_tile_encoder` wrote; ValueError where its description is none."""
    held = small_json(path.with_name(CONFIG_FILE))
    try:
        arch, base, sha256 = str(held["architecture"]), str(held["tuned_from"]), remembered_sha256(path)
        values: dict[str, Any] = {
            key: tuple(each) if isinstance(each, list) else each for key, each in held["transform"].items()
        }
        transform, how, on = TileTransform(**values), str(held["how"]), str(held["trained_on"])
        model: Any
        if arch in SIZES:
            model = loaded(arch, state, {})
        else:
            model = timm.create_model(arch, pretrained=False, num_classes=0)
            assign_weights(path.name, model, state)
            model.pretrained_cfg = {**model.pretrained_cfg, "architecture": arch}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{CONFIG_FILE}: expected what finetune --tiles wrote, got something else.") from error
    name = f"{plain_name(base)}-{plain_name(how)}-{sha256[:8]}"
    described = f"{base}, tuned on tiles ({how}), with sha256 {sha256}"
    return _parts(name, model, sha256, described) | {"transform": transform, "trained_on": on}


def _timm_encoder(name: str, random_weights: bool) -> dict[str, Any]:
    if any(name.endswith(release.repo) for release in RELEASES.values()):
        raise ValueError(
            f"--tile-encoder: got 'timm:{name}', whose own config does not say the released transform. Use "
            f"{' or '.join(RELEASES)}."
        )

    def build() -> Any:
        return timm.create_model(name, pretrained=not random_weights, num_classes=0)

    try:
        model = _seeded(build) if random_weights else build()
    except Exception as error:  # of the hub's client, of timm, of the network
        # What the hub does not give is an OSError, with older clients a ValueError too.
        if isinstance(error, (RuntimeError, ValueError, TypeError, AssertionError)) and not isinstance(error, OSError):
            reason = " ".join(str(error).split())
            raise ValueError(f"--tile-encoder: timm can't build {name!r} with its weights: {reason}") from error
        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
        repo = (known.hf_hub_id if known else None) or name.partition(":")[2] or name
        from gigapath.hub import hub_error

        raise hub_error(error, repo, "model.safetensors", Path(huggingface_hub.constants.HF_HUB_CACHE)) from error
    transform = _timm_transform(model)
    with torch.inference_mode():
        output = model.eval()(torch.zeros(1, 3, transform.crop, transform.crop))
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError(f"--tile-encoder: expected a model that gives one vector a tile, got 'timm:{name}'.")
    sha256 = None if random_weights else _timm_sha256(model.pretrained_cfg)
    short = "timm-" + plain_name(name)
    description = f"timm's {name} ({output.shape[1]}-d), with the transform of its own config"
    return _parts(short, model, sha256, description) | {"transform": transform, "embed_dim": output.shape[1]}


def _parts(name: str, model: Any, sha256: str | None, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": model,
        "embed_dim": int(model.num_features),
        "weights_sha256": sha256,
        "transform": RELEASED_TRANSFORM,
        "description": description,
    }


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return build()


def _timm_transform(model: nn.Module) -> TileTransform:
    """The transform of a timm model's own config; for square tiles all of timm's crop modes are this one."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"--tile-encoder: expected a model of square RGB tiles, got input {config['input_size']}.")
    return TileTransform(
        resize=int(height / config["crop_pct"]),
        crop=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )


def _timm_sha256(config: dict[str, Any]) -> str | None:
    """Of the file that timm loaded, as the hub's cache has it; None where it came from elsewhere."""
    repo, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    for file in ("model.safetensors", TILE_FILE):
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision or None) if repo else None
        if isinstance(cached, str):
            return remembered_sha256(Path(cached))
    return None
