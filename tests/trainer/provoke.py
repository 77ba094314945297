"""Plugin for --external_plugins (ms-swift 3.x and 4.x): a misfortune in a chosen optimizer step. For tests.

    PROVOKE        hog: host memory is taken until the kernel ends it; kill_worker: a data-loader worker is killed;
                   nan: a weight is not a number from here on; traceback: an error is caught, printed and survived;
                   hang: nothing happens any more
    PROVOKE_STEP   in which step, counted from 1
    PROVOKE_ONCE   a file that is made when it happens; where it is, nothing happens any more
"""

import functools
import multiprocessing
import os
import pathlib
import signal
import time
import traceback

from transformers import Trainer

WHAT, STEP = os.environ.get("PROVOKE"), int(os.environ.get("PROVOKE_STEP", "1"))
ONCE = pathlib.Path(os.environ.get("PROVOKE_ONCE", "provoked"))


def hog(_):
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1 << 20)) * 16)


def kill_worker(_):
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def survived(_):
    try:
        raise RuntimeError("an error that somebody caught")
    except RuntimeError:
        traceback.print_exc()


def hang(_):
    time.sleep(100_000)


def nan(model):
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(float("nan"))


if WHAT is not None and not ONCE.exists():
    original = Trainer.training_step

    @functools.wraps(original)
    def training_step(self, model, *args, **kwargs):
        due = self.state.global_step + 1 == STEP and not getattr(self, "mhtraind_preflight", False)
        if due and not ONCE.exists():
            ONCE.touch()
            {"hang": hang, "hog": hog, "kill_worker": kill_worker, "nan": nan, "traceback": survived}[WHAT](model)
        return original(self, model, *args, **kwargs)

    Trainer.training_step = training_step
