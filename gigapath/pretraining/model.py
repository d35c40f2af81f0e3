"""The masked autoencoder: the slide encoder sees some tiles of a slide, a decoder predicts the embeddings of the rest.

The principle is that of He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022), with LongNet on both
sides, as the paper of Prov-GigaPath describes; what it does not say is an option. Legend: T tiles of all slides of a
batch one after another, V of them visible, M hidden, S slides, W width of a tile embedding, D and E widths of encoder
and decoder.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigapath.longnet.encoder import LongNetEncoder, count_operations
from gigapath.pos_embed import LazyPosEmbed
from gigapath.pretraining.options import SizeOptions
from gigapath.slide_encoder import LongNetViT, create_model

# Of a batch; coordinates stay on the CPU: they are checked first, and a GPU would have to be waited for.
_SENT = ("visible", "seen", "hidden", "target")


@dataclass(frozen=True)
class Batch:
    """Slides packed one after another; tensors on the CPU, or but for coordinates on a device.

    Attributes:
        visible: (V, W) embeddings of the visible tiles.
        visible_coords: (V, 2), (x, y) in pixels of the position grid.
        coords: (T, 2) of all tiles.
        seen: (V + S,) where the encoder's tokens, class tokens included, stand among the decoder's T + S.
        hidden: (M,) where the hidden tiles stand among the decoder's tokens.
        target: (M, W) what is to be predicted of them.
        lengths: tiles of each slide.
        hidden_lengths: hidden tiles of each slide.
    """

    visible: Tensor
    visible_coords: Tensor
    coords: Tensor
    seen: Tensor
    hidden: Tensor
    target: Tensor
    lengths: tuple[int, ...]
    hidden_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting where it is pinned."""
        sent: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in _SENT}
        return replace(self, **sent)

    def pinned(self) -> "Batch":
        """The batch in memory that a GPU can copy from by itself."""
        held: dict[str, Any] = {name: getattr(self, name).pin_memory() for name in _SENT}
        return replace(self, **held)


class MaskedAutoencoder(nn.Module):
    """A slide encoder, and the decoder that teaches it."""

    def __init__(self, slide_encoder: LongNetViT, sizes: SizeOptions) -> None:
        """Build the decoder with new weights; the encoder's class token is frozen, as in the published pretraining."""
        super().__init__()
        config, width = slide_encoder.encoder.config, sizes.decoder_dim
        self.slide_encoder = slide_encoder
        slide_encoder.cls_token.requires_grad_(False)
        self.to_decoder = nn.Linear(config.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder = LongNetEncoder(replace(config, embed_dim=width, depth=sizes.decoder_depth, drop_path_rate=0.0))
        self.positions = LazyPosEmbed(width, slide_encoder.slide_ngrids)
        self.position_scale = 2.0 if sizes.start == "tied" else 1.0
        self.predict = nn.Linear(width, slide_encoder.in_chans)
        self.decoder.checkpoint_activations = sizes.checkpoint_activations != "none"
        slide_encoder.encoder.checkpoint_activations = sizes.checkpoint_activations == "all"
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.to_decoder.weight)
        nn.init.normal_(self.predict.weight, std=0.02)  # begins near the mean of all tiles
        for layer in (self.to_decoder, self.predict):
            nn.init.zeros_(layer.bias)
        if sizes.start == "tied":
            tie_keys_to_queries(self.decoder)

    def forward(self, batch: Batch) -> Tensor:
        """Predictions (M, W) of the hidden tiles."""
        encoder = self.slide_encoder
        lengths = tuple(n - hidden + 1 for n, hidden in zip(batch.lengths, batch.hidden_lengths, strict=True))
        tokens = encoder.embed_tokens(batch.visible[None], batch.visible_coords[None], lengths)
        encoded = encoder.norm(encoder.encoder(token_embeddings=tokens, lengths=lengths)["encoder_out"])
        latent = self.to_decoder(encoded)[0]
        whole = self.mask_token.to(latent.dtype).expand(len(batch.coords) + len(batch.lengths), -1)
        whole = whole.index_copy(0, batch.seen, latent) + self._positions(batch).to(latent.dtype)
        decoded = self.decoder(token_embeddings=whole[None], lengths=tuple(n + 1 for n in batch.lengths))["encoder_out"]
        out: Tensor = self.predict(decoded[0].index_select(0, batch.hidden))
        return out

    def _positions(self, batch: Batch) -> Tensor:
        """(T + S, E): of each tile, zero of each class token, in the weights' dtype."""
        rows = self.slide_encoder.coords_to_pos(batch.coords, self.slide_encoder.tile_size)
        none = torch.zeros_like(rows[:1])
        rows = torch.cat([piece for part in torch.split(rows, list(batch.lengths)) for piece in (none, part)])
        return self.positions.rows(rows, batch.visible.device).to(self.mask_token.dtype) * self.position_scale

    def operations(self, tiles: int, mask_ratio: float) -> float:
        """Multiply-adds times two of a forward pass over one slide, real keys only; backwards it is twice that."""
        encoder, visible = self.slide_encoder, max(1, round((1 - mask_ratio) * tiles))
        products = visible * encoder.in_chans * encoder.embed_dim + (tiles - visible) * self.predict.weight.numel()
        sides = ((encoder.encoder.config, visible), (self.decoder.config, tiles))
        return float(sum(sum(count_operations(config, (n + 1,)).values()) for config, n in sides) + 2 * products)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Those that are trained, for AdamW: decay leaves alone what has one dimension, and tokens."""
        trained = [(p.ndim > 1 and "token" not in name, p) for name, p in self.named_parameters() if p.requires_grad]
        decays = {True: weight_decay, False: 0.0}
        return [{"params": [p for is_of, p in trained if is_of is key], "weight_decay": decays[key]} for key in decays]


def tie_keys_to_queries(encoder: LongNetEncoder) -> None:
    """Begin with W_k = W_q, Xavier's with a gain of 2: a token attends to those like it, near ones among them."""
    for layer in encoder.layers:
        attention: Any = layer.self_attn
        nn.init.xavier_uniform_(attention.q_proj.weight, gain=2.0)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def build_autoencoder(init: str, sizes: SizeOptions, *, in_chans: int) -> MaskedAutoencoder:
    """The model at its start, on embeddings of width `in_chans`: the slide encoder from the weights `init`, as
    `gigapath.slide_encoder.create_model` takes them, or from new ones ("")."""
    drops: dict[str, Any] = {"dropout": sizes.dropout, "drop_path_rate": sizes.drop_path_rate}
    # The class token is not trained: what stands for a slide is the mean of its tiles' tokens.
    encoder = create_model(init, sizes.model_arch, in_chans, global_pool=True, **drops)
    if not init and sizes.start == "tied":
        tie_keys_to_queries(encoder.encoder)
    return MaskedAutoencoder(encoder, sizes)


def loss_of_slides(predicted: Tensor, batch: Batch, kind: str) -> Tensor:
    """The loss of each slide (S,) by predictions (M, W), float32 at least: the mean over its hidden tiles of the
    squared difference, over dimensions too ("mse"), or of 1 - cosine ("cosine")."""
    predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
    target = batch.target.to(predicted.dtype)
    if kind == "mse":
        each = (predicted - target).square().mean(dim=1)
    else:
        each = 1 - F.cosine_similarity(predicted, target, dim=1)
    return torch.stack([part.mean() for part in torch.split(each, list(batch.hidden_lengths))])
