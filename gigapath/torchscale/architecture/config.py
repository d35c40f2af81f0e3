"""Published name of the encoder's configuration."""

from typing import Any

from gigapath.longnet.config import LongNetConfig, parse_lengths

__all__ = ["EncoderConfig"]

# Options that other encoders have, and the one value of each that LongNet's layers are made for.
_FIXED = {"encoder_normalize_before": True, "normalize_output": True, "subln": True, "no_scale_embedding": True}
# Options that change no numbers.
_FREE = {"flash_attention", "block_shift", "checkpoint_activations", "fsdp", "vocab_size", "no_output_layer"}


def EncoderConfig(
    *,
    encoder_embed_dim: int = 768,
    encoder_layers: int = 12,
    encoder_attention_heads: int = 12,
    encoder_ffn_embed_dim: int = 3072,
    segment_length: str = "[1024, 2048, 4096, 8192, 16384]",
    dilated_ratio: str = "[1, 2, 4, 8, 16]",
    dropout: float = 0.0,
    drop_path_rate: float = 0.0,
    layernorm_eps: float = 1e-5,
    **others: Any,
) -> LongNetConfig:
    """The numbers of a LongNet encoder from the published keywords; what it has no place for is refused."""
    refused = sorted(
        name for name, value in others.items() if name not in _FREE and value != _FIXED.get(name, value and None)
    )
    if encoder_ffn_embed_dim % encoder_embed_dim:
        refused.append("encoder_ffn_embed_dim")
    if refused:
        raise ValueError(
            "EncoderConfig: expected a pre-norm LongNet encoder with sub-LN, whose FFN is a multiple of its width, got "
            f"other values of {', '.join(refused)}. Leave them out."
        )
    return LongNetConfig(
        embed_dim=encoder_embed_dim,
        depth=encoder_layers,
        num_heads=encoder_attention_heads,
        ffn_ratio=encoder_ffn_embed_dim // encoder_embed_dim,
        segment_lengths=parse_lengths(segment_length),
        dilations=parse_lengths(dilated_ratio),
        dropout=dropout,
        drop_path_rate=drop_path_rate,
        layer_norm_eps=layernorm_eps,
    )
