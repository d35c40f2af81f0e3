"""Pretraining the slide encoder by predicting hidden tiles: a masked autoencoder on LongNet, for any tile encoder's
features.

result = pretrain(["features"], "outputs/pretrained")
model = create_model(str(result.weights), "gigapath_slide_enc12l768d", 1536)
"""

from typing import TYPE_CHECKING

from gigapath import lazy_names

if TYPE_CHECKING:
    from gigapath.pretraining.options import CohortOptions, PretrainingOptions, SizeOptions, TaskOptions
    from gigapath.pretraining.run import Pretrained, pretrain

__all__ = ["CohortOptions", "Pretrained", "PretrainingOptions", "SizeOptions", "TaskOptions", "pretrain"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "options": ("CohortOptions", "PretrainingOptions", "SizeOptions", "TaskOptions"),
        "run": ("Pretrained", "pretrain"),
    },
)
