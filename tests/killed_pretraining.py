"""Run by a test: a pretraining that goes on in `killed` of a folder, and dies before some steps as by a scheduler's
hand, once each, until it reaches its end. argv: the folder, which has `features` too, and the numbers of the steps.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from demo.pretrain_planted import RECIPE, SIZES
from gigapath.pretraining import CohortOptions, pretrain, run

folder, steps = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
before = run._Run._before
run.plotting_available = lambda: False  # drawing takes longer than steps


def dying(self: run._Run, number: int) -> None:
    if self.history[-1].steps + self.done == last:
        os.kill(os.getpid(), signal.SIGKILL)
    before(self, number)


run._Run._before = dying
for last in (*steps, None):
    child = os.fork()  # has imported all of it already
    if not child:
        training = replace(RECIPE, epochs=20, seed=0, save_steps=20)
        cohort = CohortOptions(val_share=0.1)
        pretrain(folder / "features", folder / "killed", cohort=cohort, sizes=SIZES, training=training)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if last is None else -signal.SIGKILL)
