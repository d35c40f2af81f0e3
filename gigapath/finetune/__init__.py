"""Fine-tuning the slide encoder on labelled slides, and applying what was fitted.

result = finetune(Inputs("panda", "h5_files", "PANDA.csv", "splits"), "outputs/panda")
predict("outputs/panda/fold_0", ["slide.h5"])
"""

from gigapath.finetune.apply import evaluate_head, predict
from gigapath.finetune.fitted import FittedHead, load_head
from gigapath.finetune.new_task import new_task
from gigapath.finetune.options import JoinOptions, ModelOptions, SplitOptions, TrainingOptions
from gigapath.finetune.run import Inputs, RunResult, Settings, finetune
from gigapath.finetune.task import Task, load_task

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
