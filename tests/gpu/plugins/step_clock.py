"""Plugin for --external_plugins (ms-swift 3.x and 4.x): when did each step end, and when did memory run out?

Appends JSON lines to the file GPU_SUITE_EVENTS, each with the time of day and the process: `loaded`, `begin`, `step`,
`out_of_memory` and `end` with the allocator's peaks. Without that variable it does nothing.
"""

import functools
import json
import os
import time

import torch
from transformers import Trainer, TrainerCallback


def say(event, **facts):
    line = {"event": event, "time": time.time(), "pid": os.getpid(), **facts}
    with open(os.environ["GPU_SUITE_EVENTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Clock(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        say("begin", step=state.global_step, max_steps=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            # The host runs ahead of the card: without this a step ends before its work is done.
            torch.cuda.synchronize()
        say("step", step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        peaks = {}
        if torch.cuda.is_available():
            peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        say("end", step=state.global_step, **peaks)


def with_clock(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Clock())

    return __init__


def watched(original):
    @functools.wraps(original)
    def training_step(self, model, inputs, *args, **kwargs):
        try:
            return original(self, model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            preflight = getattr(self, "mhtraind_preflight", False)
            say("out_of_memory", step=self.state.global_step + 1, preflight=preflight, words=str(error)[:600])
            raise

    return training_step


# A data loader worker may load plugins again (ms-swift 4.x), and trains nothing.
if os.environ.get("GPU_SUITE_EVENTS") and torch.utils.data.get_worker_info() is None:
    say("loaded")
    Trainer.__init__ = with_clock(Trainer.__init__)
    Trainer.training_step = watched(Trainer.training_step)
