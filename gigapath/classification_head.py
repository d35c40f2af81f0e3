"""The classifier on a slide: the slide encoder and one linear layer over chosen states."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from gigapath import slide_encoder

__all__ = ["ClassificationHead", "get_model", "reshape_input"]


def __dir__() -> list[str]:
    """Tab completion shows the public names alone."""
    return __all__


class ClassificationHead(nn.Module):
    """A slide encoder whose chosen states, side by side, feed one linear layer."""

    def __init__(
        self,
        input_dim: int,
        latent_dim: int,
        feat_layer: str,
        n_classes: int = 2,
        model_arch: str = "gigapath_slide_enc12l768d",
        pretrained: str = "hf_hub:prov-gigapath/prov-gigapath",
        freeze: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the encoder with its weights, and a fresh classifier.

        Args:
            input_dim: width of the tile embeddings.
            latent_dim: width of the slide encoder.
            feat_layer: the states to use, such as "11", or "5-11" for the two states 5 and 11.
            n_classes: width of the logits.
            model_arch: the slide encoder's architecture.
            pretrained: its weights; see `gigapath.slide_encoder.create_model`.
            freeze: whether the slide encoder keeps its weights.
            kwargs: options of the slide encoder; what it does not know is ignored with one warning.
        """
        super().__init__()
        self.feat_layer = parse_states(feat_layer)
        self.feat_dim = len(self.feat_layer) * latent_dim
        self.slide_encoder = slide_encoder.create_model(pretrained, model_arch, in_chans=input_dim, **kwargs)
        if latent_dim != self.slide_encoder.embed_dim:
            raise ValueError(
                f"ClassificationHead: expected latent_dim {self.slide_encoder.embed_dim} for {model_arch}, got "
                f"{latent_dim}. Give the width of the slide encoder."
            )
        states = self.slide_encoder.depth + 1
        if max(self.feat_layer) >= states:
            raise ValueError(
                f"ClassificationHead: expected states 0 to {states - 1} in feat_layer, got {feat_layer!r}. "
                "State 0 is the input, state i the output of layer i."
            )
        if freeze:
            self.slide_encoder.requires_grad_(False)
        self.classifier = nn.Sequential(nn.Linear(self.feat_dim, n_classes))

    def forward(self, images: Tensor, coords: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
        """Logits (B, n_classes) of slides.

        Args:
            images: tile embeddings (B, L, input_dim), or (L, input_dim) for one slide.
            coords: (B, L, 2) or (L, 2), (x, y) in pixels of which the encoder's `tile_size` make a cell.
            valid_mask: (B, L) bool, True = real tile.
        """
        states = self.slide_encoder(images, coords, all_layer_embed=True, valid_mask=valid_mask)
        return self._classify(states)

    def forward_packed(self, images: Tensor, coords: Tensor, lengths: Any) -> Tensor:
        """Logits of slides given one after another; see `LongNetViT.forward_packed`."""
        return self._classify(self.slide_encoder.forward_packed(images, coords, lengths, all_layer_embed=True))

    def _classify(self, states: list[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(torch.cat([states[i] for i in self.feat_layer], dim=-1))
        return logits

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, layer_decay: float, *, published: bool = False
    ) -> list[dict[str, Any]]:
        """Parameters grouped for AdamW, with layer-wise rates.

        A parameter of layer id i gets `learning_rate * layer_decay ** (depth + 1 - i)`, see
        `gigapath.slide_encoder.layer_id`, the classifier the full rate; 1-d parameters get no weight decay.

        Args:
            learning_rate: of the classifier.
            weight_decay: of parameters with two dimensions and more.
            layer_decay: factor from one layer to the one below it.
            published: True gives the input projection the classifier's rate, as the published code did.

        Returns:
            Groups with `params`, `lr`, `lr_scale` (the factor of `learning_rate`), `weight_decay` and `name`.
        """
        last = self.slide_encoder.depth + 1
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = name.removeprefix("slide_encoder.")
            layer = last if inside == name else slide_encoder.layer_id(inside, last - 1, published=published)
            decayed = parameter.ndim > 1
            key = f"layer_{layer}_{'decay' if decayed else 'no_decay'}"
            scale = layer_decay ** (last - layer)
            group = groups.setdefault(
                key,
                {
                    "name": key,
                    "params": [],
                    "lr": learning_rate * scale,
                    "lr_scale": scale,
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())


def parse_states(feat_layer: str) -> list[int]:
    """The states that "11" or "5-11" names: [11], and the two states [5, 11]."""
    if not re.fullmatch(r"\s*\d+(\s*-\s*\d+)*\s*", str(feat_layer)):
        raise ValueError(
            f"feat_layer: expected states such as '11' or '5-11', got {feat_layer!r}. "
            "Join the numbers of the states with '-'."
        )
    return [int(number) for number in re.findall(r"\d+", str(feat_layer))]


def reshape_input(imgs: Tensor, coords: Tensor, pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Drop the leading 1 that a data loader of whole batches adds.

    Args:
        imgs: (1, B, L, D), or (B, L, D), which stays.
        coords: (1, B, L, 2) or (B, L, 2).
        pad_mask: (1, B, L) or (B, L), or None.
    """
    if imgs.ndim == 4:
        imgs = imgs.squeeze(0)
    if coords.ndim == 4:
        coords = coords.squeeze(0)
    if pad_mask is not None and pad_mask.ndim == 3:
        pad_mask = pad_mask.squeeze(0)
    return imgs, coords, pad_mask


def get_model(**kwargs: Any) -> ClassificationHead:
    """Build a `ClassificationHead` from its own argument names; whole namespaces may come in."""
    return ClassificationHead(**kwargs)
