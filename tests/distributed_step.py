"""Run by torchrun in a test: one training of a fold in float64, and the gradients of its first step in float32.

argv: output folder, slides a process packs, accumulation.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from test_finetune_training import bags_of, fold_of, gradients_of_step, narrow, trainer_of

from gigapath.finetune.loop import join_processes

out, size, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
processes = join_processes("cpu")
bags, truth = bags_of(37)  # the last step holds five slides: the processes' shares differ
options = {
    "batch_size": size,
    "gradient_accumulation": accumulation,
    "epochs": 1,
    "warmup_epochs": 0.0,
    "base_lr": 0.05,
}
saved = {}
for head in ("linear", "abmil"):
    model = narrow(head=head).train()
    gradients = gradients_of_step(model, trainer_of(bags, truth, processes=processes, **options), np.arange(8))
    saved |= {f"grad.{head}.{name}": gradient for name, gradient in gradients.items()}
model = narrow(torch.float64)
trainer = trainer_of(bags, truth, dtype=torch.float64, processes=processes, **options)
history = trainer.train(model, fold_of(37, val=2), out / "run", {})
saved |= {f"end.{name}": tensor for name, tensor in model.state_dict().items()}
saved["loss"] = torch.tensor([history[0].train_loss, history[0].val_loss])
torch.save(saved, out / f"rank_{processes.rank}.pt")
