"""Fine-tuning the slide encoder on labelled slides, and applying what was fitted.

result = finetune(Inputs("panda", "h5_files", "PANDA.csv", "splits"), "outputs/panda")
predict("outputs/panda/fold_0", ["slide.h5"])

Names are looked up when they are used: the options alone need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigapath.finetune.apply import evaluate_head, predict
    from gigapath.finetune.fitted import FittedHead, load_head
    from gigapath.finetune.inputs import Inputs, Settings
    from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions
    from gigapath.finetune.run import RunResult, finetune
    from gigapath.finetune.task import Task, load_task
    from gigapath.finetune.task_writer import new_task

_HOMES = {
    "apply": ("evaluate_head", "predict"),
    "fitted": ("FittedHead", "load_head"),
    "inputs": ("Inputs", "Settings"),
    "task_writer": ("new_task",),
    "options": ("JoinOptions", "ModelOptions", "SplitOptions", "TrainingOptions"),
    "run": ("RunResult", "finetune"),
    "task": ("Task", "load_task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
