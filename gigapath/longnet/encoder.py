"""The LongNet encoder: pre-norm layers of dilated attention and a feed-forward network, both with a sub-LN.

Legend: B slides, N tokens of a slide, T tokens of all slides, D width, H heads, E head width. Activations are
(B, N, D) for slides of one length, or (1, T, D) for slides of several lengths one after another ("packed"); `lengths`
says which tokens belong together, and without it each row of the batch is a slide.

    x = x + drop_path(dropout(out_proj(inner_attn_ln(dilated_attention(q, k, v of self_attn_layer_norm(x))))))
    x = x + drop_path(dropout(fc2(ffn_layernorm(gelu(fc1(final_layer_norm(x)))))))

Parts are called, and answer, as those of the published encoder, so that hooks, subclasses and replaced parts written
for it run; without autograd and with nobody watching a layer runs in place, see `EncoderLayer._infer`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigapath.longnet import dilated
from gigapath.longnet.config import LongNetConfig
from gigapath.longnet.dilated import dilated_attention
from gigapath.longnet.linear import Linear, bfloat16_pays, gelu_in_float32, next_step
from gigapath.longnet.norm import choose_one_pass, normalize, product_dtype

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


class DropPath(nn.Module):
    """`drop_path` in training, nothing else."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, lengths: Lengths | None = None) -> Tensor:
        """(B, N, D), or (1, T, D) packed, to the same shape."""
        if not self.training or self.drop_prob == 0:
            return x
        return drop_path(x, self.drop_prob, _lengths_of(x, lengths))


class SelfAttention(nn.Module):
    """Projections around the dilated attention; called with normalised activations."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.embed_dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.branches = config.branches
        self.k_proj = Linear(config.embed_dim, config.embed_dim)
        self.v_proj = Linear(config.embed_dim, config.embed_dim)
        self.q_proj = Linear(config.embed_dim, config.embed_dim)
        self.out_proj = Linear(config.embed_dim, config.embed_dim)
        self.inner_attn_ln = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        incremental_state: None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: None = None,
        rel_pos: None = None,
        is_first_step: bool = False,
        is_causal: bool = False,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, None]:
        """Attend within each slide.

        Args:
            query: (B, N, D), or (1, T, D) packed.
            key: of the same shape, `query` by default.
            value: of the same shape, `query` by default.
            incremental_state: must be None, as all further arguments of the published form.
            key_padding_mask: None, or False everywhere.
            attn_mask: None.
            rel_pos: None.
            is_first_step: False.
            is_causal: False.
            lengths: tokens of each slide; by default each row of the batch is a slide.

        Returns:
            the answer, of the shape of `query`, and None where the published form has weights.
        """
        _refuse(
            incremental_state=incremental_state,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            rel_pos=rel_pos,
            is_first_step=is_first_step,
            is_causal=is_causal,
        )
        return self.attend(self.project(query, key, value), _lengths_of(query, lengths), query.shape), None

    def project(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> list[Tensor]:
        """[q, k, v], each (T, H, E)."""
        same = (key is None or key is query) and (value is None or value is query)
        bare = all(map(_is_bare, (self.q_proj, self.k_proj, self.v_proj)))
        if same and bare and not torch.is_grad_enabled():
            # Autocast would convert it for each of the three; in training they are three for the gradients' sums.
            query = key = value = query.to(product_dtype(query))
        given = (
            (self.q_proj, query),
            (self.k_proj, query if key is None else key),
            (self.v_proj, query if value is None else value),
        )
        return [projection(x).reshape(-1, self.num_heads, self.head_dim) for projection, x in given]

    def attend(self, qkv: list[Tensor], lengths: Lengths, shape: torch.Size) -> Tensor:
        """From [q, k, v], which the list loses, to the answer of this shape (B, N, D)."""
        attended = dilated_attention(qkv[0], qkv[1], qkv[2], lengths, self.branches).view(shape)
        qkv.clear()
        if torch.is_grad_enabled() or self.inner_attn_ln._forward_hooks or self.inner_attn_ln._forward_pre_hooks:
            attended = self.inner_attn_ln(attended)
        else:
            for part in row_parts(attended):
                part.copy_(normalize(self.inner_attn_ln, part))
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
        # The GELU goes along with the product before it or, where one pass serves, with the norm behind it.
        late = choose_one_pass(self.ffn_layernorm, x, product_dtype(x), gelu=True) is not None
        fc1 = self.fc1.product(x, gelu=not late)
        fc2 = self.fc2.product(x)
        for part in row_parts(x):
            next_step()
            part.add_(fc2(normalize(self.ffn_layernorm, fc1(normalize(norm, part)), gelu=late)))


class EncoderLayer(nn.Module):
    """One pre-norm layer; leaves its input as it was."""

    normalize_before = True
    is_moe_layer = False
    alpha = 1.0  # of the residual, as the published layer has it without DeepNorm

    def __init__(
        self, config: LongNetConfig, depth: int, is_moe_layer: bool = False, is_encoder_decoder: bool = False
    ) -> None:
        super().__init__()
        if is_moe_layer or is_encoder_decoder:
            raise ValueError(
                "EncoderLayer: expected neither experts nor a decoder beside it. Leave out is_moe_layer and "
                "is_encoder_decoder."
            )
        self.args = config
        self.embed_dim, self.ffn_dim = config.embed_dim, config.ffn_ratio * config.embed_dim
        self.dropout_module = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path(depth)) if config.drop_path_rate > 0 else None
        self.self_attn = self.build_self_attention(config.embed_dim, config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.ffn = self.build_ffn(config.embed_dim, config)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def build_self_attention(self, embed_dim: int, args: LongNetConfig) -> Any:
        """What subclasses replace to have their own attention."""
        return SelfAttention(args)

    def build_ffn(self, embed_dim: int, args: LongNetConfig) -> Any:
        """What subclasses replace to have their own feed-forward network."""
        return FeedForward(args)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum of a part's answer and its input."""
        return residual + x

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Tensor | None = None,
        attn_mask: None = None,
        rel_pos: None = None,
        multiway_split_position: None = None,
        incremental_state: None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, None]:
        """Run the layer; the published form of the answer has a second entry that is None here.

        Args:
            x: (B, N, D), or (1, T, D) packed.
            encoder_padding_mask: None, or False everywhere.
            attn_mask: must be None, as all further arguments of the published form.
            rel_pos: None.
            multiway_split_position: None.
            incremental_state: None.
            lengths: tokens of each slide; by default each row of the batch is a slide.
        """
        _refuse(
            encoder_padding_mask=encoder_padding_mask,
            attn_mask=attn_mask,
            rel_pos=rel_pos,
            multiway_split_position=multiway_split_position,
            incremental_state=incremental_state,
        )
        each = _lengths_of(x, lengths)
        if not (torch.is_grad_enabled() or self.training or self._is_watched()):
            return self._infer(x, each), None
        attended = _for_slides(self.self_attn, self._attend, self.self_attn_layer_norm(x), each)
        x = self.residual_connection(self._drop(attended, each), x)
        return self.residual_connection(self._drop(self.ffn(self.final_layer_norm(x)), each), x), None

    def _attend(self, x: Tensor, **packed: Lengths) -> Any:
        nothing = dict.fromkeys(("key_padding_mask", "attn_mask", "rel_pos", "incremental_state"))
        return self.self_attn(query=x, key=x, value=x, **nothing, **packed)

    def _infer(self, x: Tensor, lengths: Lengths) -> Tensor:
        """The layer without autograd: nothing lives longer than it must, residuals are added in place, and the
        feed-forward network runs in parts that stay in cache. Nobody else holds the tensors that change:
        `_is_watched` rules that out."""
        qkv = self.self_attn.project(normalize(self.self_attn_layer_norm, x))
        attended = self.self_attn.attend(qkv, lengths, x.shape)
        # Autocast gives another dtype, and the sum has the strides of x then.
        x = attended.add_(x) if attended.dtype == x.dtype else (x + attended).contiguous()
        self.ffn.add_to(x, self.final_layer_norm)
        return x

    def _is_watched(self) -> bool:
        """Whether somebody looks into, or has replaced, a part whose tensors `_infer` changes or never makes."""
        attention, ffn = self.self_attn, self.ffn
        if (type(self), type(attention), type(ffn)) != (EncoderLayer, SelfAttention, FeedForward):
            return True
        unchanged = {id(part) for part in (self, attention.q_proj, attention.k_proj, attention.v_proj)}
        return not type(ffn.fc1) is type(ffn.fc2) is Linear or any(
            part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
            for part in self.modules()
            if id(part) not in unchanged
        )

    def _drop(self, x: Tensor, lengths: Lengths) -> Tensor:
        out: Tensor = self.dropout_module(x)
        if self.drop_path is not None:
            out = self.drop_path(out, lengths)
        return out


class LongNetEncoder(nn.Module):
    """Dropout, `depth` layers, `layer_norm`; answers with a dict as the published encoder does."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.num_layers = config.depth
        self.checkpoint_activations = False
        self.dropout_module = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self.build_encoder_layer(config, depth=index) for index in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def build_encoder_layer(
        self, args: LongNetConfig, depth: int, is_moe_layer: bool = False, is_encoder_decoder: bool = False
    ) -> nn.Module:
        """What subclasses replace to have their own layers; `depth` counts from 0."""
        return EncoderLayer(args, depth, is_moe_layer, is_encoder_decoder)

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
        encoder_padding_mask: Tensor | None = None,
        attn_mask: None = None,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        multiway_split_position: None = None,
        features_only: bool = False,
        incremental_state: None = None,
        positions: None = None,
        *,
        lengths: Lengths | None = None,
        summarise: Callable[[Tensor], Tensor] | None = None,
        **published: None,
    ) -> dict[str, Any]:
        """Encode tokens.

        Args:
            src_tokens: must be None; it is there for the published form of the call.
            encoder_padding_mask: None, or False everywhere.
            attn_mask: None.
            return_all_hiddens: whether to keep the depth + 1 states, state 0 being the embedding after dropout.
            token_embeddings: (B, N, D), or (1, T, D) packed.
            multiway_split_position: None.
            features_only: without a meaning here, where nothing follows `layer_norm`.
            incremental_state: None.
            positions: None.
            lengths: tokens of each slide; by default each row of the batch is a slide.
            summarise: applied to each kept state, so that memory does not grow with the depth.
            published: further arguments of the published encoder; they must be None.

        Returns:
            `encoder_out`, the last state after `layer_norm`, and `encoder_states`, the states before it (empty
            without `return_all_hiddens`). For who reads the published form, `encoder_embedding`, the tokens as they
            were given, `encoder_padding_mask` (B, N), False everywhere, and `l_aux`, None for each layer.
        """
        _refuse(
            src_tokens=src_tokens,
            encoder_padding_mask=encoder_padding_mask,
            attn_mask=attn_mask,
            multiway_split_position=multiway_split_position,
            incremental_state=incremental_state,
            positions=positions,
            **published,
        )
        if token_embeddings is None:
            raise ValueError("LongNetEncoder: expected token_embeddings (B, N, D), got None. Pass the embeddings.")
        x: Tensor = self.dropout_module(token_embeddings)
        lengths = _lengths_of(x, lengths)
        states = [summarise(x) if summarise else x] if return_all_hiddens else []
        for layer in self.layers:
            call = partial(
                layer,
                encoder_padding_mask=None,
                attn_mask=None,
                rel_pos=None,
                multiway_split_position=None,
                incremental_state=None,
            )
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                call = partial(checkpoint, call, use_reentrant=False)
            x = _for_slides(layer, call, x, lengths)
            if return_all_hiddens:
                states.append(summarise(x) if summarise else x)
        return {
            "encoder_out": self.layer_norm(x),
            "encoder_states": states,
            "encoder_embedding": token_embeddings,
            "encoder_padding_mask": torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device),
            "l_aux": [None] * len(self.layers),
        }


def _for_slides(part: nn.Module, call: Callable[..., Any], x: Tensor, lengths: Lengths) -> Tensor:
    """The first entry of what `call` of a part answers for x (B, N, D), or (1, T, D) packed. A part that others have
    put in place, in the published form, does not know of packed slides: it gets them one by one."""
    if lengths == (x.shape[1],) * x.shape[0]:
        out: Tensor = call(x)[0]
    elif "lengths" in inspect.signature(part.forward).parameters:
        out = call(x, lengths=lengths)[0]
    else:
        out = torch.cat([call(slide)[0] for slide in torch.split(x, list(lengths), dim=1)], dim=1)
    return out


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


def _is_bare(part: nn.Module) -> bool:
    """Whether nobody looks at what this linear layer is called with, or has replaced it."""
    watched = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    return type(part) is Linear and not watched


def _lengths_of(x: Tensor, lengths: Lengths | None) -> Lengths:
    return (x.shape[1],) * x.shape[0] if lengths is None else lengths


def _refuse(**published: Any) -> None:
    """Raise ValueError where an argument of the published forms asks for what is not there."""
    given = sorted(
        name
        for name, value in published.items()
        if value is not None and value is not False and not (name.endswith("padding_mask") and not value.any())
    )
    if given:
        raise ValueError(
            f"LongNetEncoder: expected None for {', '.join(given)}, got values. Give slides of several lengths to "
            "LongNetViT.forward with valid_mask, or to forward_packed."
        )
