"""Run by torchrun in a test: the gradients of one step of pretraining in float64, summed over the processes.

argv: output folder, slides a process packs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from test_pretraining import WIDTH, Viewer, bags_of, fit_target, narrow, pack_views

from gigapath.finetune.loop import Loop, join_processes
from gigapath.pretraining import TaskOptions
from gigapath.pretraining.model import loss_of_slides

out, size = Path(sys.argv[1]), int(sys.argv[2])
processes = join_processes("cpu")
bags = bags_of(20, 9, 33, 14)
assert bags[0].features.shape[1] == WIDTH
target = fit_target("standardized", bags, np.arange(4), seed=0, workers=1)
rows = [range(start, start + size) for start in range(0, 4, size)][processes.rank :: processes.world]
views = [[Viewer(TaskOptions(), 0).view(bags[row], str(row), 0) for row in chunk] for chunk in rows]
model = narrow()
Loop(processes, "fp32", 1).add_gradients(
    model, (pack_views(chunk, target) for chunk in views), lambda m, b: loss_of_slides(m(b), b, "mse").sum(), 4
)
if processes.rank == 0:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(gradients, out / "gradients.pt")
