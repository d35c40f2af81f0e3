"""The two released tile encoders as timm's vision transformers, in its registry and from a checkpoint.

Importing this module registers them. B tiles of a batch, D width.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import SwiGLUPacked  # type: ignore[attr-defined]
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gigapath.releases import RELEASES, TILE_FILE
from gigapath.tile_transform import RELEASED_TRANSFORM
from gigapath.weights import assign_weights, find_weights, load_state_dict

# What timm's factory hands to every architecture besides the model's own arguments.
_FROM_TIMM = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"}
_MODEL_ARGUMENTS = set(inspect.signature(VisionTransformer).parameters) - {"device", "dtype"}


@register_model
def gigapath_tile_enc_dinov2s(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """GigaPath-Flash's tile encoder: ViT-S/16 with SwiGLU, 384-d, 21,681,024 parameters, 174 entries.

    With `pretrained`, the released weights: so `timm.create_model("hf_hub:prov-gigapath/prov-gigapath-flash",
    pretrained=True)` gives them once this module is imported (the published package's registration ignores
    `pretrained` and gives random weights there, without a word).
    """
    return _create("gigapath_tile_enc_dinov2s", pretrained, kwargs)


@register_model
def gigapath_tile_enc_vitg(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Prov-GigaPath's tile encoder: ViT-g/16 with SwiGLU, 1536-d, 1,134,953,984 parameters; built without network."""
    return _create("gigapath_tile_enc_vitg", pretrained, kwargs)


SIZES: dict[str, dict[str, Any]] = {
    "gigapath_tile_enc_dinov2s": {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 2048 / 384},
    "gigapath_tile_enc_vitg": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334},
}


def _create(arch: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    """What timm's registry calls: the model, with the weights of the repository or folder that timm names."""
    given = {name: value for name, value in kwargs.items() if name not in _FROM_TIMM}
    if not pretrained:
        return vision_transformer(arch, given)
    config = kwargs.get("pretrained_cfg")
    config = config if isinstance(config, dict) else vars(config) if hasattr(config, "hf_hub_id") else {}
    released = next(release.repo for release in RELEASES.values() if release.tile_arch == arch)
    source = config.get("file") or f"hf_hub:{config.get('hf_hub_id') or released}"
    path = find_weights(source, TILE_FILE, cache_dir=kwargs.get("cache_dir"))
    return loaded(arch, load_state_dict(path), given)


def vision_transformer(arch: str, given: dict[str, Any]) -> VisionTransformer:
    """The architecture with its arguments, the caller's over them; what the model does not know is warned of."""
    given = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(given) - _MODEL_ARGUMENTS)
    if unknown:
        warnings.warn(f"{arch}: ignored what this model has no use for: {', '.join(unknown)}", stacklevel=4)
    arguments: dict[str, Any] = {
        "img_size": 224,
        "patch_size": 16,
        "mlp_layer": SwiGLUPacked,
        "act_layer": nn.SiLU,
        "init_values": 1e-5,
        "num_classes": 0,
        "global_pool": "token",
        "class_token": True,
        "reg_tokens": 0,
        **SIZES[arch],
    }
    model = VisionTransformer(**arguments | {name: given[name] for name in given if name not in unknown})
    # So that timm's own `create_transform(**resolve_model_data_config(model))` is the released transform.
    config: Any = {
        "architecture": arch,
        "input_size": (3, RELEASED_TRANSFORM.crop, RELEASED_TRANSFORM.crop),
        "crop_pct": RELEASED_TRANSFORM.crop / RELEASED_TRANSFORM.resize,
        "interpolation": RELEASED_TRANSFORM.interpolation,
        "mean": RELEASED_TRANSFORM.mean,
        "std": RELEASED_TRANSFORM.std,
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    model.pretrained_cfg = model.default_cfg = config
    return model


def loaded(arch: str, state: Mapping[str, Tensor], given: dict[str, Any]) -> VisionTransformer:
    """The architecture with a checkpoint's weights; nothing is initialised first, and no second copy is made."""
    model: VisionTransformer = without_storage(lambda: vision_transformer(arch, given))
    assign_weights(arch, model, state)
    return model


def without_storage(build: Callable[[], Any]) -> Any:
    """Build a model on the meta device; old versions of timm read numbers back while they build, and can't."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()
