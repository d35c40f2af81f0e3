"""The names of slide embeddings, the same words in Python, on the command line and in exported tables.

    default[:POOLING]      the slide encoder's default output
    state:I[:POOLING]      the output of layer I, 0 the input
    last-state[:POOLING]   the output of the last layer, without the encoder's closing norm (so not `default`)
    all-states[:POOLING]   states 0 to depth, concatenated
    tile-mean              the plain mean of the tile embeddings; needs no slide encoder
    trident                what TRIDENT takes: state:11:mean
    published-demo         what the published demo calls last_layer_embed: last-state:class

POOLING is `mean` (the default: the class token was not trained in pretraining), `class`, or `tiles` for no pooling: one
vector a tile, which knows the tiles around it. The mean over a slide's tiles, then the model's `norm`, is the slide's
own vector with `mean`.
"""

import dataclasses

PRESETS = {"trident": "state:11:mean", "published-demo": "last-state:class"}
POOLINGS = ("mean", "class", "tiles")
KINDS = ("default", "state", "last-state", "all-states", "tile-mean")


@dataclasses.dataclass(frozen=True)
class EmbeddingName:
    """A parsed name; `str()` gives the one way to write it.

    Attributes:
        kind: one of KINDS.
        pooling: "mean", "class" or "tiles"; "" for tile-mean.
        state: I of `state:I`, else None.
    """

    kind: str
    pooling: str = "mean"
    state: int | None = None

    def __str__(self) -> str:
        return ":".join(
            part for part in (self.kind, "" if self.state is None else str(self.state), self.pooling) if part
        )


def parse_embedding(name: str) -> EmbeddingName:
    """Read the name of an embedding; an unknown one raises ValueError with the names that exist."""
    kind, *rest = PRESETS.get(name, name).split(":")
    if kind == "tile-mean" and not rest:
        return EmbeddingName(kind, pooling="")
    if kind in KINDS and kind != "tile-mean":
        state = rest.pop(0) if kind == "state" and rest else None
        pooling = rest.pop(0) if rest else "mean"
        numbered = state is not None and state.isascii() and state.isdigit()
        if not rest and pooling in POOLINGS and numbered == (kind == "state"):
            return EmbeddingName(kind, pooling, int(state) if state is not None else None)
    raise ValueError(
        f"embedding: expected default, state:I, last-state or all-states (with :mean, :class or :tiles), tile-mean, "
        f"{' or '.join(PRESETS)}, got {name!r}."
    )
