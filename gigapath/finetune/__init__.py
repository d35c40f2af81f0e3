"""Fine-tuning the slide encoder on labelled slides, and applying what was fitted.

result = finetune(Inputs("panda", "h5_files", "PANDA.csv", "splits"), "outputs/panda")
predict("outputs/panda/fold_0", ["slide.h5"])
finetune_tiles("tiles.zip", "outputs/tiles", tile_encoder="gigapath-flash", model=ModelOptions(adapt="lora"))

`gigapath.finetune(features, task=..., labels=..., out=..., epochs=5)` takes the options as keywords. Names are looked
up when they are used: the options alone need no torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gigapath
from gigapath import lazy_names

if TYPE_CHECKING:
    from gigapath.evaluation.labels import Task, load_task, new_task
    from gigapath.finetune.data import Inputs, Settings
    from gigapath.finetune.fitted import FittedHead, evaluate_head, load_head, predict
    from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions
    from gigapath.finetune.run import RunResult, finetune
    from gigapath.finetune.tiles import finetune_tiles

__all__ = [
    "FittedHead",
    "Inputs",
    "JoinOptions",
    "ModelOptions",
    "RunResult",
    "Settings",
    "SplitOptions",
    "Task",
    "TrainingOptions",
    "evaluate_head",
    "finetune",
    "finetune_tiles",
    "load_head",
    "load_task",
    "new_task",
    "predict",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "data": ("Inputs", "Settings"),
        "fitted": ("FittedHead", "evaluate_head", "load_head", "predict"),
        "options": ("JoinOptions", "ModelOptions", "SplitOptions", "TrainingOptions"),
        "run": ("RunResult", "finetune"),
        "tiles": ("finetune_tiles",),
        "gigapath.evaluation.labels": ("Task", "load_task", "new_task"),
    },
)


class _CallableRoom(ModuleType):
    """This room has the name of a verb, which the front door calls."""

    def __call__(self, *args: Any, **options: Any) -> "RunResult":
        found: RunResult = gigapath.api.finetune(*args, **options)
        return found


sys.modules[__name__].__class__ = _CallableRoom
