"""Options of the runs; together with `TileOptions` they are the command line. No torch in here, so that a wrong word is
told at once."""

import re
from dataclasses import dataclass

from gigapath.features.data import parse_embedding, recipe_of
from gigapath.machine import available_cores
from gigapath.options import DeviceOptions, EncoderOptions, KeepOptions, PitchOptions, option
from gigapath.preprocessing.fast import READERS


@dataclass(frozen=True)
class RunOptions(KeepOptions):
    """How a run goes about its work; nothing in here changes a number."""

    workers: int | None = option(
        None, "threads that read tiles, 0 for a single one without helpers (default: one per core)", at_least=0
    )
    reader: str = option(
        "auto",
        "auto decodes tiled TIFFs directly where that gives OpenSlide's pixels to the bit, openslide never",
        choices=READERS,
    )
    hash: str = option("none", "full: record each slide's SHA-256, check the manifest's md5", choices=("none", "full"))
    shard: str | None = option(
        None, "do share I of N of the slides, cut to about equal numbers of tiles: one job of an array", metavar="I/N"
    )
    pseudonymise: str | None = option(
        None, "slides and patients get ids made from this key; the mapping is kept in private/ only", metavar="KEYFILE"
    )
    engine: str = option(
        "local", "local: this process; ray: workers on the machines of a Ray cluster", choices=("local", "ray")
    )
    ray_address: str | None = option(
        None,
        "HOST:PORT of the Ray cluster, auto for the one that this machine belongs to, local for processes of this "
        "machine (default: $RAY_ADDRESS, else local)",
        metavar="ADDRESS",
    )
    worker_cores: int | None = option(
        None,
        "cores of each of Ray's workers (default: a GPU's share of its machine; 4 without GPUs; 1 to tile)",
        at_least=1,
    )

    def reading_threads(self, cores: int | None = None) -> int:
        """Threads that read: as asked, else one per core, of which there are `cores` or all that may be used."""
        return self.workers if self.workers is not None else cores or available_cores()

    @property
    def over_ray(self) -> bool:
        """Whether Ray's workers do the work; a dry run has none for them."""
        return self.engine == "ray" and not self.dry_run

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "local" and (self.ray_address is not None or self.worker_cores is not None):
            raise ValueError("--ray-address, --worker-cores: expected --engine ray beside them, got --engine local.")
        if self.shard is not None:
            parse_shard(self.shard)


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N": share I of N, counted from 1.

    Raises:
        ValueError: other words, or I outside 1 to N.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard: expected I/N with I from 1 to N, such as 1/4, got {text!r}.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class EmbedOptions(EncoderOptions):
    """Which encoders, on what, in which numbers."""

    tile_encoder: str = option(
        "gigapath", "gigapath, gigapath-flash, standin, timm:NAME or a checkpoint", metavar="NAME"
    )
    slide_encoder: str | None = option(
        None,
        "gigapath, gigapath-flash, mean, none or a checkpoint (default: the tile encoder's own; mean for the stand-in "
        "and timm models, or an untrained one with --random-weights)",
        metavar="NAME",
    )
    tiles: str | None = option(
        None, "take the tiles of this folder, made by gigapath tile; SLIDES may be left out", metavar="DIR"
    )
    devices: str | None = option(
        None, "several devices side by side: a list such as cuda:0,cuda:1, or how many", metavar="LIST"
    )
    batch_size: int | None = option(None, "tiles per batch (default: by encoder and device)", at_least=1)
    store: str = option("float32", "how tile embeddings are stored", choices=("float32", "float16"))


@dataclass(frozen=True)
class SlideEmbedOptions(EncoderOptions, PitchOptions):
    """Which slide encoder, on what, in which numbers."""

    slide_encoder: str | None = option(
        None,
        "gigapath, gigapath-flash, mean or a checkpoint (default: the pair of the tile encoder that the files name, "
        "else mean; to be named for another tool's files of a released encoder's width that name none)",
        metavar="NAME",
    )
    embedding: str = option(
        "default",
        "the name of an embedding, as for convert: what --to writes; ending with :tiles one vector a tile, into "
        "contextual_*/; the name of a tool as that tool computes it, into as-TOOL_*/",
        metavar="NAME",
    )
    per: str = option(
        "slide", "one embedding a slide, or one a connected piece of tissue", choices=("slide", "section")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pooling, recipe = parse_embedding(self.embedding).pooling, recipe_of(self.embedding)
        if self.per == "section" and (pooling == "tiles" or recipe is not None):
            raise ValueError(f"--per section: expected one vector a section, got --embedding {self.embedding}.")
        if recipe is not None and not recipe.evaluated:
            raise ValueError(
                f"--embedding {self.embedding}: expected a tool that gives the same vector twice; this one leaves "
                "dropout on. Take default:class for the vector that it means."
            )

    @property
    def form(self) -> str:
        """What a result is: "slide", "section", the name of the vectors of tiles, or that of a tool."""
        if recipe_of(self.embedding) is not None:
            return self.embedding
        name = parse_embedding(self.embedding)
        return str(name) if name.pooling == "tiles" and self.per == "slide" else self.per


@dataclass(frozen=True)
class CheckOptions(DeviceOptions, PitchOptions):
    """What `gigapath check` takes beside what the files say."""

    slides: str | None = option(
        None, "read tiles of these slides again and compare their embeddings", metavar="DIR|MANIFEST"
    )
    sample: int = option(8, "tiles a slide that are read again", at_least=1)
    tile_encoder: str | None = option(
        None, "the encoder to compare with (default: the one that the file names)", metavar="NAME"
    )
    slide_embeddings: tuple[str, ...] = option(
        (), "say how the vectors of these files (one a tool) were computed, beside --features", metavar="FILE"
    )
    features: str | None = option(
        None, "the tile embeddings of the same slides, files or folders, for --slide-embeddings", metavar="FILE"
    )
    slide_encoder: str | None = option(
        None, "the slide encoder of --slide-embeddings (default: the pair of the tile encoder)", metavar="NAME"
    )
    random_weights: bool = option(False, "the untrained slide encoder, for trying --slide-embeddings")
