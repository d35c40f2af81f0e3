"""Published names of LongNet; there is no decoder, which no slide encoder has."""

from typing import Any

from gigapath.longnet.encoder import EncoderLayer as LongNetEncoderLayer
from gigapath.longnet.encoder import LongNetEncoder
from gigapath.torchscale.architecture.config import EncoderConfig
from gigapath.torchscale.model import LongNetConfig as longnet_arch

__all__ = [
    "EncoderConfig",
    "LongNetEncoder",
    "LongNetEncoderLayer",
    "longnet_arch",
    "make_longnet",
    "make_longnet_from_name",
]


def make_longnet_from_name(
    config_name: str,
    dilated_ratio: str = "[1, 2, 4, 8, 16]",
    segment_length: str = "[1024, 2048, 4096, 8192, 16384]",
    drop_path_rate: float = 0.1,
    dropout: float = 0.1,
) -> LongNetEncoder:
    """An encoder with random weights.

    Args:
        config_name: of `longnet_arch`, such as "LongNet_12_layers_768_dim".
        dilated_ratio: dilations, as text.
        segment_length: segment lengths in tokens, as text.
        drop_path_rate: rate of the last layer.
        dropout: rate after the embedding, the attention and the feed-forward network.
    """
    return LongNetEncoder(
        EncoderConfig(
            **{
                **_sizes_of(config_name),
                "dilated_ratio": dilated_ratio,
                "segment_length": segment_length,
                "drop_path_rate": drop_path_rate,
                "dropout": dropout,
            }
        )
    )


def make_longnet(args: Any) -> LongNetEncoder:
    """An encoder with random weights: sizes and segments of `args.arch`, rates of `args` where it has them."""
    rates = {name: getattr(args, name) for name in ("dropout", "drop_path_rate") if hasattr(args, name)}
    return LongNetEncoder(EncoderConfig(**{**_sizes_of(args.arch), **rates}))


def _sizes_of(name: str) -> dict[str, Any]:
    found = vars(longnet_arch).get(name)
    if not isinstance(found, dict) or not name.startswith("LongNet_"):
        known = sorted(name for name in vars(longnet_arch) if name.startswith("LongNet_"))
        raise ValueError(f"LongNet: expected one of {', '.join(known)}, got {name!r}.")
    return found
