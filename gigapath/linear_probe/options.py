"""Options of probes; the defaults are the published recipe on PCam."""

from dataclasses import dataclass
from typing import Literal

from gigapath.options import (
    LEAVE_SITE_OUT,
    BootstrapOptions,
    DeviceOptions,
    EncoderOptions,
    IdOptions,
    option,
)

SOLVERS = ("sgd", "lbfgs", "knn")


@dataclass(frozen=True)
class ProbeOptions(BootstrapOptions):
    """What probes of tiles and of slides share: columns, what to allow, intervals."""

    label: str = option("label", "column of the label", metavar="COL")
    split: str | None = option(
        None,
        "column of the split (tiles: default split, else the embeddings' own paths; slides: default folds)",
        metavar="COL",
    )
    group: str | None = option(
        None,
        "column of the patient or slide; intervals draw whole groups "
        "(default: group, patient_id, patient, slide_id, slide or wsi where the CSV has one)",
        metavar="COL",
    )
    positive: str | None = option(
        None, "of two classes the positive one (default: the later in order)", metavar="LABEL"
    )
    allow_missing: bool = option(False, "go on where labels lack embeddings or embeddings lack labels")
    allow_leakage: bool = option(False, "continue where a group is in several splits")


@dataclass(frozen=True)
class TileProbeOptions(DeviceOptions):
    """A probe of tile embeddings."""

    solver: str = option(
        "sgd", "sgd = the published recipe; lbfgs = logistic regression; knn = nearest neighbours", choices=SOLVERS
    )
    steps: int = option(4000, "sgd: steps", at_least=1)
    batch_size: int = option(128, "sgd: tiles a step, drawn with replacement, fresh at every step", at_least=1)
    lr: float = option(0.02, "sgd: first learning rate; falls to 0 along a cosine", above=0)
    weight_decay: float = option(0.01, "sgd: weight decay", at_least=0)
    eval_every: int = option(100, "sgd: steps between looks at the validation set; the best one is kept", at_least=1)
    seeds: int = option(1, "sgd: repeat with this many seeds, from --seed on", at_least=1)
    pcam_meta: str | None = option(
        None, "folder of PCam's own meta files: groups tiles by slide where names and labels fit them", metavar="DIR"
    )
    no_cache: bool = option(False, "neither use nor write the cache beside a zip or folder")


@dataclass(frozen=True)
class SlideProbeOptions(IdOptions):
    """A probe of slide embeddings, as `gigapath embed` writes them."""

    embedding: str | None = option(
        None,
        "probe slides instead of tiles: names of slide embeddings, with commas; tile-mean comes beside",
        metavar="NAMES",
    )
    task: str | None = option(
        None, "task file of survival or regression (gigapath init-task), instead of --label", metavar="YAML"
    )
    folds: int | Literal["leave-site-out"] = option(
        5,
        "folds, stratified by label and grouped by --group; or leave-site-out = one a site, drawn once",
        choices=(LEAVE_SITE_OUT,),
        metavar="N",
        at_least=2,
    )
    repeats: int = option(5, "how often the folds are drawn anew", at_least=1)


@dataclass(frozen=True)
class EmbedTilesOptions(EncoderOptions):
    """Tile images to embeddings."""

    tile_encoder: str = option(
        "gigapath", "gigapath, gigapath-flash, standin, timm:NAME, or a checkpoint of a released one", metavar="NAME"
    )
    batch_size: int = option(64, "tiles of a batch; a part of the numerics, so keep it in a comparison", at_least=1)
