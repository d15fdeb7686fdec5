"""Starts a stage in a process of its own, alone or under torchrun: distributed_script.py STAGE [its arguments].

Adam takes a large epsilon: with its own it makes a full step of a gradient that is rounding alone, as that of a bias
before batch normalisation is, and nothing can be compared. KILLED_AT=STEP kills the second process in that step, after
a checkpoint of each step before.
"""

import importlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from student_teacher.runtime import distributed
from student_teacher.training import loop


class KilledTraining(loop.Training):
    """Its second process is killed."""

    def report(self, loss, **parts):
        super().report(loss, **parts)
        if self.step == int(os.environ["KILLED_AT"]) and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.optim.Adam = partial(torch.optim.Adam, eps=0.1)
    stage = importlib.import_module(sys.argv.pop(1))
    if "KILLED_AT" in os.environ:
        loop.SECONDS_BETWEEN_CHECKPOINTS = 0
        loop.Training = KilledTraining
    distributed.run(stage.main)
