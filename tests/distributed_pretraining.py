"""Run by torchrun in a test: the gradients of one step of pretraining in float64, summed over the processes.

argv: output folder.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from test_pretraining import DISTRIBUTED, Viewer, bags_of, fit_target, narrow, pack_views

from gigapath.finetune.loop import Loop, join_processes
from gigapath.pretraining import TaskOptions
from gigapath.pretraining.model import loss_of_slides

processes = join_processes("cpu")
bags = bags_of(*DISTRIBUTED)
target = fit_target("standardized", bags, np.arange(4), seed=0, workers=1)
rows = range(2 * processes.rank, 2 * processes.rank + 2)
views = [Viewer(TaskOptions(), 0).view(bags[row], str(row), 0) for row in rows]
model = narrow()
Loop(processes, "fp32", 1).add_gradients(
    model, [pack_views(views, target)], lambda m, b: loss_of_slides(m(b), b, "mse").sum(), 4
)
if processes.rank == 0:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(gradients, Path(sys.argv[1]) / "gradients.pt")
