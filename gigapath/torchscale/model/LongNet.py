"""Published names of LongNet."""

from gigapath.longnet.encoder import EncoderLayer as LongNetEncoderLayer
from gigapath.longnet.encoder import LongNetEncoder

__all__ = ["LongNetEncoder", "LongNetEncoderLayer"]
