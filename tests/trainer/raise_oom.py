"""Plugin for --external_plugins (ms-swift 3.x and 4.x): raises torch.OutOfMemoryError, or dies, at a chosen place. For tests.

    RAISE_OOM_AT     backward, optimizer (before it has touched anything), optimizer_done, eval, save
    RAISE_OOM_STEP   the optimizer step, counted from 1 (eval and save: after that step)
    RAISE_OOM_AS     oom; or kill: the process kills itself with SIGKILL [oom]
    RAISE_OOM_RANK   the only rank that raises it [all]
    RAISE_OOM_ONCE   a file that is made when it is raised; where it is, nothing is raised any more
"""

import functools
import os
import signal

import torch
from transformers import Trainer, TrainerCallback

AT, STEP = os.environ.get("RAISE_OOM_AT"), int(os.environ.get("RAISE_OOM_STEP", "0"))
RANK = os.environ.get("RANK", "0")
ONCE = os.environ.get("RAISE_OOM_ONCE")


def out_of_memory(*args, **kwargs):
    if ONCE:
        open(ONCE, "w").close()
    if os.environ.get("RAISE_OOM_AS") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 2.00 GiB of which 20.00 MiB is "
        "free. Including non-PyTorch memory, this process has 1.98 GiB memory in use. Of the allocated memory 1.60 GiB "
        "is allocated by PyTorch, and 30.00 MiB is reserved by PyTorch but unallocated."
    )


def before(name, is_due):
    """Makes a method of the Trainer raise when it is due."""
    original = getattr(Trainer, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        if is_due(self):
            out_of_memory()
        return original(self, *args, **kwargs)

    setattr(Trainer, name, method)


def in_the_third_backward():
    original = Trainer.training_step

    @functools.wraps(original)
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step + 1 == STEP and not getattr(self, "mhtraind_preflight", False):
            self.passes = getattr(self, "passes", 0) + 1
            if self.passes == 3:
                next(p for p in model.parameters() if p.requires_grad).register_hook(out_of_memory)
        return original(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step


class InTheOptimizer(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        bare = getattr(optimizer, "optimizer", optimizer)
        register = bare.register_step_pre_hook if AT == "optimizer" else bare.register_step_post_hook
        register(lambda *_: out_of_memory() if state.global_step + 1 == STEP else None)


def in_the_optimizer():
    original = Trainer.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(InTheOptimizer())

    Trainer.__init__ = __init__


if AT is not None and os.environ.get("RAISE_OOM_RANK", RANK) == RANK and not (ONCE and os.path.exists(ONCE)):
    if AT == "backward":
        in_the_third_backward()
    elif AT in ("optimizer", "optimizer_done"):
        in_the_optimizer()
    else:
        name = {"eval": "evaluation_loop", "save": "_save_optimizer_and_scheduler"}[AT]
        before(name, lambda trainer: trainer.state.global_step >= STEP)
