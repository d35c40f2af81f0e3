"""Published names of the attention module and of its kernel."""

from gigapath.longnet.attention import flash_attn_func
from gigapath.longnet.encoder import SelfAttention as MultiheadAttention

__all__ = ["MultiheadAttention", "flash_attn_func"]
