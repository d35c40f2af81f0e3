"""Options of fine-tuning: data, model, training; the defaults are the published recipe."""

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gigapath.options import (
    LEAVE_SITE_OUT,
    BootstrapOptions,
    DeviceOptions,
    IdOptions,
    Options,
    PitchOptions,
    from_dict,
    option,
    to_dict,
)

HEADS = ("linear", "abmil", "abmil-tiles")
ADAPTATIONS = ("head", "lora", "last", "full")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class JoinOptions(IdOptions, PitchOptions):
    """How rows of labels meet feature files, and how these are read."""

    allow_missing: bool = option(False, "go on without the slides that have no features")
    allow_mixed: bool = option(False, "take files of different encoders, mpp or numerics together")


@dataclass(frozen=True)
class SplitOptions(Options):
    """Who trains and who tests."""

    folds: int | Literal["leave-site-out"] = option(
        5,
        "folds where no split files are given: stratified, grouped by patient; or leave-site-out = one a site",
        choices=(LEAVE_SITE_OUT,),
        metavar="N",
        at_least=3,
    )
    allow_leakage: bool = option(False, "continue where a patient or the same slide is in two sets")


@dataclass(frozen=True)
class ModelOptions(Options):
    """The slide encoder, how much of it is trained, and what stands on it."""

    adapt: str = option(
        "full",
        "what is trained: head = the head alone, on states computed once; lora = low-rank adapters of the encoder's "
        "layers; last = its last blocks; full = all weights",
        choices=ADAPTATIONS,
    )
    lora_rank: int = option(8, "rank of the adapters", at_least=1)
    lora_alpha: float = option(16.0, "the adapters' product is scaled by this over the rank", above=0)
    lora_dropout: float = option(0.0, "dropout in front of the adapters", at_least=0, at_most=0.9)
    last_blocks: int = option(2, "blocks that --adapt last trains, with the norm behind them", at_least=1)
    model_arch: str = option("gigapath_slide_enc12l768d", "architecture of the slide encoder", metavar="NAME")
    head: str = option(
        "linear",
        "linear = one layer on the chosen states; abmil = gated attention over the encoder's tokens; abmil-tiles = "
        "gated attention over the tile embeddings, without a slide encoder",
        choices=HEADS,
    )
    feat_layer: str = option("11", "states that the head sees: 11, or 5-11 for the two states 5 and 11")
    global_pool: bool = option(False, "mean over the tiles instead of the class token")
    dropout: float = option(0.1, "dropout of the slide encoder", at_least=0, at_most=0.9)
    drop_path_rate: float = option(0.0, "drop-path of the last layer", at_least=0, at_most=0.9)
    max_wsi_size: int = option(250000, "side of the largest slide in pixels; sets the segments", at_least=2048)
    checkpoint_activations: bool = option(False, "less memory: compute activations again in the backward pass")
    freeze: bool = option(False, "the former spelling of adapt=head", hidden=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze:
            if self.adapt not in ("head", "full"):
                raise ValueError(f"--freeze: expected no --adapt {self.adapt} beside it. Leave one out.")
            object.__setattr__(self, "adapt", "head")
            object.__setattr__(self, "freeze", False)
        if self.head == "abmil-tiles" and self.adapt not in ("head", "full"):
            raise ValueError(f"--adapt {self.adapt}: expected a head on the slide encoder, got --head abmil-tiles.")

    def check_adapters(self, pretrained: str) -> None:
        """Refuse to adapt an encoder of random weights, and adapters without their library, before work begins."""
        if self.adapt == "lora" and importlib.util.find_spec("peft") is None:
            raise ImportError("--adapt lora: peft is not installed. Install it: pip install 'gigapath[lora]'.")
        if self.adapt in ("lora", "last") and not pretrained:
            raise ValueError(
                f"--adapt {self.adapt}: expected weights to adapt, got random ones. Give --pretrained, or train all: "
                "--adapt full."
            )


@dataclass(frozen=True)
class TrainingOptions(DeviceOptions, BootstrapOptions):
    """The recipe."""

    epochs: int = option(5, "passes over the training slides", at_least=1)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", at_least=0)
    batch_size: int = option(1, "slides packed into one pass, without padding", at_least=1)
    gradient_accumulation: int = option(32, "passes of each process for one step of the optimizer", at_least=1)
    base_lr: float = option(0.002, "learning rate for 256 slides a step; scaled to the slides of a step", above=0)
    min_lr: float = option(1e-6, "last learning rate of the cosine", at_least=0)
    weight_decay: float = option(0.05, "AdamW's decay of parameters with two dimensions and more", at_least=0)
    layer_decay: float = option(0.95, "factor of the rate from one layer to the one below", above=0, at_most=1)
    published_layer_decay: bool = option(False, "give the input projection the head's rate, as the published code did")
    balanced: bool = option(False, "draw training slides so that every class comes equally often")
    file_order: bool = option(False, "keep the order of the tiles in training; by default they are shuffled")
    select: str = option(
        "last", "the epoch that is tested: last, or val = of least validation loss", choices=("last", "val")
    )
    calibrate: bool = option(False, "fit a temperature, and thresholds of labels, on the validation slides")
    precision: str = option(
        "auto", "auto = bf16 on CUDA where it exists, else fp16 with scaling; fp32 on a CPU", choices=PRECISIONS
    )
    deterministic: bool = option(False, "the same bits of each repeated run on a GPU, or an error; slower")
    allow_low_memory: bool = option(False, "go on where the plan says that the largest slide won't fit")
    workers: int = option(2, "threads that read ahead", at_least=1)

    def learning_rate(self, slides: int) -> float:
        """The rate of a step over this many slides."""
        return self.base_lr * slides / 256


def completed(record: Any, now: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version recorded of a run, for comparison with what this one records: options that it did not
    have stood at their defaults, former spellings become today's.

    Args:
        record: as it was read; anything.
        now: with the options of this run under "model" and "training".
    """
    found = dict(record) if isinstance(record, Mapping) else {}
    for name, kind in (("model", ModelOptions), ("training", TrainingOptions)):
        if isinstance(found.get(name), Mapping) and name in now:
            with contextlib.suppress(ValueError, TypeError):  # unknown to this version: it differs
                values = to_dict(from_dict(kind, found[name]))
                found[name] = {key: value for key, value in values.items() if key in now[name]}
    return found
