"""Published names of LongNet's sizes: `LongNet_<layers>_layers_<width>_dim` and their variants, keywords of
`EncoderConfig`. The segments of the slide encoder are its own."""

from typing import Any


def _sizes(depth: int, width: int, ffn: int, heads: int = 16, segments: tuple[int, ...] = ()) -> dict[str, Any]:
    segments = segments or (1024, 2048, 4096, 8192, 16384)
    return {
        "encoder_layers": depth,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": ffn,
        "encoder_attention_heads": heads,
        "dilated_ratio": str([2**i for i in range(len(segments))]),
        "segment_length": str(list(segments)),
    }


_SHORT, _ONE = (512, 1024, 2048), (10_000_000,)
_DEPTHS = {256: (8, 12), 384: (3, 6, 12), 768: (3, 6, 8, 12), 1024: (8, 24), 1536: (3, 6, 8, 12)}
globals().update(
    {
        f"LongNet_{depth}_layers_{width}_dim": _sizes(depth, width, 4 * width)
        for width in _DEPTHS
        for depth in _DEPTHS[width]
    }
    | {f"LongNet_{depth}_layers_256_dim_mlp2": _sizes(depth, 256, 512, 16, _SHORT) for depth in (8, 12)}
    | {f"LongNet_Vanilla_6_layers_{width}_dim": _sizes(6, width, 4 * width, 16, _ONE) for width in (768, 1536)}
)
LongNet_6_layers_768_dim = _sizes(6, 768, 3072, 16, (1024, 4096, 8192, 16384, 65536))
LongNet_12_layers_512_dim = _sizes(12, 512, 1024, 8, _SHORT)
LongNet_Vanilla_12_layers_256_dim = _sizes(12, 256, 512, 8, _ONE)
LongNet_test = _sizes(1, 192, 192, 8, _SHORT)
