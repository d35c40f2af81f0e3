"""Options of `gigapath map`. No torch in here, so that a wrong one is refused at once."""

from dataclasses import dataclass

from gigapath.options import DeviceOptions, PitchOptions, option

HEAD_KINDS = ("head-attention", "gradient", "occlusion")
KINDS = ("pca", "clusters", "similarity", "attention", "rollout", *HEAD_KINDS, "classes")  # made in `kinds`
MOST_CLUSTERS = 12  # as many colors as stay apart for all readers


@dataclass(frozen=True)
class MapOptions(DeviceOptions, PitchOptions):
    """Which maps, of what, and how they are drawn."""

    kind: tuple[str, ...] = option(
        ("pca", "clusters"),
        "pca and clusters of the tile embeddings; similarity to --tile; attention of the slide encoder (--layer, "
        "--query) and its rollout over the layers, a heuristic; of a fitted head (--checkpoint) head-attention, "
        "gradient (times input) and occlusion, of a head of tiles classes",
        choices=KINDS,
    )
    clusters: int | None = option(
        None,
        "clusters of the tile embeddings (default: 8, with fewer than 160 tiles one for every 20)",
        at_least=2,
        at_most=MOST_CLUSTERS,
    )
    tile: int | None = option(
        None, "the chosen tile, by its row in the feature file in row-major order, from 0", at_least=0
    )
    of_slide: str | None = option(
        None, "the slide that --tile counts in, for similarity (default: the first)", metavar="NAME"
    )
    query: str = option(
        "pooled",
        "whose attention: pooled = the mean over the tiles, class = the class token, tile = the token of --tile",
        choices=("pooled", "class", "tile"),
    )
    layer: tuple[int, ...] = option((), "layers whose attention is read, from 1 (default: the last)", at_least=1)
    attention_head: int | None = option(
        None, "one head of the layer, from 0 (default: the mean over heads)", at_least=0
    )
    checkpoint: str | None = option(
        None, "a fitted head, such as OUT/fold_0; attention is then that of its slide encoder", metavar="DIR"
    )
    target: str | None = option(
        None,
        "the class whose score is explained (default: of two classes the second, else, and for head-attention, the one "
        "predicted)",
        metavar="CLASS",
    )
    slide_encoder: str | None = option(
        None,
        "whose attention: gigapath, gigapath-flash or a checkpoint (default: the pair of the tile encoder)",
        metavar="NAME",
    )
    random_weights: bool = option(False, "an untrained slide encoder, for trying things; every map says so")
    slides: tuple[str, ...] = option(
        (), "where the slides are: files, folders, manifests (default: where the run that made FEATURES found them)"
    )
    range: str = option(
        "all", "colors span the values of all slides given, or of each slide by itself", choices=("all", "slide")
    )
    opacity: float = option(0.65, "of the tiles over the slide", above=0, at_most=1)
    seed: int = option(0, "of samples, clusters and random orders", at_least=0)
    overwrite: bool = option(False, "draw again where the folder holds maps of these kinds with other options")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kind:
            raise ValueError(f"--kind: expected at least one of {', '.join(KINDS)}, got none.")
        if self.tile is None and ("similarity" in self.kind or self.query == "tile"):
            what = "--kind similarity" if "similarity" in self.kind else "--query tile"
            raise ValueError(f"{what}: expected a tile, got none. Choose one with --tile.")
        heads = [kind for kind in self.kind if kind in (*HEAD_KINDS, "classes")]
        if heads and self.checkpoint is None:
            raise ValueError(f"--kind {heads[0]}: expected a fitted head, got none. Name it with --checkpoint.")
