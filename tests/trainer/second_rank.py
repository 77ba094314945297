"""Plugin for --external_plugins: while the companion writes its rescue, another process writes the same one from its first
to its last byte, as a second rank would. For tests.
"""

import functools
import os

import torch
from transformers import Trainer

TRAINERS = []


def noted(init):
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        TRAINERS.append(self)

    return __init__


def beside_another(original):
    @functools.wraps(original)
    def save(state, file, *args, **kwargs):
        if "rescue-tmp" in str(file) and TRAINERS:
            trainer = TRAINERS.pop()
            pid = os.fork()
            if pid == 0:
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
                except torch.OutOfMemoryError as error:
                    trainer.mhtraind.rescue(error)
                os._exit(0)
            os.waitpid(pid, 0)
        return original(state, file, *args, **kwargs)

    return save


Trainer.__init__ = noted(Trainer.__init__)
torch.save = beside_another(torch.save)
