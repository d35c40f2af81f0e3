"""Published name of the attention with its log-sum-exp."""

from gigapath.longnet.attention import flash_attn_func

__all__ = ["flash_attn_func"]
