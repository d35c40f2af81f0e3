"""What pretraining can be told. Published are: the learning rate, the epochs, the crop ratio, a shift, the mirror; the
other defaults are those of masked autoencoders on images (He et al. 2022), or ours where their help says so."""

from dataclasses import dataclass

from gigapath.finetune.options import PRECISIONS
from gigapath.options import DeviceOptions, IdOptions, Options, PitchOptions, option

CACHES, STARTS, CHECKPOINTED = ("none", "fp32", "fp16"), ("tied", "plain"), ("none", "decoder", "all")
TARGETS = ("standardized", "per-tile", "raw")


@dataclass(frozen=True)
class CohortOptions(IdOptions, PitchOptions):
    """Which slides, and who is kept for validation."""

    val_share: float = option(0.1, "share of the patients kept for validation", at_least=0, at_most=0.5)
    patients: str | None = option(None, "CSV with slide_id and patient_id; else each slide is a patient", metavar="CSV")
    allow_mixed: bool = option(False, "take files of different encoders, mpp or numerics together")
    cache: str = option("none", "copy all tiles into one file in --out, where small files are slow", choices=CACHES)
    shard: bool = option(False, "each process reads its own share of the slides only, in every epoch")


@dataclass(frozen=True)
class SizeOptions(Options):
    """The encoder, and the decoder that is thrown away later."""

    model_arch: str = option("gigapath_slide_enc12l768d", "slide encoder, by depth and width; any size", metavar="NAME")
    decoder_dim: int = option(512, "width of the decoder", at_least=16)
    decoder_depth: int = option(8, "layers of the decoder", at_least=1)
    dropout: float = option(0.0, "dropout of encoder and decoder", at_least=0, at_most=0.9)
    drop_path_rate: float = option(0.0, "drop-path of the encoder's last layer", at_least=0, at_most=0.9)
    start: str = option("tied", "new weights: tied = keys and queries begin equal (ours); plain", choices=STARTS)
    checkpoint_activations: str = option("none", "less memory: activations are computed again", choices=CHECKPOINTED)


@dataclass(frozen=True)
class TaskOptions(Options):
    """What is hidden, and what is predicted."""

    mask_ratio: float = option(0.75, "share of a slide's tiles that is hidden", above=0, at_most=0.99)
    target: str = option("standardized", "by dimension (ours), by each tile's own values, or raw", choices=TARGETS)
    loss: str = option("mse", "of hidden tiles: mse, or cosine = 1 - cosine", choices=("mse", "cosine"))
    crop: float = option(0.875, "side of the window that is seen, as a share of the slide's extent", above=0, at_most=1)
    mirror: float = option(0.5, "probability of a mirror image along x", at_least=0, at_most=1)
    shift: int = option(20, "positions move by fewer cells (ours); 1000 = anywhere", at_least=1, at_most=1000)


@dataclass(frozen=True)
class PretrainingOptions(DeviceOptions):
    """The recipe."""

    epochs: int = option(30, "passes over the training slides", at_least=1)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", at_least=0)
    batch_size: int = option(4, "slides packed into one pass, without padding", at_least=1)
    gradient_accumulation: int = option(1, "passes of each process for one step of the optimizer", at_least=1)
    tokens_per_step: int | None = option(None, "tiles of a step, in place of a number of slides", at_least=1)
    base_lr: float = option(5e-4, "learning rate of a step, whatever its size", above=0)
    min_lr: float = option(0.0, "last learning rate of the cosine", at_least=0)
    weight_decay: float = option(0.05, "AdamW's decay of parameters with two dimensions and more", at_least=0)
    beta2: float = option(0.95, "AdamW's second coefficient", above=0, at_most=0.9999)
    clip: float = option(1.0, "largest norm of the gradients; 0 = any (ours)", at_least=0)
    precision: str = option("auto", "auto = bf16 on CUDA, else fp16; fp32 on a CPU", choices=PRECISIONS)
    deterministic: bool = option(False, "the same bits of each repeated run on a GPU, or an error; slower")
    seed: int = option(0, "seed of all that is drawn", at_least=0)
    save_steps: int = option(200, "steps between checkpoints within an epoch", at_least=1)
    allow_low_memory: bool = option(False, "go on where the plan says that the largest pass won't fit")
    workers: int = option(2, "threads that read, crop and pack ahead", at_least=1)
