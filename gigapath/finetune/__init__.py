"""Fine-tuning the slide encoder on labelled slides, and applying what was fitted.

result = finetune(Inputs("panda", "h5_files", "PANDA.csv", "splits"), "outputs/panda")
predict("outputs/panda/fold_0", ["slide.h5"])

Names are looked up when they are used: the options alone need no torch.
"""

from typing import TYPE_CHECKING

from gigapath.lazy import lazy_names

if TYPE_CHECKING:
    from gigapath.evaluation.labels import new_task
    from gigapath.evaluation.task import Task, load_task
    from gigapath.finetune.data import Inputs, Settings
    from gigapath.finetune.fitted import FittedHead, evaluate_head, load_head, predict
    from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions
    from gigapath.finetune.run import RunResult, finetune

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
        "gigapath.evaluation.labels": ("new_task",),
        "gigapath.evaluation.task": ("Task", "load_task"),
    },
)
