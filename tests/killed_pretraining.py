"""Run by a test: a pretraining that kills itself, as a scheduler would, before its step number argv[2] (0: never).

argv: folder with `features`; the run is in `killed` there.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from demo.pretrain_planted import RECIPE, SIZES
from gigapath.pretraining import CohortOptions, pretrain
from gigapath.pretraining.training import Training

folder, last = Path(sys.argv[1]), int(sys.argv[2])
before = Training._before


def dying(self: Training, number: int) -> None:
    if self.history[-1].steps + self.done == last > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    before(self, number)


Training._before = dying
pretrain(
    folder / "features",
    folder / "killed",
    cohort=CohortOptions(val_share=0.1),
    sizes=SIZES,
    training=replace(RECIPE, epochs=20, seed=0, save_steps=20),
)
