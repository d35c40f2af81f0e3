"""The LongNet encoder: pre-norm layers of dilated attention and a feed-forward network, both with a sub-LN.

Legend: B slides, N tokens of a slide, T tokens of all slides, D width, H heads, E head width. Activations are
(B, N, D) for slides of one length, or (1, T, D) for slides of several lengths one after another ("packed"); `lengths`
says which tokens belong together, and without it each row of the batch is a slide.

    x = x + drop_path(dropout(out_proj(inner_attn_ln(dilated_attention(q, k, v of self_attn_layer_norm(x))))))
    x = x + drop_path(dropout(fc2(ffn_layernorm(gelu(fc1(final_layer_norm(x)))))))
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigapath.longnet import dilated
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.dilated import dilated_attention
from gigapath.longnet.linear import Linear, bfloat16_pays, gelu_in_float32
from gigapath.longnet.steps import next_step

Lengths = tuple[int, ...]


def drop_path(x: Tensor, rate: float, lengths: Lengths) -> Tensor:
    """Zero whole slides of x (B, N, D) or (1, T, D) with probability `rate`, and scale the others by 1 / (1 - rate)."""
    keep = torch.empty(len(lengths), device=x.device, dtype=x.dtype).bernoulli_(1 - rate).div_(1 - rate)
    # Expanded one by one: lengths in a tensor would have to be copied to the device, and the host would wait for it.
    per_token = torch.cat([one.expand(length) for one, length in zip(keep.unbind(), lengths, strict=True)])
    return x * per_token.view(*x.shape[:-1], 1)


def row_parts(x: Tensor) -> list[Tensor]:
    """Views of a few rows each of x (..., D): few enough on a CPU for the FFN's activations to stay in cache."""
    rows = 256 if x.device.type == "cpu" else 65536
    return list(torch.split(x.view(-1, x.shape[-1]), rows))


class SelfAttention(nn.Module):
    """Projections around the dilated attention; called with normalised activations."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.embed_dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.branches = config.branches
        self.k_proj = Linear(config.embed_dim, config.embed_dim)
        self.v_proj = Linear(config.embed_dim, config.embed_dim)
        self.q_proj = Linear(config.embed_dim, config.embed_dim)
        self.out_proj = Linear(config.embed_dim, config.embed_dim)
        self.inner_attn_ln = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """Attend within each slide: (B, N, D) to (B, N, D)."""
        return self.attend(self.project(x), lengths, x.shape)

    def project(self, x: Tensor) -> list[Tensor]:
        """[q, k, v], each (T, H, E)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [projection(x).reshape(-1, self.num_heads, self.head_dim) for projection in projections]

    def attend(self, qkv: list[Tensor], lengths: Lengths, shape: torch.Size) -> Tensor:
        """From [q, k, v], which the list loses, to the answer of this shape (B, N, D)."""
        attended = dilated_attention(qkv[0], qkv[1], qkv[2], lengths, self.branches).view(shape)
        qkv.clear()
        if torch.is_grad_enabled() or self.inner_attn_ln._forward_hooks or self.inner_attn_ln._forward_pre_hooks:
            attended = self.inner_attn_ln(attended)
        else:
            for part in row_parts(attended):
                part.copy_(self.inner_attn_ln(part))
        out: Tensor = self.out_proj(attended)
        return out


class FeedForward(nn.Module):
    """fc1, exact GELU in float32, sub-LN, fc2."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        width = config.ffn_ratio * config.embed_dim
        self.fc1 = Linear(config.embed_dim, width)
        self.fc2 = Linear(width, config.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden = self.fc1(x)
        out: Tensor = self.fc2(self.ffn_layernorm(gelu_in_float32(hidden)))
        return out

    def add_to(self, x: Tensor, norm: nn.Module) -> None:
        """Add this network's answer on norm(x) to x (..., D) in place, a few rows at a time."""
        fc1 = self.fc1.product(x, gelu=True)
        fc2 = self.fc2.product(x)
        for part in row_parts(x):
            next_step()
            part.add_(fc2(self.ffn_layernorm(fc1(norm(part)))))


class EncoderLayer(nn.Module):
    """One pre-norm layer; leaves its input as it was."""

    def __init__(self, config: LongNetConfig, index: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.drop_path_rate = config.drop_path(index)
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.ffn = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, lengths: Lengths | None = None, **published: Any) -> tuple[Tensor, None]:
        """Run the layer; the published form of the answer has a second entry that is None here.

        Args:
            x: (B, N, D), or (1, T, D) packed.
            lengths: tokens of each slide; by default each row of the batch is a slide.
            published: arguments of the published layer (`encoder_padding_mask`, ...); they must be None.
        """
        _refuse(published)
        lengths = _lengths_of(x, lengths)
        if not (torch.is_grad_enabled() or self.training or self._is_watched()):
            return self._infer(x, lengths), None
        x = x + self._drop(self.self_attn(self.self_attn_layer_norm(x), lengths), lengths)
        x = x + self._drop(self.ffn(self.final_layer_norm(x)), lengths)
        return x, None

    def _infer(self, x: Tensor, lengths: Lengths) -> Tensor:
        """The layer without autograd: nothing lives longer than it must, residuals are added in place, and the
        feed-forward network runs in parts that stay in cache. Nobody else holds the tensors that change:
        `_is_watched` rules that out."""
        qkv = self.self_attn.project(self.self_attn_layer_norm(x))
        attended = self.self_attn.attend(qkv, lengths, x.shape)
        # Autocast gives another dtype, and the sum has the strides of x then.
        x = attended.add_(x) if attended.dtype == x.dtype else (x + attended).contiguous()
        self.ffn.add_to(x, self.final_layer_norm)
        return x

    def _is_watched(self) -> bool:
        """Whether somebody looks into, or has replaced, a part whose tensors `_infer` changes or never makes."""
        attention, ffn = self.self_attn, self.ffn
        unchanged = {id(part) for part in (self, attention.q_proj, attention.k_proj, attention.v_proj)}
        ours = (type(attention), type(ffn), type(ffn.fc1), type(ffn.fc2))
        return ours != (SelfAttention, FeedForward, Linear, Linear) or any(
            part._forward_hooks or part._forward_pre_hooks for part in self.modules() if id(part) not in unchanged
        )

    def _drop(self, x: Tensor, lengths: Lengths) -> Tensor:
        if not self.training:
            return x
        x = F.dropout(x, self.dropout)
        return drop_path(x, self.drop_path_rate, lengths) if self.drop_path_rate > 0 else x


class LongNetEncoder(nn.Module):
    """Dropout, `depth` layers, `layer_norm`; answers with a dict as the published encoder does."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.num_layers = config.depth
        self.checkpoint_activations = False
        self.dropout_module = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def set_linear_precision(self, precision: str) -> None:
        """Choose the inputs of the linear layers' products in inference on a CPU in float32.

        Args:
            precision: "fp32", "bf16", or "auto" for bf16 where this machine's product is at least twice as fast in
                it, else fp32. The attention stays in float32.
        """
        if precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"linear_precision: expected fp32, bf16 or auto, got {precision!r}. Choose one of these.")
        half = precision == "bf16" or (precision == "auto" and bfloat16_pays())
        for module in self.modules():
            if isinstance(module, Linear):
                module.half_products = half

    def forward(
        self,
        src_tokens: None = None,
        token_embeddings: Tensor | None = None,
        return_all_hiddens: bool = False,
        *,
        lengths: Lengths | None = None,
        summarise: Callable[[Tensor], Tensor] | None = None,
        **published: Any,
    ) -> dict[str, Any]:
        """Encode tokens.

        Args:
            src_tokens: must be None; it is there for the published form of the call.
            token_embeddings: (B, N, D), or (1, T, D) packed.
            return_all_hiddens: whether to keep the depth + 1 states, state 0 being the embedding after dropout.
            lengths: tokens of each slide; by default each row of the batch is a slide.
            summarise: applied to each kept state, so that memory does not grow with the depth.
            published: further arguments of the published encoder (`encoder_padding_mask`, ...); they must be None.

        Returns:
            `encoder_out`, the last state after `layer_norm`, and `encoder_states`, the states before it (empty
            without `return_all_hiddens`).
        """
        _refuse({"src_tokens": src_tokens, **published})
        if token_embeddings is None:
            raise ValueError("LongNetEncoder: expected token_embeddings (B, N, D), got None. Pass the embeddings.")
        x: Tensor = self.dropout_module(token_embeddings)
        lengths = _lengths_of(x, lengths)
        states = []
        for layer in (None, *self.layers):
            if layer is not None and self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, lengths, use_reentrant=False)[0]
            elif layer is not None:
                x = layer(x, lengths)[0]
            if return_all_hiddens:
                states.append(summarise(x) if summarise else x)
        return {"encoder_out": self.layer_norm(x), "encoder_states": states}


def count_operations(config: LongNetConfig, lengths: Lengths) -> dict[str, int]:
    """Operations of the encoder's forward pass, multiply-adds x 2, real keys only.

    Args:
        config: of the encoder.
        lengths: tokens of each slide, the class token counted.

    Returns:
        `linear` and `attention`; norms, GELU and the projection of the tile embeddings are left out.
    """
    attention = dilated.count_operations(lengths, config.branches, config.num_heads, config.head_dim)
    products = (4 + 2 * config.ffn_ratio) * config.embed_dim**2
    return {"linear": config.depth * 2 * sum(lengths) * products, "attention": config.depth * attention}


def _lengths_of(x: Tensor, lengths: Lengths | None) -> Lengths:
    return (x.shape[1],) * x.shape[0] if lengths is None else lengths


def _refuse(published: dict[str, Any]) -> None:
    given = sorted(name for name, value in published.items() if value is not None and value is not False)
    if given:
        raise ValueError(
            f"LongNetEncoder: expected None for {', '.join(given)}, got values. Give slides of several lengths to "
            "LongNetViT.forward with valid_mask, or to forward_packed."
        )
