"""Weights: from `hf_hub:...` or a path to a checked local file, and from there into a model, with no second copy.

Only tensors are ever loaded (`weights_only`), so a checkpoint can't run code. Keys that a model needs and a
checkpoint lacks raise; nothing is filled in at random.
"""

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gigapath.releases import HUB_PREFIXES, RELEASES

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.ffn\.fc1\.weight")
# What a checkpoint of each released architecture looks like: shapes of a few entries, and one of the last layer's.
_MARKS: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "tile": {
        "gigapath_tile_enc_vitg": {
            "patch_embed.proj.weight": (1536, 3, 16, 16),
            "pos_embed": (1, 197, 1536),
            "blocks.39.ls2.gamma": (1536,),
        },
        "gigapath_tile_enc_dinov2s": {
            "patch_embed.proj.weight": (384, 3, 16, 16),
            "pos_embed": (1, 197, 384),
            "blocks.11.ls2.gamma": (384,),
        },
    },
    "slide": {
        "gigapath_slide_enc12l768d": {
            "patch_embed.proj.weight": (768, 1536),
            "cls_token": (1, 1, 768),
            "encoder.layers.11.ffn.fc2.weight": (768, 3072),
        },
        "gigapath_slide_enc12l384d": {
            "patch_embed.proj.weight": (384, 384),
            "cls_token": (1, 1, 384),
            "encoder.layers.11.ffn.fc2.weight": (384, 1536),
        },
    },
}

_NAMED = 6  # keys written out in a message


def find_weights(
    pretrained: str | Path,
    filename: str,
    local_dir: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> Path:
    """Turn what a caller says of weights into a local file: the name of a release, `hf_hub:REPO` (or
    `hf_hub:REPO@REVISION`), a file, or a folder that holds `filename` (such as "slide_encoder.pth"). `local_dir`,
    `cache_dir` and `strict` are as for `gigapath.hub.hub_file`: the command line is strict, `create_model` warns.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the hub does not give it; the message says what to do (see `gigapath.hub`).
        ValueError: the file is not the recorded one, with `strict`.
    """
    if pretrained in RELEASES:
        pretrained = f"hf_hub:{RELEASES[str(pretrained)].repo}"
    if str(pretrained).startswith(HUB_PREFIXES):
        from gigapath.hub import hub_file  # where it is on the hub

        return hub_file(str(pretrained), filename, local_dir=local_dir, cache_dir=cache_dir, strict=strict)
    path = Path(pretrained).expanduser()
    if path.is_dir():
        path = path / filename
    if not path.is_file():
        released = ", ".join(f"hf_hub:{release.repo}" for release in RELEASES.values())
        raise FileNotFoundError(
            f"find_weights: expected a checkpoint file, a folder with {filename}, or one of {released}, got "
            f"{str(pretrained)!r}. Check the path."
        )
    return path


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint: `{"model": state_dict}`, a bare state dict, or safetensors; FileNotFoundError, or ValueError
    where it holds pickled code, is cut off, or is none.

    The tensors are on the CPU and mapped from the file where its format allows it, so that they cost memory only once
    they are used, and are shared between processes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"load_state_dict: expected a checkpoint, got {str(path)!r}, which is no file. Check the path."
        )
    who = f"load_state_dict: expected a checkpoint of tensors, got {path.name}, which"
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{who} is a Git LFS pointer. Fetch the file itself: `git lfs pull`.")
    mapped = head.startswith(b"PK\x03\x04")  # torch before 1.6 wrote no zip archives; those can't be mapped
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if head[:1] == b"\x80" or mapped:  # a pickle with more in it than tensors, bare or in torch's archive
            raise ValueError(
                f"{who} holds pickled Python objects besides tensors: they could run code, so it is refused. Save its "
                "state dict alone."
            ) from error
        raise ValueError(f"{who} is no checkpoint. Fetch it again.") from error
    except Exception as error:  # torch and safetensors raise a dozen types for damaged files
        raise ValueError(f"{who} is cut off or damaged ({type(error).__name__}). Fetch it again.") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{who} holds no state dict (nor one under the key 'model'). Save the model's state dict.")
    return dict(content)


def check_keys(who: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint with what a model needs (tensors on the meta device will do); `who` begins the messages,
    e.g. "gigapath_slide_enc12l768d". ValueError where an entry is missing or has another shape. Entries that the model
    has no place for are warned of."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{who}: expected a checkpoint with {len(expected)} entries, got one that lacks {_some(missing)}. "
            "It belongs to another architecture or is incomplete."
        )
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    if shapes:
        raise ValueError(
            f"{who}: expected a checkpoint of its own shapes, got {_some(shapes)}. It belongs to another architecture."
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        warnings.warn(f"{who}: the checkpoint's {_some(unexpected)} have no place here and are left out", stacklevel=3)


def assign_weights(who: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the checkpoint's tensors to the model, which may have been built on the meta device: no second copy.

    Every entry is checked first (`check_keys`). Floating-point tensors of another type than the model's are
    converted; `requires_grad` stays as the model has it.
    """
    expected = model.state_dict()
    check_keys(who, expected, state)
    given = {name: state[name].to(tensor.dtype) for name, tensor in expected.items()}
    model.load_state_dict(given, strict=True, assign=True)


def tell_architecture(state: Mapping[str, Tensor], kind: str, path: str | Path) -> str:
    """The architecture of a "tile" or "slide" encoder that a checkpoint belongs to, told by names and shapes of its
    entries: a released one, or a slide encoder of any width and depth; ValueError that lists both where it is none."""
    for name, marks in _MARKS[kind].items():
        if all(key in state and tuple(state[key].shape) == shape for key, shape in marks.items()):
            return name
    layers = [int(match[1]) for key in state if (match := _LAYER.match(key))]
    if kind == "slide" and layers and "cls_token" in state and "patch_embed.proj.weight" in state:
        width, hidden = state["cls_token"].shape[-1], state[f"encoder.layers.{layers[0]}.ffn.fc1.weight"].shape[0]
        if hidden == 4 * width:  # pretrained by a user, such as `gigapath pretrain` makes
            return f"gigapath_slide_enc{max(layers) + 1}l{width}d"
    other = "slide" if kind == "tile" else "tile"
    hint = ""
    for name, marks in _MARKS[other].items():
        if all(key in state and tuple(state[key].shape) == shape for key, shape in marks.items()):
            hint = f" It is a {other} encoder ({name})."
    first = next(iter(state))
    raise ValueError(
        f"{Path(path).name}: expected a {kind} encoder's checkpoint of {' or '.join(_MARKS[kind])}, got {len(state)} "
        f"entries such as {first} {tuple(state[first].shape)}.{hint}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
